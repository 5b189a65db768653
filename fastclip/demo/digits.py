"""The article's LSTM classifier on handwritten digits, clipped by torch's functions and by fastclip's, side by side."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter_ns

import torch
from torch import Tensor, nn
from torch.nn import functional

import fastclip
from fastclip.demo import data

BATCH = 64
LEARNING_RATE = 0.01
CLIP_VALUE = 1.0
MAX_NORM = 2.0
# The first steps pay for caches, threads and lazy imports; they are trained on but their times are dropped.
WARMUP_STEPS = 10


class Net(nn.Module):
    """Two LSTM layers over the rows of an image, and a linear layer on the last hidden state."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 128, num_layers=2, batch_first=True)
        self.fc = nn.Linear(128, 10)

    def forward(self, rows: Tensor) -> Tensor:
        hidden, _ = self.lstm(rows)
        return self.fc(hidden[:, -1, :])


@dataclass
class Run:
    """One training run: how it is clipped, and what was seen at every step."""

    kind: str
    library: str
    clip: Callable[[list[nn.Parameter]], Tensor | None]
    model: Net
    losses: list[float] = field(default_factory=list)
    norms: list[float | None] = field(default_factory=list)
    clipped: list[bool] = field(default_factory=list)
    clip_us: list[float] = field(default_factory=list)
    train_loss: float = float("nan")
    accuracy: float = float("nan")

    def __post_init__(self) -> None:
        self.parameters = list(self.model.parameters())
        self.optimizer = torch.optim.Adam(self.parameters, lr=LEARNING_RATE)

    @property
    def name(self) -> str:
        return f"{self.kind}, {self.library}" if self.library else self.kind

    def times(self) -> list[float]:
        """Microseconds per clip call, without the warm-up."""
        return self.clip_us[min(WARMUP_STEPS, len(self.clip_us) // 2) :]

    def quartiles(self) -> tuple[float, float, float]:
        """First quartile, median and third quartile of `times`."""
        times = self.times()
        return tuple(statistics.quantiles(times, n=4, method="inclusive")) if len(times) > 1 else (times[0],) * 3


@dataclass
class Digits:
    """All runs of the experiment."""

    runs: list[Run]
    max_norm: float

    def pair(self, kind: str) -> tuple[Run, Run]:
        """The torch run and the fastclip run of one kind of clipping."""
        torch_run, fastclip_run = (run for run in self.runs if run.kind == kind)
        return torch_run, fastclip_run

    def difference(self, kind: str) -> tuple[float, int | None]:
        """The largest |loss difference| between torch and fastclip over all steps, and the first step that differs."""
        gaps = [abs(a - b) for a, b in zip(*(run.losses for run in self.pair(kind)), strict=True)]
        return max(gaps), next((step for step, gap in enumerate(gaps, 1) if gap != 0), None)


def run_digits(steps: int, max_norm: float, seed: int, report: Callable[[int, str], None]) -> Digits:
    """Train five equal models in lockstep: unclipped, and by value and by norm with torch and with fastclip.

    Args:
        steps: optimizer steps of every run.
        max_norm: bound of the runs that clip by norm.
        seed: of the split, the initial weights and the batch order, the same for all runs.
        report: called with the steps done and a line about them.

    Returns:
        The runs with their losses, norms and times.
    """
    train_x, train_y, test_x, test_y = data.digits(seed)
    runs = _runs(max_norm, seed)
    for step, batch in enumerate(data.batches(len(train_x), BATCH, steps, seed)):
        # A different run goes first at every step: none is always the one that finds the cache in its own state.
        first = step % len(runs)
        for run in runs[first:] + runs[:first]:
            _train_step(run, train_x[batch], train_y[batch], max_norm)
        report(step + 1, f"loss {runs[-1].losses[-1]:.3f}")
    for run in runs:
        with torch.no_grad():
            run.train_loss = functional.cross_entropy(run.model(train_x), train_y).item()
            run.accuracy = (run.model(test_x).argmax(1) == test_y).float().mean().item()
    return Digits(runs, max_norm)


def _runs(max_norm: float, seed: int) -> list[Run]:
    def model() -> Net:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return Net()

    return [
        Run("none", "", lambda parameters: None, model()),
        Run("value", "torch", lambda parameters: nn.utils.clip_grad_value_(parameters, CLIP_VALUE), model()),
        Run("value", "fastclip", lambda parameters: fastclip.clip_grad_value_(parameters, CLIP_VALUE), model()),
        Run("norm", "torch", lambda parameters: nn.utils.clip_grad_norm_(parameters, max_norm), model()),
        Run("norm", "fastclip", lambda parameters: fastclip.clip_grad_norm_(parameters, max_norm), model()),
    ]


def _train_step(run: Run, x: Tensor, y: Tensor, max_norm: float) -> None:
    run.optimizer.zero_grad()
    loss = functional.cross_entropy(run.model(x), y)
    loss.backward()

    start = perf_counter_ns()
    norm = run.clip(run.parameters)
    run.clip_us.append((perf_counter_ns() - start) / 1e3)

    grads = [parameter.grad for parameter in run.parameters]
    if run.kind == "none":
        norm = fastclip.get_total_norm(grads)
    if run.kind == "value":
        # Read after the clip, so that the timed call does not find the gradients warmed up by our own bookkeeping.
        run.clipped.append(fastclip.get_total_norm(grads, float("inf")).item() >= CLIP_VALUE)
    else:
        run.clipped.append(run.kind == "norm" and norm.item() > max_norm)
    run.norms.append(None if norm is None else norm.item())
    run.losses.append(loss.item())
    run.optimizer.step()
