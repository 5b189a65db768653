"""The run on a GPU (.ci/gpu), with stand-ins for Python and the tools: what it calls, writes, and says at the end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / ".ci" / "gpu"
pytestmark = pytest.mark.skipif(
    not SCRIPT.exists() or not sys.platform.startswith("linux"), reason=".ci/ is not beside tests/, or not Linux"
)

# Logs its arguments, writes what --json and --junitxml ask for, and then does as $DO says of a word among them.
PYTHON = r"""#!/usr/bin/env bash
printf '%s\n' "$*" >> "$CALLS"
previous=''
for word; do
  case $previous in --json) echo rows > "$word" ;; esac
  case $word in --junitxml=*) echo tests > "${word#*=}" ;; esac
  previous=$word
done
case "$*" in
  *is_available*) exit "${NO_GPU:-0}" ;;
  *get_device_capability*) echo 90; exit ;;
  *'import xdist'*) exit "${NO_XDIST:-0}" ;;
esac
while read -r what status; do
  [ -n "$what" ] || continue
  case "$*" in *"$what"*) [ "$status" = hang ] && exec sleep 30; exit "$status" ;; esac
done <<< "$DO"
exit 0
"""
# compute-sanitizer and ncu run what they are given.
TOOL = r"""#!/usr/bin/env bash
printf '%s %s\n' "${0##*/}" "$*" >> "$CALLS"
while [ "$1" != "$GPU_PYTHON" ]; do shift; done
exec "$@"
"""


@pytest.fixture
def run(tmp_path):
    """Run parts of the script in a folder of its own; returns the process, the calls and the results."""
    (tmp_path / "tools" / "bin").mkdir(parents=True)
    python = tmp_path / "python"
    for path, text in (
        (python, PYTHON),
        *((tmp_path / "tools" / "bin" / n, TOOL) for n in ("compute-sanitizer", "ncu")),
    ):
        path.write_text(text)
        path.chmod(0o755)

    def start(*parts: str, do: str = "", toolkits: str | None = None, **environment: str) -> subprocess.Popen:
        environment = {
            **{name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ},
            "GPU_PYTHON": str(python),
            "RESULTS": str(tmp_path / "results"),
            "TOOLKITS": toolkits or str(tmp_path / "tools"),
            "CALLS": str(tmp_path / "calls"),
            "DO": do,
            **environment,
        }
        command = ["bash", str(SCRIPT), *parts]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def finish(*parts: str, **options: str) -> tuple[int, str]:
        process = start(*parts, **options)
        output, _ = process.communicate(timeout=60)
        return process.returncode, output

    finish.start = start
    finish.calls = lambda: (tmp_path / "calls").read_text() if (tmp_path / "calls").exists() else ""
    finish.results = tmp_path / "results"
    return finish


def summary(run) -> dict[str, str]:
    lines = (run.results / "summary.txt").read_text().splitlines()
    return {line.split()[0]: line.split(maxsplit=1)[1].rsplit(" after", 1)[0] for line in lines}


def test_all_parts(run):
    code, output = run()
    assert code == 0, output
    assert summary(run) == dict.fromkeys(("build", "test", "bench", "ncu", "sanitize", "peers"), "passed")
    calls = run.calls()
    assert "-n 6 --dist worksteal --durations=15 --junitxml=" in calls
    assert f"--bars --details --save {run.results} --json {run.results}/bench.json" in calls
    assert "--check-bars" not in calls
    assert "benchmarks/host.py --split cuda" in calls
    assert calls.count("compute-sanitizer --tool") == 5
    assert "tests/gpu_edges.py --backend triton" in calls
    assert "ncu --clock-control none" in calls
    assert {"build.log", "test.log", "test.xml", "bench.json", "peers.json", "summary.txt"} <= {
        path.name for path in run.results.iterdir()
    }


@pytest.mark.parametrize(
    ("do", "part", "verdict", "code"),
    [
        ("build_ext 3", "build", "FAILED", 1),
        ("tests/test_gpu.py 1", "test", "FAILED", 1),
        ("--bars 1", "bench", "FAILED", 1),
        ("--bars 124", "bench", "cut", 0),
        ("tests/test_gpu.py 124", "test", "FAILED", 1),
        ("gpu_edges.py 1", "sanitize", "FAILED", 1),
        ("benchmarks/kernels.py 1", "ncu", "not made", 0),
        ("one-huge-bf16 1", "peers", "not made", 0),
    ],
)
def test_only_what_is_wrong_fails_the_run(run, do, part, verdict, code):
    """And a part that fails does not stop the others, but the build."""
    returned, output = run(do=do)
    assert returned == code, output
    verdicts = summary(run)
    assert verdicts.pop(part) == verdict
    assert set(verdicts.values()) <= {"passed"}
    assert len(verdicts) == (0 if part == "build" else 5)


def test_without_xdist_and_tools(run):
    code, output = run("test", "ncu", "sanitize", NO_XDIST="1", toolkits="/nowhere", PATH="/usr/bin:/bin")
    assert "-n 6" not in run.calls()
    assert summary(run) == {"test": "passed", "ncu": "not made", "sanitize": "FAILED"}
    assert code == 1
    assert "compute-sanitizer is neither on PATH nor in a CUDA toolkit" in output


def test_what_is_written_stays_when_the_run_is_cut(run):
    process = run.start("bench", "test", do="tests/test_gpu.py hang")
    for _ in range(300):
        if "tests/test_gpu.py" in run.calls():
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=10)
    assert process.returncode == 1
    assert summary(run) == {"bench": "passed", "test": "stopped"}
    assert (run.results / "bench.json").read_text() == "rows\n"


def test_the_deadline(run):
    code, _ = run("test", "bench", "sanitize", do="tests/test_gpu.py hang", LIMIT="1")
    assert summary(run) == {"test": "FAILED", "bench": "cut", "sanitize": "FAILED"}
    assert code == 1


def test_sweep(run):
    """Each way of building has its rows, and leaves no copy."""
    code, output = run("sweep", do="FASTCLIP_UNROLL 1")
    assert code == 0, output
    names = sorted(path.name for path in run.results.glob("sweep-*.json"))
    assert len(names) == run.calls().count("build_ext") == 6
    assert "sweep-THREADS=512-UNROLL=2.json" in names
    assert list((run.results / "sweep").iterdir()) == []


def test_wrong_part_and_no_gpu(run):
    assert run("tests")[0] == 2
    code, output = run("build", NO_GPU="1")
    assert (code, "torch sees no CUDA device" in output) == (1, True)
    assert "build_ext" not in run.calls()
