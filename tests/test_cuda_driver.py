"""How the CUDA library uses the driver: loading, devices, contexts and errors, under one that the CPU plays."""

from __future__ import annotations

import contextvars
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import fastclip
import on_cpu
from cases import parameters
from fastclip import _ops

pytestmark = pytest.mark.skipif(on_cpu.unavailable() is not None, reason=str(on_cpu.unavailable()))
# What was built beside the package, or another that is to be tested.
SHIPPED = Path(os.environ.get("FASTCLIP_TEST_CUDA_LIBRARY") or Path(fastclip.__file__).with_name("libfastclip_cuda.so"))
LOADING = (
    *("cuInit", "cuDeviceGet", "cuDeviceGetAttribute", "cuCtxGetCurrent", "cuDevicePrimaryCtxRetain"),
    *("cuCtxPushCurrent_v2", "cuThreadExchangeStreamCaptureMode", "cuLibraryLoadData", "cuLibraryGetKernel"),
    "cuKernelGetFunction",
)
LAUNCHING = ("cuCtxGetCurrent", "cuCtxPushCurrent_v2", "cuDeviceGetAttribute", "cuMemsetD8Async", "cuLaunchKernelEx")
OUT_OF_MEMORY = 2


@pytest.fixture
def driver():
    driver = on_cpu.driver()
    yield driver
    driver.cuda_on_cpu_fail_call(b"", 0)
    driver.cuda_on_cpu_set_capturing(False)
    driver.cuda_on_cpu_set_context(-1)
    driver.cuda_on_cpu_set_version(12020)
    for device in range(4):
        driver.cuda_on_cpu_set_arch(device, 90)


@pytest.fixture
def fresh(driver, tmp_path):
    """The library as after an import: it knows no device."""
    on_cpu.library()
    return on_cpu.open_library(Path(shutil.copy(on_cpu.built(), tmp_path / "library")))


@pytest.mark.parametrize("name", LOADING)
def test_what_fails_while_loading_is_named_and_tried_again(driver, fresh, name):
    libraries, retained = driver.cuda_on_cpu_libraries(), driver.cuda_on_cpu_retained(0)
    driver.cuda_on_cpu_fail_call(name.encode(), 719)
    assert fresh.fastclip_cuda_unsupported(0) == f"fastclip: {name}: unspecified launch failure".encode()
    assert driver.cuda_on_cpu_contexts() == fresh.cuda_on_cpu_device_guards() == 0
    assert driver.cuda_on_cpu_libraries() - libraries == (name == "cuKernelGetFunction")  # it has no fault, and is kept
    assert fresh.fastclip_cuda_unsupported(0) is None
    assert driver.cuda_on_cpu_libraries() == libraries + 1
    assert driver.cuda_on_cpu_retained(0) == retained + 1
    assert driver.cuda_on_cpu_contexts() == 0


@pytest.mark.parametrize("name", LAUNCHING)
def test_what_fails_while_launching(driver, name):
    grads = [torch.randn(5), torch.randn(9)]
    before = [grad.clone() for grad in grads]
    with on_cpu.use():
        driver.cuda_on_cpu_fail_call(name.encode(), OUT_OF_MEMORY)
        what = "norm_kernel<extreme>" if name == "cuLaunchKernelEx" else name
        kinds = 2.0 if name == "cuDeviceGetAttribute" else 0.0
        with pytest.raises(RuntimeError, match=f"fastclip: {what}: unrecognized error code"):
            fastclip.clip_grad_norm_(parameters(grads), 0.1, kinds)
        assert all(map(torch.equal, grads, before))
        assert fastclip.clip_grad_norm_(parameters(grads), 0.1, 0.0) == 2
    assert not any(map(torch.equal, grads, before))


def test_a_reason_that_passes_is_not_kept(driver, fresh, monkeypatch):
    monkeypatch.setattr(_ops, "cuda_library", fresh)
    monkeypatch.setattr(_ops, "_supported", set())
    driver.cuda_on_cpu_fail_call(b"cuLibraryLoadData", 719)
    assert _ops.cuda_unsupported(0) == "cuLibraryLoadData: unspecified launch failure"
    assert _ops.cuda_unsupported(0) is None
    asked = driver.cuda_on_cpu_calls(b"cuCtxGetCurrent")
    assert _ops.cuda_unsupported(0) is None
    assert driver.cuda_on_cpu_calls(b"cuCtxGetCurrent") == asked


@pytest.mark.parametrize(
    ("arch", "loaded"), [(75, 75), (80, 80), (86, 80), (89, 80), (90, 90), (103, 1090), (110, 1090), (120, 1090)]
)
def test_the_code_for_a_device(driver, fresh, arch, loaded):
    driver.cuda_on_cpu_set_arch(1, arch)
    assert fresh.fastclip_cuda_unsupported(1) is None
    assert driver.cuda_on_cpu_last_loaded() == loaded


def test_a_device_without_code(driver, fresh):
    driver.cuda_on_cpu_set_arch(1, 70)
    assert fresh.fastclip_cuda_unsupported(1) == (
        b"fastclip: no kernels for compute capability 7.0, only for 7.5, 8.0, 9.0, 9.0 and later"
    )
    assert b"invalid device ordinal" in fresh.fastclip_cuda_unsupported(4)


@pytest.mark.parametrize("arch", [80, 90])
def test_two_devices(driver, fresh, arch):
    """Each loads the kernels into its own context; those of one architecture share what they load."""
    libraries = driver.cuda_on_cpu_libraries()
    driver.cuda_on_cpu_set_arch(1, arch)
    assert fresh.fastclip_cuda_unsupported(0) is None
    functions = driver.cuda_on_cpu_calls(b"cuKernelGetFunction")
    assert fresh.fastclip_cuda_unsupported(1) is None
    assert driver.cuda_on_cpu_calls(b"cuKernelGetFunction") - functions > 20
    assert driver.cuda_on_cpu_libraries() - libraries == (1 if arch == 90 else 2)


def test_a_launch_on_the_second_device(driver):
    """The op finds the device by its tensors, and the kernels were loaded there before the launch."""
    grad = torch.randn(9)
    expected = grad * 0.5
    with on_cpu.use():
        on_cpu.library().cuda_on_cpu_put_tensors_on(1)
        try:
            torch.ops.fastclip_cuda_on_cpu.scale_([grad], torch.tensor(0.5, dtype=torch.float64))
        finally:
            on_cpu.library().cuda_on_cpu_put_tensors_on(-1)
    assert torch.equal(grad, expected)
    assert driver.cuda_on_cpu_retained(1)


def test_contexts(driver):
    """A thread without a context has none afterwards; one with the device's keeps it, and is given no other."""
    pushes = []

    def clip(device: int) -> None:
        driver.cuda_on_cpu_set_context(device)
        before = driver.cuda_on_cpu_calls(b"cuCtxPushCurrent_v2")
        fastclip.clip_grad_norm_(parameters([torch.randn(9)]), 0.1)
        pushes.append((driver.cuda_on_cpu_calls(b"cuCtxPushCurrent_v2") - before, driver.cuda_on_cpu_contexts()))

    with on_cpu.use():
        fastclip.clip_grad_norm_(parameters([torch.randn(9)]), 0.1)
        retained = driver.cuda_on_cpu_retained(0)
        for device in (-1, 0):
            thread = threading.Thread(target=contextvars.copy_context().run, args=(clip, device))
            thread.start()
            thread.join()
    assert pushes == [(2, 0), (0, 1)]  # one for each launch
    assert driver.cuda_on_cpu_retained(0) == retained


def test_loading_while_a_stream_is_captured(driver, fresh):
    driver.cuda_on_cpu_set_capturing(True)
    assert fresh.fastclip_cuda_unsupported(0) is None
    assert driver.cuda_on_cpu_contexts() == 0


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        (11080, b"the NVIDIA driver serves CUDA 11.8, and the kernels need 12.1"),
        (12000, b"the NVIDIA driver serves CUDA 12.0, and the kernels need 12.1"),
        (12010, None),
        (13020, None),
    ],
)
def test_drivers(driver, fresh, version, reason):
    driver.cuda_on_cpu_set_version(version)
    assert fresh.fastclip_cuda_open_driver(driver._name.encode()) == reason
    assert fresh.fastclip_cuda_open_driver(b"libcuda.none.so") == b"no NVIDIA driver (libcuda.none.so)"
    assert fresh.fastclip_cuda_open_driver(b"libc.so.6") == b"libc.so.6 does not tell its version"


PROGRAM = """
import ctypes, sys
import torch
import fastclip, on_cpu
ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)
on_cpu.driver().cuda_on_cpu_set_arch(0, int(sys.argv[3]))
library = on_cpu.open_library(sys.argv[2])
on_cpu.register(library, "shipped")
assert library.fastclip_cuda_unsupported(0) is None, library.fastclip_cuda_unsupported(0)
assert on_cpu.driver().cuda_on_cpu_last_loaded() == int(sys.argv[4])
grads = [torch.randn(70_000), torch.randn(9).bfloat16(), torch.randn(8, 5)[:, 1:].double()]
ours = [grad.clone() for grad in grads]
expected = torch.nn.utils.get_total_norm(grads).double()
for kind in (2.0, 1.0, 3.0, float("inf"), 0.0):
    norm = torch.ops.shipped.clip_grad_norm_(ours, 1e30, kind, dtype=torch.float64)
    torch.testing.assert_close(norm, torch.nn.utils.get_total_norm(grads, kind).double(), rtol=1e-2, atol=0)
torch.ops.shipped.clip_grad_norm_(ours, 1.0, 2.0, dtype=torch.float64)
torch.ops.shipped.clamp_(ours, -1e-3, 1e-3)
assert on_cpu.driver().cuda_on_cpu_contexts() == 0
for grad, clipped in zip(grads, ours):
    torch.testing.assert_close(clipped, (grad / expected.to(grad.dtype)).clamp(-1e-3, 1e-3), rtol=2e-2, atol=1e-6)
"""


@pytest.mark.skipif(not SHIPPED.exists(), reason="built without CUDA")
@pytest.mark.parametrize(("arch", "loaded"), [(75, 75), (90, 90), (110, 1090)])
def test_the_library_that_was_built(arch, loaded):
    """It finds the kernels by the names that NVRTC gave them, and launches them with what they take."""
    functions = on_cpu.build("torch_cuda", [on_cpu.HEADERS / "torch_cuda.cpp"], *on_cpu.TORCH, flags=())
    on_cpu.driver()
    command = [sys.executable, "-c", PROGRAM, functions, SHIPPED, str(arch), str(loaded)]
    environment = {"PYTHONPATH": f"{Path(__file__).parent}:{Path(fastclip.__file__).parents[1]}"}
    environment |= {name: value for name, value in os.environ.items() if name not in environment}
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert result.returncode == 0, result.stderr
