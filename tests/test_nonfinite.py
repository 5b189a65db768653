"""What a clip carries beside its bound: the policy for inf and NaN, `found_inf` and `inv_scale`."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import math

import pytest
import torch

import fastclip
import on_cpu
import reference
import subproc
from cases import CHUNK, parameters, place, random
from ways import WAYS, one_rank

BAD = (math.inf, -math.inf, math.nan)
EVERY_WAY = [*WAYS, "cuda"]
needs_cuda_on_cpu = pytest.mark.skipif(on_cpu.unavailable() is not None, reason=str(on_cpu.unavailable()))


@pytest.fixture(params=[pytest.param(way, marks=needs_cuda_on_cpu if way == "cuda" else ()) for way in EVERY_WAY])
def way(request):
    """Each way by which a list reaches the kernels, and the CUDA kernels on the CPU."""
    with contextlib.ExitStack() as stack:
        if request.param == "cuda":
            stack.enter_context(on_cpu.use())
            yield WAYS["reader"]
            return
        if request.param == "sharded":
            stack.enter_context(one_rank())
        yield WAYS[request.param]


def lists(bad: float | None = None) -> list[torch.Tensor]:
    """Return every dtype, dense at every alignment, with holes, and over a chunk; one element of each may be bad."""
    generator = torch.Generator().manual_seed(5)
    grads = [random(generator, dtype, n, offset=k) for dtype in reference.FLOATS for n, k in ((1, 0), (37, 1))]
    grads += [random(generator, dtype, 9, 6).t()[::2] for dtype in reference.FLOATS]
    grads.append(random(generator, torch.float32, CHUNK + 3, offset=2))
    if bad is not None:
        for i, grad in enumerate(grads):
            grad[(i % grad.shape[0], -1)[: grad.dim()]] = bad
    return grads


def clones(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [t.clone() for t in tensors]


def put_back(grads: list[torch.Tensor], twins: list[torch.Tensor]) -> None:
    """Gradients again as they were, where they are."""
    for grad, twin in zip(grads, twins, strict=True):
        grad.copy_(twin)


def expect(grads, norm: float, max_norm: float, nonfinite: str = "propagate", inv_scale: float = 1.0):
    """Return the gradients after a clip whose wide norm is known."""
    grads = clones(grads)
    for grad in grads:
        if nonfinite == "sanitize" or (nonfinite == "zero" and not math.isfinite(norm)):
            keep = grad.isfinite() if nonfinite == "sanitize" else torch.zeros_like(grad, dtype=torch.bool)
            grad.masked_fill_(~keep, 0.0)
    if nonfinite != "zero" or math.isfinite(norm):
        reference.scale_rounded_(grads, reference.clip_coef(norm, max_norm) * inv_scale)
    return grads


def sanitized(grads: list[torch.Tensor]) -> list[torch.Tensor]:
    return [grad.masked_fill(~grad.isfinite(), 0.0) for grad in grads]


# nonfinite


@pytest.mark.parametrize("bad", [None, *BAD])
@pytest.mark.parametrize("nonfinite", ["propagate", "zero", "sanitize"])
def test_policy(way, nonfinite, bad, fence):
    grads = lists(bad)
    twins = clones(grads)
    counted = sanitized(twins) if nonfinite == "sanitize" else twins
    for norm_type, max_norm in itertools.product((2.0, 1.0, math.inf, 3.0), (0.3, 1e9, math.inf)):
        put_back(grads, twins)
        before, found_inf = fence(grads), torch.tensor(math.nan)
        norm = reference.total_norm(counted, norm_type)
        given = way.clip_grad_norm_(
            grads, max_norm, norm_type, nonfinite=nonfinite, found_inf=found_inf, norm_dtype=torch.float64
        )
        with reference.during(norm_type, max_norm):
            reference.assert_norm(given, norm, torch.float64)
            assert found_inf.item() == (not math.isfinite(norm))
            reference.assert_bits(grads, expect(twins, given.item(), max_norm, nonfinite))
            assert before.outside_unchanged()


@pytest.mark.parametrize("norm_type", [-math.inf, -1.0, 0.0])
def test_orders_that_do_not_see_an_infinity(way, norm_type):
    """The smallest magnitude, a negative order and the count are finite beside inf; sanitizing finds it."""
    grads = [torch.tensor([3.0, math.inf, -5.0]), torch.tensor([math.nan, 4.0])]
    want = reference.total_norm(sanitized(grads), norm_type)
    found_inf = torch.tensor(math.nan)
    given = way.clip_grad_norm_(grads, 0.5, norm_type, nonfinite="sanitize", found_inf=found_inf)
    reference.assert_norm(given, want)
    assert found_inf.item() == 0.0
    factor = reference.clip_coef(want, 0.5)
    torch.testing.assert_close(grads[0], torch.tensor([3.0, 0.0, -5.0]) * factor)
    torch.testing.assert_close(grads[1], torch.tensor([0.0, 4.0]) * factor)
    grads = [torch.tensor([3.0, math.inf])]
    way.clip_grad_norm_(grads, 1e9, norm_type, nonfinite="zero")
    assert grads[0].tolist() == [3.0, math.inf]  # nothing that the norm sees


@pytest.mark.parametrize("bad", BAD)
def test_raise(way, bad):
    for nonfinite in ({"nonfinite": "raise"}, {"error_if_nonfinite": True}):
        grads, found_inf = [torch.tensor([3.0, bad]), torch.tensor([4.0])], torch.tensor(math.nan)
        with pytest.raises(RuntimeError, match="non-finite"):
            way.clip_grad_norm_(grads, 1.0, found_inf=found_inf, inv_scale=0.5, **nonfinite)
        reference.assert_bits(grads, [torch.tensor([3.0, bad]), torch.tensor([4.0])])
        assert found_inf.item() == 1.0
    grads = [torch.tensor([3.0]), torch.tensor([4.0])]
    assert way.clip_grad_norm_(grads, 1.0, nonfinite="raise", inv_scale=0.5, found_inf=found_inf) == 2.5
    torch.testing.assert_close(grads, [torch.tensor([0.6]), torch.tensor([0.8])])
    assert found_inf.item() == 0.0


@pytest.mark.parametrize("bad", [None, *BAD])
def test_an_infinite_bound_writes_nothing(way, bad, fence):
    """As transformers calls at every step to log the norm."""
    grads = lists(bad)
    before, norm = fence(grads), reference.total_norm(grads)
    reference.assert_norm(way.clip_grad_norm_(grads, math.inf, norm_dtype=torch.float64), norm, torch.float64)
    way.clip_grads_with_norm_(grads, math.inf, torch.tensor(norm))
    assert before.unchanged()


@pytest.mark.parametrize("max_norm", [0.0, -2.0, math.nan])
@pytest.mark.parametrize("nonfinite", ["zero", "sanitize"])
def test_bounds_that_clip_nothing_keep_their_meaning(way, nonfinite, max_norm):
    grads = [torch.tensor([3.0, -4.0])]
    way.clip_grad_norm_(grads, max_norm, nonfinite=nonfinite)
    factor = reference.clip_coef(5.0, max_norm)
    torch.testing.assert_close(grads[0], torch.tensor([3.0, -4.0]) * factor, equal_nan=True)


def test_a_sum_beyond_float64_is_not_finite_once_sanitized(way):
    grads = [torch.tensor([1e200, -1e200, math.nan], dtype=torch.float64)]
    found_inf = torch.tensor(math.nan)
    assert way.clip_grad_norm_(grads, 1.0, nonfinite="sanitize", found_inf=found_inf).item() == math.inf
    assert found_inf.item() == 1.0


# found_inf


def test_found_inf_of_any_shape_of_one_element(way):
    apart = torch._neg_view(torch.tensor(7.0))  # its sign is not in memory
    last = torch.tensor([7.0, 7.0])[1:]
    for found_inf in (torch.tensor(7.0), torch.tensor([7.0]), torch.tensor([[7.0]]), last, apart):
        version = found_inf._version
        way.clip_grad_norm_([torch.tensor([math.inf])], 1.0, found_inf=found_inf)
        assert found_inf.reshape(()).item() == 1.0
        assert found_inf._version > version
        way.clip_grad_norm_([torch.tensor([2.0])], 1.0, found_inf=found_inf)
        assert found_inf.reshape(()).item() == 0.0


def test_without_gradients_nothing_is_found():
    made = [torch.nn.Parameter(torch.ones(2))]
    for call in (fastclip.clip_grad_norm_, fastclip.clip_grad_value_):
        found_inf = torch.tensor(math.nan)
        call(made, 1.0, found_inf=found_inf, inv_scale=0.5, nonfinite="zero")
        assert found_inf.item() == 0.0


# inv_scale


@pytest.mark.parametrize("inv_scale", [1.0, 2.0**-16, 1 / 3, -0.7, 0.0, 3e5])
def test_inv_scale(way, inv_scale):
    """The norm of the product, and one product with both factors."""
    grads = lists()
    twins = clones(grads)
    products = [t.double() * inv_scale for t in twins]
    for norm_type, max_norm in itertools.product((2.0, math.inf, 0.0, -math.inf, 3.0), (0.3, 1e9, math.inf)):
        want = reference.total_norm(products, norm_type)
        kinds = (inv_scale, torch.tensor(inv_scale, dtype=torch.float64))
        for given in kinds:
            put_back(grads, twins)
            found_inf = torch.tensor(math.nan)
            norm = way.clip_grad_norm_(
                grads, max_norm, norm_type, inv_scale=given, found_inf=found_inf, norm_dtype=torch.float64
            )
            with reference.during(norm_type, max_norm, given):
                assert norm.item() == pytest.approx(want, rel=1e-12, abs=0)
                reference.assert_bits(grads, expect(twins, norm.item(), max_norm, inv_scale=inv_scale))
                assert found_inf.item() == 0.0


@pytest.mark.parametrize("inv_scale", [torch.tensor(4), torch.tensor(0.25, dtype=torch.bfloat16), torch.tensor(True)])
def test_inv_scale_of_any_real_dtype(way, inv_scale):
    grads = [torch.tensor([3.0, 4.0])]
    norm = way.clip_grad_norm_(grads, 1e9, inv_scale=inv_scale)
    assert norm.item() == 5 * float(inv_scale)
    torch.testing.assert_close(grads[0], torch.tensor([3.0, 4.0]) * float(inv_scale))


@pytest.mark.parametrize("inv_scale", [math.nan, math.inf])
def test_a_scale_that_is_not_finite(way, inv_scale):
    for nonfinite, found in (("propagate", 1.0), ("zero", 1.0)):
        grads, found_inf = [torch.tensor([3.0, 4.0])], torch.tensor(math.nan)
        norm = way.clip_grad_norm_(grads, 1.0, inv_scale=inv_scale, nonfinite=nonfinite, found_inf=found_inf)
        assert not norm.isfinite()
        assert found_inf.item() == found
        assert grads[0].tolist() == [0.0, 0.0] if nonfinite == "zero" else not grads[0].isfinite().any()


# clip_grad_value_


@pytest.mark.parametrize("bad", [None, *BAD])
@pytest.mark.parametrize("nonfinite", ["propagate", "zero"])
def test_value(way, nonfinite, bad, fence):
    for inv_scale, clip_value in itertools.product((None, 0.25, torch.tensor(-3.0)), (0.4, math.inf)):
        grads = [grad for grad in lists(bad) if grad.numel()]
        before, found_inf, twins = fence(grads), torch.tensor(math.nan), clones(grads)
        way.clip_grad_value_(grads, clip_value, nonfinite=nonfinite, found_inf=found_inf, inv_scale=inv_scale)
        assert found_inf.item() == (bad is not None)
        if bad is not None and nonfinite == "zero":
            expected = [torch.zeros_like(t) for t in twins]
        else:
            reference.scale_rounded_(twins, 1.0 if inv_scale is None else float(inv_scale))
            expected = reference.clip_by_value(twins, clip_value)
        with reference.during(inv_scale, clip_value):
            reference.assert_bits(grads, expected)
            assert before.outside_unchanged()


def test_value_with_a_scale_alone(way):
    grads = [torch.tensor([-3.0, 0.5, 40.0])]
    way.clip_grad_value_(grads, 1.0, inv_scale=0.1)
    torch.testing.assert_close(grads[0], torch.tensor([-0.3, 0.05, 1.0]))


# Errors, before anything is written


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        (
            {"nonfinite": "skip"},
            ValueError,
            "nonfinite: expected one of 'propagate', 'raise', 'zero', 'sanitize', got 'sk",
        ),
        ({"nonfinite": None}, ValueError, "nonfinite: expected one of"),
        ({"nonfinite": "zero", "error_if_nonfinite": True}, ValueError, "nonfinite: 'zero' leaves nothing to raise"),
        ({"found_inf": 0.0}, TypeError, "found_inf: expected a float32 Tensor of one element, got 0.0"),
        ({"found_inf": torch.zeros(2)}, ValueError, r"found_inf: .* got a torch.float32 one of shape \(2,\)"),
        ({"found_inf": torch.tensor(False)}, ValueError, "found_inf: .* got a torch.bool one"),
        ({"inv_scale": "much"}, ValueError, "inv_scale: expected a number, got 'much'"),
        (
            {"inv_scale": torch.ones(1)},
            ValueError,
            r"inv_scale: .* 0-dim Tensor, got a torch.float32 one of shape \(1,\)",
        ),
        ({"inv_scale": torch.tensor(1j)}, ValueError, "inv_scale: .* got a torch.complex64 one"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_errors(options, error, text, fence):
    grads = [torch.tensor([3.0, math.inf])]
    before = fence(grads)
    with pytest.raises(error, match=text):
        fastclip.clip_grad_norm_(parameters(grads), 1.0, **options)
    if "error_if_nonfinite" not in options:
        with pytest.raises(error, match=text.partition(", 'raise'")[0]):
            fastclip.clip_grad_value_(parameters(grads), 1.0, **options)
    assert before.unchanged()


def test_value_knows_no_other_policy():
    for nonfinite in ("raise", "sanitize"):
        with pytest.raises(ValueError, match="nonfinite: expected one of 'propagate', 'zero', got"):
            fastclip.clip_grad_value_(parameters([torch.ones(2)]), 1.0, nonfinite=nonfinite)


class Odd(torch.Tensor):
    """A subclass that torch's own functions take."""


def test_what_torchs_functions_clip(fence):
    grad = torch.tensor([3.0, 4.0]).as_subclass(Odd)
    parameter = torch.nn.Parameter(torch.zeros(2).as_subclass(Odd))
    parameter.grad = grad
    options = ({"nonfinite": "zero"}, {"nonfinite": "sanitize"}, {"found_inf": torch.tensor(0.0)}, {"inv_scale": 0.5})
    for asked in options:
        with pytest.raises(TypeError, match="found_inf, inv_scale: not supported for gradients of type Odd"):
            fastclip.clip_grad_norm_([parameter], 1.0, **asked)
        if asked.get("nonfinite") != "sanitize":
            with pytest.raises(TypeError, match="not supported for gradients of type Odd"):
                fastclip.clip_grad_value_([parameter], 1.0, **asked)
    assert grad.tolist() == [3.0, 4.0]
    fastclip.clip_grad_norm_([parameter], 1.0, nonfinite="raise")
    torch.testing.assert_close(grad.as_subclass(torch.Tensor), torch.tensor([0.6, 0.8]))


# Compilers, other kernels


def _traced(made, found_inf, inv_scale):
    norm = fastclip.clip_grad_norm_(made, 1.0, nonfinite="zero", found_inf=found_inf, inv_scale=inv_scale)
    other = fastclip.clip_grad_norm_(made, math.inf, nonfinite="sanitize")
    fastclip.clip_grad_value_(made, 0.5, found_inf=found_inf, inv_scale=2.0)
    return norm, other


@pytest.mark.parametrize("bad", [None, math.nan])
def test_one_graph(bad):
    ours, theirs = lists(bad), lists(bad)
    found, expected = torch.tensor(math.nan), torch.tensor(math.nan)
    traced = torch.compile(_traced, backend="aot_eager", fullgraph=True)
    results = traced(parameters(ours), found, torch.tensor(0.5))
    torch.testing.assert_close(results, _traced(parameters(theirs), expected, torch.tensor(0.5)), equal_nan=True)
    assert found.item() == expected.item()
    reference.assert_bits(ours, theirs)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_triton():
    result = subproc.call("interpreted:policies", env={"TRITON_INTERPRET": "1"})
    assert not result.error, result.error
    assert result.value == 24


def test_sanitizing_writes_nothing_where_all_is_finite():
    """In read-only memory a write would end the process; here the version counters alone move."""
    grads = lists()
    before = clones(grads)
    fastclip.clip_grad_norm_(parameters(grads), 1e9, nonfinite="sanitize")
    reference.assert_bits(grads, before)


def test_blocks_of_a_run(way):
    """A bad element anywhere in a chunk is found, and only that one changes."""
    for at in (0, 1023, 1024, 2047, 2048, CHUNK - 1, CHUNK):
        grad = place(torch.ones(CHUNK + 1), 1)
        grad[at] = math.nan
        norm = way.clip_grad_norm_([grad], 1e9, nonfinite="sanitize", norm_dtype=torch.float64)
        assert norm.item() == pytest.approx(math.sqrt(CHUNK), rel=1e-14)
        assert grad[at] == 0.0
        assert grad.sum().item() == CHUNK
