"""python -m fastclip report: charts and a verdict from the logs of :class:`fastclip.GradMonitor`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    """Reads logs, says what they show, and draws it.

    Args:
        argv: the arguments after `report`; None takes them from sys.argv.

    Returns:
        The exit status: 0, or 2 where a log cannot be read or a package of the extra `monitor` is missing.
    """
    options = _parse(argv)
    try:
        from . import charts
    except ImportError as error:
        needs = f"python -m fastclip report needs {error.name}: pip install 'torch-fastclip[monitor]' ({error})"
        print(needs, file=sys.stderr)
        return 2
    from . import page, verdict
    from .log import LogError, read

    try:
        runs = [run for path in options.logs for run in read(path)]
    except LogError as error:
        print(f"python -m fastclip report: {error}", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    verdicts = [verdict.of(run) for run in runs]
    for run, found in zip(runs, verdicts, strict=True):
        print(f"{run.name}: {found.headline}", *(f"  {line}" for line in found.lines), sep="\n")
        for note in run.notes:
            print(f"  ({note})")
    pictures = charts.draw(options.out, runs, verdicts)
    written = [picture.path for picture in pictures]
    if options.html:
        written.append(page.write(options.out / "report.html", runs, verdicts, pictures))
    print("written:", *written, sep="\n  ")
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m fastclip report",
        description="Charts and a verdict from the logs of a GradMonitor; several logs are drawn over each other.",
    )
    parser.add_argument("logs", nargs="+", type=Path, metavar="LOG", help="a .jsonl or .csv file of a monitor")
    parser.add_argument("--out", type=_folder, default=Path("fastclip-report"), metavar="DIR",
                        help="folder for the charts (default: %(default)s)")  # fmt: skip
    parser.add_argument("--html", action="store_true", help="write one page with everything in it, too")
    return parser.parse_args(argv)


def _folder(text: str) -> Path:
    if Path(text).exists() and not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"must be a folder, but {text!r} is a file")
    return Path(text)
