"""``python -m fastclip``: info | bench | demo | run."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import platform
import runpy
import sys

import torch

import fastclip

from . import _ops


def info() -> int:
    print(f"fastclip {fastclip.__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    print(f"machine: {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads")
    print(f"CPU kernels: {_ops.cpu_isa() or 'none'}")
    for name, reason in fastclip.backends().items():
        print(f"backend {name}: {reason or 'available'}")
    return 0


def run(argv: list[str]) -> int:
    """Runs a script or a module, unchanged, with torch's clip functions replaced."""
    parser = argparse.ArgumentParser(
        prog="python -m fastclip run",
        description="Runs a training script with fastclip in the place of torch.nn.utils' clip functions.",
        usage="%(prog)s [-h] [--backend NAME] (-m module | script.py) [args ...]",
    )
    parser.add_argument("--backend", metavar="NAME", help="force one backend, see `python -m fastclip info`")
    parser.add_argument("-m", dest="module", action="store_true", help="the first argument is a module, as for python")
    parser.add_argument("program", help="script or module to run")
    parser.add_argument("args", nargs=argparse.REMAINDER, help="its arguments")
    options = parser.parse_args(argv)
    with contextlib.ExitStack() as stack:
        if options.backend:
            try:
                stack.enter_context(fastclip.use_backend(options.backend))
            except ValueError as error:
                parser.error(f"--backend: {error}")
        stack.enter_context(fastclip.patch())
        # What the program sees is what python itself would have given it.
        sys.argv = [options.program, *options.args]
        if options.module:
            sys.path[0] = os.getcwd()
            runpy.run_module(options.program, run_name="__main__", alter_sys=True)
        else:
            if not os.path.exists(options.program):
                parser.error(f"can't open file {options.program!r}")
            sys.path[0] = os.path.dirname(os.path.abspath(options.program))
            runpy.run_path(options.program, run_name="__main__")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fastclip", description=fastclip.__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{info,bench,demo,run}")
    commands.add_parser("info", help="versions, and which backends can be used here")
    commands.add_parser("bench", help="fastclip against torch: time, bandwidth, error", add_help=False)
    commands.add_parser("demo", help="what clipping does: two experiments on real data", add_help=False)
    commands.add_parser("run", help="run a training script with fastclip in torch's place", add_help=False)
    options, rest = parser.parse_known_args(sys.argv[1:2])
    rest = [*rest, *sys.argv[2:]]
    if options.command == "run":
        return run(rest)
    if options.command == "info":
        commands.choices["info"].parse_args(rest)
        return info()
    return importlib.import_module(f"fastclip.{options.command}").main(rest)


if __name__ == "__main__":
    sys.exit(main())
