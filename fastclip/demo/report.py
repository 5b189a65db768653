"""The demo's tables on the terminal and its CSV files."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

from fastclip.demo import regression
from fastclip.demo.digits import CLIP_VALUE, Digits
from fastclip.demo.regression import Regression


def print_digits(console, result: Digits) -> None:
    """Print the table of the digits experiment and, below it, how equal torch's and fastclip's runs are."""
    table = _table(
        "Digits: 2-layer LSTM, Adam", "clipped by", "functions", "train loss", "accuracy", "clipped", "us per clip", "IQR"
    )
    for run in result.runs:
        low, median, high = run.quartiles()
        timed = (f"{median:.1f}", f"{low:.1f}-{high:.1f}") if run.library else ("", "")
        active = f"{sum(run.clipped)}/{len(run.clipped)}" if run.library else ""
        table.add_row(run.kind, run.library, f"{run.train_loss:.4f}", f"{run.accuracy:.2%}", active, *timed)
    console.print(table)
    console.print(f"value: every entry to [-{CLIP_VALUE:g}, {CLIP_VALUE:g}]; norm: max_norm {result.max_norm:g}")
    for kind in ("value", "norm"):
        torch_run, fastclip_run = result.pair(kind)
        ratio = torch_run.quartiles()[1] / fastclip_run.quartiles()[1]
        console.print(f"{kind}, torch against fastclip: {_equality(result, kind)}; time per clip call {ratio:.2f} : 1")


def print_regression(console, result: Regression) -> None:
    """Print the table of the regression experiment and what the learning rates mean."""
    title = "Regression: 20-25-1 net, SGD with momentum"
    table = _table(title, "rate", "clipped by", "loss before", "loss after", "clipped", "largest norm", "outcome")
    for run in result.runs:
        table.add_row(
            f"{run.rate:g}",
            run.name,
            f"{run.loss_before:.5g}",
            f"{run.loss_after:.3g}",
            "" if run.kind == "none" else f"{sum(run.clipped)}/{len(run.clipped)}",
            f"{max(run.norms['total']):.3g}",
            _outcome(run),
        )
    console.print(table)
    console.print(
        f"rate {regression.ARTICLE_RATE:g} is the article's; {regression.RATE:g} is ours: low enough to watch the explosion"
    )


def _outcome(run: regression.Run) -> str:
    if run.nonfinite_step is not None:
        return f"NaN or inf from step {run.nonfinite_step}"
    if run.converged:
        return "converged"
    return "not exploded yet" if run.kind == "none" else "not converged yet"


def _equality(result: Digits, kind: str) -> str:
    difference, step = result.difference(kind)
    steps = len(result.runs[0].losses)
    if step is None:
        return f"losses bit-equal in all {steps} steps"
    return f"losses bit-equal before step {step} of {steps}, then they differ by at most {difference:.2g}"


def _table(title: str, *columns: str):
    from rich import box
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column in ("clipped by", "functions", "outcome") else "right")
    return table


def write_csv(folder: Path, digits_result: Digits, regression_result: Regression) -> list[Path]:
    """Write digits.csv and regression.csv, one row per run and step (and layer); return their paths."""
    digits_rows = (
        (step, run.name, run.kind, run.library, loss, "" if norm is None else norm, int(clipped), microseconds)
        for run in digits_result.runs
        for step, (loss, norm, clipped, microseconds) in enumerate(
            zip(run.losses, run.norms, run.clipped, run.clip_us, strict=True), 1
        )
    )
    regression_rows = (
        (step, run.name, run.kind, run.rate, layer, norm, run.losses[step - 1], int(run.clipped[step - 1]))
        for run in regression_result.runs
        for layer, norms in run.norms.items()
        for step, norm in enumerate(norms, 1)
    )
    return [
        _write(folder / "digits.csv", "step run kind library loss total_norm clipped clip_us", digits_rows),
        _write(folder / "regression.csv", "step run kind rate layer norm loss clipped", regression_rows),
    ]


def _write(path: Path, header: str, rows: Iterable[tuple]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header.split())
        writer.writerows(rows)
    return path
