"""What needs a CUDA GPU: python .ci/gpu.py [PART ...], all parts without arguments, in the order of their names below.

GPU_PYTHON (else the Python that runs this) has torch >= 2.10 for CUDA, setuptools, ninja, pytest, numpy, matplotlib.
Nothing is downloaded. Everything is written to the folder RESULTS while it is found out, so that a run that is cut has
told what it knew: summary.md, a log of each step, and the files of the steps. The exit code is that of what must be
right (build, tests, the gates of the benchmark, sanitizers); bars and times are tables, and a tool that is missing is
"not run". After LIMIT seconds (590) whatever still runs is stopped. ARGS is for the benchmark.
"""

from __future__ import annotations

import csv
import itertools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(os.environ.get("RESULTS") or ROOT / "benchmarks" / "results" / "gpu").absolute()
DEADLINE = time.monotonic() + float(os.environ.get("LIMIT") or 590)
PYTHON = os.environ.get("GPU_PYTHON") or sys.executable

# What a pass is limited by: its traffic, its issue slots, its adders; and whether the L2 had what it read.
METRICS = {
    "gpu__time_duration.sum": "time",
    "dram__bytes.sum.per_second": "DRAM",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "of its peak, %",
    "lts__t_sector_hit_rate.pct": "L2 hits, %",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "issue slots, %",
    "sm__inst_executed_pipe_alu.avg.pct_of_peak_sustained_active": "ALU, %",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy, %",
    "launch__registers_per_thread": "registers",
    "launch__grid_size": "blocks",
}
# What must be right; the other parts measure.
MUST = {"build", "test", "bench", "sanitize"}
SWEEP = [{"THREADS": threads, "UNROLL": unroll} for threads in (256, 512) for unroll in (4, 8)]


class NotRun(Exception):
    """A part cannot be run here, which says nothing about what is right."""


class Failed(Exception):
    """What must be right is not."""


def run(name: str, most: float, command: list[str], **environment: str) -> None:
    """Runs a step for at most so many seconds, and not beyond the deadline; what it prints is shown and logged."""
    left = min(most, DEADLINE - time.monotonic())
    if left <= 0:
        raise NotRun("no time is left")
    with (RESULTS / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        timer = subprocess.Popen([sys.executable, "-c", WATCH, str(left), str(process.pid)])
        for line in process.stdout:
            log.write(line)
            log.flush()
            sys.stdout.buffer.write(line)
            sys.stdout.flush()
        status = process.wait()
        timer.kill()
        timer.wait()
    if status == -signal.SIGKILL:
        raise Failed(f"{name}: stopped after {left:.0f} s")
    if status != 0:
        raise Failed(f"{name}: exit code {status}")


# Stops a process group after a while.
WATCH = "import os, sys, time; time.sleep(float(sys.argv[1])); os.killpg(int(sys.argv[2]), 9)"


def find_tool(name: str) -> str:
    """A tool of CUDA, on PATH or where toolkits and Nsight Compute are installed."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    if nvcc := shutil.which("nvcc"):
        homes.append(str(Path(nvcc).resolve().parent.parent))
    homes += sorted(map(str, Path("/usr/local").glob("cuda*")), reverse=True)
    folders = [Path(home) / part for home in homes if home for part in ("bin", "compute-sanitizer")]
    folders += sorted(Path("/opt/nvidia/nsight-compute").glob("*"), reverse=True)
    if found := shutil.which(name) or shutil.which(name, path=os.pathsep.join(map(str, folders))):
        return found
    raise NotRun(f"{name} is neither on PATH nor in {', '.join(map(str, folders)) or 'a toolkit'}")


def has(module: str) -> bool:
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)"
    return subprocess.run([PYTHON, "-c", code, module], cwd=ROOT).returncode == 0


def build(flags: str = "", name: str = "build") -> None:
    code = 'import torch; print("%d%d" % torch.cuda.get_device_capability())'
    arch = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()
    run(
        name,
        240,
        [PYTHON, "setup.py", "--quiet", "build_ext", "--inplace"],
        USE_CUDA="1",
        FASTCLIP_CUDA_ARCHS=arch,
        FASTCLIP_CUDA_FLAGS=flags,
        FASTCLIP_REQUIRE_NATIVE="1",
    )


def part_build() -> None:
    build()
    run("info", 60, [PYTHON, "-m", "fastclip", "info"])
    run("available", 60, [PYTHON, "-c", 'import fastclip, sys; sys.exit(fastclip.backends()["cuda"])'])


def part_test() -> None:
    command = [PYTHON, "-m", "pytest", "--quiet", "-m", "slow or not slow", "--durations=15"]
    command.append(f"--junitxml={RESULTS / 'test.xml'}")
    # Each test waits for the device more than it computes.
    if has("xdist"):
        command += ["-n", "8", "--dist", "worksteal"]
    run("test", 240, [*command, "tests/test_gpu.py"])


def part_bench() -> None:
    arguments = shlex.split(os.environ.get("ARGS") or "")
    run(
        "bench",
        200,
        [PYTHON, "-m", "fastclip", "bench", "--device", "cuda", "--bars", "--save", str(RESULTS), *arguments],
    )


def part_sanitize() -> None:
    tool = find_tool("compute-sanitizer")
    wrong = []
    # memcheck and initcheck have to see every allocation, not the blocks of torch's cache.
    whole = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for check, environment in (("memcheck", whole), ("initcheck", whole), ("racecheck", {}), ("synccheck", {})):
        for backend in ("cuda", "triton"):
            command = [tool, "--tool", check, "--error-exitcode", "1", "--print-limit", "20"]
            command += [PYTHON, "tests/gpu_edges.py", "--backend", backend]
            if backend == "triton" and (check != "memcheck" or not has("triton")):
                continue
            try:
                run(f"{check}-{backend}", 60, command, **environment)
            except Failed as error:
                wrong.append(str(error))
    if wrong:
        raise Failed("; ".join(wrong))


def part_device() -> None:
    run("device", 100, [PYTHON, "benchmarks/device.py", "--out", str(RESULTS)])


def part_ncu() -> None:
    ncu = find_tool("ncu")
    log = RESULTS / "ncu.csv"
    command = [ncu, "--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "raw"]
    command += ["--metrics", ",".join(METRICS), "--log-file", str(log)]
    run("ncu", 120, [*command, PYTHON, "benchmarks/kernels.py"])
    lines = list(ncu_table(log))
    (RESULTS / "ncu.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def ncu_table(log: Path) -> Iterator[str]:
    """Its CSV, one row for each kernel below the names and the units, as Markdown; messages stand between them."""
    lines = [line for line in log.read_text().splitlines() if line.startswith('"')]
    names, units, *rows = csv.reader(lines)
    columns = {name: names.index(name) for name in METRICS if name in names}
    kernel = names.index("Kernel Name")
    titles = [f"{METRICS[n]} ({units[i]})" if units[i] not in ("", "%") else METRICS[n] for n, i in columns.items()]
    yield f"| kernel | {' | '.join(titles)} |"
    yield f"|{'---|' * (len(titles) + 1)}"
    for row in rows:
        yield f"| {row[kernel].partition('(')[0]} | {' | '.join(row[i] for i in columns.values())} |"


def part_sweep() -> None:
    try:
        for choice in SWEEP:
            flags = " ".join(f"-DFASTCLIP_{name}={value}" for name, value in choice.items())
            name = "sweep-" + "-".join(f"{name.lower()}{value}" for name, value in choice.items())
            build(flags, name)
            cases = itertools.chain.from_iterable(("--case", case) for case in ("llama3-8b-1of64", "1000x64x64"))
            out = str(RESULTS / f"{name}.json")
            run(name, 60, [PYTHON, "-m", "fastclip", "bench", "--device", "cuda", "--quick", *cases, "--json", out])
            lines = list(sweep_table())
            (RESULTS / "sweep.md").write_text("\n".join(lines) + "\n")
        print("\n".join(lines))
    finally:
        build(name="sweep-end")


def sweep_table() -> Iterator[str]:
    """The times of fastclip by build, one column for each case and regime."""
    reports = {path.stem.removeprefix("sweep-"): json.loads(path.read_text()) for path in RESULTS.glob("sweep-*.json")}
    times = {
        build: {(r["case"], r["regime"]): r["ms"] for r in report["rows"] if r["provider"].startswith("fastclip")}
        for build, report in sorted(reports.items())
    }
    columns = list(dict.fromkeys(key for row in times.values() for key in row))
    yield f"| build, times in ms | {' | '.join(map(', '.join, columns))} |"
    yield f"|{'---|' * (len(columns) + 1)}"
    for build, row in times.items():
        yield f"| {build} | {' | '.join('' if row.get(key) is None else f'{row[key]:.4f}' for key in columns)} |"


def part_peers() -> None:
    code = """
import torch
from fastclip.bench.providers import available
print(*(provider.name for provider in available(torch.device("cuda"))), sep="\\n")
"""
    found = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout.splitlines()
    peers = [name for name in found if not name.startswith(("torch ", "fastclip "))]
    if not peers:
        raise NotRun("neither apex, TransformerEngine nor NeMo Automodel can be imported")
    chosen = itertools.chain.from_iterable(("--provider", name) for name in (*found[:2], *peers))
    cases = itertools.chain.from_iterable(("--case", case) for case in ("one-huge-bf16", "500-mixed"))
    out = str(RESULTS / "peers.json")
    run("peers", 120, [PYTHON, "-m", "fastclip", "bench", "--device", "cuda", *cases, *chosen, "--json", out])


PARTS: dict[str, Callable[[], None]] = {
    name.removeprefix("part_"): part for name, part in list(globals().items()) if name.startswith("part_")
}


def main(chosen: list[str]) -> int:
    if unknown := [name for name in chosen if name not in PARTS]:
        print(f"no part of .ci/gpu.py: {', '.join(unknown)}; there are {', '.join(PARTS)}", file=sys.stderr)
        return 2
    code = "import torch, sys; sys.exit(not torch.cuda.is_available())"
    if subprocess.run([PYTHON, "-c", code], cwd=ROOT).returncode:
        print(f"{PYTHON}: torch sees no CUDA device, and .ci/gpu.py needs one", file=sys.stderr)
        return 1
    RESULTS.mkdir(parents=True, exist_ok=True)
    os.environ["PYTHONPATH"] = str(ROOT)
    if smi := shutil.which("nvidia-smi"):
        query = "--query-gpu=name,driver_version,temperature.gpu,utilization.gpu"
        subprocess.run([smi, query, "--format=csv,noheader"])
    lines, failed = ["| part | | seconds |", "|---|---|---|"], False
    for name in chosen or PARTS:
        print(f"\n== {name}", flush=True)
        started = time.monotonic()
        try:
            PARTS[name]()
            verdict = "passed"
        except NotRun as reason:
            verdict = f"not run: {reason}"
        except Failed as error:
            verdict = f"{'FAILED' if name in MUST else 'not run'}: {error}"
            failed = failed or name in MUST
        lines.append(f"| {name} | {verdict} | {time.monotonic() - started:.0f} |")
        (RESULTS / "summary.md").write_text("\n".join(lines) + "\n")
        if name == "build" and failed:
            break
    print("", *lines, sep="\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
