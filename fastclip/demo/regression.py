"""The article's regression net at a learning rate where it explodes, unless its gradients are clipped."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

import fastclip
from fastclip.demo.digits import batches

STEPS, BATCH, MOMENTUM, CLIP_VALUE = 400, 128, 0.8, 1.0  # 50 epochs of 8 batches
# The article's rate, and the bound of its Keras example. Without clipping it overflows within five steps or so; with
# clipping it converges, clipped in all steps.
ARTICLE_RATE, ARTICLE_MAX_NORM = 0.07, 1.0
# This one explodes late enough to watch; with clipping it converges, and soon needs no clipping any more.
RATE, MAX_NORM = 0.006, 100.0
STEPS_AFTER_NONFINITE = 3


class Net(nn.Module):
    """20 -> 25 -> 1 with ReLU, Xavier weights and biases of 0.01."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(20, 25), nn.Linear(25, 1)
        for layer in (self.fc1, self.fc2):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.constant_(layer.bias, 0.01)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(functional.relu(self.fc1(x)))


@dataclass
class Run:
    """One training run: how it is clipped, and what was seen at every step."""

    rate: float
    kind: str
    limit: float
    losses: list[float] = field(default_factory=list)
    norms: dict[str, list[float]] = field(default_factory=lambda: {"fc1": [], "fc2": [], "total": []})
    clipped: list[bool] = field(default_factory=list)
    loss_before: float = math.nan
    loss_after: float = math.nan
    log: Path | None = None
    nonfinite_step: int | None = None  # the first step, from 1, whose loss or norm is NaN or infinite


def load() -> tuple[Tensor, Tensor]:
    """The article's regression problem: inputs (1000, 20) and targets (1000, 1)."""
    from sklearn.datasets import make_regression

    x, y = make_regression(n_samples=1000, n_features=20, noise=0.1, random_state=1)
    # Targets of shape (1000,) would broadcast: each output of a batch compared with each target of the batch.
    return torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=torch.float32).unsqueeze(1)


def run(
    steps: int | None,
    max_norm: float | None,
    seed: int,
    show: Callable[[int, int, str], None],
    folder: Path | None = None,
) -> list[Run]:
    """Train the net not clipped, by value and by norm, at our rate and at the article's: six runs, in this order.

    A GradMonitor of each writes its log to the folder.
    """
    x, y = load()
    order = batches(len(x), BATCH, steps or STEPS, seed)
    runs = [
        Run(rate, kind, limit)
        for rate, bound in ((RATE, MAX_NORM), (ARTICLE_RATE, ARTICLE_MAX_NORM))
        for kind, limit in (("none", math.inf), ("value", CLIP_VALUE), ("norm", max_norm or bound))
    ]
    for done, each in enumerate(runs, 1):
        each.log = folder and folder / f"regression-rate{each.rate:g}-{each.kind}.jsonl"
        _train(each, x, y, order, seed)
        show(done * len(order), len(runs) * len(order), f"rate {each.rate:g}, clipped by {each.kind}")
    return runs


def _train(run: Run, x: Tensor, y: Tensor, order: list[Tensor], seed: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=run.rate, momentum=MOMENTUM)
    if run.log:
        run.log.unlink(missing_ok=True)  # of the demo before
    monitor = fastclip.GradMonitor(model, every=50, writer=run.log, alarms=False)
    run.loss_before = functional.mse_loss(model(x), y).item()
    for step, batch in enumerate(order, 1):
        optimizer.zero_grad()
        loss = functional.mse_loss(model(x[batch]), y[batch])
        loss.backward()
        run.losses.append(loss.item())
        _clip(run, model, monitor)
        optimizer.step()
        if not math.isfinite(run.losses[-1] + run.norms["total"][-1]):
            run.nonfinite_step = run.nonfinite_step or step
            if step == run.nonfinite_step + STEPS_AFTER_NONFINITE:
                break
    monitor.close()
    run.loss_after = functional.mse_loss(model(x), y).item()


def _clip(run: Run, model: Net, monitor: fastclip.GradMonitor) -> None:
    """Clip the gradients by the norms that are recorded: those of the layers, and their norm, the total."""
    grads = {name: [p.grad for p in layer.parameters()] for name, layer in model.named_children()}
    norms = {name: fastclip.get_total_norm(layer, norm_dtype=torch.float64) for name, layer in grads.items()}
    norms["total"] = fastclip.get_total_norm(list(norms.values()))
    for name, norm in norms.items():
        run.norms[name].append(norm.item())
    measured, loss = norms["total"], run.losses[-1]
    if run.kind == "norm":
        monitor.clip_grad_norm_(run.limit, loss=loss)
    elif run.kind == "value":
        measured = fastclip.get_total_norm([p.grad for p in model.parameters()], math.inf)
        monitor.clip_grad_value_(run.limit, loss=loss)
    else:
        monitor.observe(loss)
    run.clipped.append(measured.item() > run.limit)
