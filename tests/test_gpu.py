"""The GPU backends on a real device: results, streams, graphs, memory, launches."""

from __future__ import annotations

import ctypes
import itertools
import math
import subprocess
import sys
import threading

import pytest
import torch

import fastclip
import reference
from cases import clone, grid, parameters, poison
from fastclip._dispatch import BACKENDS
from test_clip import MAX_NORMS
from test_norms import promoted
from test_parity import outcome, same, same_tensor
from test_value import CLIP_VALUES

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's and Triton's compilers

if not torch.cuda.is_available():
    pytest.skip("not run on a GPU", allow_module_level=True)

GPU = torch.device("cuda", torch.cuda.current_device())
ENGINES = [name for name in ("cuda", "triton") if fastclip.backends()[name] is None]
# Tensors in one launch of the CUDA backend: the short and the long table (csrc/cuda/chunk_table.h).
SHORT_TABLE, LONG_TABLE = 254, 2040
CYCLES_OF_20_MS = 40_000_000


@pytest.fixture(params=ENGINES)
def engine(request):
    """Force each GPU backend in turn."""
    with fastclip.use_backend(request.param):
        yield request.param


@pytest.fixture(params=[*ENGINES, None], ids=lambda name: name or "unforced")
def choice(request):
    """Force each GPU backend in turn; then none."""
    if request.param is None:
        yield None
    else:
        with fastclip.use_backend(request.param):
            yield request.param


def takes(choice: str | None, tensors) -> bool:
    return choice is None or all(BACKENDS[choice].refuses(t) is None for t in tensors)


def assert_same(ours, theirs) -> None:
    """Check that tensors are equal bit by bit, wherever they are."""
    reference.assert_bits([t.cpu() for t in ours], [t.cpu() for t in theirs])


# Every case against the oracle


@pytest.mark.parametrize(("case", "dtype"), grid())
def test_norm(choice, case, dtype):
    on_cpu = case.make(dtype)
    tensors = clone(on_cpu, GPU)
    if not takes(choice, tensors):
        return
    for norm_type in reference.NORM_TYPES:
        expected = reference.total_norm(on_cpu, norm_type)
        wide = fastclip.get_total_norm(tensors, norm_type, norm_dtype=torch.float64)
        rounded = fastclip.get_total_norm(tensors, norm_type)
        with reference.during(norm_type):
            assert wide.device == rounded.device == GPU
            reference.assert_norm(wide, expected, torch.float64)
            reference.assert_norm(rounded, expected, promoted(on_cpu))


@pytest.mark.parametrize(("case", "dtype"), grid(readonly=False, complexes=False))
def test_clip(choice, case, dtype, fence):
    """The norm of every order, and from the wide norm on every bit; nothing beside the gradients is written."""
    for norm_type in (2.0, 1.0, math.inf, 0.0, 3.0):
        on_cpu = case.make(dtype)
        tensors = clone(on_cpu, GPU)
        if not takes(choice, tensors):
            return
        beside, norm = fence(tensors), reference.total_norm(on_cpu, norm_type)
        max_norm = norm / 3 if 0 < norm < math.inf else 0.5
        wide = fastclip.clip_grad_norm_(parameters(tensors), max_norm, norm_type, norm_dtype=torch.float64)
        reference.scale_rounded_(on_cpu, reference.clip_coef(wide.item(), max_norm))
        with reference.during(norm_type):
            reference.assert_norm(wide, norm, torch.float64)
            assert_same(tensors, on_cpu)
            assert beside.outside_unchanged()


@pytest.mark.parametrize("max_norm", MAX_NORMS)
@pytest.mark.parametrize("dtype", reference.FLOATS)
def test_bounds(choice, max_norm, dtype):
    """Zero, negative and non-finite bounds: the arithmetic of torch, and no bit changes where the factor is 1."""
    on_cpu = [torch.randn(77).to(dtype), torch.tensor([-0.0, 5e-8, math.inf, 1.0], dtype=dtype)]
    for special in (1.0, math.inf, math.nan):
        on_cpu[1][2] = special
        expected, tensors = clone(on_cpu), clone(on_cpu, GPU)
        norm = fastclip.clip_grad_norm_(parameters(tensors), max_norm, norm_dtype=torch.float64)
        reference.scale_rounded_(expected, reference.clip_coef(norm.item(), max_norm))
        with reference.during(special):
            assert_same(tensors, expected)


@pytest.mark.parametrize(("case", "dtype"), grid(readonly=False, complexes=False))
def test_split_pair(choice, case, dtype):
    """Clipping by a norm that is known gives the bits of doing both at once."""
    together, apart = (clone(case.make(dtype), GPU) for _ in range(2))
    if not takes(choice, together):
        return
    norm = fastclip.clip_grad_norm_(parameters(together), 0.7, norm_dtype=torch.float64)
    total_norm = fastclip.get_total_norm(apart, norm_dtype=torch.float64)
    assert total_norm.item() == pytest.approx(norm.item(), rel=3e-16, abs=0, nan_ok=True)
    fastclip.clip_grads_with_norm_(parameters(apart), 0.7, norm)
    assert_same(apart, together)


@pytest.mark.parametrize(("case", "dtype"), grid(readonly=False, complexes=False))
def test_ops_agree_with_the_functions(engine, case, dtype):
    """The op, as a trace calls it, and the short way of plain lists."""
    ours, theirs = (clone(case.make(dtype), GPU) for _ in range(2))
    if not takes(engine, ours):
        return
    norm = BACKENDS[engine].clip_grad_norm_(ours, 0.3, 2.0, dtype=torch.float64)
    expected = fastclip.clip_grad_norm_(parameters(theirs), 0.3, norm_dtype=torch.float64)
    assert_same([norm, *ours], [expected, *theirs])
    BACKENDS[engine].clamp_(ours, -0.01, 0.01)
    fastclip.clip_grad_value_(parameters(theirs), 0.01)
    assert_same(ours, theirs)


@pytest.mark.parametrize(("case", "dtype"), grid(readonly=False, complexes=False))
def test_value(choice, case, dtype, fence):
    for clip_value in CLIP_VALUES:
        on_cpu = case.make(dtype)
        tensors = clone(on_cpu, GPU)
        if not takes(choice, tensors):
            return
        beside = fence(tensors)
        torch.nn.utils.clip_grad_value_(parameters(on_cpu), clip_value)
        fastclip.clip_grad_value_(parameters(tensors), clip_value)
        with reference.during(clip_value):
            assert_same(tensors, on_cpu)
            assert beside.outside_unchanged()


@pytest.mark.skipif("cuda" not in ENGINES, reason=f"backend cuda: {fastclip.backends()['cuda']}")
def test_cuda_backend_takes_every_kernel_case():
    """Also strided ones, with holes: nothing that the compiled CPU kernels take is left to slower ways."""
    for case, dtype in (parameter.values for parameter in grid(readonly=False, complexes=False)):
        assert takes("cuda", clone(case.make(dtype), GPU)), case.name


@pytest.mark.parametrize(
    "count",
    [1, SHORT_TABLE, SHORT_TABLE + 1, LONG_TABLE, LONG_TABLE + 1, LONG_TABLE + SHORT_TABLE, 2 * LONG_TABLE + 1, 10_000],
)
def test_number_of_tensors(choice, count, fence):
    """One table and the next: no tensor is lost or taken twice, all dtypes in turn, poison in between."""
    bases = {dtype: poison(16 * count, dtype) for dtype in reference.FLOATS}
    dtypes = itertools.islice(itertools.cycle(reference.FLOATS), count)
    on_cpu = [bases[dtype][16 * i + i % 3 :][: 1 + i % 9] for i, dtype in enumerate(dtypes)]
    for grad in on_cpu:
        grad.copy_(torch.randn(grad.shape))
    tensors = clone(on_cpu, GPU)
    beside = fence(tensors)
    for norm_type in (2.0, math.inf, 0.0):
        expected = reference.total_norm(on_cpu, norm_type)
        norm = fastclip.clip_grad_norm_(parameters(tensors), expected / 3, norm_type, norm_dtype=torch.float64)
        reference.assert_norm(norm, expected, torch.float64)
        reference.scale_rounded_(on_cpu, reference.clip_coef(norm.item(), expected / 3))
        assert_same(tensors, on_cpu)
    fastclip.clip_grad_value_(parameters(tensors), 0.1)
    assert_same(tensors, reference.clip_by_value(on_cpu, 0.1))
    assert beside.outside_unchanged()


# As torch


@pytest.mark.parametrize("foreach", [None, True, False])
def test_same_as_torch(foreach):
    """Dtype and device of the norm for every mix of two dtypes, complex ones too; the norms are exactly 5."""
    dtypes = [*reference.FLOATS, torch.complex64, torch.complex128]
    for mix in itertools.permutations(dtypes, 2):
        grads = [torch.tensor([3.0, 4.0], device=GPU).to(dtype) for dtype in mix]
        same_tensor(lambda F: F.get_total_norm(grads, foreach=foreach))  # noqa: B023
        same_tensor(lambda F: F.clip_grad_norm_(parameters([g.clone() for g in grads]), 1.0, foreach=foreach))  # noqa: B023


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_error_if_nonfinite(choice, bad, fence):
    grads = [torch.tensor([3.0, bad], device=GPU)]
    before = fence(grads)
    theirs, ours = same(lambda F: F.clip_grad_norm_(parameters(grads), 1.0, error_if_nonfinite=True))
    assert str(ours.error) == str(theirs.error)
    assert before.unchanged()


def test_lists_over_cpu_and_gpu():
    """As torch: one norm, on the device of the first gradient; each gradient where it was."""
    for devices in itertools.product(("cpu", GPU), repeat=3):

        def call(F):
            grads = [torch.full((n,), 2.0, device=d) for n, d in zip((3, 5, 70_000), devices, strict=True)]  # noqa: B023
            return F.clip_grad_norm_(parameters(grads), 1.0), *grads

        theirs, ours = (outcome(call, F).value for F in (torch.nn.utils, fastclip))
        assert [t.device for t in ours] == [t.device for t in theirs]
        torch.testing.assert_close(ours, theirs)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_several_gpus(choice):
    """Whichever is the current device; and a list that is wholly on another one."""
    devices = [torch.device("cuda", i) for i in range(2)]
    for current, mix in itertools.product(devices, (devices, devices[::-1], devices[:1] * 2, devices[1:] * 2)):
        with torch.cuda.device(current):
            ours, theirs = ([torch.full((70_000,), 2.0, device=d) for d in mix] for _ in range(2))
            norm = fastclip.clip_grad_norm_(parameters(ours), 1.0)
            assert norm.device == mix[0]
            assert torch.cuda.current_device() == current.index
            torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(parameters(theirs), 1.0))
            torch.testing.assert_close(ours, theirs)


# The device's own: determinism, streams, graphs, memory, launches


def gradients():
    torch.manual_seed(1)
    return [torch.randn(n, dtype=dtype).to(GPU) for n in (7, 70_000) for dtype in reference.FLOATS]


def clip(made):
    norm = fastclip.clip_grad_norm_(made, 1.0)
    fastclip.clip_grad_value_(made, 0.01)
    return norm


def clipped():
    """What `clip` leaves of fresh gradients: the norm and the gradients."""
    grads = gradients()
    return [clip(parameters(grads)), *grads]


@pytest.mark.parametrize("norm_type", reference.NORM_TYPES)
def test_repeatable(engine, norm_type):
    """The order of every sum depends on shapes only."""
    tensors = [torch.randn(n, device=GPU).to(dtype) for n in (3, 65_537, 10**6) for dtype in reference.FLOATS] * 20
    first = fastclip.get_total_norm(tensors, norm_type, norm_dtype=torch.float64)
    for _ in range(10):
        again = fastclip.get_total_norm(tensors, norm_type, norm_dtype=torch.float64)
        assert again.view(torch.int64).item() == first.view(torch.int64).item()


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
def test_does_not_wait_for_the_device(choice):
    made = parameters(gradients())
    clip(made)
    torch.cuda.set_sync_debug_mode("error")
    try:
        norm = clip(made)
        fastclip.clip_grads_with_norm_(made, 0.5, norm)
        fastclip.get_total_norm([p.grad for p in made], 3.0)
        with pytest.raises(RuntimeError, match="synchronizing"):
            norm.item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_graph(engine):
    """Captured after one warm-up, and replayed over new values in the same memory."""
    made, twins = parameters(gradients()), parameters(gradients())
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        clip(made)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        norm = clip(made)
    for scale in (1.0, 3.0, 1e-4):
        for p, q in zip(made, twins, strict=True):
            p.grad.copy_(torch.randn_like(p.grad) * scale)
            q.grad.copy_(p.grad)
        graph.replay()
        assert_same([norm, *(p.grad for p in made)], [clip(twins), *(q.grad for q in twins)])


def tiny(count: int) -> list[torch.Tensor]:
    base = torch.zeros(count, 12, device=GPU)
    dtypes = itertools.islice(itertools.cycle(reference.FLOATS), count)
    return [base.to(dtype)[i, i % 3 :][: 1 + i % 9] for i, dtype in enumerate(dtypes)]


def with_holes() -> list[torch.Tensor]:
    return [torch.zeros(300, 701, device=GPU)[:, 1::2], torch.zeros(70_001, device=GPU, dtype=torch.bfloat16)[::3]]


def overlapping() -> list[torch.Tensor]:
    base, once = torch.zeros(70_100, device=GPU), torch.zeros(40, device=GPU)
    return [base[:70_070], base[70_030:], once, base[5:9], once]


LISTS = {
    **{f"{count} tensors": lambda count=count: tiny(count) for count in (255, LONG_TABLE + 1, 10_000)},
    "with holes": with_holes,
    "overlapping": overlapping,
}


def captured(call):
    """Capture a call, without a warm-up of its own; returns the graph and what the call returned."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        returned = call()
    return graph, returned


def fill(generator: torch.Generator, *lists: list[torch.Tensor]) -> None:
    """Give the lists the same new values."""
    for tensors in zip(*lists, strict=True):
        values = torch.randn(tensors[0].shape, generator=generator).to(GPU)
        for tensor in tensors:
            tensor.copy_(values)


@pytest.mark.parametrize("norm_type", [2.0, 0.0])
@pytest.mark.parametrize("name", LISTS)
def test_graph_of(engine, name, norm_type):
    """32 KB of arguments in a node, lists of several tables, fills, tensors with holes, and writes in rounds."""

    def both(made):
        norm = fastclip.clip_grad_norm_(made, 0.7, norm_type, norm_dtype=torch.float64)
        fastclip.clip_grad_value_(made, 0.01)
        return norm

    ours, theirs = LISTS[name](), LISTS[name]()
    made, twins = parameters(ours), parameters(theirs)
    both(made), both(twins)  # the kernels are loaded
    torch.cuda.synchronize()
    graph, norm = captured(lambda: both(made))
    generator = torch.Generator().manual_seed(1)
    for _ in range(2):
        fill(generator, ours, theirs)
        graph.replay()
        assert_same([norm, *ours], [both(twins), *theirs])


@pytest.mark.parametrize("nonfinite", ["propagate", "zero", "sanitize"])
def test_graph_with_options(engine, nonfinite):
    """What a clip carries is read and written by every replay."""
    ours, theirs = tiny(300), tiny(300)
    made, twins = parameters(ours), parameters(theirs)
    numbers = [torch.zeros((), device=GPU) for _ in range(4)]

    def clip_with(made, found_inf, inv_scale):
        options = {"nonfinite": nonfinite, "found_inf": found_inf, "inv_scale": inv_scale, "norm_dtype": torch.float64}
        return fastclip.clip_grad_norm_(made, 0.7, **options)

    clip_with(made, *numbers[:2]), clip_with(twins, *numbers[2:])
    torch.cuda.synchronize()
    graph, norm = captured(lambda: clip_with(made, *numbers[:2]))
    generator = torch.Generator().manual_seed(1)
    for inv_scale, bad in ((0.5, None), (0.25, math.inf), (2.0, math.nan)):
        fill(generator, ours, theirs)
        for tensors in (ours, theirs):
            if bad is not None:
                tensors[77][0] = bad
        for number in (numbers[1], numbers[3]):
            number.fill_(inv_scale)
        graph.replay()
        assert_same([norm, numbers[0], *ours], [clip_with(twins, *numbers[2:]), numbers[2], *theirs])


FIRST_IN_A_GRAPH = """
import torch, fastclip
made = [torch.nn.Parameter(torch.zeros(5, device="cuda")) for _ in range(300)]
for p in made:
    p.grad = torch.full((5,), 2.0, device="cuda")
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
try:
    with torch.cuda.graph(graph):
        norm = fastclip.clip_grad_norm_(made, 1.0)
except RuntimeError as error:
    print("refused:", error)
else:
    graph.replay()
    factor = made[7].grad[0].item() * 1500**0.5
    print("right" if abs(norm.item() - 2 * 1500**0.5) < 1e-3 and abs(factor - 1) < 1e-4 else "wrong")
"""


def test_graph_without_a_warm_up():
    """The first call of a process is captured: it is right, or says so before the graph is used."""
    command = [sys.executable, "-c", FIRST_IN_A_GRAPH]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(("right", "refused: ")), result.stdout


def test_two_threads_on_two_streams(engine):
    """Each has its own lists; neither sees the other's."""
    expected = [clipped() for _ in range(2)]
    found, errors = [None, None], []

    def work(which: int) -> None:
        try:
            with fastclip.use_backend(engine), torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(20):
                    made = parameters([value.to(GPU) for value in values])
                    norm = clip(made)
                found[which] = [norm, *(p.grad for p in made)]
                torch.cuda.current_stream().synchronize()
        except BaseException as error:  # it is raised below
            errors.append(error)

    values = [value.cpu() for value in gradients()]
    threads = [threading.Thread(target=work, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for ours, theirs in zip(found, expected, strict=True):
        assert_same(ours, theirs)


def test_beside_another_kernel(engine):
    """Blocks that come late, because others fill the device, change no bit."""
    expected = clipped()
    other = torch.cuda.Stream()
    factors = [torch.randn(4096, 4096, device=GPU) for _ in range(2)]
    torch.cuda.synchronize()
    with torch.cuda.stream(other):
        for _ in range(20):
            torch.mm(*factors)
    results = [clipped() for _ in range(5)]
    torch.cuda.synchronize()
    for result in results:
        assert_same(result, expected)


def test_current_stream(engine):
    """Gradients that are not there yet: a kernel on another stream, or a host that waits, would show."""
    expected, values = clipped(), gradients()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        grads = [torch.full_like(v, math.nan) for v in values]
        made = parameters(grads)
        clip(made)
        torch.cuda.synchronize()
        torch.cuda._sleep(5 * CYCLES_OF_20_MS)
        for grad, value in zip(grads, values, strict=True):
            grad.copy_(value)
        norm = clip(made)
        assert not stream.query()
    torch.cuda.synchronize()
    assert_same([norm, *grads], expected)


def test_memory_is_freed_and_used_again(engine):
    """Right after the call, before its kernels start: the gradients' by the same stream, none by another."""
    expected, values = clipped(), gradients()
    sizes = [1, 2, 8, 64, 70_000]
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    for _ in range(3):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(CYCLES_OF_20_MS)
            grads = [value.clone() for value in values]
            norm = clip(parameters(grads))
            kept = [grad.clone() for grad in grads]
            del grads
            again = [torch.full((n,), math.nan, device=GPU, dtype=d) for n in sizes for d in reference.FLOATS]
        others = [torch.full((n,), math.nan, device=GPU, dtype=torch.float64) for n in sizes * 4]
        torch.cuda.synchronize()
        assert_same([norm, *kept], expected)
        del again, others


def test_memory_of_a_call(engine):
    """The result, and 8 bytes for each chunk of 65,536 elements or smaller tensor; a table where one is needed."""
    made = parameters([torch.randn(1 << 20, device=GPU) for _ in range(64)])
    fastclip.clip_grad_norm_(made, 1.0)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    norm = fastclip.clip_grad_norm_(made, 1.0)
    assert torch.cuda.memory_allocated() - before <= 512  # one block of the allocator
    assert torch.cuda.max_memory_allocated() - before <= 8 * 16 * 64 + 8192
    del norm


def launches(call) -> list[str]:
    """The names of what a call puts on the device."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    on_device = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return [name for name in on_device if "Sync" not in name]


def nodes(call) -> list[int]:
    """The kinds of what a call puts on the device, from a graph of it: 0 for a kernel, 1 a copy, 2 a fill.

    The profiler watches ops, and so is given another way than plain calls take.
    """
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        call()
    driver, count = ctypes.CDLL("libcuda.so.1"), ctypes.c_size_t()
    handle = ctypes.c_void_p(graph.raw_cuda_graph())
    assert driver.cuGraphGetNodes(handle, None, ctypes.byref(count)) == 0
    found, kind = (ctypes.c_void_p * count.value)(), ctypes.c_int()
    assert driver.cuGraphGetNodes(handle, found, ctypes.byref(count)) == 0
    kinds = []
    for node in found:
        assert driver.cuGraphNodeGetType(ctypes.c_void_p(node), ctypes.byref(kind)) == 0
        kinds.append(kind.value)
    return kinds


ONLY_CUDA = pytest.mark.skipif("cuda" not in ENGINES, reason=f"backend cuda: {fastclip.backends()['cuda']}")


@ONLY_CUDA
@pytest.mark.filterwarnings("ignore")  # of the profiler
@pytest.mark.parametrize("count", [1, SHORT_TABLE + 1, LONG_TABLE, LONG_TABLE + 1, 10_000])
def test_launches(count):
    """Two where the partials are few, else three, and two for each further table; nothing is copied or filled."""
    tables = -(-count // LONG_TABLE)
    values = torch.randn(count, 8, device=GPU)
    made, norm = parameters([v if i % 2 else v.bfloat16() for i, v in enumerate(values)]), torch.ones((), device=GPU)
    with fastclip.use_backend("cuda"):
        by_norm = nodes(lambda: fastclip.clip_grad_norm_(made, 1.0))
        by_value = nodes(lambda: fastclip.clip_grad_value_(made, 0.5))
        by_known = nodes(lambda: fastclip.clip_grads_with_norm_(made, 0.5, norm))
        total = nodes(lambda: fastclip.get_total_norm([p.grad for p in made]))
        by_ops = launches(lambda: fastclip.clip_grad_norm_(made, 1.0))
    assert by_norm in ([0] * (2 * tables), [0] * (2 * tables + 1))
    assert count > 256 or by_norm == [0, 0]
    assert by_value == by_known == [0] * tables
    assert total == [0] * (tables + 1)
    assert len(by_ops) == len(by_norm), by_ops


@ONLY_CUDA
def test_launches_of_torch():
    """What the fewer launches are compared with: printed with -s, and in the junit file."""
    made = parameters([torch.randn(64, 64, device=GPU) for _ in range(1000)])
    names = launches(lambda: torch.nn.utils.clip_grad_norm_(made, 1.0, foreach=True))
    print(f"torch {torch.__version__}, 1,000 x 64 x 64: {len(names)} launches")
    assert len(names) > 3


# The ops as PyTorch sees them

OPS = {
    "norm_partial": [((2.0,), {}), ((math.inf,), {}), ((0.0,), {})],
    "scale_": [((torch.tensor(0.5, dtype=torch.float64, device=GPU),), {})],
    "clamp_": [((-0.1, 0.1), {})],
    "clip_grad_norm_": [((0.1, 2.0), {}), ((0.1, math.inf), {"dtype": torch.float64})],
}


@pytest.mark.parametrize("name", OPS)
def test_opcheck(engine, name):
    """Schema and aliasing, autograd registration, fake kernel, AOT dispatch with fixed and dynamic shapes."""
    for rest, options in OPS[name]:
        for tensors in (
            [torch.randn(5, device=GPU), torch.randn(3, 4, device=GPU)],
            [torch.randn(5, device=GPU, dtype=d) for d in reference.FLOATS],
            [torch.randn(5, device=GPU, requires_grad=True)],
        ):
            checked = torch.library.opcheck(getattr(BACKENDS[engine], name), (tensors, *rest), options)
            assert set(checked.values()) == {"SUCCESS"}


@pytest.mark.filterwarnings("ignore")  # of torch, in its own compilers
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile(choice, compiler):
    ours = gradients()
    torch._dynamo.reset()
    norm = torch.compile(clip, backend=compiler, fullgraph=True)(parameters(ours))
    assert_same([norm, *ours], clipped())
    torch._dynamo.reset()


@pytest.mark.parametrize("max_norm", [0.1, 1e9])
def test_version_counters(choice, max_norm):
    """One step per gradient, also when nothing is clipped; none for a norm."""
    grads = [torch.randn(3, device=GPU), torch.randn(4, 4, device=GPU).t(), torch.randn(5, device=GPU).bfloat16()]
    made, versions = parameters(grads), [g._version for g in grads]
    fastclip.get_total_norm(grads)
    assert [g._version for g in grads] == versions
    norm = fastclip.clip_grad_norm_(made, max_norm)
    fastclip.clip_grads_with_norm_(made, max_norm, norm)
    fastclip.clip_grad_value_(made, 1e9)
    assert all(v + 3 <= g._version <= v + 4 for g, v in zip(grads, versions, strict=True))


# Sizes that do not fit 32 bits


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_more_elements_than_32_bits_count(engine, dtype):
    grad = torch.zeros(2**31 + 77, dtype=dtype, device=GPU)
    grad[-1], grad[2**31], grad[0] = 4.0, 12.0, 3.0
    assert fastclip.clip_grad_norm_(parameters([grad]), 6.5, norm_dtype=torch.float64).item() == 13
    assert [grad[i].item() for i in (-1, 2**31, 0)] == pytest.approx([2.0, 6.0, 1.5], rel=1e-6)
    fastclip.clip_grad_value_(parameters([grad]), 1.75)
    assert grad[-1].item() == grad[2**31].item() == 1.75
    assert grad.count_nonzero().item() == 3
    grad.fill_(1)
    norm = fastclip.clip_grad_norm_(parameters([grad]), 1.0, norm_dtype=torch.float64).item()
    assert norm == pytest.approx(math.sqrt(2**31 + 77), rel=reference.WIDE)
    factor = torch.tensor(reference.clip_coef(norm, 1.0), dtype=torch.float32).to(dtype).item()
    assert grad.min().item() == grad.max().item() == factor


@pytest.mark.slow
def test_strides_beyond_32_bits():
    base = torch.empty(2**31 + 2**30 + 77, dtype=torch.bfloat16, device=GPU)
    view = base.as_strided((2, 2), (2**31 + 40, 2**30))
    view.copy_(torch.tensor([[1.0, -2.0], [2.0, 4.0]]))
    assert fastclip.get_total_norm([view]).item() == 5
    fastclip.clip_grad_norm_(parameters([view]), 2.5)
    assert view.flatten().tolist() == [0.5, -1.0, 1.0, 2.0]
    fastclip.clip_grad_value_(parameters([view]), 0.75)
    assert view.flatten().tolist() == [0.5, -0.75, 0.75, 0.75]


# What a clip carries, and the step around it


@pytest.mark.parametrize("bad", [None, math.inf, math.nan])
@pytest.mark.parametrize("nonfinite", ["propagate", "zero", "sanitize"])
def test_policies_without_a_wait(engine, nonfinite, bad):
    values = [torch.randn(70_001), torch.randn(5, dtype=torch.bfloat16), torch.randn(300, dtype=torch.float64)]
    if bad is not None:
        values[0][65_540] = bad
    grads, found_inf = [value.to(GPU) for value in values], torch.full((), math.nan, device=GPU)
    inv_scale = torch.tensor(0.25, device=GPU)
    torch.cuda.set_sync_debug_mode("error")
    try:
        norm = fastclip.clip_grad_norm_(
            parameters(grads),
            0.5,
            nonfinite=nonfinite,
            found_inf=found_inf,
            inv_scale=inv_scale,
            norm_dtype=torch.float64,
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    if nonfinite == "sanitize":
        values = [value.masked_fill(~value.isfinite(), 0.0) for value in values]
    expected = reference.total_norm(values) * 0.25
    reference.assert_norm(norm.cpu(), expected, torch.float64)
    assert found_inf.item() == (not math.isfinite(expected))
    if nonfinite == "zero" and not math.isfinite(expected):
        values = [torch.zeros_like(value) for value in values]
    else:
        reference.scale_rounded_(values, reference.clip_coef(norm.item(), 0.5) * 0.25)
    assert_same(grads, values)


def _steps(count: int, hook: dict | None, bad: tuple[int, ...] = ()):
    """AdamW's parameters after so many steps, clipped by hand where there is no hook."""
    generator = torch.Generator().manual_seed(1)
    made = [torch.nn.Parameter(torch.randn(n, generator=generator).to(GPU)) for n in (1000, 17)]
    optimizer = torch.optim.AdamW(made, lr=0.01, fused=True)
    handle = None if hook is None else fastclip.clip_on_step(optimizer, 1.0, **hook)
    for step in range(count):
        for p in made:
            p.grad = torch.randn(p.shape, generator=generator).to(GPU)
        if step in bad:
            made[1].grad[3] = math.nan
            if hook is None:
                continue
        if hook is None:
            torch.nn.utils.clip_grad_norm_(made, 1.0)
        optimizer.step()
    return [p.detach().cpu() for p in made], handle


@pytest.mark.parametrize("defer", ["auto", True, False])
def test_a_fused_step_is_clipped_and_skipped_on_the_device(defer):
    ours, handle = _steps(20, {"nonfinite": "skip", "defer": defer}, bad=(3, 4, 11))
    theirs, _ = _steps(20, None, bad=(3, 4, 11))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert handle.skipped_steps.item() == 3
    assert handle.skipped_steps.device == GPU


def test_max_skips_arrives():
    generator = torch.Generator().manual_seed(1)
    weight = torch.nn.Parameter(torch.randn(8, generator=generator).to(GPU))
    optimizer = torch.optim.AdamW([weight], fused=True)
    fastclip.clip_on_step(optimizer, 1.0, nonfinite="skip", max_skips=2)

    def train():
        for _ in range(5):
            weight.grad = torch.full_like(weight, math.nan)
            optimizer.step()
            torch.cuda.synchronize()

    with pytest.raises(RuntimeError, match=r"max_skips: at step \d+, \d+ steps in a row"):
        train()


@pytest.mark.parametrize("defer", ["auto", True, False])
def test_a_graph_of_clip_and_step(defer):
    """Captured once, replayed with other gradients: the weights of the same steps one by one."""

    def run(captured: bool):
        generator = torch.Generator().manual_seed(1)
        weight = torch.nn.Parameter(torch.randn(1000, generator=generator).to(GPU))
        weight.grad = torch.zeros_like(weight)
        optimizer = torch.optim.AdamW([weight], lr=0.01, fused=True, capturable=True)
        fastclip.clip_on_step(optimizer, 1.0, nonfinite="skip", defer=defer)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            optimizer.step()  # state and memory are there
        torch.cuda.current_stream().wait_stream(stream)
        step = optimizer.step
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                optimizer.step()
            step = graph.replay
        for _ in range(10):
            weight.grad.copy_(torch.randn(1000, generator=generator))
            step()
        return weight.detach().cpu()

    torch.testing.assert_close(run(True), run(False), rtol=1e-6, atol=0)
