"""The demo's PNG charts."""

from __future__ import annotations

import math
from pathlib import Path

from fastclip.demo.digits import CLIP_VALUE, WARMUP_STEPS, Digits
from fastclip.demo.regression import ARTICLE_RATE, RATE, Regression

# Okabe and Ito's palette: told apart with every kind of colour vision.
COLOURS = {"none": "#D55E00", "value": "#0072B2", "norm": "#009E73", "torch": "#E69F00", "fastclip": "#0072B2"}
SMOOTHED_STEPS = 20
LABELS = {"none": "not clipped", "value": "clipped by value", "norm": "clipped by norm"}


def draw(folder: Path, digits: Digits, regression: Regression) -> list[Path]:
    """Draw norms.png, losses.png and times.png into `folder`; return their paths."""
    figures = {"norms": _norms(digits, regression), "losses": _losses(digits, regression), "times": _times(digits)}
    paths = [folder / f"{name}.png" for name in figures]
    for path, figure in zip(paths, figures.values(), strict=True):
        figure.savefig(path, dpi=150)
    return paths


def _norms(digits: Digits, regression: Regression):
    figure, axes = _figure(2, 2, (12, 8), "Gradient norms with and without clipping: what the clip call measured, before it scaled")
    runs = regression.at(RATE)
    nonfinite = {run.kind: run.nonfinite_step for run in runs}
    panels = {"total": axes[0, 0], "fc1": axes[1, 0], "fc2": axes[1, 1]}
    for layer, axis in panels.items():
        _lines(axis, {run.kind: run.norms[layer] for run in runs}, nonfinite)
        axis.set_title(f"Regression, rate {RATE:g}: " + ("all layers" if layer == "total" else f"layer {layer}"))
    _limit(axes[0, 0], runs[2].limit, runs[2].clipped)

    unclipped, clipped = digits.runs[0], digits.pair("norm")[1]
    _lines(axes[0, 1], {"none": unclipped.norms, "norm": clipped.norms})
    _limit(axes[0, 1], digits.max_norm, clipped.clipped)
    axes[0, 1].set_title("Digits, LSTM: all layers")
    for axis in axes.flat:
        axis.set(xlabel="step", ylabel="gradient norm (L2)")
    _legend(figure, axes[0, 0])
    return figure


def _losses(digits: Digits, regression: Regression):
    figure, axes = _figure(1, 3, (14, 5), "Training loss with and without clipping")
    runs = (digits.runs[0], digits.pair("value")[1], digits.pair("norm")[1])
    _lines(axes[0, 0], {run.kind: _moving_mean(run.losses) for run in runs})
    axes[0, 0].set(title="Digits, LSTM", xlabel="step", ylabel=f"cross-entropy (nats), mean of {SMOOTHED_STEPS} steps")
    for axis, rate, whose in ((axes[0, 1], RATE, ""), (axes[0, 2], ARTICLE_RATE, " (the article's)")):
        runs = regression.at(rate)
        _lines(axis, {run.kind: run.losses for run in runs}, {run.kind: run.nonfinite_step for run in runs})
        axis.set(title=f"Regression, rate {rate:g}{whose}", xlabel="step", ylabel="mean squared error of the batch")
    _legend(figure, axes[0, 1])
    return figure


def _times(digits: Digits):
    figure, axes = _figure(1, 2, (12, 5), "Time in the clip call: LSTM on digits")
    titles = (f"clip_grad_value_, clip_value {CLIP_VALUE:g}", f"clip_grad_norm_, max_norm {digits.max_norm:g}")
    for axis, kind, title in zip(axes.flat, ("value", "norm"), titles, strict=True):
        for run in digits.pair(kind):
            times, median, colour = run.times(), run.quartiles()[1], COLOURS[run.library]
            steps = range(len(run.clip_us) - len(times) + 1, len(run.clip_us) + 1)
            axis.plot(steps, times, ".", color=colour, markersize=3, alpha=0.6)
            axis.axhline(median, color=colour, label=f"{run.library}: median {median:.0f} µs")
        axis.set(title=title, xlabel=f"step (up to {WARMUP_STEPS} warm-up steps left out)", ylabel="time per call (µs)")
        axis.set_yscale("log")
        axis.legend(loc="upper right")
    return figure


def _figure(rows: int, columns: int, size: tuple[float, float], title: str):
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title, fontweight="bold")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _lines(axis, series: dict[str, list[float]], nonfinite: dict[str, int | None] | None = None) -> None:
    """One line per run on a log axis scaled to the runs that stay finite; the others leave through its top edge."""
    nonfinite = nonfinite or {}
    drawable = {
        kind: [(step, value) for step, value in enumerate(values, 1) if 0 < value < math.inf]
        for kind, values in series.items()
    }
    for kind, points in drawable.items():
        if points:
            width = 2.0 if nonfinite.get(kind) else 1.1
            axis.plot(*zip(*points, strict=True), color=COLOURS[kind], label=LABELS[kind], linewidth=width)
    axis.set_yscale("log")
    calm = [value for kind, points in drawable.items() if not nonfinite.get(kind) for _, value in points]
    if calm:
        axis.set_ylim(min(calm) / 4, max(calm) * 1000 if any(nonfinite.values()) else max(calm) * 2)
    for kind, step in nonfinite.items():
        if step:
            text = f"not clipped: NaN or inf\nfrom step {step}"
            where = {"xycoords": axis.get_xaxis_transform(), "xytext": (12, -4), "textcoords": "offset points"}
            axis.annotate(text, (step, 1), va="top", color=COLOURS[kind], **where)


def _moving_mean(values: list[float]) -> list[float]:
    """The mean of each value and those before it, at most SMOOTHED_STEPS: single batches are too noisy to compare."""
    windows = (values[max(0, end - SMOOTHED_STEPS) : end] for end in range(1, len(values) + 1))
    return [sum(window) / len(window) for window in windows]


def _limit(axis, max_norm: float, clipped: list[bool]) -> None:
    """The max_norm line, and a tick on the step axis wherever the clip was active."""
    axis.axhline(max_norm, color="black", linestyle="--", linewidth=1, label="max_norm of the run clipped by norm")
    steps = [step for step, active in enumerate(clipped, 1) if active]
    label = "step where clipping by norm was active"
    axis.plot(
        steps, [0.02] * len(steps), "|", color="black", markersize=9, transform=axis.get_xaxis_transform(), label=label
    )


def _legend(figure, axis) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
