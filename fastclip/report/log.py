"""The log of a monitor, read back: one run for each time that a monitor began to write to it."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..monitor.writers import FORMAT


class LogError(Exception):
    """A file that is not the log of a monitor, with the reason."""


@dataclass
class Run:
    """The records of one run, a number for each; NaN where a record has none."""

    name: str
    steps: np.ndarray
    columns: dict[str, np.ndarray]  # by tag without the prefix
    layers: dict[str, np.ndarray]  # norms by parameter
    hidden: dict[str, list[list[float]]]  # what watch_hidden saw, by name; an empty list where it saw nothing
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.steps)

    def column(self, tag: str) -> np.ndarray:
        return self.columns.get(tag, np.full(len(self), math.nan))

    @property
    def norms(self) -> np.ndarray:
        """Before the clip."""
        return self.column("grad_norm")

    @property
    def nonfinite(self) -> np.ndarray:
        """Which steps had a norm, or an element, that was not finite."""
        return ~np.isfinite(self.norms) | (np.nan_to_num(self.column("grad_nonfinite")) > 0)

    @property
    def max_norms(self) -> np.ndarray:
        """The bound of each step; NaN where there was none."""
        return self.column("grad_max_norm")

    @property
    def bounded(self) -> np.ndarray:
        return np.isfinite(self.max_norms)

    @property
    def clipped(self) -> np.ndarray:
        return self.bounded & (self.column("grad_clip_coef") < 1)


def read(path: Path) -> list[Run]:
    """The runs of a log.

    Raises:
        LogError: there is no such file, it is empty, or not the log of a monitor.
    """
    if not path.is_file():
        raise LogError(f"{path}: there is no such file")
    if path.stat().st_size == 0:
        raise LogError(f"{path}: is empty: the run that was to write it recorded nothing")
    records, notes = (_csv if path.suffix == ".csv" else _json_lines)(path)
    if not any(records):
        raise LogError(f"{path}: has no records yet")
    found: list[Run] = []
    for records_of_run in filter(None, records):
        name = path.name if not found else f"{path.name}#{len(found) + 1}"
        found.append(_run(name, path, records_of_run))
    found[-1].notes += notes
    return found


def _json_lines(path: Path) -> tuple[list[list[dict[str, Any]]], list[str]]:
    runs: list[list[dict[str, Any]]] = []
    notes: list[str] = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                if number > 1 and not line.endswith("\n"):
                    notes.append(f"the last line, {number}, is cut and left out")
                    break
                raise LogError(f"{path}: line {number} is not JSON: {line[:60]!r}") from None
            if not isinstance(record, dict) or ("format" not in record and "step" not in record):
                raise LogError(f"{path}: line {number} is not a record of a GradMonitor: {line[:60]!r}")
            if record.get("format") == FORMAT:
                runs.append([])
            elif not runs:
                raise LogError(f"{path}: is not the log of a GradMonitor: its first line does not say so")
            else:
                runs[-1].append(record)
    return _joined(runs), notes


def _csv(path: Path) -> tuple[list[list[dict[str, Any]]], list[str]]:
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        rows = list(csv.DictReader(file))
        names = list(rows[0]) if rows else []
    if rows and (names[0] != "step" or not any(str(name).endswith("grad_norm") for name in names)):
        raise LogError(f"{path}: is not the log of a GradMonitor: its columns are {', '.join(map(str, names[:4]))}")
    whole = [row for row in rows if None not in row.values() and None not in row]
    notes = ["the last line is cut and left out"] if len(whole) < len(rows) else []
    records = [{tag: _number(value) for tag, value in row.items() if value != ""} for row in whole]
    runs: list[list[dict[str, Any]]] = [[]]
    for record in records:
        if runs[-1] and record["step"] <= runs[-1][-1]["step"]:
            runs.append([])
        runs[-1].append(record)
    return runs, notes


def _joined(runs: list[list[dict[str, Any]]]) -> list[list[dict[str, Any]]]:
    """A run that goes on where the one before it ended is the same run, resumed."""
    joined: list[list[dict[str, Any]]] = []
    for run in filter(None, runs):
        if joined and run[0]["step"] == joined[-1][-1]["step"] + 1:
            joined[-1].extend(run)
        else:
            joined.append(run)
    return joined


def _run(name: str, path: Path, records: list[dict[str, Any]]) -> Run:
    tag = next((tag for tag in records[0] if tag.endswith("grad_norm")), None)
    if tag is None:
        raise LogError(f"{path}: is not the log of a GradMonitor: its records have no grad_norm")
    prefix = tag.removesuffix("grad_norm")
    columns: dict[str, np.ndarray] = {}
    layers: dict[str, np.ndarray] = {}
    hidden: dict[str, list[list[float]]] = {}
    # Where each tag goes; most come with every record.
    places: dict[str, np.ndarray | None] = {}
    for i, record in enumerate(records):
        for key, value in record.items():
            if key not in places:
                places[key] = _place(key.removeprefix(prefix), len(records), columns, layers)
            place = places[key]
            if place is not None:
                place[i] = value if type(value) is float else _number(value)
            elif isinstance(value, list):
                kept = hidden.setdefault(key.removeprefix(prefix).removeprefix("grad_hidden/"), [])
                kept.extend([] for _ in range(i - len(kept)))
                kept.append([_number(each) for each in value])
    steps = columns.pop("step")
    return Run(name, steps.astype(np.int64), columns, layers, hidden)


def _place(tag: str, count: int, columns: dict[str, np.ndarray], layers: dict[str, np.ndarray]) -> np.ndarray | None:
    """The array of a tag, one number for each record; None for those that are not looked at."""
    if "/" not in tag:
        return columns.setdefault(tag, np.full(count, math.nan))
    kind, _, name = tag.partition("/")
    return layers.setdefault(name, np.full(count, math.nan, dtype=np.float32)) if kind == "grad_norm" else None


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan
