"""The CUDA kernels, run on the CPU (on_cpu.py): values, indexing, barriers, grids, tables, launches and errors."""

from __future__ import annotations

import itertools
import math
import subprocess
import zlib

import pytest
import torch

import fastclip
import gpu_edges
import on_cpu
import reference
from cases import CASES, CHUNK, grid, in_turn, parameters, place, poison, random
from fastclip import _ops
from fastclip.gradients.plain import Plain
from test_norms import check_high_orders
from test_ops import arguments, gradients, step

pytestmark = pytest.mark.skipif(on_cpu.unavailable() is not None, reason=str(on_cpu.unavailable()))

KINDS = (2.0, 1.0, math.inf, -math.inf, 0.0, 3.0)
OTHER_ORDERS = [norm_type for norm_type in reference.NORM_TYPES if norm_type not in KINDS[:5]]
# Tensors of a table that travels by value in a kernel's arguments, of which there may be 32,764 bytes.
SHORT, LONG = 254, 2040


@pytest.fixture(autouse=True)
def cuda(request):
    """Force the kernels, under a schedule and on one of the two kinds of device of the test's own."""
    seed = zlib.crc32(request.node.name.encode())
    with on_cpu.use(seed=seed, wide=seed % 2 == 0):
        yield


@pytest.fixture
def ops():
    return getattr(torch.ops, on_cpu.NAMESPACE)


def tiny(count: int) -> list[torch.Tensor]:
    """Return tensors of every dtype in turn, 1 to 9 elements each, with poison around them."""
    generator = torch.Generator().manual_seed(count)
    bases = [poison(3 * count + 24, dtype) for dtype in reference.FLOATS]
    grads = [bases[i % 4][12 * (i // 4) + i % 3 :][: 1 + i % 9] for i in range(count)]
    numbers = torch.randn(count, 9, generator=generator, dtype=torch.float64)
    for grad, row in zip(grads, numbers, strict=True):
        grad.copy_(row[: len(grad)])
    return grads


def twins(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [t.clone() for t in tensors]


@pytest.mark.parametrize(("case", "dtype"), grid(readonly=False, complexes=False))
def test_norm(case, dtype):
    """2, 1, inf, -inf, 0 and one of the other orders, which the dtypes share out."""
    tensors = case.make(dtype)
    orders = (*KINDS[:5], OTHER_ORDERS[CASES.index(case) % len(OTHER_ORDERS)])
    for norm_type in in_turn(orders, case, dtype, 2):
        norm = fastclip.get_total_norm(tensors, norm_type, norm_dtype=torch.float64)
        with reference.during(norm_type):
            reference.assert_norm(norm, reference.total_norm(tensors, norm_type), torch.float64)


@pytest.mark.parametrize(("case", "dtype"), grid(readonly=False, complexes=False))
def test_clip(case, dtype, fence):
    """The fused clip, bit by bit, which the wide norm defines."""
    grads, expected = case.make(dtype), case.make(dtype)
    before = fence(grads)
    norm_type = (2.0, math.inf, 3.0)[CASES.index(case) % 3]
    norm = reference.total_norm(grads, norm_type)
    max_norm = norm / 3 if 0 < norm < math.inf else 0.5
    wide = fastclip.clip_grad_norm_(parameters(grads), max_norm, norm_type, norm_dtype=torch.float64)
    reference.assert_norm(wide, norm, torch.float64)
    reference.scale_rounded_(expected, reference.clip_coef(wide.item(), max_norm))
    reference.assert_bits(grads, expected)
    assert before.outside_unchanged()


@pytest.mark.parametrize(("case", "dtype"), grid(readonly=False, complexes=False))
def test_value(case, dtype, fence):
    clip_value = (0.5, 1e-3, 0.3, -0.5, math.inf, math.nan)[CASES.index(case) % 6]
    grads = case.make(dtype)
    before, expected = fence(grads), reference.clip_by_value(grads, clip_value)
    fastclip.clip_grad_value_(parameters(grads), clip_value)
    reference.assert_bits(grads, expected)
    assert before.outside_unchanged()


@pytest.mark.parametrize("dtype", reference.FLOATS)
def test_every_length_at_every_offset(dtype, fence):
    """Heads and tails of less than a vector, and bodies of whole ones, each around what 256 threads take at once."""
    generator, lanes = torch.Generator().manual_seed(1), 16 // dtype.itemsize
    lengths = (*range(1, 36), *(n * 256 * lanes + k for n in (1, 4, 5) for k in (-1, 0, 1, lanes)))
    grads = [random(generator, dtype, n, offset=k) for n in lengths for k in range(lanes)]
    expected = twins(grads)
    before = fence(grads)
    wide = fastclip.clip_grad_norm_(parameters(grads), 1.0, norm_dtype=torch.float64)
    reference.assert_norm(wide, reference.total_norm(expected))
    reference.scale_rounded_(expected, reference.clip_coef(wide.item(), 1.0))
    reference.assert_bits(grads, expected)
    expected = reference.clip_by_value(grads, 1e-3)
    fastclip.clip_grad_value_(parameters(grads), 1e-3)
    reference.assert_bits(grads, expected)
    assert before.outside_unchanged()


def test_order_zero_counts_tensors_and_not_chunks():
    large, zeros = place(torch.ones(2 * CHUNK + 1)), place(torch.zeros(2 * CHUNK))
    holes = torch.ones(2 * CHUNK + 2, 2)[:, 1]
    assert fastclip.get_total_norm([large, zeros, holes, zeros[:5], large[:1]], 0.0) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("exponent", [-52, -49])
@pytest.mark.parametrize("wide", [False, True])
def test_squares_below_the_range_of_float32(dtype, exponent, wide):
    """One square within it and 65,535 below it, which float32 rounds by a third and more."""
    grad = torch.full((CHUNK,), 1.2 * 2.0**-75, dtype=dtype)
    grad[7] = 2.0**exponent
    with on_cpu.use(wide=wide):
        norm = fastclip.get_total_norm([grad], norm_dtype=torch.float64)
    reference.assert_norm(norm, reference.total_norm([grad]))


@pytest.mark.parametrize("norm_dtype", [None, *reference.FLOATS])
@pytest.mark.parametrize("dtype", reference.FLOATS)
def test_the_norm_is_rounded_once(dtype, norm_dtype):
    grads = [torch.randn(9).to(dtype), torch.randn(4).to(dtype)]
    wide = fastclip.get_total_norm(grads, norm_dtype=torch.float64)
    norm = fastclip.clip_grad_norm_(parameters(grads), 1e9, norm_dtype=norm_dtype)
    assert norm.dtype == (norm_dtype or dtype)
    # To 16 bits by way of float32, as everywhere.
    opmath = torch.float32 if norm.dtype in reference.LOW else norm.dtype
    assert torch.equal(norm, wide.to(opmath).to(norm.dtype))


def of_many_chunks(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [
        random(generator, dtype, 7),
        random(generator, dtype, 2 * CHUNK + 77),
        random(generator, dtype, CHUNK + 1, offset=1),
        random(generator, torch.float32, 300),
        random(generator, dtype, 700, 101)[:, 1:].t(),
    ]


def everything(dtype: torch.dtype) -> list[torch.Tensor]:
    """Run every kernel on the same numbers, and return all that they wrote."""
    grads = of_many_chunks(dtype)
    norms = [fastclip.get_total_norm(grads, norm_type, norm_dtype=torch.float64) for norm_type in KINDS]
    norms.append(fastclip.clip_grad_norm_(parameters(grads), 100.0))
    fastclip.clip_grads_with_norm_(parameters(grads), 0.5, torch.tensor(1.0))
    fastclip.clip_grad_value_(parameters(grads), 0.05)
    return [*norms, *grads]


@pytest.mark.parametrize("dtype", reference.FLOATS)
def test_any_grid_and_schedule_give_the_same_bits(dtype):
    for wide in (False, True):
        with on_cpu.use(wide=wide):
            expected = everything(dtype)
        for norm, norm_type in zip(expected, KINDS, strict=False):
            reference.assert_norm(norm, reference.total_norm(of_many_chunks(dtype), norm_type))
        for blocks, seed in ((1, 1), (3, 2), (32, 3)):
            with on_cpu.use(blocks, seed, wide=wide), reference.during(blocks, seed, wide):
                reference.assert_bits(everything(dtype), expected)


def test_every_barrier_is_needed():
    """A kernel without it is wrong, or its threads lose each other, under one of a few schedules."""
    expected = everything(torch.float32)
    barriers = on_cpu.barriers()
    assert barriers
    for i, barrier in enumerate(barriers):
        noticed = False
        for seed in range(3):
            with on_cpu.use(1, seed, dropped_barrier=i):
                try:
                    reference.assert_bits(everything(torch.float32), expected)
                except (AssertionError, RuntimeError):
                    noticed = True
                    break
        assert noticed, f"nothing differs without {barrier}"


def test_high_orders(ops):
    check_high_orders(lambda tensors, p: ops.clip_grad_norm_([t.clone() for t in tensors], 1.0, p, dtype=torch.float64))
    check_any_grid(lambda: ops.clip_grad_norm_(of_many_chunks(torch.float64), 1.0, 30.0, dtype=torch.float64))


def check_any_grid(norm) -> None:
    norms = []
    for blocks in (1, 32):
        with on_cpu.use(blocks):
            norms.append(norm())
    assert torch.equal(*norms)


@pytest.mark.parametrize("coef", [1e-40, -1e-44, 1e-300, 2.0**-126, 2.0**-126 * (1 - 2.0**-40)])
def test_coefficients_below_float32(ops, coef):
    """Products are taken in float64, and rounded once, where float32 has no normal number for the coefficient."""
    for dtype in reference.FLOATS:
        grads = [g * min(1e37, torch.finfo(dtype).max / 8) for g in of_many_chunks(dtype)]
        grads.append(torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0], dtype=dtype))
        expected = twins(grads)
        ops.scale_(grads, torch.tensor(coef, dtype=torch.float64))
        reference.scale_rounded_(expected, coef)
        reference.assert_bits(grads, expected)


# Tables and launches


@pytest.mark.parametrize("count", [1, SHORT - 1, SHORT, SHORT + 1, LONG - 1, LONG, LONG + 1, LONG + 2, 10_000])
def test_lists(count, fence):
    """Every tensor is in one table; the last one is short where that suffices."""
    grads = tiny(count)
    before, expected = fence(grads), reference.clip_by_value(grads, 0.3)
    on_cpu.launches()
    fastclip.clip_grad_value_(parameters(grads), 0.3)
    launches = on_cpu.launches()
    reference.assert_bits(grads, expected)
    assert before.outside_unchanged()
    last = count % LONG or LONG
    tables = count // LONG * [LONG] + [SHORT if last <= SHORT else LONG] * (count % LONG > 0)
    assert [launch.argument_bytes for launch in launches] == [16 + 8 + 16 * table for table in tables]
    assert max(launch.argument_bytes for launch in launches) <= 32764


@pytest.mark.parametrize(("count", "norm_type"), [(1, 2.0), (SHORT + 1, 2.0), (LONG + 1, 0.0), (2 * LONG + 1, 2.0)])
def test_norms_of_lists(count, norm_type):
    """Partials of one table after those of the other; the tables of the clip are walked backwards."""
    grads = tiny(count)
    norm = reference.total_norm(grads, norm_type)
    expected = twins(grads)
    wide = fastclip.clip_grad_norm_(parameters(grads), norm / 3, norm_type, norm_dtype=torch.float64)
    reference.assert_norm(wide, norm, torch.float64)
    reference.scale_rounded_(expected, reference.clip_coef(wide.item(), norm / 3))
    reference.assert_bits(grads, expected)


@pytest.mark.parametrize("among", [0, SHORT])
@pytest.mark.parametrize("dtype", reference.FLOATS)
def test_chunks_in_tables(dtype, among):
    """Tensors that end around a chunk's boundary, between small ones."""
    generator, small = torch.Generator().manual_seed(2), iter(tiny(among))
    grads = []
    for n in (CHUNK, CHUNK - 1, 1, CHUNK + 1, 2 * CHUNK, 2 * CHUNK - 1):
        grads += [random(generator, dtype, n), *itertools.islice(small, among // 5)]
    expected = twins(grads)
    for norm_type in (2.0, math.inf, 0.0):
        norm = fastclip.get_total_norm(grads, norm_type, norm_dtype=torch.float64)
        reference.assert_norm(norm, reference.total_norm(grads, norm_type))
    fastclip.clip_grads_with_norm_(parameters(grads), 0.37, torch.tensor(1.0 - 1e-6, dtype=torch.float64))
    reference.scale_rounded_(expected, reference.clip_coef(1.0 - 1e-6, 0.37))
    reference.assert_bits(grads, expected)


def test_launches():
    """A block for each chunk; two launches for 2,000 tensors of any dtypes, three where their partials are too many."""

    def grids(call, *args):
        on_cpu.launches()
        call(*args)
        return [(launch.grid, launch.block) for launch in on_cpu.launches()]

    end = (1, 1024)
    for wide, most in ((True, 2048), (False, 256)):
        with on_cpu.use(wide=wide):
            for chunks in (2, most, most + 1):
                few = min(chunks, 2_000)
                grads = [*tiny(few - 1), torch.zeros((chunks - few) * CHUNK + 1)]
                every = (chunks, 256)
                expected = [every, every] if chunks <= most else [every, end, every]
                assert grids(fastclip.clip_grad_norm_, parameters(grads), 1.0) == expected
    assert grids(fastclip.get_total_norm, grads[:5]) == [(5, 256), end]
    assert grids(fastclip.clip_grad_value_, parameters([torch.zeros(3 * CHUNK)]), 1.0) == [(3, 256)]


def test_one_launch_of_what_has_its_numbers():
    """A coefficient of any dtype, or the norm that it follows from, is read where it is used."""
    grads = tiny(20)
    calls = [
        (fastclip.clip_grads_with_norm_, parameters(grads), 0.5, torch.tensor(1.0, dtype=dtype))
        for dtype in reference.FLOATS
    ]
    calls += [
        (getattr(torch.ops, on_cpu.NAMESPACE).scale_, grads, torch.tensor(0.5, dtype=dtype))
        for dtype in reference.FLOATS
    ]
    on_cpu.launches()
    for call, *args in calls:
        expected = twins(grads)
        call(*args)
        assert len(on_cpu.launches()) == 1
        reference.scale_rounded_(expected, 0.5 / (1 + 1e-6) if call is fastclip.clip_grads_with_norm_ else 0.5)
        reference.assert_bits(grads, expected)


@pytest.mark.skipif(_ops.read is None, reason="no compiled reader")
def test_a_norm_takes_no_op_of_torch(monkeypatch):
    """The kernel writes it in the dtype that is asked for."""
    grads = [torch.randn(9).bfloat16(), torch.randn(4).bfloat16()]
    wide = fastclip.get_total_norm(grads, norm_dtype=torch.float64)
    monkeypatch.setattr(Plain, "finish", None)
    for dtype in (torch.float64, torch.float32, torch.float16, None):
        norm = fastclip.get_total_norm(grads, norm_dtype=dtype)
        assert torch.equal(norm, wide if dtype is torch.float64 else wide.float().to(dtype or torch.bfloat16))


@pytest.mark.parametrize("norm_type", KINDS)
def test_blocks_that_end_the_norm_give_its_bits(norm_type):
    """Each combines the partials in the order in which the launch that does nothing else combines them."""
    # More than one partial for each of 1,024 sums.
    counts = (1, 31, 300, 1100) if norm_type == 2 else (33,)
    for count, wide in itertools.product(counts, (True, False)):
        grads = tiny(count)
        with on_cpu.use(wide=wide):
            norm = fastclip.get_total_norm(grads, norm_type, norm_dtype=torch.float64)
            clipped = fastclip.clip_grad_norm_(parameters(grads), 1.0, norm_type, norm_dtype=torch.float64)
        assert torch.equal(norm, clipped)


@pytest.mark.parametrize("bad", [None, math.inf, math.nan])
@pytest.mark.parametrize("nonfinite", ["propagate", "zero", "sanitize"])
def test_options_in_one_launch_and_in_two(nonfinite, bad):
    """All that a clip carries, by the blocks that scale and by a launch of its own before them."""
    for count, of_its_own in ((20, False), (300, True)):
        grads = tiny(count)
        if bad is not None:
            grads[17][0] = bad
        values = [g.nan_to_num(0.0, 0.0, 0.0) for g in grads] if nonfinite == "sanitize" else twins(grads)
        found_inf, inv_scale = torch.tensor(math.nan), torch.tensor(0.25, dtype=torch.bfloat16)
        options = {"nonfinite": nonfinite, "found_inf": found_inf, "inv_scale": inv_scale}
        on_cpu.launches()
        with on_cpu.use(wide=False):
            norm = fastclip.clip_grad_norm_(parameters(grads), 0.5, norm_dtype=torch.float64, **options)
        assert any(launch.block == 1024 for launch in on_cpu.launches()) == of_its_own
        expected = reference.total_norm(values) * 0.25
        reference.assert_norm(norm, expected, torch.float64)
        assert found_inf.item() == (not math.isfinite(expected))
        if nonfinite == "zero" and not math.isfinite(expected):
            values = [torch.zeros_like(value) for value in values]
        else:
            reference.scale_rounded_(values, reference.clip_coef(norm.item(), 0.5) * 0.25)
        reference.assert_bits(grads, values)


def test_what_overlaps_is_written_in_rounds():
    """No launch writes an element twice, and all that overlaps nothing is written by the first."""
    grads = tiny(300)
    base = torch.randn(100)
    grads += [base[:70], grads[7], base[30:], grads[7], torch.randn(40)[::2]]
    on_cpu.launches()
    fastclip.clip_grad_value_(parameters(grads), 0.01)
    assert [launch.argument_bytes for launch in on_cpu.launches()][1:] == [
        24 + 16 * table for table in (LONG, SHORT, SHORT)
    ]
    fastclip.clip_grad_norm_(parameters(grads), 0.01)
    assert len(on_cpu.launches()) == 3 + 4  # a table and a tensor with holes, the end of the norm, and the same rounds


@pytest.mark.parametrize("program", ["tables", "elements"])
def test_on_paper(program):
    """Tables of more than 2^31 elements; the order of a chunk's addresses, and clamping and squares bit by bit."""
    program = on_cpu.build(program, [on_cpu.HEADERS.parent / f"{program}.cpp"])
    result = subprocess.run([program], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr


def test_what_the_sanitizers_run():
    """A few of the lists of gpu_edges.py; all of them take a GPU's time."""
    made = gpu_edges.lists()
    for name in ("misaligned", "step_two", "same_twice", "only_empties", "255 tensors"):
        tensors = made[name]
        with reference.during(name):
            gpu_edges.check(tensors, torch.device("cpu"), on_cpu.backend())


# Errors


@pytest.mark.parametrize("count", [2, 300])
def test_failing_launches(count, fence):
    """Each is an error that names what failed; nothing is written, and the next call is none the worse."""
    grads = tiny(count)
    before = fence(grads)
    errors = []
    with on_cpu.use(wide=False):
        for calls in itertools.count():
            try:
                with on_cpu.failing(calls):
                    fastclip.clip_grad_norm_(parameters(grads), 0.1)
            except RuntimeError as error:
                errors.append(str(error))
                assert before.unchanged()
            else:
                break
    kernels = ("clip_kernel",) if count == 2 else ("finish_kernel", "scale_kernel")
    failed = ("norm_kernel<squares>", *kernels)
    assert errors == [f"fastclip: {what}: unspecified launch failure" for what in failed]
    assert not before.unchanged()


def test_an_error_says_when_gradients_may_be_partly_written(fence):
    """A launch that fails after others of the same write."""
    for grads, kernel in (
        (tiny(LONG + 1), "scale_kernel"),
        ([torch.randn(5), torch.randn(5)[::2]], "scale_kernel"),
        ([grad := torch.randn(5), grad], "scale_kernel"),
    ):
        errors = []
        for calls in itertools.count():
            before = fence(grads)
            try:
                with on_cpu.failing(calls):
                    fastclip.clip_grads_with_norm_(parameters(grads), 0.5, torch.tensor(1.0, dtype=torch.float64))
            except RuntimeError as error:
                errors.append(str(error))
                assert ("partly written" in errors[-1]) == (not before.unchanged())
            else:
                break
        assert errors[-1] == (
            f"fastclip: {kernel}: unspecified launch failure; 1 launches before it write, so gradients may be partly "
            "written"
        )


def test_what_is_refused(ops, fence):
    half = torch.tensor(0.5, dtype=torch.float64)
    grads = [torch.randn(5), torch.ones(2).half()]
    versions, before = [g._version for g in grads], fence(grads)
    overlapping = torch.ones(1).expand(4)
    for call in (fastclip.clip_grad_norm_, fastclip.clip_grad_value_):
        with pytest.raises((RuntimeError, ValueError), match=r"share memory|single memory location"):
            call(parameters([*grads, overlapping]), 0.1)
    with pytest.raises(RuntimeError, match="clip_value"):
        fastclip.clip_grad_value_(parameters(grads), 1e6)
    for op, rest in ((ops.scale_, (half,)), (ops.clamp_, (-0.1, 0.1)), (ops.clip_grad_norm_, (0.1, 2.0))):
        with pytest.raises(RuntimeError, match=r"tensors\[2\].*single memory location"):
            op([*grads, overlapping], *rest)
    with pytest.raises(RuntimeError, match=r"tensors\[2\]: expected float32"):
        ops.scale_([*grads, torch.ones(2, dtype=torch.int64)], half)
    with pytest.raises(RuntimeError, match=r"tensors\[1\]: value cannot be converted"):
        ops.clamp_(grads, -1e6, 0.1)
    with pytest.raises(RuntimeError, match="clip_coef: expected a 0-dim"):
        ops.scale_(grads, torch.ones(1))
    with pytest.raises(RuntimeError, match="dtype: expected float32"):
        ops.clip_grad_norm_(grads, 0.1, 2.0, dtype=torch.int64)
    assert before.unchanged()
    assert [g._version for g in grads] == versions


# The ops


@pytest.mark.parametrize("name", ["norm_partial", "scale_", "clamp_", "clip_grad_norm_"])
def test_opcheck(ops, name):
    tensors = [torch.randn(5), torch.randn(4, 3).t(), torch.randn(9)[::2], torch.randn(7, dtype=torch.bfloat16)]
    rest, options = arguments(name)[-1]
    checked = torch.library.opcheck(getattr(ops, name).default, (tensors, *rest), options)
    assert set(checked.values()) == {"SUCCESS"}, checked


def test_compile():
    """One graph over every public function, with the bits of the same calls untraced."""
    torch._dynamo.reset()
    ours, theirs = gradients(), gradients()
    results = torch.compile(step, backend="aot_eager", fullgraph=True)(parameters(ours), torch.tensor(2.0))
    reference.assert_bits([*results, *ours], [*step(parameters(theirs), torch.tensor(2.0)), *theirs])
    torch._dynamo.reset()


@pytest.mark.parametrize("coef_dtype", reference.FLOATS)
def test_scale(ops, coef_dtype):
    coef = torch.tensor(0.37, dtype=coef_dtype)
    tensors, expected = tiny(8), tiny(8)
    ops.scale_(tensors, coef)
    reference.scale_rounded_(expected, coef.item())
    reference.assert_bits(tensors, expected)


def test_scale_by_one_writes_nothing(ops, fence):
    """Not even a signaling NaN becomes quiet; 1 is meant in the dtype of the arithmetic."""
    tensors = [poison(70, dtype)[1:] for dtype in reference.FLOATS]
    tensors += [poison(70, dtype)[1::2] for dtype in reference.FLOATS]
    before = fence(tensors)
    ops.scale_(tensors, torch.tensor(1.0, dtype=torch.float64))
    assert before.unchanged()
    ops.scale_([t for t in tensors if t.dtype != torch.float64], torch.tensor(1 - 1e-12, dtype=torch.float64))
    assert before.unchanged()
    ops.scale_([t for t in tensors if t.dtype == torch.float64], torch.tensor(1 - 1e-12, dtype=torch.float64))
    assert not before.unchanged()


def test_of_nothing(ops):
    nothing = [torch.empty(0), torch.empty(3, 0, dtype=torch.bfloat16)]
    for norm_type in KINDS:
        partial = ops.norm_partial(nothing, norm_type)
        assert partial.item() == (math.inf if norm_type == -math.inf else 0)
        assert ops.clip_grad_norm_(nothing, 1.0, norm_type).item() == 0
    ops.clamp_(nothing, -1.0, 1.0)


@pytest.mark.skipif(_ops.read is None, reason="no compiled reader")
def test_plain(ops, fence):
    """The short way in, as for tensors on a GPU: the bits of the op, its errors, and a version step each."""
    ours, theirs = gradients(), gradients()
    expected = [ops.clip_grad_norm_(theirs, 0.7, 2.0, dtype=d) for d in (None, *reference.FLOATS)]
    ops.clamp_(theirs, -0.1, 0.1)
    versions = [g._version for g in ours]
    norms = [fastclip.clip_grad_norm_(parameters(ours), 0.7, norm_dtype=d) for d in (None, *reference.FLOATS)]
    fastclip.clip_grad_value_(parameters(ours), 0.1)
    assert on_cpu.launches()
    reference.assert_bits([*norms, *ours], [*expected, *theirs])
    assert [g._version for g in ours] == [v + 6 for v in versions]
    before = fence(ours)
    with on_cpu.failing(0), pytest.raises(RuntimeError, match=r"norm_kernel<.*squares>: unspecified launch failure"):
        fastclip.clip_grad_norm_(parameters(ours), 0.01)
    with on_cpu.failing(0), pytest.raises(RuntimeError, match="clamp_kernel: unspecified launch failure"):
        fastclip.clip_grad_value_(parameters(ours), 0.01)
    assert before.unchanged()


@pytest.mark.parametrize("call", ["norm", "with norm", "value"])
def test_a_launch_that_fails(ops, call):
    """Each call of CUDA's runtime in turn: all is right, or nothing has changed, or the error says so."""

    def clip(grads):
        made = parameters(grads)
        if call == "norm":
            fastclip.clip_grad_norm_(made, 0.1)
        elif call == "with norm":
            fastclip.clip_grads_with_norm_(made, 0.1, torch.tensor(5.0))
        else:
            fastclip.clip_grad_value_(made, 0.1)

    def make():
        one = torch.linspace(-1, 1, 40)
        return [one, *(torch.full((3,), 0.5 + i) for i in range(20)), torch.ones(9)[::2], one]

    right = make()
    clip(right)
    for calls in itertools.count():
        grads, said = make(), ""
        with on_cpu.failing(calls):
            try:
                clip(grads)
            except RuntimeError as error:
                said = str(error)
        if not said:
            break
        unchanged = all(torch.equal(a, b) for a, b in zip(grads, make(), strict=True))
        assert unchanged or "gradients may be partly written" in said, calls
    assert calls >= 3
    reference.assert_bits(grads, right)
