"""The compiled CUDA kernels (csrc/cuda/): by way of what csrc/reader.cpp has read, or of torch.ops.fastclip."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _ops
from .._ops import clamp_, clip_grad_norm_, norm_partial, sanitize_, scale_
from . import cpu
from .eager import total_norm

__all__ = [
    "DEVICE",
    "ENGINE",
    "NAME",
    "clamp_",
    "clip_grad_norm_",
    "norm_partial",
    "refuses",
    "sanitize_",
    "scale_",
    "total_norm",
    "unavailable",
    "unsupported",
]

NAME = "cuda"
DEVICE = "cuda"
ENGINE = _ops.cuda_engine


def unavailable() -> str | None:
    return _ops.cuda_unavailable


def unsupported(device: int) -> str | None:
    """Why the kernels cannot run on a device."""
    return _ops.cuda_unsupported(device)


def refuses(tensor: Tensor) -> str | None:
    if tensor.device.type != "cuda":
        return f"no CUDA kernels for {tensor.device.type} tensors"
    if not torch.compiler.is_compiling() and (reason := unsupported(tensor.device.index)):
        return f"{tensor.device}: {reason}"
    return cpu.refuses_on_any_device(tensor)
