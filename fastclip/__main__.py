"""``python -m fastclip``: info | bench | demo | run."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import subprocess
import sys
from pathlib import Path

import fastclip

STARTUP = Path(__file__).parent / "_startup"


def info() -> int:
    from ._info import lines

    print(*lines(), sep="\n")
    return 0


def run(argv: list[str]) -> int:
    """Runs a program as python itself would, in processes that patch torch when they import it."""
    backend, program = _parse_run(argv)
    environment = _environment(backend)
    command = [sys.executable, *_interpreter_options(), *program]
    sys.stdout.flush()
    if os.name == "posix":
        os.execve(sys.executable, command, environment)
    return subprocess.run(command, env=environment, check=False).returncode


def _parse_run(argv: list[str]) -> tuple[str | None, list[str]]:
    """The backend to force, and what python is to run; of that, nothing is looked at."""
    parser = argparse.ArgumentParser(
        prog="python -m fastclip run",
        description="Runs a training program with fastclip in the place of torch.nn.utils' clip functions, in every "
        "python process that it starts.",
        usage="%(prog)s [-h] [--backend NAME] (-m module | -c code | script.py) [args ...]",
    )
    parser.add_argument("--backend", metavar="NAME", help="force one backend, see `python -m fastclip info`")
    own = 0
    while own < len(argv) and argv[own].startswith("-") and argv[own] not in ("-m", "-c", "-"):
        own += 2 if argv[own] == "--backend" else 1
    options = parser.parse_args(argv[:own])
    program = argv[own:]
    if not program or program in (["-m"], ["-c"]):
        parser.error("a script, or -m and a module, is missing")
    if options.backend:
        try:
            with fastclip.use_backend(options.backend):
                pass
        except ValueError as error:
            parser.error(f"--backend: {error}")
    if sys.flags.no_site or sys.flags.ignore_environment:
        parser.error("python's -E, -I and -S keep its start from being changed: call fastclip.patch() in the program")
    return options.backend, program


def _environment(backend: str | None) -> dict[str, str]:
    given = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    entries = [str(STARTUP), *(entry for entry in given if entry != str(STARTUP))]
    forced = {"FASTCLIP_BACKEND": backend} if backend else {}
    return {**os.environ, **forced, "PYTHONPATH": os.pathsep.join(entries)}


def _interpreter_options() -> list[str]:
    """The options that python itself was started with."""
    words = sys.orig_argv[1 : len(sys.orig_argv) - len(sys.argv) + 1]
    if words[-2:] == ["-m", "fastclip"]:
        return words[:-2]
    # As multiprocessing finds them; it does not know of -u.
    return subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fastclip", description=fastclip.__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{info,bench,demo,run}")
    commands.add_parser("info", help="what a bug report needs: versions, backends, devices")
    commands.add_parser("bench", help="fastclip against torch: time, bandwidth, error", add_help=False)
    commands.add_parser("demo", help="what clipping does: two experiments on real data", add_help=False)
    commands.add_parser("run", help="run a training program with fastclip in torch's place", add_help=False)
    options, rest = parser.parse_known_args(sys.argv[1:2])
    rest = [*rest, *sys.argv[2:]]
    if options.command == "run":
        return run(rest)
    if options.command == "info":
        commands.choices["info"].parse_args(rest)
        return info()
    return importlib.import_module(f"fastclip.{options.command}").main(rest)


if __name__ == "__main__":
    status: int | None = None
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:
        # `| head` has what it wanted: whatever is printed from here on, python's own last flush included, goes nowhere.
        status = 1
        with contextlib.suppress(OSError):  # a stdout that is closed takes nothing anyway
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)
