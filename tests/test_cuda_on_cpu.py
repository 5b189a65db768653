"""The simulator that runs CUDA kernels on the CPU, with kernels of its own, right and wrong ones."""

from __future__ import annotations

import subprocess

import pytest

import on_cpu

pytestmark = pytest.mark.skipif(on_cpu.unavailable() is not None, reason=str(on_cpu.unavailable()))


@pytest.mark.parametrize("check", ["reduction", "dropped_barrier", "shuffle", "divergence", "misaligned", "poison"])
def test_simulator(check):
    program = on_cpu.build("selftest", [on_cpu.HEADERS / "selftest.cpp"])
    result = subprocess.run([program, check], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
