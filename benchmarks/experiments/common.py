"""What the experiments share: arguments, the table in Markdown, the chart, and spreads over seeds."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

import torch

COLOURS = ("#D55E00", "#E69F00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9")
HERE = Path(__file__).resolve().parent


def parse(doc: str | None, argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the table and the chart")
    parser.add_argument("--quick", action="store_true", help="a few steps of a few runs, to see that it works")
    arguments = parser.parse_args(argv)
    arguments.start = perf_counter()
    # As the demo: more threads gain little on nets this small, and give every machine other curves.
    torch.set_num_threads(1)
    return arguments


def write(arguments: argparse.Namespace, name: str, columns: Sequence[str], rows: Sequence[Sequence[str]], figure):
    """Writes NAME.md and NAME.png, and prints the table."""
    lines = [" | ".join(cells) for cells in (columns, ["---"] * len(columns), *rows)]
    table = "".join(f"| {line} |\n" for line in lines)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"{name}.md").write_text(table, encoding="utf-8")
    figure.savefig(arguments.out / f"{name}.png", dpi=90)
    print(table, end="")
    print(f"{perf_counter() - arguments.start:.0f} s; written: {arguments.out / name}.md and .png")


def figure(columns: int, title: str):
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(max(8.0, 5.5 * columns), 4.6), layout="constrained")
    drawn.suptitle(title, fontweight="bold")
    axes = drawn.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    return drawn, axes


def spread(values: Sequence[float], form: str = ".3g") -> str:
    """Median, and the least and the largest over seeds."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"
