"""Interleaved timing of several calls over the same gradients."""

import gc
import random
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Entry:
    """One thing to time: `prepare` and entering `scope` stay outside the timed region."""

    name: str
    call: Callable[[], object]
    prepare: Callable[[], object]
    scope: Callable[[], AbstractContextManager] = nullcontext


@dataclass(frozen=True)
class Plan:
    """When to stop: after `budget_s` seconds, but not before `least` rounds and not after `most`."""

    budget_s: float
    least: int
    most: int


def measure(entries: list[Entry], plan: Plan, device: torch.device) -> dict[str, dict[str, float]]:
    """Time every entry once per round, each round in another order, so that noise and drift fall on all alike.

    Returns:
        For every name: `ms`, the median, `p10` and `p90`, and the number of `rounds`.
    """
    order, shuffle = list(entries), random.Random(0).shuffle
    samples: dict[str, list[float]] = {entry.name: [] for entry in entries}
    gc.disable()
    try:
        start, rounds = time.perf_counter(), 0
        while rounds < plan.least or (rounds < plan.most and time.perf_counter() - start < plan.budget_s):
            shuffle(order)
            for entry in order:
                samples[entry.name].append(_once_ms(entry, device))
            rounds += 1
    finally:
        gc.enable()
    return {name: _summary(ms) for name, ms in samples.items()}


def _once_ms(entry: Entry, device: torch.device) -> float:
    entry.prepare()
    with entry.scope():
        _wait(device)
        start = time.perf_counter()
        entry.call()
        _wait(device)
        return (time.perf_counter() - start) * 1e3


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _summary(ms: list[float]) -> dict[str, float]:
    deciles = statistics.quantiles(ms, n=10, method="inclusive")
    return {"ms": statistics.median(ms), "p10": deciles[0], "p90": deciles[-1], "rounds": len(ms)}
