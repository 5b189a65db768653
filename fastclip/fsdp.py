"""``FullyShardedDataParallel.clip_grad_norm_``, the method of FSDP1, by fastclip; :func:`fastclip.patch` installs it.

FSDP2 (``fully_shard``) needs none: its gradients are DTensors, which the functions of torch.nn.utils take.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import _ops, clip, gradients
from .distributed import Route
from .gradients import Routed, reduced_norm

if TYPE_CHECKING:
    from torch.distributed.fsdp import FullyShardedDataParallel


def clip_grad_norm_(self: torch.nn.Module, max_norm: float, norm_type: float = 2.0) -> Tensor:
    """Clips the norm of all gradients of a FullyShardedDataParallel model together, in place.

    Args:
        max_norm (float): the bound, in the unit of the gradients.
        norm_type (float): p of the p-norm; ``inf`` for the largest magnitude.

    Returns:
        Tensor: 0-dim norm over all ranks, before clipping, in the promotion of the gradients' dtypes; in float32, with
        a warning, on a rank without gradients.

    Raises:
        RuntimeError: the model is not the root FSDP instance.

    Follows :meth:`torch.distributed.fsdp.FullyShardedDataParallel.clip_grad_norm_`; all ranks have to call.
    """
    from torch.distributed.fsdp._common_utils import TrainingState
    from torch.distributed.fsdp._runtime_utils import _lazy_init

    model: FullyShardedDataParallel = self  # type: ignore[assignment]  # of which this is a method
    _lazy_init(model, model)
    if not model._is_root:
        raise RuntimeError("`clip_grad_norm_()` should only be called on the root FSDP instance")
    model._assert_state(TrainingState.IDLE)
    if not any(handle.uses_sharded_strategy for handle in model._all_handles):
        return clip.clip_grad_norm_(model.parameters(), max_norm, norm_type)
    max_norm, norm_type = float(max_norm), float(norm_type)
    like = torch.zeros((), device="cpu" if model.cpu_offload.offload_params else model.compute_device)
    routed, grads = [], []
    for parameters, is_sharded in _parameters(model):
        slots = [parameter.grad for parameter in parameters]
        held = [grad for grad in slots if grad is not None]
        members = [gradients.of_tensors(held, writes=True)] if held else []
        # An unsharded gradient counts once; that of the largest may differ by rank.
        shared = is_sharded or math.isinf(norm_type)
        groups = (model.process_group,) if shared else ()
        route = Route(groups)  # type: ignore[arg-type]  # None is the group of a model that is not initialised
        routed.append(Routed(route, members, slots if is_sharded else None))
        grads += members
    total_norm = reduced_norm(routed, norm_type, (), like)
    for each in grads:
        each.clip_with_norm_(max_norm, total_norm)
    if grads:
        return total_norm.to(_ops.promoted_dtype([grad for each in grads for grad in each.tensors]))
    warnings.warn(
        f"Called FSDP.clip_grad_norm_() on rank {model.rank} with no gradients -- returning the total norm in the "
        "default dtype torch.float32",
        stacklevel=2,
    )
    return total_norm.float()


def _parameters(model: FullyShardedDataParallel) -> list[tuple[list[Tensor], bool]]:
    """The parameters of which each rank has a shard, and those which each has whole; equally many on all ranks."""
    found: dict[Tensor, bool] = {}
    for handle in model._all_handles:
        flat = handle.flat_param
        owned: Iterable[Tensor] | None = flat._params if handle._use_orig_params else [flat]
        for parameter in owned:  # type: ignore[union-attr]  # a handle that uses them has them
            found.setdefault(parameter, handle.uses_sharded_strategy)
    for parameter in model.parameters():
        found.setdefault(parameter, False)  # not managed by FSDP
    return [([p for p, is_sharded in found.items() if is_sharded is which], which) for which in (True, False)]
