"""The contract of a list of gradients, and the arithmetic of clipping; csrc/clip.h has the same in C++."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import clip_grad as _torch

from .. import _ops
from ..arithmetic import clip_coef, root, wide_dtype
from ..backends import eager

# Bound at import, because patch() puts fastclip's functions in their place.
_torch_get_total_norm = _torch._get_total_norm
_torch_clip_grads_with_norm_ = _torch._clip_grads_with_norm_
_torch_clip_grad_value_ = _torch.clip_grad_value_

PLAIN = frozenset({Tensor, torch.nn.Parameter})


class Clip(NamedTuple):
    """What is asked of a clip by norm; csrc/clip.h has the same fields in the same order."""

    max_norm: float
    norm_type: float


class Group(NamedTuple):
    """A line of :func:`fastclip.why`."""

    backend: str
    device: str
    dtypes: tuple[str, ...]
    count: int
    reason: str

    def __str__(self) -> str:
        return f"{self.backend}: {self.count} x {'/'.join(self.dtypes)} on {self.device} ({self.reason})"


def describe(backend: str, tensors: Sequence[Tensor], reason: str) -> Group:
    dtypes = tuple(sorted({str(t.dtype).removeprefix("torch.") for t in tensors}))
    return Group(backend, str(tensors[0].device), dtypes, len(tensors), reason)


class Gradients:
    """A list that was read, and checked if it is to be written: torch's functions in terms of what an engine computes.

    An engine computes ``norm_partial``, ``scale_`` and ``clamp_``; the rest follows from them, and a list that knows a
    shorter way for a whole call overrides it.
    """

    __slots__ = ()
    tensors: Sequence[Tensor] = ()  # what this rank holds

    # What an engine computes.

    def norm_partial(self, norm_type: float) -> Tensor:
        """What combines with the same of other lists, 0-dim and wide: see arithmetic.py."""
        raise NotImplementedError

    def scale_(self, clip_coef: Tensor) -> None:
        """``x *= clip_coef``, a 0-dim wide tensor on any device."""
        raise NotImplementedError

    def clamp_(self, low: float, high: float) -> None:
        """``x = min(max(x, low), high)``, after :meth:`check_clamp`."""
        raise NotImplementedError

    # What cannot be clamped raises here, before anything of the call is written.
    def check_clamp(self, low: float, high: float) -> None:
        check_bound({tensor.dtype for tensor in self.tensors}, low, high)

    def groups(self) -> Iterator[Group]:
        """The lines of :func:`fastclip.why`."""
        raise NotImplementedError

    # What follows.

    @property
    def dtype(self) -> torch.dtype:
        """Of the norm: the promotion of all gradients."""
        return _ops.promoted_dtype(self.tensors)

    def has_elements(self) -> bool:
        return any(tensor.numel() > 0 for tensor in self.tensors)

    def total_norm(self, norm_type: float) -> Tensor:
        """The wide norm; of no elements it is 0."""
        if norm_type < 0 and not self.has_elements():
            return self.tensors[0].new_zeros((), dtype=wide_dtype(self.tensors[0].device))
        return root(self.norm_partial(norm_type), norm_type)

    def clip_with_norm_(self, max_norm: float, total_norm: Tensor) -> None:
        with torch.no_grad():
            self.scale_(clip_coef(total_norm.to(wide_dtype(total_norm.device)), max_norm))

    def clip_grad_norm_(self, clip: Clip, norm_dtype: torch.dtype | None) -> Tensor:
        total_norm = self.total_norm(clip.norm_type)
        self.clip_with_norm_(clip.max_norm, total_norm)
        return self.finish(total_norm, norm_dtype)

    def clip_grad_value_(self, low: float, high: float) -> None:
        self.check_clamp(low, high)
        self.clamp_(low, high)

    def check_finite(self, total_norm: Tensor, norm_type: float) -> None:
        if not math.isfinite(total_norm.item()):  # the one wait that is asked for
            raise RuntimeError(
                f"The total norm of order {norm_type} for gradients from "
                "`parameters` is non-finite, so it cannot be clipped. To disable "
                "this error and scale the gradients by the non-finite norm anyway, "
                "set `error_if_nonfinite=False`"
            )

    def finish(self, total_norm: Tensor, norm_dtype: torch.dtype | None) -> Tensor:
        """The norm as it is returned."""
        return total_norm.to(norm_dtype or self.dtype)


class Nothing(Gradients):
    """No gradients at all."""

    def total_norm(self, norm_type: float) -> Tensor:
        return torch.tensor(0.0)

    def clip_with_norm_(self, max_norm: float, total_norm: Tensor) -> None:
        pass

    def clip_grad_value_(self, low: float, high: float) -> None:
        pass

    def check_finite(self, total_norm: Tensor, norm_type: float) -> None:
        pass

    def groups(self) -> Iterator[Group]:
        return iter(())

    def finish(self, total_norm: Tensor, norm_dtype: torch.dtype | None) -> Tensor:
        return total_norm if norm_dtype is None else total_norm.to(norm_dtype)


class Foreign(Gradients):
    """Tensor subclasses, and what is no tensor: torch's own functions know what they mean."""

    def __init__(
        self, parameters: Sequence[Tensor], tensors: Sequence[Tensor], foreach: bool | None, reason: str = ""
    ) -> None:
        self.parameters, self.tensors, self.foreach, self.reason = parameters, tensors, foreach, reason

    def total_norm(self, norm_type: float) -> Tensor:
        return _torch_get_total_norm(self.tensors, norm_type, False, self.foreach)

    def clip_with_norm_(self, max_norm: float, total_norm: Tensor) -> None:
        _torch_clip_grads_with_norm_(self.parameters, max_norm, total_norm, self.foreach)

    def clip_grad_value_(self, low: float, high: float) -> None:
        _torch_clip_grad_value_(self.parameters, high, self.foreach)

    def groups(self) -> Iterator[Group]:
        yield describe(eager.NAME, self.tensors, self.reason)

    def finish(self, total_norm: Tensor, norm_dtype: torch.dtype | None) -> Tensor:
        return total_norm if norm_dtype is None else total_norm.to(norm_dtype)


_LEAST_RANGE = torch.finfo(torch.float16).max


def check_bound(dtypes: Iterable[torch.dtype], low: float, high: float) -> None:
    """Raises torch's error where a finite bound overflows a dtype."""
    if -_LEAST_RANGE <= low <= high <= _LEAST_RANGE:
        return
    bound = max(abs(low) if math.isfinite(low) else 0.0, abs(high) if math.isfinite(high) else 0.0)
    for dtype in dtypes:
        if dtype.is_floating_point and torch.finfo(dtype).max < bound:
            raise RuntimeError(f"clip_value: value cannot be converted to type {dtype} without overflow: {bound}")
