"""The compiled CUDA kernels (csrc/cuda/): by way of what csrc/reader.cpp has read, or of torch.ops.fastclip."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _ops
from .._ops import clamp_ as clamp_
from .._ops import clip_grad_norm_ as clip_grad_norm_
from .._ops import norm_partial as norm_partial
from .._ops import sanitize_ as sanitize_
from .._ops import scale_ as scale_
from .._ops import scale_each_ as scale_each_
from .._ops import tensor_norms as tensor_norms
from .._ops import tensor_stats as tensor_stats
from . import cpu
from .eager import total_norm as total_norm

NAME = "cuda"
DEVICE = "cuda"
ENGINE = _ops.cuda_engine
NO_DEVICE = "the NVIDIA driver shows torch no device it can use"


def unavailable() -> str | None:
    return _ops.cuda_unavailable or (None if torch.cuda.is_available() else NO_DEVICE)


def unsupported(device: int) -> str | None:
    """Why the kernels cannot run on a device."""
    return _ops.cuda_unsupported(device)


def refuses(tensor: Tensor) -> str | None:
    if tensor.device.type != "cuda":
        return f"no CUDA kernels for {tensor.device.type} tensors"
    if not torch.compiler.is_compiling() and (reason := unsupported(tensor.device.index)):
        return f"{tensor.device}: {reason}"
    return cpu.refuses_on_any_device(tensor)
