"""What the monitor costs over the clip alone: python benchmarks/monitor.py

Both sides take turns, 100 calls each, over the same gradients; with the monitor the last of them brings the numbers
over. Medians per call and their ratio are printed. Nothing is clipped, and records go
nowhere else.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings

import torch

import fastclip
from fastclip.bench.cases import cases

CALLS = 100
BARS = {"gpt2-124m-fp32": 1.15, "1,000 x 4": 2.0}


def measure(shapes: list[tuple[int, ...]], rounds: int) -> tuple[float, float]:
    """Milliseconds of a call: the clip alone, and with the monitor."""
    named = [(f"layers.{i}.weight", torch.nn.Parameter(torch.zeros(shape))) for i, shape in enumerate(shapes)]
    for _, parameter in named:
        parameter.grad = torch.full_like(parameter, 1e-3)
    parameters = [parameter for _, parameter in named]
    monitor = fastclip.GradMonitor(named, every=CALLS, keep=1000)
    calls = (lambda: fastclip.clip_grad_norm_(parameters, 1e6), lambda: monitor.clip_grad_norm_(1e6))
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(rounds + 1):
        for call, into in zip(calls, times, strict=True):
            start = time.perf_counter()
            for _ in range(CALLS):
                call()
            if turn > 0:  # after one for warming up
                into.append((time.perf_counter() - start) / CALLS)
    monitor.close()
    alone, seen = (statistics.median(each) * 1e3 for each in times)
    return alone, seen


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--check-bars", action="store_true", help="a miss exits with 1")
    options = parser.parse_args()
    warnings.simplefilter("ignore", fastclip.GradientWarning)
    lists = {
        "gpt2-124m-fp32": [shape for shape, _ in cases()["gpt2-124m-fp32"].tensors],
        "1,000 x 4": [(4,)] * 1000,
        "lstm": [shape for shape, _ in cases()["lstm"].tensors],
    }
    missed = False
    print("| gradients | clip: ms | with the monitor: ms | ratio | bar |\n|---|---|---|---|---|")
    for name, shapes in lists.items():
        alone, seen = measure(shapes, 3 if name.startswith("gpt2") else 20)
        bar = BARS.get(name)
        missed = missed or bool(bar and seen / alone > bar)
        print(f"| {name} | {alone:.3f} | {seen:.3f} | {seen / alone:.2f} | {f'<= {bar:g}' if bar else ''} |")
    return int(missed and options.check_bars)


if __name__ == "__main__":
    raise SystemExit(main())
