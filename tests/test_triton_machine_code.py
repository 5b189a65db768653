"""The Triton kernels compiled for GPUs that are not here: wide loads and stores, how near each other the loads are that
are to be in flight together, spills, registers; `-s` prints all."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastclip.backends import triton_

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx90a": GPUTarget("hip", "gfx90a", 64),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}
DTYPES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}
SQUARES, ABS, MAX, MIN, COUNT, POW = range(6)
# Of 65,536 on a multiprocessor, for 4 programs of 128 threads: 32 KB in flight, twice what an H100 needs.
MOST_REGISTERS = 128
# For the kernels whose grid is no larger than what is resident.
MOST_REGISTERS_OF_WRITES = 65_536 // (triton_.PROGRAMS * triton_.WARPS * 32) // 8 * 8
# AMD: of 512 for each lane of a SIMD, for 3 waves on each of 4: 64 lanes with 64 bytes each make 48 KB in flight.
MOST_REGISTERS_OF_AMD = 512 // 3 // 8 * 8
# Instructions from the first to the fourth load of a loop that has to have four in flight. An assembler that loads
# later, to save registers, puts the arithmetic of a vector or more between them: 70 and more.
LONGEST_REACH = 48
# For loops that are bound by their arithmetic, on some GPU: the clamp, of 50 instructions a vector, and float64.
LONGEST_REACH_OF_ARITHMETIC = 80


class Variant(NamedTuple):
    """A kernel with its constants, and how many vector loads and stores its body has to have."""

    kernel: str
    dtype: str
    loads: int
    stores: int = 0
    kind: int | None = None
    norms: bool = False
    zero: bool = False
    options: bool = False


VARIANTS = [
    *(Variant("norm_partial_kernel", dtype, 5, kind=SQUARES) for dtype in DTYPES),
    *(Variant("norm_partial_kernel", "float32", 5, kind=kind) for kind in (ABS, MAX, MIN, COUNT)),
    Variant("norm_partial_kernel", "bfloat16", 1, kind=POW),
    Variant("norm_partial_kernel", "float64", 1, kind=POW, norms=True),
    Variant("norm_finalize_kernel", "bfloat16", 0, kind=SQUARES),
    Variant("norm_finalize_kernel", "float32", 0, kind=MIN),
    Variant("norm_finalize_kernel", "float32", 0, kind=POW),
    Variant("norm_finalize_kernel", "float32", 0, kind=POW, norms=True),
    Variant("norm_finalize_kernel", "float32", 0, kind=SQUARES, zero=True, options=True),
    Variant("coef_kernel", "bfloat16", 0),
    *(Variant("scale_kernel", dtype, 5, 5) for dtype in DTYPES),
    Variant("scale_kernel", "float32", 5, 5, zero=True),
    *(Variant("clamp_kernel", dtype, 5, 5) for dtype in DTYPES),
    *(Variant("sanitize_kernel", dtype, 0) for dtype in DTYPES),
]


class Code(NamedTuple):
    registers: int
    spills: int
    loads: int
    stores: int
    shared: int
    reach: int = 0  # see reach_of_four


def compile_variant(variant: Variant, target: GPUTarget):
    from fastclip.backends import triton_kernels

    kernel = getattr(triton_kernels, variant.kernel)
    floats = {"float32": "*fp32", "float64": "*fp64", "bfloat16": "*bf16", "float16": "*fp16"}
    pointers = {"partials": "*fp64", "clip_coef": "*fp64", "out": floats[variant.dtype], "norm": floats[variant.dtype]}
    if variant.options:
        pointers |= {"found_inf": "*fp32", "inv_scale": "*fp64"}
    lanes = triton_.WARPS * target.warp_size
    constants = {
        "DTYPE": getattr(tl, variant.dtype),
        "KIND": variant.kind,
        "CHUNK": triton_.CHUNK,
        "NORMS": variant.norms,
        "IN_UNIT": variant.norms,
        "ROOT": True,
        "CLIP": True,
        "ZERO": variant.zero,
        "BLOCK": lanes * 16 // DTYPES[variant.dtype],
    }
    if variant.kernel == "norm_finalize_kernel":
        constants["BLOCK"] = triton_._FINALIZE_BLOCK
    constants |= {} if variant.options else {"found_inf": None, "inv_scale": None}
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={n: "constexpr" if n in constants else pointers.get(n, "*i64") for n in names},
        constexprs={(names.index(n),): value for n, value in constants.items() if n in names},
        attrs={(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n not in constants},
    )
    return triton.compile(source, target=target, options={"num_warps": triton_.WARPS, "enable_fp_fusion": False})


def nvidia(compiled, folder: Path) -> Code:
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    cuobjdump = triton.knobs.nvidia.cuobjdump.path
    usage = subprocess.run([cuobjdump, "-res-usage", cubin], capture_output=True, text=True, check=True)
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout + usage.stderr)}
    sass = compiled.asm["sass"]

    def count(pattern):
        return len(re.findall(pattern, sass))

    spilled = numbers["STACK"] + numbers["LOCAL"] + count(r"\b(LDL|STL)\b")
    loads, stores = (count(rf"\b{op}\.E(\.[A-Z0-9_]+)*\.128\b") for op in ("LDG", "STG"))
    return Code(numbers["REG"], spilled, loads, stores, compiled.metadata.shared, reach_of_four(sass))


def reach_of_four(sass: str) -> int:
    """The longest from the first to the last of four loads in the first inner loop that has four, 0 without one.

    It is the one that every vector goes through: others read the last few, or what is summed again.
    """
    code, labels, loops = [], {}, []
    for line in sass.splitlines():
        if label := re.fullmatch(r"(LBB\d+):", line.strip()):
            labels[label[1]] = len(code)
        elif "\t" in line:
            code.append(line.split("\t", 1)[1])
    for i, instruction in enumerate(code):
        if target := re.search(r"\bBRA\b.*?\b(?:(LBB\d+)|0x([0-9a-f]+))\b", instruction):
            begin = labels[target[1]] if target[1] else int(target[2], 16) // 16  # bytes of an instruction
            if begin < i:
                loops.append(range(begin, i))
    for loop in sorted(loops, key=lambda loop: loop[0]):
        if not any(other is not loop and other[0] >= loop[0] and other[-1] <= loop[-1] for other in loops):
            places = [i for i in loop if re.search(r"\bLDG\.E\.(\w+\.)*128\b", code[i])]
            if len(places) >= 4:
                return max(places[i + 3] - places[i] for i in range(0, len(places) - 3, 4))
    return 0


def amd(compiled, folder: Path) -> Code:
    assembly = compiled.asm["amdgcn"]

    def number(key):
        return int(re.search(rf"\.{key}:\s+(\d+)", assembly)[1])

    # Scalar registers spill to lanes of vector registers, which is no memory.
    spilled = number("vgpr_spill_count") + number("private_segment_fixed_size")
    loads, stores = (len(re.findall(rf"(global|buffer)_{op}_dwordx4", assembly)) for op in ("load", "store"))
    return Code(number("vgpr_count"), spilled, loads, stores, compiled.metadata.shared)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.mark.parametrize("name", TARGETS)
def test_machine_code(name, tmp_path):
    target, failures = TARGETS[name], []
    columns = "registers  spills  wide loads  wide stores  shared bytes  reach"
    print(f"\n{'kernel':22}{'kind':>5} {'dtype':9}{name:>8}: {columns}")
    for variant in VARIANTS:
        code = (nvidia if target.backend == "cuda" else amd)(compile_variant(variant, target), tmp_path)
        kind = "" if variant.kind is None else variant.kind
        print(
            f"{variant.kernel:22}{kind:>5} {variant.dtype:9}{'':8}  {code.registers:9}{code.spills:8}{code.loads:12}"
            f"{code.stores:13}{code.shared:14}{code.reach:7}"
        )
        most = MOST_REGISTERS_OF_WRITES if variant.stores else MOST_REGISTERS
        if target.backend != "cuda":
            most = MOST_REGISTERS_OF_AMD
        # AMD's compiler keeps the order of the source.
        reaches = code.reach if target.backend == "cuda" and variant.loads >= 4 else 1
        bound = variant.kernel == "clamp_kernel" or variant.dtype == "float64"
        longest = LONGEST_REACH_OF_ARITHMETIC if bound else LONGEST_REACH
        few = code.loads < variant.loads or code.stores < variant.stores
        if code.spills or code.registers > most or few or not 0 < reaches <= longest:
            failures.append(f"{variant}: {code}")
    assert not failures, "\n".join(failures)


def test_fused_multiply_adds_are_asked_for():
    """A product that is fused into the sum after it would undo the exact sums: all fma are those of the source."""
    compiled = compile_variant(Variant("norm_partial_kernel", "float32", 5, kind=SQUARES), TARGETS["sm_90"])
    # One for each of the four blocks of a step, which is there twice, and the masked one.
    assert len(re.findall(r"fma\.rn\.f32", compiled.asm["ptx"])) == 9 * 16 // DTYPES["float32"]
