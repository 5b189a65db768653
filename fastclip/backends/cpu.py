"""The compiled CPU kernels (csrc/cpu/), by way of torch.ops.fastclip."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _ops
from .._ops import clamp_, clip_grad_norm_, norm_partial, scale_

__all__ = ["NAME", "OPS", "clamp_", "clip_grad_norm_", "norm_partial", "refuses", "scale_", "unavailable"]

NAME = "cpu"
OPS = _ops.compiled_for & {"cpu"}
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def unavailable() -> str | None:
    return _ops.cpu_unavailable


def refuses(tensor: Tensor) -> str | None:
    if tensor.device.type != "cpu":
        return f"no compiled CPU kernels for {tensor.device.type} tensors"
    return refuses_on_any_device(tensor)


def refuses_on_any_device(tensor: Tensor) -> str | None:
    """The reason why no compiled kernel takes a tensor, wherever it is."""
    if tensor.layout != torch.strided:
        return f"layout {tensor.layout}"
    if tensor.dtype not in _DTYPES:
        return f"dtype {tensor.dtype}"
    if torch.compiler.is_compiling():
        return None
    if tensor.is_neg():
        return "negative bit"
    if not tensor.is_contiguous() and _may_overlap_itself(tensor):
        return "elements that may share memory"
    return None


def _may_overlap_itself(tensor: Tensor) -> bool:
    reach = 1  # one past the furthest element that the inner dimensions touch
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride < reach:
                return True
            reach += (size - 1) * stride
    return False
