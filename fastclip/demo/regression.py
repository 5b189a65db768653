"""The article's regression net at a learning rate where it explodes, unless its gradients are clipped."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

import fastclip
from fastclip.demo import data

BATCH = 128
MOMENTUM = 0.8
CLIP_VALUE = 1.0
# The article's rate and, with it, the bound of its Keras example. With the article's broadcasting slip fixed, this rate
# overflows within five steps or so, and clipping then acts in all steps.
ARTICLE_RATE, ARTICLE_MAX_NORM = 0.07, 1.0
# Still explodes without clipping, but late enough to watch; clipped, it converges and then needs no clipping any more.
RATE, MAX_NORM = 0.006, 100.0
STEPS_AFTER_NONFINITE = 3


class Net(nn.Module):
    """20 -> 25 -> 1 with ReLU, Xavier weights and biases of 0.01."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(20, 25)
        self.fc2 = nn.Linear(25, 1)
        for layer in (self.fc1, self.fc2):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.constant_(layer.bias, 0.01)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(functional.relu(self.fc1(x)))


@dataclass
class Run:
    """One training run: how it is clipped, and what was seen at every step."""

    kind: str
    rate: float
    limit: float
    losses: list[float] = field(default_factory=list)
    norms: dict[str, list[float]] = field(default_factory=lambda: {"fc1": [], "fc2": [], "total": []})
    clipped: list[bool] = field(default_factory=list)
    loss_before: float = float("nan")
    loss_after: float = float("nan")
    nonfinite_step: int | None = None  # the first step, from 1, whose loss or norm is NaN or infinite

    @property
    def name(self) -> str:
        return self.kind if self.kind == "none" else f"{self.kind} {self.limit:g}"

    @property
    def converged(self) -> bool:
        """Whether the loss fell below a hundredth of where it started."""
        return self.loss_after < self.loss_before / 100


@dataclass
class Regression:
    """All runs of the experiment."""

    runs: list[Run]

    def at(self, rate: float) -> list[Run]:
        """The three runs at one learning rate: none, value, norm."""
        return [run for run in self.runs if run.rate == rate]


def run_regression(
    steps: int, max_norm: float | None, seed: int, report: Callable[[int, str], None] = lambda done, text: None
) -> Regression:
    """Train the net unclipped, by value and by norm, at our rate and at the article's.

    Args:
        steps: optimizer steps of every run; an unclipped run stops a few steps after it is no longer finite.
        max_norm: bound of the runs that clip by norm; None takes 100 at our rate and 1 at the article's.
        seed: of the initial weights and the batch order, the same for all runs.
        report: called with the steps done and a line about them.

    Returns:
        The runs with their losses and the norm of every layer at every step.
    """
    x, y = data.regression()
    order = data.batches(len(x), BATCH, steps, seed)
    runs = []
    for rate, bound in ((RATE, max_norm or MAX_NORM), (ARTICLE_RATE, max_norm or ARTICLE_MAX_NORM)):
        for kind, limit in (("none", math.inf), ("value", CLIP_VALUE), ("norm", bound)):
            run = Run(kind, rate, limit)
            _train(run, x, y, order, seed, lambda step: report(len(runs) * steps + step, run.name))  # noqa: B023
            runs.append(run)
    report(len(runs) * steps, "done")
    return Regression(runs)


def _train(run: Run, x: Tensor, y: Tensor, order: list[Tensor], seed: int, report: Callable[[int], None]) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=run.rate, momentum=MOMENTUM)
    with torch.no_grad():
        run.loss_before = functional.mse_loss(model(x), y).item()
    for step, batch in enumerate(order, 1):
        optimizer.zero_grad()
        loss = functional.mse_loss(model(x[batch]), y[batch])
        loss.backward()
        run.losses.append(loss.item())
        _clip(run, model)
        optimizer.step()
        report(step)
        if run.nonfinite_step is None and not math.isfinite(run.losses[-1] + run.norms["total"][-1]):
            run.nonfinite_step = step
        if run.nonfinite_step and step >= run.nonfinite_step + STEPS_AFTER_NONFINITE:
            break
    with torch.no_grad():
        run.loss_after = functional.mse_loss(model(x), y).item()


def _clip(run: Run, model: Net) -> None:
    """Clip the model's gradients; the norms recorded are those that the clip itself works with, before clipping."""
    parameters = list(model.parameters())
    layers = {name: [p.grad for p in layer.parameters()] for name, layer in model.named_children()}
    norms = {name: fastclip.get_total_norm(grads, norm_dtype=torch.float64) for name, grads in layers.items()}
    total = fastclip.get_total_norm(list(norms.values()))
    if run.kind == "norm":
        fastclip.clip_grads_with_norm_(parameters, run.limit, total)
        run.clipped.append(total.item() > run.limit)
    elif run.kind == "value":
        largest = fastclip.get_total_norm([p.grad for p in parameters], float("inf"))
        fastclip.clip_grad_value_(parameters, run.limit)
        run.clipped.append(largest.item() > run.limit)
    else:
        run.clipped.append(False)
    for name, norm in (*norms.items(), ("total", total)):
        run.norms[name].append(norm.item())
