"""Clipping sharded gradients on several gloo ranks of this machine: torch against fastclip, cold and warm.

    python benchmarks/distributed.py --ranks 2 4 --tiny 1000 1600 3000

Every row is a fresh process group: cold is its first call, warm the fastest of the following ones, both on rank 0 and
with lazy imports already done. Ranks wait for each other, so a machine that is busy elsewhere shows more. Collectives
and bytes are those of one warm call on one rank.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

import torch
import torch._dynamo  # DTensor's dispatch imports it; here once, before the ranks fork
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

import fastclip

CLIP = {"torch": nn.utils.clip_grad_norm_, "fastclip": fastclip.clip_grad_norm_}


class Collectives(TorchDispatchMode):
    """Counts the reductions below both libraries, and their bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        if func.namespace in ("c10d", "_c10d_functional") and "reduce" in func.__name__:
            payload = args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
            self.count += 1
            self.bytes += sum(t.numel() * t.element_size() for t in payload)
        return func(*args, **(kwargs or {}))


def tiny(count: int) -> list[nn.Parameter]:
    """Parameters of 16 x 16 on each rank: all cost is the host's."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def shard() -> DTensor:
        return DTensor.from_local(torch.randn(16, 16), mesh, [Shard(0)], run_check=False)

    parameters = [nn.Parameter(shard()) for _ in range(count)]
    for parameter in parameters:
        parameter.grad = shard()
    return parameters


def gpt(layers: int) -> list[nn.Parameter]:
    """An encoder of that many layers of width 128 under fully_shard, after one backward pass."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = nn.Sequential(*(nn.TransformerEncoderLayer(128, 4, 512, batch_first=True) for _ in range(layers)))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model(torch.randn(2, 16, 128)).square().mean().backward()
    return list(model.parameters())


CASES = {"tiny": tiny, "gpt": gpt}


def seconds(call) -> float:
    dist.barrier()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(library: str, case: str, size: int, calls: int) -> dict[str, object]:
    torch.manual_seed(dist.get_rank())
    parameters = CASES[case](size)
    one = parameters[0].grad
    (one + one).to_local()  # what any DTensor op imports and sets up is not clipping's

    def clip() -> object:
        return CLIP[library](parameters, 1e9)

    cold = seconds(clip)
    warm = min(seconds(clip) for _ in range(calls))
    with Collectives() as sent:
        clip()
    return {
        "ranks": dist.get_world_size(),
        "case": f"{case} {size}",
        "tensors": len(parameters),
        "library": library,
        "cold_ms": cold * 1e3,
        "warm_ms": warm * 1e3,
        "collectives": sent.count,
        "bytes": sent.bytes,
    }


def rank(index: int, ranks: int, folder: str, job: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=index, world_size=ranks)
    result = measure(*job)
    if index == 0:
        print(json.dumps(result), flush=True)
    dist.destroy_process_group()


def launch(ranks: int, job: tuple) -> None:
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for index in range(ranks):
            if (child := os.fork()) == 0:
                try:
                    rank(index, ranks, folder, job)
                    os._exit(0)
                finally:
                    os._exit(1)
            children.append(child)
        if any(os.waitpid(child, 0)[1] for child in children):
            sys.exit(f"a rank failed: {job}")


def table(rows: list[dict]) -> str:
    lines = [
        "| ranks | case | tensors | torch cold | fastclip cold | ratio | torch warm | fastclip warm | ratio "
        "| torch collectives (bytes) | fastclip collectives (bytes) |",
        "|" + " --- |" * 11,
    ]
    for theirs, ours in zip(rows[::2], rows[1::2], strict=True):
        lines.append(
            f"| {ours['ranks']} | {ours['case']} | {ours['tensors']} "
            f"| {theirs['cold_ms']:.1f} ms | {ours['cold_ms']:.1f} ms | {theirs['cold_ms'] / ours['cold_ms']:.0f} "
            f"| {theirs['warm_ms']:.1f} ms | {ours['warm_ms']:.2f} ms | {theirs['warm_ms'] / ours['warm_ms']:.1f} "
            f"| {theirs['collectives']} ({theirs['bytes']}) | {ours['collectives']} ({ours['bytes']}) |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--tiny", type=int, nargs="*", default=[1000, 1600, 3000], help="numbers of tiny tensors")
    parser.add_argument("--gpt", type=int, nargs="*", default=[8], help="numbers of layers")
    parser.add_argument("--calls", type=int, default=30, help="warm calls of each row")
    parser.add_argument("--job", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        ranks, library, case, size = options.job
        launch(int(ranks), (library, case, int(size), options.calls))
        return
    rows = []
    for ranks in options.ranks:
        for case, size in [*(("gpt", n) for n in options.gpt), *(("tiny", n) for n in options.tiny)]:
            for library in CLIP:
                command = [sys.executable, __file__, "--calls", str(options.calls), "--job", str(ranks)]
                ran = subprocess.run([*command, library, case, str(size)], capture_output=True, text=True, check=False)
                if ran.returncode:
                    sys.exit(ran.stderr)
                rows.append(json.loads(ran.stdout.splitlines()[-1]))
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    print(
        f"torch {torch.__version__}, fastclip {fastclip.__version__}, gloo, one thread a rank, {os.cpu_count()} cores\n"
    )
    print(table(rows))


if __name__ == "__main__":
    main()
