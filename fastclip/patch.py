"""Puts fastclip in the place of torch.nn.utils' clip functions, and takes it back."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FunctionType, SimpleNamespace, TracebackType
from typing import Any, NamedTuple

import torch.nn.utils
from torch.nn.utils import clip_grad

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
_replaced: list[_Replaced] = []
_applied: Patch | None = None


class _Replaced(NamedTuple):
    owner: Any
    name: str
    function: Callable
    original: Callable

    def restore(self) -> None:
        # What somebody else has put there since is theirs to take back.
        if vars(self.owner).get(self.name) is self.function:
            setattr(self.owner, self.name, self.original)


def _replace(owner: Any, name: str, function: Callable) -> None:
    original = getattr(owner, name)
    _replaced.append(_Replaced(owner, name, function, original))
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
    _replace(owner, "clip_grad_norm_", fsdp.clip_grad_norm_)


# Its import takes long; a model that uses it has imported it before it can be clipped.
_fsdp1_imported = AfterImport(_FSDP1, _replace_fsdp1)


class Patch:
    """What :func:`patch` returns: undoes that patch, once, by :meth:`undo` or at the end of a ``with`` block."""

    def undo(self) -> None:
        """Restores torch's functions if it was this patch that replaced them; otherwise does nothing."""
        if _applied is self:
            unpatch()

    def __enter__(self) -> Patch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.undo()


def patch() -> Patch:
    """Puts fastclip's functions in the place of torch's, for the whole process.

    Replaces ``clip_grad_norm_``, ``clip_grad_value_``, ``get_total_norm`` and ``clip_grads_with_norm_`` in
    ``torch.nn.utils`` and the four functions behind them in ``torch.nn.utils.clip_grad``. That reaches every caller
    that looks them up as attributes, and callers who imported ``clip_grad_norm_`` by name before; the other three,
    imported by name before, stay torch's. ``FullyShardedDataParallel.clip_grad_norm_`` is replaced, too, now or when
    ``torch.distributed.fsdp`` is imported.

    Returns:
        Patch: handle with ``undo()``, and a context manager. Where torch is patched already nothing happens, and the
        handle undoes nothing.

    Example:
        >>> import torch, fastclip
        >>> with fastclip.patch():
        ...     torch.nn.utils.clip_grad_norm_ is fastclip.clip_grad_norm_
        True
        >>> torch.nn.utils.clip_grad_norm_ is fastclip.clip_grad_norm_
        False
    """
    global _applied
    handle = Patch()
    if _applied:
        return handle
    _applied = handle
    for owner, name, function in _PLACES:
        _replace(owner, name, function)
    if _FSDP1 in sys.modules:
        _replace_fsdp1()
    else:
        _fsdp1_imported.install()
    return handle


def unpatch() -> None:
    """Restores torch's own functions, whoever patched them; does nothing where torch is not patched.

    What somebody else has put in a function's place since then stays there.

    Example:
        >>> import fastclip
        >>> handle = fastclip.patch()
        >>> fastclip.unpatch()
    """
    global _applied
    _applied = None
    _fsdp1_imported.remove()
    while _replaced:
        _replaced.pop().restore()
    while _renamed:
        function, module, qualname = _renamed.pop()
        function.__module__, function.__qualname__ = module, qualname
