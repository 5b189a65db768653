"""python -m fastclip bench: fastclip beside torch in one process, checked against float64 before it is timed."""

import argparse
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from . import bars, charts, providers, report
from .cases import EACH, REGIMES, Case, cases, gpu_cases
from .run import run_case
from .timing import Plan

_FULL = Plan(budget_s=6.0, least=7, most=300)
_QUICK = Plan(budget_s=0.15, least=3, most=30)
_DEFAULT = [regime.name for regime in REGIMES]
_GPU = Plan(budget_s=1.0, least=7, most=100)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark.

    Args:
        argv: the command line after the program's name; None takes it from `sys.argv`.

    Returns:
        0, or 1 where a check was red or, with --check-bars, a measured bar is missed; --bars only shows them.

    Example:
        >>> main(["--quick", "--case", "lstm"])  # doctest: +SKIP
        0
    """
    argv = sys.argv[1:] if argv is None else argv
    options = _options(argv)
    device = torch.device(options.device)
    listed = _cases(options.device, options.quick)
    chosen = {name: case for name, case in listed.items() if name in (options.case or name)}
    regimes = [regime for regime in (*REGIMES, *EACH) if regime.name in (options.regime or _DEFAULT)]
    everyone = providers.available(device)
    preferred = next(provider for provider in everyone if provider.gated)
    measured = [provider for provider in everyone if provider.name in (options.provider or provider.name)]
    if options.quick and not options.provider:
        measured = [everyone[0], preferred]
    if options.list:
        for case in chosen.values():
            print(report.case_title(_entry(case)))
        print("regimes:", ", ".join(f"{regime.name} ({regime.what})" for regime in regimes))
        print("where named, too:", ", ".join(f"{regime.name} ({regime.what})" for regime in EACH))
        print("providers:", ", ".join(provider.name for provider in everyone))
        return 0
    if options.threads:
        torch.set_num_threads(options.threads)
    cold = options.cold or device.type == "cuda"
    plan = _QUICK if options.quick else _GPU if device.type == "cuda" else _FULL
    if options.rounds:
        plan = Plan(budget_s=0.0, least=options.rounds, most=options.rounds)

    conditions = report.conditions(argv, cold, device) | ({"details": True} if options.details else {})
    result: dict[str, Any] = {"schema": 1, "conditions": conditions, "cases": [], "rows": []}
    print(report.conditions_line(conditions))
    header = report.header(conditions)
    for case in chosen.values():
        rows = run_case(case, regimes, measured, plan, device, cold, options.details)
        report.print_table(report.case_title(_entry(case)), header, [report.cells(row, header) for row in rows])
        result["cases"].append(_entry(case))
        result["rows"] += rows
        _write_tables(result, options)  # a run that is cut keeps what it has
    failed = any(row["ms"] is None for row in result["rows"])
    if options.bars or options.check_bars:
        result["bars"] = bars.check(result["rows"], preferred.name, conditions)
        report.print_table(f"bars for {preferred.name}", bars.HEADER, bars.cells(result["bars"]))
        missed = any(bar["verdict"] == "miss" for bar in result["bars"])
        failed = failed or (options.check_bars and missed)
    for path in [*_write_tables(result, options), *_draw(result, options)]:
        print(f"wrote {path}")
    return int(failed)


def _cases(device: str, quick: bool) -> dict[str, Case]:
    return gpu_cases() if device == "cuda" else cases(quick)


def _entry(case: Case) -> dict[str, Any]:
    sizes = {"tensors": len(case.tensors), "elements": case.elements, "bytes": case.bytes}
    return {"name": case.name, "what": case.what, **sizes}


def _saved(result: dict[str, Any], options: argparse.Namespace, suffix: str) -> list[Path]:
    """Where --save puts a file of this kind."""
    name = report.saved_name(result["conditions"])
    return [options.save / (name + suffix)] if options.save else []


def _write_tables(result: dict[str, Any], options: argparse.Namespace) -> list[Path]:
    """Write rows and tables, each whole or not at all; return their paths."""
    texts = {path: report.markdown(result) for path in _saved(result, options, ".md")}
    if options.json:
        texts[options.json] = json.dumps(result, indent=1) + "\n"
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.part")
        beside.write_text(text)
        beside.replace(path)
    return list(texts)


def _draw(result: dict[str, Any], options: argparse.Namespace) -> list[Path]:
    """Draw the chart; return where."""
    paths = [*([options.plot] if options.plot else []), *_saved(result, options, ".png")]
    if paths and not _can_draw():
        print("no chart: matplotlib is not installed")
        return []
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        charts.ratio_chart(result, path)
    return paths


def _can_draw() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def _file(text: str) -> Path:
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"must be a file, but {text!r} is a folder")
    _folder(str(path.parent))
    return path


def _plot(text: str) -> Path:
    path = _file(text)
    # Those that matplotlib writes without any other program.
    if path.suffix.lower() not in (".pdf", ".png", ".svg"):
        raise argparse.ArgumentTypeError(f"must end in .png, .svg or .pdf, got {text!r}")
    return path


def _folder(text: str) -> Path:
    path = Path(text)
    first = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not first.is_dir():
        raise argparse.ArgumentTypeError(f"must be in a folder, but {str(first)!r} is a file")
    if not os.access(first, os.W_OK):
        raise argparse.ArgumentTypeError(f"must be in a folder that can be written, got {text!r}")
    return path


def _options(argv: list[str]) -> argparse.Namespace:
    # First of all the device: the names of cases and providers are those that it has.
    on = argparse.ArgumentParser(add_help=False)
    on.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where the gradients are (default: cpu)")
    parser = argparse.ArgumentParser(
        prog="python -m fastclip bench",
        description="Time fastclip beside torch in one process; nothing gets a time before it agrees with float64.",
        parents=[on],
    )
    device = on.parse_known_args(argv)[0].device
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    add = parser.add_argument
    add("--list", action="store_true", help="list cases, regimes and providers, then stop")
    add(
        "--case",
        action="append",
        choices=list(_cases(device, False)),
        metavar="NAME",
        help="only this case; repeatable",
    )
    names = [regime.name for regime in (*REGIMES, *EACH)]
    add("--regime", action="append", choices=names, metavar="NAME", help="only this regime; repeatable")
    everyone = [provider.name for provider in providers.available(torch.device(device))]
    add("--provider", action="append", choices=everyone, metavar="NAME", help="only this provider; repeatable")
    add(
        "--quick",
        action="store_true",
        help="few rounds, a smaller huge tensor, torch foreach and the preferred backend only",
    )
    add("--rounds", type=int, metavar="N", help="exactly N rounds instead of a time budget")
    add("--threads", type=int, metavar="N", help="torch's threads, which fastclip uses, too")
    add("--cold", action="store_true", help="evict the gradients from the cache before every timed call, as on a GPU")
    add("--bars", action="store_true", help="compare with the required numbers, as a table")
    add("--check-bars", action="store_true", help="the same, and a miss exits with 1")
    add("--details", action="store_true", help="on a GPU also launches, the replay of a graph, and warm caches")
    add("--json", type=_file, metavar="FILE", help="write the rows as JSON")
    add("--plot", type=_plot, metavar="FILE.png", help="draw the ratios to torch foreach")
    add(
        "--save",
        type=_folder,
        metavar="DIR",
        help="write markdown after every case and a chart at the end, named by date, and the GPU, or CPU and cores",
    )
    options = parser.parse_args(argv)
    for name, least in (("rounds", 2), ("threads", 1)):
        if (number := getattr(options, name)) is not None and number < least:
            parser.error(f"--{name} must be at least {least}, got {number}")
    if options.plot and not _can_draw():
        parser.error("--plot needs matplotlib, which is not installed: pip install 'torch-fastclip[bench]'")
    if options.details and device != "cuda":
        parser.error("--details needs --device cuda")
    return options
