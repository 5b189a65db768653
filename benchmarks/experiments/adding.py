"""Who explodes, who learns: the adding problem over 50 time steps, for each way of clipping at its best rate.

    python benchmarks/experiments/adding.py [--out DIR] [--quick]

A recurrent net of 32 ReLU units that starts at the identity (Le et al., arXiv:1504.00941) reads 50 pairs of a number
in 0..1 and a marker, and says at the end what the two marked numbers add up to. The constant 1 has an error of 0.167.
All runs train side by side, each with its own parameters, optimizer and clip; equal seeds have equal weights and data.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Sequence

import torch
from common import COLOURS, figure, parse, spread, write
from torch import Tensor, nn

import fastclip

LENGTH, HIDDEN, BATCH, STEPS, SEEDS = 50, 32, 32, 2000, (1, 2, 3)
RATES = (0.03, 0.1, 0.3)
DECAY, CLIP_VALUE, MAX_NORM = 1e-3, 0.1, 1.0
BASELINE = 1 / 6  # the variance of the sum of two uniform numbers
LAST = 100  # steps whose mean loss is a run's result

Clip = Callable[[list[nn.Parameter]], object]
METHODS: dict[str, Callable[[], Clip]] = {
    "none": lambda: lambda parameters: None,
    f"weight decay {DECAY:g}": lambda: lambda parameters: None,
    f"value {CLIP_VALUE:g}": lambda: lambda parameters: fastclip.clip_grad_value_(parameters, CLIP_VALUE),
    f"norm {MAX_NORM:g}": lambda: lambda parameters: fastclip.clip_grad_norm_(parameters, MAX_NORM),
    "AutoClip": lambda: fastclip.policy.AutoClip().clip_,
    "ZClip": lambda: fastclip.policy.ZClip().clip_,
}


class Run:
    """One model of its own: the parameters, the optimizer, the clip, and the losses."""

    def __init__(self, method: str, rate: float, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return 0.001 * torch.randn(shape, generator=generator)

        weights = (normal(2, HIDDEN), torch.eye(HIDDEN), torch.zeros(1, HIDDEN), normal(HIDDEN, 1), torch.zeros(1, 1))
        self.parameters = [nn.Parameter(weight) for weight in weights]
        decay = DECAY if method.startswith("weight decay") else 0.0
        self.optimizer = torch.optim.SGD(self.parameters, lr=rate, weight_decay=decay)
        self.method, self.rate, self.seed, self.clip = method, rate, seed, METHODS[method]()
        self.losses: list[float] = []

    @property
    def exploded(self) -> int | None:
        """The first step, from 1, whose loss is not finite."""
        return next((step for step, loss in enumerate(self.losses, 1) if not math.isfinite(loss)), None)

    @property
    def end(self) -> float:
        return math.inf if self.exploded else statistics.fmean(self.losses[-LAST:])


def draw(generator: torch.Generator, length: int) -> tuple[Tensor, Tensor]:
    """A batch of inputs (length, batch, 2) and sums (batch, 1); one marker in each half."""
    numbers = torch.rand(length, BATCH, generator=generator)
    half = length // 2
    marks = torch.zeros(length, BATCH)
    for first in (0, half):
        marks[first + torch.randint(half, (BATCH,), generator=generator), torch.arange(BATCH)] = 1.0
    return torch.stack([numbers, marks], 2), (numbers * marks).sum(0).unsqueeze(1)


def losses_of(runs: list[Run], x: Tensor, y: Tensor) -> Tensor:
    """The loss of every run; x is (time, run, batch, 2)."""
    w_in, w_rec, bias, w_out, b_out = (
        torch.stack(each) for each in zip(*(run.parameters for run in runs), strict=True)
    )
    inputs = x @ w_in + bias
    state = torch.zeros_like(inputs[0])
    for each in inputs:
        state = torch.relu(torch.baddbmm(each, state, w_rec))
    return (torch.baddbmm(b_out, state, w_out) - y).square().mean((1, 2))


def train(runs: list[Run], steps: int, length: int) -> None:
    generators = {run.seed: torch.Generator().manual_seed(1000 + run.seed) for run in runs}
    for _ in range(steps):
        drawn = {seed: draw(generator, length) for seed, generator in generators.items()}
        x, y = (torch.stack([drawn[run.seed][k] for run in runs], 1 - k) for k in (0, 1))
        losses = losses_of(runs, x, y)
        losses.sum().backward()
        for run, loss in zip(runs, losses.tolist(), strict=True):
            run.losses.append(loss)
            run.clip(run.parameters)
            run.optimizer.step()
            run.optimizer.zero_grad()


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(__doc__, argv)
    seeds, rates, steps, length = (SEEDS[:1], RATES[1:2], 3, 10) if arguments.quick else (SEEDS, RATES, STEPS, LENGTH)
    runs = [Run(method, rate, seed) for method in METHODS for rate in rates for seed in seeds]
    train(runs, steps, length)
    drawn, axes = figure(1, f"The adding problem over {length} steps, each at its best rate: median over seeds")
    rows = []
    for colour, method in zip(COLOURS, METHODS, strict=True):
        mine = [run for run in runs if run.method == method]
        best = min(rates, key=lambda rate: statistics.median(run.end for run in mine if run.rate == rate))
        chosen = [run for run in mine if run.rate == best]
        exploded = [
            f"{sum(run.exploded is not None for run in mine if run.rate == rate)}/{len(seeds)}" for rate in rates
        ]
        learned = sum(run.end < BASELINE / 2 for run in chosen)
        rows.append(
            (method, ", ".join(exploded), f"{best:g}", spread([run.end for run in chosen]), f"{learned}/{len(seeds)}")
        )
        middle = [statistics.median(each) for each in zip(*(run.losses for run in chosen), strict=True)]
        width = min(20, len(middle))
        smooth = torch.tensor(middle).unfold(0, width, 1).mean(1)
        axes[0].plot(range(width, len(middle) + 1), smooth, color=colour, label=f"{method}, rate {best:g}")
    axes[0].axhline(BASELINE, color="black", linestyle="--", linewidth=1, label="always 1")
    axes[0].set(yscale="log", ylim=(1e-3, 1), xlabel="step", ylabel="mean squared error, mean of 20 steps")
    axes[0].legend(fontsize=8)
    names = ", ".join(f"{rate:g}" for rate in rates)
    columns = ("method", f"exploded at rates {names}", "best rate", f"error of the last {LAST} steps", "learned")
    write(arguments, "adding", columns, rows, drawn)
    return 0


if __name__ == "__main__":
    sys.exit(main())
