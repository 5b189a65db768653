"""What adaptive policies and norms of tensors cost over the plain calls, and per-example clipping against Opacus' way.

    python benchmarks/vocabulary.py --threads 2 --rounds 15
    python -m fastclip bench --regime each-clip --regime unit-clip  # clips of each tensor or unit, against torch ops

Both sides take turns in every round, over gradients that are restored first; the medians and their ratio are printed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

import fastclip
from fastclip import functional
from fastclip.bench.cases import Case, cases


def per_example_in_torch(grads: list[torch.Tensor], max_norm: float) -> list[torch.Tensor]:
    """As Opacus has it."""
    norms = torch.stack([g.reshape(len(g), -1).norm(2, dim=-1) for g in grads], dim=1).norm(2, dim=1)
    coefs = (max_norm / (norms + 1e-6)).clamp(max=1.0)
    return [torch.einsum("i,i...", coefs, g) for g in grads]


class Bench:
    def __init__(self, rounds: int) -> None:
        self.rounds = rounds
        print(f"{'case':16} {'what':34} {'theirs ms':>10} {'ours ms':>10} {'ratio':>7}")

    def compare(self, case: str, what: str, restore: Callable, theirs: Callable, ours: Callable) -> None:
        times: tuple[list[float], list[float]] = ([], [])
        for turn in range(self.rounds + 2):
            for call, into in zip((theirs, ours), times, strict=True):
                restore()
                start = time.perf_counter()
                call()
                if turn >= 2:  # after two for warming up
                    into.append(time.perf_counter() - start)
        theirs_ms, ours_ms = (1e3 * statistics.median(each) for each in times)
        print(f"{case:16} {what:34} {theirs_ms:10.3f} {ours_ms:10.3f} {theirs_ms / ours_ms:6.2f}x", flush=True)


def bench_case(bench: Bench, case: Case) -> None:
    parameters = [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape, dtype in case.tensors]
    for p in parameters:
        p.grad = torch.randn_like(p)
    grads, saved = [p.grad for p in parameters], [p.grad.clone() for p in parameters]
    row = partial(bench.compare, case.name, restore=lambda: torch._foreach_copy_(grads, saved))

    row(
        "norms against the total norm",
        theirs=lambda: fastclip.get_total_norm(grads),
        ours=lambda: fastclip.get_tensor_norms(grads),
    )
    policy = fastclip.policy
    for made in (policy.AutoClip(), policy.ZClip(), policy.AdaGC(), policy.SkipOnSpike(max_norm=1.0)):
        row(
            f"{type(made).__name__} against the plain clip",
            theirs=lambda: fastclip.clip_grad_norm_(parameters, 1.0),
            ours=lambda made=made: made.clip_(parameters),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--case", nargs="+", choices=cases(), default=["gpt2-124m-fp32", "1000-tiny"])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    bench = Bench(arguments.rounds)
    for name in arguments.case:
        bench_case(bench, cases()[name])
    examples = [torch.randn(64, *shape) for shape, _ in cases()["lstm"].tensors]
    bench.compare(
        "lstm x 64",
        "per example",
        restore=lambda: None,
        theirs=lambda: per_example_in_torch(examples, 1.0),
        ours=lambda: functional.per_example_clip(examples, 1.0),
    )


if __name__ == "__main__":
    main()
