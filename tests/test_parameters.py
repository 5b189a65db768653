"""What a parameter list may hold, who may watch or share the call, and what a call must not keep."""

from __future__ import annotations

import gc
import sys
import threading
import weakref

import pytest
import torch
import torch.nn.utils as torchs

import fastclip
import reference
import ways
from cases import parameters
from test_parity import outcome, same, same_tensor


class Sub(torch.nn.Parameter):
    """A Parameter of another type."""


class Property(torch.nn.Parameter):
    """A Parameter whose gradient is computed, as sharded optimizers have them."""

    @property
    def grad(self):
        return self.held

    @grad.setter
    def grad(self, value):
        self.held = value


class Duck:
    """Something with a gradient that is no tensor at all."""

    def __init__(self, grad):
        self.grad = grad


class Broken:
    @property
    def grad(self):
        raise KeyError("no gradient today")


def make(cls, values):
    if cls is Duck:
        return Duck(torch.tensor(values))
    parameter = cls(torch.zeros(len(values)))
    parameter.grad = torch.tensor(values)
    return parameter


@pytest.mark.parametrize("kinds", [(Sub,), (Property,), (Duck,), (torch.nn.Parameter, Property, Duck, Sub)], ids=str)
def test_anything_with_a_gradient(backend, kinds):
    """torch reads `.grad` and asks no further: so do we, for each of the three functions."""

    def call(F):
        made = [make(kind, [3.0, -4.0]) for kind in kinds]
        norm = F.clip_grad_norm_(made, 1.0)
        F.clip_grad_value_(made, 0.3)
        F.clip_grads_with_norm_(made, 0.5, norm)
        return norm, *(m.grad for m in made)

    theirs, ours = same(call)
    torch.testing.assert_close(ours.value, theirs.value)


@pytest.mark.parametrize("at", [0, 1, 2])
def test_an_error_while_reading_a_gradient(backend, at, fence):
    """The error of a property comes through as it is, and the others are not clipped."""
    grads = [torch.tensor([3.0]), torch.tensor([4.0])]
    made: list = parameters(grads)
    made.insert(at, Broken())
    before = fence(grads)
    for call in (
        lambda F: F.clip_grad_norm_(made, 1.0),
        lambda F: F.clip_grad_value_(made, 1.0),
        lambda F: F.clip_grads_with_norm_(made, 1.0, torch.tensor(5.0)),
    ):
        _, ours = same(call)
        assert isinstance(ours.error, KeyError)
        assert before.unchanged()


def test_a_generator_that_fails(backend, fence):
    grads = [torch.tensor([3.0])]
    before = fence(grads)

    def failing():
        yield from parameters(grads)
        raise KeyError("half way")

    for call in (
        lambda F: F.clip_grad_norm_(failing(), 1.0),
        lambda F: F.clip_grad_value_(failing(), 1.0),
        lambda F: F.clip_grads_with_norm_(failing(), 1.0, torch.tensor(5.0)),
        lambda F: F.get_total_norm(failing()),
    ):
        _, ours = same(call)
        assert isinstance(ours.error, KeyError)
        assert before.unchanged()


def test_gradients_that_are_parameters():
    """A Parameter as a gradient is a plain tensor to torch; a subclass of it is a subclass."""
    for cls in (torch.nn.Parameter, Sub):
        norm = same_tensor(lambda F: F.get_total_norm([cls(torch.tensor([3.0, 4.0])), torch.ones(2)]))  # noqa: B023
        assert norm.item() == pytest.approx(27**0.5)


def test_frozen_and_missing_among_others(backend):
    """None gradients are skipped wherever they stand, in a list, a tuple, a generator."""
    layer = torch.nn.Linear(2, 2)
    for bare_first in (True, False):
        (given,) = parameters([torch.tensor([3.0, 4.0])])
        made = [*layer.parameters(), given] if bare_first else [given, *layer.parameters()]
        for form in (list, tuple, iter, lambda m: (p for p in m)):
            given.grad = torch.tensor([3.0, 4.0])
            assert fastclip.clip_grad_norm_(form(made), 1.0).item() == 5
            torch.testing.assert_close(given.grad, torch.tensor([0.6, 0.8]))
        assert all(p.grad is None for p in layer.parameters())


def test_gradients_are_read_at_every_call(backend):
    """Nothing is remembered of an earlier call over the same list: new gradients, layouts, dtypes, none."""
    (parameter,) = made = parameters([torch.tensor([3.0, 4.0])])
    assert fastclip.clip_grad_norm_(made, 1.0).item() == 5
    for grad, expected in (
        (torch.tensor([6.0, 8.0]), 10),
        (torch.tensor([[0.0, 8.0], [6.0, 0.0]]).t()[:, 0], 8),
        (torch.tensor([5.0, 12.0]), 13),
    ):
        parameter.grad = grad
        assert fastclip.clip_grad_norm_(made, 1.0).item() == expected
        assert reference.total_norm([grad]) == pytest.approx(1, rel=1e-6)
    parameter.grad.data = torch.tensor([9.0, 12.0])
    assert fastclip.clip_grad_norm_(made, 1.0).item() == 15
    parameter.grad = None
    assert fastclip.clip_grad_norm_(made, 1.0).item() == 0
    parameter.data = torch.zeros(2, dtype=torch.float64)
    parameter.grad = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert fastclip.clip_grad_norm_(made, 1.0).dtype == torch.float64
    torch.testing.assert_close(parameter.grad, torch.tensor([0.6, 0.8], dtype=torch.float64), rtol=1e-6, atol=0)


def test_the_list_is_not_changed(backend):
    made = parameters([torch.ones(2), torch.ones(3)])
    bare = torch.nn.Parameter(torch.ones(1))
    given = [made[0], bare, made[1]]
    grads = [torch.ones(2), torch.ones(3)]
    fastclip.clip_grad_norm_(given, 1.0)
    fastclip.clip_grad_value_(given, 1.0)
    fastclip.get_total_norm(grads)
    assert [id(p) for p in given] == [id(made[0]), id(bare), id(made[1])]
    assert len(grads) == 2


def test_nothing_is_kept(backend):
    """After a call the gradients belong to their parameters alone, also after a call that raised."""
    made = parameters([torch.ones(3), torch.ones(4).bfloat16(), torch.ones(6)[::2]])
    counts = [sys.getrefcount(p.grad) for p in made]
    versions = [sys.getrefcount(p) for p in made]
    for _ in range(3):
        norm = fastclip.clip_grad_norm_(made, 1.0)
        fastclip.clip_grad_value_(made, 1.0)
        fastclip.clip_grads_with_norm_(made, 1.0, norm)
        fastclip.get_total_norm([p.grad for p in made])
        for bad in (
            lambda: fastclip.clip_grad_value_([*made, Broken()], 1.0),
            lambda: fastclip.clip_grad_norm_(made, "x"),
        ):
            with pytest.raises((KeyError, ValueError)):
                bad()
    gc.collect()
    assert [sys.getrefcount(p.grad) for p in made] == counts
    assert [sys.getrefcount(p) for p in made] == versions
    alive = weakref.ref(made[0].grad)
    made[0].grad = None
    gc.collect()
    assert alive() is None


def test_memory_does_not_grow(cpu):
    """Thousands of calls leave the process as large as it was."""
    resource = pytest.importorskip("resource")
    made = parameters([torch.ones(5) for _ in range(50)])

    def calls(count):
        for _ in range(count):
            norm = fastclip.clip_grad_norm_(made, 1.0)
            fastclip.clip_grad_value_(made, 1.0)
            fastclip.clip_grads_with_norm_(made, 1.0, norm)
            fastclip.get_total_norm([p.grad for p in made])
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    calls(50)
    before = calls(50)
    # 1,500 calls of 4 functions over 50 tensors: 16 bytes lost per tensor would be 4.6 MB.
    assert calls(1500) - before < 2048


def test_threads_that_clip_at_once(backend):
    """Several threads, each with its own model: nobody's numbers in anybody else's."""
    failures = []

    def work(scale):
        try:
            for _ in range(30):
                grads = [torch.full((2000,), scale), torch.full((70_000,), scale).bfloat16(), torch.full((3,), scale)]
                norm = fastclip.clip_grad_norm_(parameters(grads), 1.0, norm_dtype=torch.float64).item()
                assert norm == pytest.approx(scale * 72_003**0.5, rel=1e-12)
                assert grads[0][0].item() == pytest.approx(scale / norm, rel=1e-6)
                fastclip.clip_grad_value_(parameters(grads), 1e-4)
                assert grads[2].max().item() == pytest.approx(1e-4)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(scale,)) for scale in (0.5, 1.0, 2.0, 4.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("mode", [ways.Watcher, ways.Function])
def test_modes(backend, mode):
    """A mode sees ops that explain the write, and changes nothing."""
    made, twins = parameters([torch.tensor([3.0, 4.0])]), parameters([torch.tensor([3.0, 4.0])])
    with mode() as watcher:
        norm = fastclip.clip_grad_norm_(made, 1.0)
        fastclip.clip_grad_value_(made, 0.7)
    fastclip.clip_grad_norm_(twins, 1.0)
    fastclip.clip_grad_value_(twins, 0.7)
    assert norm.item() == 5
    reference.assert_bits([made[0].grad], [twins[0].grad])
    if mode is ways.Watcher:
        assert any(("clip" in name or "mul" in name or "scale" in name) for name in watcher.seen), watcher.seen


def test_profiler(backend):
    """Profiled calls do the same, and show up under a name."""
    made = parameters([torch.tensor([3.0, 4.0])])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        assert fastclip.clip_grad_norm_(made, 1.0).item() == 5
    torch.testing.assert_close(made[0].grad, torch.tensor([0.6, 0.8]))
    assert profile.key_averages()


def test_vmap_is_an_error_or_right(backend, fence):
    """torch has no batching rule here; what must not happen is a silent wrong number."""
    values = torch.tensor([[3.0, 4.0], [6.0, 8.0]])
    before = fence([values])
    theirs = outcome(lambda F: torch.func.vmap(lambda g: F.get_total_norm([g]))(values), torchs)
    ours = outcome(lambda F: torch.func.vmap(lambda g: F.get_total_norm([g]))(values), fastclip)
    if ours.error is None:
        torch.testing.assert_close(ours.value, torch.tensor([5.0, 10.0]))
    else:
        assert isinstance(theirs.error, RuntimeError)
        assert isinstance(ours.error, (RuntimeError, ValueError))
    assert before.unchanged()


def test_gradients_of_grad_transform(backend):
    """torch.func.grad returns plain tensors; clipping them afterwards is ordinary."""
    grad = torch.func.grad(lambda w: (w * w).sum())(torch.tensor([1.5, 2.0]))
    assert fastclip.clip_grad_norm_(parameters([grad]), 1.0).item() == 5
    torch.testing.assert_close(grad, torch.tensor([0.6, 0.8]))


def test_many_parameters(backend):
    """Five thousand at once, with gaps."""
    made = parameters([torch.full((1 + i % 4,), 0.5) for i in range(5000)])
    for p in made[::7]:
        p.grad = None
    grads = [p.grad for p in made if p.grad is not None]
    expected = reference.total_norm(grads)
    reference.assert_norm(fastclip.clip_grad_norm_(made, 1.0), expected)
    factor = torch.cat([g.reshape(-1) for g in grads])
    assert factor.min() == factor.max() == pytest.approx(0.5 / (expected + 1e-6), rel=1e-6)
