"""The specification in plain torch ops, and the fallback for every device and dtype that no kernel covers."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable

import torch
from torch import Tensor

from ..arithmetic import combine_norms, is_power, power_unit, root, wide_dtype

NAME = "eager"
ENGINE = None
clip_grad_norm_ = None
# The dtypes that a wide accumulator takes, and the largest |log2 x| of a part of such a number that is not 0.
_REACH = {
    torch.float16: 24,
    torch.bfloat16: 133,
    torch.float32: 149,
    torch.float64: 1074,
    torch.complex64: 149,
    torch.complex128: 1074,
}
_LEAST_NORMAL = torch.finfo(torch.float32).tiny


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
    """The wide norm over all elements of all tensors; 0 where there are none."""
    if not any(t.numel() for t in tensors):
        return torch.zeros((), dtype=wide_dtype(tensors[0].device), device=tensors[0].device)
    if is_power(norm_type):
        return combine_norms(torch.stack([_vector_norm(t, norm_type) for t in tensors]), norm_type)
    return root(norm_partial(tensors, norm_type), norm_type)


@torch.no_grad()
def tensor_norms(tensors: list[Tensor], norm_type: float) -> Tensor:
    """The wide norm of each tensor alone; 0 where it has no elements."""
    return torch.stack([total_norm([tensor], norm_type) for tensor in tensors])


@torch.no_grad()
def tensor_stats(tensors: list[Tensor]) -> Tensor:
    """Of each tensor, wide: ``sum |x|^2``, ``max |x|``, how many elements are not finite, and how many are 0."""
    rows = []
    for tensor in tensors:
        values = tensor.coalesce().values() if tensor.layout == torch.sparse_coo else tensor
        norm = _vector_norm(tensor, 2.0)
        nonfinite, zeros = (~values.isfinite()).sum(), tensor.numel() - torch.count_nonzero(values)
        rows.append(torch.stack([norm.square(), _vector_norm(tensor, math.inf), nonfinite.to(norm), zeros.to(norm)]))
    return torch.stack(rows)


def powers_leave_float64(dtype: torch.dtype, norm_type: float) -> bool:
    """Whether some sum of up to 2^48 powers of numbers of a dtype may leave float64, as in csrc/clip.h."""
    return abs(norm_type) * _REACH[dtype] > 900


@torch.no_grad()
def scale_(tensors: list[Tensor], clip_coef: Tensor, *, zero: bool = False) -> None:
    factors = factors_of(clip_coef)
    for values in _dense_values(tensors):
        multiply_(values, factors)
        if zero:
            values.masked_fill_(clip_coef == 0, 0)


def factors_of(coefs: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Coefficients as dtypes take them: wide; in float32; with those that float32 cannot hold, None without such."""
    wide = coefs.to(wide_dtype(coefs.device))
    narrow = wide.to(torch.float32)
    # Rounded to float32 where that is normal: the product with a float32 is then exact in float64, and rounds once.
    return wide, narrow, None if is_ordinary(coefs) else torch.where(_is_below_float32(wide), wide, narrow.to(wide))


@torch.no_grad()
def multiply_(values: Tensor, factors: tuple[Tensor, Tensor, Tensor | None]) -> None:
    wide, narrow, lifted = factors
    if values.dtype in (torch.float64, torch.complex128):
        values.mul_(wide)
    elif lifted is None or values.dtype not in _REACH:
        # A 0-dim factor is used as it is, so float32 serves float16 and bfloat16 too.
        values.mul_(narrow)
    else:
        # A factor with dimensions lifts the product to its dtype.
        values.mul_(lifted if lifted.dim() else lifted.reshape((1,) * values.dim()))


@torch.no_grad()
def sanitize_(tensors: list[Tensor]) -> None:
    for values in _dense_values(tensors):
        values.masked_fill_(~values.isfinite(), 0)


@torch.no_grad()
def scale_each_(tensors: list[Tensor], coefs: Tensor) -> None:
    for tensor, coef in zip(tensors, coefs.unbind(), strict=True):
        scale_([tensor], coef)


@torch.no_grad()
def clamp_(tensors: list[Tensor], min: float, max: float) -> None:
    for tensor in tensors:
        if tensor.layout == torch.sparse_coo:
            # Clamping is not linear: entries that repeat have to be added up first.
            tensor.copy_(tensor.coalesce())
    for values in _dense_values(tensors):
        values.clamp_min_(min).clamp_max_(max)


def _vector_norm(tensor: Tensor, norm_type: float) -> Tensor:
    if tensor.layout == torch.sparse_coo:
        tensor = tensor.coalesce().values()
    if tensor.dtype not in _REACH:
        return torch.linalg.vector_norm(tensor, norm_type)  # integers, float8: torch's own error
    if tensor.numel() == 0:
        # torch has no norm of nothing for p < 0 and inf; an empty tensor contributes nothing.
        return tensor.new_full((), math.inf if norm_type < 0 else 0.0, dtype=wide_dtype(tensor.device))
    return wide_norm(tensor, norm_type)


def wide_norm(tensor: Tensor, norm_type: float, dims: tuple[int, ...] | None = None) -> Tensor:
    """Torch's vector norm, wide, over all dimensions, or over some that are kept with size 1; of no empty tensor."""
    dtype = wide = wide_dtype(tensor.device)
    if tensor.is_complex():
        dtype = wide.to_complex()
    norm = functools.partial(torch.linalg.vector_norm, dim=dims, keepdim=dims is not None)
    may_leave_wide = wide != torch.float64 or (tensor.dtype in _REACH and powers_leave_float64(tensor.dtype, norm_type))
    if is_power(norm_type) and may_leave_wide:
        unit = power_unit(norm(tensor, math.copysign(math.inf, norm_type), dtype=dtype))
        return norm(tensor.to(dtype, copy=True).div_(unit), norm_type) * unit
    return norm(tensor, norm_type, dtype=dtype)


def _no_elements(dtype: torch.dtype) -> list[Tensor]:
    """For the type and the text of the running torch's errors."""
    return [torch.empty(0, dtype=dtype, device="cpu")]


def check_scale(tensors: list[Tensor]) -> None:
    """Raises torch's errors for what it cannot scale, before anything is written."""
    for tensor in tensors:
        if not (tensor.is_floating_point() or tensor.is_complex()):
            torch._foreach_mul_(_no_elements(tensor.dtype), torch.tensor(0.5, device="cpu"))
            raise RuntimeError(f"expected gradients of a floating-point or complex dtype, got {tensor.dtype}")


def check_clamp(tensors: list[Tensor], min: float, max: float) -> None:
    """Raises torch's errors for what it cannot clamp, before anything is written."""
    for tensor in tensors:
        if tensor.is_complex():
            raise NotImplementedError(f"clip_value: clamp is not supported for complex gradients, got {tensor.dtype}")
        if not tensor.is_floating_point():
            torch._foreach_clamp_min_(_no_elements(tensor.dtype), min)
            raise RuntimeError(f"expected gradients of a floating-point dtype, got {tensor.dtype}")
        if tensor.layout not in (torch.strided, torch.sparse_coo):
            tensor.clone().clamp_min_(min).clamp_max_(max)


def _is_below_float32(clip_coef: Tensor) -> Tensor:
    return (clip_coef != 0) & (clip_coef.abs() < _LEAST_NORMAL)


def is_ordinary(coefs: Tensor) -> bool:
    """Whether coefficients are known not to be below float32; on a device, or in a trace, they are not looked at."""
    watched = (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack() > 0
    )
    if watched or coefs.device.type != "cpu" or type(coefs) is not Tensor:
        return False
    if coefs.dim() > 0:
        return not _is_below_float32(coefs).any()
    return not 0 < abs(float(coefs)) < _LEAST_NORMAL


def _dense_values(tensors: Iterable[Tensor]) -> Iterable[Tensor]:
    """The tensors themselves; the values of sparse ones, whose version counters are bumped by hand."""
    for tensor in tensors:
        if tensor.layout == torch.sparse_coo:
            torch.autograd.graph.increment_version(tensor)
            yield tensor._values()
        else:
            yield tensor
