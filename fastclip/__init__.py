"""fastclip: torch's gradient clipping in as few passes over memory as the hardware allows."""

import importlib
import sys
from typing import TYPE_CHECKING

import torch

if "fastclip._ops" not in sys.modules and hasattr(torch.ops.fastclip, "norm_partial"):
    raise ImportError(
        "fastclip was imported before in this process and has been removed from sys.modules since; keep its modules "
        "there, because torch's ops cannot be registered a second time"
    )

from . import functional
from ._dispatch import backends, use_backend
from .clip import clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_, get_total_norm, why
from .functional import adaptive_clip_grad_, get_tensor_norms
from .optimizers import clip_on_step, clip_optimizer, clippable
from .patch import patch, unpatch

if TYPE_CHECKING:
    from .monitor import GradientWarning, GradMonitor

__version__ = "0.1.0"
__all__ = [
    "GradMonitor",
    "GradientWarning",
    "adaptive_clip_grad_",
    "backends",
    "clip_grad_norm_",
    "clip_grad_value_",
    "clip_grads_with_norm_",
    "clip_on_step",
    "clip_optimizer",
    "clippable",
    "functional",
    "get_tensor_norms",
    "get_total_norm",
    "patch",
    "unpatch",
    "use_backend",
    "why",
]


def __getattr__(name: str) -> object:
    if name in ("amp", "integrations", "monitor", "policy"):
        return importlib.import_module(f"{__name__}.{name}")
    if name in ("GradMonitor", "GradientWarning"):
        return getattr(importlib.import_module(f"{__name__}.monitor"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
