"""fastclip.functional, get_tensor_norms and adaptive_clip_grad_ against their formulas in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import fastclip
import reference
from cases import Own, parameters
from fastclip import functional as F
from fastclip import gradients
from fastclip.gradients import contract, units

DTYPES = (*reference.FLOATS, torch.complex64)


def numbers(dtype=torch.float32, seed=0):
    """Ordinary, zero, empty, large, NaN, infinite, scalar, with holes."""
    generator = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    broken = make(5), make(5)
    broken[0][2], broken[1][1] = math.nan, -math.inf
    return [make(6, 7), make(3) * 1e-3, torch.zeros(4, dtype=dtype), make(0), *broken, make(()), make(9, 4)[:, 1:].t()]


@pytest.fixture
def no_complex(backend, request):
    """A forced compiled backend does not take complex numbers."""
    if backend == "cpu" and request.getfixturevalue("dtype").is_complex:
        pytest.skip("complex numbers are eager's")


def wide(tensor):
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def check_clipped(got, before, measure, bound):
    """Kept bitwise within the bound; within 1 ulp of t * (c / n) above it; a NaN unit is NaN, an infinite one 0."""
    coef = torch.where(measure <= bound, 1.0, torch.full_like(measure, bound) / measure)
    if measure.numel() == 1 and measure.item() <= bound:
        assert torch.equal(got, before)
    product = wide(before) * coef
    got, product = (torch.view_as_real(t) if t.is_complex() else t for t in (got, product))
    # complex: inf * 0 is the affair of torch's multiplication
    expected = product.to(got.dtype)
    same = (got == expected) | (got.isnan() & expected.isnan())
    ulp = torch.nextafter(expected.abs(), expected.new_tensor(math.inf)) - expected.abs()
    assert (same | ((got - expected).abs() <= ulp)).all(), (got[~same], expected[~same])


def norm_of(tensor, norm_type=2.0):
    return torch.tensor(reference.total_norm([tensor], norm_type), dtype=torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf, 3.0])
def test_by_norm(no_complex, dtype, norm_type):
    tensors, before = numbers(dtype), numbers(dtype)
    norms = F.clip_by_norm_([None, *tensors, None], 1.5, norm_type)
    assert norms.shape == (len(tensors),)
    for got, was, norm in zip(tensors, before, norms, strict=True):
        reference.assert_norm(norm, reference.total_norm([was], norm_type))
        if not (dtype.is_complex and not was.isfinite().all()):
            check_clipped(got, was, norm if dtype == torch.float64 else norm_of(was, norm_type), 1.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dim", [0, 1, -1, (0, 1), (1,)])
def test_by_norm_over_dimensions(backend, dtype, dim):
    make = lambda: [t for t in numbers(dtype) if t.dim() == 2]  # noqa: E731
    tensors, before = make(), make()
    norms = F.clip_by_norm_(tensors, 1.5, dim=dim)
    for got, was, norm in zip(tensors, before, norms, strict=True):
        expected = torch.linalg.vector_norm(was.double(), dim=dim, keepdim=True)
        torch.testing.assert_close(norm, expected.to(dtype))
        expected = norm if dtype == torch.float64 else expected
        kept = (expected <= 1.5).expand_as(was)
        assert torch.equal(got[kept], was[kept])
        check_clipped(got, was, expected, 1.5)


def test_rows_go_through_the_kernels(cpu):
    image = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
    for tensor, dims, taken in (
        (torch.randn(4, 5), (1,), units.Units),
        (torch.randn(4, 5).t(), (0,), units.Units),
        (image, (1, 2, 3), units.Units),
        (torch.randn(4, 5), (0,), units.TorchUnits),
        (torch.randn(4, 5, dtype=torch.complex64), (1,), units.TorchUnits),
    ):
        (read,) = units.of([tensor], [dims], writes=True)
        assert type(read) is taken
        expected = torch.linalg.vector_norm(tensor, dim=dims).reshape(-1)
        torch.testing.assert_close(read.norms(2.0).to(expected.dtype), expected)


@pytest.mark.parametrize("dims", [(1,), (0,), (1, 2), (0, 2), (2,), (0, 1, 2)])
def test_units_of_any_layout_and_size(backend, dims):
    """Long and short ones, with one step between them, several, and none; two tensors whose units interleave."""
    generator = torch.Generator().manual_seed(3)
    make = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    made = make(5, 6, 40)
    tensors = [make(2, 3, 70_000), make(4, 1, 3), made[:, :, :9], made[:, :, 9:20], make(7, 5, 6).permute(1, 0, 2)]
    tensors += [make(7, 5, 6).permute(0, 2, 1)[:2], make(3, 2, 0), make(0, 2, 3)]
    before = [t.clone() for t in tensors]
    norms = F.clip_by_norm_(tensors, 2.0, dim=dims)
    for got, was, found in zip(tensors, before, norms, strict=True):
        expected = torch.linalg.vector_norm(was.double(), dim=dims, keepdim=True)
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
        check_clipped(got, was, expected, 2.0)


def test_every_norm_is_that_before_any_write(backend):
    """Also where a unit that is no run of memory has each tensor read alone."""
    for odd in ([], [torch.ones(4, 4).t()], [torch.ones(2, 4, dtype=torch.complex64)]):
        if backend == "cpu" and odd and odd[0].is_complex():
            continue
        base = torch.tensor([[3.0, 4.0, 0.0, 12.0]])
        norms = F.clip_by_norm_([base[:, :2], base, *odd], 1.0, dim=1)
        assert [n.item() for n in norms[:2]] == [5.0, 13.0]
        weight = torch.nn.Parameter(torch.ones(2, 2))
        weight.grad = torch.full((2, 2), 5.0)
        fastclip.adaptive_clip_grad_([weight, weight, *parameters(odd)], 0.1)
        torch.testing.assert_close(weight.grad, torch.full((2, 2), 0.002))


def test_a_norm_that_cannot_be_had_leaves_all_as_they_are(fence):
    tensors = [torch.tensor([[3.0, 4.0]]), torch.ones(2, 2).to(torch.float8_e4m3fn)]
    before = fence(tensors[:1])
    with pytest.raises(RuntimeError):
        F.clip_by_norm_(tensors, 1.0, dim=1)
    assert before.unchanged()


def test_all_dimensions_that_torch_has():
    tensor = torch.full((1,) * 63 + (2,), 3.0)
    (norms,) = F.clip_by_norm_([tensor], 1.0, dim=0)
    assert norms.flatten().tolist() == [3.0, 3.0]
    assert tensor.flatten().tolist() == [1.0, 1.0]


@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf, 0.0, 3.0])
@pytest.mark.parametrize("repeat", [False, True])
def test_what_is_clipped_in_cache_has_the_bits_of_two_passes(cpu, norm_type, repeat):
    """Short tensors, long ones, holes; what is listed twice has the norm that it had before."""
    generator = torch.Generator().manual_seed(6)
    sizes = ((7,), (65_536,), (3_000_001,), (65_537,), (1_500_000,), (0,), (300, 401), ())
    made = [torch.randn(s, generator=generator, dtype=d) for s in sizes for d in (torch.float32, torch.bfloat16)]
    made.append(torch.randn(2_000_000, generator=generator, dtype=torch.float64))
    made.append(torch.randn(300, 401, generator=generator)[:, 1:])
    made += made[:4] if repeat else []
    bounds = torch.linspace(0.5, 900.0, len(made), dtype=torch.float64)
    divisors = torch.linspace(1.0, 3.0, len(made), dtype=torch.float64)
    for least in (0.0, 1e-6):
        tensors, expected = ([c[id(t)] for t in made] for c in ({id(t): t.clone() for t in made} for _ in range(2)))
        versions = [t._version for t in tensors]
        measures = gradients.of(tensors, gradients=False).clip_each_(norm_type, bounds, divisors, least)
        want = contract.Each.clip_each_(gradients.of(expected, gradients=False), norm_type, bounds, divisors, least)
        assert torch.equal(measures, want)
        reference.assert_bits(tensors, expected)
        assert all(t._version > version for t, version in zip(tensors, versions, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_by_average_norm_and_block_rms(no_complex, dtype):
    for clip, measure in (
        (F.clip_by_average_norm_, lambda n, size: n / max(size, 1)),
        (F.clip_by_block_rms_, lambda n, size: n / math.sqrt(max(size, 1))),
    ):
        tensors = [t for t in numbers(dtype) if not dtype.is_complex or t.isfinite().all()]
        before = [t.clone() for t in tensors]
        measures = clip(tensors, 0.2)
        for got, was, found in zip(tensors, before, measures, strict=True):
            expected = measure(norm_of(was), was.numel())
            torch.testing.assert_close(found, expected.to(found.dtype), equal_nan=True)
            check_clipped(got, was, found if dtype == torch.float64 else expected, 0.2)


@pytest.mark.parametrize("total_norm", [None, 2.0, torch.tensor(2.0)])
def test_by_global_norm(backend, total_norm):
    make = lambda: [t for t in numbers() if t.isfinite().all()]  # noqa: E731
    for bound in (1.5, 1e9, 0.0):
        tensors, before = make(), make()
        norm = F.clip_by_global_norm_([None, *tensors], bound, total_norm=total_norm)
        expected = torch.tensor(reference.total_norm(before) if total_norm is None else 2.0, dtype=torch.float64)
        torch.testing.assert_close(norm.double(), expected, rtol=1e-6, atol=0)
        for got, was in zip(tensors, before, strict=True):
            check_clipped(got, was, expected, bound)
    broken = [torch.tensor([1.0, math.inf]), torch.tensor([2.0])]
    F.clip_by_global_norm_(broken, 1.0)
    assert broken[0][0] == 0
    assert broken[0][1].isnan()
    assert broken[1] == 0


@pytest.mark.parametrize(("low", "high"), [(-0.5, 0.25), (None, 0.5), (0.1, None), (None, None), (0.3, 0.3)])
def test_by_value(backend, low, high):
    tensors, before = numbers(), numbers()
    F.clip_by_value_(tensors, low, high)
    for got, was in zip(tensors, before, strict=True):
        expected = was if low is None and high is None else was.clamp(low, high)
        assert torch.equal(got.nan_to_num(7), expected.nan_to_num(7))


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("dtype", reference.FLOATS)
def test_per_example(backend, dtype, per_layer):
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(6, *s, generator=generator, dtype=torch.float64).to(dtype) for s in ((3, 4), (), (5,))]
    for grad in grads:
        grad[2] = 0
    before = [g.clone() for g in grads]
    sums, count = F.per_example_clip([None, *grads], 1.3, per_layer=per_layer)
    norms = torch.stack([g.double().reshape(6, -1).norm(dim=1) for g in grads])
    bound = 1.3 / math.sqrt(3) if per_layer else 1.3
    norms = norms if per_layer else norms.norm(dim=0, keepdim=True)
    assert torch.equal(count, (norms > bound).sum(1) if per_layer else (norms > bound).sum())
    coefs = torch.where(norms <= bound, 1.0, bound / norms).expand(3, 6)
    for total, grad, coef in zip(sums, grads, coefs, strict=True):
        assert total.dtype == dtype
        expected = torch.einsum("b,b...->...", coef, grad.double())
        torch.testing.assert_close(total.double(), expected, rtol=torch.finfo(dtype).eps * 4, atol=1e-6)
    reference.assert_bits(grads, before)


def test_per_example_of_any_layout_and_size(backend):
    generator = torch.Generator().manual_seed(4)
    made = torch.randn(9, 4, 6, 50_000, generator=generator) * torch.linspace(0.5, 1.5, 9).reshape(9, 1, 1, 1)
    # Dense but permuted; in part of a row; of another dtype; without elements.
    grads = [made.permute(0, 2, 3, 1), made[..., :77], made[:, 0, 0, :13].double(), made[:, :0]]
    sums, count = F.per_example_clip(grads, 900.0)
    norms = torch.stack([g.double().reshape(9, -1).norm(dim=1) for g in grads]).norm(dim=0)
    assert 0 < count < 9
    assert count == (norms > 900.0).sum()
    coefs = (900.0 / norms).clamp(max=1.0)
    for total, grad in zip(sums, grads, strict=True):
        assert (total.shape, total.dtype) == (grad.shape[1:], grad.dtype)
        torch.testing.assert_close(total.double(), torch.einsum("b,b...->...", coefs, grad.double()), rtol=0, atol=3e-6)
    sums, count = F.per_example_clip([torch.ones(0, 3), torch.ones(0, 2)], 1.0)
    assert [s.tolist() for s in sums] == [[0.0] * 3, [0.0] * 2]
    assert count == 0


def test_a_broken_example_does_not_reach_the_count_of_others():
    grads = [torch.tensor([[math.inf, 1.0], [0.3, 0.4]])]
    sums, count = F.per_example_clip(grads, 1.0)
    assert count == 1
    assert sums[0][1] == pytest.approx(0.4)


def agc(weight, grad, factor=0.01, eps=1e-3, dims=None):
    dims = tuple(range(1, weight.dim())) if dims is None and weight.dim() > 1 else dims
    dims = tuple(range(weight.dim())) if dims is None else dims
    norm = lambda t: torch.linalg.vector_norm(t.double(), dim=dims or None, keepdim=True)  # noqa: E731
    bound, size = norm(weight).clamp(min=eps) * factor, norm(grad)
    return torch.where(size < bound, grad.double(), grad.double() * (bound / size.clamp(min=1e-6)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adaptive(backend, dtype):
    generator = torch.Generator().manual_seed(2)
    shapes = ((4, 5), (3, 2, 3, 3), (6,), (), (5, 4))
    weights = [torch.randn(s, generator=generator).to(dtype) for s in shapes]
    weights[0][1] = 0
    made = [torch.nn.Parameter(w) for w in weights]
    made[4] = torch.nn.Parameter(weights[4].t())
    grads = [(torch.randn(p.shape, generator=generator) * 0.02).to(dtype) for p in made]
    for p, g in zip(made, grads, strict=True):
        p.grad = g.clone()
    fastclip.adaptive_clip_grad_(made, exclude=lambda p: p is made[2])
    for i, (p, g) in enumerate(zip(made, grads, strict=True)):
        expected = g.double() if i == 2 else agc(p.detach(), g)
        torch.testing.assert_close(p.grad.double(), expected, rtol=torch.finfo(dtype).eps, atol=0)
        p.grad = g.clone()
    fastclip.adaptive_clip_grad_(made, 0.02, unit="tensor")
    for p, g in zip(made, grads, strict=True):
        expected = agc(p.detach(), g, 0.02, dims=tuple(range(p.dim())))
        torch.testing.assert_close(p.grad.double(), expected, rtol=torch.finfo(dtype).eps, atol=0)
        p.grad = g.clone()
    fastclip.adaptive_clip_grad_(made, unit=lambda p: 0 if p.dim() == 2 else None)
    torch.testing.assert_close(
        made[0].grad.double(), agc(made[0].detach(), grads[0], dims=(0,)), rtol=torch.finfo(dtype).eps, atol=0
    )


def test_norms_of_parts_come_in_the_order_of_the_list():
    tensors = [torch.tensor([3.0]), torch.tensor([4.0 + 3.0j]), torch.tensor([1.0]), torch.tensor([2.0j])]
    assert fastclip.get_tensor_norms(tensors).tolist() == [3, 5, 1, 2]
    assert F.clip_by_norm_(tensors, 2.0).tolist() == [3, 5, 1, 2]
    assert [t.abs().item() for t in tensors] == pytest.approx([2, 2, 1, 2])
    tensors = [torch.tensor([3.0]), torch.tensor([4.0 + 3.0j]), torch.tensor([1.0]), torch.tensor([2.0j])]
    assert F.clip_by_average_norm_(tensors, 2.0).tolist() == [3, 5, 1, 2]


@pytest.mark.parametrize("norm_dtype", [None, torch.float64, torch.bfloat16])
def test_tensor_norms(backend, norm_dtype):
    odd = [torch.zeros(2, dtype=torch.complex64)] if backend == "eager" else []
    tensors = [*numbers(), *odd, torch.ones(3)]
    norms = fastclip.get_tensor_norms(tensors, norm_dtype=norm_dtype)
    assert norms.dtype == (norm_dtype or torch.float32)
    for norm, tensor in zip(norms, tensors, strict=True):
        reference.assert_norm(norm, reference.total_norm([tensor]))
    assert fastclip.get_tensor_norms([]).shape == (0,)
    assert torch.equal(fastclip.get_tensor_norms(torch.tensor([3.0, 4.0])), torch.tensor([5.0]))


CALLS = {
    "max_norm": lambda t, bound: F.clip_by_norm_(t, bound),
    "max_norm by rows": lambda t, bound: F.clip_by_norm_(t, bound, dim=0),
    "max_norm global": lambda t, bound: F.clip_by_global_norm_(t, bound),
    "total_norm": lambda t, bound: F.clip_by_global_norm_(t, 1.0, total_norm=bound),
    "max_norm average": lambda t, bound: F.clip_by_average_norm_(t, bound),
    "threshold": lambda t, bound: F.clip_by_block_rms_(t, bound),
    "max_norm per example": lambda t, bound: F.per_example_clip(t, bound),
    "clip_factor": lambda t, bound: fastclip.adaptive_clip_grad_(parameters(t), bound),
    "eps": lambda t, bound: fastclip.adaptive_clip_grad_(parameters(t), eps=bound),
}


@pytest.mark.parametrize("bound", [-1.0, math.nan, True, "1.0", None, [1.0]], ids=repr)
@pytest.mark.parametrize("name", CALLS)
def test_nonsense_is_refused(name, bound, fence):
    if name == "total_norm" and bound is None:
        return
    tensors = [torch.tensor([30.0, 40.0]), torch.tensor([5.0, 1.0])]
    before = fence(tensors)
    with pytest.raises((TypeError, ValueError), match=name.split()[0]) as error:
        CALLS[name](tensors, bound)
    assert repr(bound) in str(error.value)
    assert before.unchanged()


@pytest.mark.parametrize("name", CALLS)
def test_integers_are_refused(name, fence):
    if name in ("clip_factor", "eps"):
        return  # no integer has a gradient
    tensors = [torch.tensor([30.0, 40.0]), torch.tensor([5, 1])]
    before = fence(tensors)
    argument = "per_example_grads" if name.endswith("per example") else "tensors"
    with pytest.raises(TypeError, match=rf"^{argument}\[1\].*torch.int64"):
        CALLS[name](tensors, 1.0)
    assert before.unchanged()


def test_bounds_of_values(fence):
    tensors = [torch.tensor([30.0, 40.0]), torch.ones(2).half()]
    before = fence(tensors)
    for low, high, error in ((2.0, 1.0, "min <= max"), (math.nan, 1.0, "min"), (0, True, "max"), (0, 1e6, "max.*16")):
        with pytest.raises((TypeError, ValueError), match=error):
            F.clip_by_value_(tensors, low, high)
    with pytest.raises(ValueError, match="dim: 1 is no dimension"):
        F.clip_by_norm_(tensors, 1.0, dim=1)
    with pytest.raises(ValueError, match=r"unit: .*'row'"):
        fastclip.adaptive_clip_grad_(parameters(tensors), unit="row")
    with pytest.raises(ValueError, match="per_example_grads"):
        F.per_example_clip([torch.ones(2, 3), torch.ones(3)], 1.0)
    assert before.unchanged()


def test_a_tensor_listed_twice_is_clipped_twice(backend):
    tensor = torch.tensor([3.0, 4.0])
    F.clip_by_norm_([tensor, tensor], 1.0)
    torch.testing.assert_close(tensor, torch.tensor([3.0, 4.0]) / 25)


def test_tensor_subclasses():
    """Each is clipped as torch's own tensors are, also where the bounds are not symmetric."""
    clips = (
        lambda t: F.clip_by_value_(t, -1.0, 2.0),
        lambda t: F.clip_by_norm_(t, 1.0),
        lambda t: F.clip_by_norm_(t, 1.0, dim=0),
        lambda t: F.clip_by_global_norm_(t, 1.0),
        lambda t: F.clip_by_average_norm_(t, 0.1),
        lambda t: F.clip_by_block_rms_(t, 0.1),
    )
    for clip in clips:
        plain = [torch.tensor([-3.0, 4.0]), torch.tensor([0.5, 6.0])]
        mixed = [plain[0].clone(), plain[1].clone().as_subclass(Own)]
        expected, found = clip(plain), clip(mixed)
        torch.testing.assert_close([t.as_subclass(torch.Tensor) for t in mixed], plain)
        if isinstance(expected, torch.Tensor):
            torch.testing.assert_close(found.as_subclass(torch.Tensor), expected)


def test_nothing_follows_the_default_device():
    grads = [torch.tensor([[3.0, 4.0]]), torch.tensor([[0.3, 0.4]])]
    calls = (
        lambda t: F.clip_by_average_norm_(t, 0.5),
        lambda t: F.clip_by_block_rms_(t, 0.5),
        lambda t: F.clip_by_global_norm_(t, 0.5, total_norm=5.0),
        lambda t: F.per_example_clip(t, 0.5)[0][0],
    )
    for call in calls:
        expected = call([grad.clone() for grad in grads])
        with torch.device("meta"):
            found = call([grad.clone() for grad in grads])
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("bound", [np.bool_(True), np.array(True), bytearray(b"1"), memoryview(b"1")])
def test_what_only_looks_like_a_number_is_no_bound(bound):
    for call in (F.clip_by_norm_, F.clip_by_global_norm_, F.clip_by_block_rms_, F.per_example_clip):
        with pytest.raises(TypeError, match=r"(max_norm|threshold): expected a number"):
            call([torch.tensor([[3.0, 4.0]])], bound)


@pytest.mark.parametrize("dim", [1.5, "0", torch.tensor(1), (0, True)])
def test_dimensions_are_integers(dim):
    with pytest.raises(ValueError, match=r"dim: .* is no dimension"):
        F.clip_by_norm_(torch.tensor([[3.0, 4.0]]), 1.0, dim=dim)
    assert F.clip_by_norm_(torch.tensor([[3.0, 4.0]]), 1.0, dim=np.int64(1))[0] == 5


@pytest.mark.parametrize("norm_type", [0.0, 10.0, -10.0])
def test_rows_and_columns_have_the_same_norm(norm_type):
    """Order 0 says whether there is a non-zero; other powers may leave float64 on the way to the norm."""
    rows = torch.tensor([[1e38, 3e37, 1e38], [0.0, 0.0, 0.0], [2e38, 1e-3, 1.0]])
    (expected,) = F.clip_by_norm_([rows.clone()], math.inf, norm_type, dim=1)
    (found,) = F.clip_by_norm_([rows.t().contiguous()], math.inf, norm_type, dim=0)
    torch.testing.assert_close(found.t(), expected)
    assert expected.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_coefficients_below_float32(backend, dtype):
    """Sums and columns of numbers that are 1e48 times their bound are small, not 0."""
    grads = torch.tensor([[3e38, 0.0], [2e38, 1e38]], dtype=dtype)
    coefs = 1e-10 / grads.double().norm(dim=1, keepdim=True)
    (found,), count = F.per_example_clip([grads], 1e-10)
    torch.testing.assert_close(found.double(), (grads.double() * coefs).sum(0), rtol=1e-2, atol=0)
    assert count == 2
    columns = grads.t().contiguous()
    F.clip_by_norm_([columns], 1e-10, dim=0)
    torch.testing.assert_close(columns.t().double(), grads.double() * coefs, rtol=1e-2, atol=0)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning")
def test_sparse_tensors_have_no_units(fence):
    indices = torch.tensor([[0, 2]])
    grads = [torch.full((3, 2), 9.0), torch.sparse_coo_tensor(indices, torch.ones(2, 2), (3, 2), check_invariants=True)]
    before = fence(grads[:1])
    with pytest.raises(TypeError, match=r"^tensors\[1\]: .*sparse_coo"):
        F.clip_by_norm_(grads, 1.0, dim=1)
    with pytest.raises(TypeError, match=r"^per_example_grads\[1\]: .*sparse_coo"):
        F.per_example_clip(grads, 1.0)
    with pytest.raises(TypeError, match=r"^parameters: gradient 1: .*sparse_coo"):
        fastclip.adaptive_clip_grad_(parameters(grads))
    assert before.unchanged()
