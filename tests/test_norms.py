"""Every backend x case x dtype x norm_type against the float64 oracle."""

from __future__ import annotations

import math

import pytest
import torch

import fastclip
import reference
from cases import CHUNK, grid, place, random
from fastclip import arithmetic
from fastclip.backends import eager

LIST_DTYPE = {  # what torch returns for each set of dtypes; test_parity asks torch itself
    frozenset({torch.bfloat16, torch.float16}): torch.float32,
    frozenset({torch.complex64}): torch.float32,
    frozenset({torch.complex128}): torch.float64,
}


def promoted(tensors) -> torch.dtype:
    """Return the dtype of the norm: promotion over real parts."""
    dtypes = frozenset(t.dtype for t in tensors)
    if len(dtypes) == 1 and not next(iter(dtypes)).is_complex:
        return next(iter(dtypes))
    return LIST_DTYPE.get(dtypes) or (torch.float64 if torch.float64 in dtypes else torch.float32)


def forced(backend: str, case) -> bool:
    """False if this backend has to refuse the case, which test_errors checks."""
    return case.kernel or backend == "eager"


@pytest.mark.parametrize(("case", "dtype"), grid())
def test_norm(backend, case, dtype, fence):
    """Rounded once to torch's dtype; and, by `norm_dtype`, within float64's own error before that rounding."""
    if not forced(backend, case):
        return
    tensors = case.make(dtype)
    before, versions = fence(tensors), [t._version for t in tensors]
    for norm_type in reference.NORM_TYPES:
        expected = reference.total_norm(tensors, norm_type)
        with reference.during(norm_type):
            reference.assert_norm(fastclip.get_total_norm(tensors, norm_type), expected, promoted(tensors))
            wide = fastclip.get_total_norm(tensors, norm_type, norm_dtype=torch.float64)
            reference.assert_norm(wide, expected, torch.float64)
    assert before.unchanged()
    assert [t._version for t in tensors] == versions


@pytest.mark.parametrize("norm_type", [2.5, 4, 1.5, 7, 0.1, -0.5, -3.0, 1e-3, 40])
def test_other_orders(backend, norm_type):
    """Any p: the general path, on values near 1 so that float64 powers neither overflow nor vanish."""
    generator = torch.Generator().manual_seed(5)
    values = torch.rand(300, dtype=torch.float64, generator=generator) + 0.5
    for dtype in reference.FLOATS:
        tensors = [place(values.to(dtype), 3), place(values[:7].to(dtype))]
        actual = fastclip.get_total_norm(tensors, norm_type, norm_dtype=torch.float64).item()
        expected = reference.total_norm(tensors, norm_type)
        # 1/p multiplies the relative error of the sum.
        assert actual == pytest.approx(expected, rel=reference.WIDE * max(1, 1 / abs(norm_type)), abs=0)


@pytest.mark.parametrize("dtype", reference.FLOATS)
def test_order_nan(backend, dtype):
    tensors = [place(torch.tensor([3.0, 4.0], dtype=dtype))]
    assert fastclip.get_total_norm(tensors, math.nan).isnan()


def test_order_zero_counts_tensors(backend):
    """torch reduces the counts again with order 0, so a tensor counts once however many of its elements do."""
    one, zero = torch.tensor([3.0, 4.0, 0.0]), torch.tensor([0.0, -0.0])
    not_a_number = torch.tensor([math.nan, 0.0])
    for tensors, expected in (
        ([one], 1),
        ([one, one], 2),
        ([one, zero], 1),
        ([zero, zero], 0),
        ([one, not_a_number, torch.empty(0), torch.tensor(-1e-45)], 3),
        ([torch.ones(2 * CHUNK + 1), zero, torch.ones(3, dtype=torch.bfloat16)], 2),
    ):
        assert fastclip.get_total_norm(tensors, 0).item() == expected
        assert torch.nn.utils.get_total_norm(tensors, 0).item() == expected


@pytest.mark.parametrize("dtype", reference.FLOATS)
@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf, -math.inf, 0.0, 3.0])
def test_every_position_counts(backend, dtype, norm_type):
    """One element that matters at each edge of each region: a dropped head, tail or chunk shows as a wrong norm."""
    background, expected = (4.0 if norm_type == -math.inf else 0.0), (1.0 if norm_type == 0 else 3.0)
    for size in (1, 31, 33, 129, CHUNK + 1, 2 * CHUNK + 33):
        tensor = place(torch.full((size,), background, dtype=dtype), offset=size % 3)
        for position in {0, size // 2, size - 2, size - 1, min(CHUNK, size) - 1, min(CHUNK, size - 1)} & set(
            range(size)
        ):
            tensor[position] = -3.0
            actual = fastclip.get_total_norm([tensor], norm_type).item()
            tensor[position] = background
            assert actual == pytest.approx(expected, rel=2 * torch.finfo(dtype).eps), (size, position)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", reference.FLOATS)
def test_one_nan_anywhere_is_seen(backend, dtype, norm_type):
    """max and min must not lose a NaN to a comparison, whichever lane, chunk or tensor it is in."""
    for size in (1, 2, 33, 70, CHUNK + 1):
        for position in {0, 1, size // 2, size - 2, size - 1} & set(range(size)):
            tensor = place(torch.ones(size, dtype=dtype))
            tensor[position] = math.nan
            for tensors in ([tensor], [torch.ones(3), tensor], [tensor, torch.full((40,), math.inf), torch.ones(3)]):
                assert fastclip.get_total_norm(tensors, norm_type).isnan(), (size, position, len(tensors))


@pytest.mark.parametrize("dtype", reference.FLOATS)
def test_error_is_at_most_torchs(backend, dtype):
    """Against the oracle, at most torch's own error and one rounding more."""
    generator = torch.Generator().manual_seed(11)
    row = reference.tolerance(dtype)
    for _ in range(30):
        tensors = [random(generator, dtype, n) for n in (5, 300, 4000)]
        for norm_type in (1.0, 2.0, 3.0, math.inf):
            expected = reference.total_norm(tensors, norm_type)
            torchs = abs(torch.nn.utils.get_total_norm(tensors, norm_type).item() - expected)
            ours = abs(fastclip.get_total_norm(tensors, norm_type).item() - expected)
            assert ours <= min(torchs + row.norm * expected, row.norm * expected)


def test_threads_give_the_same_bits(cpu):
    generator = torch.Generator().manual_seed(2)
    tensors = [random(generator, dtype, n) for dtype in reference.FLOATS for n in (7, 5 * CHUNK + 13, CHUNK)]
    tensors.append(random(generator, torch.float32, 700, 301).t()[1:])
    before = torch.get_num_threads()
    norms = {}
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            norms[threads] = [
                fastclip.get_total_norm(tensors, norm_type, norm_dtype=torch.float64).item()
                for norm_type in reference.NORM_TYPES
            ]
    finally:
        torch.set_num_threads(before)
    assert all(norm == norms[1] for norm in norms.values()), norms


def test_repeatable(backend):
    generator = torch.Generator().manual_seed(3)
    tensors = [random(generator, torch.float32, 3 * CHUNK + 5), random(generator, torch.bfloat16, CHUNK + 1)]
    first = fastclip.get_total_norm(tensors, norm_dtype=torch.float64).item()
    assert all(fastclip.get_total_norm(tensors, norm_dtype=torch.float64).item() == first for _ in range(5))


HIGH_ORDERS = (10.0, 40.0, 100.0, 1e3, 1e6, -10.0, -100.0, -1e3, 3.0, -1.0, 0.95, 0.5)


def of_high_orders(dtype: torch.dtype) -> dict[str, list[torch.Tensor]]:
    """Return lists whose powers are beyond float64 in one way each."""
    info, generator = torch.finfo(dtype), torch.Generator().manual_seed(8)
    wide = random(generator, dtype, 300)
    return {
        "all equal": [torch.full((1000,), 2000.0, dtype=dtype)],
        "around 1": [wide, random(generator, dtype, 2 * CHUNK + 5), wide.repeat(2, 1).t()],
        "largest and smallest": [torch.full((5,), info.max / 2, dtype=dtype), torch.full((7,), info.tiny, dtype=dtype)],
        "subnormal": [torch.full((5,), info.smallest_normal * info.eps, dtype=dtype)],
        "far apart": [torch.full((3,), 1e-5, dtype=dtype), torch.linspace(1e3, 1e4, CHUNK + 1).to(dtype)],
        "zeros": [torch.zeros(5, dtype=dtype)],
        "a zero": [torch.full((5,), 2.0, dtype=dtype), torch.tensor([3.0, -0.0], dtype=dtype)],
        "inf": [torch.full((5,), 2000.0, dtype=dtype), torch.tensor([1.0, -math.inf], dtype=dtype)],
        "all inf": [torch.full((5,), -math.inf, dtype=dtype)],
        "nan": [torch.full((5,), 2000.0, dtype=dtype), torch.tensor([math.nan, 0.0, math.inf], dtype=dtype)],
        "empty": [torch.empty(0, dtype=dtype), torch.tensor([3000.0, -4000.0], dtype=dtype), torch.empty(0)],
        "nothing": [torch.empty(0, dtype=dtype)],
    }


def check_high_orders(total_norm, dtypes=reference.FLOATS) -> None:
    """Check the norm of an engine: powers summed in a unit, so that they neither overflow nor vanish."""
    for dtype in dtypes:
        for name, tensors in of_high_orders(dtype).items():
            for norm_type in HIGH_ORDERS:
                expected = reference.total_norm(tensors, norm_type)
                with reference.during(dtype, name, norm_type):
                    reference.assert_norm(total_norm(tensors, norm_type), expected, torch.float64)


def test_high_orders(cpu):
    ops = torch.ops.fastclip
    check_high_orders(lambda tensors, p: ops.clip_grad_norm_([t.clone() for t in tensors], 1.0, p, dtype=torch.float64))
    grads = [torch.full((3,), 2000.0), torch.full((2,), 1000.0)]
    norm = ops.clip_grad_norm_(grads, 1.0, 100.0)
    assert norm.item() == pytest.approx(2000 * 3**0.01, rel=1e-6)
    assert grads[0].tolist() == pytest.approx([1 / 3**0.01] * 3, rel=1e-6)


def test_high_orders_eager():
    check_high_orders(eager.total_norm)
    numbers = [torch.tensor([1e30 + 1e30j, 2e30]), torch.tensor([3e200 - 4e200j], dtype=torch.complex128)]
    for norm_type in HIGH_ORDERS:
        expected = reference.total_norm(numbers, norm_type)
        reference.assert_norm(eager.total_norm(numbers, norm_type), expected, torch.float64)
    for norm_type in reference.NORM_TYPES:
        tensors = [torch.randn(5), torch.randn(2, 3).double()]
        expected = reference.total_norm(tensors, norm_type)
        reference.assert_norm(eager.total_norm(tensors, norm_type), expected, torch.float64)
    assert eager.total_norm([torch.ones(2)], math.nan).isnan()


@pytest.mark.parametrize("norm_type", [3.0, 100.0, 0.5, 1e-2, -1.0, -100.0])
@pytest.mark.parametrize(
    "values",
    [
        [[3.0, 4.0], [1e-3], [2e3, 1.0]],
        [[1e300, 2e300], [1e-300]],
        [[0.0], [0.0, -0.0]],
        [[0.0], [2.0]],
        [[math.inf], [2.0]],
        [[math.inf], [math.inf]],
        [[math.nan], [0.0], [math.inf]],
    ],
)
def test_norms_of_parts_combine(values, norm_type):
    """From the norms of parts to that of the whole, on the device; without elements a part has 0, or inf for p < 0."""
    parts = [torch.tensor(v, dtype=torch.float64) for v in values]
    norms = [eager.total_norm([part], norm_type) for part in parts]
    norms.append(torch.tensor(0.0 if norm_type > 0 else math.inf, dtype=torch.float64))
    combined = arithmetic.combine_norms(torch.stack(norms), norm_type)
    expected = reference.total_norm(parts, norm_type)
    assert combined.dtype == torch.float64
    assert combined.item() == pytest.approx(expected, rel=1e-12, abs=0, nan_ok=True)
    assert arithmetic.combine_norms(torch.stack(norms), math.nan).isnan()


def test_high_orders_have_the_same_bits(cpu):
    """For every number of threads."""
    tensors = [t for dtype in reference.FLOATS for t in of_high_orders(dtype)["around 1"]]
    before, norms = torch.get_num_threads(), {}
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            norms[threads] = [
                torch.ops.fastclip.clip_grad_norm_([t.clone() for t in tensors], 1.0, p, dtype=torch.float64).item()
                for p in HIGH_ORDERS
            ]
    finally:
        torch.set_num_threads(before)
    assert all(norm == norms[1] for norm in norms.values()), norms
