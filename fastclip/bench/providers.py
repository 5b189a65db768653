"""Who is measured: torch's two ways and every fastclip backend that is available here."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

import fastclip

from .cases import Regime
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

    def call(self, regime: Regime, gradients: Gradients) -> Callable[[], torch.Tensor | None]:
        """The call of `regime` over `gradients` with all its arguments bound."""
        targets = gradients.grads if regime.function == "get_total_norm" else gradients.parameters
        arguments = regime.arguments(gradients.total_norm)
        return partial(getattr(self.functions, regime.function), targets, *arguments, **self.options)


def available() -> list[Provider]:
    """The providers of this machine: the baseline first, then fastclip's backends in order of preference."""
    backends = [name for name, reason in fastclip.backends().items() if reason is None]
    return [
        Provider(BASELINE, torch.nn.utils, {"foreach": True}, gated=False),
        Provider("torch for-loop", torch.nn.utils, {"foreach": False}, gated=False),
        *(Provider(f"fastclip {name}", fastclip, scope=partial(fastclip.use_backend, name)) for name in backends),
    ]
