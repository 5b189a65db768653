"""The command line: `run` gives a program what python gives it, and reaches its children; `info` says what there is."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fastclip
from fastclip import __main__ as command_line
from fastclip import _install
from subproc import execute, python

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
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text("MARK = 'another'\n")
    (folder / "jobs" / "witness.py").write_text(WITNESS)
    (folder / "jobs" / "__main__.py").write_text(WITNESS)
    (folder / "jobs" / "children.py").write_text(CHILDREN)
    (folder / "jobs" / "late.py").write_text(LATE)
    return folder


# What a program can ask of its process.
WITNESS = """
import atexit, json, sys, threading, time
atexit.register(lambda: print("at exit", threading.current_thread() is threading.main_thread()))
def late():
    time.sleep(0.2)
    print("a thread outlives the program's last line", flush=True)
threading.Thread(target=late).start()
print(json.dumps({
    "argv": sys.argv, "path": sys.path, "file": globals().get("__file__"), "name": __name__, "package": __package__,
    "spec": getattr(globals().get("__spec__"), "name", None), "loader": type(__loader__).__name__,
    "main": sys.modules["__main__"].__dict__ is globals(), "flags": str(sys.flags), "warnings": sys.warnoptions,
    "buffered": not sys.stdout.write_through, "site": getattr(sys.modules.get("sitecustomize"), "MARK", None),
    "torch": "torch" in sys.modules,
}))
"""

CHILDREN = """
import multiprocessing, os
import torch
from torch.nn.utils import clip_grad_norm_

def norm():
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([3e20, 4e20])
    return torch.nn.utils.clip_grad_norm_([weight], 1.0).item()

if __name__ == "__main__":
    print("rank", os.environ["RANK"])
    print(norm())
    for method in ("spawn", "forkserver"):
        with multiprocessing.get_context(method).Pool(1) as pool:
            print(pool.apply(norm))
"""

# It imports torch by way of fastclip, and FSDP1 when torch has long been patched.
LATE = """
import fastclip, fastclip.fsdp, torch
print(torch.nn.utils.clip_grad_norm_ is fastclip.clip_grad_norm_)
from torch.distributed.fsdp import FullyShardedDataParallel
print(FullyShardedDataParallel.clip_grad_norm_ is fastclip.fsdp.clip_grad_norm_)
"""


def with_and_without(folder: Path, options: list[str], program: list[str], **env: str) -> tuple[str, str]:
    """What `python options program` prints, and what it does under `python options -m fastclip run`."""
    plain = python(*options, *program, cwd=folder, env=env)
    patched = python(*options, "-m", "fastclip", "run", *program, cwd=folder, env=env)
    assert plain.returncode == patched.returncode, patched.stderr
    assert plain.stderr == patched.stderr
    return plain.stdout, patched.stdout


@pytest.mark.parametrize(
    ("options", "program"),
    [
        ([], ["jobs/witness.py", "--", "--lr", "-m", "x", "--backend", "y"]),
        (["-u"], ["-m", "jobs.witness", "--", "-c"]),
        (["-P", "-B", "-q"], ["jobs"]),
        (["-X", "utf8"], ["-c", WITNESS, "--", "a"]),
    ],
    ids=["script", "module", "folder, safe path", "code"],
)
def test_the_program_sees_what_python_gives(folder, options, program):
    """Arguments, `__main__`, paths, flags, a thread that goes on, atexit, and another sitecustomize: line by line."""
    if sys.version_info < (3, 11):  # -P came with it
        options = [option for option in options if option != "-P"]
    path = os.pathsep.join([str(folder / "site"), str(Path(fastclip.__file__).parents[1])])
    plain, patched = with_and_without(folder, options, program, PYTHONPATH=path)
    assert "at exit" in plain
    assert '"site": "another"' in plain
    assert plain.splitlines() == patched.splitlines()


@pytest.mark.parametrize("program", [["missing.py"], ["-m", "no_such_module"]])
def test_a_missing_program_is_one_line(folder, program):
    plain = python(*program, cwd=folder)
    patched = python("-m", "fastclip", "run", *program, cwd=folder)
    assert patched.returncode == plain.returncode != 0
    assert patched.stderr == plain.stderr
    assert len(patched.stderr.splitlines()) == 1


def test_children_are_reached(folder):
    """Those that torch's launcher starts by itself, and theirs. What it warns of is its own."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", "jobs/children.py"]
    ran = python("-W", "ignore", "-m", "fastclip", "run", *launcher, cwd=folder)
    assert ran.returncode == 0, ran.stderr
    assert not re.search("fastclip|Traceback", ran.stderr), ran.stderr
    rank, *norms = ran.stdout.split()[1:]
    assert rank == "0"
    assert [float(norm) for norm in norms] == pytest.approx([5e20] * 3)


def test_what_is_imported_late_is_reached(folder):
    ran = python("-W", "ignore", "-m", "fastclip", "run", "jobs/late.py", cwd=folder)
    assert (ran.stdout, ran.stderr) == ("True\nTrue\n", "")


def test_script(folder):
    """Arguments, `__main__`, sys.path, imports beside the script, its options left alone, and the patch in force."""
    script = folder / "jobs" / "train.py"
    ran = python(
        "-m", "fastclip", "run", "--backend", "eager",
        "jobs/train.py", "--lr", "0.1", "-m", "x", "--backend", "y", "--fail",
        cwd=folder,
    )  # fmt: skip
    assert ran.returncode == 1
    assert ran.stderr.startswith('Traceback (most recent call last):\n  File "' + str(script))
    assert ran.stderr.endswith("KeyError: 'from the script'\n")
    seen = json.loads(ran.stdout)
    assert seen["argv"] == ["jobs/train.py", "--lr", "0.1", "-m", "x", "--backend", "y", "--fail"]
    assert seen["name"] == "__main__"
    assert seen["local"] == "Local"
    assert seen["path"] == str(script.parent)
    assert seen["file"] == str(script)
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


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["run", "--backend", "bogus", "jobs/train.py"], ["bogus", *fastclip.backends()]),
        (["run"], ["usage"]),
        (["run", "-m"], ["usage"]),
        (["run", "--bogus", "jobs/train.py"], ["--bogus"]),
        (["bogus"], ["bogus", "info", "bench", "demo", "run"]),
        ([], ["usage"]),
    ],
    ids=["backend", "nothing to run", "no module", "option", "command", "no command"],
)
def test_what_cannot_run(arguments, named, monkeypatch, capfd):
    """In this process, through the front door: a message on stderr, a non-zero exit code, and nothing stays patched."""
    with pytest.raises(SystemExit) as raised:
        front_door(arguments, monkeypatch)
    message = capfd.readouterr().err + str(raised.value)
    assert raised.value.code not in (0, None)
    assert all(name in message for name in named), message


@pytest.mark.parametrize("flag", ["no_site", "ignore_environment"])
def test_run_refuses_a_python_whose_start_is_fixed(flag, monkeypatch, capfd):
    """Nobody would be patched: -S, and -E and -I, of python keep sitecustomize, or PYTHONPATH, out."""
    flags = SimpleNamespace(**{"no_site": 0, "ignore_environment": 0, flag: 1})
    monkeypatch.setattr(command_line, "sys", SimpleNamespace(flags=flags))
    with pytest.raises(SystemExit):
        command_line.run(["train.py"])
    assert "fastclip.patch()" in capfd.readouterr().err


def front_door(arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fastclip", *arguments])
    return command_line.main()


def info(monkeypatch, capfd) -> dict[str, str]:
    """What `info` prints, by the words before the first colon, or by the first word."""
    assert front_door(["info"], monkeypatch) == 0
    printed = capfd.readouterr().out.splitlines()
    return {re.match(r"[\w -]+(?=:)|\w+", line)[0]: line for line in printed}


def test_info(monkeypatch, capfd):
    monkeypatch.setenv("FASTCLIP_BACKEND", "eager")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    said = info(monkeypatch, capfd)
    assert f"fastclip {fastclip.__version__} in {Path(fastclip.__file__).parent}" in said["fastclip"]
    assert f"torch {torch.__version__}" in said["torch"]
    for name, reason in fastclip.backends().items():
        assert (reason or "available") in said[f"backend {name}"]
        assert ("forced" in said[f"backend {name}"]) == (name == "eager")
    built = _install.facts()
    assert ("pure Python" if built is None else built["compiler"]) in said["built"]
    assert "FASTCLIP_BACKEND=eager" in said["environment"]
    assert "CUDA_VISIBLE_DEVICES=7" in said["environment"]
    assert {"devices", "NVIDIA driver", "machine", "CPU kernels"} <= said.keys()


def test_a_source_tree_that_hides_an_installed_copy_is_named(tmp_path, monkeypatch, capfd):
    """No false "no compiler" where an installed fastclip has the library, and this folder does not."""
    source, site = tmp_path / "source", tmp_path / "site"
    for folder in (source / "csrc", site / "fastclip", site / "torch_fastclip-0.1.0.dist-info"):
        folder.mkdir(parents=True)
    (source / "setup.py").touch()
    (site / "fastclip" / "__init__.py").touch()
    (site / "torch_fastclip-0.1.0.dist-info" / "METADATA").write_text("Name: torch-fastclip\nVersion: 0.1.0\n")
    monkeypatch.setattr(_install, "PACKAGE", source / "fastclip")
    monkeypatch.setattr(sys, "path", [str(site), *sys.path])
    for cached in (_install.hidden_copy, _install.facts):
        cached.cache_clear()
    try:
        reason = _install.why_not_built("libfastclip_cpu.so", "C++ compiler")
        said = info(monkeypatch, capfd)
    finally:
        for cached in (_install.hidden_copy, _install.facts):
            cached.cache_clear()
    assert "compiler" not in reason
    assert str(source) in reason
    assert str(site / "fastclip") in reason
    assert str(site / "fastclip") in said["fastclip"]


@pytest.mark.parametrize(
    ("built", "said"),
    [(None, "is not in this install, which is pure Python"), ("{}", "was not built (no NVRTC at install time)")],
    ids=["pure", "without CUDA"],
)
def test_why_an_installed_library_is_missing(tmp_path, monkeypatch, built, said):
    monkeypatch.setattr(_install, "PACKAGE", tmp_path)
    if built:
        (tmp_path / "build.json").write_text(built)
    _install.facts.cache_clear()
    try:
        assert said in _install.why_not_built("libfastclip_cuda.so", "NVRTC")
    finally:
        _install.facts.cache_clear()


def test_a_second_import_says_what_is_wrong():
    code = """
import sys, fastclip
for name in [name for name in sys.modules if name.startswith("fastclip")]:
    del sys.modules[name]
import fastclip
"""
    child = execute(code)
    assert child.error.splitlines()[-1].startswith("ImportError: fastclip was imported before in this process")


def test_a_closed_pipe_is_no_traceback():
    """`python -m fastclip info | head -1`; here with nobody at all to read."""
    reader, writer = os.pipe()
    os.close(reader)
    path = str(Path(fastclip.__file__).parents[1])
    ran = subprocess.run(
        [sys.executable, "-m", "fastclip", "bench", "--list"],
        env={**os.environ, "PYTHONPATH": path},
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
    )
    os.close(writer)
    assert ran.stderr == ""
    assert ran.returncode == 1


@pytest.mark.parametrize(
    ("option", "value"),
    [("--json", "."), ("--json", "file/x"), ("--plot", "x.xyz"), ("--plot", "."), ("--save", "file")],
)
def test_bench_looks_at_its_files_before_it_measures(option, value, tmp_path, monkeypatch, capfd):
    from fastclip import bench

    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "run_case", lambda *args: pytest.fail("measured before it looked"))
    with pytest.raises(SystemExit) as raised:
        bench.main(["--quick", "--case", "lstm", option, value])
    assert raised.value.code == 2
    assert f"argument {option}: must" in capfd.readouterr().err
