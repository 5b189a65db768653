"""What a call may meet on its way in: memory that is gone, modes and traces that watch, callers that interfere."""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import math
import resource
import threading
import time
import types
import typing
import warnings
from pathlib import Path

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.utils as torchs
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _device

import fastclip
import on_cpu
import reference
import subproc
from cases import parameters
from fastclip import adapters, fsdp
from test_parity import outcome
from ways import Dispatch

CALLS = {
    "clip_grad_norm_": lambda F, made: F.clip_grad_norm_(made, 1.0),
    "clip_grads_with_norm_": lambda F, made: F.clip_grads_with_norm_(made, 1.0, torch.tensor(5.0)),
    "clip_grad_value_": lambda F, made: F.clip_grad_value_(made, 0.5),
    "get_total_norm": lambda F, made: F.get_total_norm([p.grad for p in made]),
}
WRITERS = [name for name in CALLS if name != "get_total_norm"]


def in_a_child(function, *args, env=None):
    """Run a function of this file in a process of its own, which may crash; return its result."""
    child = subproc.call(f"test_front_door:{function.__name__}", *args, env=env)
    assert not child.error, f"{child.error}\n{child.stderr}"
    return child.value


@functools.cache
def each_in_a_child(function, *arguments) -> dict:
    """The same for each of some arguments, in one process: what is measured or crashes is of them all."""
    return in_a_child(_each, function.__name__, arguments, env=UNMAPPED_AT_ONCE)


def _each(name: str, arguments: tuple[tuple, ...]) -> dict:
    return {each: globals()[name](*each) for each in arguments}


# Memory

# What is freed goes back to the system: reading it crashes, it does not count, and what is asked for has to be got.
UNMAPPED_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


def _statm() -> list[int]:
    """Pages of this process: virtual, resident."""
    return [int(n) * resource.getpagesize() for n in Path("/proc/self/statm").read_text().split()[:2]]


def outcomes_with_little_memory(name: str) -> dict:
    """Let the memory run out at every point of a call; how often it ended how."""
    torch.set_num_threads(1)
    count, base = 20_000, torch.ones(40_000)
    made = parameters([base[2 * i : 2 * i + 1] for i in range(count)])
    CALLS[name](fastclip, made)
    written, seen = base.clone(), {}
    was = resource.getrlimit(resource.RLIMIT_AS)
    for step in range(56):
        base.fill_(1.0)
        resource.setrlimit(resource.RLIMIT_AS, (_statm()[0] + step * 65_536, was[1]))
        try:
            CALLS[name](fastclip, made)
            how = "returned"
        except (MemoryError, RuntimeError):
            how = "raised"
        finally:
            resource.setrlimit(resource.RLIMIT_AS, was)
        state = "whole" if torch.equal(base, written) else "unchanged" if torch.all(base == 1.0) else "half"
        seen[how, state] = seen.get((how, state), 0) + 1
    return seen


@pytest.mark.parametrize("name", WRITERS)
def test_memory_that_runs_out_is_an_error(name):
    """Wherever it does: what returns has written all, what raises has written nothing."""
    seen = in_a_child(outcomes_with_little_memory, name, env=UNMAPPED_AT_ONCE)
    assert set(seen) == {("raised", "unchanged"), ("returned", "whole")}, seen


def _growth(step) -> int:
    gc.freeze()  # or each collection takes long
    for turn in range(30):
        if turn == 4:
            before = _statm()[1]
        step()
        gc.collect()  # an error and the frames that it came through are a cycle
    return _statm()[1] - before


LEAKS = {
    "complex": lambda: torch.zeros(2, dtype=torch.complex64),
    "int64": lambda: torch.zeros(2, dtype=torch.int64),
    "float8": lambda: torch.zeros(2).to(torch.float8_e5m2),
}


def growth(kind: str, at: int) -> int:
    """Bytes that are still held after 26 steps of 4 MiB of gradients each."""

    def step():
        tensors = [torch.ones(1 << 19), torch.ones(1 << 19)]
        tensors.insert(at, LEAKS[kind]())
        for call in (
            lambda: fastclip.get_total_norm(tensors),
            lambda: fastclip.clip_grad_norm_(parameters(tensors), 1.0),
            lambda: fastclip.clip_grads_with_norm_(parameters(tensors), 1.0, torch.tensor(2.0)),
            lambda: fastclip.clip_grad_value_(parameters(tensors), 1.0),
        ):
            outcome(lambda F: call(), fastclip)  # noqa: B023

    return _growth(step)


def growth_over_two_devices(name: str) -> int:
    """As above, of the op that is for the CPU; over a GPU and the CPU it is the one for GPUs."""
    op = getattr(torch.ops.fastclip, name).default
    rest = {"norm_partial": (2.0,), "scale_": (torch.tensor(0.5),), "clamp_": (-1.0, 1.0)}.get(name, (1.0, 2.0))
    cpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)

    def step():
        tensors = [torch.ones(2), torch.ones(2, device="meta"), *(torch.ones(1 << 19) for _ in range(2))]
        with pytest.raises(RuntimeError, match="device"):
            op.redispatch(cpu, tensors, *rest)

    return _growth(step)


OPS = ("norm_partial", "scale_", "clamp_", "clip_grad_norm_")


@pytest.mark.parametrize("name", OPS)
def test_nothing_is_kept_of_a_list_over_two_devices(cpu, name):
    assert each_in_a_child(growth_over_two_devices, *((op,) for op in OPS))[name,] < 40 << 20


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("kind", LEAKS)
def test_nothing_is_kept_of_a_list_with_an_odd_gradient(kind, at):
    """The reader gives every tensor back, also those behind one that it refuses."""
    assert each_in_a_child(growth, *itertools.product(LEAKS, (0, 1)))[kind, at] < 40 << 20


def resized():
    """Elements, but no memory."""
    grad = torch.ones(4)
    grad.untyped_storage().resize_(0)
    return grad


def zero_tensor():
    return torch._efficientzerotensor(4)


def of_no_memory(kind: str, name: str) -> dict:
    """As below, for the first and the last place in the list, watched and not."""
    return {(watched, at): _of_no_memory(kind, name, watched, at) for watched in (False, True) for at in (0, 2)}


def _of_no_memory(kind: str, name: str, watched: bool, at: int):
    """The error of a call, and what was next to the tensor without memory."""
    grads = [torch.tensor([3.0, 4.0]), torch.tensor([5.0], dtype=torch.bfloat16)]
    others, versions = list(grads), [g._version for g in grads]
    grads.insert(at, {"resized": resized, "zero": zero_tensor}[kind]())
    made = []
    for grad in grads:
        made.append(torch.nn.Parameter(torch.zeros(grad.shape, dtype=grad.dtype)))
        made[-1].grad = grad
    with Dispatch() if watched else warnings.catch_warnings():
        ours = outcome(lambda F: CALLS[name](F, made), fastclip)
    error = "" if ours.error is None else f"{type(ours.error).__name__}: {ours.error}"
    value = None if ours.value is None else ours.value.item()
    return error, value, [g.tolist() for g in others], [g._version for g in others] == versions


NO_MEMORY = [(kind, name) for kind in ("resized", "zero") for name in CALLS]


@pytest.mark.parametrize("name", CALLS)
def test_storage_resized_to_nothing(name):
    """As FSDP leaves parameters that it has given back: torch crashes, here it is an error that says which."""
    for where, (error, _, others, same_versions) in each_in_a_child(of_no_memory, *NO_MEMORY)["resized", name].items():
        with reference.during(where):
            assert error.startswith(("RuntimeError", "ValueError"))
            assert "gradient of shape (4,)" in error
            assert others == [[3.0, 4.0], [5.0]]
            assert same_versions


@pytest.mark.parametrize("name", CALLS)
def test_zero_tensors(name):
    """They have a norm and cannot be written, as in torch; nothing else is written then."""
    for where, (error, value, others, same_versions) in each_in_a_child(of_no_memory, *NO_MEMORY)["zero", name].items():
        with reference.during(where):
            if name == "get_total_norm":
                assert error == ""
                reference.assert_norm(torch.tensor(value), math.sqrt(50))
            else:
                assert error.startswith("RuntimeError")
                assert "ZeroTensor" in error
            assert others == [[3.0, 4.0], [5.0]]
            assert same_versions


# Callers that interfere


def norms_while_another_thread_clears_the_list() -> set:
    """The list changes under a call: an error or the norm of what was in it at one time, but no memory that is gone."""
    torch.set_num_threads(1)
    seen = set()
    for turn in range(60):
        tensors = [torch.full((1 << 16,), 2.0) for _ in range(40)]
        started = threading.Event()

        def clear(tensors=tensors, started=started, turn=turn):
            started.wait()
            time.sleep(turn % 12 * 5e-5)
            tensors.clear()
            # What was given back is asked for again, and overwritten.
            return [torch.full((1 << 16,), -7.0) for _ in range(40)]

        thread = threading.Thread(target=clear)
        thread.start()
        started.set()
        seen.add(fastclip.get_total_norm(tensors, norm_dtype=torch.float64).item())
        thread.join()
    return seen


def test_the_list_is_cleared_by_another_thread():
    seen = in_a_child(norms_while_another_thread_clears_the_list, env=UNMAPPED_AT_ONCE)
    assert seen <= {0.0, 2.0 * math.sqrt(40 << 16)}


class Interfering:
    """A number that changes the gradients while it is asked what it is."""

    def __init__(self, act):
        self.act = act

    def __float__(self):
        self.act()
        return 1.0


def calls_with_a_number_that_interferes(name: str) -> dict:
    """As below, for each way to interfere."""
    ways = ("freed", "resized", "cleared", "replaced", "kept")
    return {how: _call_with_a_number_that_interferes(name, how) for how in ways}


def _call_with_a_number_that_interferes(name: str, how: str) -> list:
    """What is in new memory that took the place of that which was freed, after the call."""
    made = parameters([torch.full((1 << 18,), 2.0) for _ in range(8)])
    spies = []

    def act():
        for p in made:
            if how == "resized":
                p.grad.untyped_storage().resize_(0)
                p.grad = None
            elif how == "freed":
                p.grad = None
            else:
                p.grad.data = torch.full((3,), 2.0)
        if how == "cleared":
            made.clear()
        gc.collect()
        spies.extend(torch.full((1 << 18,), 9.0) for _ in range(8))

    number = Interfering(act)
    grads = [p.grad for p in made] if how == "kept" else None
    calls = {
        "max_norm": lambda: fastclip.clip_grad_norm_(made, number),
        "max_norm, checked": lambda: fastclip.clip_grad_norm_(made, number, error_if_nonfinite=True),
        "norm_type": lambda: fastclip.clip_grad_norm_(made, 1.0, number),
        "norm_type of tensors": lambda: fastclip.get_total_norm([p.grad for p in made], number),
        "max_norm beside a norm": lambda: fastclip.clip_grads_with_norm_(made, number, torch.tensor(99.0)),
        "clip_value": lambda: fastclip.clip_grad_value_(made, number),
    }
    outcome(lambda F: calls[name](), fastclip)
    del grads
    return [bool((spy == 9.0).all()) for spy in spies]


NUMBERS = ("max_norm", "max_norm, checked", "norm_type", "norm_type of tensors", "max_norm beside a norm", "clip_value")


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_that_interferes(name):
    """Numbers are asked before any pointer is taken: nothing that is gone is read or written."""
    untouched = each_in_a_child(calls_with_a_number_that_interferes, *((number,) for number in NUMBERS))[name,]
    assert all(map(all, untouched.values())), untouched


# Who watches


class Raising(torch.utils._python_dispatch.TorchDispatchMode):
    """Raises at one of the ops that it sees, before or after it is run."""

    def __init__(self, at: int, after: bool):
        super().__init__()
        self.at, self.after, self.seen = at, after, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        here = len(self.seen) == self.at
        self.seen.append(str(func))
        if here and not self.after:
            raise RuntimeError("raised by the caller's mode")
        result = func(*args, **(kwargs or {}))
        if here:
            raise RuntimeError("raised by the caller's mode")
        return result


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("name", CALLS)
def test_an_error_of_a_mode_comes_out(name, after):
    """At whichever op; the gradients are scaled once, as they should, or not at all."""
    expected = [torch.tensor([30.0, 40.0]), torch.full((9,), 2.0, dtype=torch.float64)]
    CALLS[name](fastclip, parameters(expected))
    for at in itertools.count():
        grads = [torch.tensor([30.0, 40.0]), torch.full((9,), 2.0, dtype=torch.float64)]
        untouched, made = [g.clone() for g in grads], parameters(grads)
        mode = Raising(at, after)
        error = None
        with mode:
            try:
                CALLS[name](fastclip, made)
            except RuntimeError as raised:
                error = raised
        if at >= len(mode.seen):
            break
        assert str(error) == "raised by the caller's mode", mode.seen
        is_whole = all(torch.equal(g, e) for g, e in zip(grads, expected, strict=True))
        is_untouched = all(torch.equal(g, u) for g, u in zip(grads, untouched, strict=True))
        assert is_whole or is_untouched, (mode.seen, grads)
        if not after and not any("fastclip" in op for op in mode.seen[:at]):
            assert is_untouched, mode.seen
    assert at > 0
    assert error is None


@pytest.mark.skipif(on_cpu.unavailable() is not None, reason=str(on_cpu.unavailable()))
@pytest.mark.parametrize("name", CALLS)
def test_an_error_of_the_gpu_comes_out(name):
    """2,047 tensors are two tables: whichever call of the runtime fails, none is scaled twice, and it is told."""
    expected = [torch.full((3,), 4.0) for _ in range(2_047)]
    with on_cpu.use():
        CALLS[name](fastclip, parameters(expected))
        once = expected[0].tolist()
        for calls in itertools.count():
            grads = [torch.full((3,), 4.0) for _ in range(2_047)]
            made = parameters(grads)
            with on_cpu.failing(calls):
                error = outcome(lambda F: CALLS[name](F, made), fastclip).error  # noqa: B023
            values = {tuple(g.tolist()) for g in grads}
            assert values <= {(4.0, 4.0, 4.0), tuple(once)}
            if error is None:
                break
            assert "unspecified launch failure" in str(error)
    assert calls > 1
    assert values == {tuple(once)}


@pytest.mark.parametrize("set_default", [False, True], ids=["with torch.device", "set_default_device"])
@pytest.mark.parametrize("name", CALLS)
def test_a_default_device_closes_no_way(name, set_default, monkeypatch):
    """It watches nothing, so it need not be told of every tensor."""
    calls = 0
    original = _device.DeviceContext.__torch_function__

    def counting(self, func, types, args=(), kwargs=None):
        nonlocal calls
        calls += 1
        return original(self, func, types, args, kwargs)

    made = parameters([torch.ones(4) for _ in range(1_000)])
    tensors = [p.grad for p in made]
    rest = {"clip_grads_with_norm_": (1.0, torch.tensor(5.0)), "get_total_norm": ()}.get(name, (1.0,))
    monkeypatch.setattr(_device.DeviceContext, "__torch_function__", counting)
    if set_default:
        torch.set_default_device("cpu")
    try:
        with torch.device("cpu") if not set_default else warnings.catch_warnings():
            calls = 0
            getattr(fastclip, name)(tensors if name == "get_total_norm" else made, *rest)
    finally:
        if set_default:
            torch.set_default_device(None)
    assert calls < 50


def test_a_default_device_places_the_norm_of_nothing_and_no_other():
    with torch.device("meta"):
        assert fastclip.get_total_norm([torch.ones(4, device="cpu")]).item() == 2
        assert fastclip.get_total_norm([]).device == torchs.get_total_norm([]).device


TRACED = {
    "clip_grad_norm_": lambda F, p: F.clip_grad_norm_([p], 1.0),
    "clip_grad_norm_, inf": lambda F, p: F.clip_grad_norm_([p], 1.0, math.inf),
    "get_total_norm": lambda F, p: F.get_total_norm([p.grad]),
    "clip_grads_with_norm_": lambda F, p: F.clip_grads_with_norm_([p], 1.0, p.grad.norm()),
    "clip_grad_value_": lambda F, p: F.clip_grad_value_([p], 1.0),
}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("call", TRACED.values(), ids=TRACED)
def test_jit_trace(call):
    """The traced function clips other gradients by their own norm, as torch's does."""

    def step(F):
        def clipped(grad):
            grad = grad * 1
            p = torch.nn.Parameter(torch.zeros(2))
            p.grad = grad
            norm = call(F, p)
            return grad if norm is None else (grad, norm)

        return clipped

    example = torch.tensor([3.0, 4.0])
    ours, theirs = (torch.jit.trace(step(F), (example,), check_trace=False) for F in (fastclip, torchs))
    for other in (torch.tensor([30.0, 40.0]), torch.tensor([0.3, 0.4]), example):
        torch.testing.assert_close(ours(other), theirs(other))


@pytest.mark.parametrize("call", TRACED.values(), ids=TRACED)
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside an ordinary one"])
def test_forward_mode_derivatives(call, beside):
    """Values and tangents of torch's loop over the gradients (its foreach norm fails), or torch's error."""

    def run(F):
        with forward_ad.dual_level():
            p = torch.nn.Parameter(torch.zeros(2))
            p.grad = forward_ad.make_dual(torch.tensor([3.0, 0.4]), torch.tensor([1.0, 2.0]))
            norm = call(F, p)
            if beside:
                (q,) = parameters([torch.tensor([1.0, 2.0])])
                call(F, q)
            results = [p.grad] if norm is None else [norm, p.grad]
            return [part for result in results for part in forward_ad.unpack_dual(result)]

    class Loop:
        @staticmethod
        def clip_grad_norm_(*args):
            return torchs.clip_grad_norm_(*args, foreach=False)

        @staticmethod
        def get_total_norm(*args):
            return torchs.get_total_norm(*args, foreach=False)

        @staticmethod
        def clip_grads_with_norm_(*args):
            return torchs.clip_grads_with_norm_(*args, foreach=False)

        @staticmethod
        def clip_grad_value_(*args):
            return torchs.clip_grad_value_(*args, foreach=False)

    ours = outcome(lambda F: run(fastclip), fastclip)
    if ours.error is not None:
        theirs = outcome(lambda F: run(torchs), torchs)
        assert type(ours.error) is type(theirs.error), ours.error
        return
    for got, want in zip(ours.value, run(Loop), strict=True):
        torch.testing.assert_close(got, want)


# What Dynamo sees


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


OPS = {
    "norm_partial": (torch.ops.fastclip.norm_partial, 2.0),
    "scale_": (torch.ops.fastclip.scale_, torch.tensor(0.5)),
    "clamp_": (torch.ops.fastclip.clamp_, -1.0, 1.0),
    "clip_grad_norm_": (torch.ops.fastclip.clip_grad_norm_, 1.0, 2.0),
}


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("context", [warnings.catch_warnings, torch.inference_mode, torch.profiler.profile])
@pytest.mark.parametrize("name", OPS)
def test_an_op_in_a_frame_that_dynamo_leaves_to_python(cpu, name, context):
    """No warning, which is an error here: the kernels of our ops that are written in Python are not for tracing."""
    op, *rest = OPS[name]
    left = torch._dynamo.disable(lambda grads: op(grads, *rest), recursive=False)

    def step(grads, x):
        y = x * 2
        left(grads)
        return y + 1

    grads, expected = [torch.tensor([30.0, 40.0])], [torch.tensor([30.0, 40.0])]
    op(expected, *rest)
    version = grads[0]._version
    with context():
        result = torch.compile(step, backend="eager")(grads, torch.ones(3))
    assert torch.equal(result, torch.full((3,), 3.0))
    assert torch.equal(grads[0], expected[0])
    assert grads[0]._version - version == (name != "norm_partial")


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("name", CALLS)
def test_a_function_that_dynamo_leaves_to_python(name):
    """What it calls is left to Dynamo."""
    left = types.SimpleNamespace(**{name: torch._dynamo.disable(getattr(fastclip, name), recursive=False)})

    def step(made, x):
        y = x * 2
        CALLS[name](left, made)
        return y + 1

    grads, expected = ([torch.tensor([30.0, 40.0]), torch.ones(3, dtype=torch.complex64)] for _ in range(2))
    if name == "clip_grad_value_":
        del grads[1], expected[1]
    CALLS[name](fastclip, parameters(expected))
    result = torch.compile(step, backend="eager")(parameters(grads), torch.ones(3))
    assert torch.equal(result, torch.full((3,), 3.0))
    torch.testing.assert_close(grads, expected)


BOUNDS = {
    "max_norm": lambda F, made, bound: F.clip_grad_norm_(made, bound),
    "max_norm, inf": lambda F, made, bound: F.clip_grad_norm_(made, bound, math.inf),
    "max_norm beside a norm": lambda F, made, bound: F.clip_grads_with_norm_(made, bound, torch.tensor(5.0)),
    "clip_value": lambda F, made, bound: F.clip_grad_value_(made, bound),
}


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("call", BOUNDS.values(), ids=BOUNDS)
def test_compile_with_a_tensor_for_a_bound(call):
    """One graph, in which the bound stays a tensor: another one is another bound."""

    def run(F, bounds):
        torch._dynamo.reset()
        compiled = torch.compile(lambda made, bound: call(F, made, bound), backend="aot_eager", fullgraph=True)
        results = []
        for bound in bounds:
            grads = [torch.tensor([3.0, 4.0]), torch.tensor([0.1, -9.0])]
            norm = compiled(parameters(grads), torch.tensor(bound))
            results.append(grads if norm is None else [norm, *grads])
        return results

    theirs = outcome(lambda F: run(F, (2.0, 3.0, 100.0)), torchs)
    ours = outcome(lambda F: run(F, (2.0, 3.0, 100.0)), fastclip)
    assert type(ours.error) is type(theirs.error), ours.error
    if theirs.error is None:
        torch.testing.assert_close(ours.value, theirs.value)


def public_functions():
    found = {f"fastclip.{name}": getattr(fastclip, name) for name in fastclip.__all__}
    for module in (adapters, fsdp):
        for name, function in vars(module).items():
            if not name.startswith("_") and getattr(function, "__module__", "") == module.__name__:
                found[f"{module.__name__}.{name}"] = function
    return {name: value for name, value in found.items() if callable(value)}


@pytest.mark.parametrize("function", public_functions().values(), ids=public_functions())
def test_type_hints_can_be_resolved(function):
    """As programs do that make command lines of signatures."""
    hints = typing.get_type_hints(function)
    assert "return" in hints or isinstance(function, type)


# Versions and errors


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("name", WRITERS)
def test_versions_of_ordinary_gradients(name, mode):
    """Inference mode is no reason not to tell autograd: the gradient may be one that it saved before."""
    for kinds in ([torch.ones(3)], [torch.ones(3), torch.ones(2, dtype=torch.bfloat16), torch.ones(4, 4)[:, 1]]):
        made = parameters(kinds)
        versions = [p.grad._version for p in made]
        with mode():
            CALLS[name](fastclip, made)
        assert [p.grad._version for p in made] == [v + 1 for v in versions]


@pytest.mark.parametrize("name", WRITERS)
def test_inference_tensors_beside_ordinary_ones(name):
    """In inference mode both are written, and the ordinary one gets its version."""
    with torch.inference_mode():
        inference = torch.full((3,), 9.0)
    ordinary = torch.full((3,), 9.0)
    version = ordinary._version
    with torch.inference_mode():
        made = [torch.nn.Parameter(torch.zeros(3)) for _ in range(2)]
        made[0].grad, made[1].grad = inference, ordinary
        CALLS[name](fastclip, made)
    assert ordinary._version == version + 1
    assert torch.equal(inference, ordinary)
    assert ordinary[0] < 9


def with_odd_layout(layout: str) -> torch.nn.Parameter:
    convert = {"csr": torch.Tensor.to_sparse_csr, "mkldnn": torch.Tensor.to_mkldnn}[layout]
    p = torch.nn.Parameter(convert(torch.zeros(2, 2)))
    p.grad = convert(torch.eye(2))
    return p


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch: CSR is in beta
@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("layout", ["csr", "mkldnn"])
def test_values_of_layouts_that_cannot_be_clamped(layout, at, fence):
    """torch's error, before the dense gradient beside them is written."""
    if layout == "mkldnn" and not torch.backends.mkldnn.is_available():
        pytest.skip("torch without MKLDNN")
    grads = [torch.tensor([3.0, -4.0])]
    made = parameters(grads)
    made.insert(at, with_odd_layout(layout))
    theirs = outcome(lambda F: F.clip_grad_value_(made, 0.5), torchs).error
    grads[0].copy_(torch.tensor([3.0, -4.0]))  # torch may have written it
    before, version = fence(grads), grads[0]._version
    ours = outcome(lambda F: F.clip_grad_value_(made, 0.5), fastclip).error
    assert type(ours) is type(theirs)
    assert before.unchanged()
    assert grads[0]._version == version


@pytest.mark.parametrize("norm_type", reference.NORM_TYPES)
@pytest.mark.parametrize("watched", [False, True])
def test_a_forced_backend_reads_what_shares_memory_with_itself(cpu, norm_type, watched):
    """Whoever watches: what cannot be written can be read."""
    tensors = [torch.tensor([1.0, 2.0]), torch.full((1,), 3.0).expand(7)]
    with Dispatch() if watched else warnings.catch_warnings():
        norm = fastclip.get_total_norm(tensors, norm_type)
    reference.assert_norm(norm, reference.total_norm(tensors, norm_type), torch.float32)


@pytest.mark.parametrize("fake", [False, True])
def test_float8_norm_of_the_op(cpu, fake):
    """The op, whose kernels store four dtypes, says so, and its fake kernel with it; the functions take any."""
    with FakeTensorMode() if fake else contextlib.nullcontext():
        grads = [torch.tensor([3.0, 4.3])]
        for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
            with pytest.raises(RuntimeError, match="dtype: expected float32, float64, bfloat16 or float16, got"):
                torch.ops.fastclip.clip_grad_norm_(grads, 1e9, 2.0, dtype=dtype)


def backends_in_overlapping_threads() -> dict:
    """The backend that each thread finds: in its own block, beside that of another, and when all are done."""
    made = parameters([torch.ones(2)])
    inside, leave, found = threading.Event(), threading.Event(), {}

    def find(where):
        found[where] = fastclip.why(made)[0].backend

    def first():
        with fastclip.use_backend("eager"):
            inside.set()
            leave.wait(10)
            find("first")

    def second():
        inside.wait(10)
        find("beside")
        with fastclip.use_backend(usual):
            leave.set()
            threads[0].join(10)
            find("second")

    find("before")
    usual, threads = found["before"], [threading.Thread(target=first), threading.Thread(target=second)]
    for thread in threads:
        thread.start()
    for thread in threads[::-1]:
        thread.join(10)
    find("after")
    return found


def test_backends_in_overlapping_threads():
    """Each thread has its own; none is left forced when all are done."""
    found = in_a_child(backends_in_overlapping_threads)
    usual = found["before"]
    assert found == {"before": usual, "beside": usual, "first": "eager", "second": usual, "after": usual}


# Adapters, as apex and Transformer Engine do it


def scale(sources, targets, factor, as_tensor):
    flag = torch.zeros(1, dtype=torch.int)
    function = adapters.multi_tensor_scale_tensor if as_tensor else adapters.multi_tensor_scale
    function(65_536, flag, [sources, targets], torch.tensor([factor]) if as_tensor else factor)
    return flag.item()


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("target", reference.FLOATS)
@pytest.mark.parametrize("source", reference.FLOATS)
def test_scaling_between_dtypes_rounds_once(source, target, as_tensor):
    """1e6 x 1e-3 fits into float16, 1e6 does not; 16-bit to float32 loses nothing."""
    values = torch.tensor([1.0, -3.0, 1 / 3, 60_000.0]).double()
    large = torch.tensor([1e6, -2e7]).double() if source != torch.float16 else torch.tensor([5.0])
    sources = [values.to(source), large.to(source), torch.linspace(0.1, 9, 64).to(source).reshape(8, 8).t()]
    targets = [torch.full_like(s, math.nan, dtype=target) for s in sources]
    was = [s.clone() for s in sources]
    assert scale(sources, targets, 2.0**-10, as_tensor) == 0
    reference.assert_bits(sources, was)
    reference.assert_bits(targets, [(s.double() * 2.0**-10).to(target) for s in sources])


@pytest.mark.parametrize("as_tensor", [False, True])
def test_scaling_between_dtypes_with_a_factor_that_rounds(as_tensor):
    """One rounding, of the product: not of the source, and not of the factor, to the target's dtype."""
    generator = torch.Generator().manual_seed(4)
    source = torch.randn(5_000, generator=generator) * 100
    factor = torch.tensor(0.3713).item()
    for target in reference.LOW:
        targets = [torch.empty(5_000, dtype=target)]
        scale([source], targets, factor, as_tensor)
        reference.assert_bits(targets, [(source * factor).to(target)])


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("lengths", [(2, 1), (1, 2), (0, 1)])
def test_unequal_lists_are_refused(lengths, as_tensor, fence):
    sources, targets = ([torch.full((3,), 2.0) for _ in range(n)] for n in lengths)
    before = fence([*sources, *targets])
    with pytest.raises((ValueError, RuntimeError)):
        scale(sources, targets, 0.5, as_tensor)
    assert before.unchanged()


@pytest.mark.parametrize("as_tensor", [False, True])
def test_tensors_of_unequal_sizes_are_refused(as_tensor, fence):
    """Before the first is written, and without broadcasting."""
    sources = [torch.full((3,), 2.0), torch.ones(1)]
    targets = [torch.zeros(3), torch.zeros(4)]
    before = fence([*sources, *targets])
    with pytest.raises((ValueError, RuntimeError)):
        scale(sources, targets, 0.5, as_tensor)
    assert before.unchanged()


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("in_place", [True, False])
def test_the_overflow_flag(bad, as_tensor, in_place):
    """1 where a source is not finite, and what was set stays; all is scaled nevertheless."""
    sources = [torch.full((70,), 2.0), torch.full((5,), 4.0)]
    sources[1][3] = bad
    targets = sources if in_place else [torch.zeros_like(s) for s in sources]
    assert scale(sources, targets, 0.5, as_tensor) == 1
    assert targets[0].eq(1.0).all()
    assert targets[1][[0, 1, 2, 4]].eq(2.0).all()
    assert not targets[1][3].isfinite()


@pytest.mark.parametrize("as_tensor", [False, True])
def test_the_overflow_flag_looks_at_sources(as_tensor):
    """A product that does not fit into the target is no overflow of the source."""
    assert scale([torch.full((3,), 1e6)], [torch.zeros(3, dtype=torch.float16)], 1.0, as_tensor) == 0
    flag = torch.ones(1, dtype=torch.int)
    adapters.multi_tensor_scale(65_536, flag, [[torch.ones(2)], [torch.ones(2)]], 0.5)
    assert flag.item() == 1


def new_memory(parameter):
    """Give the gradient other memory; the old one is gone."""
    parameter.grad.data = torch.full_like(parameter.grad, 2.0)


def clipped_while_a_predicate_interferes() -> list:
    (parameter,) = parameters([torch.ones(1 << 22)])

    def is_duplicate(given):
        new_memory(given)
        return False

    norm = fastclip.clip_grad_norm_([parameter], 1.0, is_duplicate=is_duplicate, norm_dtype=torch.float64)
    return [norm.item(), parameter.grad.max().item()]


def test_a_predicate_that_interferes():
    """What the caller's code did before the list is read is what is clipped."""
    norm, largest = in_a_child(clipped_while_a_predicate_interferes, env=UNMAPPED_AT_ONCE)
    assert norm == 2.0 * 2**11
    assert largest == pytest.approx(2.0 / norm, rel=1e-6)


def clipped_while_finalizers_interfere() -> set:
    """A finalizer in a cycle gives a gradient other memory; the threshold moves the collection through the call."""
    seen = set()

    class Cycle:
        def __del__(self):
            new_memory(made[0])

    for threshold in range(1, 60):
        made = parameters([torch.ones(1 << 20) for _ in range(2)])
        cycle = Cycle()
        cycle.self = cycle
        del cycle
        gc.collect(0)
        cycle = Cycle()
        cycle.self = cycle
        del cycle
        gc.set_threshold(threshold)
        try:
            fastclip.clip_grad_norm_(made, 1.0)
            seen.add("clipped")
        except RuntimeError as error:
            seen.add(str(error))
        gc.set_threshold(700)
    return seen


def test_finalizers_that_interfere():
    """No memory that is gone is read or written: the call goes on, or says what happened."""
    seen = in_a_child(clipped_while_finalizers_interfere, env=UNMAPPED_AT_ONCE)
    assert "clipped" in seen
    assert all(said == "clipped" or "other memory while it was clipped" in said for said in seen), seen


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_a_dtype_that_holds_no_number(backend, fence):
    grads = [torch.tensor([3.0, 4.0])]
    before = fence(grads)
    with fastclip.use_backend(backend), pytest.raises(ValueError, match="norm_dtype: expected"):
        fastclip.clip_grad_norm_(parameters(grads), 1.0, norm_dtype=torch.float4_e2m1fn_x2)
    assert before.unchanged()


def test_a_subclass_beside_what_cannot_be_written(fence):
    grads = [torch.tensor([3.0, 4.0]), torch.tensor([3.0]).expand(4), torch.ones(2).as_subclass(Odd)]
    before = fence(grads)
    for call in (
        lambda: fastclip.clip_grad_norm_(parameters(grads), 1.0),
        lambda: fastclip.clip_grad_value_(parameters(grads), 1.0),
    ):
        with pytest.raises(RuntimeError, match="more than one element"):
            call()
        assert before.unchanged()


class Odd(torch.Tensor):
    """A tensor that torch's own functions take."""


def test_a_zero_tensor_as_norm():
    grad = torch.tensor([3.0, 4.0])
    fastclip.clip_grads_with_norm_(parameters([grad]), 2e-6, torch._efficientzerotensor((), dtype=torch.float32))
    assert grad.tolist() == [3.0, 4.0]


def test_an_error_with_arguments_of_its_own():
    class Picky(RuntimeError):
        def __init__(self, one, two):
            super().__init__(one, two)

    class Number:
        def __float__(self):
            raise Picky(1, 2)

    with pytest.raises(RuntimeError, match="max_norm: expected a number"):
        fastclip.clip_grad_norm_(parameters([torch.ones(2)]), Number())
