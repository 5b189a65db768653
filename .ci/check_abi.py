"""Compiles csrc/abi.h beside torch's own header: a signature that differs, or that torch 2.10 lacks, is an error."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLOOR = "0x020a000000000000"  # torch 2.10, as its header encodes it


def main() -> int:
    include = Path(importlib.util.find_spec("torch").origin).parent / "include"
    ours = ROOT / "csrc" / "abi.h"
    names = sorted(set(re.findall(r"\b((?:aoti_)?torch_\w+)\(", ours.read_text())))
    source = [
        # USE_CUDA shows the CUDA functions, the target hides those that came after the floor.
        "#define USE_CUDA 1",
        f"#define TORCH_TARGET_VERSION {FLOOR}",
        "#include <torch/csrc/stable/c/shim.h>",
        *(f"static const auto official_{name} = &::{name};" for name in names),
        f'#include "{ours}"',
    ]
    cxx = shlex.split(os.environ.get("CXX", "c++"))
    flags = ["-std=c++20", "-fsyntax-only", f"-isystem{include}", "-x", "c++", "-"]
    compiled = subprocess.run([*cxx, *flags], input="\n".join([*source, ""]), text=True)
    if compiled.returncode:
        print("csrc/abi.h does not agree with torch/csrc/stable/c/shim.h", file=sys.stderr)
        return 1
    print(f"{len(names)} functions as torch's header declares them")
    return 0


if __name__ == "__main__":
    sys.exit(main())
