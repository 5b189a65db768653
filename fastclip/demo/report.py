"""The demo's tables on the terminal and its CSV files."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import NamedTuple

from fastclip.demo import cliff, digits, regression


def print_digits(console, result: digits.Digits) -> None:
    """Print the table of the digits experiment and how equal torch's runs and fastclip's are."""
    columns = ("clipping", "functions", "train loss", "accuracy", "clipped", "us/clip", "IQR")
    table = _table("Digits: 2-layer LSTM, Adam", *columns)
    for run in result.runs:
        low, median, high = run.quartiles()
        cells = (f"{sum(run.clipped)}/{len(run.clipped)}", f"{median:.1f}", f"{low:.1f}-{high:.1f}")
        quality = (f"{run.train_loss:.4f}", f"{run.accuracy:.2%}")
        table.add_row(run.kind, run.library, *quality, *(cells if run.library else ()))
    console.print(table)
    console.print(
        f"value: entries to [-{digits.CLIP_VALUE:g}, {digits.CLIP_VALUE:g}]; norm: max_norm {result.max_norm:g}"
    )
    for kind, library in (("value", "torch"), ("norm", "torch"), ("norm", digits.FLOAT64)):
        console.print(f"{kind}, fastclip against {library}: {_equality(result.differences(kind, library))}")
    if any(result.differences("norm", "torch")):
        console.print("  torch sums squares in float32, fastclip in float64; training amplifies a last bit.")
    for kind in ("value", "norm"):
        ratio = result.find(kind, "torch").quartiles()[1] / result.find(kind, "fastclip").quartiles()[1]
        console.print(f"{kind}: torch's call takes {ratio:.2f} times as long as fastclip's")


def print_regression(console, runs: list[regression.Run]) -> None:
    """Print the table of the regression experiment."""
    columns = ("rate", "clipping", "start loss", "end loss", "clipped", "peak norm", "outcome")
    table = _table("Regression: 20-25-1 net, SGD with momentum", *columns)
    for run in runs:
        how = "none" if run.kind == "none" else f"{run.kind} {run.limit:g}"
        peak = max(filter(math.isfinite, run.norms["total"]), default=math.inf)
        losses = (f"{run.loss_before:.5g}", f"{run.loss_after:.3g}")
        clipped = f"{sum(run.clipped)}/{len(run.clipped)}"
        table.add_row(f"{run.rate:g}", how, *losses, clipped, f"{peak:.3g}", _outcome(run))
    console.print(table)
    console.print(f"{regression.ARTICLE_RATE:g} is the article's rate; {regression.RATE:g} is low enough to watch.")


def print_cliff(console, wall: cliff.Cliff) -> None:
    """Print the table of the cliff."""
    table = _table("Cliff: one recurrent unit, 50 time steps", *cliff.COLUMNS)
    for row in cliff.rows(wall):
        table.add_row(*row)
    console.print(table)


class Monitored(NamedTuple):
    """What the monitor's report says of runs, and its charts."""

    words: list[str]
    paths: list[Path]


def of_the_monitor(folder: Path, runs: list[regression.Run]) -> Monitored:
    """The report of the logs that the regression at the article's rate left."""
    from fastclip.report import charts, verdict
    from fastclip.report.log import read

    logs = [run.log for run in runs if run.rate == regression.ARTICLE_RATE and run.log]
    found = [read(log)[0] for log in logs]
    verdicts = [verdict.of(each) for each in found]
    folder.mkdir(parents=True, exist_ok=True)
    words = [f"{each.name}: {said.headline}" for each, said in zip(found, verdicts, strict=True)]
    return Monitored(words, [*logs, *(picture.path for picture in charts.draw(folder, found, verdicts))])


def write_csv(folder: Path, images: digits.Digits, points: list[regression.Run], wall: cliff.Cliff) -> list[Path]:
    """Write digits.csv (a row per run, step), regression.csv (per run, layer, step) and cliff.csv (per descent, step).

    Returns:
        Their paths.
    """
    digits_rows = [
        (step, run.kind, run.library, *seen[:2], int(seen[2]), seen[3])
        for run in images.runs
        for step, seen in enumerate(zip(run.losses, run.norms, run.clipped, run.clip_us, strict=True), 1)
    ]
    regression_rows = [
        (step, run.rate, run.kind, layer, norm, loss, int(clipped))
        for run in points
        for layer, norms in run.norms.items()
        for step, (norm, loss, clipped) in enumerate(zip(norms, run.losses, run.clipped, strict=True), 1)
    ]
    cliff_rows = [
        (step, each.kind, *point, error, norm)
        for each in wall.descents
        for step, (point, error, norm) in enumerate(zip(each.path, each.errors, [*each.norms, None], strict=True))
    ]
    for name, header, rows in (
        ("digits.csv", "step kind library loss total_norm clipped clip_us", digits_rows),
        ("regression.csv", "step rate kind layer norm loss clipped", regression_rows),
        ("cliff.csv", "step kind w b error norm", cliff_rows),
    ):
        with (folder / name).open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header.split(), *rows])
    return [folder / "digits.csv", folder / "regression.csv", folder / "cliff.csv"]


def _equality(differences: list[float]) -> str:
    step = next((step for step, difference in enumerate(differences, 1) if difference != 0), None)
    if step is None:
        return f"losses bit-equal in all {len(differences)} steps"
    return f"losses bit-equal up to step {step - 1}, then {differences[step - 1]:.1e} to {max(differences):.1e} apart"


def _outcome(run: regression.Run) -> str:
    if run.nonfinite_step is not None:
        return f"NaN/inf from step {run.nonfinite_step}"
    if run.loss_after < run.loss_before / 100:
        return "converged"
    if run.kind == "none":
        return "exploding" if run.loss_after > run.loss_before else "not exploded yet"
    return "not converged yet"


def _table(title: str, *columns: str):
    from rich import box, table

    grid = table.Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", padding=(0, 1, 0, 0))
    for column in columns:
        grid.add_column(column, justify="left" if column in ("clipping", "functions", "outcome") else "right")
    return grid
