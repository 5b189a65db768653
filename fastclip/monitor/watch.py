"""Monitors in the place of torch's functions: of a model that is known, or of whatever model a program clips."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..clip import as_list
from .monitor import GradMonitor

Find = Callable[[Sequence[Tensor]], "GradMonitor | None"]
# torch calls the last one with gradients that its own clip_grad_norm_ was given.
_WATCHED = ("clip_grad_norm_", "clip_grad_value_", "clip_grads_with_norm_")


def watched(monitor: GradMonitor) -> dict[str, Callable[[Callable], Callable]]:
    """What makes, of each function by name, one that lets a monitor clip the parameters of its model."""
    if not isinstance(monitor, GradMonitor):
        raise TypeError(f"monitor: expected a GradMonitor, got {monitor!r}")
    return _makers(lambda parameters: monitor if monitor.covers(parameters) else None)


def watched_process(path: str) -> dict[str, Callable[[Callable], Callable]]:
    """The same for a program that is not known: each model gets a monitor when its gradients are first clipped.

    The first writes to the path, the next ones beside it: log.jsonl, log.1.jsonl.
    """
    monitors: list[GradMonitor] = []

    def find(parameters: Sequence[Tensor]) -> GradMonitor | None:
        if not parameters:
            return None
        for monitor in monitors:
            if monitor.covers(parameters):
                return monitor
        place = Path(path)
        if monitors:
            place = place.with_name(f"{place.stem}.{len(monitors)}{place.suffix}")
        monitors.append(GradMonitor(_named(parameters), writer=place, keep=1))
        return monitors[-1]

    return _makers(find)


def _makers(find: Find) -> dict[str, Callable[[Callable], Callable]]:
    return {name: functools.partial(_watch, name, find) for name in _WATCHED}


def _watch(name: str, find: Find, below: Callable) -> Callable:
    @functools.wraps(below)
    def clip(parameters: Any, *args: Any, **kwargs: Any) -> Any:
        # An iterator can be gone through once.
        parameters = as_list(parameters, warn=name == "clip_grad_norm_")
        monitor = find(parameters)
        if monitor is None:
            return below(parameters, *args, **kwargs)
        if name == "clip_grads_with_norm_":
            return monitor.clip_grads_with_norm_(parameters, *args, **kwargs)
        return getattr(monitor, name)(*args, **kwargs, parameters=parameters)

    return clip


def _named(parameters: Sequence[Tensor]) -> list[tuple[str, Tensor]]:
    """The parameters of the smallest module that has most of some, with its names; numbers for those that it lacks."""
    wanted = {id(parameter) for parameter in parameters}
    best: tuple[int, int, int] = (0, 0, 0)
    named: list[tuple[str, Tensor]] = []
    # By their types: to ask an object for its class may run its code.
    for module in [each for each in gc.get_objects() if issubclass(type(each), nn.Module)]:
        own: list[tuple[str, Tensor]] = [*module.named_parameters()]
        rank = (sum(id(p) in wanted for _, p in own), -len(own), -sum(1 for _ in module.modules()))
        if rank[0] > 0 and (not named or rank > best):
            best, named = rank, own
    known = {id(parameter) for _, parameter in named}
    rest = [p for p in parameters if id(p) not in known]
    return [*named, *((f"parameters.{i}", parameter) for i, parameter in enumerate(rest))]
