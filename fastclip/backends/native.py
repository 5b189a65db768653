"""The compiled kernels (csrc/), by way of torch.ops.fastclip."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _ops
from .._ops import clamp_, clip_grad_norm_, norm_partial, scale_

__all__ = ["NAME", "OPS", "clamp_", "clip_grad_norm_", "norm_partial", "refuses", "scale_", "unavailable"]

NAME = "native"
OPS = _ops.compiled_for
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def unavailable() -> str | None:
    return _ops.cpu_unavailable


def refuses(tensor: Tensor) -> str | None:
    if tensor.device.type != "cpu":
        return f"no compiled kernels for {tensor.device.type} tensors"
    if tensor.layout != torch.strided:
        return f"layout {tensor.layout}"
    if tensor.dtype not in _DTYPES:
        return f"dtype {tensor.dtype}"
    if not torch.compiler.is_compiling() and tensor.is_neg():
        return "negative bit"
    return None
