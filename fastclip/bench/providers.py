"""Who is measured: torch, every fastclip backend that is available here, and on a GPU others that are installed."""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

import fastclip
from fastclip import _dispatch

from . import in_torch
from .cases import EACH, REGIMES, Regime
from .gradients import Gradients

BASELINE = "torch foreach"


@dataclass(frozen=True)
class Provider:
    """A namespace with torch's function names; `gated` ones must agree with float64 before they get a time."""

    name: str
    functions: Any
    options: dict[str, Any] = field(default_factory=dict)
    scope: Callable[[], AbstractContextManager] = nullcontext
    gated: bool = True

    def has(self, regime: Regime) -> bool:
        return hasattr(self.functions, regime.function)

    def call(self, regime: Regime, gradients: Gradients) -> Callable[[], torch.Tensor | None]:
        """The call of `regime` over `gradients` with all its arguments bound."""
        targets = getattr(gradients, regime.over)
        arguments = regime.arguments(gradients.total_norm)
        return partial(getattr(self.functions, regime.function), targets, *arguments, **self.options)


def available(device: torch.device) -> list[Provider]:
    """The providers for a device: the baseline first, then fastclip's backends in order of preference."""
    tensor = torch.empty(0, device=device)
    backends = [
        name
        for name, backend in _dispatch.BACKENDS.items()
        if backend.unavailable() is None and backend.refuses(tensor) is None
    ]
    torchs = [Provider(BASELINE, _functions(torch.nn.utils, in_torch), {"foreach": True}, gated=False)]
    others = []
    if device.type == "cuda":
        # A loop over tensors, torch's or eager's, is no one's choice on a GPU that has kernels.
        backends = [name for name in backends if name != "eager"] or backends
        others = _others()
    else:
        torchs.append(Provider("torch for-loop", torchs[0].functions, {"foreach": False}, gated=False))
    functions = _functions(fastclip, fastclip.functional)
    ours = [Provider(f"fastclip {name}", functions, scope=partial(fastclip.use_backend, name)) for name in backends]
    return [*torchs, *ours, *others]


def _functions(*modules: Any) -> SimpleNamespace:
    """The functions of all regimes, each from the first module that has it."""
    names = {regime.function for regime in (*REGIMES, *EACH)}
    return SimpleNamespace(**{name: next(getattr(m, name) for m in modules if hasattr(m, name)) for name in names})


def _others() -> list[Provider]:
    """What else clips by norm on a GPU, where it can be imported; not judged, as torch is not."""
    found = []
    # What is not installed is not measured.
    with contextlib.suppress(ImportError):
        from apex.contrib.clip_grad import clip_grad_norm_

        found.append(Provider("apex", SimpleNamespace(clip_grad_norm_=clip_grad_norm_), gated=False))
    with contextlib.suppress(ImportError):  # likewise
        from transformer_engine.pytorch import optimizers

        clip = partial(_clip_with_multi_tensor, optimizers)
        found.append(Provider("TransformerEngine", SimpleNamespace(clip_grad_norm_=clip), gated=False))
    with contextlib.suppress(ImportError):  # likewise
        from nemo_automodel.components.training.triton.grad_norm import multi_tensor_sumsq

        clip = partial(_clip_with_sum_of_squares, multi_tensor_sumsq)
        found.append(Provider("NeMo Automodel", SimpleNamespace(clip_grad_norm_=clip), gated=False))
    return found


def _clip_with_sum_of_squares(
    sum_of_squares: Any, parameters: list[torch.nn.Parameter], max_norm: float
) -> torch.Tensor:
    """A fused norm, and torch's foreach for the rest, as in NeMo Automodel."""
    grads = [parameter.grad for parameter in parameters]
    total_norm = sum_of_squares(grads).sqrt()
    clip_coef = torch.clamp(max_norm / (total_norm + 1e-6), max=1.0)
    by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
    for grad in grads:
        by_dtype.setdefault(grad.dtype, []).append(grad)
    for group in by_dtype.values():
        torch._foreach_mul_(group, clip_coef)
    return total_norm


def _clip_with_multi_tensor(optimizers: Any, parameters: list[torch.nn.Parameter], max_norm: float) -> torch.Tensor:
    """The kernels in the order in which Megatron-LM calls them; its wait for the coefficient is part of it."""
    lists: dict[torch.dtype, list[torch.Tensor]] = {}
    for parameter in parameters:
        lists.setdefault(parameter.grad.dtype, []).append(parameter.grad)
    overflow = torch.zeros(1, dtype=torch.int, device=parameters[0].device)
    apply = optimizers.multi_tensor_applier
    norms = [apply(optimizers.multi_tensor_l2norm, overflow, [grads], False)[0] for grads in lists.values()]
    total_norm = torch.linalg.vector_norm(torch.stack(norms))
    clip_coef = max_norm / (float(total_norm) + 1e-6)
    if clip_coef < 1:
        for grads in lists.values():
            apply(optimizers.multi_tensor_scale, overflow, [grads, grads], clip_coef)
    return total_norm
