"""``python -m fastclip``: info | bench | demo | run | report."""

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
    forced, program = _parse_run(argv)
    environment = _environment(forced)
    command = [sys.executable, *_interpreter_options(), *program]
    sys.stdout.flush()
    if os.name == "posix":
        os.execve(sys.executable, command, environment)
    return subprocess.run(command, env=environment, check=False).returncode


def _parse_run(argv: list[str]) -> tuple[dict[str, str], list[str]]:
    """What the environment is to say, and what python is to run; of that, nothing is looked at."""
    parser = argparse.ArgumentParser(
        prog="python -m fastclip run",
        description="Runs a training program with fastclip in the place of torch.nn.utils' clip functions, in every "
        "python process that it starts.",
        usage="%(prog)s [-h] [--backend NAME] [--monitor LOG] (-m module | -c code | script.py) [args ...]",
    )
    parser.add_argument("--backend", metavar="NAME", help="force one backend, see `python -m fastclip info`")
    parser.add_argument(
        "--monitor", type=_log, metavar="LOG", help="record the gradients of every clip in a .jsonl or .csv file"
    )
    own = 0
    while own < len(argv) and argv[own].startswith("-") and argv[own] not in ("-m", "-c", "-"):
        own += 2 if argv[own] in ("--backend", "--monitor") else 1
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
    asked = {"FASTCLIP_BACKEND": options.backend, "FASTCLIP_MONITOR": options.monitor}
    return {name: value for name, value in asked.items() if value}, program


def _log(text: str) -> str:
    from .monitor.writers import writers_of

    try:
        writers_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("writer: ")) from error
    folder = Path(text).absolute().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise argparse.ArgumentTypeError(f"must be in a folder that can be written, got {text!r}")
    return str(Path(text).absolute())  # the program may change its folder


def _environment(forced: dict[str, str]) -> dict[str, str]:
    given = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    entries = [str(STARTUP), *(entry for entry in given if entry != str(STARTUP))]
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
    commands = parser.add_subparsers(dest="command", required=True, metavar="{info,bench,demo,run,report}")
    commands.add_parser("info", help="what a bug report needs: versions, backends, devices")
    commands.add_parser("bench", help="fastclip against torch: time, bandwidth, error", add_help=False)
    commands.add_parser("demo", help="what clipping does: two experiments on real data", add_help=False)
    commands.add_parser("run", help="run a training program with fastclip in torch's place", add_help=False)
    commands.add_parser("report", help="charts and a verdict from the log of a monitor", add_help=False)
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
