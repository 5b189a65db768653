"""Large tensors: accuracy where a float32 accumulator saturates, and sizes and offsets that do not fit 32 bits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import fastclip
import reference
import subproc
from cases import parameters

BEYOND = 2**31 + 77  # more elements than an int32 counts, with an odd tail


@pytest.fixture(scope="module")
def ones():
    return torch.ones(2**26)


def test_sum_of_many_ones_is_right(ones, cpu):
    """torch's float32 accumulators stop growing: its L1 of 2^26 ones is half of it. Ours is exact."""
    assert torch.nn.utils.get_total_norm([ones], 1).item() < 0.6 * 2**26
    assert fastclip.get_total_norm([ones], 1).item() == 2**26
    assert fastclip.get_total_norm([ones]).item() == 2**13
    assert fastclip.get_total_norm([ones], math.inf).item() == 1


def test_norm_of_many_ones_beside_others(ones, cpu):
    """Eight times the same tensor: 2^29 elements, as a large model has."""
    assert fastclip.get_total_norm([ones] * 8).item() == pytest.approx(math.sqrt(2**29), rel=1e-7)


def test_eager_is_right_to_a_millionth(ones):
    with fastclip.use_backend("eager"):
        assert fastclip.get_total_norm([ones[: 2**25 + 1]], 1).item() == pytest.approx(2**25 + 1, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_numbers_in_bulk(cpu, dtype):
    values = torch.rand(2**23 + 5, generator=torch.Generator().manual_seed(1)).to(dtype)
    for norm_type in (1.0, 2.0):
        norm = fastclip.get_total_norm([values], norm_type, norm_dtype=torch.float64)
        reference.assert_norm(norm, reference.total_norm([values], norm_type))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_strides_beyond_32_bits(cpu, dtype):
    """Four elements spread over 2^31 and more: only their pages are ever touched."""
    base = torch.empty(BEYOND + 2**30, dtype=dtype)
    view = base.as_strided((2, 2), (2**31 + 40, 2**30))
    view.copy_(torch.tensor([[1.0, -2.0], [2.0, 4.0]]))
    assert fastclip.get_total_norm([view]).item() == 5
    assert fastclip.get_total_norm([base[2**31 + 40 :][:1]]).item() == 2
    fastclip.clip_grad_norm_(parameters([view]), 2.5)
    torch.testing.assert_close(view.float(), torch.tensor([[0.5, -1.0], [1.0, 2.0]]), rtol=1e-3, atol=0)
    fastclip.clip_grad_value_(parameters([view]), 0.75)
    assert view.flatten().tolist() == pytest.approx([0.5, -0.75, 0.75, 0.75], rel=1e-3)


def test_more_elements_than_32_bits_count(cpu):
    """Zero pages that no one wrote take no memory: read 2^31 + 77 elements, clip the two that need it."""
    grad = torch.from_numpy(np.zeros(BEYOND, dtype=np.float16))
    grad[-1], grad[0] = 3.0, -4.0
    assert fastclip.get_total_norm([grad]).item() == 5
    fastclip.clip_grad_value_(parameters([grad]), 2.0)
    assert (grad[-1].item(), grad[0].item(), grad[2**31].item()) == (2.0, -2.0, 0.0)
    grad[2**31] = math.nan
    assert fastclip.get_total_norm([grad], math.inf).isnan()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_clipping_more_elements_than_32_bits_count(cpu, dtype):
    """4.3 GB, every element written."""
    grad = torch.ones(BEYOND, dtype=dtype)
    norm = fastclip.clip_grad_norm_(parameters([grad]), 1.0, norm_dtype=torch.float64).item()
    assert norm == pytest.approx(math.sqrt(BEYOND), rel=reference.WIDE)
    factor = torch.tensor(1 / norm, dtype=torch.float32).to(dtype)
    for part in (grad[:5], grad[2**31 - 3 : 2**31 + 3], grad[-5:]):
        torch.testing.assert_close(part, factor.expand_as(part), rtol=2 * torch.finfo(dtype).eps, atol=0)
    assert grad.min() == grad.max()


@pytest.mark.slow
def test_eager_beyond_32_bits():
    with fastclip.use_backend("eager"):
        grad = torch.ones(BEYOND, dtype=torch.bfloat16)
        assert fastclip.get_total_norm([grad], norm_dtype=torch.float64).item() == pytest.approx(
            math.sqrt(BEYOND), rel=1e-6
        )
        fastclip.clip_grad_norm_(parameters([grad]), 1.0)
        assert grad[-1].item() == pytest.approx(1 / math.sqrt(BEYOND), rel=1e-2)


def peak_memory() -> float:
    """In a child: how much the peak of resident memory grows while a strided gradient of 64 MB is clipped."""
    import resource

    base = torch.ones(4096, 8192)
    view = base.t()[::2]
    with fastclip.use_backend("cpu"):
        fastclip.clip_grad_norm_(parameters([torch.ones(3, 200_000).t()[::2]]), 1.0)
        made = parameters([view])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        fastclip.clip_grad_norm_(made, 1.0)
        fastclip.clip_grad_value_(made, 1e-9)
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert view.max() <= 1e-9
    return (after - before) / 1024


def test_strided_gradients_are_not_copied(cpu):
    child = subproc.call("test_large:peak_memory")
    assert not child.error, child.error
    assert child.value < 16, f"{child.value:.0f} MB for a gradient of 64 MB"
