"""python -m fastclip demo: two training experiments that show what gradient clipping does, on real data."""

from __future__ import annotations

import argparse
import importlib
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

import torch

EXTRAS = ("rich", "sklearn", "matplotlib")


def main(argv: list[str] | None = None) -> int:
    """Run both experiments, print their tables, write charts and CSV files.

    Args:
        argv: command line arguments after `demo`; None takes them from sys.argv.

    Returns:
        0, or 2 if an optional dependency is missing.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:  # doctest: +SKIP
        ...     main(["--steps", "5", "--out", folder])
        0
    """
    arguments = _parse(argv)
    for name in EXTRAS:
        try:
            importlib.import_module(name)
        except ImportError as error:
            print(f"fastclip demo needs {name} ({error}): pip install fastclip[demo]", file=sys.stderr)
            return 2
    threads = torch.get_num_threads()
    torch.set_num_threads(arguments.threads)
    try:
        _run(arguments)
    finally:
        torch.set_num_threads(threads)
    return 0


def _run(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    import fastclip
    from fastclip.demo import charts, digits, regression, report

    start = perf_counter()
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 120
    steps, max_norm, seed = arguments.steps, arguments.max_norm, arguments.seed
    with _progress(console, "digits", steps) as show:
        digits_result = digits.run_digits(steps, max_norm or digits.MAX_NORM, seed, show)
    with _progress(console, "regression", 6 * steps) as show:
        regression_result = regression.run_regression(steps, max_norm, seed, show)
    arguments.out.mkdir(parents=True, exist_ok=True)
    paths = report.write_csv(arguments.out, digits_result, regression_result)
    paths += charts.draw(arguments.out, digits_result, regression_result)

    console.print()
    report.print_digits(console, digits_result)
    report.print_regression(console, regression_result)
    console.print(f"{perf_counter() - start:.0f} s with --threads {arguments.threads}. fastclip's backend for the LSTM:")
    for group in fastclip.why(digits_result.runs[-1].parameters):
        console.print(f"  {group}", soft_wrap=True)
    console.print("Written:")
    for path in paths:
        console.print(f"  {path}", soft_wrap=True)


@contextmanager
def _progress(console, label: str, total: int) -> Iterator[Callable[[int, str], None]]:
    """A progress bar on a terminal, a plain line per quarter elsewhere; yields report(steps done, what to say)."""
    if console.is_terminal:
        from rich.progress import Progress

        with Progress(console=console) as bar:
            task = bar.add_task(label, total=total)
            yield lambda done, text: bar.update(task, completed=done, description=f"{label}: {text}")
    else:
        quarters = {math.ceil(total * quarter / 4) for quarter in range(1, 5)}

        def line(done: int, text: str) -> None:
            if done in quarters:
                quarters.remove(done)
                console.print(f"{label}: {done}/{total} steps, {text}")

        yield line


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m fastclip demo",
        description="Train an LSTM on handwritten digits and a small regression net, without clipping, clipped by value "
        "and clipped by norm; compare fastclip with torch; write charts and CSV files.",
    )
    parser.add_argument("--steps", type=_positive_int, default=400, help="optimizer steps of every run (default: 400)")
    parser.add_argument(
        "--max-norm",
        type=_positive_float,
        help="max_norm of every run clipped by norm (default: 2 for the digits; 100, and 1 at the article's learning "
        "rate, for the regression)",
    )
    parser.add_argument("--out", type=_folder, default=Path("fastclip-demo"), help="folder (default: ./fastclip-demo)")
    parser.add_argument("--seed", type=int, default=1, help="of weights, split and batch order (default: 1)")
    # More threads gain little on nets this small, and sums in another order would give every machine other curves.
    parser.add_argument("--threads", type=_positive_int, default=1, help="CPU threads of torch (default: 1)")
    return parser.parse_args(argv)


def _positive_int(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return value


def _positive_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a finite number above 0, got {text!r}")
    return value


def _folder(text: str) -> Path:
    path = Path(text)
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"must be a folder, but {text!r} is a file")
    return path
