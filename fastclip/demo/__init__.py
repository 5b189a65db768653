"""python -m fastclip demo: three experiments that show what gradient clipping does.

They redo those of the article "Understanding Gradient Clipping (and How It Can Fix Exploding Gradients Problem)", 2020.
"""

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

import fastclip


def main(argv: list[str] | None = None) -> int:
    """Run the experiments, print their tables, write charts and CSV files.

    Args:
        argv: the arguments after `demo`; None takes them from sys.argv.

    Returns:
        The exit status: 0, or 2 if a package of the extra `demo` is missing.
    """
    arguments = _parse(argv)
    for name in ("rich", "sklearn", "matplotlib"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            needs = f"python -m fastclip demo needs {name}: pip install 'torch-fastclip[demo]' ({error})"
            print(needs, file=sys.stderr)
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

    from fastclip.demo import charts, cliff, digits, regression, report

    start = perf_counter()
    console = Console(highlight=False, markup=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = 120
    arguments.out.mkdir(parents=True, exist_ok=True)
    with _progress(console, "digits") as show:
        images = digits.run(arguments.steps, arguments.max_norm, arguments.seed, show)
    with _progress(console, "regression") as show:
        points = regression.run(arguments.steps, arguments.max_norm, arguments.seed, show, arguments.out)
    with _progress(console, "cliff") as show:
        wall = cliff.run(arguments.steps, arguments.max_norm, arguments.seed, show)
    paths = report.write_csv(arguments.out, images, points, wall) + charts.draw(arguments.out, images, points, wall)
    monitored = report.of_the_monitor(arguments.out / "monitor", points)
    report.print_digits(console, images)
    report.print_regression(console, points)
    report.print_cliff(console, wall)
    print(f"{perf_counter() - start:.0f} s with --threads {arguments.threads}")
    print("fastclip's backends for the LSTM:", *fastclip.why(images.runs[0].parameters), sep="\n  ")
    print("the regression at the article's rate, as the monitor saw it:", *monitored.words, sep="\n  ")
    print("written:", *paths, *monitored.paths, sep="\n  ")


@contextmanager
def _progress(console, label: str) -> Iterator[Callable[[int, int, str], None]]:
    """A bar on a terminal, at most four plain lines elsewhere; yields show(steps done, of how many, what to say)."""
    if console.is_terminal:
        from rich.progress import Progress

        # Its thread draws rarely: each refresh is a chance to fall into a timed clip call.
        with Progress(console=console, refresh_per_second=2) as bar:
            task = bar.add_task(label)
            yield lambda done, total, text: bar.update(task, completed=done, total=total, description=f"{label} {text}")
    else:

        def show(done: int, total: int, text: str) -> None:
            if done * 4 % total < 4:
                console.print(f"{label}: {done}/{total} steps, {text}")

        yield show


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m fastclip demo",
        description="Train an LSTM, a regression net and a recurrent unit, clipped and not; write charts and CSV.",
    )
    whole = _number(int, 1, 10**9, "a whole number from 1 to 1e9")
    number = _number(float, sys.float_info.min, sys.float_info.max, "a finite number above 0")
    seed = _number(int, 0, 2**32 - 1, "a whole number from 0 to 2**32 - 1")
    parser.add_argument("--steps", type=whole, help="of every run (default: 276 for digits, 400 for the others)")
    parser.add_argument(
        "--max-norm", type=number, help="(default: 2 for digits, 100 and 1 for regression, 0.5 for the cliff)"
    )
    parser.add_argument("--out", type=_folder, default="fastclip-demo", help="folder for files (default: %(default)s)")
    parser.add_argument("--seed", type=seed, default=1, help="of weights, split and batches (default: %(default)s)")
    # More threads gain little on nets this small, and sums in another order would give every machine other curves.
    parser.add_argument("--threads", type=whole, default=1, help="torch's CPU threads (default: %(default)s)")
    return parser.parse_args(argv)


def _number(kind: type, low: float, high: float, wanted: str) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be {wanted}, got {text!r}")
        return value

    return parse


def _folder(text: str) -> Path:
    if Path(text).exists() and not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"must be a folder, but {text!r} is a file")
    return Path(text)
