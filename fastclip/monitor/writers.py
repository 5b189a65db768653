"""Where records go: files, TensorBoard's writers and those like them, functions."""

from __future__ import annotations

import csv
import json
import math
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch

from .alarms import GradientWarning

# The first line of a file says what it is.
FORMAT = "fastclip-monitor"
VERSION = 1


class Writer:
    """Takes one record after the other."""

    def write(self, tags: dict[str, Any], step: int) -> None:
        raise NotImplementedError

    def close(self) -> None:
        pass


class _File(Writer):
    """A file that is opened, and its folder made, by the first record, and added to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[str] | None = None

    def open(self) -> IO[str]:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", newline="", encoding="utf-8")
        return self._file

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def __str__(self) -> str:
        return str(self.path)


class JsonLines(_File):
    """One object for each line, and before them one that names the format; NaN and infinities are strings."""

    def write(self, tags: dict[str, Any], step: int) -> None:
        new = self._file is None
        file = self.open()
        if new:
            head = {"format": FORMAT, "version": VERSION, "torch": torch.__version__, "process": os.getpid()}
            file.write(json.dumps(head) + "\n")
        line = json.dumps({"step": step, **{tag: _json(value) for tag, value in tags.items()}}, allow_nan=False)
        # One write for a whole line: a run that is killed leaves whole lines, but for the last.
        file.write(line + "\n")
        file.flush()


class Csv(_File):
    """Columns are the tags of the first record; lists, and what comes later, are left out."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._columns: list[str] = []

    def write(self, tags: dict[str, Any], step: int) -> None:
        new = self._file is None
        file = self.open()
        if new:
            self._columns = ["step", *(tag for tag, value in tags.items() if not isinstance(value, list))]
            if file.tell() > 0:
                self._columns = _columns_of(self.path) or self._columns
            else:
                csv.writer(file).writerow(self._columns)
        row = {"step": step, **tags}
        csv.writer(file).writerow([row.get(column, "") for column in self._columns])
        file.flush()


class Scalars(Writer):
    """An object with ``add_scalar(tag, value, step)``: TensorBoard's SummaryWriter, tensorboardX, trackers."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def write(self, tags: dict[str, Any], step: int) -> None:
        for tag, value in tags.items():
            if not isinstance(value, list):
                self.target.add_scalar(tag, value, step)

    def __str__(self) -> str:
        return f"{type(self.target).__name__}.add_scalar"


class Function(Writer):
    """A callable ``(dict, step)``."""

    def __init__(self, function: Callable[[dict[str, Any], int], object]) -> None:
        self.function = function

    def write(self, tags: dict[str, Any], step: int) -> None:
        self.function(tags, step)

    def __str__(self) -> str:
        return getattr(self.function, "__qualname__", repr(self.function))


def writers_of(writer: Any) -> list[Writer]:
    """The writers that an argument means."""
    if writer is None:
        return []
    if isinstance(writer, (list, tuple)):
        return [each for one in writer for each in writers_of(one)]
    if isinstance(writer, (str, os.PathLike)):
        path = Path(os.fspath(writer))
        kinds: dict[str, type[_File]] = {".jsonl": JsonLines, ".csv": Csv}
        if path.suffix not in kinds:
            raise ValueError(f"writer: expected a path that ends in .jsonl or .csv, got {str(writer)!r}")
        if path.is_dir():
            raise ValueError(f"writer: expected a file, but {str(writer)!r} is a folder")
        return [kinds[path.suffix](path)]
    if callable(getattr(writer, "add_scalar", None)):
        return [Scalars(writer)]
    if callable(writer):
        return [Function(writer)]
    raise TypeError(f"writer: expected a path, an object with add_scalar, a callable or a list of them, got {writer!r}")


def warn_of(writer: Writer, error: Exception) -> None:
    what = f"writer {writer}: {type(error).__name__}: {error}; it receives no more records, training goes on"
    warnings.warn(what, GradientWarning, stacklevel=2)


def _json(value: Any) -> Any:
    if isinstance(value, list):
        return [_json(each) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else "NaN" if value != value else "Infinity" if value > 0 else "-Infinity"
    return value


def _columns_of(path: Path) -> list[str]:
    with path.open(newline="", encoding="utf-8") as file:
        return next(csv.reader(file), [])
