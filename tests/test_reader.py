"""The reader (csrc/reader.cpp) and the list of plain tensors that it makes: what it takes, that it leaks nothing."""

import gc
import sys
import weakref

import pytest
import torch

import fastclip
import subproc
from cases import parameters
from fastclip import _ops, gradients
from fastclip.gradients.plain import Plain

pytestmark = pytest.mark.skipif(_ops.read is None, reason="no compiled CPU kernels, or a Python without a GIL")


def made():
    return [torch.randn(7), torch.randn(3, 5).t(), torch.randn(4, dtype=torch.bfloat16), torch.tensor(2.0).double()]


def test_plain_gradients_are_one_list():
    grads = made()
    read = gradients.of(parameters(grads))
    assert type(read) is Plain
    assert all(ours is grad for ours, grad in zip(read.tensors, grads, strict=True))
    assert read.dtype == torch.float64


def test_parameters_without_gradients_are_left_out():
    given = [torch.nn.Parameter(torch.zeros(2)), *parameters([torch.ones(3)])]
    assert [len(grad) for grad in gradients.of(given).tensors] == [3]


@pytest.mark.parametrize(
    ("odd", "reason"),
    [
        (torch.zeros(2, dtype=torch.complex64), "dtype torch.complex64"),
        (torch.zeros(2, dtype=torch.int64), "dtype torch.int64"),
        (torch.zeros(2, device="meta"), "no compiled CPU kernels for meta tensors"),
        (torch.zeros(2).to(torch.float8_e5m2), "dtype torch.float8_e5m2"),
        (torch.eye(2).to_sparse(), "layout torch.sparse_coo on cpu"),
    ],
    ids=str,
)
def test_a_refusal_has_its_reason_and_leaves_the_rest(odd, reason):
    """Parts: the others still take the short way, and why() says what the reader said."""
    read = gradients.of([torch.zeros(2), odd, torch.ones(3)], gradients=False, writes=False)
    first, second = read.members
    assert type(first) is Plain
    assert [len(tensor) for tensor in first.tensors] == [2, 3]
    assert second.reason.startswith(f"cpu: {reason}")


@pytest.mark.parametrize(
    "odd",
    [torch.zeros(2).as_subclass(type("Odd", (torch.Tensor,), {})), None, "a string"],
    ids=lambda odd: type(odd).__name__,
)
def test_what_is_no_tensor_of_torchs_own_is_left_to_torch(odd):
    assert type(gradients.of([torch.zeros(2), odd], gradients=False, writes=False)) is gradients.Foreign
    assert not sys.exc_info()[0]


def test_ops_are_dispatched_for_who_watches():
    given = parameters(made())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        fastclip.clip_grad_norm_(given, 1.0)
    assert "fastclip::clip_grad_norm_" in {event.key for event in profile.key_averages()}

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        seen = ()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen = (*self.seen, str(func))
            return func(*args, **kwargs or {})

    with Watch() as watch:
        fastclip.clip_grad_value_(given, 1.0)
    assert "fastclip.clamp_.default" in watch.seen


def test_bits_are_those_of_the_op():
    torch.manual_seed(0)
    read = made()
    dispatched = [grad.clone() for grad in read]
    assert torch.equal(fastclip.clip_grad_norm_(parameters(read), 1.0), _ops.clip_grad_norm_(dispatched, 1.0, 2.0))
    assert all(torch.equal(a, b) for a, b in zip(read, dispatched, strict=True))


def test_a_python_without_a_lock_is_served_by_the_ops():
    """As built so, not as run: there another thread may change a list while it is read, so no reader is made."""
    code = """
import sysconfig
asked = sysconfig.get_config_var
sysconfig.get_config_var = lambda name: 1 if name == "Py_GIL_DISABLED" else asked(name)
import torch, fastclip, test_reader
from cases import parameters
from fastclip import _ops
assert (_ops.read, _ops.units, _ops.cpu_engine) == (None, None, None)
assert fastclip.backends()["cpu"] is None
test_reader.test_bits_are_those_of_the_op()
weights = parameters([torch.tensor([3e20, 4e20]), torch.tensor([0.5], dtype=torch.float64)])
assert [group.backend for group in fastclip.why(weights)] == ["cpu"]
assert abs(fastclip.clip_grad_norm_(weights, 1.0).item() / 5e20 - 1) < 1e-6
fastclip.clip_grad_value_(weights, 0.25)
assert fastclip.functional.clip_by_norm_([weight.grad for weight in weights], 0.1).shape == (2,)
"""
    assert not (child := subproc.execute(code)).error, child


def test_the_negative_bit_is_not_seen_and_does_not_matter():
    base = torch.tensor([3.0, -4.0])
    grad = torch._neg_view(base)
    assert fastclip.clip_grad_norm_(parameters([grad]), 1.0).item() == 5.0
    torch.testing.assert_close(grad, torch.tensor([-0.6, 0.8]))
    for bound, clipped in ((0.7, [-0.6, 0.7]), (-0.5, [-0.5, -0.5])):
        fastclip.clip_grad_value_(parameters([grad]), bound)
        torch.testing.assert_close(grad.resolve_neg(), torch.tensor(clipped))


def test_nothing_is_kept_and_nothing_is_lost():
    given = parameters(made())
    counts = [sys.getrefcount(x) for p in given for x in (p, p.grad)]
    odd = torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    odd.grad = torch.zeros(2, dtype=torch.complex64)
    for _ in range(1000):
        fastclip.clip_grad_norm_(given, 1.0)
        fastclip.clip_grad_value_(given, 1.0)
        gradients.of([odd, *given])
        gradients.of([*given, None], gradients=False, writes=False)
    assert [sys.getrefcount(x) for p in given for x in (p, p.grad)] == counts
    read = gradients.of(given)
    kept = weakref.ref(read.tensors[0])
    for p in given:
        p.grad = None
    gc.collect()
    assert kept() is not None
    assert read.total_norm(2.0) > 0
    del read
    gc.collect()
    assert kept() is None
