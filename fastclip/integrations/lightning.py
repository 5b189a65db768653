"""A precision plugin for Lightning's Trainer: mixed precision with clipping, for fused optimizers too."""

from __future__ import annotations

from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.enums import GradClipAlgorithmType
from torch.optim import Optimizer

from ..amp import unscale_and_clip_grad_norm_
from ..clip import clip_grad_norm_, clip_grad_value_

__all__ = ["ClippedMixedPrecision"]


class ClippedMixedPrecision(MixedPrecision):
    """Lightning's ``MixedPrecision`` with fastclip's clips.

    A fused optimizer unscales in its own step, and Lightning refuses to clip then. Here the clip by norm unscales in
    the same pass; the clip by value unscales first. Hooks that run before it, such as ``on_before_optimizer_step``, see
    the gradients of a fused optimizer times the scale, as they do without clipping.

    Args:
        precision: ``"16-mixed"`` or ``"bf16-mixed"``.
        device: the device type for autocast.
        scaler: a :class:`torch.amp.GradScaler`, for ``"16-mixed"``.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from fastclip.integrations.lightning import ClippedMixedPrecision
        >>> plugin = ClippedMixedPrecision("16-mixed", "cpu")
        >>> trainer = Trainer(plugins=[plugin], gradient_clip_val=1.0, accelerator="cpu", logger=False)
    """

    def clip_gradients(
        self,
        optimizer: Optimizer,
        clip_val: int | float = 0.0,
        gradient_clip_algorithm: GradClipAlgorithmType = GradClipAlgorithmType.NORM,
    ) -> None:
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer.optimizer
        by_norm = gradient_clip_algorithm == GradClipAlgorithmType.NORM
        parameters = self.main_params(optimizer)
        if clip_val <= 0:
            return
        if self.scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            if by_norm:
                unscale_and_clip_grad_norm_(self.scaler, optimizer, parameters, clip_val)
                return
            self.scaler.unscale_(optimizer)
        if by_norm:
            clip_grad_norm_(parameters, clip_val)
        else:
            clip_grad_value_(parameters, clip_val)
