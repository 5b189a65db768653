"""Gradients that ranks share: partials are reduced over them before the root, and writing is local.

Which collectives run, and in which order, follows from the meshes and placements of the parameters, which are the same
on every rank: one whose shards are empty, or that has fewer gradients or none, takes part in all of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .. import _ops, distributed
from ..arithmetic import combine, indices, nothing, root, wide_dtype
from ..distributed import ProcessGroup, Route
from . import parts
from .contract import Gradients, Group
from .reading import Section, Share

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


class _Known(Gradients):
    """A list whose sum of squares is known."""

    def __init__(self, member: Gradients, partial: Tensor) -> None:
        self.tensors, self._partial = member.tensors, partial

    def norm_partial(self, norm_type: float) -> Tensor:
        return self._partial


class Routed(NamedTuple):
    """What one route reduces: lists, and for order 0, which counts tensors, a slot for each parameter."""

    route: Route
    members: list[Gradients]
    slots: list[Tensor | None] | None  # local tensors; None where each counts on this rank alone


class Sharded(Gradients):
    """What this rank holds of gradients that ranks share."""

    def __init__(
        self,
        sections: Sequence[Section],
        counted: Sequence[Section],
        shares: Sequence[Share],
        groups: Sequence[ProcessGroup],
        *,
        foreach: bool | None,
        writes: bool,
        symmetric: bool,
    ) -> None:
        self._shares, self._groups = shares, groups
        self._sections = [Section(*section) for section in sections]
        read = [(section.share, parts.members_of(section, foreach, writes, symmetric)) for section in self._sections]
        self._counted = read
        if counted is not sections:
            again = [Section(*section) for section in counted]
            self._counted = [(section.share, parts.members_of(section, foreach, False, symmetric)) for section in again]
        members = [member for _, each in read for member in each]
        self._members = read
        self._local = members[0] if len(members) == 1 else parts.Parts(members) if members else None
        self.tensors = self._local.tensors if self._local else ()

    def groups(self) -> Iterator[Group]:
        return self._local.groups() if self._local else iter(())

    @property
    def dtype(self) -> torch.dtype:
        if self._local:
            return self._local.dtype
        owners = [_local(share.owner) for share in self._shares]
        return _ops.promoted_dtype(owners) if owners else torch.get_default_dtype()

    def total_norm(self, norm_type: float) -> Tensor:
        return reduced_norm(self._routed(norm_type == 0), norm_type, self._groups, self._like())

    def norms(self, norm_type: float) -> Tensor:
        """Each over all ranks that share the tensor: one vector for each route, reduced before the root."""
        wide = wide_dtype(self.tensors[0].device) if self.tensors else torch.float64
        norms = self._local.norms(norm_type) if self._local else torch.zeros(0, dtype=wide)
        return self._over_ranks(
            norms.unsqueeze(1),
            lambda members: members.norms(norm_type).unsqueeze(1),
            norm_type,
            lambda norm: partials_of(norm, norm_type),
            lambda partial: norms_of(partial, norm_type),
        ).squeeze(1)

    def stats_and_norm(self) -> tuple[Tensor, Tensor]:
        known, tables = {}, []
        for _, members in self._members:
            for member in members:
                table, partial = member.stats()
                tables.append(table)
                known[id(member)] = _Known(member, partial)
        like = self._like()
        table = torch.cat([each.to(like.device) for each in tables]) if tables else _no_rows(like)
        # What is counted as it is was just read; the sum over ranks is that of total_norm, to its bits.
        routed = [
            each._replace(members=[known.get(id(member), member) for member in each.members])
            for each in self._routed(False)
        ]
        norm = reduced_norm(routed, 2.0, self._groups, like)
        sums = self._over_ranks(table[:, [0, 2, 3]], lambda members: members.stats()[0][:, [0, 2, 3]], 1.0)
        largest = self._over_ranks(table[:, 1:2], lambda members: members.stats()[0][:, 1:2], math.inf)
        return torch.cat([sums[:, :1], largest, sums[:, 1:]], 1), norm

    def _over_ranks(
        self,
        local: Tensor,
        of: Callable[[Gradients], Tensor],
        order: float,
        partial_of: Callable[[Tensor], Tensor] = lambda value: value,
        value_of: Callable[[Tensor], Tensor] = lambda partial: partial,
    ) -> Tensor:
        """Values of :attr:`tensors`, (N, C), each over all ranks that share the tensor: one vector for each route.

        Args:
            local: the values of what this rank holds.
            of: computes them of other lists: of what Partial placements become.
            order: of the norm as whose partials they are reduced.
            partial_of, value_of: what is reduced, and the value from that.
        """
        # Where in self.tensors the gradient of each slot is, -1 where this rank has none.
        places = [self._places(i) for i in range(len(self._shares))]
        partials, columns = [], local.shape[1]
        for share, place in zip(self._shares, places, strict=True):
            held = local
            place = [k if k >= 0 and self.tensors[k].numel() > 0 else -1 for k in place]
            if _is_partial(share):
                grads = [_local(reduce_partial(grad)) for grad in share.slots if grad is not None]
                held = of(parts.of_tensors(grads)).to(local) if grads else local[:0]
                place = _enumerate(share.slots)
            padded = torch.cat([held, held.new_full((1, columns), nothing(order))])
            partials.append(partial_of(padded[indices(place, held.device)]).reshape(-1))
        routes = [distributed.route(share.mesh, _sharded_dims(share)) for share in self._shares]
        values = local.clone()
        for place, partial in zip(places, distributed.reduce(partials, routes, order), strict=True):
            value = value_of(partial).reshape(-1, columns)
            slots = [slot for slot, k in enumerate(place) if k >= 0]
            values[indices([place[slot] for slot in slots], values.device)] = value[indices(slots, values.device)]
        return values

    def _like(self) -> Tensor:
        """A tensor of the device and the dtype that numbers of this list have."""
        if self.tensors:
            return self.tensors[0]
        return _local(self._shares[0].owner) if self._shares else torch.tensor(0.0)

    def _places(self, i: int) -> list[int]:
        found: dict[int, list[int]] = {}
        shares = (share for share, members in self._members for member in members for _ in member.tensors)
        for k, (share, tensor) in enumerate(zip(shares, self.tensors, strict=True)):
            if share == i:
                found.setdefault(id(tensor), []).append(k)
        slots = [grad if grad is None else _local(grad) for grad in self._shares[i].slots]
        return [found[id(grad)].pop(0) if id(grad) in found else -1 for grad in slots]

    def scale_(self, clip_coef: Tensor, zero: bool = False) -> None:
        if self._local:
            self._local.scale_(clip_coef, zero)

    def sanitize_(self) -> None:
        if any(_is_partial(share) for share in self._shares):
            raise RuntimeError(
                "nonfinite: a gradient with Partial placements has no values yet to sanitize; redistribute it first"
            )
        if self._local:
            self._local.sanitize_()

    def scale_each_(self, coefs: Tensor) -> None:
        if self._local:
            self._local.scale_each_(coefs)

    def clip_with_norm_(self, max_norm: float, total_norm: Tensor) -> None:
        if self._local:
            self._local.clip_with_norm_(max_norm, total_norm)

    def check_clamp(self, low: float, high: float) -> None:
        if any(_is_partial(share) for share in self._shares):
            raise RuntimeError(
                "clip_value: a gradient with Partial placements has no values yet; redistribute it first"
            )
        if self._local:
            self._local.check_clamp(low, high)

    def clamp_(self, low: float, high: float) -> None:
        if self._local:
            self._local.clamp_(low, high)

    def finish(self, total_norm: Tensor, norm_dtype: torch.dtype | None) -> Tensor:
        """As a DTensor where torch returns one: where all gradients are DTensors on one mesh."""
        total_norm = total_norm.to(norm_dtype or self.dtype)
        with_grads = {section.share for section in self._sections} or range(len(self._shares))
        meshes = {self._shares[i].mesh if i >= 0 else None for i in with_grads}
        mesh = next(iter(meshes), None)
        if len(meshes) != 1 or mesh is None:
            return total_norm
        from torch.distributed.tensor import DTensor, Replicate

        return DTensor.from_local(total_norm, mesh, [Replicate()] * mesh.ndim, run_check=False)

    def _routed(self, with_slots: bool) -> list[Routed]:
        """The lists by route. A gradient with Partial placements is reduced here first, in a collective."""
        found: dict[tuple[DeviceMesh, tuple[int, ...]], Routed] = {}
        for i, share in enumerate(self._shares):
            members = [member for index, each in self._counted if index == i for member in each]
            grads = share.slots
            if _is_partial(share):
                grads = [grad if grad is None else reduce_partial(grad) for grad in grads]
                reduced = [_local(grad) for grad in grads if grad is not None]
                members = [parts.of_tensors(reduced)] if reduced else []
            key = share.mesh, _sharded_dims(share)
            if key not in found:
                found[key] = Routed(distributed.route(*key), [], [])
            found[key].members.extend(members)
            if with_slots and (slots := found[key].slots) is not None:
                slots.extend(grad if grad is None else _local(grad) for grad in grads)
        plain = [member for index, each in self._counted if index < 0 for member in each]
        return [*found.values(), Routed(Route(()), plain, None)]


def partials_of(norms: Tensor, norm_type: float) -> Tensor:
    """What ranks reduce, of norms that are each of one tensor or unit; :func:`norms_of` is the way back."""
    return norms.square() if norm_type == 2 else norms


def norms_of(partials: Tensor, norm_type: float) -> Tensor:
    """Norms, each of one tensor or unit, from their partials over all ranks."""
    if norm_type == 0:
        return (partials != 0).to(partials.dtype)
    norms = root(partials, norm_type)
    # Of no elements on any rank the norm is 0.
    return torch.where(norms == nothing(norm_type), 0.0, norms) if norm_type < 0 else norms


def reduced_norm(routed: Sequence[Routed], norm_type: float, groups: Sequence[ProcessGroup], like: Tensor) -> Tensor:
    """The wide norm, on the device of ``like``: each partial becomes the one of all its ranks before the root."""
    partials = [_partials(each, norm_type, like) for each in routed]
    partials = distributed.reduce(partials, [each.route for each in routed], norm_type)
    if norm_type == 0:
        counts = zip(partials, routed, strict=True)
        partials = [
            p.sum(0, keepdim=True) if each.slots is None else (p != 0).sum(0, keepdim=True) for p, each in counts
        ]
        partials = [partial.to(wide_dtype(like.device)) for partial in partials]
    total = combine(torch.stack(partials), norm_type)
    for group in groups:
        total = distributed.all_reduce(total, norm_type, group)
    if norm_type < 0:
        # Of no elements on any rank the norm is 0.
        return torch.where(total[1] == nothing(norm_type), 0.0, root(total[0], norm_type))
    return root(total[0], norm_type)


def _partials(routed: Routed, norm_type: float, like: Tensor) -> Tensor:
    """What a route reduces, 1-d: the partial; for negative orders also one that tells whether there are elements."""
    wide = wide_dtype(like.device)
    if norm_type == 0 and routed.slots is not None:
        one = [like.new_zeros((), dtype=wide) if t is None else _count(t).to(like.device) for t in routed.slots]
        return torch.stack(one) if one else like.new_empty(0, dtype=wide)
    members = [member for member in routed.members if norm_type >= 0 or member.has_elements()]
    partial = parts.partial_of(members, norm_type, like)
    if not norm_type < 0:
        return partial.reshape(1)
    return torch.stack([partial, like.new_full((), 1.0 if members else nothing(norm_type), dtype=wide)])


def _no_rows(like: Tensor) -> Tensor:
    return torch.zeros(0, 4, dtype=wide_dtype(like.device), device=like.device)


def _count(tensor: Tensor) -> Tensor:
    return parts.of_tensors([tensor]).norm_partial(0.0)


def _is_partial(share: Share) -> bool:
    return any(placement.is_partial() for placement in share.placements)


def _sharded_dims(share: Share) -> tuple[int, ...]:
    return tuple(d for d, p in enumerate(share.placements) if not (p.is_replicate() or p.is_partial()))


def _enumerate(slots: Sequence[Tensor | None]) -> list[int]:
    """The number of each slot among those that hold something, -1 for the others."""
    held = itertools.count()
    return [-1 if slot is None else next(held) for slot in slots]


def local_tensor(tensor: Tensor) -> Tensor:
    """The shard of this rank of a DTensor; any other tensor itself."""
    dtensor = distributed.dtensor_type()
    return _local(tensor) if dtensor is not None and type(tensor) is dtensor else tensor


def _local(tensor: DTensor) -> Tensor:
    """The shard of this rank, which aliases the DTensor; `to_local()` takes ten times as long as the attribute."""
    local = tensor._local_tensor
    return local.trigger_wait() if hasattr(local, "trigger_wait") else local


@torch.no_grad()
def reduce_partial(tensor: DTensor) -> DTensor:
    from torch.distributed.tensor import Replicate

    return tensor.redistribute(placements=[Replicate() if p.is_partial() else p for p in tensor.placements])
