"""The specification in plain torch ops, and the fallback for every device and dtype that no kernel covers."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from ..arithmetic import combine_norms, wide_dtype

NAME = "eager"
ENGINE = None
clip_grad_norm_ = None
_WIDENS = {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128}


def unavailable() -> str | None:
    return None


def refuses(tensor: Tensor) -> str | None:
    return None


@torch.no_grad()
def norm_partial(tensors: list[Tensor], norm_type: float) -> Tensor:
    norms = torch.stack([_vector_norm(t, norm_type) for t in tensors])
    if norm_type == 0:
        return (norms != 0).to(norms.dtype).sum()
    if math.isinf(norm_type):
        return norms.amax() if norm_type > 0 else norms.amin()
    return norms.pow(norm_type).sum()


@torch.no_grad()
def total_norm(tensors: list[Tensor], norm_type: float) -> Tensor:
    """The norm of all tensors for an order whose powers may leave float64."""
    norms = torch.stack([_scaled_norm(tensor, norm_type) for tensor in tensors])
    return combine_norms(norms, norm_type)


@torch.no_grad()
def scale_(tensors: list[Tensor], clip_coef: Tensor) -> None:
    for values in _dense_values(tensors):
        # A 0-dim factor is used as it is, so float32 serves float16 and bfloat16 too.
        wide = values.dtype in (torch.float64, torch.complex128)
        values.mul_(clip_coef if wide else clip_coef.to(torch.float32))


@torch.no_grad()
def clamp_(tensors: list[Tensor], min: float, max: float) -> None:
    for tensor in tensors:
        if tensor.layout == torch.sparse_coo:
            # Clamping is not linear: entries that repeat have to be added up first.
            tensor.copy_(tensor.coalesce())
    for values in _dense_values(tensors):
        values.clamp_min_(min).clamp_max_(max)


def _scaled_norm(tensor: Tensor, norm_type: float) -> Tensor:
    """The norm of one tensor, as a multiple of the magnitude that counts most."""
    most = _vector_norm(tensor, math.copysign(math.inf, norm_type))
    if tensor.numel() == 0:
        return most
    values = tensor.coalesce().values() if tensor.layout == torch.sparse_coo else tensor
    norm = (
        torch.linalg.vector_norm(
            values.to(most.dtype.to_complex() if values.is_complex() else most.dtype) / most, norm_type
        )
        * most
    )
    return torch.where((most == 0) | most.isinf(), most, norm)


def check_clamp(tensors: list[Tensor], min: float, max: float) -> None:
    """Raises torch's errors for what it cannot clamp, before anything is written."""
    for tensor in tensors:
        if tensor.is_complex():
            raise NotImplementedError(f"clip_value: clamp is not supported for complex gradients, got {tensor.dtype}")
        if tensor.layout not in (torch.strided, torch.sparse_coo):
            tensor.clone().clamp_min_(min).clamp_max_(max)


def _vector_norm(tensor: Tensor, norm_type: float) -> Tensor:
    if tensor.layout == torch.sparse_coo:
        tensor = tensor.coalesce().values()
    if tensor.dtype not in _WIDENS:
        return torch.linalg.vector_norm(tensor, norm_type)  # integers, float8: torch's own error
    if tensor.numel() == 0:
        # torch has no norm of nothing for p < 0 and inf; an empty tensor contributes nothing.
        return tensor.new_full((), math.inf if norm_type == -math.inf else 0.0, dtype=wide_dtype(tensor.device))
    wide = wide_dtype(tensor.device)
    return torch.linalg.vector_norm(tensor, norm_type, dtype=wide.to_complex() if tensor.is_complex() else wide)


def _dense_values(tensors: Iterable[Tensor]) -> Iterable[Tensor]:
    """The tensors themselves; the values of sparse ones, whose version counters are bumped by hand."""
    for tensor in tensors:
        if tensor.layout == torch.sparse_coo:
            torch.autograd.graph.increment_version(tensor)
            yield tensor._values()
        else:
            yield tensor
