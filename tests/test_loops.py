"""ISA x length x misalignment: the scalar loops against the oracle, all others against them, bit by bit."""

from __future__ import annotations

import functools
import math
import platform
import subprocess
from pathlib import Path

import pytest
import torch

import on_cpu
import reference
import subproc
from cases import CHUNK, poison

# Every length up to one block of 32 lanes and a little more, then around the blocks that a loop may unroll.
LENGTHS = (*range(36), 63, 64, 65, 95, 97, 127, 128, 129, 255, 257, 511, 513, 1023, 1025)
# Offsets in elements: aligned, each residue of a 16-byte vector of 4-byte elements, and odd ones beyond.
OFFSETS = (0, 1, 2, 3, 7, 15)
LARGE = ((CHUNK - 1, 0), (CHUNK, 3), (CHUNK + 1, 1), (2 * CHUNK + 31, 7))
COEFS = (0.37, -1.7, 1e-6, 3e4, 0.0, -0.0, math.nan, math.inf)
BOUNDS = (0.5, 1e-3, 100.0, 0.0, -0.25, math.nan, math.inf)


def isas() -> dict[str, bool]:
    """Return each set of loops and whether this machine can run it."""
    flags: set[str] = set()
    if platform.machine().lower() in ("x86_64", "amd64"):
        cpuinfo = Path("/proc/cpuinfo")
        lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
        flags = set(next((line for line in lines if line.startswith("flags")), "").split())
    avx2 = {"avx2", "fma", "f16c"} <= flags
    avx512 = avx2 and {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags
    neon = platform.machine().lower() in ("aarch64", "arm64")
    return {"scalar": True, "neon": neon, "avx2": avx2, "avx512": avx512}


def patterns(dtype: torch.dtype) -> torch.Tensor:
    """Return all 65,536 bit patterns of a 16-bit dtype, or as many of a wide one with special numbers among them."""
    if dtype in reference.LOW:
        return torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype).clone()
    bits = torch.int32 if dtype == torch.float32 else torch.int64
    info, generator = torch.iinfo(bits), torch.Generator().manual_seed(9)
    return torch.randint(info.min, info.max, (CHUNK,), dtype=bits, generator=generator).view(dtype)


def tensors(dtype: torch.dtype, values: str):
    """Yield the grid: views at every offset of every length, in poisoned memory."""
    generator = torch.Generator().manual_seed(77)
    special = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 0.0, 1e-42, 6e-8, 3e38]).to(dtype)
    for length, offset in [(n, k) for n in LENGTHS for k in OFFSETS] + list(LARGE):
        numbers = torch.randn(length, dtype=torch.float64, generator=generator).to(dtype)
        if values == "special" and length:
            drawn = special[torch.randint(len(special), (length,), generator=generator)]
            numbers = torch.where(torch.rand(length, generator=generator) < 0.1, drawn, numbers)
        base = poison(length + offset + 40, dtype)
        view = base[offset : offset + length]
        yield base, view.copy_(numbers)


def run_grid(threads: int) -> dict:
    """In the child: norms, and the whole bases after scaling and clamping, of the grid and of all bit patterns."""
    import fastclip

    torch.set_num_threads(threads)
    out: dict = {"isa": fastclip._ops.cpu_isa()}
    ops = torch.ops.fastclip
    with fastclip.use_backend("cpu"):
        for dtype in reference.FLOATS:
            for values in ("plain", "special"):
                grid = list(tensors(dtype, values))
                out["norm", dtype, values] = [
                    [fastclip.get_total_norm([view], p, norm_dtype=torch.float64).item() for _, view in grid]
                    for p in reference.NORM_TYPES
                ]
                ops.scale_([view for _, view in grid], torch.tensor(0.37, dtype=torch.float64))
                out["scale", dtype, values] = torch.cat([base for base, _ in grid])
                ops.clamp_([view for _, view in grid], -0.2, 0.2)
                out["clamp", dtype, values] = torch.cat([base for base, _ in grid])
            # Four examples at a time are in cache, and the last of them alone; a tail; a sum that no vector has whole.
            examples = [torch.randn(9, n, generator=torch.Generator().manual_seed(n)).to(dtype) for n in (300_037, 5)]
            for per_layer in (False, True):
                sums, counts = fastclip.functional.per_example_clip(examples, 3.0, per_layer=per_layer)
                out["per example", dtype, str(per_layer)] = torch.cat([*sums, counts.reshape(-1).to(dtype)])
            for coef in COEFS:
                ops.scale_([every := patterns(dtype)], torch.tensor(coef, dtype=torch.float64))
                out["scale", dtype, str(coef)] = every
            for bound in BOUNDS:
                ops.clamp_([every := patterns(dtype)], -bound, bound)
                out["clamp", dtype, str(bound)] = every
    return out


@functools.cache
def _run(isa: str, threads: int) -> subproc.Result:
    return subproc.call("test_loops:run_grid", threads, env={"FASTCLIP_CPU_ISA": isa})


def results(isa: str, threads: int) -> dict:
    child = _run(isa, threads)
    assert not child.error, child.error + child.stderr
    return child.value


def run_flushed(threads: int) -> list:
    """In the child: everything on numbers of which many are subnormal, with the caller's threads flushing and not."""
    import fastclip

    assert fastclip._ops.cpu_isa()
    torch.set_num_threads(threads)
    ops, out = torch.ops.fastclip, []
    generator = torch.Generator().manual_seed(5)
    numbers = torch.randn(6 * CHUNK + 5, dtype=torch.float64, generator=generator)
    made = {dtype: (numbers * 4 * torch.finfo(dtype).tiny).to(dtype) for dtype in reference.FLOATS}
    for flush in (False, True):
        run = []
        for tensor in made.values():
            strided = torch.stack([tensor, tensor], 1)[:, 0]
            for view in (tensor, strided, tensor[:39]):
                grads = [torch.empty_strided(view.shape, view.stride(), dtype=view.dtype).copy_(view)]
                tiny = torch.finfo(tensor.dtype).tiny
                coef = torch.tensor(tiny / 2).to(torch.float16)  # not 0 of float16 alone
                assert torch.set_flush_denormal(flush)
                run += [ops.norm_partial(grads, p) for p in reference.NORM_TYPES]
                run += [ops.clip_grad_norm_(grads, tiny, p) for p in (math.inf, 2.0)]
                ops.scale_(grads, torch.tensor(0.7, dtype=torch.float64))
                ops.clamp_(grads, -tiny / 2, tiny / 3)
                run += [grads[0].clone()]
                ops.scale_(grads, coef)
                # The flag is the caller's again, on this thread and on those that torch's own passes use.
                assert (torch.full((39,), 1e-40) * 1.0).count_nonzero() == (0 if flush else 39)
                torch.set_flush_denormal(False)
                run += grads
        out.append(run)
    return out


def active_isa() -> str:
    """In a child: the loops in use."""
    import fastclip

    return fastclip._ops.cpu_isa()


RUNS = [(isa, threads) for isa, there in isas().items() if there for threads in (1, 2)]


@pytest.mark.usefixtures("cpu")
@pytest.mark.parametrize("dtype", reference.FLOATS)
class TestScalarLoops:
    """The oracle of the other loops, against the oracle of the tests."""

    @pytest.mark.parametrize("values", ["plain", "special"])
    def test_norms(self, dtype, values):
        norms = torch.tensor(results("scalar", 1)["norm", dtype, values], dtype=torch.float64)
        for p, row in zip(reference.NORM_TYPES, norms, strict=True):
            expected = [reference.total_norm([view], p) for _, view in tensors(dtype, values)]
            torch.testing.assert_close(row, row.new_tensor(expected), rtol=reference.WIDE, atol=0, equal_nan=True)

    @pytest.mark.parametrize("values", ["plain", "special"])
    def test_scale_and_clamp(self, dtype, values):
        """Bit by bit, the poison around every view included."""
        grid = list(tensors(dtype, values))
        reference.scale_rounded_([view for _, view in grid], 0.37)
        reference.assert_bits([results("scalar", 1)["scale", dtype, values]], [torch.cat([b for b, _ in grid])])
        for _, view in grid:
            view.clamp_(-0.2, 0.2)
        reference.assert_bits([results("scalar", 1)["clamp", dtype, values]], [torch.cat([b for b, _ in grid])])

    def test_all_bit_patterns(self, dtype):
        """Every number of a 16-bit dtype through every conversion: rounding to even, subnormals, infinities, NaN."""
        for coef in COEFS:
            reference.scale_rounded_([expected := patterns(dtype)], coef)
            reference.assert_bits([results("scalar", 1)["scale", dtype, str(coef)]], [expected])
        for bound in BOUNDS:
            expected = patterns(dtype).clamp_(min=-bound).clamp_(max=bound)
            reference.assert_bits([results("scalar", 1)["clamp", dtype, str(bound)]], [expected])


@pytest.mark.usefixtures("cpu")
@pytest.mark.parametrize(("isa", "threads"), RUNS)
def test_same_bits_everywhere(isa, threads):
    """One answer for every ISA and every number of threads."""
    scalar, other = results("scalar", 1), results(isa, threads)
    assert other["isa"] == isa
    for key in scalar.keys() - {"isa"}:
        with reference.during(key):
            if key[0] == "norm":
                assert str(other[key]) == str(scalar[key])  # shortest text of a float64: equal text, equal bits
            else:
                reference.assert_bits([other[key]], [scalar[key]])


@pytest.mark.usefixtures("cpu")
@pytest.mark.parametrize("isa", [*(isa for isa, there in isas().items() if not there), "sse9"])
def test_isa_that_is_not_there(isa):
    """An ISA that the machine lacks, or nobody knows, is an error that names the variable and the value."""
    child = subproc.call("test_loops:active_isa", env={"FASTCLIP_CPU_ISA": isa})
    assert "ValueError" in child.error, child
    assert "FASTCLIP_CPU_ISA" in child.error
    assert isa in child.error


@pytest.mark.usefixtures("cpu")
def test_best_isa_is_the_default():
    """Without the variable, and with an empty one, the widest loops that the machine can run."""
    child = subproc.call("test_loops:active_isa", env={"FASTCLIP_CPU_ISA": ""})
    assert child.value == [isa for isa, there in isas().items() if there][-1], child


@pytest.mark.usefixtures("cpu")
@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="torch flushes on x86 alone")
@pytest.mark.parametrize(("isa", "threads"), [("scalar", 1), *(run for run in RUNS if run[1] == 2)])
def test_flushing_subnormals_changes_no_bit(isa, threads):
    """torch.set_flush_denormal is a mode of each thread, of which float16 would lose all below 2^-14."""
    plain, flushed = flushed_results(isa, threads)
    reference.assert_bits(flushed, plain)
    assert sum(bool(t.count_nonzero()) for t in plain) > len(plain) / 2
    reference.assert_bits(plain, flushed_results("scalar", 1)[0])


@functools.cache
def flushed_results(isa: str, threads: int) -> list:
    child = subproc.call("test_loops:run_flushed", threads, env={"FASTCLIP_CPU_ISA": isa})
    assert not child.error, child.error + child.stderr
    return child.value


@pytest.mark.skipif(on_cpu.unavailable() is not None, reason=str(on_cpu.unavailable()))
@pytest.mark.parametrize("flag", ["-O3", "-Ofast", "-ffast-math", "-ffinite-math-only"])
def test_fast_math_is_refused(flag):
    """Under it a comparison with NaN is what the compiler likes."""
    header = str(on_cpu.ROOT / "csrc" / "clip.h")
    command = [*on_cpu.compiler(), "-std=c++17", flag, "-fsyntax-only", "-x", "c++", header]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode == 0) == (flag == "-O3"), result.stderr
    assert ("take them out of CXXFLAGS" in result.stderr) == (flag != "-O3")
