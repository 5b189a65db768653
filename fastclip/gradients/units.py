"""The units of tensors, such as the rows of a weight, each with a norm and a coefficient of its own.

Units that are runs of memory go through the engines as if each were a tensor; all others, and tensors that no compiled
engine takes, through torch's ops.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from .. import _dispatch, _ops
from ..arithmetic import wide_dtype
from . import parts, reading
from .plain import Plain


class Units(Plain):
    """What csrc/reader.cpp could view: norms and coefficients are those of all units, tensor after tensor."""

    def __init__(self, backend: ModuleType, views: object, device: int, tensors: list[Tensor], count: int) -> None:
        super().__init__(backend, views, tensors, device, 0)
        self._count = count

    @staticmethod
    def read(tensors: list[Tensor], kept: list[int], writes: bool) -> tuple[object, int, int] | None:
        """Their views, how many, and the index of the GPU or -1, by the dimensions that number the units, as bits."""
        if _ops.units is None:
            return None
        with torch._C.DisableTorchFunction():  # under a DeviceContext each look at a tensor would go through Python
            return _ops.units(tensors, kept, writes and not torch.is_inference_mode_enabled())

    def clipped_sums(self, max_norm: float, per_layer: bool) -> tuple[list[Tensor], Tensor] | None:
        """Of units that are the examples of each tensor: their sums, each clipped, and their norms, of all tensors or
        of each; None where the engine has no pass for it.
        """
        batch = len(self.tensors[0])
        if not hasattr(self._engine, "clipped_sums") or batch == 0:
            return None
        sums = [torch.empty_like(tensor[0]) for tensor in self.tensors]
        norms = torch.empty(self._count if per_layer else batch, dtype=torch.float64)
        into = Units.read(sums, [0] * len(sums), writes=False)
        if into is None:
            return None
        self._engine.clipped_sums(self._views, into[0], max_norm, per_layer, norms)
        return sums, norms.reshape(len(sums) if per_layer else 1, -1)


class TorchUnits:
    """The same in torch's ops, which know every layout, dtype and subclass."""

    def __init__(self, tensors: Sequence[Tensor], dims: Sequence[tuple[int, ...]]) -> None:
        self.tensors, self._dims = tensors, dims

    @torch.no_grad()
    def norms(self, norm_type: float) -> Tensor:
        return torch.cat([_norms(*each, norm_type).reshape(-1) for each in zip(self.tensors, self._dims, strict=True)])

    @torch.no_grad()
    def scale_each_(self, coefs: Tensor) -> None:
        shapes = [kept_shape(*each) for each in zip(self.tensors, self._dims, strict=True)]
        for tensor, shape, each in zip(
            self.tensors, shapes, coefs.split([shape.numel() for shape in shapes]), strict=True
        ):
            wide = tensor.dtype in (torch.float64, torch.complex128)
            tensor.mul_(each.to(tensor.device, torch.float64 if wide else torch.float32).reshape(shape))


def kept_shape(tensor: Tensor, dims: tuple[int, ...]) -> torch.Size:
    """The shape of the norms over some dimensions, which are kept with size 1."""
    return torch.Size(1 if d in dims else size for d, size in enumerate(tensor.shape))


def of(tensors: Sequence[Tensor], dims: Sequence[tuple[int, ...]], writes: bool) -> list[Units | TorchUnits]:
    """Reads tensors, checked if they are to be written, with the dimensions that a unit of each has."""
    tensors, dims = list(tensors), list(dims)
    if (found := _compiled(tensors, dims, writes)) is not None:
        return [found]
    parts.check(tensors, writes)
    return [_compiled([t], [d], writes) or TorchUnits([t], [d]) for t, d in zip(tensors, dims, strict=True)]


def _compiled(tensors: list[Tensor], dims: list[tuple[int, ...]], writes: bool) -> Units | None:
    if reading.is_watched():
        return None
    kept = [_all_but(tensor.dim(), reduced) for tensor, reduced in zip(tensors, dims, strict=True)]
    found = Units.read(tensors, kept, writes)
    if found is None:
        return None
    views, count, device = found
    cpu, cuda = _dispatch.compiled()
    backend = cuda if device >= 0 else cpu
    if backend is None or backend.unsupported(device) is not None:
        return None
    return Units(backend, views, device, tensors, count)


@functools.cache
def _all_but(dim: int, reduced: tuple[int, ...]) -> int:
    """The dimensions that are not reduced, as bits."""
    return sum(1 << d for d in range(dim) if d not in reduced)


def _norms(tensor: Tensor, dims: tuple[int, ...], norm_type: float) -> Tensor:
    """Over some dimensions, wide; of no elements 0."""
    shape = kept_shape(tensor, dims)
    wide = wide_dtype(tensor.device)
    if tensor.numel() == 0 or not dims:
        return tensor.new_zeros(shape, dtype=wide) if tensor.numel() == 0 else tensor.abs().to(wide)
    dtype = wide.to_complex() if tensor.is_complex() else wide
    return torch.linalg.vector_norm(tensor, norm_type, dim=dims, keepdim=True, dtype=dtype)
