"""Code that must run in a process of its own: other environment, other arguments, a possible crash."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import pickle
import subprocess
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Any, NamedTuple

_TESTS = str(Path(__file__).parent)
# glibc fills every allocation of the children with this byte: scratch that nobody initialised shows as a wrong result.
os.environ.setdefault("MALLOC_PERTURB_", "165")


class Result(NamedTuple):
    """What a child left behind: `value` is what the function returned, `error` its traceback or how it died."""

    value: Any
    error: str
    stderr: str


def _child(pipe, env: dict[str, str], target: str, args: tuple, stderr: str) -> None:
    os.environ.update(env)
    sys.path.insert(0, _TESTS)
    warnings.simplefilter("error")
    with open(stderr, "wb") as file:
        os.dup2(file.fileno(), 2)
    module, name = target.split(":")
    try:
        result = getattr(importlib.import_module(module), name)(*args), ""
    except BaseException:
        result = None, traceback.format_exc()
    # Plain pickle copies a tensor; multiprocessing's own would lend its memory, which ends with this process.
    pipe.send_bytes(pickle.dumps(result))


def call(target: str, *args, env: dict[str, str] | None = None) -> Result:
    """Call `module:function` in a fresh process forked from a server that has imported torch and nothing of ours.

    Args:
        target: the function, importable from this folder; its module is imported after the environment is set.
        args: passed on by pickling, as is the result.
        env: variables set before the import.
    """
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["torch"])
    receiver, sender = server.Pipe(duplex=False)
    with tempfile.NamedTemporaryFile("r") as stderr:
        process = server.Process(target=_child, args=(sender, env or {}, target, args, stderr.name))
        process.start()
        sender.close()
        value, error = None, ""
        with contextlib.suppress(EOFError):
            value, error = pickle.loads(receiver.recv_bytes())
        process.join()
        if process.exitcode and not error:
            error = f"exit code {process.exitcode}"
        return Result(value, error, stderr.read())


def execute(code: str, env: dict[str, str] | None = None) -> Result:
    """Run a program of a few lines in such a process: as `python -c`, but torch is there at once."""
    return call("subproc:_execute", code, env=env)


def _execute(code: str) -> None:
    exec(code, {"__name__": "__main__"})


def python(*arguments: str, cwd: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """Run `python arguments...` with the same fastclip on its path; warnings are errors there, too."""
    import fastclip

    path = os.pathsep.join(filter(None, [str(Path(fastclip.__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    variables = {**os.environ, "PYTHONPATH": path, **(env or {})}
    command = [sys.executable, "-W", "error", *arguments]
    return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=120, check=False)
