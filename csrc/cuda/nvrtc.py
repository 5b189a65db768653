"""Compiles the device code with NVRTC, as setup.py's build asks; no other part of a CUDA toolkit is needed.

nvrtc.py compile NVRTC INCLUDE ARCH CODE NAMES [--warnings-are-errors] [OPTION ...]
    writes the code of kernels.cu for one architecture, such as sm_90 (a cubin) or compute_90 (PTX), and the names that
    the kernels of kernels.def have in it
nvrtc.py collect OUT VERSION NAMES CODE ...
    writes the C++ file that takes the codes into the library
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
PACKAGES = "nvidia-cuda-nvrtc-cu12 and nvidia-cuda-runtime-cu12"
# The first that has sm_120. What one of CUDA 12 makes runs under every driver since 12.1, that of 13 since 13.0.
LEAST = (12, 8)
FLAGS = ("--std=c++17", "--fmad=false", "--device-as-default-execution-space")

# What csrc/ uses of the C++ library: NVRTC has none.
HEADERS = {
    "algorithm": "",
    "cfloat": "#define FLT_MIN 1.17549435e-38f",
    "cmath": """
#define INFINITY __int_as_float(0x7f800000)
#define NAN __int_as_float(0x7fffffff)
namespace std { using ::fabs; using ::isinf; using ::pow; using ::sqrt; }
""",
    "cstddef": "using size_t = unsigned long; namespace std { using ::size_t; }",
    "cstdint": """
using int8_t = signed char; using int16_t = short; using int32_t = int; using int64_t = long;
using uint8_t = unsigned char; using uint16_t = unsigned short; using uint32_t = unsigned;
using uint64_t = unsigned long; using uintptr_t = unsigned long;
""",
    "cstring": "",
    "cuda_runtime.h": "",
}


class Found(NamedTuple):
    library: str
    include: str
    version: tuple[int, int]
    archs: list[str]


def places() -> Iterator[tuple[Path, Path]]:
    """Libraries, which may be missing, and folders of the headers: of the packages, then of a toolkit."""
    spec = importlib.util.find_spec("nvidia")
    for folder in map(Path, spec.submodule_search_locations if spec else ()):
        yield folder / "cuda_nvrtc" / "lib" / "libnvrtc.so.12", folder / "cuda_runtime" / "include"
        yield folder / "cu13" / "lib" / "libnvrtc.so.13", folder / "cu13" / "include"
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(name):
            yield from ((Path(home, "lib64", f"libnvrtc.so.{major}"), Path(home, "include")) for major in (12, 13))


def find() -> Found | str:
    """NVRTC and what it can compile for, or why there is none."""
    reasons = []
    for library, include in places():
        if not library.exists() or not (include / "cuda_fp16.h").exists():
            continue
        try:
            nvrtc = ctypes.CDLL(str(library))
        except OSError as error:
            reasons.append(str(error))
            continue
        major, minor, count = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        nvrtc.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
        version = major.value, minor.value
        if version < LEAST:
            reasons.append(f"{library} is of CUDA {version[0]}.{version[1]}, and {LEAST[0]}.{LEAST[1]} is needed")
            continue
        nvrtc.nvrtcGetNumSupportedArchs(ctypes.byref(count))
        archs = (ctypes.c_int * count.value)()
        nvrtc.nvrtcGetSupportedArchs(archs)
        return Found(str(library), str(include), version, [str(arch) for arch in archs])
    return "; ".join(reasons) or "neither in the packages nor in CUDA_HOME"


def kernels() -> list[str]:
    """The kernels of kernels.def as C++ names them."""
    rows = re.findall(r"^KERNEL(?:_OF)?\((\w+)(?:, (.+))?\)$", (HERE / "kernels.def").read_text(), re.MULTILINE)
    return [f"{name}<{arguments}>" if arguments else name for name, arguments in rows]


class Program:
    """One compilation; an error of NVRTC ends the process with what it says."""

    def __init__(self, library: str):
        self.nvrtc = ctypes.CDLL(library)
        self.nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
        self.program = ctypes.c_void_p()

    def call(self, name: str, *arguments: object) -> None:
        if error := getattr(self.nvrtc, name)(*arguments):
            sys.exit(f"{name}: {self.nvrtc.nvrtcGetErrorString(error).decode()}")

    def bytes_of(self, what: str) -> bytes:
        size = ctypes.c_size_t()
        self.call(f"nvrtcGet{what}Size", self.program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self.call(f"nvrtcGet{what}", self.program, buffer)
        return buffer.raw

    def compile(self, options: list[str]) -> tuple[bool, str]:
        strings = [[text.encode() for text in texts] for texts in (HEADERS.values(), HEADERS.keys(), options)]
        sources, names, flags = ((ctypes.c_char_p * len(texts))(*texts) for texts in strings)
        # Its name is in error messages, and not in the code.
        path, source = b"csrc/cuda/kernels.cu", (HERE / "kernels.cu").read_bytes()
        create = ctypes.byref(self.program), source, path, len(HEADERS), sources, names
        self.call("nvrtcCreateProgram", *create)
        for kernel in kernels():
            self.call("nvrtcAddNameExpression", self.program, kernel.encode())
        failed = self.nvrtc.nvrtcCompileProgram(self.program, len(options), flags)
        return not failed, self.bytes_of("ProgramLog").rstrip(b"\0\n").decode()

    def lowered(self, kernel: str) -> str:
        name = ctypes.c_char_p()
        self.call("nvrtcGetLoweredName", self.program, kernel.encode(), ctypes.byref(name))
        return name.value.decode()


def compile_kernels(library: str, include: str, arch: str, code: str, names: str, *flags: str) -> None:
    warnings_are_errors = "--warnings-are-errors" in flags
    own = [flag for flag in flags if flag != "--warnings-are-errors"]
    program = Program(library)
    options = [f"--gpu-architecture={arch}", *FLAGS, "-Icsrc/cuda", f"-I{include}", *own]
    good, log = program.compile(options)
    if log:
        print(log, file=sys.stderr)
    if not good or (log and warnings_are_errors):
        sys.exit(f"kernels.cu does not compile for {arch}" if not good else f"kernels.cu has warnings for {arch}")
    Path(code).write_bytes(program.bytes_of("CUBIN" if arch.startswith("sm_") else "PTX"))
    Path(names).write_text("".join(f"{program.lowered(kernel)}\n" for kernel in kernels()))


def collect(out: str, version: str, names: str, *codes: str) -> None:
    """Codes are named by their architecture, as in sm_90.cubin; an assembler takes them in from where ninja runs."""
    blocks, rows = [], []
    for code in codes:
        kind, number = re.fullmatch(r"(sm|compute)_(\d+)", Path(code).stem).groups()
        symbol = f"fastclip_{kind}_{number}"
        # PTX ends at a zero.
        blocks.append(
            f'asm(".section .rodata, \\"a\\"\\n.balign 64\\n.hidden {symbol}\\n.globl {symbol}\\n{symbol}:\\n"'
        )
        blocks.append(f'    ".incbin \\"{code}\\"\\n.byte 0\\n.previous\\n");')
        blocks.append(f'extern "C" const char {symbol}[];')
        rows.append(f"    {{{number}, {'true' if kind == 'compute' else 'false'}, {symbol}}},")
    lowered = [f'    "{name}",' for name in Path(names).read_text().split()]
    lines = ['#include "../../../csrc/cuda/images.h"', "", *blocks, "", "namespace fastclip::cuda {"]
    lines += ["const Image kImages[] = {", *rows, "};", f"const int kNumImages = {len(rows)};"]
    lines += ["const char* const kKernelNames[] = {", *lowered, "};"]
    lines += [f"const int kCompilerVersion = {version};", "}  // namespace fastclip::cuda", ""]
    Path(out).write_text("\n".join(lines))


if __name__ == "__main__":
    {"compile": compile_kernels, "collect": collect}[sys.argv[1]](*sys.argv[2:])
