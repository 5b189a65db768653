"""Interleaved timing of several calls over the same gradients."""

import gc
import random
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

# How long the device spins before a timed call: twice what the host needs to queue it, and this.
_LEAD_MS = 0.2
# Of the fastest clock; on a slower one the spin is longer, which is no harm.
_CYCLES_PER_MS = 2_000_000


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
        For every name: `ms`, the median, `p10` and `p90`, and the number of `rounds`; from a clock that tells the
        host's time apart, its median as `host_ms`.
    """
    order, shuffle, clock = list(entries), random.Random(0).shuffle, CLOCKS[device.type]
    samples: dict[str, list[dict[str, float]]] = {entry.name: [] for entry in entries}
    gc.disable()
    try:
        start, rounds = time.perf_counter(), 0
        while rounds < plan.least or (rounds < plan.most and time.perf_counter() - start < plan.budget_s):
            shuffle(order)
            for entry in order:
                samples[entry.name].append(clock(entry))
            rounds += 1
    finally:
        gc.enable()
    return {name: _summary(rows) for name, rows in samples.items()}


def host_clock(entry: Entry) -> dict[str, float]:
    """One call, which is done when it returns."""
    entry.prepare()
    with entry.scope():
        return {"ms": _host_ms(entry.call)}


def cuda_clock(entry: Entry) -> dict[str, float]:
    """Two calls: the host's time on an empty queue, then the device's between two events.

    Before the second the device spins until the host has queued the whole call, so that it never waits for the host.
    """
    entry.prepare()
    with entry.scope():
        torch.cuda.synchronize()
        host_ms = _host_ms(entry.call)
    entry.prepare()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with entry.scope():
        torch.cuda._sleep(int((2 * host_ms + _LEAD_MS) * _CYCLES_PER_MS))
        begin.record()
        entry.call()
        end.record()
        torch.cuda.synchronize()
    return {"ms": begin.elapsed_time(end), "host_ms": host_ms}


CLOCKS: dict[str, Callable[[Entry], dict[str, float]]] = {"cpu": host_clock, "cuda": cuda_clock}


def _host_ms(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def _summary(rows: list[dict[str, float]]) -> dict[str, float]:
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    medians = {name: statistics.median(column) for name, column in columns.items()}
    deciles = statistics.quantiles(columns["ms"], n=10, method="inclusive")
    return medians | {"p10": deciles[0], "p90": deciles[-1], "rounds": len(rows)}
