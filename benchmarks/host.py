"""What a call costs beside its bytes: torch and fastclip over tiny tensors, one thread, as ratios in one process.

python benchmarks/host.py [--check-bars | --split DEVICE]; times are of the thread, the least of many rounds.
"""

from __future__ import annotations

import argparse
import gc
import os
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.utils
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import fastclip
from fastclip import gradients
from fastclip.bench import report
from fastclip.gradients.contract import Clip
from fastclip.gradients.plain import Plain

HUGE = 1e6  # a bound that clips nothing


def least_us(call: Callable[[], object], calls: int, rounds: int = 40) -> float:
    """The time of one call in microseconds."""
    call()
    best = float("inf")
    for _ in range(rounds):
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # the queue is empty
        start = time.thread_time_ns()
        for _ in range(calls):
            call()
        best = min(best, (time.thread_time_ns() - start) / calls / 1000)
    return best


def parameters(count: int, *shape: int, device: str = "cpu") -> list[torch.nn.Parameter]:
    made = [torch.nn.Parameter(torch.zeros(shape, device=device)) for _ in range(count)]
    for parameter in made:
        parameter.grad = torch.full(shape, 1e-3, device=device)
    return made


def over_torch(made: list[torch.nn.Parameter], call: Callable, calls: int) -> tuple[float, float, float]:
    torchs, ours = (least_us(lambda F=F: call(F, made), calls) for F in (torch.nn.utils, fastclip))
    return torchs, ours, torchs / ours


def over_plain(
    made: list[torch.nn.Parameter], plain: list[torch.nn.Parameter], call: Callable, calls: int = 3
) -> tuple[float, float, float]:
    alike, ours = (least_us(lambda given=given: call(fastclip, given), calls) for given in (plain, made))
    return alike, ours, ours / alike


def norm(F, made):
    return F.clip_grad_norm_(made, HUGE)


def value(F, made):
    return F.clip_grad_value_(made, 1.0)


def rows() -> list[tuple[str, float, float, float, str, float]]:
    """What, us of the baseline, us of fastclip, their ratio, and the bar."""
    one, few, many = parameters(1, 4), parameters(148, 4), parameters(1000, 4)
    total_norm = torch.tensor(0.01)
    found = [
        ("one tensor, by norm", *over_torch(one, norm, 300), ">=", 6.0),
        (
            "one tensor, error_if_nonfinite",
            *over_torch(one, lambda F, made: F.clip_grad_norm_(made, HUGE, error_if_nonfinite=True), 300),
            *(">=", 5.0),
        ),
        (
            "one tensor, clip_grads_with_norm_",
            *over_torch(one, lambda F, made: F.clip_grads_with_norm_(made, HUGE, total_norm), 300),
            *(">=", 3.0),
        ),
        ("one tensor, by value", *over_torch(one, value, 300), ">=", 2.5),
        ("148 tensors, by norm", *over_torch(few, norm, 20), ">=", 11.0),
        ("1,000 tensors, by norm", *over_torch(many, norm, 4), ">=", 14.0),
    ]
    mixed = parameters(1000, 4)
    mixed[500] = torch.nn.Parameter(torch.zeros(4, dtype=torch.complex64))
    mixed[500].grad = torch.full((4,), 1e-3 + 0j)
    found.append(("one complex among 1,000, against plain ones", *over_plain(mixed, many, norm), "<=", 2.5))
    plain, mesh = parameters(1600, 16, 16), init_device_mesh("cpu", (1,))
    sharded = []
    for parameter in plain:
        wrapped = DTensor.from_local(parameter.detach(), mesh, [Shard(0)], run_check=False)
        sharded.append(torch.nn.Parameter(wrapped))
        sharded[-1].grad = DTensor.from_local(parameter.grad.clone(), mesh, [Shard(0)], run_check=False)
    found.append(("1,600 DTensors against plain ones, by norm", *over_plain(sharded, plain, norm), "<=", 2.5))
    found.append(("1,600 DTensors against plain ones, by value", *over_plain(sharded, plain, value), "<=", 2.5))
    return found


def split(device: str) -> list[tuple[int, float, float, float, float]]:
    """Of clip_grad_norm_ over so many tiny tensors, in us: all of it, reading, version counters, and the engine,
    which fills tables and launches, or computes.
    """
    found = []
    for count in (1, 148, 2000, 10_000):
        made, calls = parameters(count, 4, device=device), max(1, 300 // count)
        read = gradients.of(made)
        assert isinstance(read, Plain), read
        norm, clip = torch.empty((), device=device), Clip(HUGE, 2.0)
        parts = (
            lambda made=made: fastclip.clip_grad_norm_(made, HUGE),
            lambda made=made: gradients.of(made),
            lambda read=read: torch._C._increment_version(read.tensors),
            lambda read=read, norm=norm, clip=clip: read._engine.clip_grad_norm_(read._views, norm, *clip),
        )
        found.append((count, *(least_us(part, calls) for part in parts)))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check-bars", action="store_true", help="a miss exits with 1")
    parser.add_argument("--split", metavar="DEVICE", help="only where the time of a call goes: cpu, cuda")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.split:
        print(report.conditions_line(report.conditions([], False, torch.device(options.split))), "\n")
        print("| tensors | whole call: us | list read | version counters | engine |\n|---|---|---|---|---|")
        for count, *times in split(options.split):
            print(f"| {count:,} | {' | '.join(f'{us:.1f}' for us in times)} |")
        return 0
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    gc.disable()
    conditions = report.conditions([], False, torch.device("cpu")) | {"command": "python benchmarks/host.py"}
    print(report.conditions_line(conditions), "\n")
    print("| call | torch, or plain: us | fastclip: us | ratio | bar | |\n|---|---|---|---|---|---|")
    missed = False
    for what, baseline, ours, ratio, relation, bar in rows():
        holds = ratio >= bar if relation == ">=" else ratio <= bar
        missed = missed or not holds
        verdict = "pass" if holds else "miss"
        print(f"| {what} | {baseline:.1f} | {ours:.1f} | {ratio:.2f} | {relation} {bar:g} | {verdict} |")
    dist.destroy_process_group()
    return int(missed and options.check_bars)


if __name__ == "__main__":
    raise SystemExit(main())
