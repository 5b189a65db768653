"""The multi-tensor functions of apex and Transformer Engine, as Megatron-core's ``clip_grads.py`` calls them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor

from . import clip


def use_in_megatron(clip_grads: ModuleType) -> None:
    """Lets Megatron-core compute norms and scale gradients with fastclip; its own reductions and filters stay.

    Args:
        clip_grads: the module ``megatron.core.optimizer.clip_grads``.

    Example:
        >>> import types, fastclip.adapters
        >>> clip_grads = types.ModuleType("clip_grads")  # from megatron.core.optimizer import clip_grads
        >>> fastclip.adapters.use_in_megatron(clip_grads)
        >>> clip_grads.l2_norm_impl is fastclip.adapters.multi_tensor_l2norm
        True
    """
    clip_grads.multi_tensor_applier = multi_tensor_applier
    clip_grads.l2_norm_impl = multi_tensor_l2norm
    clip_grads.multi_tensor_scale_impl = multi_tensor_scale
    # With it Megatron keeps norm and coefficient on the device, and does not wait for them.
    clip_grads.multi_tensor_scale_tensor_impl = multi_tensor_scale_tensor


def multi_tensor_applier(
    op: Callable, noop_flag: Tensor, tensor_lists: Sequence[list[Tensor]], *args: object
) -> object:
    """Calls ``op(chunk_size, noop_flag, tensor_lists, *args)``; the chunk size is the kernels' own matter here."""
    return op(0, noop_flag, tensor_lists, *args)


def multi_tensor_l2norm(
    chunk_size: int, noop_flag: Tensor, tensor_lists: Sequence[list[Tensor]], per_tensor: bool = False
) -> tuple[Tensor, Tensor]:
    """Computes the L2 norm of a list of tensors.

    Args:
        chunk_size: ignored.
        noop_flag (Tensor): becomes 1 if the norm is not finite, else stays.
        tensor_lists: one list.
        per_tensor (bool): compute the norm of each tensor, too.

    Returns:
        tuple: the norm, float32 of shape (1,), and those of the tensors, of shape (N,) or empty.
    """
    (tensors,) = tensor_lists
    norm = _norm(tensors, noop_flag)
    noop_flag.masked_fill_(~norm.isfinite(), 1)
    each = [_norm([tensor], noop_flag) for tensor in tensors] if per_tensor else []
    return norm, torch.cat(each) if each else norm.new_empty(0)


def multi_tensor_scale(chunk_size: int, noop_flag: Tensor, tensor_lists: Sequence[list[Tensor]], scale: float) -> None:
    """Writes the first list times ``scale`` to the second, which may be the same tensors.

    Args:
        chunk_size: ignored.
        noop_flag (Tensor): not looked at; the norm has told already whether a tensor is not finite.
        tensor_lists: what to scale, and where to write it.
        scale (float): the factor.
    """
    scale = torch.tensor(scale, dtype=torch.float64, device=noop_flag.device)
    multi_tensor_scale_tensor(chunk_size, noop_flag, tensor_lists, scale)


def multi_tensor_scale_tensor(
    chunk_size: int, noop_flag: Tensor, tensor_lists: Sequence[list[Tensor]], scale: Tensor
) -> None:
    """Does what :func:`multi_tensor_scale` does, with a factor that stays on the device: a tensor of one element."""
    sources, targets = tensor_lists
    if not sources:
        return
    for source, target in zip(sources, targets, strict=True):
        if source is not target:
            target.copy_(source)
    clip._scale(targets, scale.detach().double().reshape(()), None)


def _norm(tensors: list[Tensor], noop_flag: Tensor) -> Tensor:
    if not tensors:
        return torch.zeros(1, device=noop_flag.device)
    return clip.get_total_norm(tensors, norm_dtype=torch.float32).reshape(1)
