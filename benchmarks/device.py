"""What the bench does not tell of a GPU: launches, replays of a graph, warm caches, and where the host's time goes.

    python benchmarks/device.py --out results  # device.md, written after every case; --device cpu tries it out

Times are medians in microseconds. Cold: 512 MiB of other memory are written before the call; warm: the same gradients
were read by the call before. Of the host: reading the list is apart from what follows, the launches.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fastclip import gradients
from fastclip.bench.cases import REGIMES, Case, cases, gpu_cases
from fastclip.bench.gradients import Gradients
from fastclip.bench.providers import BASELINE, available
from fastclip.bench.timing import CLOCKS, Entry

CASES = ("llama3-8b-1of64", "500-mixed", "lora-8b-r16", "1000x64x64", "2000-tiny", "10000-tiny")
COLUMNS = ("case", "regime", "provider", "launches", "cold", "warm", "graph, cold", "host", "of it reading the list")
_COLD_BYTES = 512 << 20


def median_us(entry: Entry, device: torch.device, rounds: int, what: str = "ms") -> float:
    return statistics.median(CLOCKS[device.type](entry)[what] for _ in range(rounds)) * 1e3


def launches(call: Callable[[], object]) -> int:
    """Kernels and memsets of one call, as the profiler sees them."""
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        call()
        torch.cuda.synchronize()
    on_device = [event for event in recorded.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return sum("memcpy" not in event.name.lower() for event in on_device)


def replay_of(call: Callable[[], object]) -> Callable[[], None]:
    """A graph of one call, captured after a call outside of it."""
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def rows(case: Case, device: torch.device, rounds: int) -> list[tuple[str, ...]]:
    made = Gradients(case, device)
    scratch = torch.zeros(_COLD_BYTES // 4, device=device) if device.type == "cuda" else torch.zeros(1)
    found = []
    everyone = available(device)
    ours = next(provider for provider in everyone if provider.gated)
    baseline = next(provider for provider in everyone if provider.name == BASELINE)
    for regime in REGIMES:
        if regime.function != "clip_grad_norm_":
            continue
        for provider in (baseline, ours):
            call = provider.call(regime, made)

            def cold(writes: bool = regime.writes) -> None:
                if writes:
                    made.restore()
                scratch.zero_()

            def warm(writes: bool = regime.writes, call: Callable = call) -> None:
                if writes:
                    made.restore()
                else:
                    call()

            with provider.scope():
                row = [case.name, regime.name, provider.name]
                row.append(f"{launches(call)}" if device.type == "cuda" else "")
                row.append(f"{median_us(Entry('', call, cold), device, rounds):.1f}")
                row.append(f"{median_us(Entry('', call, warm), device, rounds):.1f}")
                # torch's clip reads nothing back either, so both can be captured.
                replayed = device.type == "cuda" and median_us(Entry("", replay_of(call), cold), device, rounds)
                row.append(f"{replayed:.1f}" if replayed else "")
                host = median_us(Entry("", call, warm), device, rounds, "host_ms") if device.type == "cuda" else None
                row.append("" if host is None else f"{host:.1f}")
                row.append(f"{reading_us(made, rounds):.1f}" if provider is ours else "")
            found.append(tuple(row))
    made.restore()
    return found


def reading_us(made: Gradients, rounds: int) -> float:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        gradients.of(made.parameters)
        times.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--case", nargs="+")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="a folder for device.md; without, the table is printed")
    options = parser.parse_args()
    listed = gpu_cases() if options.device == "cuda" else cases()
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    for name in options.case or CASES:
        for row in rows(listed[name], torch.device(options.device), options.rounds):
            lines.append(f"| {' | '.join(row)} |")
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
            (options.out / "device.md").write_text("\n".join(lines) + "\n")
        print("\n".join(lines[2:]) if options.out else "", end="")
    if not options.out:
        print("\n".join(lines))


if __name__ == "__main__":
    main()
