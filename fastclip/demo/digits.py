"""The article's LSTM classifier on handwritten digits, clipped by torch's functions and by fastclip's, side by side."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter_ns

import torch
from torch import Tensor, nn
from torch.nn import functional

import fastclip

STEPS, BATCH, RATE = 276, 64, 0.01  # 12 epochs of 23 batches
CLIP_VALUE, MAX_NORM = 1.0, 2.0
# The first steps pay for caches and lazy imports: they train, but their times are dropped.
WARMUP_STEPS = 10
FLOAT64 = "torch float64"


class Net(nn.Module):
    """Two LSTM layers over the rows of an image, and a linear layer on the last hidden state."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 128, num_layers=2, batch_first=True)
        self.fc = nn.Linear(128, 10)

    def forward(self, rows: Tensor) -> Tensor:
        return self.fc(self.lstm(rows)[0][:, -1, :])


@dataclass
class Run:
    """One training run: how it is clipped, by whose functions, and what was seen at every step."""

    kind: str
    library: str
    clip: Callable[[list[nn.Parameter]], Tensor | None]
    losses: list[float] = field(default_factory=list)
    norms: list[float | None] = field(default_factory=list)  # before clipping; None where clipping does not tell
    clipped: list[bool] = field(default_factory=list)
    clip_us: list[float] = field(default_factory=list)
    train_loss: float = math.nan
    accuracy: float = math.nan

    def start(self, seed: int) -> None:
        """Make model and optimizer; the same weights for the same seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = Net()
        self.parameters = list(self.model.parameters())
        self.optimizer = torch.optim.Adam(self.parameters, lr=RATE)

    def times(self) -> list[float]:
        """Microseconds of each clip call after the warm-up."""
        return self.clip_us[min(WARMUP_STEPS, len(self.clip_us) // 2) :]

    def quartiles(self) -> list[float]:
        """First quartile, median and third quartile of `times`."""
        times = self.times()
        return statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3


@dataclass
class Digits:
    """All runs of the experiment."""

    runs: list[Run]
    max_norm: float

    def find(self, kind: str, library: str = "") -> Run:
        """The run clipped in this way by this library."""
        return next(run for run in self.runs if (run.kind, run.library) == (kind, library))

    def differences(self, kind: str, library: str) -> list[float]:
        """|loss of fastclip's run - loss of the library's run| at every step."""
        ours, theirs = self.find(kind, "fastclip").losses, self.find(kind, library).losses
        return [abs(a - b) for a, b in zip(ours, theirs, strict=True)]


def load(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Train images, train labels, test images, test labels of 1,797 real digits; an image is 8 rows of 8 in 0..1."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    train, test = train_test_split(range(len(labels)), test_size=0.2, random_state=seed, stratify=labels)
    images = torch.tensor(images / 16.0, dtype=torch.float32).view(-1, 8, 8)
    labels = torch.tensor(labels, dtype=torch.int64)
    return images[train], labels[train], images[test], labels[test]


def batches(samples: int, size: int, steps: int, seed: int) -> list[Tensor]:
    """The indices of each step's batch; the samples are shuffled anew in every epoch."""
    generator = torch.Generator().manual_seed(seed)
    order: list[Tensor] = []
    while len(order) < steps:
        order.extend(torch.randperm(samples, generator=generator).split(size))
    return order[:steps]


def run(steps: int | None, max_norm: float | None, seed: int, show: Callable[[int, int, str], None]) -> Digits:
    """Train equal models in lockstep: not clipped, and by value and by norm with torch and with fastclip.

    torch's norm and fastclip's can differ in the last bit: a run of torch with the norm in float64 tells who is right.
    """
    steps, max_norm = steps or STEPS, max_norm or MAX_NORM

    def clip_by_float64_norm(params: list[nn.Parameter]) -> Tensor:
        norm = nn.utils.get_total_norm([param.grad.double() for param in params])
        nn.utils.clip_grads_with_norm_(params, max_norm, norm)
        return norm

    runs = [
        Run("none", "", lambda params: None),
        Run("value", "torch", lambda params: nn.utils.clip_grad_value_(params, CLIP_VALUE)),
        Run("value", "fastclip", lambda params: fastclip.clip_grad_value_(params, CLIP_VALUE)),
        Run("norm", "torch", lambda params: nn.utils.clip_grad_norm_(params, max_norm)),
        Run("norm", "fastclip", lambda params: fastclip.clip_grad_norm_(params, max_norm)),
        Run("norm", FLOAT64, clip_by_float64_norm),
    ]
    for each in runs:
        each.start(seed)
    train_x, train_y, test_x, test_y = load(seed)
    for step, batch in enumerate(batches(len(train_x), BATCH, steps, seed)):
        for each in runs if step % 2 else runs[::-1]:  # neither library always goes first
            _train_step(each, train_x[batch], train_y[batch], max_norm)
        show(step + 1, steps, f"loss {runs[-1].losses[-1]:.3f}")
    for each in runs:
        with torch.no_grad():
            each.train_loss = functional.cross_entropy(each.model(train_x), train_y).item()
            each.accuracy = (each.model(test_x).argmax(1) == test_y).float().mean().item()
    return Digits(runs, max_norm)


def _train_step(run: Run, x: Tensor, y: Tensor, max_norm: float) -> None:
    run.optimizer.zero_grad()
    loss = functional.cross_entropy(run.model(x), y)
    loss.backward()
    start = perf_counter_ns()
    norm = run.clip(run.parameters)
    run.clip_us.append((perf_counter_ns() - start) / 1e3)

    # Read after the clip: reading before would hand the timed call gradients that are already in the cache.
    grads = [parameter.grad for parameter in run.parameters]
    if run.kind == "value":
        run.clipped.append(fastclip.get_total_norm(grads, math.inf).item() >= CLIP_VALUE)
    else:
        norm = fastclip.get_total_norm(grads) if norm is None else norm
        run.clipped.append(run.kind == "norm" and norm.item() > max_norm)
    run.norms.append(None if norm is None else norm.item())
    run.losses.append(loss.item())
    run.optimizer.step()
