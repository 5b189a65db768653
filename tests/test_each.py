"""A norm and a coefficient for each tensor: by every way, on every engine, with the bits of the list of one."""

from __future__ import annotations

import math
import mmap
from fractions import Fraction

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastclip
import on_cpu
import reference
import subproc
import ways
from cases import CASES, CHUNK, grid, place, random
from fastclip import gradients

NORM_TYPES = (2.0, 1.0, math.inf, -math.inf, 0.0, 3.0, 30.0, -1.0)


pytestmark = pytest.mark.usefixtures("world")


@pytest.fixture(params=["reader", "op", "parts", "eager"])
def way(request):
    return ways.WAYS[request.param]


def norms_of(tensors, norm_type):
    return gradients.of(tensors, gradients=False, writes=False).norms(norm_type)


def mixed() -> list[torch.Tensor]:
    """Every dtype, several chunks, holes, nothing, zeros, one tensor twice, two that overlap."""
    generator = torch.Generator().manual_seed(5)
    base = random(generator, torch.float32, 300)
    return [
        *(random(generator, dtype, 37) for dtype in reference.FLOATS),
        random(generator, torch.bfloat16, 2 * CHUNK + 3, offset=1),
        torch.zeros(0),
        random(generator, torch.float32, 60, 11)[:, 1:].t(),
        base[:200],
        base[150:],
        base[:200],
        torch.zeros(5),
        random(generator, torch.float32),
    ]


@pytest.mark.parametrize(("case", "dtype"), grid(readonly=False, complexes=False))
def test_norms(case, dtype):
    tensors = case.make(dtype)
    norm_type = NORM_TYPES[(CASES.index(case) + dtype.itemsize) % len(NORM_TYPES)]
    for each in {2.0, norm_type}:
        norms = norms_of(tensors, each) if tensors else []
        for tensor, norm in zip(tensors, norms, strict=True):
            with reference.during(each):
                reference.assert_norm(norm, reference.total_norm([tensor], each), torch.float64)


@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_norms_by_every_way(way, norm_type):
    tensors = mixed()
    with way.context():
        read = gradients.of([*tensors, *way.beside()], gradients=False, writes=False)
        norms = read.norms(norm_type)
    assert norms.shape == (len(tensors) + len(way.beside()),)
    for tensor, norm in zip(read.tensors, norms, strict=True):
        reference.assert_norm(norm, reference.total_norm([tensor], norm_type), torch.float64)


def test_coefficients_by_every_way(way, fence):
    tensors, expected = mixed(), mixed()
    coefs = torch.linspace(0.25, 1.0, len(tensors), dtype=torch.float64)
    coefs[0], coefs[2], coefs[3] = 1.0, 1 + 1e-12, 1e-41
    before, versions = fence(tensors), [t._version for t in tensors]
    for tensor, coef in zip(expected, coefs.tolist(), strict=True):
        reference.scale_rounded_([tensor], coef)
    with way.context():
        read = gradients.of([*tensors, *way.beside()], gradients=False)
        read.scale_each_(torch.cat([coefs, coefs.new_ones(len(way.beside()))]))
    reference.assert_bits(tensors, expected)
    assert before.outside_unchanged()
    assert all(t._version > version for t, version in zip(tensors, versions, strict=True))


@pytest.mark.skipif(on_cpu.unavailable() is not None, reason=str(on_cpu.unavailable()))
@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_the_simulated_gpu(norm_type):
    many = [torch.randn(1 + i % 3) for i in range(2100)]  # more than a table holds
    tensors, expected = mixed() + many, mixed() + [t.clone() for t in many]
    coefs = torch.linspace(0.25, 1.0, len(tensors), dtype=torch.float64)
    coefs[7] = 1.0
    results = []
    for blocks in (1, 8):
        with on_cpu.use(blocks):
            results.append(norms_of(tensors, norm_type))
            assert torch.equal(getattr(torch.ops, on_cpu.NAMESPACE).tensor_norms(tensors, norm_type), results[-1])
    assert torch.equal(*results)
    for i in (*range(12), 300, len(tensors) - 1):
        reference.assert_norm(results[0][i], reference.total_norm([tensors[i]], norm_type), torch.float64)
    with on_cpu.use():
        gradients.of(tensors, gradients=False).scale_each_(coefs)
    for tensor, coef in zip(expected, coefs.tolist(), strict=True):
        reference.scale_rounded_([tensor], coef)
    reference.assert_bits(tensors, expected)


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
def test_nothing_is_written_where_the_coefficient_is_one(cpu):
    """Memory that cannot be written is not touched."""
    memory = mmap.mmap(-1, 4096, prot=mmap.PROT_READ)
    frozen = torch.frombuffer(memory, dtype=torch.float32)
    free = torch.ones(5)
    coefs = torch.tensor([1.0, 0.5], dtype=torch.float64)
    gradients.of([frozen, free], gradients=False).scale_each_(coefs)
    assert torch.equal(free, torch.full((5,), 0.5))


@pytest.mark.parametrize(
    "coefs", [torch.ones(3, dtype=torch.float64), torch.ones(2), torch.ones((), dtype=torch.float64)]
)
def test_the_op_refuses_other_coefficients(cpu, coefs):
    tensors = [torch.ones(2), torch.ones(3)]
    with pytest.raises(RuntimeError, match="coefs: expected a contiguous float64 tensor of 2 elements"):
        torch.ops.fastclip.scale_each_(tensors, coefs)
    assert torch.equal(tensors[0], torch.ones(2))


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_coefficients_without_memory_are_refused(cpu):
    with FakeTensorMode():
        coefs = torch.ones(2, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="2 elements that has memory"):
        gradients.of([torch.ones(2), torch.ones(3)], gradients=False).scale_each_(coefs)


def adversarial() -> dict[str, torch.Tensor]:
    """Float64 numbers whose plain sums drift: equal ones, which round to one side, and small ones after a large one."""
    generator = torch.Generator().manual_seed(2)
    return {
        "tenths": torch.full((300_001,), 0.1, dtype=torch.float64),
        "large first": torch.cat([torch.tensor([1e8]), torch.full((200_000,), 0.3, dtype=torch.float64)]),
        "all sizes": random(generator, torch.float64, 100_000)
        * 10.0 ** torch.randint(-12, 12, (100_000,), generator=generator),
        "strided": torch.full((1000, 402), 1 / 3, dtype=torch.float64)[:, 1:-1],
    }


def exact_sum(values: torch.Tensor, power: int) -> Fraction:
    """``sum |x|^power``, in integers: of each float its 53 bits, shifted by its exponent."""
    mantissas, exponents = torch.frexp(values.reshape(-1))
    bits, least = (mantissas * 2**53).long().abs().tolist(), int(exponents.min())
    shifts = ((exponents - least) * power).tolist()
    total = sum(m**power << shift for m, shift in zip(bits, shifts, strict=True))
    return total * Fraction(2) ** ((least - 53) * power)


def ulps(norm: float, exact: Fraction, norm_type: float) -> float:
    """The distance from the exact norm; its square is compared, because a root is not rational."""
    ulp = Fraction(math.ulp(norm))
    if norm_type == 1:
        return float(abs(Fraction(norm) - exact) / ulp)
    return float(abs(Fraction(norm) ** 2 - exact) / (2 * Fraction(norm) * ulp))


@pytest.mark.parametrize("norm_type", [1.0, 2.0])
@pytest.mark.parametrize("name", adversarial())
def test_float64_is_within_two_ulp(cpu, name, norm_type):
    values = adversarial()[name]
    exact = exact_sum(values, int(norm_type))
    assert ulps(fastclip.get_total_norm([values], norm_type).item(), exact, norm_type) <= 2
    assert ulps(norms_of([values], norm_type).item(), exact, norm_type) <= 2


def test_what_is_not_finite_has_no_error_term(cpu):
    for values, expected in (
        ([math.inf, 1.0], math.inf),
        ([1e200] * 40, math.inf),
        ([1e308] * 40, math.inf),
        ([math.nan, math.inf], math.nan),
    ):
        norm = fastclip.get_total_norm([torch.tensor(values, dtype=torch.float64)]).item()
        assert norm == expected or (math.isnan(norm) and math.isnan(expected)), values


def run_pairs(threads: int) -> list[torch.Tensor]:
    """In a child: sums of float64 over lengths and sizes down to where the error of a square leaves float64."""
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(4)
    out = []
    for exponent in (0, -160, -140, -154, 140, 160):
        tensors = [
            place(random(generator, torch.float64, n) * 10.0**exponent) for n in (*range(40), 1023, 3 * CHUNK + 17)
        ]
        out += [fastclip.get_total_norm(tensors, p) for p in (1.0, 2.0)] + [norms_of(tensors, p) for p in (1.0, 2.0)]
    return out


def test_pairs_have_the_same_bits_on_every_isa():
    from test_loops import isas

    found = [isa for isa, runs in isas().items() if runs]
    results = {
        (isa, threads): subproc.call("test_each:run_pairs", threads, env={"FASTCLIP_CPU_ISA": isa})
        for isa in found
        for threads in (1, 3)
    }
    for key, result in results.items():
        assert not result.error, (key, result.error)
        reference.assert_bits(result.value, results["scalar", 1].value)
