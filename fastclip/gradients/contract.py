"""The contract of a list of gradients, and the arithmetic of clipping; csrc/clip.h has the same in C++."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import clip_grad as _torch

from .. import _ops
from ..arithmetic import as_number, clip_coef, clip_factor, each_coef, root, scaled_norm, wide_dtype
from ..backends import eager

# Bound at import, because patch() puts fastclip's functions in their place.
_torch_get_total_norm = _torch._get_total_norm
_torch_clip_grads_with_norm_ = _torch._clip_grads_with_norm_
_torch_clip_grad_value_ = _torch.clip_grad_value_

PLAIN = frozenset({Tensor, torch.nn.Parameter})


# In the order of Nonfinite in csrc/clip.h.
PROPAGATE, ZERO, SANITIZE = range(3)


class Clip(NamedTuple):
    """What is asked of a clip by norm; csrc/clip.h has the same fields in the same order."""

    max_norm: float
    norm_type: float
    nonfinite: int = PROPAGATE
    found_inf: Tensor | None = None  # of one float32: receives 1 where the norm is not finite, else 0
    inv_scale: float | Tensor | None = None  # meant are the gradients times it

    def at(self, device: torch.device) -> Clip:
        """The same with 0-dim numbers on a device. What was ``found_inf`` may have to be given a copy."""
        found_inf, inv_scale = self.found_inf, self.inv_scale
        if found_inf is not None:
            near = found_inf.device == device and not found_inf.is_neg()
            found_inf = found_inf.detach().reshape(()) if near else torch.empty((), dtype=torch.float32, device=device)
        if inv_scale is not None:
            inv_scale = as_number(inv_scale, device).resolve_neg()
        return self._replace(found_inf=found_inf, inv_scale=inv_scale)

    def hand_back(self, found_inf: Tensor | None) -> None:
        """Gives ``found_inf`` what was written to the number of :meth:`at`, where that is not its memory."""
        near = self.found_inf
        if found_inf is not None and near is not None and (found_inf.device != near.device or found_inf.is_neg()):
            found_inf.detach().copy_(near)


class Group(NamedTuple):
    """A line of :func:`fastclip.why`."""

    backend: str
    device: str
    dtypes: tuple[str, ...]
    count: int  # type: ignore[assignment]  # in the place of tuple.count, which a line has no use for
    reason: str

    def __str__(self) -> str:
        return f"{self.backend}: {self.count} x {'/'.join(self.dtypes)} on {self.device} ({self.reason})"


def describe(backend: str, tensors: Sequence[Tensor], reason: str) -> Group:
    dtypes = tuple(sorted({str(t.dtype).removeprefix("torch.") for t in tensors}))
    return Group(backend, str(tensors[0].device), dtypes, len(tensors), reason)


class Each:
    """Tensors, or units of them, that are treated each by itself."""

    __slots__ = ()

    def norms(self, norm_type: float) -> Tensor:
        """The wide norm of each alone, (N,)."""
        raise NotImplementedError

    def scale_each_(self, coefs: Tensor) -> None:
        """``x *= coefs[i]`` for each, (N,), wide, on any device."""
        raise NotImplementedError

    def clip_each_(
        self, norm_type: float, bounds: Tensor | float, divisors: Tensor | None = None, least: float = 0.0
    ) -> Tensor:
        """Scales each by :func:`fastclip.arithmetic.each_coef` of its norm, over its divisor; returns those, (N,)."""
        measures = self.norms(norm_type)
        if divisors is not None:
            measures = measures / divisors.to(measures.device, measures.dtype, non_blocking=True)
        self.scale_each_(each_coef(measures, bounds, least))
        return measures


class Gradients(Each):
    """A list that was read, and checked if it is to be written: torch's functions in terms of what an engine computes.

    An engine computes ``norm_partial``, ``norms`` (of :attr:`tensors`), ``stats``, ``scale_``, ``scale_each_``,
    ``sanitize_`` and ``clamp_``; the rest follows from them, and a list that knows a shorter way for a whole call
    overrides it.
    """

    __slots__ = ()
    tensors: Sequence[Tensor] = ()  # what this rank holds

    # What an engine computes.

    def norm_partial(self, norm_type: float) -> Tensor:
        """What combines with the same of other lists, 0-dim and wide: see arithmetic.py."""
        raise NotImplementedError

    def stats(self) -> tuple[Tensor, Tensor]:
        """Of each of :attr:`tensors`, (N, 4), wide: ``sum |x|^2``, ``max |x|``, how many elements are not finite, and
        how many are 0; with it what ``norm_partial(2.0)`` gives.
        """
        raise NotImplementedError

    def scale_(self, clip_coef: Tensor, zero: bool = False) -> None:
        """``x *= clip_coef``, a 0-dim wide tensor on any device; with ``zero`` a 0 makes zeros also of inf and NaN."""
        raise NotImplementedError

    def sanitize_(self) -> None:
        """``x = 0`` where x is not finite."""
        raise NotImplementedError

    def clamp_(self, low: float, high: float) -> None:
        """``x = min(max(x, low), high)``, after :meth:`check_clamp`."""
        raise NotImplementedError

    # What cannot be scaled, or clamped, raises here, before anything of the call is written.
    def check_scale(self) -> None:
        pass

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

    def stats_and_norm(self) -> tuple[Tensor, Tensor]:
        """The table of :meth:`stats`, and ``total_norm(2.0)`` to its bits."""
        table, partial = self.stats()
        return table, root(partial, 2.0)

    def clip_with_norm_(self, max_norm: float, total_norm: Tensor) -> None:
        if not torch.compiler.is_compiling() and max_norm == math.inf:
            return torch.autograd.graph.increment_version(self.tensors)  # no norm reaches it
        with torch.no_grad():
            self.scale_(clip_coef(total_norm.to(wide_dtype(total_norm.device)), max_norm))

    def norm_of(self, clip: Clip, total_norm: Tensor | None = None) -> Tensor:
        """The wide norm that is asked for, of the gradients' if that is known; writes ``found_inf``, and what is to be
        sanitized.
        """
        if clip.nonfinite == SANITIZE:
            self.sanitize_()
            total_norm = None
        if total_norm is None:
            total_norm = self.total_norm(clip.norm_type)
        if clip.inv_scale is not None:
            total_norm = scaled_norm(total_norm, clip.norm_type, clip.inv_scale)
        if clip.found_inf is not None:
            clip.found_inf.detach().copy_(~total_norm.isfinite())
        return total_norm

    def clip_by_(self, clip: Clip, total_norm: Tensor) -> None:
        """Clips by the norm that :meth:`norm_of` gave."""
        if clip.inv_scale is None and clip.nonfinite != ZERO:
            return self.clip_with_norm_(clip.max_norm, total_norm)
        with torch.no_grad():
            wide = total_norm.to(wide_dtype(total_norm.device))
            zero = clip.nonfinite == ZERO
            self.scale_(clip_factor(wide, clip.max_norm, clip.inv_scale, zero), zero)

    def clip_grad_norm_(self, clip: Clip, norm_dtype: torch.dtype | None) -> Tensor:
        total_norm = self.norm_of(clip)
        self.clip_by_(clip, total_norm)
        return self.finish(total_norm, norm_dtype)

    def clip_grad_value_(self, low: float, high: float) -> None:
        self.check_clamp(low, high)
        self.clamp_(low, high)

    def clip_scaled_value_(self, clip: Clip, low: float, high: float) -> None:
        """The same after what ``clip``, of the infinite norm and an infinite bound, asks for."""
        self.check_clamp(low, high)
        if clip.inv_scale is not None and clip.nonfinite == PROPAGATE and clip.found_inf is None:
            near = self.tensors[0].device if self.tensors else torch.device("cpu")
            self.scale_(as_number(clip.inv_scale, near))
        else:
            self.clip_by_(clip, self.norm_of(clip))
        self.clamp_(low, high)

    def check_finite(self, total_norm: Tensor, norm_type: float) -> None:
        if not math.isfinite(total_norm.item()):  # the one wait that is asked for
            raise RuntimeError(
                f"The total norm of order {norm_type} for gradients from "
                "`parameters` is non-finite, so it cannot be clipped. To disable "
                "this error and scale the gradients by the non-finite norm anyway, "
                "set `error_if_nonfinite=False`"
            )

    def returned_norm(self, norm_type: float, norm_dtype: torch.dtype | None) -> Tensor:
        return self.finish(self.total_norm(norm_type), norm_dtype)

    def finish(self, total_norm: Tensor, norm_dtype: torch.dtype | None) -> Tensor:
        """The norm as it is returned."""
        return total_norm.to(norm_dtype or self.dtype)


class Nothing(Gradients):
    """No gradients at all."""

    def total_norm(self, norm_type: float) -> Tensor:
        return torch.tensor(0.0)

    def norms(self, norm_type: float) -> Tensor:
        return torch.zeros(0)

    def stats(self) -> tuple[Tensor, Tensor]:
        return torch.zeros(0, 4), torch.tensor(0.0)

    def scale_(self, clip_coef: Tensor, zero: bool = False) -> None:
        pass

    def scale_each_(self, coefs: Tensor) -> None:
        pass

    def sanitize_(self) -> None:
        pass

    def clip_with_norm_(self, max_norm: float, total_norm: Tensor) -> None:
        pass

    def clip_grad_value_(self, low: float, high: float) -> None:
        pass

    def clip_scaled_value_(self, clip: Clip, low: float, high: float) -> None:
        if clip.found_inf is not None:
            clip.found_inf.detach().zero_()

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

    @torch.no_grad()
    def norms(self, norm_type: float) -> Tensor:
        return torch.stack([torch.linalg.vector_norm(tensor, norm_type) for tensor in self.tensors])

    def stats_and_norm(self) -> tuple[Tensor, Tensor]:
        return eager.tensor_stats(list(self.tensors)), self.total_norm(2.0)

    @torch.no_grad()
    def scale_(self, clip_coef: Tensor, zero: bool = False) -> None:
        for tensor in self.tensors:
            tensor.mul_(clip_coef.to(tensor.device))

    @torch.no_grad()
    def scale_each_(self, coefs: Tensor) -> None:
        for tensor, coef in zip(self.tensors, coefs.unbind(), strict=True):
            tensor.mul_(coef.to(tensor.device))

    def check_clamp(self, low: float, high: float) -> None:
        super().check_clamp(low, high)
        eager.check_clamp(list(self.tensors), low, high)

    @torch.no_grad()
    def clamp_(self, low: float, high: float) -> None:
        for tensor in self.tensors:
            tensor.clamp_(low, high)

    def norm_of(self, clip: Clip, total_norm: Tensor | None = None) -> Tensor:
        self._check_plain(clip)
        return self.total_norm(clip.norm_type) if total_norm is None else total_norm

    def clip_with_norm_(self, max_norm: float, total_norm: Tensor) -> None:
        _torch_clip_grads_with_norm_(self.parameters, max_norm, total_norm, self.foreach)

    def clip_grad_value_(self, low: float, high: float) -> None:
        _torch_clip_grad_value_(self.parameters, high, self.foreach)

    def clip_scaled_value_(self, clip: Clip, low: float, high: float) -> None:
        self._check_plain(clip)

    def _check_plain(self, clip: Clip) -> None:
        if clip[2:] != (PROPAGATE, None, None):
            odd = next((type(t) for t in self.tensors if type(t) not in PLAIN), Tensor)
            what = "nonfinite='zero' or 'sanitize', found_inf, inv_scale"
            raise TypeError(f"{what}: not supported for gradients of type {odd.__name__}, which torch's functions clip")

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
