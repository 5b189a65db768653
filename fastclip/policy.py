"""Clips whose bound follows the training: AutoClip, ZClip, AdaGC, and steps skipped on a spike.

A policy is called where ``clip_grad_norm_`` would be. What it remembers lives where the gradients are, and no call
waits for the device. A norm that is not finite enters no history and no average: it is counted, and the next step goes
on as if there had been none. Ranks act alike, because what decides is the norm over all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import SupportsFloat

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from . import distributed, gradients
from .arithmetic import indices, wide_dtype
from .clip import _to_float
from .functional import _order, _to_bound, _to_number

__all__ = ["AdaGC", "AutoClip", "SkipOnSpike", "ZClip"]


class Policy:
    """What every policy shares. A subclass names its state and computes a coefficient from the norm.

    Attributes:
        nonfinite_steps: 0-dim, how many norms were not finite.
        steps: 0-dim, how many were.
    """

    _lengthens: tuple[str, ...] = ()  # entries of the state whose length the arguments do not tell

    def __init__(self) -> None:
        self._state: dict[str, Tensor] = {}

    def clip_(self, parameters: Tensor | Iterable[Tensor], *, loss: Tensor | float | None = None) -> Tensor:
        """Clips the gradients of parameters, in place.

        Args:
            parameters: a Tensor or an iterable of Tensors whose ``.grad`` is clipped.
            loss (Tensor or float, optional): of this step, for policies that look at it.

        Returns:
            Tensor: 0-dim norm before clipping.
        """
        parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        read = gradients.of(parameters)
        if isinstance(read, gradients.Nothing):
            return read.finish(read.total_norm(2.0), None)
        with torch.no_grad():
            return self._clip_(read, parameters, loss)

    def _clip_(self, read: gradients.Gradients, parameters: list[Tensor], loss: Tensor | float | None) -> Tensor:
        norm = read.total_norm(2.0)
        read.scale_(self._advance(norm, self._coefficient, loss))
        return read.finish(norm, None)

    def _initial(self, device: torch.device) -> dict[str, Tensor]:
        """The state before the first step, beside the count of steps."""
        raise NotImplementedError

    def _coefficient(self, state: dict[str, Tensor], norm: Tensor, loss: Tensor | float | None) -> Tensor:
        """The coefficient of the gradients; replaces entries of `state`, never in place."""
        raise NotImplementedError

    def _advance(self, norm: Tensor, compute: Callable[..., Tensor], *arguments: object) -> Tensor:
        """What is computed from the state, the norm and arguments; keeps the new state if the norm is finite."""
        device, wide = norm.device, wide_dtype(norm.device)
        if not self._state:
            zero = torch.zeros((), dtype=torch.int64, device=device)
            self._state = {"steps": zero, "calls": zero, **self._initial(device)}
        old = {
            name: value.to(device, wide if value.is_floating_point() else value.dtype)
            for name, value in self._state.items()
        }
        new, norm = dict(old), norm.to(wide)
        coef = compute(new, norm, *arguments)
        finite = norm < math.inf  # NaN is not
        self._state = {
            name: value if value is old[name] else torch.where(finite, value, _padded(old[name], value.numel()))
            for name, value in new.items()
        }
        self._state["steps"], self._state["calls"] = old["steps"] + finite, old["calls"] + 1
        return coef

    @property
    def steps(self) -> Tensor:
        return self._state["steps"].clone() if self._state else torch.tensor(0)

    @property
    def nonfinite_steps(self) -> Tensor:
        return self._state["calls"] - self._state["steps"] if self._state else torch.tensor(0)

    def state_dict(self) -> dict[str, Tensor]:
        """All that a policy remembers, as tensors: one that loads it goes on as this one would."""
        state = {name: value.clone() for name, value in self._state.items()}
        if state:
            state["nonfinite_steps"] = state.pop("calls") - state["steps"]
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if not isinstance(state, Mapping):
            raise TypeError(f"state: expected what state_dict() of a {type(self).__name__} gave, got {state!r}")
        found = {name: torch.as_tensor(value).clone() for name, value in state.items()}
        known = {"steps": torch.tensor(0), "nonfinite_steps": torch.tensor(0), **self._initial(torch.device("cpu"))}
        if found and found.keys() != known.keys():
            raise ValueError(f"state: expected what state_dict() of a {type(self).__name__} gave, got {list(state)}")
        for name, value in found.items():
            if value.dim() != known[name].dim() or (value.shape != known[name].shape and name not in self._lengthens):
                what = f"{name!r} of shape {tuple(known[name].shape)} for these arguments"
                raise ValueError(f"state: expected {what}, got {tuple(value.shape)}")
            if not known[name].is_floating_point():  # counts, where everything was cast
                found[name] = value.to(known[name].dtype)
        if found:
            found["calls"] = found["steps"] + found.pop("nonfinite_steps")
        self._state = found

    def reset(self) -> None:
        """Forgets everything."""
        self._state = {}


class AutoClip(Policy):
    """Clips the norm of all gradients to a percentile of the norms so far.

    The history is kept sorted: a norm is put into its place on the device, in one pass. It takes 8 bytes for each step
    so far, or 16 for each of ``history`` steps.

    Args:
        percentile (float): of the norms, from 0 to 100, interpolated linearly.
        history (int, optional): how many of the latest norms count; None for all.
        include_current (bool): whether the norm of a step enters before the percentile is taken, as in the paper. If
            not, the first step has no bound but ``max_norm``.
        max_norm (float, optional): a bound on top.

    Example:
        >>> import torch, fastclip
        >>> weight, policy = torch.nn.Parameter(torch.zeros(2)), fastclip.policy.AutoClip(percentile=50.0)
        >>> for scale in (1.0, 1.0, 10.0):
        ...     weight.grad = torch.tensor([3.0, 4.0]) * scale
        ...     norm = policy.clip_([weight])
        >>> norm, weight.grad
        (tensor(50.), tensor([3., 4.]))

    Follows Seetharaman et al. (arXiv:2007.14469); the package ``autoclip`` takes quantile 0.9 of the past 1,000, of
    each parameter by itself.
    """

    def __init__(
        self,
        percentile: float = 10.0,
        history: int | None = None,
        include_current: bool = True,
        max_norm: float | None = None,
    ) -> None:
        super().__init__()
        self.percentile = _to_bound(percentile, "percentile")
        if self.percentile > 100:
            raise ValueError(f"percentile: expected a number from 0 to 100, got {percentile!r}")
        self.history = None if history is None else _to_count(history, "history")
        self.include_current = include_current
        self.max_norm = math.inf if max_norm is None else _to_bound(max_norm, "max_norm")
        self._lengthens = ("sorted",) if self.history is None else ()
        self._most = 0  # calls so far, of which some may not have entered the history

    def _initial(self, device: torch.device) -> dict[str, Tensor]:
        size = 1024 if self.history is None else self.history
        state = {"sorted": torch.full((size,), math.inf, dtype=wide_dtype(device), device=device)}
        if self.history is not None:
            state["ring"] = state["sorted"]
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        super().load_state_dict(state)
        self._most = int(state["steps"]) if state else 0

    def reset(self) -> None:
        super().reset()
        self._most = 0

    def _coefficient(self, state: dict[str, Tensor], norm: Tensor, loss: Tensor | float | None) -> Tensor:
        values, last = state["sorted"], state["steps"]
        self._insert(state, norm)
        if self.include_current:
            values = state["sorted"]
        else:
            last = last - 1
        bound = self._percentile(values, last)
        bound = bound.clamp(max=self.max_norm)
        return (bound / (norm + 1e-6)).clamp(max=1.0).masked_fill(bound == math.inf, 1.0)

    def _insert(self, state: dict[str, Tensor], norm: Tensor) -> None:
        values = state["sorted"]
        if self.history is None:
            self._most += 1
            if self._most > len(values):
                values = _padded(values, 2 * len(values))
        else:
            # The oldest makes room; of a ring that is not full it is infinity, the padding.
            oldest = state["ring"].index_select(0, state["steps"] % self.history)
            state["ring"] = _put(state["ring"], state["steps"], norm)
            values = torch.where(values < oldest, values, pad(values[1:], (0, 1), value=math.inf))
        # Where a value and the one before it have the norm between them, the norm; above it the one before.
        before = pad(values[:-1], (1, 0), value=-math.inf)
        state["sorted"] = torch.maximum(torch.fmin(values, norm), before)

    def _percentile(self, values: Tensor, last: Tensor) -> Tensor:
        """Of the values up to the one at `last`; infinity of none."""
        at = last.clamp(0, len(values) - 1).to(values.dtype) * (self.percentile / 100)
        low, high = values[torch.stack([at, at.ceil()]).long()].unbind()
        return torch.fmax(torch.lerp(low, high, at.frac()), low)  # not the NaN between two infinities


class ZClip(Policy):
    """Clips the norm of all gradients where it stands out from a running mean and variance.

    The first ``warmup_steps`` norms are collected, 8 bytes each, and clipped to ``max_norm``; their mean and population
    variance start the running ones.

    Args:
        alpha (float): weight of the past in mean and variance.
        z_threshold (float): how many standard deviations above the mean a spike is.
        max_norm (float, optional): a bound on top.
        warmup_steps (int): finite norms before the first spike can be.
        mode (str): "zscore", or "percentile", where a spike is clipped to mean + z_threshold deviations.
        target (str): of "zscore": "adaptive", the lower the larger the spike; or "mean".
        clip_factor (float): of the adaptive target.
        skip_on_spike (bool): whether a spike leaves mean and variance as they are.
        eps (float): added to the standard deviation.

    Example:
        >>> import torch, fastclip
        >>> weight, policy = torch.nn.Parameter(torch.zeros(1)), fastclip.policy.ZClip(max_norm=None, warmup_steps=4)
        >>> for grad in (1.0, 2.0, 1.0, 2.0, 50.0):
        ...     weight.grad = torch.tensor([grad])
        ...     norm = policy.clip_([weight])
        >>> norm, weight.grad
        (tensor(50.), tensor([1.5322]))

    Follows Kumar et al. (arXiv:2504.02507) and their package ``zclip``.
    """

    def __init__(
        self,
        alpha: float = 0.97,
        z_threshold: float = 2.5,
        max_norm: float | None = 1.0,
        warmup_steps: int = 25,
        mode: str = "zscore",
        target: str = "adaptive",
        clip_factor: float = 1.0,
        skip_on_spike: bool = False,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.alpha, self.z_threshold = _to_fraction(alpha, "alpha"), _to_bound(z_threshold, "z_threshold")
        self.max_norm = math.inf if max_norm is None else _to_bound(max_norm, "max_norm")
        self.warmup_steps = _to_count(warmup_steps, "warmup_steps")
        self.mode, self.target = (
            _one_of(mode, "mode", "zscore", "percentile"),
            _one_of(target, "target", "adaptive", "mean"),
        )
        self.clip_factor, self.eps = _to_bound(clip_factor, "clip_factor"), _to_bound(eps, "eps")
        self.skip_on_spike = skip_on_spike

    def _initial(self, device: torch.device) -> dict[str, Tensor]:
        zero = torch.zeros((), dtype=wide_dtype(device), device=device)
        return {"mean": zero, "var": zero, "warmup": zero.repeat(self.warmup_steps)}

    def _coefficient(self, state: dict[str, Tensor], norm: Tensor, loss: Tensor | float | None) -> Tensor:
        mean, var, late = state["mean"], state["var"], state["steps"] >= self.warmup_steps
        state["warmup"] = _put(state["warmup"], state["steps"], norm)  # the latest norms, of no use once it is late
        std = var.sqrt()
        if self.mode == "percentile":
            target = torch.add(mean, std, alpha=self.z_threshold)
            spike = late & (norm > target)
        else:
            z = (norm - mean) / (std + self.eps)
            spike, target = late & (z > self.z_threshold), mean
            if self.target == "adaptive":  # (mean + z_threshold^2 std / z) clip_factor
                target = torch.addcdiv(mean, std * self.z_threshold, z, value=self.z_threshold)
                target = target if self.clip_factor == 1 else target * self.clip_factor
        value = torch.where(spike, target, norm)
        new_mean = torch.lerp(value, mean, self.alpha)
        new_var = torch.lerp((value - new_mean).square(), var, self.alpha)
        if self.skip_on_spike:
            new_mean, new_var = torch.where(spike, mean, new_mean), torch.where(spike, var, new_var)
        first_var, first_mean = torch.var_mean(state["warmup"], correction=0)
        state["mean"] = torch.where(late, new_mean, first_mean)
        state["var"] = torch.where(late, new_var, first_var)
        bound = value.clamp(max=self.max_norm)
        stays = norm <= bound
        if self.max_norm == math.inf:
            stays = stays | ~late  # there is no bound yet, also of a norm that is NaN
        return (bound / (norm + 1e-6)).masked_fill(stays, 1.0)


class AdaGC(Policy):
    """Clips each gradient by a running average of its own clipped norms.

    In the first ``warmup_steps`` all gradients together are clipped to ``max_norm``, and each gradient's average starts
    as the least of its norms; a norm of 0, of a tensor that was not used, starts none. It takes 8 bytes for each
    parameter.

    Args:
        max_norm (float): of all gradients, during warm-up.
        ratio (float): how far above its average a norm may be.
        beta (float): weight of the past in the average.
        warmup_steps (int): finite norms before the first clip of a gradient by itself.
        eps (float): added to norms that are divided by.

    Example:
        >>> import torch, fastclip
        >>> weight, policy = torch.nn.Parameter(torch.zeros(2)), fastclip.policy.AdaGC(warmup_steps=1)
        >>> for scale in (1.0, 100.0):
        ...     weight.grad = torch.tensor([0.3, 0.4]) * scale
        ...     norm = policy.clip_([weight])
        >>> norm, weight.grad
        (tensor(50.), tensor([0.3120, 0.4160]))

    Follows Wang et al. (arXiv:2502.11034) and their code; ``pytorch_optimizer`` has other defaults. Of DTensors every
    rank has to have the same gradients.
    """

    _lengthens = ("average",)

    def __init__(
        self,
        max_norm: float = 1.0,
        ratio: float = 1.04,
        beta: float = 0.99,
        warmup_steps: int = 100,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.max_norm, self.ratio = _to_bound(max_norm, "max_norm"), _to_bound(ratio, "ratio")
        if not 0 < self.ratio < math.inf:
            raise ValueError(f"ratio: expected a finite number above 0, got {ratio!r}")
        self.beta, self.eps = _to_fraction(beta, "beta"), _to_bound(eps, "eps")
        self.warmup_steps = _to_count(warmup_steps, "warmup_steps", least=0)
        self._parameters = 0
        self._last: tuple[list[int], Tensor] | None = None  # the latest places, as numbers and as a tensor

    def _initial(self, device: torch.device) -> dict[str, Tensor]:
        return {"average": torch.full((self._parameters,), math.inf, dtype=wide_dtype(device), device=device)}

    def _clip_(self, read: gradients.Gradients, parameters: list[Tensor], loss: Tensor | float | None) -> Tensor:
        known = self._state.get("average")
        if known is not None and len(known) != len(parameters):
            raise ValueError(f"parameters: expected the same {len(known)} at every step, got {len(parameters)}")
        self._parameters = len(parameters)
        norms = read.norms(2.0)
        places = self._places(_owners(read, parameters), norms.device)
        # In the order of the list, which ranks have in common: to the same bits.
        listed = norms if places is None else norms.new_zeros(len(parameters)).index_copy_(0, places, norms)
        norm = torch.linalg.vector_norm(listed)
        coefs = self._advance(norm, self._coefficients, norms, places)
        read.scale_each_(coefs)
        return read.finish(norm, None)

    def reset(self) -> None:
        super().reset()
        self._last = None

    def _places(self, owners: list[int] | None, device: torch.device) -> Tensor | None:
        if owners is None:
            return None
        if self._last is not None and self._last[0] == owners and self._last[1].device == device:
            return self._last[1]
        places = indices(owners, device)
        if type(places) is Tensor:  # nothing of a trace is kept
            self._last = owners, places
        return places

    def _coefficients(self, state: dict[str, Tensor], norm: Tensor, norms: Tensor, places: Tensor | None) -> Tensor:
        warm = state["steps"] < self.warmup_steps
        average = state["average"] if places is None else state["average"].index_select(0, places)
        together = ((norm + self.eps).reciprocal() * self.max_norm).clamp(max=1.0)
        bound = average * self.ratio
        own = (bound / (norms + self.eps)).masked_fill(norms <= bound, 1.0)
        least = torch.fmin(average, torch.threshold(norms, 0.0, math.inf) * together)  # a norm of 0 counts for none
        running = torch.lerp(torch.minimum(norms, bound), average, self.beta)
        updated = torch.where(warm | (average == math.inf), least, running)
        state["average"] = updated if places is None else state["average"].index_copy(0, places, updated)
        return torch.where(warm, together, own)


class SkipOnSpike(Policy):
    """Says which steps to skip: those whose norm, or loss, stands out from the latest ones.

    Gradients stay as they are, or are clipped to ``max_norm``. It takes 8 bytes for each of ``window`` steps, and as
    much for losses.

    Args:
        window (int): how many of the latest finite norms count.
        sigma (float): how many sample standard deviations above their mean a spike is.
        min_history (int): norms before the first step can be skipped for a spike; one whose norm is not finite always
            is.
        max_norm (float, optional): bound of the norm of all gradients.

    Attributes:
        skip: 0-dim float32, on the device of the gradients: 1 if this step is to be skipped. torch's fused optimizers
            read it: ``optimizer.found_inf = policy.skip`` before ``optimizer.step()``.

    Example:
        >>> import torch, fastclip
        >>> weight, policy = torch.nn.Parameter(torch.zeros(1)), fastclip.policy.SkipOnSpike(min_history=4)
        >>> for grad in (1.0, 1.1, 0.9, 1.0, 7.0):
        ...     weight.grad = torch.tensor([grad])
        ...     norm = policy.clip_([weight])
        >>> norm, policy.skip
        (tensor(7.), tensor(1.))

    Follows OLMo-core's SkipStepOptimizer, whose window also takes norms that are not finite. With a ``loss`` all ranks
    of the default process group agree, by one reduction.
    """

    def __init__(
        self, window: int = 128, sigma: float = 6.0, min_history: int = 64, max_norm: float | None = None
    ) -> None:
        super().__init__()
        self.window, self.sigma = _to_count(window, "window", least=2), _to_bound(sigma, "sigma")
        self.min_history = _to_count(min_history, "min_history", least=2)
        if self.min_history > self.window:
            raise ValueError(f"min_history: expected at most window, {self.window}, got {min_history!r}")
        self.max_norm = math.inf if max_norm is None else _to_bound(max_norm, "max_norm")
        self.skip = torch.zeros(())

    def reset(self) -> None:
        super().reset()
        self.skip = torch.zeros_like(self.skip)

    def _initial(self, device: torch.device) -> dict[str, Tensor]:
        empty = torch.full((self.window,), math.nan, dtype=wide_dtype(device), device=device)
        zero = torch.zeros((), dtype=torch.int64, device=device)
        return {"norms": empty, "losses": empty, "loss_steps": zero}

    def _clip_(self, read: gradients.Gradients, parameters: list[Tensor], loss: Tensor | float | None) -> Tensor:
        norm = read.total_norm(2.0)
        self.skip = self._advance(norm, self._whether, loss)
        if self.max_norm < math.inf:
            read.clip_with_norm_(self.max_norm, norm)
        return read.finish(norm, None)

    def _whether(self, state: dict[str, Tensor], norm: Tensor, loss: Tensor | float | None) -> Tensor:
        skip = self._is_spike(state["norms"], state["steps"], norm) | ~(norm < math.inf)
        state["norms"] = _put(state["norms"], state["steps"], norm)
        if loss is not None:
            loss = _to_loss(loss, norm)
            known = loss.abs() < math.inf
            skip = skip | self._is_spike(state["losses"], state["loss_steps"], loss) | ~known
            state["losses"] = torch.where(known, _put(state["losses"], state["loss_steps"], loss), state["losses"])
            state["loss_steps"] = state["loss_steps"] + known
        skip = skip.to(torch.float32)
        if loss is not None and dist.is_available() and (world := dist.group.WORLD) is not None:
            skip = distributed.all_reduce(skip, math.inf, world)
        return skip

    def _is_spike(self, values: Tensor, steps: Tensor, value: Tensor) -> Tensor:
        """One-sided, against the window without the newest value; what is not there yet is NaN."""
        count = steps.clamp(max=self.window)
        mean = values.nansum() / count
        var = (values - mean).square().nansum() / (count - 1)
        return (steps >= self.min_history) & (value > torch.add(mean, var.sqrt(), alpha=self.sigma))


def _put(ring: Tensor, steps: Tensor, value: Tensor) -> Tensor:
    """The latest values with one more in the place of the oldest."""
    return ring.index_put((steps % len(ring),), value)


def _padded(values: Tensor, size: int) -> Tensor:
    more = size - values.numel()
    return pad(values, (0, more), value=math.inf) if more else values


def _owners(read: gradients.Gradients, parameters: list[Tensor]) -> list[int] | None:
    """The number of the parameter of each tensor that was read; None where all have one, in their order."""
    if isinstance(read, gradients.Plain) and len(read.tensors) == len(parameters):
        return None
    grads = [parameter.grad for parameter in parameters]
    held = [i for i, grad in enumerate(grads) if grad is not None]
    order = _order(read, [grad for grad in grads if grad is not None])
    if order is not None:
        return [i for _, i in sorted(zip(order, held, strict=True))]
    return None if len(held) == len(parameters) else held


def _to_loss(value: Tensor | float, like: Tensor) -> Tensor:
    if not isinstance(value, Tensor):
        return like.new_full((), _to_float(value, "loss"))
    if value.numel() != 1 or value.is_complex():
        raise ValueError(f"loss: expected a real number, got a {value.dtype} Tensor of shape {tuple(value.shape)}")
    return distributed.full(value).detach().to(like).reshape(())


def _to_count(value: SupportsFloat, argument: str, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{argument}: expected an integer of at least {least}, got {value!r}")
    return value


def _to_fraction(value: SupportsFloat, argument: str) -> float:
    number = _to_number(value, argument)
    if not 0 <= number <= 1:
        raise ValueError(f"{argument}: expected a number from 0 to 1, got {value!r}")
    return number


def _one_of(value: object, argument: str, *known: str) -> str:
    if value not in known:
        raise ValueError(f"{argument}: expected one of {', '.join(map(repr, known))}, got {value!r}")
    return value
