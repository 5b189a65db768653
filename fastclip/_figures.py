"""What the charts of the demo, of the monitor's report and of the experiments share. Needs matplotlib."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy import ndarray

# Okabe and Ito's palette: told apart with every kind of colour vision.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#000000")


def figure(rows: int, columns: int, size: tuple[float, float], title: str) -> tuple[Figure, ndarray]:
    """A figure with a title, and its (rows, columns) axes, of which the x axis counts steps."""
    made = Figure(figsize=size, layout="constrained")
    made.suptitle(title, fontweight="bold")
    axes = made.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        clean(axis)
    return made, axes


def clean(axis: Axes) -> None:
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.xaxis.set_major_locator(MaxNLocator(nbins="auto", steps=[1, 2, 5, 10], integer=True))


def legend_below(made: Figure, axis: Axes) -> Figure:
    handles, labels = axis.get_legend_handles_labels()
    made.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return made
