"""The PNG charts of a report."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure

from .._figures import PALETTE, figure, legend_below
from ..monitor.alarms import line
from .log import Run
from .verdict import Verdict

BLUE, VERMILION, GREEN, ORANGE, PINK, SKY, BLACK = PALETTE
# As many as can be told apart on a chart of this width.
POINTS, TICKS, COLUMNS, LAYERS = 2000, 400, 600, 40
CAUSES = {"nonfinite": VERMILION, "norm": ORANGE, "growth": PINK, "loss": BLUE, "vanishing": GREEN}


class Picture(NamedTuple):
    """A chart that was written, and what it shows."""

    path: Path
    caption: str


def draw(folder: Path, runs: Sequence[Run], verdicts: Sequence[Verdict]) -> list[Picture]:
    """Draws what there is to draw; several runs share the chart of norms and that of losses."""
    made = [("norms.png", _norms(runs), "Gradient norm before and after the clip, and its bound")]
    if any("loss" in run.columns for run in runs):
        made.append(("loss.png", _losses(runs, verdicts), "Loss, and where an alarm began"))
    for i, run in enumerate(runs):
        end = f"-{i + 1}" if len(runs) > 1 else ""
        of = f" of {run.name}" if len(runs) > 1 else ""
        if run.layers:
            made.append((f"layers{end}.png", _layers(run), f"Gradient norm of each parameter at each step{of}"))
        if run.bounded.any():
            made.append((f"coefficients{end}.png", _coefficients(run), f"What gradients were multiplied by{of}"))
        for name, seen in run.hidden.items():
            if any(seen):
                picture = _hidden(name, seen)
                made.append((f"hidden-{_slug(name)}{end}.png", picture, f"The gradient of the loss along {name}{of}"))
    pictures = []
    for name, picture, caption in made:
        picture.savefig(folder / name, dpi=110)
        pictures.append(Picture(folder / name, caption))
    return pictures


def _norms(runs: Sequence[Run]) -> Figure:
    made, axes = figure(1, 1, (11, 5.5), "Gradient norm")
    axis = axes[0, 0]
    several = len(runs) > 1
    for i, run in enumerate(runs):
        colour = PALETTE[i % len(PALETTE)] if several else BLUE
        _series(axis, run.steps, run.norms, colour, run.name if several else "before the clip")
        if several:
            continue
        if run.clipped.any():
            _series(axis, run.steps, run.column("grad_norm_clipped"), GREEN, "after the clip")
        if run.bounded.any():
            axis.plot(run.steps, run.max_norms, color=BLACK, linestyle="--", linewidth=1, label="max_norm")
        _ticks(axis, run.steps[run.clipped], BLACK, 0.02, f"clipped: {_steps(run.clipped)}")
        _ticks(axis, run.steps[run.nonfinite], VERMILION, 0.06, f"not finite: {_steps(run.nonfinite)}")
    values = np.concatenate([run.norms[np.isfinite(run.norms) & (run.norms > 0)] for run in runs])
    if len(values):
        axis.set_yscale("log")
        bounds = np.concatenate([run.max_norms[run.bounded] for run in runs])
        low, high = np.concatenate([values, bounds]).min(), np.concatenate([values, bounds]).max()
        # What explodes leaves through the top, so that the rest can be seen.
        axis.set_ylim(low / 3, min(high * 3, 1e6 * float(np.median(values))))
    else:
        axis.text(0.5, 0.5, "no step had a finite norm", transform=axis.transAxes, ha="center")
    axis.set(xlabel="step", ylabel="L2 norm of all gradients (log axis)")
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    return made


def _losses(runs: Sequence[Run], verdicts: Sequence[Verdict]) -> Figure:
    made, axes = figure(1, 1, (11, 5), "Loss")
    axis = axes[0, 0]
    everything = np.concatenate([run.column("loss") for run in runs])
    finite = everything[np.isfinite(everything)]
    if len(finite) and finite.min() > 0 and finite.max() > 20 * np.median(finite):
        axis.set_yscale("log")
    for i, run in enumerate(runs):
        colour = PALETTE[i % len(PALETTE)] if len(runs) > 1 else BLUE
        _series(axis, run.steps, run.column("loss"), colour, run.name if len(runs) > 1 else "loss")
    if not len(finite):
        axis.text(0.5, 0.5, "no step had a finite loss", transform=axis.transAxes, ha="center")
    named = set()
    for event in [event for verdict in verdicts for event in verdict.events][:60]:
        cause = event.cause.partition(" ")[0]
        if cause in CAUSES:
            label = None if cause in named else f"alarm: {_WORDS[cause]}"
            named.add(cause)
            axis.axvline(event.step, color=CAUSES[cause], linewidth=1.2, linestyle=":", label=label)
    axis.set(xlabel="step", ylabel="loss")
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    return made


_WORDS = {
    "nonfinite": "not finite",
    "norm": "jump of the norm",
    "growth": "exponential growth",
    "loss": "jump of the loss",
    "vanishing": "a layer vanishes",
}


def _layers(run: Run) -> Figure:
    names, table = list(run.layers), np.stack(list(run.layers.values()))
    if len(names) > LAYERS:  # those in even distances: neighbours are alike
        chosen = np.linspace(0, len(names) - 1, LAYERS).round().astype(int)
        names, table = [names[i] for i in chosen], table[chosen]
    shown = table.copy()
    shown[~np.isfinite(shown) | (shown <= 0)] = np.nan
    edges = np.linspace(0, len(run), min(COLUMNS, len(run)) + 1).round().astype(int)
    with np.errstate(all="ignore"):
        logs = np.log10(shown)
        cells = np.stack([_median(logs[:, low:high]) for low, high in _pairs(edges)], 1)
    bad = np.stack([(~np.isfinite(table[:, low:high])).any(1) for low, high in _pairs(edges)], 1)
    height = 1.6 + 0.22 * len(names)
    made, axes = figure(1, 1, (12, max(height, 3.2)), f"Gradient norm of each parameter: {run.name}")
    axis = axes[0, 0]
    axis.grid(False)
    values = 10.0**cells
    low, high = (np.nanmin(values), np.nanmax(values)) if np.isfinite(values).any() else (0.1, 1.0)
    scale = LogNorm(max(low, high * 1e-10), high if high > low else low * 1.1)
    extent = (run.steps[0] - 0.5, run.steps[-1] + 0.5, len(names) - 0.5, -0.5)
    image = axis.imshow(values, aspect="auto", cmap="viridis", norm=scale, extent=extent, interpolation="nearest")
    if bad.any():
        mask = np.ma.masked_where(~bad, np.ones_like(values))
        axis.imshow(mask, aspect="auto", cmap=ListedColormap([VERMILION]), extent=extent, interpolation="nearest")
        axis.set_title("vermilion: not finite; white: zero, or no gradient", fontsize=9, loc="left")
    else:
        axis.set_title("white: zero, or no gradient", fontsize=9, loc="left")
    axis.set_yticks(range(len(names)), [_short(name) for name in names], fontsize=8)
    axis.set_xlabel("step")
    made.colorbar(image, ax=axis, label="L2 norm (log)")
    return made


def _coefficients(run: Run) -> Figure:
    coefs = run.column("grad_clip_coef")[run.bounded]
    coefs = coefs[np.isfinite(coefs)]
    made, axes = figure(1, 1, (8, 4.5), f"Clip coefficients: {run.name}")
    axis = axes[0, 0]
    below = coefs[coefs < 1]
    axis.hist(below, bins=np.linspace(0, 1, 41), color=BLUE, label=f"clipped: {_steps(coefs < 1)}")
    axis.bar(
        [1.03], [len(coefs) - len(below)], width=0.03, color=GREEN, label=f"left as it was: {len(coefs) - len(below)}"
    )
    axis.set_xlim(-0.02, 1.08)
    axis.set_xticks([0, 0.25, 0.5, 0.75, 1.03], ["0", "0.25", "0.5", "0.75", "1"])
    axis.set(xlabel="coefficient: max_norm / norm, at most 1", ylabel="steps")
    if len(coefs) > len(below) > 0 and max(len(below), 1) * 50 < len(coefs):
        axis.set_yscale("symlog", linthresh=1)
    return legend_below(made, axis)


def _hidden(name: str, seen: Sequence[Sequence[float]]) -> Figure:
    made, axes = figure(1, 1, (8.5, 5), f"Gradient of the loss along {name}")
    axis = axes[0, 0]
    whole = [norms for norms in seen if norms]
    for norms, label, colour in ((whole[0], "first record", SKY), (whole[-1], "last record", BLUE)):
        back = np.arange(len(norms))  # T - k, or L - k: the last first
        values = np.array(norms[::-1])
        good = np.isfinite(values) & (values > 0)
        slope = ""
        if good.sum() > 1:
            rate, _ = line(np.log(values[good]).tolist())
            slope = f": times {math.exp(rate):.3g} for each step back"
        axis.plot(back[good], values[good], marker=".", color=colour, label=label + slope)
    axis.set_yscale("log")
    axis.set(xlabel="steps back from the end: T - k", ylabel="norm of the loss gradient (log)")
    axis.legend(frameon=False, loc="best")
    return made


def _series(axis: Axes, steps: np.ndarray, values: np.ndarray, colour: str, label: str) -> None:
    """A line; of very many steps the median of each stretch, over the range that they span."""
    good = np.where(np.isfinite(values), values, np.nan)
    if len(steps) <= POINTS:
        axis.plot(steps, good, color=colour, linewidth=1.1, marker="." if len(steps) < 30 else "", label=label)
        return
    edges = np.linspace(0, len(steps), POINTS // 4 + 1).round().astype(int)
    pairs = _pairs(edges)
    with np.errstate(all="ignore"):
        middle = np.array([_median(good[None, low:high])[0] for low, high in pairs])
        least = np.array([np.nanmin(part, initial=np.inf) for part in (good[low:high] for low, high in pairs)])
        most = np.array([np.nanmax(part, initial=-np.inf) for part in (good[low:high] for low, high in pairs)])
    centres = steps[[(low + high - 1) // 2 for low, high in pairs]]
    axis.fill_between(centres, least, most, color=colour, alpha=0.25, linewidth=0)
    axis.plot(centres, middle, color=colour, linewidth=1.1, label=f"{label}: median and range")


def _ticks(axis: Axes, steps: np.ndarray, colour: str, height: float, label: str) -> None:
    if not len(steps):
        return
    if len(steps) > TICKS:
        steps = np.unique(steps[np.linspace(0, len(steps) - 1, TICKS).round().astype(int)])
    heights, above = np.full(len(steps), height), axis.get_xaxis_transform()
    axis.plot(steps, heights, "|", label=label, color=colour, markersize=8, transform=above)


def _steps(which: np.ndarray) -> str:
    count = int(which.sum())
    return f"{count} step{'' if count == 1 else 's'}"


def _median(part: np.ndarray) -> np.ndarray:
    """Along the last dimension; NaN of nothing, without numpy's warning."""
    found = np.full(part.shape[0], np.nan)
    some = np.isfinite(part).any(1)
    found[some] = np.nanmedian(part[some], axis=1)
    return found


def _pairs(edges: np.ndarray) -> list[tuple[int, int]]:
    return [(int(low), int(high)) for low, high in itertools.pairwise(edges)]


def _short(name: str) -> str:
    return name if len(name) <= 42 else f"{name[:18]}...{name[-21:]}"


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)
