"""``FullyShardedDataParallel.clip_grad_norm_``, the method of FSDP1, by fastclip; :func:`fastclip.patch` installs it.

FSDP2 (``fully_shard``) needs none: its gradients are DTensors, which the functions of torch.nn.utils take.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import _ops, clip
from .distributed import Route, Shards

if TYPE_CHECKING:
    from torch.distributed.fsdp import FullyShardedDataParallel


def clip_grad_norm_(self: FullyShardedDataParallel, max_norm: float, norm_type: float = 2.0) -> Tensor:
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

    _lazy_init(self, self)
    if not self._is_root:
        raise RuntimeError("`clip_grad_norm_()` should only be called on the root FSDP instance")
    self._assert_state(TrainingState.IDLE)
    if not any(handle.uses_sharded_strategy for handle in self._all_handles):
        return clip.clip_grad_norm_(self.parameters(), max_norm, norm_type)
    max_norm, norm_type = float(max_norm), float(norm_type)
    sharded, whole = _gradients(self)
    grads = [*sharded, *whole]
    like = torch.zeros((), device="cpu" if self.cpu_offload.offload_params else self.compute_device)
    shards = [Shards(Route((self.process_group,)), sharded, None, like), Shards(Route(()), whole, None, like)]
    total_norm = clip._reduced_norm(shards, norm_type, None)
    clip._scale(grads, clip._clip_coef(total_norm, max_norm), None)
    if grads:
        return total_norm.to(_ops.promoted_dtype(grads))
    warnings.warn(
        f"Called FSDP.clip_grad_norm_() on rank {self.rank} with no gradients -- returning the total norm in the "
        "default dtype torch.float32",
        stacklevel=2,
    )
    return total_norm.float()


def _gradients(model: FullyShardedDataParallel) -> tuple[list[Tensor], list[Tensor]]:
    """The gradients of which each rank has a shard, and those which each has whole."""
    parameters: dict[Tensor, bool] = {}
    for handle in model._all_handles:
        owned: Iterable[Tensor] = handle.flat_param._params if handle._use_orig_params else [handle.flat_param]
        for parameter in owned:
            parameters.setdefault(parameter, handle.uses_sharded_strategy)
    for parameter in model.parameters():
        parameters.setdefault(parameter, False)  # not managed by FSDP
    lists: tuple[list[Tensor], list[Tensor]] = ([], [])
    for parameter, is_sharded in parameters.items():
        if parameter.grad is not None:
            lists[0 if is_sharded else 1].append(parameter.grad)
    return lists
