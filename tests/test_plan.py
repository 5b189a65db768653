"""The short way for plain CPU tensors (fastclip/_plan.py): when it is taken, that it agrees, that it leaks nothing."""

import gc
import sys
import weakref

import pytest
import torch

import fastclip
from cases import parameters
from fastclip import _ops, _plan

pytestmark = pytest.mark.skipif(_plan._libraries is None, reason="no compiled CPU kernels, or a Python without a GIL")


def gradients():
    return [torch.randn(7), torch.randn(3, 5).t(), torch.randn(4, dtype=torch.bfloat16), torch.tensor(2.0).double()]


def test_it_is_taken_for_plain_gradients():
    made = gradients()
    plan = _plan.of_gradients(parameters(made))
    assert all(planned is grad for planned, grad in zip(plan.tensors, made, strict=True))
    assert plan.promoted_dtype() == torch.float64


def test_parameters_without_gradients_are_left_out():
    made = [torch.nn.Parameter(torch.zeros(2)), *parameters([torch.ones(3)])]
    assert [len(grad) for grad in _plan.of_gradients(made).tensors] == [3]


@pytest.mark.parametrize(
    "odd",
    [
        torch.zeros(2, dtype=torch.complex64),
        torch.zeros(2, dtype=torch.int64),
        torch.zeros(2, device="meta"),
        torch.zeros(2).to(torch.float8_e5m2),
        torch.eye(2).to_sparse(),
        torch.zeros(2).as_subclass(type("Odd", (torch.Tensor,), {})),
        None,
        "a string",
    ],
    ids=lambda odd: type(odd).__name__ + str(getattr(odd, "dtype", "")) + str(getattr(odd, "layout", "")),
)
def test_it_is_not_taken_for(odd):
    assert _plan.of_tensors([torch.zeros(2), odd]) is None
    assert not sys.exc_info()[0]


def test_ops_are_dispatched_for_who_watches():
    made = parameters(gradients())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        fastclip.clip_grad_norm_(made, 1.0)
    assert "fastclip::clip_grad_norm_" in {event.key for event in profile.key_averages()}

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        seen = ()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen = (*self.seen, str(func))
            return func(*args, **kwargs or {})

    with Watch() as watch:
        fastclip.clip_grad_value_(made, 1.0)
    assert "fastclip.clamp_.default" in watch.seen


def test_bits_are_those_of_the_op():
    torch.manual_seed(0)
    planned = gradients()
    dispatched = [grad.clone() for grad in planned]
    assert torch.equal(fastclip.clip_grad_norm_(parameters(planned), 1.0), _ops.clip_grad_norm_(dispatched, 1.0, 2.0))
    assert all(torch.equal(a, b) for a, b in zip(planned, dispatched, strict=True))


def test_the_negative_bit_is_not_seen_and_does_not_matter():
    base = torch.tensor([3.0, -4.0])
    grad = torch._neg_view(base)
    assert fastclip.clip_grad_norm_(parameters([grad]), 1.0).item() == 5.0
    torch.testing.assert_close(grad, torch.tensor([-0.6, 0.8]))
    for bound, clipped in ((0.7, [-0.6, 0.7]), (-0.5, [-0.5, -0.5])):
        fastclip.clip_grad_value_(parameters([grad]), bound)
        torch.testing.assert_close(grad.resolve_neg(), torch.tensor(clipped))


def test_nothing_is_kept_and_nothing_is_lost():
    made = parameters(gradients())
    counts = [sys.getrefcount(x) for p in made for x in (p, p.grad)]
    for _ in range(1000):
        fastclip.clip_grad_norm_(made, 1.0)
        fastclip.clip_grad_value_(made, 1.0)
        assert _plan.of_tensors([*made, None]) is None
    assert [sys.getrefcount(x) for p in made for x in (p, p.grad)] == counts
    plan = _plan.of_gradients(made)
    kept = weakref.ref(plan.tensors[0])
    for p in made:
        p.grad = None
    gc.collect()
    assert kept() is not None
    assert plan.total_norm(2.0) > 0
    del plan
    gc.collect()
    assert kept() is None
