"""Routes of partials over ranks, and the collectives; they carry scalars only."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .arithmetic import combine, is_power, nothing

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor
else:
    # Absent from a torch that was built without torch.distributed.
    ProcessGroup = getattr(dist, "ProcessGroup", object)


class Route(NamedTuple):
    """How a partial of this rank becomes one of all ranks: summed over each group, one after the other."""

    groups: tuple[ProcessGroup, ...]
    # Where a single sum over the world may take the place of the groups, replicas have to be left out of it.
    spans_world: bool = False
    is_replica: bool = False


def route(mesh: DeviceMesh, sharded: tuple[int, ...]) -> Route:
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
        for i, route in enumerate(routes):
            if route.groups:
                groups[i] = (dist.group.WORLD,)  # type: ignore[assignment]  # it is there, where its parts are
                if route.is_replica:
                    partials[i] = torch.full_like(partials[i], nothing(norm_type))
    for group in dict.fromkeys(group for each in groups for group in each):
        chosen = [i for i, each in enumerate(groups) if group in each]
        total = all_reduce(torch.cat([partials[i] for i in chosen]), norm_type, group)
        for i, partial in zip(chosen, total.split([partials[i].numel() for i in chosen]), strict=True):
            partials[i] = partial
    return partials


def all_reduce(partials: Tensor, norm_type: float, group: ProcessGroup) -> Tensor:
    """Combines the partials of all ranks of a group. NaN stays NaN, which MAX and MIN of floats may drop."""
    home = partials.device
    partials = partials.to(_transport_device(home, group))
    if is_power(norm_type):
        ranks = [torch.empty_like(partials) for _ in range(group.size())]
        dist.all_gather(ranks, partials, group=group)
        return combine(torch.stack(ranks), norm_type).to(home)
    if not math.isinf(norm_type):
        dist.all_reduce(partials, group=group)
        return partials.to(home)
    # The bits of magnitudes, as integers, are ordered as the magnitudes are.
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


def dtensor_type() -> type[DTensor] | None:
    # Who has not imported the module has no DTensors, and its import takes long.
    module = sys.modules.get("torch.distributed.tensor")
    return None if module is None else getattr(module, "DTensor", None)


def full(total_norm: Tensor) -> Tensor:
    """A norm as a plain tensor, reduced if it was not yet."""
    dtensor = dtensor_type()
    if dtensor is None or type(total_norm) is not dtensor:
        return total_norm
    replicated = all(p.is_replicate() for p in total_norm.placements)
    return total_norm._local_tensor if replicated else total_norm.full_tensor()
