"""Puts fastclip in the place of torch.nn.utils' clip functions, and takes it back."""

from __future__ import annotations

from types import TracebackType

import torch.nn.utils
from torch.nn.utils import clip_grad

from . import clip

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
_originals: list[object] = []
_applied: Patch | None = None


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
    ``torch.nn.utils`` and the four functions behind them in ``torch.nn.utils.clip_grad``. That reaches every caller that
    looks them up as attributes, and callers who imported ``clip_grad_norm_`` by name before; the other three, imported
    by name before, stay torch's.

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
    for module, name, function in _PLACES:
        _originals.append(getattr(module, name))
        setattr(module, name, function)
    return handle


def unpatch() -> None:
    """Restores torch's own functions, whoever patched them; does nothing where torch is not patched.

    Example:
        >>> import fastclip
        >>> handle = fastclip.patch()
        >>> fastclip.unpatch()
    """
    global _applied
    _applied = None
    for (module, name, _), original in zip(_PLACES, _originals, strict=False):
        setattr(module, name, original)
    _originals.clear()
