"""Checks the machine code of the CUDA kernels, for every architecture. Usage: check_sass.py LIBRARY

Needs cuobjdump and nvdisasm: on PATH, or from the packages nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

ARCHS = ("sm_75", "sm_80", "sm_90", "sm_100", "sm_120")
PTX = "sm_90"
GPU = 190  # EM_CUDA
# Those that add float64 at half the rate of float32; the others never run the kernels that count on it.
WIDE = ("sm_80", "sm_90", "sm_100")


def of_older(*most: float) -> Mapping[str, float]:
    return dict(zip(("sm_75", "sm_80"), most, strict=False))


class Bounds(NamedTuple):
    """What a kernel promises: threads of a block, resident blocks, and loops that move 128 bits at once.

    `per_vector` is the most instructions that a loop of wide loads may take for each of them, without idle ones, and
    `older` the same where it is another: pairs of bf16 are compared from sm_90 on, and rounded from sm_80 on; `folds`
    is how many loops load eight partials before they add one.
    """

    threads: int
    blocks: int
    batches: int = 0
    stores: int = 0
    per_vector: float = 0
    older: Mapping[str, float] = MappingProxyType({})
    folds: int = 0
    archs: tuple[str, ...] = ARCHS

    @property
    def registers(self) -> int:
        return 65_536 // (self.threads * self.blocks)


# By the beginning of the name; every kernel must be there. The hot loop has a batch of four wide loads in flight before
# the first is used, for each of four dtypes; sums in float64 are slower than memory on some GPUs, and are free.
KERNELS = {
    "norm_kernel<(NormPass)0": Bounds(256, 4, batches=4, per_vector=76),  # squares
    "norm_kernel<(NormPass)1": Bounds(256, 4, batches=4, per_vector=76),  # magnitudes
    "norm_kernel<(NormPass)2": Bounds(256, 4, batches=4, per_vector=32, older=of_older(50, 50)),  # extremes
    "norm_kernel<(NormPass)3": Bounds(256, 4),  # powers: log2 and exp2 take longer than loads of single elements
    "norm_kernel<(NormPass)4": Bounds(256, 4, batches=4, per_vector=32, older=of_older(50, 50)),  # powers in a unit
    "norm_kernel<(NormPass)5": Bounds(256, 4, batches=4, per_vector=34, archs=WIDE),  # squares in float64
    "norm_kernel<(NormPass)6": Bounds(256, 4, batches=4, per_vector=34, archs=WIDE),  # magnitudes in float64
    "finish_kernel<(Finish)0": Bounds(1024, 1, folds=3),  # sum, max, min
    "finish_kernel<(Finish)1": Bounds(1024, 1, folds=3),
    "finish_kernel<(Finish)2": Bounds(1024, 1, folds=2),  # the unit of powers: max, min
    "finish_each_kernel": Bounds(256, 1),
    "clip_kernel<": Bounds(256, 4, batches=4, stores=4, per_vector=31, older=of_older(130), folds=3),
    "scale_kernel<": Bounds(256, 4, batches=4, stores=4, per_vector=31, older=of_older(130)),
    "scale_each_kernel<": Bounds(256, 4, batches=4, stores=4, per_vector=31, older=of_older(130)),
    "clamp_kernel<": Bounds(256, 4, batches=4, stores=4, per_vector=26, older=of_older(54, 54)),
    "sanitize_kernel<": Bounds(256, 4, batches=4, stores=4),
    "stats_kernel<false": Bounds(256, 4, batches=4, per_vector=145),
    "stats_kernel<true": Bounds(256, 4, batches=4, per_vector=102, archs=WIDE),
    "finish_stats_kernel": Bounds(256, 1),
    "strided_norm_kernel": Bounds(256, 1),
    "strided_stats_kernel": Bounds(256, 1),
    "strided_write_kernel": Bounds(256, 1),
}
BATCH, FOLD = 4, 8


class Code(NamedTuple):
    """One kernel on one architecture."""

    kernel: str  # mangled
    arch: str
    registers: int
    shared: int
    batches: int  # of wide loads
    stores: int  # wide ones
    per_vector: float  # instructions for a wide load, of the loop that takes most
    folds: int  # batches of loads of float64
    stack: int
    local: int
    spills: int


WIDE_LOAD = re.compile(r"\bLDG\.E(?:\.[A-Z0-9_]+)*\.128(?:\.[A-Z0-9_]+)* R(\d+),")
FLOAT64_LOAD = re.compile(r"\bLDG\.E(?:\.[A-Z0-9_]+)*\.64(?:\.[A-Z0-9_]+)* R(\d+),")
WIDE_STORE = re.compile(r"\bSTG\.E(?:\.[A-Z0-9_]+)*\.128\b")
LEAVES = re.compile(r"\b(?:BRA|BRX|CALL|EXIT|RET)\b")
INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s*(.*?)\s*;", re.MULTILINE)


def count_batches(sass: str, load: re.Pattern[str] = WIDE_LOAD, words: int = 4, size: int = BATCH) -> int:
    """How often so many loads or more come before the first instruction that takes one of their registers."""
    batches, loads, loaded = 0, 0, set()
    for _, instruction in INSTRUCTION.findall(sass):
        found = load.search(instruction)
        if LEAVES.search(instruction) or loaded.intersection(map(int, re.findall(r"\bR(\d+)\b", instruction))):
            loads, loaded = 0, set()
        if found:
            loads, loaded = loads + 1, loaded.union(range(int(found[1]), int(found[1]) + words))
            batches += loads == size
    return batches


def most_per_vector(sass: str) -> float:
    """The instructions for each wide load, without NOP, of the innermost loop of BATCH loads or more that has most."""
    code = [(int(address, 16), text) for address, text in INSTRUCTION.findall(sass)]
    place = {address: i for i, (address, _) in enumerate(code)}
    loops = []
    for i, (address, text) in enumerate(code):
        target = re.search(r"\bBRA\b.*\b(0x[0-9a-f]+)", text)
        if target and int(target[1], 16) < address and int(target[1], 16) in place:
            loops.append((place[int(target[1], 16)], i))
    found = [0.0]
    for begin, end in loops:
        if any((b, e) != (begin, end) and begin <= b and e <= end for b, e in loops):
            continue
        body = [text for _, text in code[begin : end + 1] if not text.startswith("NOP")]
        loads = sum(WIDE_LOAD.search(text) is not None for text in body)
        if loads >= BATCH:
            found.append(len(body) / loads)
    return max(found)


def images(library: bytes) -> Iterator[bytes]:
    """The cubins in a library: ELF files for the machine that is a GPU, which end at their tables of headers."""
    for found in re.finditer(rb"\x7fELF\x02\x01", library[1:]):
        start = found.start() + 1
        if int.from_bytes(library[start + 18 : start + 20], "little") != GPU:
            continue
        segments, sections = struct.unpack_from("<QQ", library, start + 32)
        segment_size, num_segments, section_size, num_sections = struct.unpack_from("<HHHH", library, start + 54)
        end = max(segments + segment_size * num_segments, sections + section_size * num_sections)
        yield library[start : start + end]


def ptx_in(library: bytes) -> set[str]:
    """The architectures that there is PTX for."""
    return {arch.decode() for arch in re.findall(rb"\n\.target (sm_\d+)", library)}


def parse(dump: str) -> list[Code]:
    """The kernels that `cuobjdump -sass -res-usage` shows of a cubin."""
    codes, arch = [], re.search(r"^\s*code for (sm_\d+)$", dump, re.MULTILINE)[1]
    lines = dict(re.findall(r"^ *Function (\S+):\n +(REG:.*)$", dump, re.MULTILINE))
    _, *functions = re.split(r"^\s*Function : (\S+)$", dump, flags=re.MULTILINE)
    for name, sass in zip(functions[::2], functions[1::2], strict=True):
        usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", lines[name])}
        loops = count_batches(sass), len(WIDE_STORE.findall(sass)), most_per_vector(sass)
        folds = count_batches(sass, FLOAT64_LOAD, words=2, size=FOLD)
        spills = len(re.findall(r"\b(?:LDL|STL)\b", sass))
        memory = usage["STACK"], usage["LOCAL"], spills
        codes.append(Code(name, arch, usage["REG"], usage["SHARED"], *loops, folds, *memory))
    return codes


def demangle(names: list[str]) -> list[str]:
    """Names without return types, namespaces and parameters."""
    filtered = subprocess.run(["c++filt", "-p"], input="\n".join(names), capture_output=True, text=True, check=True)
    shorter = [re.sub(r"^.*?(?=\b\w+_kernel\b)|\b\w+::", "", name) for name in filtered.stdout.splitlines()]
    return [name.replace("> >", ">>") for name in shorter]


def key_of(name: str) -> str | None:
    return next((key for key in KERNELS if name.startswith(key)), None)


def errors(codes: list[Code], names: list[str], ptx: set[str]):
    """Whatever the bounds do not allow, in words."""
    found = {(key_of(name), code.arch) for code, name in zip(codes, names, strict=True)}
    for arch in ARCHS:
        if missing := [key for key in KERNELS if (key, arch) not in found]:
            yield f"has no code of {', '.join(missing)} for {arch}"
    if PTX not in ptx:
        yield f"has no PTX for {PTX}, which later GPUs need"
    for code, name in zip(codes, names, strict=True):
        where = f"{name} for {code.arch}"
        if code.stack or code.local or code.spills:
            yield f"{where}: {code.stack} bytes of stack, {code.local} of local memory, {code.spills} spills"
        if (key := key_of(name)) is None:
            yield f"{where}: not in the table of check_sass.py"
            continue
        bounds = KERNELS[key]
        if code.registers > bounds.registers:
            yield (
                f"{where}: {code.registers} registers, {bounds.registers} let {bounds.blocks} blocks of "
                f"{bounds.threads} threads be resident"
            )
        if code.arch not in bounds.archs:
            continue
        if code.batches < bounds.batches:
            yield f"{where}: {code.batches} batches of wide loads, expected {bounds.batches}"
        if code.folds < bounds.folds:
            yield f"{where}: {code.folds} batches of {FOLD} loads of partials, expected {bounds.folds}"
        most = bounds.older.get(code.arch, bounds.per_vector)
        if most and code.per_vector > most:
            yield f"{where}: {code.per_vector:.1f} instructions for each wide load, at most {most} were expected"
        if code.stores < bounds.stores:
            yield f"{where}: {code.stores} wide stores, expected {bounds.stores}"


def tools() -> str:
    """A PATH that begins with the folders of the two tools; they come from PATH or from installed packages."""
    folders = []
    spec = importlib.util.find_spec("nvidia")
    packages = [Path(location) for location in spec.submodule_search_locations] if spec else []
    for tool in ("cuobjdump", "nvdisasm"):
        path = shutil.which(tool) or next((p for folder in packages for p in folder.glob(f"*/bin/{tool}")), None)
        if path is None:
            sys.exit(f"{tool} is neither on PATH nor installed: pip install nvidia-cuda-{tool}")
        folders.append(str(Path(path).parent))
    return os.pathsep.join([*folders, os.environ["PATH"]])


def main() -> int:
    library = Path(sys.argv[1])
    # cuobjdump starts nvdisasm from PATH.
    environment = {**os.environ, "PATH": tools()}
    content = library.read_bytes()
    codes, ptx = [], ptx_in(content)
    for image in images(content):
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(image)
            cubin.flush()
            command = ["cuobjdump", "-sass", "-res-usage", cubin.name]
            codes += parse(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    names = demangle([code.kernel for code in codes])
    width = max(map(len, names), default=0)
    print(f"{'kernel':{width}}  arch    registers  shared  wide batches  wide stores  per load  folds  stack  spills")
    for name, code in sorted(zip(names, codes, strict=True), key=lambda row: row[0]):
        print(
            f"{name:{width}}  {code.arch:7}{code.registers:10}{code.shared:8}{code.batches:14}{code.stores:13}"
            f"{code.per_vector:10.1f}{code.folds:7}{code.stack + code.local:7}{code.spills:8}"
        )
    print("PTX:", ", ".join(sorted(ptx)) or "none")
    found = list(errors(codes, names, ptx))
    for error in found:
        print(f"{library.name}: {error}", file=sys.stderr)
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
