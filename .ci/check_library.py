"""Checks what a built library asks of the machine it is loaded on.

Usage: check_library.py [--any-glibc] LIBRARY [OBJECTS], where OBJECTS is the folder of the object files that the
library of the CPU kernels was linked from.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

NEEDED = {"libtorch.so", "libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6"}
# Where an older glibc has what opens the driver.
OPENING = {"libdl.so.2"}
# The newest symbol versions of manylinux_2_28, which is what torch's own wheels are built for. A library that is built
# for this machine alone may ask for the glibc that it has.
CEILINGS = {"GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GLIBC": (2, 28)}
# What an extension module finds in the interpreter that loads it, and what the linker's start files may find or not.
PYTHON_ABI = Path(__file__).resolve().parent.parent / "csrc" / "python_abi.h"
MAY_BE_MISSING = {"__gmon_start__", "_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable"}
# Registers that only the file of an ISA may use.
WIDE = {"zmm": {"loops_avx512"}, "ymm": {"loops_avx2", "loops_avx512"}}


def output(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def link_errors(library: Path, ceilings: dict[str, tuple[int, ...]]):
    """Libraries, symbols and symbol versions beyond torch's C ABI and the C and C++ runtimes, and what others see."""
    allowed = NEEDED | OPENING if "cuda" in library.name else NEEDED
    for name in re.findall(r"NEEDED.*\[(.+)\]", output("readelf", "-d", library)):
        if name not in allowed and not name.startswith("ld-linux"):
            yield f"links to {name}"
    weak = MAY_BE_MISSING.union(re.findall(r"^FASTCLIP_PYTHON .*?(\w+)(?:\(|;)", PYTHON_ABI.read_text(), re.MULTILINE))
    newest = {}
    for kind, symbol in re.findall(r"([UwvV]) (\S+)$", output("nm", "-D", "--undefined-only", library), re.MULTILINE):
        name, _, version = symbol.partition("@")
        if not version:
            if kind == "U" and not re.match(r"(aoti_)?torch_", name):
                yield f"needs {name}, which is neither torch's C ABI nor the C or C++ runtime"
            if kind != "U" and name not in weak:
                yield f"may need {name}, which csrc/python_abi.h does not declare"
            continue
        family, _, number = version.lstrip("@").partition("_")
        newest[family] = max(newest.get(family, (0,)), tuple(int(n) for n in re.findall(r"\d+", number)))
    for family, ceiling in ceilings.items():
        if newest.get(family, (0,)) > ceiling:
            yield f"needs {family}_{'.'.join(map(str, newest[family]))}, above {'.'.join(map(str, ceiling))}"
    # Weak ones are inline functions of the C++ library.
    for name in re.findall(r" [TDBR] (\S+)$", output("nm", "-D", "--defined-only", library), re.MULTILINE):
        if not name.startswith("fastclip_"):
            yield f"exports {name}"
    print("newest symbol versions:", ", ".join(f"{f} {'.'.join(map(str, v))}" for f, v in sorted(newest.items())))


def isa_errors(objects: Path):
    """Code of an ISA that would run on machines without it, and ISA files that do not use theirs."""
    counts = {}
    for path in sorted(objects.rglob("*.o")):
        stem = path.name.partition(".")[0]
        code = output("objdump", "-d", "--no-show-raw-insn", path)
        for register, owners in WIDE.items():
            counts[stem, register] = len(re.findall(rf"%{register}\d", code))
            if counts[stem, register] and stem not in owners:
                yield f"{stem} uses {register} registers"
        if any(stem in owners for owners in WIDE.values()):
            # The linker keeps one copy of an inline function: it might be this one, for everybody.
            for symbol in re.findall(r" [WVu] (\S+)$", output("nm", "-C", "--defined-only", path), re.MULTILINE):
                yield f"{stem} defines {symbol} for other files, too: give it internal linkage"
            if ".init_array" in output("objdump", "-h", path):
                yield f"{stem} runs code when the library is loaded: make its table a constant"
    for stem, register in (("loops_avx2", "ymm"), ("loops_avx512", "zmm")):
        print(f"{stem}: {counts.get((stem, register), 0)} uses of {register} registers")
        if not counts.get((stem, register)):
            yield f"{stem} has no {register} registers"


def main() -> int:
    arguments = [argument for argument in sys.argv[1:] if argument != "--any-glibc"]
    library, *objects = map(Path, arguments)
    ceilings = {f: c for f, c in CEILINGS.items() if f != "GLIBC" or len(arguments) == len(sys.argv) - 1}
    errors = [*link_errors(library, ceilings), *(error for folder in objects for error in isa_errors(folder))]
    for error in errors:
        print(f"{library.name}: {error}", file=sys.stderr)
    return bool(errors)


if __name__ == "__main__":
    sys.exit(main())
