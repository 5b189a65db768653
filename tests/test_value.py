"""Clipping by value: bit by bit what torch's clamp gives, in one pass that writes only what changes."""

from __future__ import annotations

import math

import pytest
import torch

import fastclip
import reference
from cases import CASES, CHUNK, grid, in_turn, parameters, place
from test_norms import forced

CLIP_VALUES = (0.5, 5e-8, 0.3, 0.0, -0.5, math.inf, math.nan)


@pytest.mark.parametrize(("case", "dtype"), grid(readonly=False, complexes=False))
def test_value(backend, case, dtype, fence):
    """torch's bits for every `foreach`, which are those of a clamp that keeps NaN."""
    for clip_value in in_turn(CLIP_VALUES, case, dtype, 2):
        foreach = (None, True, False)[CLIP_VALUES.index(clip_value) % 3]
        ours, torchs = case.make(dtype), case.make(dtype)
        beside, expected = fence(ours), reference.clip_by_value(ours, clip_value)
        assert fastclip.clip_grad_value_(parameters(ours), clip_value, foreach) is None
        torch.nn.utils.clip_grad_value_(parameters(torchs), clip_value, foreach)
        with reference.during(clip_value):
            reference.assert_bits(ours, torchs)
            assert beside.outside_unchanged()
            if clip_value != 0:  # a clamp to zero leaves the sign of a zero open
                reference.assert_bits(ours, expected)


@pytest.mark.parametrize("dtype", reference.FLOATS)
def test_zero_keeps_signs(backend, dtype):
    """By hand: clipping to 0 leaves zeros with the sign of what they were."""
    grad = place(torch.tensor([0.0, -0.0, 2.0, -2.0, math.inf, -math.inf] * 40, dtype=dtype), 1)
    fastclip.clip_grad_value_(parameters([grad]), 0.0)
    assert bool((grad == 0).all())
    assert torch.signbit(grad).tolist() == [False, True] * 120


@pytest.mark.parametrize("dtype", reference.FLOATS)
def test_bounds_are_rounded_to_the_dtype(backend, dtype):
    """0.3 is no number of bf16: what is cut lands on 0.3 as the dtype knows it; its neighbours stay."""
    bound = torch.tensor(0.3, dtype=dtype)
    below, above = (torch.nextafter(bound, torch.tensor(to, dtype=dtype)) for to in (0.0, 1.0))
    grad = torch.stack([below, bound, above, -below, -bound, -above] * 11)
    fastclip.clip_grad_value_(parameters([grad]), 0.3)
    assert torch.equal(grad, torch.stack([below, bound, bound, -below, -bound, -bound] * 11))


@pytest.mark.parametrize("dtype", reference.FLOATS)
def test_every_position_is_clipped(backend, dtype):
    """One large element at each edge of each region, among values that must not change."""
    for size in (1, 31, 33, 129, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 33):
        for position in {0, size // 2, size - 1, min(CHUNK, size) - 1, min(CHUNK, size - 1)}:
            grad = place(torch.full((size,), 0.25, dtype=dtype), offset=size % 3)
            expected = grad.clone()
            for value, cut in ((7.0, 1.0), (-7.0, -1.0), (math.nan, math.nan)):
                grad[position], expected[position] = value, cut
                fastclip.clip_grad_value_(parameters([grad]), 1.0)
                reference.assert_bits([grad], [expected])


def test_nothing_to_clip_changes_no_bit(backend, fence):
    grads = [place(torch.tensor([-0.0, 0.0, 0.5, -0.5, 1e-40, math.nan])), place(torch.rand(500).bfloat16())]
    before, versions = fence(grads), [g._version for g in grads]
    fastclip.clip_grad_value_(parameters(grads), 2.0)
    assert before.unchanged()
    assert all(g._version > v for g, v in zip(grads, versions, strict=True))


@pytest.mark.parametrize(
    ("dtype", "largest"), [(torch.float16, 65504.0), (torch.bfloat16, 3.38953138925e38), (torch.float32, 3.4028234e38)]
)
def test_value_at_the_top_of_the_dtype(backend, dtype, largest):
    """The largest number of the dtype is a bound like another; infinities are cut to it."""
    grad = torch.tensor([math.inf, -math.inf, 1.0, math.nan], dtype=dtype)
    twin = grad.clone()
    fastclip.clip_grad_value_(parameters([grad]), largest)
    torch.nn.utils.clip_grad_value_(parameters([twin]), largest)
    reference.assert_bits([grad], [twin])
    assert grad[0].isfinite()


def test_forced_backend_takes_every_kernel_case(cpu):
    """No case marked for the kernels is refused by them."""
    for case in CASES:
        if case.kernel and not case.readonly:
            fastclip.clip_grad_value_(parameters(case.make(case.dtypes[0])), 1.0)
            assert forced("cpu", case)
