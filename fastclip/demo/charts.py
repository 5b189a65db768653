"""The demo's PNG charts."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import fmean

from fastclip._figures import PALETTE, legend_below
from fastclip._figures import figure as figure_of
from fastclip.demo.cliff import BIASES, START, WEIGHTS, Cliff
from fastclip.demo.digits import CLIP_VALUE, WARMUP_STEPS, Digits
from fastclip.demo.regression import ARTICLE_RATE, RATE, Run

BLUE, VERMILION, GREEN, ORANGE = PALETTE[:4]
COLOURS = {"none": VERMILION, "value": BLUE, "norm": GREEN, "torch": ORANGE, "fastclip": BLUE}
LABELS = {"none": "not clipped", "value": "clipped by value", "norm": "clipped by norm"}
SMOOTHED_STEPS = 20  # single batches of digits are too noisy to compare


def draw(folder: Path, images: Digits, points: list[Run], wall: Cliff) -> list[Path]:
    """Draw norms.png, losses.png, times.png and cliff.png; return their paths."""
    paths = [folder / f"{name}.png" for name in ("norms", "losses", "times", "cliff")]
    figures = (_norms(images, points), _losses(images, points), _times(images), cliff(wall))
    for path, figure in zip(paths, figures, strict=True):
        figure.savefig(path, dpi=150)
    return paths


def _norms(images: Digits, points: list[Run]):
    figure, axes = figure_of(2, 2, (12, 8), "Gradient norms with and without clipping: as the clip call measured them")
    runs = [run for run in points if run.rate == RATE]
    names = {"total": f"all layers, max_norm {runs[2].limit:g}", "fc1": "layer fc1", "fc2": "layer fc2"}
    for axis, (layer, name) in zip((axes[0, 0], axes[1, 0], axes[1, 1]), names.items(), strict=True):
        _lines(axis, {run.kind: run.norms[layer] for run in runs}, {run.kind: run.nonfinite_step for run in runs})
        axis.set_title(f"Regression, rate {RATE:g}: {name}")
    _limit(axes[0, 0], runs[2].limit, runs[2].clipped)
    by_norm = images.find("norm", "fastclip")
    _lines(axes[0, 1], {"none": images.find("none").norms, "norm": by_norm.norms}, {})
    axes[0, 1].set_title(f"Digits, LSTM: all layers, max_norm {images.max_norm:g}")
    _limit(axes[0, 1], images.max_norm, by_norm.clipped)
    for axis in axes.flat:
        axis.set(xlabel="step", ylabel="gradient norm before clipping (L2)")
    return legend_below(figure, axes[0, 0])


def _losses(images: Digits, points: list[Run]):
    figure, axes = figure_of(1, 3, (14, 5), "Training loss with and without clipping")
    runs = [images.find("none"), images.find("value", "fastclip"), images.find("norm", "fastclip")]
    ends = range(1, len(runs[0].losses) + 1)
    smooth = {run.kind: [fmean(run.losses[max(0, end - SMOOTHED_STEPS) : end]) for end in ends] for run in runs}
    _lines(axes[0, 0], smooth, {})
    axes[0, 0].set(title="Digits, LSTM", xlabel="step", ylabel=f"cross-entropy (nats), mean of {SMOOTHED_STEPS} steps")
    for axis, rate, whose in ((axes[0, 1], RATE, ""), (axes[0, 2], ARTICLE_RATE, " (the article's)")):
        runs = [run for run in points if run.rate == rate]
        _lines(axis, {run.kind: run.losses for run in runs}, {run.kind: run.nonfinite_step for run in runs})
        axis.set(title=f"Regression, rate {rate:g}{whose}", xlabel="step", ylabel="mean squared error of the batch")
    return legend_below(figure, axes[0, 1])


def _times(images: Digits):
    figure, axes = figure_of(1, 2, (12, 5), "Time in the clip call: LSTM on digits")
    titles = (f"clip_grad_value_, clip_value {CLIP_VALUE:g}", f"clip_grad_norm_, max_norm {images.max_norm:g}")
    for axis, kind, title in zip(axes.flat, ("value", "norm"), titles, strict=True):
        top = 2 * max(images.find(kind, library).quartiles()[2] for library in ("torch", "fastclip"))
        for library in ("torch", "fastclip"):
            run, colour = images.find(kind, library), COLOURS[library]
            times, median = dict(enumerate(run.times(), len(run.losses) - len(run.times()) + 1)), run.quartiles()[1]
            shown = {step: time for step, time in times.items() if time <= top}
            label = f"{library}: median {median:.0f} µs, {len(times) - len(shown)} calls above the chart"
            axis.plot(shown.keys(), shown.values(), ".", color=colour, markersize=3)
            axis.axhline(median, color=colour, label=label)
        axis.set(title=title, xlabel=f"step (up to {WARMUP_STEPS} warm-up steps left out)", ylabel="time per call (µs)")
        axis.set_ylim(0, 1.25 * top)  # room for the legend
        axis.legend(loc="upper right")
    return figure


def cliff(wall: Cliff):
    """The error surface in log colour, once for each descent."""
    from matplotlib.colors import LogNorm
    from matplotlib.patheffects import withStroke
    from matplotlib.ticker import AutoLocator

    figure, axes = figure_of(
        1, 2, (12, 5.2), "The cliff: descent on (sigmoid(x_50) - 0.7)^2, x_k = w sigmoid(x_k-1) + b"
    )
    edges = WEIGHTS, BIASES
    surface = [each.numpy() for each in (wall.weights, wall.biases, wall.surface)]
    halo = [withStroke(linewidth=2.5, foreground="black")]
    for axis, run in zip(axes.flat, wall.descents, strict=True):
        shown = axis.pcolormesh(*surface, norm=LogNorm(1e-4, 0.5), cmap="viridis", rasterized=True)
        colour = {"none": "#FF6A3D", "norm": "white"}[run.kind]  # seen on every colour of the surface
        axis.plot(*zip(*run.path, strict=True), ".-", color=colour, linewidth=1.0, markersize=3)
        axis.plot(*START, "o", color="white", markeredgecolor="black", markersize=9)
        axis.annotate("start", START, (8, 8), textcoords="offset points", path_effects=halo, color="white")
        inside = [
            (low <= w <= high and bottom <= b <= top) for w, b in run.path for (low, high), (bottom, top) in [edges]
        ]
        end = f"ends at w = {run.path[-1][0]:.2f}, b = {run.path[-1][1]:.2f}"
        left = "" if all(inside) else f", off the chart from step {inside.index(False)}"
        axis.set(title=f"{LABELS[run.kind]}: {end}{left}", xlabel="w", ylabel="b", xlim=edges[0], ylim=edges[1])
        axis.title.set_fontsize(10)
        axis.xaxis.set_major_locator(AutoLocator())
        axis.grid(False)
    figure.colorbar(shown, ax=axes, label="error (log colour)", extend="min")
    return figure


def _lines(axis, series: dict[str, list[float]], nonfinite: dict[str, int | None]) -> None:
    """One line per run on a log axis scaled to the runs that stay finite; the others leave through its top."""
    calm: list[float] = []
    exploded = [kind for kind, step in nonfinite.items() if step]
    for kind, values in series.items():
        points = {step: value for step, value in enumerate(values, 1) if 0 < value < math.inf}
        style = {"linewidth": 2.0 if kind in exploded else 1.1, "marker": "." if len(points) < 20 else ""}
        axis.plot(points.keys(), points.values(), color=COLOURS[kind], label=LABELS[kind], **style)
        calm.extend(() if kind in exploded else points.values())
    axis.set_yscale("log")
    if calm:
        axis.set_ylim(min(calm) / 4, max(calm) * (1000 if exploded else 2))
    for row, kind in enumerate(exploded):
        text, place = f"{LABELS[kind]}: NaN or inf from step {nonfinite[kind]}", (0.98, 0.97 - 0.07 * row)
        axis.text(*place, text, color=COLOURS[kind], transform=axis.transAxes, ha="right", va="top")


def _limit(axis, max_norm: float, clipped: list[bool]) -> None:
    """The max_norm line, and a tick on the step axis wherever the clip was active."""
    low, high = axis.get_ylim()
    axis.set_ylim(min(low, max_norm / 4), max(high, max_norm * 4))
    axis.axhline(max_norm, color="black", linestyle="--", linewidth=1, label="max_norm of the run clipped by norm")
    steps = [step for step, active in enumerate(clipped, 1) if active]
    ticks = {"color": "black", "markersize": 9, "transform": axis.get_xaxis_transform()}
    axis.plot(steps, [0.02] * len(steps), "|", label="step where clipping by norm was active", **ticks)
