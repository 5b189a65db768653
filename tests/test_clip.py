"""Clipping by norm: every backend x case x dtype against the oracle, bit by bit where the bits are defined."""

from __future__ import annotations

import math

import pytest
import torch

import fastclip
import reference
from cases import CHUNK, grid, in_turn, parameters, place, random
from fastclip.backends import eager
from test_norms import forced, promoted

MAX_NORMS = (0.5, 1e-3, 1e6, 0.0, -1.0, math.inf, -math.inf, math.nan)


@pytest.mark.parametrize(("case", "dtype"), grid(readonly=False))
def test_clip(backend, case, dtype, fence):
    """Against the oracle, by an order in turn; that every order has its norm is for test_norms."""
    if not forced(backend, case):
        return
    (norm_type,) = in_turn((2.0, 1.0, math.inf, 0.0, 3.0), case, dtype)
    grads = case.make(dtype)
    norm = reference.total_norm(grads, norm_type)
    max_norm = norm / 3 if 0 < norm < math.inf else 0.5
    expected, times = reference.clip_by_norm(grads, reference.clip_coef(norm, max_norm)), reference.writes(grads)
    beside = fence(grads)

    returned = fastclip.clip_grad_norm_(parameters(grads), max_norm, norm_type)

    with reference.during(norm_type):
        reference.assert_norm(returned, norm, promoted(grads))
        reference.assert_grads(grads, expected, times)
        assert beside.outside_unchanged()


@pytest.mark.parametrize(("case", "dtype"), grid(readonly=False))
def test_bits(backend, case, dtype):
    """From the wide norm on every bit is defined: coefficient in float64, cast to opmath, one product, one rounding.

    The two halves are the whole: the same norm but for the rounding of a square root, and from it the same bits.
    """
    if not forced(backend, case):
        return
    for max_norm, norm_type in zip(in_turn(MAX_NORMS, case, dtype, 2), (2.0, math.inf), strict=True):
        together, apart, twins = (case.make(dtype) for _ in range(3))
        norm = fastclip.clip_grad_norm_(parameters(together), max_norm, norm_type, norm_dtype=torch.float64)
        total_norm = fastclip.get_total_norm(apart, norm_type, norm_dtype=torch.float64)
        assert fastclip.clip_grads_with_norm_(parameters(apart), max_norm, norm) is None
        with reference.during(max_norm, norm_type):
            assert total_norm.item() == pytest.approx(norm.item(), rel=3e-16, abs=0, nan_ok=True)
            reference.assert_bits(apart, together)
            if case.kernel:
                reference.scale_rounded_(twins, reference.clip_coef(norm.item(), max_norm))
                reference.assert_bits(together, twins)


@pytest.mark.parametrize("dtype", reference.FLOATS)
def test_no_clipping_changes_no_bit(backend, dtype, fence):
    """With a coefficient of 1 even a NaN payload and the sign of zero stay; the version counter still moves."""
    grads = [place(torch.tensor([-0.0, 0.0, 1e-3, -2.0, 5e-8], dtype=dtype)), random(torch.Generator(), dtype, 77)]
    before, versions = fence(grads), [g._version for g in grads]
    fastclip.clip_grad_norm_(parameters(grads), 1e9)
    assert before.unchanged()
    assert [g._version for g in grads] == [v + 1 for v in versions]


@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0xFFFFFFFF - 2**32, 0x7F800001, 0x7FC00000, 0x7FFF8000])
def test_nan_stays_nan_in_every_dtype(backend, bits):
    """A NaN of any payload: rounded like a number, an all-ones NaN would carry over and become zero in bf16."""
    bad = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    for dtype in reference.FLOATS:
        grads = [torch.ones(37, dtype=dtype), bad.clone()]
        assert fastclip.clip_grad_norm_(parameters(grads), 1.0, math.inf).isnan()
        assert all(bool(g.isnan().all()) for g in grads), dtype
        grads = [torch.ones(37, dtype=dtype)]
        fastclip.clip_grads_with_norm_(parameters(grads), 1.0, bad[0])
        assert bool(grads[0].isnan().all()), dtype
        assert fastclip.get_total_norm([bad, grads[0]], 1.0, norm_dtype=dtype).isnan()


@pytest.mark.parametrize("dtype", reference.FLOATS)
def test_norm_equal_to_max_norm_still_scales(backend, dtype):
    """The epsilon is always added: a norm of exactly max_norm is scaled by 1 / (1 + 2e-7), if the dtype shows it."""
    grad, twin = (torch.tensor([3.0, 4.0], dtype=dtype) for _ in range(2))
    fastclip.clip_grad_norm_(parameters([grad]), 5.0)
    reference.scale_rounded_([twin], 1 / (5.0 + 1e-6) * 5.0)
    reference.assert_bits([grad], [twin])
    if dtype in (torch.float32, torch.float64):
        assert grad[0] < 3


def test_reciprocal_comes_first(backend):
    """max_norm 1e308 over a norm of 2e308 works either way; 5e-324 shows the order: 1/norm, then the product."""
    for scale, max_norm in ((1e-3, 1e308), (1e3, 5e-324), (7.3, 0.31), (1.7, 1.1), (11.9, 3.7)):
        values = torch.tensor([3.0, 4.0], dtype=torch.float64) * scale
        grad = values.clone()
        norm = fastclip.clip_grad_norm_(parameters([grad]), max_norm).item()
        assert grad.tolist() == [v * min(1 / (norm + 1e-6) * max_norm, 1.0) for v in values.tolist()]


@pytest.mark.parametrize("dtype", reference.FLOATS)
def test_hand_computed(backend, dtype):
    grads = [torch.tensor([3.0, 0.0], dtype=dtype), torch.tensor([[4.0]], dtype=dtype), torch.tensor(12.0, dtype=dtype)]
    norm = fastclip.clip_grad_norm_(parameters(grads), 6.5)  # sqrt(9 + 16 + 144) = 13, so everything is halved
    assert norm.item() == 13
    for grad, value in zip(grads, (1.5, 2.0, 6.0), strict=True):
        assert grad.max().item() == pytest.approx(value, rel=2 * torch.finfo(dtype).eps + 1e-7)


@pytest.mark.parametrize("dtype", reference.FLOATS)
def test_every_element_is_scaled_once(backend, dtype, fence):
    """Ones times an exact power of two: an element that was missed, or scaled twice, is off by a factor."""
    for size in (1, 15, 33, 127, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 33):
        for view in (
            place(torch.ones(size, dtype=dtype), offset=size % 5),
            place(torch.ones(2, size, dtype=dtype)).t()[:, 0],
            place(torch.ones(size, 3, dtype=dtype))[:, :2],
        ):
            beside = fence([view])
            fastclip.clip_grads_with_norm_(parameters([view]), 0.25, torch.tensor(1.0 - 1e-6, dtype=torch.float64))
            assert torch.equal(view, torch.full_like(view, 0.25)), size
            assert beside.outside_unchanged(), size


@pytest.mark.parametrize(
    "total_norm",
    [
        torch.tensor(5.0),
        torch.tensor(5.0, dtype=torch.float64),
        torch.tensor(5.0, dtype=torch.bfloat16),
        torch.tensor(5),
        torch.tensor(True),
        torch.tensor(5.0, requires_grad=True),
        torch.tensor(math.nan),
        torch.tensor(math.inf),
        torch.tensor(0.0),
        torch.tensor(-3.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", reference.FLOATS)
def test_given_total_norm(backend, dtype, total_norm):
    """Any real 0-dim norm, read as float64: what was reduced elsewhere, in whatever dtype."""
    grads, twins = ([torch.tensor([3.0, -4.0, 0.0], dtype=dtype)] for _ in range(2))
    fastclip.clip_grads_with_norm_(parameters(grads), 1.0, total_norm)
    reference.scale_rounded_(twins, reference.clip_coef(total_norm.double().item(), 1.0))
    reference.assert_bits(grads, twins)
    assert not grads[0].requires_grad


def test_norm_dtype(backend):
    for norm_dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        grads = [torch.tensor([3.0, 4.0], dtype=torch.bfloat16)]
        for norm in (
            fastclip.get_total_norm(grads, norm_dtype=norm_dtype),
            fastclip.clip_grad_norm_(parameters(grads), 1.0, norm_dtype=norm_dtype),
            fastclip.clip_grad_norm_([], 1.0, norm_dtype=norm_dtype),
            fastclip.get_total_norm([], norm_dtype=norm_dtype),
        ):
            assert norm.dtype == norm_dtype
            assert norm.shape == ()


def test_threads_give_the_same_gradients(cpu):
    def clipped(threads):
        torch.set_num_threads(threads)
        generator = torch.Generator().manual_seed(4)
        grads = [random(generator, dtype, n) for dtype in reference.FLOATS for n in (9, 4 * CHUNK + 21, CHUNK)]
        grads.append(random(generator, torch.float32, 500, 401).t()[::2])
        fastclip.clip_grad_norm_(parameters(grads), 1.0)
        fastclip.clip_grad_value_(parameters(grads), 1e-3)
        return grads

    before = torch.get_num_threads()
    try:
        one, *others = (clipped(threads) for threads in (1, 2, 3))
    finally:
        torch.set_num_threads(before)
    for other in others:
        reference.assert_bits(other, one)


def test_grad_objects_stay(backend):
    """`.grad` is the same object at the same address afterwards, with the same strides."""
    grads = [torch.randn(3, 4), torch.randn(4, 3).t(), torch.randn(6, dtype=torch.bfloat16)[::2]]
    made = parameters(grads)
    was = [(id(g), g.data_ptr(), g.stride(), g.dtype) for g in grads]
    fastclip.clip_grad_norm_(made, 0.1)
    fastclip.clip_grad_value_(made, 0.01)
    assert [(id(p.grad), p.grad.data_ptr(), p.grad.stride(), p.grad.dtype) for p in made] == was


def test_weights_are_not_touched(backend):
    made = parameters([torch.randn(5), torch.randn(2, 2)])
    for p in made:
        p.data.fill_(2.0)
    fastclip.clip_grad_norm_(made, 0.1)
    fastclip.clip_grad_value_(made, 0.01)
    assert all(bool((p == 2).all()) and p._version == made[0]._version for p in made)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("max_norm", [1e-6, -1e-6, 1e-1, 3e-7, 2e-30])
def test_coefficients_below_float32(backend, dtype, max_norm):
    """Rounded to float32 before the product, those of 1e-45 and more lose bits, and smaller ones are 0."""
    scale = 1e150 if dtype == torch.float64 else 1e37
    generator = torch.Generator().manual_seed(4)
    numbers = scale * torch.randn(CHUNK + 7, dtype=torch.float64, generator=generator)
    strided = torch.zeros(9, 2, dtype=dtype)[:, 1]
    grads = [numbers.to(dtype), place(numbers[:31].to(dtype), 1), strided.copy_(numbers[:9]), torch.ones(3).half()]
    expected = [g.clone() for g in grads]
    norm = fastclip.clip_grad_norm_(parameters(grads), max_norm, norm_dtype=torch.float64)
    coef = reference.clip_coef(norm.item(), max_norm)
    assert 0 < abs(coef) < torch.finfo(torch.float32).tiny
    reference.scale_rounded_(expected, coef)
    reference.assert_bits(grads, expected)


@pytest.mark.parametrize("coef", [0.37, -1.7, 0.0, 1e-40, -1e-300, 2.0**-126, math.inf, math.nan, 3e38, 1e39])
def test_eager_without_a_look_at_the_coefficient(monkeypatch, coef):
    """What eager does where it must not wait, on devices and in traces: the same bits."""
    factor = torch.tensor(coef, dtype=torch.float64)
    generator = torch.Generator().manual_seed(6)
    for known in (True, False):
        grads = [random(generator, dtype, *shape) for dtype in reference.FLOATS for shape in ((), (0,), (7,), (3, 5))]
        grads += [(g * (torch.finfo(g.dtype).max / 8)).clone() for g in grads]
        expected = [g.clone() for g in grads]
        monkeypatch.setattr(eager, "is_ordinary", lambda coef, known=known: known and eager_looks(coef))
        eager.scale_(grads, factor)
        reference.scale_rounded_(expected, coef)
        reference.assert_bits(grads, expected)


eager_looks = eager.is_ordinary
