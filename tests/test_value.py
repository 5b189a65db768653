"""Clipping by value: bit by bit what torch's clamp gives, in one pass that writes only what changes."""

from __future__ import annotations

import math

import fastclip
import pytest
import reference
import torch
from cases import CASES, CHUNK, grid, parameters, place
from test_norms import forced

CLIP_VALUES = (0.5, 1e-3, 100.0, 0.3, -0.5, math.inf, -math.inf, math.nan)


@pytest.mark.parametrize("clip_value", CLIP_VALUES)
@pytest.mark.parametrize(("case", "dtype"), grid(readonly=False, complexes=False))
def test_value(backend, case, dtype, clip_value, fence):
    grads = case.make(dtype)
    expected = reference.clip_by_value(grads, clip_value)
    beside = fence(grads)
    assert fastclip.clip_grad_value_(parameters(grads), clip_value) is None
    reference.assert_bits(grads, expected)
    assert beside.outside_unchanged()


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("clip_value", [*CLIP_VALUES, 0.0, 5e-8])
def test_same_bits_as_torch(backend, clip_value, foreach):
    for case in CASES:
        if case.readonly or not case.kernel:
            continue
        for dtype in case.dtypes:
            ours, torchs = case.make(dtype), case.make(dtype)
            fastclip.clip_grad_value_(parameters(ours), clip_value, foreach)
            torch.nn.utils.clip_grad_value_(parameters(torchs), clip_value, foreach)
            try:
                reference.assert_bits(ours, torchs)
            except AssertionError as error:
                raise AssertionError(f"{case.name} {dtype}: {error}") from None


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


def test_forced_backend_takes_every_kernel_case(native):
    """No case marked for the kernels is refused by them."""
    for case in CASES:
        if case.kernel and not case.readonly:
            fastclip.clip_grad_value_(parameters(case.make(case.dtypes[0])), 1.0)
            assert forced("native", case)
