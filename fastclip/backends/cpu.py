"""The compiled CPU kernels (csrc/cpu/): by way of what csrc/reader.cpp has read, or of torch.ops.fastclip."""

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
from .eager import total_norm as total_norm

NAME = "cpu"
DEVICE = "cpu"
ENGINE = _ops.cpu_engine
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def unavailable() -> str | None:
    return _ops.cpu_unavailable


def unsupported(device: int) -> str | None:
    return None


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
    if not torch.compiler.is_compiling() and tensor.is_neg():
        return "negative bit"
    return None
