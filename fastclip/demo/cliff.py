"""The cliff of Pascanu et al. (arXiv:1211.5063, figure 6): one recurrent unit, its error surface, and descent on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

import fastclip

TIME_STEPS, FIRST_STATE, TARGET = 50, 0.5, 0.7
WEIGHTS, BIASES = (4.0, 6.5), (-3.6, -1.6)
START = (5.8, -3.0)  # on the plateau above the wall
STEPS, RATE, MAX_NORM = 400, 0.1, 0.5
STARTS, SOLVED = 100, 1e-3
COLUMNS = (
    "clipping",
    "start error",
    "end error",
    "peak norm",
    "end w",
    "end b",
    "solved of 100 starts",
    "median end error",
)


@dataclass
class Descent:
    """Gradient descent from one point, and what was seen at every step."""

    kind: str
    path: list[tuple[float, float]] = field(default_factory=list)  # (w, b), the start first
    errors: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)  # before clipping


@dataclass
class Cliff:
    """The surface, both descents from START, and the last errors of both from many starts."""

    weights: Tensor
    biases: Tensor
    surface: Tensor  # (biases, weights)
    descents: list[Descent]
    ends: dict[str, Tensor]


def error(weight: Tensor, bias: Tensor) -> Tensor:
    """``(sigmoid(x_50) - 0.7)^2`` of ``x_k = w sigmoid(x_{k-1}) + b``, ``x_0 = 0.5``."""
    state = torch.full_like(weight, FIRST_STATE)
    for _ in range(TIME_STEPS):
        state = weight * torch.sigmoid(state) + bias
    return (torch.sigmoid(state) - TARGET) ** 2


def run(steps: int | None, max_norm: float | None, seed: int, show: Callable[[int, int, str], None]) -> Cliff:
    """The surface, and descent with and without clipping by norm: from START, and from random points near the wall."""
    steps, max_norm = steps or STEPS, max_norm or MAX_NORM
    weights = torch.linspace(*WEIGHTS, 401, dtype=torch.float64)
    biases = torch.linspace(*BIASES, 401, dtype=torch.float64)
    surface = error(*torch.meshgrid(weights, biases, indexing="xy"))
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(STARTS, 2, generator=generator, dtype=torch.float64)
    # The wall is where x_0 is a fixed point: b = x_0 - w sigmoid(x_0). The starts lie up to 0.4 above it.
    w = 4.5 + 1.5 * drawn[:, 0]
    wall = FIRST_STATE - w * torch.sigmoid(torch.tensor(FIRST_STATE, dtype=torch.float64))
    starts = torch.stack([w, wall + 0.4 * drawn[:, 1]], 1)
    descents, ends = [], {}
    for done, kind in enumerate(("none", "norm"), 1):
        descents.append(_descend(kind, steps, max_norm))
        ends[kind] = _ends(kind, starts, steps, max_norm)
        show(done * steps, 2 * steps, f"clipped by {kind}")
    return Cliff(weights, biases, surface, descents, ends)


def _descend(kind: str, steps: int, max_norm: float) -> Descent:
    seen = Descent(kind)
    point = torch.tensor(START, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([point], lr=RATE)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = error(point[0], point[1])
        loss.backward()
        seen.path.append(tuple(point.tolist()))
        seen.errors.append(loss.item())
        limit = max_norm if kind == "norm" else float("inf")
        seen.norms.append(fastclip.clip_grad_norm_([point], limit).item())
        optimizer.step()
    seen.path.append(tuple(point.tolist()))
    seen.errors.append(error(point[0], point[1]).item())
    return seen


def _ends(kind: str, starts: Tensor, steps: int, max_norm: float) -> Tensor:
    """The last error from each start; every point is clipped by itself."""
    points = starts.clone().requires_grad_()
    optimizer = torch.optim.SGD([points], lr=RATE)
    for _ in range(steps):
        optimizer.zero_grad()
        error(points[:, 0], points[:, 1]).sum().backward()
        if kind == "norm":
            fastclip.functional.clip_by_norm_(points.grad, max_norm, dim=1)
        optimizer.step()
    with torch.no_grad():
        return error(points[:, 0], points[:, 1])


def rows(wall: Cliff) -> list[tuple[str, ...]]:
    """The table, under COLUMNS: the descent from START, and how many of the random starts end below SOLVED."""
    return [
        (
            each.kind,
            f"{each.errors[0]:.3g}",
            f"{each.errors[-1]:.2g}",
            f"{max(each.norms):.3g}",
            *(f"{end:.3f}" for end in each.path[-1]),
            str(int((wall.ends[each.kind] < SOLVED).sum())),
            f"{wall.ends[each.kind].median().item():.2g}",
        )
        for each in wall.descents
    ]
