"""Tensors of several backends or devices, and those that are passed over by torch's ops: checked before any write."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch.utils._foreach_utils import _device_has_foreach_support

from .. import _dispatch
from ..arithmetic import combine, is_power, nothing, wide_dtype
from ..backends import eager, triton_
from . import reading
from .contract import PLAIN, Clip, Gradients, Group, describe
from .plain import DTYPES, Plain


class Part(Gradients):
    """Tensors that one backend takes in one call, by ops, which who watches can see."""

    tensors: list[Tensor]

    def __init__(self, backend: ModuleType, tensors: list[Tensor], reason: str) -> None:
        self.backend, self.tensors, self.reason = backend, tensors, reason

    def groups(self) -> Iterator[Group]:
        yield describe(self.backend.NAME, self.tensors, self.reason)

    def norm_partial(self, norm_type: float) -> Tensor:
        if is_power(norm_type):
            return self.backend.total_norm(self.tensors, norm_type)
        return self.backend.norm_partial(self.tensors, norm_type)

    def total_norm(self, norm_type: float) -> Tensor:
        if self._launches_alone():
            return triton_.total_norm(self.tensors, norm_type)
        return super().total_norm(norm_type)

    def clip_with_norm_(self, max_norm: float, total_norm: Tensor) -> None:
        if self._launches_alone() and max_norm != math.inf and triton_.takes_number(total_norm, self.tensors[0].device):
            self.scale_(triton_.clip_coef(total_norm.detach(), max_norm))
        else:
            super().clip_with_norm_(max_norm, total_norm)

    def _launches_alone(self) -> bool:
        """Whether kernels do what would be small ops of torch's, which nobody waits to see."""
        return not reading.is_watched() and self.backend is triton_

    def norms(self, norm_type: float) -> Tensor:
        return self.backend.tensor_norms(self.tensors, norm_type)

    def stats(self) -> tuple[Tensor, Tensor]:
        # A second read: the sums of tensors do not add up to the bits of the sum of all chunks.
        return self.backend.tensor_stats(self.tensors), self.backend.norm_partial(self.tensors, 2.0)

    def check_scale(self) -> None:
        if self.backend is eager:
            eager.check_scale(self.tensors)

    def scale_(self, clip_coef: Tensor, zero: bool = False) -> None:
        self.check_scale()
        self.backend.scale_(self.tensors, clip_coef.to(self.tensors[0].device), zero=zero)

    def sanitize_(self) -> None:
        self.check_scale()
        self.backend.sanitize_(self.tensors)

    def scale_each_(self, coefs: Tensor) -> None:
        self.check_scale()
        device = self.tensors[0].device
        self.backend.scale_each_(self.tensors, coefs.to(device, wide_dtype(device)).contiguous())

    def check_clamp(self, low: float, high: float) -> None:
        if torch.compiler.is_compiling():
            return  # it may not know the numbers
        super().check_clamp(low, high)
        if self.backend is eager:
            eager.check_clamp(self.tensors, low, high)

    def clamp_(self, low: float, high: float) -> None:
        backend = eager if torch.compiler.is_compiling() else self.backend
        backend.clamp_(self.tensors, low, high)

    def clip_grad_norm_(self, clip: Clip, norm_dtype: torch.dtype | None) -> Tensor:
        # What a compiler traces may be a number of which it knows no value, which the op does not take.
        if not self.backend.clip_grad_norm_ or torch.compiler.is_compiling():
            return super().clip_grad_norm_(clip, norm_dtype)
        narrow = norm_dtype not in (None, *DTYPES)
        asked = clip.at(self.tensors[0].device)
        norm = self.backend.clip_grad_norm_(self.tensors, *asked, dtype=torch.float64 if narrow else norm_dtype)
        asked.hand_back(clip.found_inf)
        return norm.to(norm_dtype) if narrow else norm


class Parts(Gradients):
    """Lists that are passed over one by one; their partials are combined on the device of the first tensor."""

    def __init__(self, members: Sequence[Gradients]) -> None:
        self.members = members
        self.tensors = [tensor for member in members for tensor in member.tensors]

    def groups(self) -> Iterator[Group]:
        for member in self.members:
            yield from member.groups()

    @property
    def dtype(self) -> torch.dtype:
        return functools.reduce(torch.promote_types, (member.dtype for member in self.members))

    def norm_partial(self, norm_type: float) -> Tensor:
        # No tensor to speak of is no term of a sum of negative powers or of a minimum.
        members = [each for each in self.members if norm_type >= 0 or each.has_elements()]
        return partial_of(members, norm_type, self.tensors[0])

    def norms(self, norm_type: float) -> Tensor:
        home = self.tensors[0].device
        return torch.cat([member.norms(norm_type).to(home, wide_dtype(home)) for member in self.members])

    def stats(self) -> tuple[Tensor, Tensor]:
        home = self.tensors[0].device
        tables, partials = zip(*(member.stats() for member in self.members), strict=True)
        wide = wide_dtype(home)
        return torch.cat([table.to(home, wide) for table in tables]), combine(
            torch.stack([partial.to(home, wide) for partial in partials]), 2.0
        )

    def check_scale(self) -> None:
        for member in self.members:
            member.check_scale()

    def scale_(self, clip_coef: Tensor, zero: bool = False) -> None:
        self.check_scale()
        for member in self.members:
            member.scale_(clip_coef, zero)

    def sanitize_(self) -> None:
        self.check_scale()
        for member in self.members:
            member.sanitize_()

    def scale_each_(self, coefs: Tensor) -> None:
        self.check_scale()
        parts = coefs.split([len(member.tensors) for member in self.members])
        for member, part in zip(self.members, parts, strict=True):
            member.scale_each_(part)

    def check_clamp(self, low: float, high: float) -> None:
        for member in self.members:
            member.check_clamp(low, high)

    def clamp_(self, low: float, high: float) -> None:
        for member in self.members:
            member.clamp_(low, high)


def partial_of(members: Sequence[Gradients], norm_type: float, like: Tensor) -> Tensor:
    """The partial of several lists, on the device of ``like``."""
    wide = wide_dtype(like.device)
    partials = [member.norm_partial(norm_type).to(like.device, wide) for member in members]
    if not partials:
        return like.new_full((), nothing(norm_type), dtype=wide)
    return partials[0] if len(partials) == 1 else combine(torch.stack(partials), norm_type)


def of_tensors(
    tensors: list[Tensor], *, foreach: bool | None = None, writes: bool = False, symmetric: bool = True
) -> Gradients:
    """Plain tensors of this process, at least one: see :func:`fastclip.gradients.of`."""
    found = reading.read(tensors, False, writes)
    if found is None or found[1]:
        kinds = sorted({type(tensor).__name__ for tensor in tensors})
        raise TypeError(f"expected plain tensors, and no torch.jit.trace around them, got {', '.join(kinds)}")
    return of_sections(found[0], foreach, writes, symmetric)


def of_sections(sections: Sequence[reading.Section], foreach: bool | None, writes: bool, symmetric: bool) -> Gradients:
    """Sections of plain tensors, at least one, as one list."""
    members = members_of(sections[0], foreach, writes, symmetric)
    for section in sections[1:]:
        members += members_of(section, foreach, writes, symmetric)
    return members[0] if len(members) == 1 else Parts(members)


def members_of(section: reading.Section, foreach: bool | None, writes: bool, symmetric: bool) -> list[Gradients]:
    """The lists of a section: one that its engine takes, or those of other backends, checked here."""
    views, tensors, device, dtypes, reason, _ = section
    refused = reading.why_refused(reason, tensors[0])
    if views is not None:
        # The reader makes views for an engine that is there.
        backend: ModuleType = _dispatch.compiled()[device >= 0]  # type: ignore[assignment]
        refused = backend.unsupported(device)
        if refused is None and (symmetric or not any(map(Tensor.is_neg, tensors))):
            return [Plain(backend, views, tensors, device, dtypes)]
    check(tensors, writes)
    check_foreach(tensors, foreach)
    return split(tensors, refused)


def split(tensors: Sequence[Tensor], refused: str | None = None) -> list[Gradients]:
    """Sorts tensors by backend and device, keeping their order inside each part.

    Args:
        tensors: plain tensors, or what a trace puts in their place.
        refused: why the reader of the compiled engines did not take them.

    Raises:
        ValueError: a backend is forced and refuses a tensor.
    """
    parts: dict[tuple[str, torch.device], Part] = {}
    candidates = _dispatch.candidates()
    for tensor in tensors:
        refusals = []
        for backend in candidates:
            read = backend.ENGINE and tensor.device.type == backend.DEVICE
            refusal = (refused if read else None) or backend.refuses(tensor)
            if refusal is None:
                break
            refusals.append(f"{backend.NAME}: {refusal}")
        else:
            what = f"a gradient of shape {tuple(tensor.shape)}"
            raise ValueError(f"use_backend({backend.NAME!r}): {what} cannot be taken: {refusal}")
        key = (backend.NAME, tensor.device)
        if key not in parts:
            parts[key] = Part(backend, [], "; ".join(refusals) or "first choice")
        parts[key].tensors.append(tensor)
    return list(parts.values())


def check(tensors: Sequence[Tensor], writes: bool) -> None:
    """Raises torch's errors for tensors that cannot be read, or written in place, before any other is written."""
    if torch.compiler.is_compiling():
        return  # strides may be symbols; the kernels look for themselves when the graph runs
    for tensor in tensors:
        _check_memory(tensor)
        if writes:
            _check_writable(tensor)


def _check_memory(tensor: Tensor) -> None:
    # A trace, a transform and other devices have tensors without memory of their own, or none that is addressed.
    if type(tensor) not in PLAIN or tensor.device.type not in ("cpu", "cuda") or tensor.layout != torch.strided:
        return
    if torch._is_functional_tensor(tensor) or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return
    if tensor.numel() > 0 and not tensor._is_zerotensor() and tensor.data_ptr() == 0:
        raise RuntimeError(f"a {tensor.dtype} gradient of shape {tuple(tensor.shape)} has no memory for its elements")


def _check_writable(tensor: Tensor) -> None:
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError("Inplace update to inference tensor outside InferenceMode is not allowed.")
    if tensor.layout != torch.strided or tensor.numel() == 0:
        return
    if tensor._is_zerotensor():
        raise RuntimeError("ZeroTensors are immutable. Please clone() the gradient before clipping it.")
    if any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        raise RuntimeError(
            "unsupported operation: more than one element of the written-to tensor refers to a single memory "
            "location. Please clone() the tensor before performing the operation."
        )


def check_foreach(tensors: Sequence[Tensor], foreach: bool | None) -> None:
    for device in {tensor.device for tensor in tensors} if foreach else ():
        if not _device_has_foreach_support(device):
            raise RuntimeError(f"foreach=True was passed, but can't use the foreach API on {device.type} tensors")
