"""Gradients that are spread over ranks: DTensors become local shards, local partials become reduced ones.

Which collectives run, and in which order, follows from the meshes and placements of the parameters, which are the same
on every rank: one whose shards are empty, or that has fewer gradients or none, takes part in all of them.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import _ops

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


class Route(NamedTuple):
    """How a partial of this rank becomes one of all ranks: summed over each group, one after the other."""

    groups: tuple[ProcessGroup, ...]
    # Where a single sum over the world may take the place of the groups, replicas have to be left out of it.
    spans_world: bool = False
    is_replica: bool = False


class Shards(NamedTuple):
    """What is reduced by one route: one local tensor for each parameter, None where this rank has nothing to count."""

    route: Route
    tensors: list[Tensor | None]
    mesh: DeviceMesh | None
    like: Tensor  # a local tensor of the kind, even where there is no gradient


class Spread(NamedTuple):
    """The gradients of a call: by route, to be counted, and as one list of this rank, to be written."""

    shards: list[Shards]
    local: list[Tensor]

    @property
    def dtype(self) -> torch.dtype:
        tensors = self.local or [each.like for each in self.shards]
        return _ops.promoted_dtype(tensors) if tensors else torch.get_default_dtype()


def _dtensor() -> type[Tensor] | None:
    # Who has not imported the module has no DTensors, and its import takes long.
    # What a compiler traces is torch's to trace.
    module = None if torch.compiler.is_compiling() else sys.modules.get("torch.distributed.tensor")
    return getattr(module, "DTensor", None)


def dtensor_in(tensors: Iterable[Tensor]) -> bool:
    dtensor = _dtensor()
    return dtensor is not None and dtensor in map(type, tensors)


def local(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The shards of this rank, which alias the DTensors; other tensors as they are."""
    dtensor = _dtensor()
    if dtensor is None:
        return list(tensors)
    # `to_local()` takes ten times as long as the attribute.
    shards = [t._local_tensor if type(t) is dtensor else t for t in tensors]
    return (
        [_wait(t) for t in shards] if any(hasattr(kind, "trigger_wait") for kind in set(map(type, shards))) else shards
    )


def _wait(tensor: Tensor) -> Tensor:
    # A functional collective may still be filling it.
    return tensor.trigger_wait() if hasattr(tensor, "trigger_wait") else tensor


def partial_placement_in(tensors: Sequence[Tensor]) -> bool:
    dtensor, placements = _dtensor(), None
    for tensor in tensors if dtensor else ():
        if type(tensor) is dtensor and tensor._spec.placements != placements:
            placements = tensor._spec.placements
            if any(p.is_partial() for p in placements):
                return True
    return False


def spread(
    parameters: Sequence[Tensor],
    grads: Sequence[Tensor],
    local_grads: list[Tensor],
    is_duplicate: Callable[[Tensor], bool] | None = None,
) -> Spread:
    """Sorts gradients by the groups over which their partials have to be reduced.

    Args:
        parameters: they stand for the gradients that this rank does not have.
        grads: those that exist; one with Partial placements is reduced here first, in a collective.
        local_grads: their shards.
        is_duplicate: tells which parameters other ranks count.
    """
    locals_ = iter(local_grads)
    if len(grads) < len(parameters):
        grads = [p.grad for p in parameters]
    dtensor = _dtensor()
    found: dict[tuple[DeviceMesh | None, tuple[int, ...]], Shards] = {}
    mesh = placements = shards = None
    has_partial = False
    for parameter, grad in zip(parameters, grads, strict=True):
        owner, shard = (parameter, None) if grad is None else (grad, next(locals_))
        if type(owner) is dtensor:
            spec = owner._spec
            # Neighbours in the list are mostly alike, and comparing is cheaper than hashing.
            if spec.mesh is not mesh or spec.placements != placements:
                mesh, placements = spec.mesh, spec.placements
                has_partial = any(p.is_partial() for p in placements)
                sharded = tuple(d for d, p in enumerate(placements) if not (p.is_replicate() or p.is_partial()))
                if (mesh, sharded) not in found:
                    found[mesh, sharded] = Shards(_route(mesh, sharded), [], mesh, _wait(owner._local_tensor))
                shards = found[mesh, sharded]
            if has_partial and grad is not None:
                shard = _wait(_reduce_partial(grad)._local_tensor)
        elif mesh is not None or shards is None:
            mesh = placements = None
            shards = found.setdefault((None, ()), Shards(Route(()), [], None, owner))
        shards.tensors.append(None if is_duplicate is not None and is_duplicate(parameter) else shard)
    return Spread(list(found.values()), local_grads)


@torch.no_grad()
def _reduce_partial(tensor: Tensor) -> Tensor:
    from torch.distributed.tensor import Replicate

    return tensor.redistribute(placements=[Replicate() if p.is_partial() else p for p in tensor.placements])


def _route(mesh: DeviceMesh, sharded: tuple[int, ...]) -> Route:
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise RuntimeError(f"parameters: rank {dist.get_rank()} is not part of {mesh}, so it has no shard to clip")
    return Route(
        tuple(mesh.get_group(d) for d in sharded if mesh.size(d) > 1),
        mesh.size() == dist.get_world_size(),
        any(coordinate[d] for d in range(mesh.ndim) if d not in sharded),
    )


def reduce(partials: Sequence[Tensor], routes: Sequence[Route], norm_type: float) -> list[Tensor]:
    """Reduces 1-d partials over the groups of their routes; one collective serves all partials that need the group."""
    partials, groups = list(partials), [route.groups for route in routes]
    reduced = [route for route in routes if route.groups]
    if len({group for route in reduced for group in route.groups}) > 1 and all(r.spans_world for r in reduced):
        # Several collectives become one, in which each replica but the first counts for nothing.
        nothing = math.inf if norm_type == -math.inf else 0.0
        for i, route in enumerate(routes):
            if route.groups:
                groups[i] = (dist.group.WORLD,)
                if route.is_replica:
                    partials[i] = torch.full_like(partials[i], nothing)
    for group in dict.fromkeys(group for each in groups for group in each):
        chosen = [i for i, each in enumerate(groups) if group in each]
        total = all_reduce(torch.cat([partials[i] for i in chosen]), norm_type, group)
        for i, partial in zip(chosen, total.split([partials[i].numel() for i in chosen]), strict=True):
            partials[i] = partial
    return partials


def all_reduce(partials: Tensor, norm_type: float, group: ProcessGroup) -> Tensor:
    """Sums partials over a group; takes their maximum or minimum for the infinite orders. NaN stays NaN."""
    home = partials.device
    partials = partials.to(_transport_device(home, group))
    if not math.isinf(norm_type):
        dist.all_reduce(partials, group=group)
        return partials.to(home)
    # MAX and MIN of floats may drop NaN. The bits of magnitudes, as integers, are ordered as the magnitudes are.
    bits = partials.abs().view(torch.int64 if partials.dtype == torch.float64 else torch.int32)
    if norm_type > 0:
        dist.all_reduce(bits, dist.ReduceOp.MAX, group)  # above infinity is NaN
        return bits.view(partials.dtype).to(home)
    bits = torch.where(partials.isnan(), -1, bits)
    dist.all_reduce(bits, dist.ReduceOp.MIN, group)
    return torch.where(bits < 0, math.nan, bits.view(partials.dtype)).to(home)


def _transport_device(device: torch.device, group: ProcessGroup) -> torch.device:
    """Where the group can reduce a tensor of this device: there, or else on the group's own device."""
    config = dist.get_backend_config(group)
    devices = [entry.partition(":")[0] for entry in config.split(",")]
    if device.type in devices:
        return device
    if (accelerator := torch.accelerator.current_accelerator()) is not None and accelerator.type in devices:
        return torch.device(accelerator.type, torch.accelerator.current_device_index())
    raise RuntimeError(
        f"process group: {config!r} cannot reduce a tensor on {device}; initialise it with a backend for that device, "
        f"as in init_process_group('{device.type}:gloo,...')"
    )


def as_groups(process_group: ProcessGroup | Iterable[ProcessGroup] | None) -> list[ProcessGroup]:
    if process_group is None:
        return []
    groups = list(process_group) if isinstance(process_group, Iterable) else [process_group]
    for group in groups:
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(f"process_group: expected a ProcessGroup of this rank, or several, got {group!r}")
    return groups


def replicate(total_norm: Tensor, spread: Spread) -> Tensor:
    """The norm as a DTensor where torch returns one: where all gradients are DTensors on one mesh."""
    with_grads = [each for each in spread.shards if any(t is not None for t in each.tensors)] or spread.shards
    meshes = {each.mesh for each in with_grads}
    if len(meshes) != 1 or None in meshes:
        return total_norm
    from torch.distributed.tensor import DTensor, Replicate

    (mesh,) = meshes
    return DTensor.from_local(total_norm, mesh, [Replicate()] * mesh.ndim, run_check=False)


def full(total_norm: Tensor) -> Tensor:
    """A norm as a plain tensor, reduced if it was not yet."""
    if not dtensor_in([total_norm]):
        return total_norm
    replicated = all(p.is_replicate() for p in total_norm.placements)
    return total_norm._local_tensor if replicated else total_norm.full_tensor()
