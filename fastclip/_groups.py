"""Which tensors can go together in one call of a backend, and the reason when one cannot."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from . import _dispatch

_PLAIN = {Tensor, torch.nn.Parameter}
# What a trace puts in the place of a plain tensor.
_TRACED = {FakeTensor, FunctionalTensor}


class Part(NamedTuple):
    """Tensors that one backend takes in one call."""

    backend: ModuleType
    tensors: list[Tensor]
    reason: str


class Group(NamedTuple):
    """A line of :func:`fastclip.why`."""

    backend: str
    device: str
    dtypes: tuple[str, ...]
    count: int
    reason: str

    def __str__(self) -> str:
        return f"{self.backend}: {self.count} x {'/'.join(self.dtypes)} on {self.device} ({self.reason})"


def describe(backend: ModuleType, tensors: Sequence[Tensor], reason: str) -> Group:
    dtypes = tuple(sorted({str(t.dtype).removeprefix("torch.") for t in tensors}))
    return Group(backend.NAME, str(tensors[0].device), dtypes, len(tensors), reason)


def all_plain(tensors: Sequence[Tensor]) -> bool:
    return _PLAIN.issuperset(map(type, tensors))


def odd_type(tensors: Sequence[Tensor]) -> type | None:
    """The first type that is neither torch's own tensor nor a trace of one."""
    odd = (type(t) for t in tensors if type(t) not in _PLAIN and type(t) not in _TRACED)
    return next(odd, None)


def split(tensors: Sequence[Tensor]) -> list[Part]:
    """Groups tensors by backend and device, keeping their order inside each group.

    Raises:
        ValueError: a backend is forced and refuses a tensor.
    """
    parts: dict[tuple[str, torch.device], Part] = {}
    candidates = _dispatch.candidates()
    for i, tensor in enumerate(tensors):
        refusals = []
        for backend in candidates:
            refusal = backend.refuses(tensor)
            if refusal is None:
                break
            refusals.append(f"{backend.NAME}: {refusal}")
        else:
            raise ValueError(f"use_backend({backend.NAME!r}): gradient {i} cannot be taken: {refusal}")
        key = (backend.NAME, tensor.device)
        if key not in parts:
            parts[key] = Part(backend, [], "; ".join(refusals) or "first choice")
        parts[key].tensors.append(tensor)
    return list(parts.values())


def check_writable(tensors: Sequence[Tensor]) -> None:
    """Raises torch's errors for tensors that cannot be written in place, before any other is written."""
    if torch.compiler.is_compiling():
        return  # strides may be symbols; the kernels look for themselves when the graph runs
    for i, tensor in enumerate(tensors):
        if not (tensor.is_floating_point() or tensor.is_complex()):
            raise RuntimeError(f"gradient {i}: expected a floating-point or complex dtype, got {tensor.dtype}")
        if tensor.is_inference() and not torch.is_inference_mode_enabled():
            raise RuntimeError("Inplace update to inference tensor outside InferenceMode is not allowed.")
        if tensor.layout == torch.strided and any(
            size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        ):
            raise RuntimeError(
                "unsupported operation: more than one element of the written-to tensor refers to a single memory "
                "location. Please clone() the tensor before performing the operation."
            )
