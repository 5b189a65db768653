"""The clip as a part of an optimizer's step, by hooks on any torch optimizer."""

from __future__ import annotations

import math
import numbers
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import distributed, gradients
from .arithmetic import as_number, clip_coef, wide_dtype
from .clip import _to_float
from .gradients import PROPAGATE, ZERO, Clip, Gradients, Nothing

_POLICIES = ("propagate", "raise", "zero", "skip")
_clipped: weakref.WeakSet[Optimizer] = weakref.WeakSet()
_MISSING = object()


class Policy(Protocol):
    """What :func:`clip_on_step` calls with the parameters that are to be clipped, in place of a bound."""

    def clip_(self, parameters: list[Tensor], *, loss: object = None) -> Tensor | None:
        """Clips the gradients in place; may return their norm. ``loss`` is what a closure of the step returned."""


def clippable(optimizer: Optimizer) -> list[Tensor]:
    """The parameters of an optimizer that are meant to be clipped: those of groups whose ``clip_grad`` is not False.

    Args:
        optimizer: any torch optimizer.

    Returns:
        list: the parameters in the order of the groups.

    Example:
        >>> import torch, fastclip
        >>> first, second = (torch.nn.Parameter(torch.zeros(n)) for n in (2, 3))
        >>> optimizer = torch.optim.SGD([{"params": [first]}, {"params": [second], "clip_grad": False}], lr=0.1)
        >>> [parameter.numel() for parameter in fastclip.clippable(optimizer)]
        [2]
    """
    return [p for group in optimizer.param_groups if _is_clipped(group) for p in group["params"]]


def clip_on_step(
    optimizer: Optimizer,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    *,
    clip_value: float | None = None,
    per_tensor: bool = False,
    policy: Policy | None = None,
    nonfinite: str = "propagate",
    max_skips: int | None = None,
    defer: bool | str = "auto",
) -> StepClip:
    """Clips the gradients of an optimizer at the start of each of its steps, until the handle is removed.

    Groups with ``clip_grad: False`` are left out of the norm, of the clip and of the skip. Groups that are added later,
    closures, checkpoints, DTensors, a GradScaler, and optimizers that wrap another one need nothing more.

    Args:
        optimizer: any torch optimizer; of one that wraps another, the inner one is meant.
        max_norm (float, optional): the bound of the norm, greater than 0; ``inf`` computes the norm alone.
        norm_type (float): as in :func:`clip_grad_norm_`.
        clip_value (float, optional): the bound of each element, in place of ``max_norm``.
        per_tensor (bool): each gradient by its own norm.
        policy (optional): an object with ``clip_(parameters, *, loss=None)``, in place of a bound.
        nonfinite (str): ``"propagate"``, ``"raise"`` and ``"zero"`` as in :func:`clip_grad_norm_`; with ``"skip"`` a
            step whose norm is not finite changes neither parameters nor state. Fused optimizers on a device are told so
            by their ``found_inf``; for others, and where a group is left out, this waits for the device once in each
            step.
        max_skips (int, optional): as many skipped steps in a row raise. On a device with a fused optimizer the count is
            read when it has arrived, a step or more later.
        defer (bool or "auto"): leave the coefficient to the kernel of a fused optimizer (Adam, AdamW, SGD, Adagrad), by
            its ``grad_scale``, which saves a pass. "auto" does so on the CPU where there is something to clip. All
            groups of the optimizer have to be fused, and none left out.

    Returns:
        StepClip: the handle, which is also a context manager.

    Raises:
        TypeError, ValueError: an argument is not of its kind, or ``defer=True`` is not possible.
        RuntimeError: the optimizer is clipped on step already; later, from ``step()``, ``nonfinite="raise"`` and
            ``max_skips``, which names the step, the count and the first parameter. Nothing is then stepped.

    Example:
        >>> import torch, fastclip
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = torch.optim.SGD([weight], lr=1.0)
        >>> handle = fastclip.clip_on_step(optimizer, max_norm=1.0)
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> optimizer.step()
        >>> weight.data, float(handle.total_norm)
        (tensor([-0.6000, -0.8000]), 5.0)
        >>> handle.remove()
    """
    optimizer = _innermost(optimizer)
    given = [name for name, value in (("max_norm", max_norm), ("clip_value", clip_value), ("policy", policy))
             if value is not None]  # fmt: skip
    if nonfinite not in _POLICIES:
        raise ValueError(f"nonfinite: expected one of {', '.join(map(repr, _POLICIES))}, got {nonfinite!r}")
    if len(given) > 1 or not (given or nonfinite != "propagate"):
        raise ValueError(f"max_norm, clip_value, policy: expected one of them, got {' and '.join(given) or 'none'}")
    if policy is not None and (isinstance(policy, type) or not callable(getattr(policy, "clip_", None))):
        raise TypeError(f"policy: expected an object with clip_(parameters, *, loss=None), got {policy!r}")
    if policy is not None and nonfinite != "propagate":
        raise ValueError(f"nonfinite: {nonfinite!r} with a policy, which decides that itself")
    if per_tensor and max_norm is None:
        raise ValueError("per_tensor: expected a max_norm with it")
    if nonfinite == "skip" and isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("nonfinite: 'skip' with LBFGS, which evaluates its closure many times in a step")
    if max_skips is not None and (type(max_skips) is not int or max_skips < 1):
        raise ValueError(f"max_skips: expected an integer of at least 1, got {max_skips!r}")
    if max_skips is not None and nonfinite != "skip":
        raise ValueError(f"max_skips: expected nonfinite='skip' with it, got {nonfinite!r}")
    if not (isinstance(defer, bool) or (isinstance(defer, str) and defer == "auto")):
        raise ValueError(f"defer: expected True, False or 'auto', got {defer!r}")
    if optimizer in _clipped:
        raise RuntimeError(
            f"optimizer: this {type(optimizer).__name__} is clipped on step already; remove() that first"
        )
    if not given:
        max_norm = math.inf
    handle = StepClip(
        None if max_norm is None else _bound("max_norm", max_norm),
        _number("norm_type", norm_type),
        None if clip_value is None else _bound("clip_value", clip_value),
        per_tensor,
        policy,
        nonfinite,
        max_skips,
        defer,
    )
    if defer is True and (reason := handle._why_not_deferred(optimizer)):
        raise ValueError(f"defer: {reason}")
    handle._attach(optimizer)
    return handle


def clip_optimizer(
    optimizer: Optimizer,
    *,
    clipvalue: float | None = None,
    clipnorm: float | None = None,
    global_clipnorm: float | None = None,
) -> StepClip:
    """:func:`clip_on_step` in the words of Keras's optimizers, of which exactly one is given.

    Args:
        optimizer: any torch optimizer.
        clipvalue (float, optional): the bound of each element.
        clipnorm (float, optional): the bound of the norm of each gradient.
        global_clipnorm (float, optional): the bound of the norm of all gradients together.

    Returns:
        StepClip: the handle.

    Raises:
        TypeError, ValueError: none or several are given, or the one is no number above 0.

    Example:
        >>> import torch, fastclip
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = torch.optim.SGD([weight], lr=1.0)
        >>> with fastclip.clip_optimizer(optimizer, clipvalue=0.5):
        ...     weight.grad = torch.tensor([3.0, 0.25])
        ...     optimizer.step()
        >>> weight.data
        tensor([-0.5000, -0.2500])
    """
    values = {"clipnorm": clipnorm, "clipvalue": clipvalue, "global_clipnorm": global_clipnorm}
    given = [name for name, value in values.items() if value is not None]
    received = ", ".join(f"{name}={value}" for name, value in values.items())
    if len(given) > 1:
        raise ValueError(
            "Only one of `clipnorm`, `clipvalue` and `global_clipnorm` can be set to a value, but received: " + received
        )
    if not given:
        raise ValueError("Expected one of `clipnorm`, `clipvalue` and `global_clipnorm`, but received: " + received)
    bound = _bound(given[0], values[given[0]])
    if clipvalue is not None:
        return clip_on_step(optimizer, clip_value=bound)
    return clip_on_step(optimizer, bound, per_tensor=clipnorm is not None)


class StepClip:
    """The handle of :func:`clip_on_step`.

    Numbers stay on the device: whoever reads one waits for it.

    Attributes:
        total_norm (Tensor): 0-dim norm before clipping, of the last step; None before the first one, and with
            ``clip_value`` unless ``nonfinite`` asks for it.
    """

    def __init__(
        self,
        max_norm: float | None,
        norm_type: float,
        clip_value: float | None,
        per_tensor: bool,
        policy: Policy | None,
        nonfinite: str,
        max_skips: int | None,
        defer: bool | str,
    ) -> None:
        self._max_norm = math.inf if max_norm is None else max_norm
        self._norm_type, self._clip_value = norm_type, clip_value
        self._per_tensor, self._policy, self._nonfinite = per_tensor, policy, nonfinite
        self._max_skips, self._defer = max_skips, defer
        self._whole = max_norm is not None and not per_tensor
        self.total_norm: Tensor | None = None
        self._steps = 0
        self._counts: Tensor | None = None  # skipped steps, and those in a row
        self._arriving: tuple[Tensor, torch.cuda.Event] | None = None
        # What a step has borrowed: gradients, and attributes of the optimizer.
        self._withheld: list[tuple[Tensor, Tensor]] = []
        self._replaced: dict[str, object] = {}
        self._detach: list[Callable[[], None]] = []

    @property
    def clip_coef(self) -> Tensor | None:
        """What the gradients of the last step were multiplied by; None where that is not one number."""
        if not self._whole or self.total_norm is None:
            return None
        coef = clip_coef(self.total_norm, self._max_norm)
        return torch.where(self.total_norm.isfinite(), coef, 0.0) if self._nonfinite == "zero" else coef

    @property
    def skipped_steps(self) -> Tensor:
        """The number of steps that ``nonfinite="skip"`` has skipped, 0-dim."""
        return torch.tensor(0) if self._counts is None else self._counts[0].clone()

    @property
    def consecutive_skips(self) -> Tensor:
        """The number of those since the last step that was not skipped, 0-dim."""
        return torch.tensor(0) if self._counts is None else self._counts[1].clone()

    def remove(self) -> None:
        """Takes the hooks off the optimizer. Nothing happens if they are off."""
        while self._detach:
            self._detach.pop()()

    def __enter__(self) -> StepClip:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    # The hooks.

    def _attach(self, optimizer: Optimizer) -> None:
        mine = weakref.ref(optimizer)
        _clipped.add(optimizer)

        def forget() -> None:
            if (held := mine()) is not None:
                _clipped.discard(held)
                self._give_back(held)  # of a step that has raised

        self._detach = [
            forget,
            optimizer.register_step_pre_hook(self._before).remove,
            optimizer.register_step_post_hook(self._after).remove,
        ]

    def _before(self, optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        self._give_back(optimizer)  # a step before may have raised
        self._steps += 1
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._clip(optimizer, None)
            return None

        def clipped() -> object:
            self._give_back(optimizer)
            loss = closure()
            if self._detach:  # else the closure has removed the hooks, of which one gives back
                self._clip(optimizer, loss)
            return loss

        if len(args) > 1:
            return (args[0], clipped, *args[2:]), kwargs
        return args, {**kwargs, "closure": clipped}

    def _after(self, optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
        self._give_back(optimizer)

    def _give_back(self, optimizer: Optimizer) -> None:
        for parameter, grad in self._withheld:
            parameter.grad = grad
        self._withheld.clear()
        for name, value in self._replaced.items():
            if value is not _MISSING:
                setattr(optimizer, name, value)
            elif hasattr(optimizer, name):
                delattr(optimizer, name)
        self._replaced.clear()

    def _replace(self, optimizer: Optimizer, name: str, value: Tensor | None) -> None:
        self._replaced.setdefault(name, getattr(optimizer, name, _MISSING))
        setattr(optimizer, name, value)

    # The clip.

    @torch.no_grad()
    def _clip(self, optimizer: Optimizer, loss: object) -> None:
        parameters = clippable(optimizer)
        # What a GradScaler leaves to the optimizer: its gradients are still times this number.
        live = getattr(optimizer, "grad_scale", None) if _takes_scale(optimizer) else None
        inv_scale = None if live is None else as_number(live, live.device).reshape(()).reciprocal()
        if self._policy is not None:
            if inv_scale is not None:
                self._unscale(optimizer, _parameters(optimizer), inv_scale)
            norm = self._policy.clip_(parameters, loss=loss)
            self.total_norm = distributed.full(norm) if isinstance(norm, Tensor) else None
            return
        grads = gradients.of(parameters)
        nonfinite = ZERO if self._nonfinite == "zero" else PROPAGATE
        looks = self._nonfinite in ("raise", "skip")
        reason = self._why_not_deferred(optimizer)
        if reason and self._defer is True:
            raise ValueError(f"defer: {reason}")
        if self._whole and reason and live is None and not looks:
            clip = Clip(self._max_norm, self._norm_type, nonfinite)
            self.total_norm = distributed.full(grads.clip_grad_norm_(clip, _wide(grads)))
            return
        total_norm = None
        if self._whole or looks:
            clip = Clip(math.inf, self._norm_type, PROPAGATE, None, inv_scale)
            total_norm = self.total_norm = distributed.full(grads.norm_of(clip))
            if self._nonfinite == "raise":
                grads.check_finite(total_norm, self._norm_type)
            if self._nonfinite == "skip" and self._skips(optimizer, parameters, total_norm):
                return
        if total_norm is None or not self._whole:
            self._clip_apart(grads, parameters, nonfinite, inv_scale)
            if inv_scale is not None:
                clipped = set(parameters)
                self._unscale(optimizer, [p for p in _parameters(optimizer) if p not in clipped], inv_scale)
        elif reason:
            # The bound of gradients that stay times a scale: the coefficient alone is theirs.
            grads.clip_by_(Clip(self._max_norm, self._norm_type, nonfinite), total_norm)
        else:
            self._defer_to(optimizer, grads, live, total_norm)

    def _unscale(self, optimizer: Optimizer, parameters: list[Tensor], inv_scale: Tensor) -> None:
        """Takes the live scale off these gradients; those of all others have lost it."""
        gradients.of(parameters).scale_(inv_scale)
        self._replace(optimizer, "grad_scale", None)

    def _clip_apart(self, grads: Gradients, parameters: list[Tensor], nonfinite: int, inv_scale: Tensor | None) -> None:
        """Each element by itself, or each gradient by its own norm."""
        if self._clip_value is not None:
            if nonfinite == PROPAGATE and inv_scale is None:
                return grads.clip_grad_value_(-self._clip_value, self._clip_value)
            clip = Clip(math.inf, math.inf, nonfinite, None, inv_scale)
            return grads.clip_scaled_value_(clip, -self._clip_value, self._clip_value)
        clip = Clip(self._max_norm, self._norm_type, nonfinite, None, inv_scale)
        lists = [gradients.of([parameter]) for parameter in parameters]  # all are checked before one is written
        each_norm = [
            distributed.full(each.clip_grad_norm_(clip, _wide(each))) for each in lists if type(each) is not Nothing
        ]
        if each_norm:
            norms = torch.stack([norm.to(each_norm[0].device) for norm in each_norm])
            self.total_norm = torch.linalg.vector_norm(norms, self._norm_type)

    def _why_not_deferred(self, optimizer: Optimizer) -> str | None:
        """Why the coefficient is not left to the optimizer."""
        if self._defer is False:
            return "not asked for"
        if not self._whole:
            return "expected a max_norm for all gradients together, which has one coefficient"
        if self._nonfinite == "zero":
            return "nonfinite='zero' writes the gradients"
        if not _takes_scale(optimizer):
            return f"expected an optimizer with fused=True in all groups, got {type(optimizer).__name__} without"
        if _leaves_out(optimizer):
            return "expected all groups to be clipped, got one with clip_grad=False"
        return None

    def _defer_to(self, optimizer: Optimizer, grads: Gradients, live: Tensor | None, total_norm: Tensor) -> None:
        coef = clip_coef(total_norm, self._max_norm)
        on_cpu = coef.device.type == "cpu"
        if on_cpu and coef.item() == 1.0:  # the host has it already
            return
        scale = coef.reciprocal()
        if live is not None:
            scale = scale * as_number(live, scale.device).reshape(())
        scale = scale.to(torch.float32)
        # The kernels take a float32, which cannot hold what divides a norm of 1e39 to a small bound.
        too_large = on_cpu and coef.item() > 0 and math.isinf(scale.item())
        if too_large or (self._defer == "auto" and not on_cpu):
            return grads.clip_by_(Clip(self._max_norm, self._norm_type), total_norm)
        self._replace(optimizer, "grad_scale", scale)

    # What is skipped.

    def _skips(self, optimizer: Optimizer, parameters: list[Tensor], total_norm: Tensor) -> bool:
        """Counts a step that is not finite, and has it skipped; whether there is nothing left to clip."""
        bad = ~total_norm.isfinite()
        if self._counts is None:
            self._counts = torch.zeros(2, dtype=torch.int64, device=bad.device)
        self._counts[0] += bad
        self._counts[1].add_(1).mul_(bad)
        if bad.device.type != "cpu" and _takes_scale(optimizer) and not _leaves_out(optimizer):
            found = bad.to(torch.float32)
            live = getattr(optimizer, "found_inf", None)
            if live is not None:
                found = torch.maximum(found, live.to(found.device).reshape(()).clamp(max=1.0))
            self._raise_after(self._arrived(self._counts), optimizer, parameters)
            self._replace(optimizer, "found_inf", found)
            return False
        if not bad.item():  # the one documented wait
            return False
        self._raise_after(int(self._counts[1]) if self._max_skips else 0, optimizer, parameters)
        # A parameter without gradient is not stepped.
        self._withheld = [(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None]
        for parameter, _ in self._withheld:
            parameter.grad = None
        return True

    def _arrived(self, counts: Tensor) -> int:
        """The last count of skips in a row that has come from the device."""
        if not self._max_skips or torch.cuda.is_current_stream_capturing():
            return 0
        count = 0
        if self._arriving is not None:
            pinned, event = self._arriving
            if not event.query():
                return 0
            count = int(pinned)
        pinned, event = torch.empty((), dtype=torch.int64, pin_memory=True), torch.cuda.Event()
        pinned.copy_(counts[1], non_blocking=True)
        event.record()
        self._arriving = pinned, event
        return count

    def _raise_after(self, count: int, optimizer: Optimizer, parameters: list[Tensor]) -> None:
        if self._max_skips and count >= self._max_skips:
            raise RuntimeError(
                f"max_skips: at step {self._steps}, {count} steps in a row were skipped because the norm of the "
                f"gradients is not finite; the first gradient that is not: {_first_bad(optimizer, parameters)}"
            )


def _takes_scale(optimizer: Optimizer) -> bool:
    """Whether the kernel of an optimizer divides by ``grad_scale`` and heeds ``found_inf``, as fused ones do."""
    fused = all(group.get("fused") for group in optimizer.param_groups)
    return fused and getattr(optimizer, "_step_supports_amp_scaling", False)


def _is_clipped(group: dict[str, Any]) -> bool:
    return group.get("clip_grad", True) is not False


def _leaves_out(optimizer: Optimizer) -> bool:
    return not all(map(_is_clipped, optimizer.param_groups))


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _first_bad(optimizer: Optimizer, parameters: list[Tensor]) -> str:
    """The first parameter whose gradient is not finite; all are read in one copy."""
    with_grads = [parameter for parameter in parameters if parameter.grad is not None]
    norms = []
    for parameter in with_grads:
        grads = gradients.of([parameter], writes=False)
        norms.append(distributed.full(grads.total_norm(math.inf)))
    found = torch.stack([norm.to(norms[0].device) for norm in norms]).isfinite() if norms else torch.ones(0)
    finite = found.tolist()  # once, when the error is raised
    bad = next((p for p, good in zip(with_grads, finite, strict=True) if not good), None)
    for g, group in enumerate(optimizer.param_groups):
        for i, parameter in enumerate(group["params"]):
            if parameter is bad:
                name = group["param_names"][i] if "param_names" in group else f"param_groups[{g}]['params'][{i}]"
                return f"{name}, of shape {tuple(parameter.shape)}"
    return "none by itself"


def _wide(grads: Gradients) -> torch.dtype | None:
    return wide_dtype(grads.tensors[0].device) if grads.tensors else None


def _innermost(optimizer: Optimizer) -> Optimizer:
    """The optimizer itself, of what wraps it as Accelerate does."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer: expected a torch.optim.Optimizer, got {optimizer!r}")
    return optimizer


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    return _to_float(value, name)


def _bound(name: str, value: object) -> float:
    bound = _number(name, value)
    if not bound > 0:
        raise ValueError(f"{name}: expected a number greater than 0, got {value!r}")
    return bound
