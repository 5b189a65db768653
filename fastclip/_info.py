"""What `python -m fastclip info` prints: all that a bug report needs."""

from __future__ import annotations

import importlib.util
import os
import platform
import sysconfig
from collections.abc import Iterator
from importlib import metadata

import torch

import fastclip

from . import _install, _ops

# Of the environment what changes which kernels run, on what, and with how many threads.
VARIABLES = (
    *("FASTCLIP_BACKEND", "FASTCLIP_CPU_ISA", "PYTHONPATH", "CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES"),
    *("CUDA_MODULE_LOADING", "CUDA_LAUNCH_BLOCKING", "HIP_VISIBLE_DEVICES", "ZE_AFFINITY_MASK", "TRITON_INTERPRET"),
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "LD_LIBRARY_PATH", "LD_PRELOAD"),
    *("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "TORCH_LOGS", "TORCHDYNAMO_DISABLE"),
)


def lines() -> Iterator[str]:
    yield f"fastclip {fastclip.__version__} in {_install.PACKAGE}{_which_copy()}"
    yield f"built: {_built()}"
    yield f"torch {torch.__version__} ({_built_for()}), triton {_version('triton')}, {_python()}"
    yield f"machine: {platform.platform()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads"
    yield f"CPU kernels: {_ops.cpu_isa() or 'none'}"
    yield f"NVIDIA driver: {_driver()}"
    yield f"devices: {', '.join(_devices()) or 'none that torch can use'}"
    forced = os.environ.get("FASTCLIP_BACKEND")
    for name, reason in fastclip.backends().items():
        forced_one = ", forced by FASTCLIP_BACKEND" if name == forced else ""
        yield f"backend {name}: {reason or 'available'}{forced_one}"
    given = [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    yield f"environment: {' '.join(given) or 'none of the variables that matter is set'}"


def _which_copy() -> str:
    if not _install.is_source_tree():
        return ""
    hidden = _install.hidden_copy()
    return ", a source tree" + (f"; the one installed in {hidden} was not imported" if hidden else "")


def _built() -> str:
    if not (facts := _install.facts()):
        return "without compiled kernels (pure Python)"
    cuda = f"CUDA {facts['cuda']} for {', '.join(facts['archs'])}" if "cuda" in facts else "without CUDA kernels"
    return f"{facts['compiler']} for {facts['target']}, {cuda}"


def _built_for() -> str:
    kinds = (("CUDA", torch.version.cuda), ("HIP", torch.version.hip), ("XPU", getattr(torch.version, "xpu", None)))
    return ", ".join(f"for {name} {version}" for name, version in kinds if version) or "for the CPU"


def _version(package: str) -> str:
    if not importlib.util.find_spec(package):
        return "not installed"
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "of unknown version"


def _python() -> str:
    threads = ", free-threaded" if sysconfig.get_config_var("Py_GIL_DISABLED") else ""
    return f"{platform.python_implementation()} {platform.python_version()}{threads}"


def _driver() -> str:
    version = _ops._driver_version()
    return f"serves CUDA {_ops._dotted(version)}" if version else "none (no libcuda.so.1)"


def _devices() -> Iterator[str]:
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(index)
            capability = f"compute capability {found.major}.{found.minor}"
            yield f"cuda:{index} {found.name} ({capability}, {found.total_memory >> 20} MiB)"
    if torch.xpu.is_available():
        yield from (f"xpu:{index} {torch.xpu.get_device_name(index)}" for index in range(torch.xpu.device_count()))
    if torch.backends.mps.is_available():
        yield "mps"
