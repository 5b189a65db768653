"""The adapters, called as Megatron-core's clip_grads.py calls what it imports from Transformer Engine or apex."""

from __future__ import annotations

import math
import types

import pytest
import torch

import reference
from cases import random
from fastclip import adapters


@pytest.fixture
def clip_grads():
    """A module with the names that Megatron's has; only what the adapters replace."""
    module = types.ModuleType("clip_grads")
    adapters.use_in_megatron(module)
    return module


@pytest.fixture
def grads():
    generator = torch.Generator().manual_seed(2)
    return [random(generator, torch.float32, n) for n in (70_000, 33, 1)]


def norm_of(module, grads):
    """The lines of get_grad_norm_fp32 for norm_type 2."""
    flag = torch.zeros(1, dtype=torch.int)
    norm, _ = module.multi_tensor_applier(module.l2_norm_impl, flag, [grads], False)
    total_norm = norm**2.0
    return total_norm.pow(1.0 / 2.0), flag


def test_norm_and_clip(clip_grads, grads):
    """clip_grad_by_total_norm_fp32 with a coefficient on the device."""
    expected = reference.total_norm(grads)
    wanted = reference.clip_by_norm(grads, reference.clip_coef(expected, 1.0))
    total_norm, flag = norm_of(clip_grads, grads)
    assert (total_norm.shape, total_norm.dtype) == ((1,), torch.float32)
    torch.testing.assert_close(total_norm.item(), expected, rtol=3e-7, atol=0)
    clip_coeff = (1.0 / (total_norm + 1.0e-6)).clamp_max_(1.0)
    clip_grads.multi_tensor_applier(clip_grads.multi_tensor_scale_tensor_impl, flag, [grads, grads], clip_coeff)
    for got, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=5e-7, atol=0)
    assert flag.item() == 0


def test_clip_with_a_number(clip_grads, grads):
    twins = [g.clone() for g in grads]
    flag = torch.zeros(1, dtype=torch.int)
    clip_grads.multi_tensor_applier(clip_grads.multi_tensor_scale_impl, flag, [grads, grads], 0.25)
    reference.assert_bits(grads, [t * 0.25 for t in twins])


def test_scale_to_other_tensors(grads):
    """The sources stay as they were, the targets keep their dtype."""
    twins = [g.clone() for g in grads]
    targets = [torch.full_like(g, math.nan, dtype=torch.float64) for g in grads]
    adapters.multi_tensor_scale(65_536, torch.zeros(1, dtype=torch.int), [grads, targets], 0.5)
    reference.assert_bits(grads, twins)
    reference.assert_bits(targets, [t.double() * 0.5 for t in twins])


def test_norms_of_each_tensor(grads):
    norm, each = adapters.multi_tensor_l2norm(65_536, torch.zeros(1, dtype=torch.int), [grads], True)
    assert (norm.shape, each.shape) == ((1,), (3,))
    for got, grad in zip(each, grads, strict=True):
        reference.assert_norm(got, reference.total_norm([grad]), torch.float32)
    assert adapters.multi_tensor_l2norm(65_536, torch.zeros(1, dtype=torch.int), [grads])[1].shape == (0,)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_nonfinite_sets_the_flag(grads, bad):
    grads[1][5] = bad
    norm, _ = adapters.multi_tensor_l2norm(65_536, flag := torch.zeros(1, dtype=torch.int), [grads])
    assert not norm.isfinite()
    assert flag.item() == 1


def test_nothing():
    flag = torch.zeros(1, dtype=torch.int)
    norm, each = adapters.multi_tensor_l2norm(65_536, flag, [[]], True)
    assert (norm.item(), norm.shape, each.shape, flag.item()) == (0, (1,), (0,), 0)
    adapters.multi_tensor_scale(65_536, flag, [[], []], 0.5)
