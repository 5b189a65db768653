"""The chart of a report: one panel per regime, one bar per case, the ratio to torch foreach."""

import textwrap
from pathlib import Path
from typing import Any

from .report import conditions_line


def ratio_chart(report: dict[str, Any], path: Path) -> None:
    """Draw how many times as fast as torch foreach every fastclip backend is; needs matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FormatStrFormatter, NullLocator

    rows = [row for row in report["rows"] if row["provider"].startswith("fastclip") and row["ratio"] is not None]
    names = [case["name"] for case in report["cases"]]
    regimes = {row["regime"]: row["what"] for row in report["rows"]}
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    low, high = min([0.9, *(row["ratio"] for row in rows)]), max([1.5, *(row["ratio"] for row in rows)])
    room = (high / low) ** 0.2  # for the labels, the same on both sides of a log axis
    ticks = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50] if high / low < 100 else [0.01, 0.1, 1, 10, 100, 1000]
    height = 0.8 / max(len(providers), 1)

    figure = Figure(figsize=(max(3.1 * len(regimes), 6) + 1.5, 0.5 * len(names) + 2.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(regimes), sharey=True, squeeze=False)[0]
    for axes, (regime, what) in zip(panels, regimes.items(), strict=True):
        for p, provider in enumerate(providers):
            mine = {r["case"]: r["ratio"] for r in rows if (r["regime"], r["provider"]) == (regime, provider)}
            ys = [names.index(name) + (p - (len(providers) - 1) / 2) * height for name in mine]
            widths = [ratio - 1 for ratio in mine.values()]
            bars = axes.barh(ys, widths, 0.9 * height, left=1, color=f"C{p}", label=provider)
            axes.bar_label(bars, [f"{ratio:.2f}" for ratio in mine.values()], padding=3, fontsize=8)
        axes.axvline(1, color="black", linewidth=1)
        axes.set_xscale("log")
        axes.set_xlim(low / room, high * room)
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_title(what, fontsize=10)
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
    clock = " on the device" if "gpu" in report["conditions"] else ""
    figure.suptitle(f"fastclip against torch foreach: how many times as fast{clock} (1 = the same, log axis)")
    columns = int(17 * figure.get_figwidth())
    figure.supxlabel(textwrap.fill(conditions_line(report["conditions"]), columns), fontsize=7)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)
