"""The compiled CUDA kernels (csrc/cuda/), by way of torch.ops.fastclip."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _ops
from .._ops import clamp_, clip_grad_norm_, norm_partial, scale_
from . import cpu

__all__ = ["NAME", "OPS", "clamp_", "clip_grad_norm_", "norm_partial", "refuses", "scale_", "unavailable"]

NAME = "cuda"
OPS = _ops.compiled_for & {"cuda"}


def unavailable() -> str | None:
    return _ops.cuda_unavailable


def refuses(tensor: Tensor) -> str | None:
    if tensor.device.type != "cuda":
        return f"no CUDA kernels for {tensor.device.type} tensors"
    if not torch.compiler.is_compiling() and (reason := _ops.cuda_unsupported(tensor.device.index)):
        return f"{tensor.device}: {reason}"
    return cpu.refuses_on_any_device(tensor)
