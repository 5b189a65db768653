"""The CUDA kernels on CPU tensors: csrc/cuda compiled by the C++ compiler, under a driver that lets the CPU run them.

What that proves and what not is said in native/cuda_on_cpu/cuda_runtime.h, and of the driver in libcuda.cpp beside it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

from fastclip import _dispatch, _ops
from fastclip.backends import cpu

ROOT = Path(__file__).parents[1]
HEADERS = Path(__file__).parent / "native" / "cuda_on_cpu"
NAMESPACE = "fastclip_cuda_on_cpu"
FLAGS = (
    *("-std=c++17", "-O1", "-g0", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE"),
)
TORCH = ("-shared", "-Wl,--no-as-needed", str(Path(torch.__file__).parent / "lib" / "libtorch.so"))
# A misaligned access ends in cuda_runtime.h.
DEVICE_FLAGS = ("-fsanitize=alignment", f"-I{HEADERS}")


def compiler() -> list[str] | None:
    if cxx := shlex.split(os.environ.get("CXX", "")):
        return cxx
    return next(([name] for name in ("c++", "g++", "clang++") if shutil.which(name)), None)


def unavailable() -> str | None:
    """Why the kernels cannot be compiled here."""
    if not (ROOT / "csrc" / "cuda").is_dir():
        return "csrc/ is not beside tests/"
    if sys.platform != "linux":
        return "the simulated CUDA is for Linux"
    return None if compiler() else "no C++ compiler"


def build(name: str, sources: list[Path], *link: str, flags: tuple[str, ...] = DEVICE_FLAGS) -> Path:
    """Compile and link, unless the same files have been; return the result, in build/."""
    command = [*compiler(), *FLAGS, *flags]
    version = subprocess.run([*compiler(), "--version"], capture_output=True, check=True).stdout
    digest = hashlib.sha256(repr((command, sources, link, version)).encode())
    for path in sorted(path for folder in (ROOT / "csrc", HEADERS.parent) for path in folder.rglob("*.*")):
        digest.update(path.read_bytes())
    target = ROOT / "build" / "cuda_on_cpu" / f"{name}-{digest.hexdigest()[:16]}"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    for old in target.parent.glob(f"{name}-*"):
        old.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        objects = [f"{folder}/{source.name}.o" for source in sources]
        jobs = [
            subprocess.Popen([*command, "-x", "c++", "-c", str(source), "-o", file], stderr=subprocess.PIPE, text=True)
            for source, file in zip(sources, objects, strict=True)
        ]
        errors = "".join(job.communicate()[1] for job in jobs)
        assert not any(job.returncode for job in jobs), errors
        subprocess.run([*compiler(), *objects, *link, "-o", f"{folder}/{name}"], check=True)
        os.replace(f"{folder}/{name}", target)
    return target


class Launch(NamedTuple):
    grid: int
    block: int
    argument_bytes: int


@functools.cache
def driver() -> ctypes.CDLL:
    """Build and load the driver that runs kernels on the CPU."""
    loaded = ctypes.CDLL(str(build("libcuda", [HEADERS / "libcuda.cpp"], "-shared", "-ldl")))
    loaded.cuda_on_cpu_barrier.restype = ctypes.c_char_p
    loaded.cuda_on_cpu_launch.restype = ctypes.POINTER(3 * ctypes.c_uint)
    return loaded


def built() -> Path:
    """Build the host code with torch's functions for CUDA."""
    sources = [*(ROOT / "csrc" / "cuda").glob("*.cpp"), *ROOT.glob("csrc/*.cpp")]
    sources += [HEADERS / "images.cpp", HEADERS / "torch_cuda.cpp"]
    # Calls of torch's functions for CUDA stay in the library.
    return build("library", sources, "-Wl,-Bsymbolic", *TORCH, "-ldl", flags=())


def open_library(path: Path) -> ctypes.CDLL:
    """Load a library of the host code under the driver."""
    loaded = ctypes.CDLL(str(path))
    for name in ("open_driver", "init", "unsupported"):
        getattr(loaded, f"fastclip_cuda_{name}").restype = ctypes.c_char_p
    error = loaded.fastclip_cuda_open_driver(driver()._name.encode())
    assert error is None, error
    return loaded


def register(loaded: ctypes.CDLL, namespace: str) -> None:
    loaded.definitions = _ops.define(namespace)
    error = loaded.fastclip_cuda_init(namespace.encode(), b"CPU")
    assert error is None, error


@functools.cache
def library() -> ctypes.CDLL:
    """Build and load the library, and register its ops."""
    loaded = open_library(built())
    register(loaded, NAMESPACE)
    return loaded


@functools.cache
def backend() -> ModuleType:
    """Return what fastclip.backends.cuda is on a GPU."""
    library()
    module, ops = ModuleType(NAMESPACE), getattr(torch.ops, NAMESPACE)
    module.NAME, module.DEVICE, module.ENGINE = "cuda", "cpu", _ops.builtins_of(library(), "cuda")
    module.unavailable, module.unsupported = lambda: None, lambda device: None
    module.refuses, module.total_norm = cpu.refuses_on_any_device, cpu.total_norm
    for name in (
        "norm_partial",
        "tensor_norms",
        "tensor_stats",
        "scale_",
        "scale_each_",
        "sanitize_",
        "clamp_",
        "clip_grad_norm_",
    ):
        setattr(module, name, getattr(ops, name).default)
    return module


@contextlib.contextmanager
def use(blocks: int = 4, seed: int = 1, dropped_barrier: int = -1, wide: bool = True):
    """Force the backend, on a device that runs so many blocks of a grid, which have to do the work of all.

    Whether it is `wide`, with float64 at half the rate of float32, decides how norms are summed.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    library()
    driver().cuda_on_cpu_configure(blocks, 2 if wide else 64, seed, dropped_barrier)
    token = _dispatch._chosen.set(backend())
    torch.use_deterministic_algorithms(True)  # new memory is full of NaN
    try:
        yield
    finally:
        _dispatch._chosen.reset(token)
        torch.use_deterministic_algorithms(deterministic)
        assert library().cuda_on_cpu_device_guards() == driver().cuda_on_cpu_contexts() == 0


@contextlib.contextmanager
def failing(calls: int, error: int = 719):
    """Let the launch after so many others fail."""
    driver().cuda_on_cpu_fail(calls, error)
    try:
        yield
    finally:
        driver().cuda_on_cpu_fail(-1, error)


def barriers() -> list[str]:
    """Return the places of the barriers that kernels have come to so far."""
    return [driver().cuda_on_cpu_barrier(i).decode() for i in range(driver().cuda_on_cpu_barriers())]


def launches() -> list[Launch]:
    """Return the launches since the last call."""
    return [Launch(*driver().cuda_on_cpu_launch(i).contents) for i in range(driver().cuda_on_cpu_launches())]
