"""What a GPU does for one call, beside its time: what it launches, the replay of a graph, and warm caches."""

import statistics
from collections.abc import Callable

import torch

from .timing import Entry, cuda_clock

_ROUNDS = 9


def details(entry: Entry, warm: Callable[[], object]) -> dict[str, float | int | None]:
    """What --details adds to a row.

    Args:
        entry: the call, and what puts caches and gradients in order before it.
        warm: the same, but it leaves the gradients in the cache, as far as they fit.

    Returns:
        `launches`, the kernels, copies and fills of one call; `graph_ms`, the median time of the device for a replay of
        the call as a graph, None where it cannot be captured; `warm_ms`, that of a call after `warm`.
    """
    in_cache = Entry(entry.name, entry.call, warm, entry.scope)
    warm_ms = statistics.median(cuda_clock(in_cache)["ms"] for _ in range(_ROUNDS))
    return {"launches": len(launches(entry)), "graph_ms": _graph_ms(entry), "warm_ms": warm_ms}


def launches(entry: Entry) -> list[str]:
    """The names of what one call puts on the device."""
    entry.prepare()
    torch.cuda.synchronize()
    with entry.scope(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        entry.call()
        torch.cuda.synchronize()
    on_device = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return [name for name in on_device if "Sync" not in name]


def _graph_ms(entry: Entry) -> float | None:
    entry.prepare()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with entry.scope(), torch.cuda.graph(graph):
            entry.call()
    except RuntimeError:  # it waits for the device, say
        torch.cuda.synchronize()
        return None
    times = []
    for _ in range(_ROUNDS):
        entry.prepare()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)
