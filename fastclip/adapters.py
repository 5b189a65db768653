"""The multi-tensor functions of apex and Transformer Engine, as Megatron-core's ``clip_grads.py`` calls them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor

from . import clip, gradients


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
    vars(clip_grads).update(
        multi_tensor_applier=multi_tensor_applier,
        l2_norm_impl=multi_tensor_l2norm,
        multi_tensor_scale_impl=multi_tensor_scale,
        # With it Megatron keeps norm and coefficient on the device, and does not wait for them.
        multi_tensor_scale_tensor_impl=multi_tensor_scale_tensor,
    )


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
        noop_flag (Tensor): becomes 1 if an element of the first list is not finite, else stays.
        tensor_lists: what to scale, and where to write it: as many tensors, of the same shapes.
        scale (float): the factor; products are rounded once, to the dtype that they are written in.

    Raises:
        ValueError: the lists differ in length or in a shape; nothing is written.
    """
    factor = torch.tensor(scale, dtype=torch.float64, device=noop_flag.device)
    multi_tensor_scale_tensor(chunk_size, noop_flag, tensor_lists, factor)


@torch.no_grad()
def multi_tensor_scale_tensor(
    chunk_size: int, noop_flag: Tensor, tensor_lists: Sequence[list[Tensor]], scale: Tensor
) -> None:
    """Does what :func:`multi_tensor_scale` does, with a factor that stays on the device: a tensor of one element."""
    sources, targets = tensor_lists
    _check_alike(sources, targets)
    if not sources:
        return
    scale = scale.detach().double().reshape(())
    largest = gradients.of_tensors(sources).norm_partial(math.inf)
    written: gradients.Gradients | None = gradients.of_tensors(targets, writes=True)
    wides = [torch.promote_types(source.dtype, target.dtype) for source, target in zip(sources, targets, strict=True)]
    in_place = [target for target, wide in zip(targets, wides, strict=True) if wide == target.dtype]
    if len(in_place) < len(targets):
        written = gradients.of_tensors(in_place, writes=True) if in_place else None
    for source, target, wide in zip(sources, targets, wides, strict=True):
        if wide != target.dtype:
            # The product in the wider dtype, rounded once when it is stored.
            torch.mul(source.to(wide), scale.to(source.device), out=target)
        elif source is not target:
            target.copy_(source)
    if written:
        written.scale_(scale)
    noop_flag.masked_fill_(~largest.isfinite().to(noop_flag.device), 1)


def _check_alike(sources: list[Tensor], targets: list[Tensor]) -> None:
    if len(sources) != len(targets):
        raise ValueError(f"tensor_lists: expected lists of one length, got {len(sources)} and {len(targets)} tensors")
    for i, (source, target) in enumerate(zip(sources, targets, strict=True)):
        if source.shape != target.shape:
            shapes = f"{tuple(source.shape)} and {tuple(target.shape)}"
            raise ValueError(f"tensor_lists: expected tensors of one shape at {i}, got {shapes}")


def _norm(tensors: list[Tensor], noop_flag: Tensor) -> Tensor:
    if not tensors:
        return torch.zeros(1, device=noop_flag.device)
    return clip.get_total_norm(tensors, norm_dtype=torch.float32).reshape(1)
