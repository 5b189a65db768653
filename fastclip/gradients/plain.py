"""Plain tensors of one device, read once in C++ (csrc/reader.cpp) and passed over by its compiled engine."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import ModuleType

import torch
from torch import Tensor

from ..arithmetic import is_power
from .contract import Clip, Gradients, Group, check_bound, describe

# In the order of Dtype in csrc/clip.h.
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_CPU = torch.device("cpu")
# torch.autograd.graph.increment_version without its look at the argument.
_increment_version = torch._C._increment_version

# For each set of bits the promotion of its dtypes, and those.
_SETS = [
    (functools.reduce(torch.promote_types, found, found[0]), *found) if found else ()
    for found in ([dtype for d, dtype in enumerate(DTYPES) if bits >> d & 1] for bits in range(1 << len(DTYPES)))
]
# A new tensor like another takes half the time of one by dtype.
_NUMBERS = {dtype: torch.empty((), dtype=dtype, device=_CPU) for dtype in DTYPES}


def _empty(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty_like(_NUMBERS[dtype]) if device is _CPU else torch.empty((), dtype=dtype, device=device)


class Plain(Gradients):
    """What csrc/reader.cpp could view: no op is dispatched, and numbers stay in the memory of the device."""

    def __init__(self, backend: ModuleType, views: object, tensors: list[Tensor], device: int, dtypes: int) -> None:
        self._backend, self._engine, self._views, self.tensors = backend, backend.ENGINE, views, tensors
        self._device = _CPU if device < 0 else torch.device("cuda", device)
        self._dtypes = _SETS[dtypes]
        self._count = len(tensors)

    @property
    def dtype(self) -> torch.dtype:
        return self._dtypes[0]

    def groups(self) -> Iterator[Group]:
        yield describe(self._backend.NAME, self.tensors, "first choice")

    def norm_partial(self, norm_type: float) -> Tensor:
        if is_power(norm_type):
            return self.total_norm(norm_type)
        return self._number(self._engine.norm_partial, norm_type)

    def total_norm(self, norm_type: float) -> Tensor:
        return self._number(self._engine.total_norm, norm_type)

    def returned_norm(self, norm_type: float, norm_dtype: torch.dtype | None) -> Tensor:
        dtype = norm_dtype or self._dtypes[0]
        if dtype not in DTYPES:
            return self.finish(self.total_norm(norm_type), dtype)
        norm = _empty(dtype, self._device)
        self._engine.total_norm(self._views, norm_type, norm)
        return norm

    def norms(self, norm_type: float) -> Tensor:
        norms = torch.empty(self._count, dtype=torch.float64, device=self._device)
        self._engine.norms(self._views, norm_type, norms)
        return norms

    def stats(self) -> tuple[Tensor, Tensor]:
        table = torch.empty(self._count, 4, dtype=torch.float64, device=self._device)
        partial = _empty(torch.float64, self._device)
        self._engine.stats(self._views, table.reshape(-1), partial)
        return table, partial

    def scale_(self, clip_coef: Tensor, zero: bool = False) -> None:
        self._engine.scale_(self._views, self._near(clip_coef), zero)
        _increment_version(self.tensors)

    def sanitize_(self) -> None:
        self._engine.sanitize_(self._views)
        _increment_version(self.tensors)

    def scale_each_(self, coefs: Tensor) -> None:
        self._engine.scale_each_(self._views, coefs.detach().to(self._device, torch.float64).contiguous().resolve_neg())
        _increment_version(self.tensors)

    def clip_each_(
        self, norm_type: float, bounds: Tensor | float, divisors: Tensor | None = None, least: float = 0.0
    ) -> Tensor:
        if not hasattr(self._engine, "clip_each_"):
            return super().clip_each_(norm_type, bounds, divisors, least)
        measures = torch.empty(self._count, dtype=torch.float64, device=self._device)
        bounds = bounds.to(measures).contiguous() if isinstance(bounds, Tensor) else torch.full_like(measures, bounds)
        self._engine.clip_each_(self._views, norm_type, bounds, divisors, least, measures)
        _increment_version(self.tensors)
        return measures

    def clip_with_norm_(self, max_norm: float, total_norm: Tensor) -> None:
        self._engine.clip_with_norm_(self._views, max_norm, self._near(total_norm))
        _increment_version(self.tensors)

    def check_clamp(self, low: float, high: float) -> None:
        check_bound(self._dtypes, low, high)

    def clamp_(self, low: float, high: float) -> None:
        self._engine.clamp_(self._views, low, high)
        _increment_version(self.tensors)

    def clip_grad_norm_(self, clip: Clip, norm_dtype: torch.dtype | None) -> Tensor:
        dtype = norm_dtype or self._dtypes[0]
        norm = _empty(dtype if dtype in DTYPES else torch.float64, self._device)
        found_inf = clip.found_inf
        if found_inf is not None or clip.inv_scale is not None:
            clip = clip.at(self._device)
        self._engine.clip_grad_norm_(self._views, norm, *clip)
        _increment_version(self.tensors)
        if found_inf is not None:
            _increment_version([found_inf])
            clip.hand_back(found_inf)
        return norm if dtype in DTYPES else norm.to(dtype)

    def _number(self, compute: Callable[..., None], norm_type: float) -> Tensor:
        number = _empty(torch.float64, self._device)
        compute(self._views, norm_type, number)
        return number

    def _near(self, number: Tensor) -> Tensor:
        """A 0-dim number as the engine reads it: on its device, of one of its dtypes, with its sign in memory."""
        odd = number.is_neg() or number._is_zerotensor()
        if number.dtype in DTYPES and number.device == self._device and not odd:
            return number
        return number.detach().to(self._device, torch.float64, copy=True).resolve_neg()
