"""What a call clips, and who passes over it: the only place that chooses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from .. import _dispatch, distributed
from ..backends import eager
from ..distributed import ProcessGroup
from . import parts, reading
from .contract import PROPAGATE, SANITIZE, ZERO, Clip, Foreign, Gradients, Group, Nothing
from .parts import of_tensors
from .plain import Plain
from .sharded import Routed, Sharded, reduced_norm

__all__ = [
    "PROPAGATE",
    "SANITIZE",
    "ZERO",
    "Clip",
    "Foreign",
    "Gradients",
    "Group",
    "Nothing",
    "Plain",
    "Routed",
    "is_known",
    "is_plain",
    "of",
    "of_tensors",
    "reduced_norm",
]


def of(
    parameters: Sequence[Tensor],
    foreach: bool | None = None,
    process_group: ProcessGroup | Iterable[ProcessGroup] | None = None,
    is_duplicate: Callable[[Tensor], bool] | None = None,
    *,
    gradients: bool = True,
    writes: bool = True,
    symmetric: bool = True,
) -> Gradients:
    """Reads a list, once, and checks it if it is to be written.

    Args:
        parameters: whose gradients are meant; with ``gradients=False`` they are meant themselves.
        foreach, process_group, is_duplicate: as in :func:`fastclip.clip_grad_norm_`.
        gradients: whether the list is of parameters.
        writes: whether the list will be written.
        symmetric: whether what happens to ``-x`` is the negative of what happens to ``x``.
    """
    # What may run the caller's code comes before the addresses are taken.
    groups = distributed.as_groups(process_group)
    skip = None if is_duplicate is None else [is_duplicate(parameter) for parameter in parameters]
    asked = process_group is not None or is_duplicate is not None
    found = reading.read(parameters, gradients, writes)
    if found is None:
        return _foreign(parameters, gradients, foreach, writes, asked)
    sections, shares = found
    if asked or shares:
        again = reading.read(parameters, gradients, False, skip) if skip else found
        assert again is not None, "a list is of the same types when it is read again"
        counted, shares = again
        return Sharded(sections, counted, shares, groups, foreach=foreach, writes=writes, symmetric=symmetric)
    return parts.of_sections(sections, foreach, writes, symmetric) if sections else Nothing()


def is_known(tensor: Tensor) -> bool:
    """Whether a tensor is torch's own, or what a trace puts in its place."""
    return type(tensor) in reading.KNOWN


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is torch's own, or a DTensor: what clips are computed of here, and not by torch's functions."""
    return type(tensor) in reading.KNOWN or type(tensor) is distributed.dtensor_type()


def _foreign(parameters: Sequence[Tensor], gradients: bool, foreach: bool | None, writes: bool, asked: bool) -> Foreign:
    tensors = [grad for p in parameters if (grad := p.grad) is not None] if gradients else list(parameters)
    unknown = [type(t) for t in tensors if not is_known(t) and type(t) is not distributed.dtensor_type()]
    unknown += [type(t) for t in tensors if not is_known(t)]
    if not unknown:
        return Foreign(parameters, tensors, foreach, "torch.jit traces: torch's own functions take the whole list")
    odd = unknown[0]
    if asked:
        raise TypeError(f"process_group, is_duplicate: not supported for gradients of type {odd.__name__}")
    if issubclass(odd, Tensor) and (forced := _dispatch.forced()) not in (None, eager):
        raise ValueError(f"use_backend({forced.NAME!r}): it cannot take a {odd.__name__}, a tensor subclass")
    parts.check([t for t in tensors if is_known(t)], writes)
    return Foreign(parameters, tensors, foreach, f"{odd.__name__}: torch's own functions take the whole list")
