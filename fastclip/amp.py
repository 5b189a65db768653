"""Unscaling and clipping in one pass, for training with :class:`torch.amp.GradScaler`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler, OptState
from torch.optim import Optimizer

import fastclip

from .clip import _to_float, as_list, clip_grad_norm_
from .gradients import is_plain

__all__ = ["unscale_and_clip_grad_norm_"]


def unscale_and_clip_grad_norm_(
    scaler: GradScaler,
    optimizer: Optimizer,
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    *,
    monitor: fastclip.GradMonitor | None = None,
) -> Tensor:
    """``scaler.unscale_(optimizer)`` and :func:`fastclip.clip_grad_norm_` in one: each gradient is read once, and
    written once at most.

    What follows is as after ``unscale_``: ``scaler.step(optimizer)`` skips a step that found inf or NaN, and
    ``scaler.update()`` grows the scale or backs it off. Fused optimizers are no exception.

    Where ``parameters`` are not those of the optimizer that have gradients, for an order of 0 or below, which may not
    see an inf, for tensor subclasses other than DTensors, and for a scaler with an ``unscale_`` of its own, the two are
    called one after the other.

    Args:
        scaler: of the step, after the backward pass. One that is disabled leaves the clip.
        optimizer: any torch optimizer; as of ``unscale_``, once in each step.
        parameters: a Tensor or an iterable of Tensors, whose ``.grad`` is clipped.
        max_norm (float): the bound, in the unit of the gradients without the scale.
        norm_type (float): as in :func:`fastclip.clip_grad_norm_`.
        monitor (GradMonitor, optional): records the call, in numbers without the scale.

    Returns:
        Tensor: 0-dim norm before clipping, of the gradients without the scale.

    Raises:
        RuntimeError: ``unscale_`` or ``step`` has been called since the last update; or as
            :func:`fastclip.clip_grad_norm_`.
        ValueError: a gradient of the optimizer is float16.
        Whatever is raised, no gradient has changed.

    Example:
        >>> import torch, fastclip.amp
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = torch.optim.SGD([weight], lr=1.0)
        >>> scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        >>> scaler.scale((weight * torch.tensor([3.0, 4.0])).sum()).backward()
        >>> fastclip.amp.unscale_and_clip_grad_norm_(scaler, optimizer, [weight], max_norm=1.0)
        tensor(5.)
        >>> scaler.step(optimizer)
        >>> scaler.update()
        >>> weight.data
        tensor([-0.6000, -0.8000])
    """
    parameters, norm_type = as_list(parameters), _to_float(norm_type, "norm_type")

    def clip(**options: Any) -> Tensor:
        if monitor is None:
            return clip_grad_norm_(parameters, max_norm, norm_type, **options)
        return monitor.clip_grad_norm_(max_norm, norm_type, parameters=parameters, **options)

    if not scaler.is_enabled():
        return clip()
    scale, _ = scaler._check_scale_growth_tracker("unscale_")
    state = scaler._per_optimizer_states[id(optimizer)]
    owned = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    # The scale is taken off once, however often a parameter is listed.
    given = [id(p) for p in parameters if p.grad is not None]
    same = len(set(given)) == len(given) and sorted(given) == sorted(map(id, owned))
    if (
        state["stage"] is not OptState.READY  # torch's own error
        or type(scaler).unscale_ is not GradScaler.unscale_
        or not (owned and same and norm_type > 0)
        or not all(is_plain(p.grad) for p in owned)
    ):
        scaler.unscale_(optimizer)
        return clip()
    if any(p.grad.dtype == torch.float16 for p in owned):
        raise ValueError("Attempting to unscale FP16 gradients.")
    found_inf = torch.empty((), dtype=torch.float32, device=scale.device)
    # Rounded as torch does.
    inv_scale = scale.double().reciprocal().float()
    norm = clip(found_inf=found_inf, inv_scale=inv_scale)
    state["found_inf_per_device"] = {scale.device: found_inf}
    state["stage"] = OptState.UNSCALED
    return norm
