"""Checks that several ranks run together: started once, each check a result, a hang an error with every rank's stack.

``python ranks.py FOLDER MODULE WORLD_SIZE TIMEOUT ...`` is the launcher: it imports once and forks the ranks of each
group of three in turn.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

TIMEOUT = 30  # seconds for one check; the slowest takes two on a busy machine
HUNG = "hung or died"

Check = Callable[[], None]


def check(checks: dict[str, Check]):
    """Decorator: adds a function to a module's table of checks."""

    def add(function: Check) -> Check:
        checks[function.__name__] = function
        return function

    return add


class Run(NamedTuple):
    """``module.CHECKS`` on that many gloo ranks, each check for at most ``timeout`` seconds."""

    module: str
    world_size: int
    timeout: float = TIMEOUT


def run(*runs: Run) -> list[dict[str, str]]:
    """Runs them one after the other.

    Returns:
        list: for each run a dict, each check -> "" or what went wrong, on every rank where something did.
    """
    import fastclip

    tests = Path(__file__).parent
    path = os.pathsep.join([str(Path(fastclip.__file__).parents[1]), str(tests)])
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(Path(__file__)), folder, *(str(word) for run in runs for word in run)]
        env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        launched = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
        found = [_results(run, Path(folder, str(i))) for i, run in enumerate(runs)]
        if launched.returncode and all("not reached" in error for results in found for error in results.values()):
            raise RuntimeError(launched.stderr)
        return found


def _results(run: Run, folder: Path) -> dict[str, str]:
    results: dict[str, str] = {}
    for name in importlib.import_module(run.module).CHECKS:
        outcomes = [_outcome(folder, rank, name) for rank in range(run.world_size)]
        if HUNG in outcomes:
            for rank, was in enumerate(outcomes):
                stack = (folder / f"{rank}.stderr").read_text()
                outcomes[rank] = f"{was or 'waits for the others'}\n{stack}"
        results[name] = "\n".join(f"rank {i}: {error}" for i, error in enumerate(outcomes) if error)
    return results


def _outcome(folder: Path, rank: int, name: str) -> str:
    report = folder / f"{rank}.jsonl"
    done = dict(json.loads(line) for line in report.read_text().splitlines()) if report.exists() else {}
    if done.get(name) is not None:
        return done[name]
    return HUNG if name in done else "not reached"


def _rank(module: str, rank: int, world_size: int, folder: str, timeout: float) -> None:
    stderr = open(f"{folder}/{rank}.stderr", "w")  # noqa: SIM115 it lives as long as the process
    os.dup2(stderr.fileno(), 2)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    with open(f"{folder}/{rank}.jsonl", "w") as report:
        for name, function in importlib.import_module(module).CHECKS.items():
            print(json.dumps([name, None]), file=report, flush=True)
            faulthandler.dump_traceback_later(timeout, exit=True, file=stderr)
            error = ""
            try:
                torch.manual_seed(0)
                function()
            except BaseException:
                error = traceback.format_exc()
            print(json.dumps([name, error]), file=report, flush=True)
            dist.barrier()  # a rank that failed meets the others only here, or they hang and say where
    faulthandler.cancel_dump_traceback_later()
    dist.destroy_process_group()


def _launch(folder: str, runs: list[Run]) -> int:
    for run in runs:
        importlib.import_module(run.module)
    importlib.import_module("torch._dynamo")  # a rank's first DTensor op would import it, on every rank
    return max(_fork(run, f"{folder}/{i}") for i, run in enumerate(runs))


def _fork(run: Run, folder: str) -> int:
    os.mkdir(folder)
    children = []
    for rank in range(run.world_size):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                _rank(run.module, rank, run.world_size, folder, run.timeout)
                status = 0
            finally:
                os._exit(status)
        children.append(pid)
    return max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children)


if __name__ == "__main__":
    words = sys.argv[2:]
    asked = [Run(words[i], int(words[i + 1]), float(words[i + 2])) for i in range(0, len(words), 3)]
    sys.exit(_launch(sys.argv[1], asked))
