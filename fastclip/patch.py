"""Puts fastclip in the place of torch.nn.utils' clip functions, and takes it back."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import FunctionType, SimpleNamespace, TracebackType
from typing import Any

import torch.nn.utils
from torch.nn.utils import clip_grad

import fastclip

from . import clip, fsdp
from ._after_import import AfterImport

_FSDP1 = "torch.distributed.fsdp"

# torch's own clip_grad_norm_ looks up the two private names at every call: replacing them reaches code that imported it
# by name long before.
_PLACES = (
    (torch.nn.utils, "clip_grad_norm_", clip.clip_grad_norm_),
    (torch.nn.utils, "clip_grad_value_", clip.clip_grad_value_),
    (torch.nn.utils, "get_total_norm", clip.get_total_norm),
    (torch.nn.utils, "clip_grads_with_norm_", clip.clip_grads_with_norm_),
    (clip_grad, "clip_grad_norm_", clip.clip_grad_norm_),
    (clip_grad, "clip_grad_value_", clip.clip_grad_value_),
    (clip_grad, "_get_total_norm", clip.get_total_norm),
    (clip_grad, "_clip_grads_with_norm_", clip.clip_grads_with_norm_),
)
# Where pickle finds torch's functions while others have their places.
originals = SimpleNamespace()
_renamed: list[tuple[Callable, str, str]] = []
# Those in force, one over the other.
_applied: list[Patch] = []


@dataclass
class _Replaced:
    owner: Any
    name: str
    function: Callable
    original: Callable

    def restore(self, above: Iterable[_Replaced]) -> None:
        # What a later patch would put back, or somebody else has put there since, is theirs to take back.
        for other in above:
            if other.owner is self.owner and other.name == self.name and other.original is self.function:
                other.original = self.original
                return
        if vars(self.owner).get(self.name) is self.function:
            setattr(self.owner, self.name, self.original)


def _replace(handle: Patch, owner: Any, name: str, function: Callable) -> None:
    original = getattr(owner, name)
    handle.replaced.append(_Replaced(owner, name, function, original))
    # Whoever wrapped a function before may not have made a function of it.
    if isinstance(original, FunctionType) and original.__module__ != __name__ and _is_found_by_pickle(original):
        _renamed.append((original, original.__module__, original.__qualname__))
        key = original.__qualname__.replace(".", "_")
        setattr(originals, key, original)
        original.__module__, original.__qualname__ = __name__, f"originals.{key}"
    setattr(owner, name, function)


def _is_found_by_pickle(function: Any) -> bool:
    found: Any = sys.modules.get(function.__module__)
    for part in function.__qualname__.split("."):
        found = getattr(found, part, None)
    return found is function


def _replace_fsdp1() -> None:
    owner = sys.modules[_FSDP1].FullyShardedDataParallel
    _replace(_applied[0], owner, "clip_grad_norm_", fsdp.clip_grad_norm_)


# Its import takes long; a model that uses it has imported it before it can be clipped.
_fsdp1_imported = AfterImport(_FSDP1, _replace_fsdp1)


class Patch:
    """What :func:`patch` returns: undoes that patch, once, by :meth:`undo` or at the end of a ``with`` block."""

    def __init__(self, below: Patch | None = None) -> None:
        self.replaced: list[_Replaced] = []
        self._below = below  # what was applied for this one alone

    def undo(self) -> None:
        """Restores what this patch replaced, once; otherwise does nothing."""
        if self not in _applied:
            return
        place = _applied.index(self)
        above = [each for later in _applied[place + 1 :] for each in later.replaced]
        del _applied[place]
        while self.replaced:
            self.replaced.pop().restore(above)
        if self._below:
            self._below.undo()
        if not _applied:
            _fsdp1_imported.remove()
            while _renamed:
                function, module, qualname = _renamed.pop()
                function.__module__, function.__qualname__ = module, qualname

    def __enter__(self) -> Patch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.undo()


def patch(*, monitor: fastclip.GradMonitor | None = None) -> Patch:
    """Puts fastclip's functions in the place of torch's, for the whole process.

    Replaces ``clip_grad_norm_``, ``clip_grad_value_``, ``get_total_norm`` and ``clip_grads_with_norm_`` in
    ``torch.nn.utils`` and the four functions behind them in ``torch.nn.utils.clip_grad``. That reaches every caller
    that looks them up as attributes, and callers who imported ``clip_grad_norm_`` by name before; the other three,
    imported by name before, stay torch's. ``FullyShardedDataParallel.clip_grad_norm_`` is replaced, too, now or when
    ``torch.distributed.fsdp`` is imported.

    Args:
        monitor (GradMonitor, optional): records every call over parameters of its model, by whomever; others' calls are
            clipped as they are. Several may watch, each its own model.

    Returns:
        Patch: handle with ``undo()``, and a context manager. Where torch is patched already nothing happens without a
        monitor, and the handle undoes nothing.

    Raises:
        TypeError: ``monitor`` is no GradMonitor.

    Example:
        >>> import torch, fastclip
        >>> with fastclip.patch():
        ...     torch.nn.utils.clip_grad_norm_ is fastclip.clip_grad_norm_
        True
        >>> torch.nn.utils.clip_grad_norm_ is fastclip.clip_grad_norm_
        False
    """
    if monitor is not None:
        from .monitor import watched

        return overlay(watched(monitor))
    handle = Patch()
    if _applied:
        return handle
    _applied.append(handle)
    for owner, name, function in _PLACES:
        _replace(handle, owner, name, function)
    if _FSDP1 in sys.modules:
        _replace_fsdp1()
    else:
        _fsdp1_imported.install()
    return handle


def overlay(makers: dict[str, Callable[[Callable], Callable]]) -> Patch:
    """Patches, and puts in the place of some of our functions, by name, what is made of what stands there."""
    handle = Patch(None if _applied else patch())
    _applied.append(handle)
    for owner, name, function in _PLACES:
        if make := makers.get(function.__name__):
            _replace(handle, owner, name, make(getattr(owner, name)))
    return handle


def unpatch() -> None:
    """Restores torch's own functions, whoever patched them; does nothing where torch is not patched.

    What somebody else has put in a function's place since then stays there.

    Example:
        >>> import fastclip
        >>> handle = fastclip.patch()
        >>> fastclip.unpatch()
    """
    while _applied:
        _applied[-1].undo()
