"""What is printed and saved: the conditions of a run, and its rows as tables and markdown."""

import os
import platform
import re
import shlex
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import fastclip
from fastclip._ops import cpu_isa

from . import bars

_TEXT = {"regime", "provider", "case", "check", "unit", "verdict"}


def header(conditions: dict[str, Any]) -> tuple[str, ...]:
    """The columns of the tables: on a GPU the host has one of its own."""
    gpu = "gpu" in conditions
    times = ("ms", "p10 - p90", *(("host ms",) if gpu else ()))
    details = ("warm ms", "graph ms", "launches") if conditions.get("details") else ()
    share = "of copy" if gpu else "of sum"
    return ("regime", "provider", *times, *details, "ratio", "GB/s", share, "norm error", "check")


def conditions(argv: list[str], cold: bool, device: torch.device) -> dict[str, Any]:
    """Where and how the numbers are made."""
    return {
        **(_gpu(device) if device.type == "cuda" else {}),
        "date": time.strftime("%Y-%m-%d"),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "caches": "cold" if cold else "warm",
        "torch": torch.__version__,
        "fastclip": fastclip.__version__,
        "isa": cpu_isa(),
        "commit": _commit(),
        "command": shlex.join(["python", "-m", "fastclip", "bench", *argv]),
    }


def conditions_line(c: dict[str, Any]) -> str:
    """The conditions as the one line beside every table and chart."""
    isa = f" ({c['isa']})" if c["isa"] else ""
    commit = f" at {c['commit']}" if c["commit"] else ""
    gpu = f"{c['gpu']} ({c['sms']} SMs, {c['l2_mb']} MB of L2), CUDA {c['cuda']}, " if "gpu" in c else ""
    cpu = f"{c['cpu']}, {c['cores']} cores, {c['threads']} threads, load {c['load']}"
    versions = f"torch {c['torch']}, fastclip {c['fastclip']}{isa}{commit}"
    return f"{c['date']}, {gpu}{cpu}, {c['caches']} caches, {versions}: {c['command']}"


def saved_name(c: dict[str, Any]) -> str:
    """The name of a saved run's files, without suffix: date, and the GPU, or CPU and cores."""
    if "gpu" in c:
        return f"{c['date']}-{_slug(c['gpu'])}"
    return f"{c['date']}-{_slug(c['cpu'])}-{c['cores']}c" + ("-cold" if c["caches"] == "cold" else "")


def case_title(case: dict[str, Any]) -> str:
    """A case and its size as one line."""
    megabytes = f"{case['bytes'] / 1e6:,.1f} MB"
    return f"{case['name']}: {case['what']}; {case['tensors']:,} tensors, {case['elements']:,} elements, {megabytes}"


def cells(row: dict[str, Any], header: Sequence[str]) -> list[str]:
    """A row as text, one cell per column of the header; a red row has no number and says what differed."""
    texts = {"regime": row["regime"], "provider": row["provider"], "check": row["check"]}
    if row["ms"] is None:
        texts["check"] = f"RED: {row['check']}"
    else:
        texts |= {"ms": _ms(row["ms"]), "p10 - p90": f"{_ms(row['p10'])} - {_ms(row['p90'])}"}
        for name in ("host ms", "warm ms", "graph ms"):
            ms = row.get(name.replace(" ", "_"))
            texts[name] = "" if ms is None else _ms(ms)
        texts["launches"] = str(row.get("launches", ""))
        texts |= {"ratio": "" if row["ratio"] is None else f"{row['ratio']:.2f}", "GB/s": f"{row['gbs']:.1f}"}
        texts |= dict.fromkeys(("of sum", "of copy"), f"{row['share']:.2f}")
        texts |= {"norm error": "" if row["norm_error"] is None else f"{row['norm_error']:.1e}"}
    return [texts.get(name, "") for name in header]


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print aligned columns, with rich where it is installed."""
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        print(f"\n{title}")
        for row in (header, *rows):
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        return
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for name in header:
        table.add_column(name, justify="left" if name in _TEXT else "right", no_wrap=name != "check")
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        bad = row[-1].startswith(("RED", "miss"))
        table.add_row(*row, style="bold red" if bad else None, end_section=bool(following and following[0] != row[0]))
    # A narrow terminal may wrap lines but must not shorten numbers.
    Console(highlight=False, width=max(Console().width, 12 * len(header))).print(table)


def markdown(result: dict[str, Any]) -> str:
    """All tables of a run as one page."""
    parts = ["# fastclip bench", conditions_line(result["conditions"]), "[What the columns mean](../README.md)."]
    for case in result["cases"]:
        columns = header(result["conditions"])
        rows = [cells(row, columns) for row in result["rows"] if row["case"] == case["name"]]
        parts += [f"## {case_title(case)}", _markdown_table(columns, rows)]
    if "bars" in result:
        parts += ["## Bars", _markdown_table(bars.HEADER, bars.cells(result["bars"]))]
    return "\n\n".join(parts) + "\n"


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def _ms(ms: float) -> str:
    return f"{ms:.3f}" if ms < 10 else f"{ms:.1f}"


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\(r\)|\(tm\)|@.*", "", name.lower())).strip("-")


def _gpu(device: torch.device) -> dict[str, Any]:
    gpu = torch.cuda.get_device_properties(device)
    return {
        "gpu": gpu.name,
        "sms": gpu.multi_processor_count,
        "l2_mb": gpu.L2_cache_size >> 20,
        "cuda": torch.version.cuda,
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of the checkout that fastclip is imported from; None where it is installed."""
    root = Path(fastclip.__file__).resolve().parent.parent
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        if (root / ".git").exists():
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        pass
    return None
