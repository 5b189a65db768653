"""The flow of .ci/gpu.py, with tools that only say what they were asked."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / ".ci" / "gpu.py"
pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="only in a checkout")

# Answers what the script asks, and does what ON_<word of the command> says.
FAKE = """#!/usr/bin/env bash
all="$(basename "$0") $*"
echo "${all//$'\\n'/ }" >> "$CALLS"
case "$all" in
  *is_available*) exit ${NO_GPU:-0} ;;
  *get_device_capability*) echo 90; exit ;;
  *providers*available*) printf '%s\\n' 'torch foreach' 'fastclip cuda' ${PEERS:-}; exit ;;
  *find_spec*) exit 0 ;;
  *"${BAD:-nothing is bad}"*) echo "it went wrong"; exit ${CODE:-1} ;;
  *"${SLOW:-nothing is slow}"*) sleep 60 ;;
  ncu*) out="${all##*--log-file }"; cp "$NCU" "${out%% *}" ;;
  *--json*sweep*) out="${all##*--json }"; echo "$REPORT" > "${out%% *}" ;;
esac
echo "did: $all"
"""
NCU = """==PROF== Connected to process 1
"ID","Kernel Name","gpu__time_duration.sum","lts__t_sector_hit_rate.pct","launch__grid_size"
"","","us","%",""
"0","void norm_kernel<float>(Arguments)","512.3","3.1","23,438"
==WARNING== something
"1","scale_kernel(Arguments)","1,024.5","41.0","23,438"
"""
REPORT = """{"rows": [{"case": "1000x64x64", "regime": "norm-noop", "provider": "torch foreach", "ms": 9.0},
 {"case": "1000x64x64", "regime": "norm-noop", "provider": "fastclip cuda", "ms": 0.0125}]}"""


@pytest.fixture
def gpu(tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("python", "nvidia-smi", "compute-sanitizer", "ncu"):
        (tools / name).write_text(FAKE)
        (tools / name).chmod(0o755)
    (tmp_path / "ncu.csv").write_text(NCU)

    def call(*parts: str, without: str = "", **environment: str) -> tuple[int, str, list[str]]:
        if without:
            (tools / without).unlink()
        names = {"CALLS": "calls", "RESULTS": "results", "NCU": "ncu.csv"}
        paths = {name: str(tmp_path / path) for name, path in names.items()}
        kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "TMPDIR") if name in os.environ}
        path = f"{tools}:/usr/bin:/bin"
        found = subprocess.run(
            [sys.executable, SCRIPT, *parts],
            env=kept | paths | {"PATH": path, "GPU_PYTHON": str(tools / "python"), "REPORT": REPORT} | environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        calls = (tmp_path / "calls").read_text().splitlines()
        return found.returncode, found.stdout + found.stderr, calls

    call.results = tmp_path / "results"
    return call


def summary(gpu) -> dict[str, str]:
    rows = [line.split("|") for line in (gpu.results / "summary.md").read_text().splitlines()[2:]]
    return {row[1].strip(): row[2].strip() for row in rows}


def test_all_parts(gpu):
    code, out, calls = gpu(PEERS="apex")
    assert code == 0, out
    assert summary(gpu) == dict.fromkeys(
        ("build", "test", "bench", "sanitize", "device", "ncu", "sweep", "peers"), "passed"
    )
    has = lambda *words: any(all(word in call for word in words) for call in calls)  # noqa: E731
    assert has("pytest", "-n 8", "slow or not slow", f"--junitxml={gpu.results}/test.xml", "tests/test_gpu.py")
    assert has("bench", "--bars", f"--save {gpu.results}")
    assert not has("--check-bars")
    for check in ("memcheck", "initcheck", "racecheck", "synccheck"):
        assert has("compute-sanitizer", f"--tool {check}", "--error-exitcode 1", "gpu_edges.py --backend cuda")
    assert has("memcheck", "--backend triton")
    assert has("--provider torch foreach", "--provider fastclip cuda", "--provider apex", "--case one-huge-bf16")
    table = (gpu.results / "ncu.md").read_text().splitlines()
    assert table[0] == "| kernel | time (us) | L2 hits, % | blocks |"
    assert table[2:] == [
        "| void norm_kernel<float> | 512.3 | 3.1 | 23,438 |",
        "| scale_kernel | 1,024.5 | 41.0 | 23,438 |",
    ]
    table = (gpu.results / "sweep.md").read_text().splitlines()
    assert table[0] == "| build, times in ms | 1000x64x64, norm-noop |"
    assert "| threads512-unroll8 | 0.0125 |" in table
    assert len(table) == 6
    assert "did: compute-sanitizer" in (gpu.results / "racecheck-cuda.log").read_text()


@pytest.mark.parametrize(
    ("part", "bad", "code", "said"),
    [
        ("test", "-m pytest", 1, "FAILED: test: exit code 1"),
        ("bench", "fastclip bench", 1, "FAILED: bench: exit code 1"),
        ("sanitize", "racecheck", 1, "FAILED: racecheck-cuda: exit code 1"),
        ("build", "build_ext", 1, "FAILED: build: exit code 1"),
        ("ncu", "kernels.py", 0, "not run: ncu: exit code 1"),
        ("sweep", "threads512-unroll4", 0, "not run: sweep-threads512-unroll4: exit code 1"),
        ("device", "device.py", 0, "not run: device: exit code 1"),
    ],
)
def test_only_what_is_wrong_is_an_exit_code(gpu, part, bad, code, said):
    found, out, _ = gpu(part, BAD=bad)
    assert found == code, out
    assert summary(gpu)[part] == said
    assert "it went wrong" in out


def test_a_build_that_fails_ends_it(gpu):
    code, _, calls = gpu("build", "test", BAD="build_ext")
    assert code == 1
    assert list(summary(gpu)) == ["build"]
    assert not any("pytest" in call for call in calls)


def test_a_later_failure_stops_nothing(gpu):
    code, _, _ = gpu("test", "device", BAD="-m pytest")
    assert code == 1
    assert summary(gpu)["device"] == "passed"


@pytest.mark.parametrize(("tool", "part"), [("ncu", "ncu"), ("compute-sanitizer", "sanitize")])
def test_a_tool_that_is_missing(gpu, tool, part):
    code, _, _ = gpu(part, without=tool, CUDA_HOME="/nowhere")
    assert code == 0
    assert summary(gpu)[part].startswith(f"not run: {tool} is neither on PATH nor in /nowhere/bin, ")


def test_peers_that_are_missing(gpu):
    code, _, _ = gpu("peers")
    assert code == 0
    assert summary(gpu)["peers"].startswith("not run: neither apex")


def test_the_deadline(gpu):
    started = time.monotonic()
    code, _, _ = gpu("test", "bench", SLOW="-m pytest", LIMIT="1")
    assert code == 1
    assert time.monotonic() - started < 20
    assert summary(gpu) == {"test": "FAILED: test: stopped after 1 s", "bench": "not run: no time is left"}


def test_without_a_gpu(gpu):
    code, out, _ = gpu("build", NO_GPU="1")
    assert code == 1
    assert "torch sees no CUDA device" in out


def test_an_unknown_part(gpu):
    gpu("peers")
    code, out, _ = gpu("tests")
    assert code == 2
    assert "no part of .ci/gpu.py: tests; there are build, test, bench, sanitize, device, ncu, sweep, peers" in out
