"""Which backend is asked first: the order of preference, or the one that the user forces."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from types import ModuleType

import torch
from torch.autograd import forward_ad

from .backends import BACKENDS


def backends() -> dict[str, str | None]:
    """The backends in order of preference, and why one cannot be used here.

    Returns:
        dict: name of each backend -> None if it is available, otherwise the reason why it is not.

    Example:
        >>> import fastclip
        >>> fastclip.backends()["eager"] is None
        True
    """
    return {name: backend.unavailable() for name, backend in BACKENDS.items()}


def _find(name: str, argument: str) -> ModuleType:
    reasons = backends()
    if name in reasons and reasons[name] is None:
        return BACKENDS[name]
    listing = "; ".join(f"{known}: {reason or 'available'}" for known, reason in reasons.items())
    what = "is not available" if name in reasons else "is not a backend"
    raise ValueError(f"{argument}: {name!r} {what} ({listing})")


def _from_environment() -> ModuleType | None:
    name = os.environ.get("FASTCLIP_BACKEND")
    return _find(name, "FASTCLIP_BACKEND") if name else None


_environment = _from_environment()
_chosen: ContextVar[ModuleType | None] = ContextVar("fastclip_backend")


class _Context:
    """What :func:`use_backend` chose in this thread or task."""

    # Dynamo guards on what a builtin getter returns, so that a trace is made anew where the choice differs. It is given
    # the object, which is then the default.
    backend = property(_chosen.get)
    # Traced code cannot set a context variable.
    traced: ModuleType | None = None


_context = _Context()


def forced() -> ModuleType | None:
    """The backend that the caller or the environment forces."""
    backend = _context.traced or _context.backend
    return _environment if backend is _context else backend


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Forces one backend for every call inside the ``with`` block, in the thread or the task that it is of.

    A gradient that the backend cannot take then raises ValueError, before anything is written.
    ``FASTCLIP_BACKEND`` does the same from the environment, for the whole process.

    Args:
        name (str): a key of :func:`backends`.

    Raises:
        ValueError: the name is unknown, or that backend is not available here; the message lists all of them.

    Example:
        >>> import torch, fastclip
        >>> with fastclip.use_backend("eager"):
        ...     fastclip.get_total_norm([torch.tensor([3.0, 4.0])])
        tensor(5.)
    """
    backend = _find(name, "use_backend")
    if torch.compiler.is_compiling():
        before, _context.traced = _context.traced, backend
        try:
            yield
        finally:
            _context.traced = before
        return
    token = _chosen.set(backend)
    try:
        yield
    finally:
        _chosen.reset(token)


def candidates() -> list[ModuleType]:
    """The available backends, in the order in which they are asked."""
    if chosen := forced():
        return [chosen]
    if in_transform() or in_forward_ad():
        return [BACKENDS["eager"]]
    return [backend for backend in BACKENDS.values() if backend.unavailable() is None]


def in_transform() -> bool:
    """Whether a torch.func transform is active: those know torch's own ops, and not how ours write."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def in_forward_ad() -> bool:
    """Whether a level of forward-mode AD is active: torch's own ops carry tangents along."""
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


def _compiled(among: Iterable[ModuleType]) -> tuple[ModuleType | None, ModuleType | None]:
    engines = {backend.DEVICE: backend for backend in among if backend.ENGINE}
    return engines.get("cpu"), engines.get("cuda")


_usually_compiled = _compiled([_environment] if _environment else BACKENDS.values())


def compiled() -> tuple[ModuleType | None, ModuleType | None]:
    """The backends whose engines take what the reader has read: of the CPU and of CUDA devices."""
    chosen = _chosen.get(None)
    return _usually_compiled if chosen is None else _compiled([chosen])
