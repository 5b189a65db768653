"""The Triton backend on a real device; every test here is skipped where there is none."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch

import fastclip
import reference
from cases import CASES, parameters

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="not run on a GPU"),
]


@pytest.fixture(autouse=True)
def triton():
    with fastclip.use_backend("triton"):
        yield


def on_device(tensors):
    """Copies with the same offsets, strides and aliases: each storage moves whole."""
    storages, moved = {}, []
    for t in tensors:
        key = t.untyped_storage().data_ptr(), t.dtype
        if key not in storages:
            storages[key] = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage()).cuda()
        moved.append(storages[key].as_strided(t.shape, t.stride(), t.storage_offset()))
    return moved


def cases():
    from fastclip.backends import triton_

    for case in CASES:
        for dtype in case.dtypes:
            if case.kernel and not case.readonly:
                on_cpu = case.make(dtype)
                on_gpu = on_device(on_cpu)
                if not any(triton_.refuses(t) for t in on_gpu):
                    yield case.name, on_cpu, on_gpu


@pytest.mark.parametrize("norm_type", reference.NORM_TYPES)
def test_norms(norm_type):
    for _, on_cpu, on_gpu in cases():
        expected = reference.total_norm(on_cpu, norm_type)
        wide = fastclip.get_total_norm(on_gpu, norm_type, norm_dtype=torch.float64)
        assert wide.is_cuda
        reference.assert_norm(wide, expected, torch.float64)


@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf, 0.0, 3.0])
def test_clips(norm_type):
    for _, on_cpu, on_gpu in cases():
        norm = reference.total_norm(on_cpu, norm_type)
        max_norm = norm / 3 if 0 < norm < math.inf else 0.5
        wide = fastclip.clip_grad_norm_(parameters(on_gpu), max_norm, norm_type, norm_dtype=torch.float64)
        reference.assert_norm(wide.cpu(), norm, torch.float64)
        reference.scale_rounded_(on_cpu, reference.clip_coef(wide.item(), max_norm))
        reference.assert_bits([t.cpu() for t in on_gpu], on_cpu)


@pytest.mark.parametrize("clip_value", [0.5, 1e-3, -0.5, math.inf, math.nan])
def test_values(clip_value):
    for _, on_cpu, on_gpu in cases():
        expected = reference.clip_by_value(on_cpu, clip_value)
        fastclip.clip_grad_value_(parameters(on_gpu), clip_value)
        reference.assert_bits([t.cpu() for t in on_gpu], expected)


def gradients():
    torch.manual_seed(1)
    return [torch.randn(n, dtype=dtype, device="cuda") for n in (7, 70_000) for dtype in reference.FLOATS]


def clip(made):
    norm = fastclip.clip_grad_norm_(made, 1.0)
    fastclip.clip_grad_value_(made, 0.01)
    return norm


def test_does_not_wait_for_the_device():
    made = parameters(gradients())
    clip(made)
    torch.cuda.set_sync_debug_mode("error")
    try:
        clip(made)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_graph():
    """Captured after one warm-up, and replayed over new values in the same memory."""
    made, twins = parameters(gradients()), parameters(gradients())
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        clip(made)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        norm = clip(made)
    for scale in (1.0, 3.0):
        for p, q in zip(made, twins, strict=True):
            p.grad.copy_(torch.randn_like(p.grad) * scale)
            q.grad.copy_(p.grad)
        graph.replay()
        reference.assert_bits([norm.cpu()], [clip(twins).cpu()])
        reference.assert_bits([p.grad.cpu() for p in made], [q.grad.cpu() for q in twins])


def test_side_stream():
    """Gradients that are freed right after the call, on a stream that is not the default one."""
    expected = gradients()
    clip(parameters(expected))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(10):
            grads = gradients()
            clip(parameters(grads))
            reference.assert_bits([g.cpu() for g in grads], [g.cpu() for g in expected])


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile(compiler):
    ours, theirs = gradients(), gradients()
    torch._dynamo.reset()
    norm = torch.compile(clip, backend=compiler, fullgraph=True)(parameters(ours))
    reference.assert_bits([norm.cpu()], [clip(parameters(theirs)).cpu()])
    reference.assert_bits([g.cpu() for g in ours], [g.cpu() for g in theirs])
    torch._dynamo.reset()


@pytest.mark.slow
def test_more_than_2_31_elements():
    grad = torch.zeros(2**31 + 11, dtype=torch.bfloat16, device="cuda")
    grad[-1], grad[0] = 4.0, 3.0
    assert fastclip.clip_grad_norm_(parameters([grad]), 2.5, norm_dtype=torch.float64).item() == 5
    assert grad[-1].item() == 2
