"""The gate on the CUDA kernels' machine code: what it reads in cuobjdump's output, and that each bound can fail."""

from __future__ import annotations

import importlib.util
import struct
from pathlib import Path

import pytest

path = Path(__file__).resolve().parents[1] / ".ci" / "check_sass.py"
spec = importlib.util.spec_from_file_location("check_sass", path)
check_sass = importlib.util.module_from_spec(spec)
spec.loader.exec_module(check_sass)

SQUARES, END, CLAMP = "norm_kernel<(NormPass)0", "finish_kernel<(Finish)0", "clamp_kernel<"
WIDE_SQUARES = "norm_kernel<(NormPass)5"
# A file of machine code; encodings and most instructions are left out.
DUMP = """
Resource usage:
 Common:
  GLOBAL:0
 Function _ZN8fastclip45_GLOBAL__N__2b1c9a1e_12_clip_cuda_cu_0d6d7c7111norm_kernelI13__nv_bfloat16Lb1EEEvPd:
  REG:38 STACK:0 SHARED:3072 LOCAL:0 CONSTANT[0]:1344 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _Z13finish_kernelPKdPdi:
  REG:64 STACK:152 SHARED:0 LOCAL:8 CONSTANT[0]:548 TEXTURE:0 SURFACE:0 SAMPLER:0

	code for sm_90
	.target	sm_90

		Function : _ZN8fastclip45_GLOBAL__N__2b1c9a1e_12_clip_cuda_cu_0d6d7c7111norm_kernelI13__nv_bfloat16Lb1EEEvPd
	.headerflags	@"EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM90)"
        /*0120*/                   LDG.E.128 R4, [R20.64+0x1000] ;              /* 0x0010000614047981 */
        /*0130*/              @!P0 LDG.E.128.CONSTANT R8, desc[UR6][R20.64] ;   /* 0x0020000614087981 */
        /*0140*/                   LDG.E.EF.128 R8, desc[UR6][R20.64] ;         /* 0x0020000614087981 */
        /*0150*/                   LDG.E.64 R4, desc[UR6][R4.64] ;              /* 0x0000000604047981 */
        /*0160*/                   LDS.128 R8, [UR4+0x7e0] ;                    /* 0x0007e004ff087984 */
        /*0170*/                   STG.E.128 desc[UR6][R2.64], R4 ;             /* 0x0000000402007986 */
        /*0180*/                   STG.E.64 desc[UR6][R2.64], R6 ;              /* 0x0000000602007986 */
		..........

		Function : _Z13finish_kernelPKdPdi
	.headerflags	@"EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM90)"
        /*0810*/                   STL.64 [R1+0x8], R10 ;                       /* 0x0000080a01007387 */
        /*0820*/               @P1 LDL.LU R10, [R1+0x8] ;                       /* 0x00000800010a7983 */
		..........
"""


def test_dump_is_read():
    codes = check_sass.parse(DUMP)
    assert check_sass.demangle([code.kernel for code in codes]) == ["norm_kernel<__nv_bfloat16, true>", "finish_kernel"]
    assert [code[1:] for code in codes] == [
        ("sm_90", 38, 3072, 0, 1, 0, 0, 0, 0, 0),
        ("sm_90", 64, 0, 0, 0, 0, 0, 152, 8, 2),
    ]


def test_what_a_library_carries_is_found():
    """Cubins among other files of the same format; an image ends where its tables of headers do."""
    header = struct.Struct("<16sHHIQQQIHHHHHH")
    cubin = header.pack(b"\x7fELF\x02\x01", 2, check_sass.GPU, 1, 0, 64 + 8, 64 + 72, 90, 64, 56, 1, 64, 2, 1)
    cubin += bytes(64 + 72 + 2 * 64 - len(cubin))
    other = cubin.replace(check_sass.GPU.to_bytes(2, "little"), (62).to_bytes(2, "little"), 1)
    library = other + b"xx" + cubin + b"\0//\n.version 8.8\n.target sm_90\n" + cubin + b"end"
    assert list(check_sass.images(library)) == [cubin, cubin]
    assert check_sass.ptx_in(library) == {"sm_90"}


def at_the_bounds():
    """Every kernel on every architecture, with as many registers and instructions and as few batches as it may."""
    codes = []
    for kernel, bounds in check_sass.KERNELS.items():
        for arch in check_sass.ARCHS:
            most = bounds.older.get(arch, bounds.per_vector)
            loops = bounds.batches, bounds.stores, most, bounds.folds
            codes.append(check_sass.Code(kernel, arch, bounds.registers, 0, *loops, 0, 0, 0))
    return codes


def errors(codes, ptx=(check_sass.PTX,)):
    return list(check_sass.errors(codes, [code.kernel for code in codes], set(ptx)))


def test_bounds_are_allowed():
    assert errors(at_the_bounds()) == []
    assert check_sass.KERNELS[SQUARES].registers == check_sass.KERNELS[END].registers == 64


@pytest.mark.parametrize(
    ("kernel", "change", "message"),
    [
        (END, {"stack": 8}, f"{END} for sm_100: 8 bytes of stack"),
        ("scale_kernel<", {"local": 16}, "scale_kernel< for sm_100: 0 bytes of stack, 16 of local memory"),
        (CLAMP, {"spills": 1}, "1 spills"),
        (SQUARES, {"registers": 65}, "65 registers, 64 let 4 blocks of 256 threads be resident"),
        (END, {"registers": 65}, "65 registers, 64 let 1 blocks of 1024 threads be resident"),
        (SQUARES, {"batches": 3}, "3 batches of wide loads"),
        ("scale_kernel<", {"batches": 3}, "3 batches of wide loads"),
        ("scale_kernel<", {"stores": 3}, "3 wide stores"),
        (CLAMP, {"stores": 3}, "3 wide stores"),
        (CLAMP, {"per_vector": 26.5}, "26.5 instructions for each wide load, at most 26"),
        (END, {"folds": 2}, "2 batches of 8 loads of partials, expected 3"),
        (WIDE_SQUARES, {"batches": 3}, "3 batches of wide loads"),
        (SQUARES, {"arch": "sm_90"}, "has no code of norm_kernel<(NormPass)0 for sm_100"),
    ],
)
def test_each_bound_can_fail(kernel, change, message):
    codes = at_the_bounds()
    changed = [code._replace(**change) if code[:2] == (kernel, "sm_100") else code for code in codes]
    assert changed != codes
    (error,) = errors(changed)
    assert message in error


def test_bounds_of_some_architectures():
    """float64 sums are held where they are fast; 16-bit numbers are clamped one by one before sm_90, and only there."""

    def changed(kernel, arch, **fields):
        return [code._replace(**fields) if code[:2] == (kernel, arch) else code for code in at_the_bounds()]

    assert errors(changed(WIDE_SQUARES, "sm_120", batches=3)) == []
    most = check_sass.KERNELS[CLAMP].older["sm_80"]
    assert errors(changed(CLAMP, "sm_80", per_vector=most)) == []
    assert len(errors(changed(CLAMP, "sm_80", per_vector=most + 1))) == 1
    assert len(errors(changed(CLAMP, "sm_90", per_vector=most))) == 1


def test_an_unknown_kernel_and_missing_ptx_fail():
    codes = at_the_bounds()
    assert errors([*codes, codes[0]._replace(kernel="other_kernel")]) == [
        "other_kernel for sm_75: not in the table of check_sass.py"
    ]
    assert errors(codes, ptx=["sm_120"]) == ["has no PTX for sm_90, which later GPUs need"]


def batches(*instructions: str) -> int:
    lines = (f"        /*{16 * i:04x}*/  {line} ;\n" for i, line in enumerate(instructions))
    return check_sass.count_batches("".join(lines))


FOUR = [f"LDG.E.128 R{4 * i}, [R48.64+{i}]" for i in range(4)]


def test_loads_are_in_flight_together():
    """Four before the first use, whatever is between them; not where one is used, or the code branches, before."""
    assert batches(*FOUR) == 1
    assert batches(*FOUR, "HADD2 R0, R1", *FOUR) == 2
    assert batches(*FOUR[:2], "IADD3 R20, R20, 0x400", *FOUR[2:]) == 1
    assert batches(*FOUR, "LDG.E.128 R16, [R48.64]", "BRA 0x10") == 1
    assert batches(*FOUR[:3], "HADD2 R60, R9", FOUR[3]) == 0
    assert batches(*FOUR[:3], "@P0 BRA 0x10", FOUR[3]) == 0
    assert batches(*FOUR[:3], "LDG.E.64 R12, [R48.64]") == 0
    assert batches(*[FOUR[0]] * 4) == 0


def test_loads_of_partials():
    eight = [f"LDG.E.64 R{2 * i}, desc[UR4][R48.64+{i}]" for i in range(8)]
    lines = [*eight, "DADD R20, R20, R0", *eight[:4], "DADD R20, R20, R2", *eight[4:]]
    sass = "".join(f"        /*{16 * i:04x}*/  {line} ;\n" for i, line in enumerate(lines))
    assert check_sass.count_batches(sass, check_sass.FLOAT64_LOAD, words=2, size=check_sass.FOLD) == 1


def test_instructions_of_a_loop():
    """Those of the innermost loop that loads four vectors at once, without NOP; shorter loops do not count."""
    outer = ["MOV R1, R2", "S2R R0, SR_TID.X"]
    hot = [*FOUR, "NOP", "FADD R60, R61, R0", "FADD R60, R61, R4", "@P0 BRA 0x20"]
    rest = ["LDG.E.128 R0, [R48.64]", *["FADD R60, R61, R0"] * 9, "@P1 BRA `(.L_x) 0xa0"]
    lines = [*outer, *hot, *rest, "@P2 BRA 0x0", "EXIT", "BRA 0x180"]
    sass = "".join(f"        /*{16 * i:04x}*/  {line} ;\n" for i, line in enumerate(lines))
    assert check_sass.most_per_vector(sass) == 7 / 4
    assert check_sass.most_per_vector(sass.replace("LDG.E.128", "LDG.E.64")) == 0
