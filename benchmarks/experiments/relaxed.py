"""Faster training by clipping: steps to a target loss, each method at its best learning rate.

    python benchmarks/experiments/relaxed.py [--out DIR] [--quick]

Zhang et al. (arXiv:1905.11881): where curvature grows with the gradient, ||H|| <= L0 + L1 ||grad||, a fixed rate has to
suit the steepest place that it meets, and a clipped one only the minimum. Two problems, with plain SGD:
a quartic, sum(x^4 / 4 + x^2 / 2) of ten numbers drawn from N(0, 5^2), whole gradients, to 1e-6;
the 20-25-1 net on make_regression, batches of 128, to 1 % of the loss at the start, over all samples.
The best rate is the one with the least median over seeds; a run that does not arrive counts as infinitely long.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
from common import COLOURS, figure, parse, write
from torch import Tensor, nn

import fastclip
from fastclip.demo import regression
from fastclip.demo.digits import batches

RATES = tuple(10.0 ** (k / 2) for k in range(-8, 3))  # half decades from 1e-4 to 10
BOUNDS = (math.inf, 1.0, 10.0, 100.0)
SEEDS = (1, 2, 3)
STEPS = {"quartic": 2000, "regression net": 400}
DIVERGED = 1e12  # of the loss at the start


class Problem:
    """Parameters, the loss of each step, the loss to judge by, and its target."""

    def __init__(
        self, parameters: list[Tensor], losses: Iterator[Callable[[], Tensor]], judge: Callable[[], Tensor]
    ) -> None:
        self.parameters, self.losses, self.judge = parameters, losses, judge


def quartic(seed: int, steps: int) -> tuple[Problem, float]:
    x = 5 * torch.randn(10, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x.requires_grad_()

    def loss() -> Tensor:
        return (x.square().square() / 4 + x.square() / 2).sum()

    return Problem([x], (loss for _ in range(steps)), loss), 1e-6


def net(seed: int, steps: int) -> tuple[Problem, float]:
    x, y = regression.load()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = regression.Net()

    def loss(inputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.mse_loss(model(inputs), targets)

    order = batches(len(x), regression.BATCH, steps, seed)
    losses = (lambda batch=batch: loss(x[batch], y[batch]) for batch in order)
    return Problem(list(model.parameters()), losses, lambda: loss(x, y)), 0.01 * loss(x, y).item()


PROBLEMS = {"quartic": quartic, "regression net": net}


def steps_to_target(name: str, rate: float, bound: float, seed: int, steps: int) -> float:
    """How many steps it takes; infinity if it does not get there in as many as are given."""
    problem, target = PROBLEMS[name](seed, steps)
    optimizer = torch.optim.SGD(problem.parameters, lr=rate)
    limit = DIVERGED * max(problem.judge().item(), 1.0)
    for step, loss in enumerate(problem.losses, 1):
        optimizer.zero_grad()
        loss().backward()
        fastclip.clip_grad_norm_(problem.parameters, bound)
        optimizer.step()
        with torch.no_grad():
            value = problem.judge().item()
        if value <= target:
            return step
        if not value < limit:
            break
    return math.inf


def shown(steps: float) -> str:
    return f"{steps:.0f}" if math.isfinite(steps) else "never"


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(__doc__, argv)
    rates, seeds = (RATES[2:8:3], SEEDS[:1]) if arguments.quick else (RATES, SEEDS)
    drawn, axes = figure(2, "Steps to the target against the learning rate: median and range over seeds")
    rows = []
    for axis, (name, most) in zip(axes, STEPS.items(), strict=True):
        steps = 3 if arguments.quick else most
        for colour, bound in zip(COLOURS, BOUNDS, strict=False):
            found = {rate: [steps_to_target(name, rate, bound, seed, steps) for seed in seeds] for rate in rates}
            best = min(rates, key=lambda rate: statistics.median(found[rate]))
            method = "none" if math.isinf(bound) else f"norm {bound:g}"
            at_best = found[best]
            arrived = math.isfinite(statistics.median(at_best))
            cells = (f"{best:.2g}" if arrived else "no rate", shown(statistics.median(at_best)))
            rows.append((name, method, *cells, f"{shown(min(at_best))} to {shown(max(at_best))}"))
            there = [rate for rate in rates if math.isfinite(statistics.median(found[rate]))]
            middle = [statistics.median(found[rate]) for rate in there]
            axis.plot(there, middle, "o-", color=colour, label=method)
            axis.fill_between(
                there,
                [min(found[rate]) for rate in there],
                [min(max(found[rate]), steps) for rate in there],
                color=colour,
                alpha=0.15,
            )
        axis.set(title=name, xscale="log", yscale="log", xlabel="learning rate", ylabel="steps to the target")
        axis.set(xlim=(rates[0] / 2, rates[-1] * 2), ylim=(1, steps))
        axis.legend()
    write(arguments, "relaxed", ("problem", "clipping", "best rate", "steps, median", "range over seeds"), rows, drawn)
    return 0


if __name__ == "__main__":
    sys.exit(main())
