"""The units of tensors, such as the rows of a weight, each with a norm and a coefficient of its own.

Units that are runs of memory go through the engines as if each were a tensor; all others, and tensors that no compiled
engine takes, through torch's ops. Of DTensors each rank passes over its own part of the units.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import _dispatch, _ops, distributed
from ..arithmetic import each_coef, nothing, wide_dtype
from ..backends import eager
from ..distributed import Route
from . import parts, reading, sharded
from .contract import Each
from .plain import Plain

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor, Placement


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
        norms = torch.empty(self._count if per_layer else batch, dtype=torch.float64, device=self._device)
        into = Units.read(sums, [0] * len(sums), writes=False)
        if into is None:
            return None
        if not self._engine.clipped_sums(self._views, into[0], max_norm, per_layer, norms):
            return None  # its float32 loops cannot hold a coefficient
        return sums, norms.reshape(len(sums) if per_layer else 1, -1)


class TorchUnits(Each):
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
            eager.multiply_(tensor, eager.factors_of(each.to(tensor.device, wide_dtype(tensor.device)).reshape(shape)))


class ShardedUnits(Each):
    """The units of a DTensor, of which this rank has those, or the parts of those, that are in its shard.

    A unit whose parts are on several ranks has its norm reduced over them, in one collective for each such tensor.
    """

    def __init__(self, tensor: DTensor, dims: tuple[int, ...], writes: bool) -> None:
        self._tensor, self._dims = tensor, dims
        self._local = _of_plain(sharded.local_tensor(tensor), dims, writes)

    def norms(self, norm_type: float) -> Tensor:
        """Those of the units in the shard."""
        tensor, local = self._tensor, self._local
        if any(placement.is_partial() for placement in tensor.placements):
            tensor = sharded.reduce_partial(tensor)
            local = _of_plain(sharded.local_tensor(tensor), self._dims, False)
        norms = local.norms(norm_type)
        mesh = tensor.device_mesh
        over = [d for d, p in enumerate(tensor.placements) if _dim(p) in self._dims]
        groups = tuple(mesh.get_group(d) for d in over if mesh.size(d) > 1)
        if not groups:
            return norms
        if sharded.local_tensor(tensor).numel() == 0:
            norms = torch.full_like(norms, nothing(norm_type))
        partials = sharded.partials_of(norms, norm_type)
        return sharded.norms_of(distributed.reduce([partials], [Route(groups)], norm_type)[0], norm_type)

    def scale_each_(self, coefs: Tensor) -> None:
        self._local.scale_each_(coefs)

    def shaped(self, norms: Tensor) -> Tensor:
        """The norms of all units, a DTensor that is sharded as they are."""
        from torch.distributed.tensor import DTensor, Replicate

        tensor, shape = self._tensor, kept_shape(self._tensor, self._dims)
        kept = [Replicate() if (d := _dim(p)) is None or d in self._dims else p for p in tensor.placements]
        local = norms.reshape(kept_shape(sharded.local_tensor(tensor), self._dims))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(local, tensor.device_mesh, kept, run_check=False, shape=shape, stride=stride)


def _dim(placement: Placement) -> int | None:
    """The dimension that a placement shards; None if it shards none."""
    return getattr(placement, "dim", None)


def kept_shape(tensor: Tensor, dims: tuple[int, ...]) -> torch.Size:
    """The shape of the norms over some dimensions, which are kept with size 1."""
    return torch.Size(1 if d in dims else size for d, size in enumerate(tensor.shape))


def shaped(
    tensors: Sequence[Tensor],
    dims: Sequence[tuple[int, ...]],
    read: Sequence[Units | TorchUnits | ShardedUnits],
    norms: Sequence[Tensor],
) -> list[Tensor]:
    """For each tensor its norms, with the dimensions that they run over, of size 1, from those of what was read."""
    shapes = [kept_shape(*each) for each in zip(tensors, dims, strict=True)]
    if len(read) < len(tensors):
        norms = norms[0].split([shape.numel() for shape in shapes])
        return [norm.reshape(shape) for norm, shape in zip(norms, shapes, strict=True)]
    return [
        each.shaped(norm) if isinstance(each, ShardedUnits) else norm.reshape(shape)
        for each, norm, shape in zip(read, norms, shapes, strict=True)
    ]


def of(
    tensors: Sequence[Tensor], dims: Sequence[tuple[int, ...]], writes: bool
) -> list[Units | TorchUnits | ShardedUnits]:
    """Reads tensors, checked if they are to be written, with the dimensions that a unit of each has."""
    tensors, dims = list(tensors), list(dims)
    if (found := _compiled(tensors, dims, writes)) is not None:
        return [found]
    parts.check([sharded.local_tensor(tensor) for tensor in tensors], writes)
    dtensor = distributed.dtensor_type()
    return [
        ShardedUnits(t, d, writes) if dtensor is not None and type(t) is dtensor else _of_plain(t, d, writes)
        for t, d in zip(tensors, dims, strict=True)
    ]


def clip_each_(
    read: Sequence[Units | TorchUnits | ShardedUnits], norm_type: float, bounds: Sequence[Tensor | float], least: float
) -> list[Tensor]:
    """Clips all that was read, each with its bounds; every norm, which is returned, is that before any write."""
    if len(read) == 1:
        return [read[0].clip_each_(norm_type, bounds[0], least=least)]
    norms = [each.norms(norm_type) for each in read]
    for each, norm, bound in zip(read, norms, bounds, strict=True):
        each.scale_each_(each_coef(norm, bound, least))
    return norms


def _of_plain(tensor: Tensor, dims: tuple[int, ...], writes: bool) -> Units | TorchUnits:
    return _compiled([tensor], [dims], writes) or TorchUnits([tensor], [dims])


def _compiled(tensors: list[Tensor], dims: list[tuple[int, ...]], writes: bool) -> Units | None:
    if reading.is_watched():
        return None
    kept = [_all_but(tensor.dim(), reduced) for tensor, reduced in zip(tensors, dims, strict=True)]
    if max(kept) >> 63:
        return None  # a 64th dimension has no bit
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
    if tensor.numel() == 0:
        return tensor.new_zeros(shape, dtype=wide)
    if not dims:
        return (tensor != 0).to(wide) if norm_type == 0 else tensor.abs().to(wide)
    if norm_type == 0:  # of one tensor, which counts once
        return (eager.wide_norm(tensor, math.inf, dims) != 0).to(wide)
    return eager.wide_norm(tensor, norm_type, dims)
