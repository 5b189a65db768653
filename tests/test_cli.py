"""`python -m fastclip run`: the program sees what python itself would have given it; `info` says what there is."""

from __future__ import annotations

import json
import sys

import fastclip
import pytest
from subproc import python

SCRIPT = '''
"""A training script that knows nothing of fastclip."""
import json, os, pickle, sys
import torch
from torch.nn.utils import clip_grad_norm_
from neighbour import NAME

class Local:
    """Pickles only if __main__ is this script."""

weight = torch.nn.Parameter(torch.zeros(2))
weight.grad = torch.tensor([3e20, 4e20])
norm = clip_grad_norm_([weight], 1.0)
weight.grad = torch.tensor([3e20, 4e20])
also = torch.nn.utils.clip_grad_norm_([weight], 1.0)
import fastclip
print(json.dumps({
    "name": __name__, "argv": sys.argv, "path": sys.path[0], "file": globals().get("__file__"), "norm": norm.item(),
    "also": also.item(), "neighbour": NAME, "local": type(pickle.loads(pickle.dumps(Local()))).__name__,
    "package": __package__, "spec": getattr(globals().get("__spec__"), "name", None),
    "backend": fastclip.why([weight])[0].backend,
}))
if "--fail" in sys.argv:
    def deep():
        raise KeyError("from the script")
    deep()
if "--exit" in sys.argv:
    sys.exit(7)
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a script, its neighbour, and a package."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "jobs" / "inner").mkdir(parents=True)
    (folder / "jobs" / "train.py").write_text(SCRIPT)
    (folder / "jobs" / "neighbour.py").write_text("NAME = 'beside the script'\n")
    (folder / "neighbour.py").write_text("NAME = 'in the working folder'\n")
    (folder / "jobs" / "inner" / "__init__.py").write_text("")
    (folder / "jobs" / "inner" / "train.py").write_text(SCRIPT)
    return folder


def test_script(folder):
    """Arguments, `__main__`, sys.path, imports beside the script, its options left alone, and the patch in force."""
    script = folder / "jobs" / "train.py"
    ran = python(
        "-m", "fastclip", "run", "--backend", "eager", "jobs/train.py", "--lr", "0.1", "-m", "x", "--backend", "y",
        cwd=folder,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == ""
    seen = json.loads(ran.stdout)
    assert seen["argv"] == ["jobs/train.py", "--lr", "0.1", "-m", "x", "--backend", "y"]
    assert seen["name"] == "__main__"
    assert seen["local"] == "Local"
    assert seen["path"] == str(script.parent)
    assert seen["file"] in ("jobs/train.py", str(script))
    assert seen["neighbour"] == "beside the script"
    assert seen["backend"] == "eager"
    assert seen["norm"] == pytest.approx(5e20)
    assert seen["also"] == pytest.approx(5e20)


def test_module(folder):
    """`-m` as python's own, the dots, the package and the working folder on sys.path included; exit code passed on."""
    ran = python("-m", "fastclip", "run", "-m", "jobs.inner.train", "--exit", "1", cwd=folder)
    assert ran.returncode == 7, ran.stderr
    seen = json.loads(ran.stdout)
    assert seen["argv"] == [str(folder / "jobs" / "inner" / "train.py"), "--exit", "1"]
    assert (seen["name"], seen["package"]) == ("__main__", "jobs.inner")
    assert seen["neighbour"] == "in the working folder"
    assert seen["local"] == "Local"
    assert seen["backend"] == next(name for name, reason in fastclip.backends().items() if reason is None)
    assert seen["norm"] == pytest.approx(5e20)


def test_traceback_and_exit_code(folder):
    ran = python("-m", "fastclip", "run", "jobs/train.py", "--fail", cwd=folder)
    assert ran.returncode == 1
    assert ran.stderr.rstrip().endswith("KeyError: 'from the script'")
    assert "train.py" in ran.stderr
    assert "in deep" in ran.stderr


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["run", "--backend", "bogus", "jobs/train.py"], ["bogus", *fastclip.backends()]),
        (["run", "missing.py"], ["missing.py"]),
        (["run", "-m", "no_such_module"], ["no_such_module"]),
        (["run"], ["usage"]),
        (["bogus"], ["bogus", "info", "bench", "demo", "run"]),
        ([], ["usage"]),
    ],
    ids=["backend", "script", "module", "nothing to run", "command", "no command"],
)
def test_what_cannot_run(folder, arguments, named, monkeypatch, capfd):
    """In this process, through the front door: a message on stderr, a non-zero exit code, and nothing stays patched."""
    import runpy

    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["fastclip", *arguments])
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    with pytest.raises((SystemExit, ImportError)) as raised:
        runpy.run_module("fastclip", run_name="__main__", alter_sys=True)
    message = capfd.readouterr().err + str(raised.value)
    assert getattr(raised.value, "code", 1) not in (0, None)
    assert all(name in message for name in named), message


def test_info(monkeypatch, capfd):
    import runpy

    import torch

    monkeypatch.setattr(sys, "argv", ["fastclip", "info"])
    with pytest.raises(SystemExit) as raised:
        runpy.run_module("fastclip", run_name="__main__", alter_sys=True)
    assert raised.value.code in (0, None)
    printed = capfd.readouterr().out
    assert fastclip.__version__ in printed
    assert torch.__version__ in printed
    for name, reason in fastclip.backends().items():
        (line,) = (line for line in printed.splitlines() if line.startswith(f"backend {name}"))
        assert (reason or "available") in line
