"""The arithmetic of clipping in torch ops; csrc/clip.h has the same in C++.

A partial is what combines with the same of other tensors, lists and ranks: ``sum |x|^p`` for the orders 1 and 2, the
largest or the smallest magnitude for the infinite ones, the number of tensors with a non-zero for order 0. For every
other order it is the norm itself, because ``|x|^p`` may leave float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def wide_dtype(device: torch.device) -> torch.dtype:
    """The accumulator's dtype: float64, or float32 on a device that has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def indices(places: Sequence[int], device: torch.device) -> Tensor:
    """Places as a tensor; the host does not wait for the device that it goes to."""
    return torch.tensor(places, dtype=torch.int64, device="cpu").to(device, non_blocking=True)


def is_power(norm_type: float) -> bool:
    """Whether the partials of an order are norms."""
    return norm_type not in (0, 1, 2) and not math.isinf(norm_type)


def nothing(norm_type: float) -> float:
    """The partial of no elements."""
    return math.inf if norm_type < 0 else 0.0


def combine(partials: Tensor, norm_type: float) -> Tensor:
    """Combines partials along the first dimension."""
    if is_power(norm_type):
        return combine_norms(partials, norm_type)
    if math.isinf(norm_type):
        return partials.amax(0) if norm_type > 0 else partials.amin(0)
    return partials.sum(0)


@torch.no_grad()
def combine_norms(norms: Tensor, norm_type: float) -> Tensor:
    """``(sum n^p)^(1/p)`` along the first dimension, for an order that :func:`is_power`.

    Powers are summed in units of the largest norm, for p < 0 of the smallest, so that they cannot leave float64.
    """
    if math.isnan(norm_type):
        return torch.full_like(norms[0], math.nan)
    unit = power_unit(norms.amax(0) if norm_type > 0 else norms.amin(0))
    return torch.linalg.vector_norm(norms / unit, norm_type, dim=0) * unit


def power_unit(extreme: Tensor) -> Tensor:
    """The unit in which powers are summed. Powers of 0, inf and NaN say by themselves what the norm is."""
    return torch.where((extreme > 0) & (extreme < math.inf), extreme, 1.0)


def root(partial: Tensor, norm_type: float) -> Tensor:
    """The norm from the partial of all elements."""
    return partial.sqrt() if norm_type == 2 else partial


def clip_coef(total_norm: Tensor, max_norm: float) -> Tensor:
    """``min(max_norm / (total_norm + 1e-6), 1)``, rounded in torch's order: reciprocal, then product; NaN stays.

    No norm reaches a bound of inf.
    """
    if torch.compiler.is_compiling():  # it may know no value of max_norm
        coef = ((total_norm + 1e-6).reciprocal() * max_norm).clamp(max=1.0)
        return torch.where(torch.ones_like(total_norm) * max_norm == math.inf, 1.0, coef)
    if max_norm == math.inf:
        return torch.ones_like(total_norm)
    return ((total_norm + 1e-6).reciprocal() * max_norm).clamp(max=1.0)


def each_coef(measures: Tensor, bounds: Tensor | float, least: float = 0.0) -> Tensor:
    """The coefficients of tensors, or units, each clipped by its own measure: 1 within the bound, NaN of NaN.

    With a least number to divide by, one that is at its bound is scaled, too.
    """
    if not isinstance(bounds, Tensor):  # torch divides a Python number by way of the reciprocal, which rounds twice
        bounds = measures.new_full((), bounds)
    bounds = bounds.to(measures.device)
    if least > 0:
        return torch.where(measures < bounds, 1.0, bounds / measures.clamp(min=least))
    return torch.where(measures <= bounds, 1.0, bounds / measures)


def scaled_norm(total_norm: Tensor, norm_type: float, inv_scale: float | Tensor) -> Tensor:
    """The norm of the gradients times ``inv_scale``, from theirs."""
    factor = as_number(inv_scale, total_norm.device)
    if norm_type == 0:  # a count of tensors
        return torch.where(factor != 0, total_norm, 0.0)
    return total_norm * factor.abs()


def clip_factor(scaled_norm: Tensor, max_norm: float, inv_scale: float | Tensor | None, zero: bool) -> Tensor:
    """What the gradients are multiplied by, from that norm; with ``zero`` a 0 makes zeros of whatever they are."""
    factor = clip_coef(scaled_norm, max_norm)
    if inv_scale is not None:
        factor = factor * as_number(inv_scale, factor.device)
    return torch.where(scaled_norm.isfinite(), factor, 0.0) if zero else factor


def as_number(value: float | Tensor, device: torch.device) -> Tensor:
    """A number, 0-dim and wide, on a device, for which no device waits."""
    if isinstance(value, Tensor):
        return value.detach().to(device, wide_dtype(device))
    return torch.full((), value, dtype=wide_dtype(device), device=device)
