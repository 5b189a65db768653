"""The ways by which a list reaches the kernels, each forced from outside; every one has to give the same answer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastclip
from cases import parameters


class Dispatch(TorchDispatchMode):
    """Sees every op and lets it pass."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Watcher(Dispatch):
    """Keeps the names of the ops that it sees."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return super().__torch_dispatch__(func, types, args, kwargs)


class Function(TorchFunctionMode):
    """Sees every function and lets it pass."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def one_rank() -> Iterator[None]:
    """A world of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _nothing(*grads: torch.Tensor) -> list[torch.Tensor]:
    return []


class Way(NamedTuple):
    """The public functions, called with gradients; what the way needs comes on top."""

    name: str
    context: Callable[[], AbstractContextManager] = contextlib.nullcontext
    # Gradients without elements that go last: no other answer, but another backend for a part of the list.
    beside: Callable[..., list[torch.Tensor]] = _nothing
    beside_values: Callable[..., list[torch.Tensor]] = _nothing  # those that can be clamped
    options: Callable[[], dict] = dict  # of the functions that compute a norm

    def clip_grad_norm_(self, grads, *args, **kwargs) -> torch.Tensor:
        made = parameters([*grads, *self.beside()])
        with self.context():
            return fastclip.clip_grad_norm_(made, *args, **kwargs, **self.options())

    def get_total_norm(self, tensors, *args, **kwargs) -> torch.Tensor:
        with self.context():
            return fastclip.get_total_norm([*tensors, *self.beside()], *args, **kwargs, **self.options())

    def clip_grads_with_norm_(self, grads, *args, **kwargs) -> None:
        made = parameters([*grads, *self.beside()])
        with self.context():
            fastclip.clip_grads_with_norm_(made, *args, **kwargs)

    def clip_grad_value_(self, grads, *args, **kwargs) -> None:
        made = parameters([*grads, *self.beside_values()])
        with self.context():
            fastclip.clip_grad_value_(made, *args, **kwargs)


def _profiler() -> AbstractContextManager:
    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True)


def _complex() -> list[torch.Tensor]:
    return [torch.zeros(0, dtype=torch.complex64)]


def _sparse() -> list[torch.Tensor]:
    return [torch.zeros(0).to_sparse()]


WAYS = {
    way.name: way
    for way in (
        Way("reader"),
        Way("op", Dispatch),
        Way("function mode", Function),
        Way("profiled", _profiler),
        Way("parts", beside=_complex, beside_values=_sparse),
        Way("parts in a mode", Dispatch, beside=_complex, beside_values=_sparse),
        Way("sharded", options=lambda: {"process_group": dist.group.WORLD}),
        Way("eager", lambda: fastclip.use_backend("eager")),
    )
}
