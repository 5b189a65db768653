"""Which backend is asked first: the order of preference, or the one that the user forces."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from types import ModuleType

import torch

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


forced: ModuleType | None = _from_environment()


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Forces one backend for every call of the process inside the ``with`` block.

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
    global forced
    chosen, before = _find(name, "use_backend"), forced
    forced = chosen
    try:
        yield
    finally:
        forced = before


def candidates() -> list[ModuleType]:
    """The available backends, in the order in which they are asked."""
    if forced:
        return [forced]
    if in_transform():
        return [BACKENDS["eager"]]
    return [backend for backend in BACKENDS.values() if backend.unavailable() is None]


def in_transform() -> bool:
    """Whether a torch.func transform is active: those know torch's own ops, and not how ours write."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def is_first(name: str) -> bool:
    """Whether a backend is asked before all others that serve the same device."""
    backend = BACKENDS[name]
    return forced is backend or (forced is None and backend.unavailable() is None)


def has_ops(device: str) -> bool:
    """Whether the ops of a device type are those of the backend that is asked first."""
    return any(device in backend.OPS for backend in ([forced] if forced else BACKENDS.values()))
