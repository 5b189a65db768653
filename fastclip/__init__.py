"""fastclip: torch's gradient clipping in as few passes over memory as the hardware allows."""

from __future__ import annotations

import importlib
from types import ModuleType

from . import functional
from ._dispatch import backends, use_backend
from .clip import clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_, get_total_norm, why
from .functional import adaptive_clip_grad_, get_tensor_norms
from .patch import patch, unpatch

__version__ = "0.1.0"
__all__ = [
    "adaptive_clip_grad_",
    "backends",
    "clip_grad_norm_",
    "clip_grad_value_",
    "clip_grads_with_norm_",
    "functional",
    "get_tensor_norms",
    "get_total_norm",
    "patch",
    "unpatch",
    "use_backend",
    "why",
]


def __getattr__(name: str) -> ModuleType:
    if name == "policy":  # imported when it is first used
        return importlib.import_module(".policy", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
