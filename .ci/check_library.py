"""Checks what a built library asks of the machine it is loaded on.

Usage: check_library.py [--any-glibc] LIBRARY [OBJECTS], where OBJECTS is the folder of the object files that the
library of the CPU kernels was linked from.
"""

from __future__ import annotations

import collections
import platform
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
# The files of one ISA each, by machine: the registers that they use, and which files may use such. Every aarch64 has
# NEON; SVE, whose registers are z0 to z31, is nobody's.
USED = {
    "x86_64": {"loops_avx2": r"%ymm\d", "loops_avx512": r"%zmm\d"},
    "aarch64": {"loops_neon": r"\bv\d+\.(?:2d|4s)"},
}
OWNERS = {
    "x86_64": {r"%ymm\d": {"loops_avx2", "loops_avx512"}, r"%zmm\d": {"loops_avx512"}},
    "aarch64": {r"\bz\d+\.[bhsd]\b": set()},
}
# The loops of loops_impl.h read whole registers, and multiply and add in one rounding only where squares are summed:
# those are exact in float64, or their error is what is asked for.
LOOP = re.compile(r"\b(?:norm_\w+|scale|clamp|add_scaled)<[^\[]*$")
WHOLE_LOAD = {"x86_64": r"\(%r[^)]*\),(?:%[yz]mm\d+,)?%[yz]mm\d", "aarch64": r"\tld(?:[rp]|ur)\s+q\d|\tld1\s+\{v"}
FUSED = {"x86_64": r"\tvfn?m(?:add|sub)\w*", "aarch64": r"\tfn?m(?:la|ls|add|sub)\b"}


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


def machine_of(path: Path) -> str:
    name = re.search(r"Machine:\s+(.+)", output("readelf", "-h", path))[1]
    return {"Advanced Micro Devices X86-64": "x86_64", "AArch64": "aarch64"}.get(name, name)


def functions(path: Path, machine: str):
    """Each function's demangled name with its instructions."""
    objdump = "objdump" if machine == platform.machine() else f"{machine}-linux-gnu-objdump"
    code = output(objdump, "-dC", "--no-show-raw-insn", "--no-addresses", path)
    yield from re.findall(r"^<(.+)>:\n((?:\t.*\n|\s*\.\.\.\n)*)", code, re.MULTILINE)


def isa_errors(objects: Path):
    """Code of an ISA that would run on machines without it, and loops that are not what their ISA promises."""
    counts, machine = collections.Counter(), ""
    for path in sorted(objects.rglob("*.o")):
        stem, machine = path.name.partition(".")[0], machine_of(path)
        for name, code in functions(path, machine):
            for register, owners in OWNERS[machine].items():
                if stem not in owners and (found := re.search(register, code)):
                    yield f"{stem} uses {found[0]}, in {name}"
            if stem in USED[machine]:
                counts[stem] += len(re.findall(USED[machine][stem], code))
                if LOOP.search(name) and not re.search(WHOLE_LOAD[machine], code):
                    yield f"{stem}: no whole register is read in {name}"
            if "Squares" not in name and (fused := re.search(FUSED[machine], code)):
                yield f"{stem}: {fused[0].strip()} in {name}, which -ffp-contract=off forbids"
        if any(stem in owners for owners in OWNERS[machine].values()):
            # The linker keeps one copy of an inline function: it might be this one, for everybody.
            for symbol in re.findall(r" [WVu] (\S+)$", output("nm", "-C", "--defined-only", path), re.MULTILINE):
                yield f"{stem} defines {symbol} for other files, too: give it internal linkage"
        if stem.startswith("loops_") and ".init_array" in output("readelf", "-SW", path):
            yield f"{stem} runs code when the library is loaded: make its table a constant"
    if not machine:
        yield f"{objects} has no object files"
    for stem, register in USED.get(machine, {}).items():
        print(f"{stem}: {counts[stem]} uses of {register}")
        if not counts[stem]:
            yield f"{stem} has no {register}"


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
