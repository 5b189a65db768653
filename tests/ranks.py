"""Checks that several ranks run together: started once, each check a result, a hang an error with every rank's stack.

``python ranks.py MODULE WORLD_SIZE FOLDER TIMEOUT`` is the launcher: it imports once and forks the ranks.
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

TIMEOUT = 30  # seconds for one check; the slowest takes two on a busy machine
HUNG = "hung or died"

Check = Callable[[], None]


def check(checks: dict[str, Check]):
    """Decorator: adds a function to a module's table of checks."""

    def add(function: Check) -> Check:
        checks[function.__name__] = function
        return function

    return add


def run(module: str, world_size: int, timeout: float = TIMEOUT) -> dict[str, str]:
    """Runs ``module.CHECKS`` on that many gloo ranks, each for at most ``timeout`` seconds.

    Returns:
        dict: each check -> "" or what went wrong, on every rank where something did.
    """
    import fastclip

    tests = Path(__file__).parent
    path = os.pathsep.join([str(Path(fastclip.__file__).parents[1]), str(tests)])
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(Path(__file__)), module, str(world_size), folder, str(timeout)]
        env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        launched = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
        results: dict[str, str] = {}
        for name in importlib.import_module(module).CHECKS:
            outcomes = [_outcome(Path(folder), rank, name) for rank in range(world_size)]
            if HUNG in outcomes:
                for rank, was in enumerate(outcomes):
                    stack = (Path(folder) / f"{rank}.stderr").read_text()
                    outcomes[rank] = f"{was or 'waits for the others'}\n{stack}"
            results[name] = "\n".join(f"rank {i}: {error}" for i, error in enumerate(outcomes) if error)
        if launched.returncode and all("not reached" in error for error in results.values()):
            raise RuntimeError(launched.stderr)
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


def _launch(module: str, world_size: int, folder: str, timeout: float) -> int:
    importlib.import_module(module)
    importlib.import_module("torch._dynamo")  # a rank's first DTensor op would import it, on every rank
    children = []
    for rank in range(world_size):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                _rank(module, rank, world_size, folder, timeout)
                status = 0
            finally:
                os._exit(status)
        children.append(pid)
    return max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children)


if __name__ == "__main__":
    sys.exit(_launch(sys.argv[1], int(sys.argv[2]), sys.argv[3], float(sys.argv[4])))
