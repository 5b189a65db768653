"""Compiles csrc/abi.h, python_abi.h and cuda/driver.h beside the headers of torch, Python and CUDA that they stand for.

A signature, a value or a layout that differs is an error, and so is what torch 2.10 or Python's stable ABI of 3.10
lacks. CUDA's header is that of nvidia-cuda-runtime-cu12, or of a toolkit in CUDA_HOME.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
TORCH_FLOOR = "0x020a000000000000"  # torch 2.10, as its header encodes it
PYTHON_FLOOR = "0x030a0000"
# The fields of our structs by the names that Python's header gives them.
FIELDS = {
    "PyObject": {"references": "ob_refcnt", "type": "ob_type"},
    "PyMethodDef": {"name": "ml_name", "function": "ml_meth", "flags": "ml_flags", "doc": "ml_doc"},
    "PyGetSetDef": {name: name for name in ("name", "get", "set", "doc", "closure")},
}


def declared(header: Path, pattern: str) -> list[str]:
    return sorted(set(re.findall(pattern, header.read_text())))


def compiles(source: list[str], include: Path | str) -> bool:
    cxx = shlex.split(os.environ.get("CXX", "c++"))
    flags = ["-std=c++20", "-fsyntax-only", f"-isystem{include}", "-x", "c++", "-"]
    return not subprocess.run([*cxx, *flags], input="\n".join([*source, ""]), text=True).returncode


def check_torch() -> str | None:
    """Functions of torch's stable C ABI, by signature."""
    ours = CSRC / "abi.h"
    names = declared(ours, r"\b((?:aoti_)?torch_\w+)\(")
    source = [
        # USE_CUDA shows the CUDA functions, the target hides those that came after the floor.
        "#define USE_CUDA 1",
        f"#define TORCH_TARGET_VERSION {TORCH_FLOOR}",
        "#include <torch/csrc/stable/c/shim.h>",
        *(f"static const auto official_{name} = &::{name};" for name in names),
        f'#include "{ours}"',
    ]
    if not compiles(source, Path(importlib.util.find_spec("torch").origin).parent / "include"):
        return "csrc/abi.h does not agree with torch/csrc/stable/c/shim.h"
    print(f"{len(names)} functions as torch's header declares them")
    return None


def check_python() -> str | None:
    """Python's stable ABI: functions and objects by signature, constants by value, structs by their fields."""
    include = sysconfig.get_path("include")
    ours = CSRC / "python_abi.h"
    if not Path(include, "Python.h").exists():
        return f"{include} has no Python.h to compare csrc/python_abi.h with"
    own_types = re.search(r"#ifndef Py_PYTHON_H\n(.*?)#endif", ours.read_text(), re.DOTALL)[1]
    constants = re.findall(r"constexpr int (\w+)", own_types)
    names = declared(ours, r"\nFASTCLIP_PYTHON .*?(\w+)(?:\(|;)")
    source = [
        f"#define Py_LIMITED_API {PYTHON_FLOOR}",
        "#include <cstddef>",
        "#include <Python.h>",
        *(f"#undef {name}" for name in names),  # where a macro hides the function
        # A name that the floor lacks is an error here, one that differs is where ours is included.
        *(f"using official_{name} = decltype(::{name});" for name in names),
        *(f"constexpr int official_{name} = {name};\n#undef {name}" for name in constants),
        f"namespace ours {{\n{own_types}}}",
        *(f"static_assert(ours::{name} == official_{name});" for name in constants),
    ]
    for struct, fields in FIELDS.items():
        own_fields = re.search(rf"struct {struct} {{(.*?)}};", own_types, re.DOTALL)[1]
        if own := set(re.findall(r"(\w+)(?:\)\([^;]*\))?;", own_fields)) ^ set(fields):
            return f"csrc/python_abi.h: {struct}: {sorted(own)} are not in the table of check_abi.py, or only there"
        source.append(f"static_assert(sizeof(ours::{struct}) == sizeof(::{struct}));")
        for name, official in fields.items():
            source.append(f"static_assert(offsetof(ours::{struct}, {name}) == offsetof(::{struct}, {official}));")
            source.append(f"static_assert(sizeof(ours::{struct}::{name}) == sizeof(::{struct}::{official}));")
    source.append(f'#include "{ours}"')
    if not compiles(source, include):
        return f"csrc/python_abi.h does not agree with {include}/Python.h"
    print(f"{len(names)} functions and objects, {len(constants)} constants, {len(FIELDS)} structs as in Python.h")
    return None


def find_cuda() -> Path | None:
    spec = importlib.util.find_spec("nvidia")
    folders = [path / "cuda_runtime" for path in map(Path, spec.submodule_search_locations if spec else ())]
    folders += [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    return next((folder / "include" for folder in folders if (folder / "include" / "cuda.h").exists()), None)


def check_cuda() -> str | None:
    """CUDA's driver interface: functions by signature, constants by value, structs by their fields."""
    include, ours = find_cuda(), CSRC / "cuda" / "driver.h"
    if include is None:
        return "no cuda.h to compare csrc/cuda/driver.h with: pip install nvidia-cuda-runtime-cu12"
    own_types = re.search(r"#ifndef CUDA_VERSION\n(.*?)#endif", ours.read_text(), re.DOTALL)[1]
    constants = re.findall(r"\b(CU\w+_\w+) = ", own_types)
    fields = re.findall(r"(\w+)[,;]", re.search(r"struct CUlaunchConfig {(.*?)};", own_types, re.DOTALL)[1])
    source = [
        "#include <cuda.h>",
        "#include <cstddef>",
        "#include <type_traits>",
        f'#include "{ours}"',
        # Each pointer has the type of the function of that name.
        "#define SAME(name, ...) static_assert(std::is_same_v<decltype(fastclip::cuda::Driver::name), "
        "decltype(&::name)>, #name);",
        "FASTCLIP_DRIVER_FUNCTIONS(SAME)",
        f"namespace ours {{\n{own_types}}}",
        *(f"static_assert(static_cast<int>(ours::{name}) == static_cast<int>(::{name}));" for name in constants),
        *(
            f"static_assert(sizeof(ours::{name}) == sizeof(::{name}));"
            for name in re.findall(r"(?:using|enum|struct) (CU\w+)(?= [={:])", own_types)
        ),
        *(f"static_assert(offsetof(ours::CUlaunchConfig, {f}) == offsetof(::CUlaunchConfig, {f}));" for f in fields),
    ]
    if not compiles(source, include):
        return f"csrc/cuda/driver.h does not agree with {include}/cuda.h"
    names = declared(ours, r"FUNCTION\((cu\w+)")
    print(f"{len(names)} functions, {len(constants)} constants, {len(fields)} fields as in cuda.h")
    return None


def main() -> int:
    errors = [error for check in (check_torch, check_python, check_cuda) if (error := check())]
    for error in errors:
        print(error, file=sys.stderr)
    return bool(errors)


if __name__ == "__main__":
    sys.exit(main())
