"""Named gradient lists and why each is there; every tensor lies between guard bands of poison."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch

from fastclip.backends.triton_ import CHUNK
from reference import FLOATS, LOW

GUARD = 64  # elements: every view starts 64-byte aligned when its own offset is 0


class Case(NamedTuple):
    """A gradient list: `build(dtype, generator)` makes fresh tensors, the same numbers each time."""

    name: str
    reason: str
    build: Callable[[torch.dtype, torch.Generator], list[torch.Tensor]]
    dtypes: tuple[torch.dtype, ...] = FLOATS
    aliased: bool = False  # some element is in the list more than once
    kernel: bool = True  # the cpu backend has to take it itself
    readonly: bool = False

    def make(self, dtype: torch.dtype) -> list[torch.Tensor]:
        """Return fresh tensors; those that share storage do so in every copy."""
        return clone(_master(self, dtype))


@functools.cache
def _master(case: Case, dtype: torch.dtype) -> list[torch.Tensor]:
    return case.build(dtype, torch.Generator().manual_seed(1234))


def clone(tensors: list[torch.Tensor], device: torch.device | None = None) -> list[torch.Tensor]:
    """Copy whole CPU storages, guard bands included, to a device, and take the same views of them."""
    storages: dict[tuple, torch.Tensor] = {}
    same: dict[int, torch.Tensor] = {}
    for t in tensors:
        key = t.untyped_storage().data_ptr(), t.dtype
        if key not in storages:
            storages[key] = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage()).to(device, copy=True)
        if id(t) not in same:
            same[id(t)] = storages[key].as_strided(t.shape, t.stride(), t.storage_offset())
    return [same[id(t)] for t in tensors]


CASES: list[Case] = []


def case(reason: str, **options):
    """Register a builder under its own name."""

    def register(build):
        CASES.append(Case(build.__name__, reason, build, **options))
        return build

    return register


_SIGNALING_NAN = {
    torch.float32: (torch.int32, 0x7FA00000),
    torch.float64: (torch.int64, 0x7FF4 << 48),
    torch.bfloat16: (torch.int16, 0x7FA0),
    torch.float16: (torch.int16, 0x7D00),
}


def poison(size: int, dtype: torch.dtype) -> torch.Tensor:
    """Return memory that shows a stray read in any norm, and a stray write in its bytes, be it scaled or clamped."""
    if dtype.is_complex:
        return torch.view_as_complex(poison(2 * size, dtype.to_real()).view(-1, 2))
    memory = torch.full((size,), torch.finfo(dtype).max / 2, dtype=dtype)
    bits, signaling = _SIGNALING_NAN[dtype]  # any arithmetic makes it quiet, so that its bytes change
    memory.view(bits)[1::2] = signaling
    return memory


def place(values: torch.Tensor, offset: int = 0) -> torch.Tensor:
    """Return `values` as a contiguous view, `offset` elements into poisoned memory that goes on behind it."""
    base = poison(values.numel() + 2 * GUARD + offset, values.dtype)
    view = base[GUARD + offset :][: values.numel()].view(values.shape)
    return view.copy_(values)


def random(generator, dtype, *shape, offset: int = 0) -> torch.Tensor:
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return place(torch.randn(shape, dtype=wide, generator=generator).to(dtype), offset)


@case("no dimension, one element")
def zero_dim(dtype, gen):
    return [random(gen, dtype)]


@case("a single element: no vector, only a tail")
def one_element(dtype, gen):
    return [random(gen, dtype, 1)]


@case("around every vector width of 16, 32 and 64 bytes, unrolled up to 4 times, and its tails")
def vector_widths(dtype, gen):
    return [random(gen, dtype, n) for w in (4, 8, 16, 32, 64, 128) for n in (w - 1, w, w + 1)]


@case("one element less than a chunk")
def chunk_minus_one(dtype, gen):
    return [random(gen, dtype, CHUNK - 1)]


@case("exactly one chunk")
def chunk_exact(dtype, gen):
    return [random(gen, dtype, CHUNK)]


@case("a second chunk of one element")
def chunk_plus_one(dtype, gen):
    return [random(gen, dtype, CHUNK + 1)]


@case("three chunks and an odd tail beside a small tensor: the combine order, and threads with unequal work")
def chunks_with_tail(dtype, gen):
    return [random(gen, dtype, 3), random(gen, dtype, 2 * CHUNK + 77), random(gen, dtype, 5, 7)]


@case("starts at every element offset within a vector: loads that are not aligned, heads and tails together")
def misaligned(dtype, gen):
    return [random(gen, dtype, 61 + k, offset=k) for k in range(1, 16)]


@case("a chunk that starts misaligned")
def misaligned_chunk(dtype, gen):
    return [random(gen, dtype, CHUNK + 3, offset=1), random(gen, dtype, CHUNK - 3, offset=7)]


@case("transposed: dense, but not contiguous")
def transposed(dtype, gen):
    return [random(gen, dtype, 33, 17).t(), random(gen, dtype, 1, 9).t()]


@case("columns of a wider matrix: holes between the rows")
def sliced_columns(dtype, gen):
    return [random(gen, dtype, 19, 40)[:, 3:26], random(gen, dtype, 19, 40)[:, 5]]


@case("every second element, also after transposing and over more than one chunk")
def step_two(dtype, gen):
    return [random(gen, dtype, 75)[::2], random(gen, dtype, 30, 21).t()[::2], random(gen, dtype, 2 * CHUNK + 11)[1::2]]


@case("channels_last, as convolution gradients are")
def channels_last(dtype, gen):
    return [
        random(gen, dtype, 4, 6, 5, 3).permute(0, 3, 1, 2),
        random(gen, dtype, 3, 2, 2, 2, 2).permute(0, 4, 1, 2, 3),
    ]


@case("permuted 3-D, dense and with holes, more than one inner run")
def permuted(dtype, gen):
    return [random(gen, dtype, 7, 5, 11).permute(2, 0, 1), random(gen, dtype, 9, 8, 10)[1:, ::3, 2:].permute(1, 2, 0)]


@case("a strided view longer than a chunk: chunk boundaries inside rows")
def strided_chunks(dtype, gen):
    return [random(gen, dtype, 300, 401)[:, :397].t()]


@case("strides of dimensions of size 1 mean nothing, even 0")
def size_one_strides(dtype, gen):
    column = random(gen, dtype, 9)
    return [
        column.as_strided((9, 1), (1, 0)),
        random(gen, dtype, 1).expand(1),
        random(gen, dtype, 6)[2:3].as_strided((1, 1), (7, 99)),
    ]


@case("expanded: stride 0, may be read but not written", readonly=True)
def expanded(dtype, gen):
    return [random(gen, dtype, 1).expand(37), random(gen, dtype, 5, 1).expand(5, 8), random(gen, dtype, 4)]


@case("empty tensors first, between and last; a kernel that counts launches loses its neighbours")
def with_empties(dtype, gen):
    empty = torch.empty(0, dtype=dtype)
    return [
        empty,
        random(gen, dtype, 5),
        random(gen, dtype, 3, 0, 2),
        random(gen, dtype, 66),
        torch.empty(0, 4, dtype=dtype),
    ]


@case("nothing but empty tensors")
def only_empties(dtype, gen):
    return [torch.empty(0, dtype=dtype), torch.empty(3, 0, dtype=dtype)]


@case("one zero tensor: norm 0, the factor is max_norm / 1e-6 clamped; 0 ** -1 is inf")
def all_zero(dtype, gen):
    return [place(torch.zeros(40, dtype=dtype)), place(torch.tensor([0.0, -0.0], dtype=dtype))]


@case("hundreds of tiny tensors, more than one launch or table of any implementation; poison in between")
def many_tiny(dtype, gen):
    base = poison(3_100, dtype)
    grads = [base[12 * i + i % 3 :][: 1 + i % 9] for i in range(250)]
    for grad in grads:
        grad.copy_(torch.randn(grad.shape, dtype=torch.float64, generator=gen))
    return grads


@case("every float dtype in one list, each with its own opmath", dtypes=(torch.float32,))
def mixed_dtypes(dtype, gen):
    return [random(gen, d, 10 + 37 * i, offset=i) for i, d in enumerate(2 * FLOATS)]


@case("bf16 beside fp16: promoted to float32, which neither is", dtypes=(torch.float32,))
def mixed_low(dtype, gen):
    return [random(gen, torch.bfloat16, 70), random(gen, torch.float16, 41), random(gen, torch.bfloat16, 3)]


@case("two views of one buffer that share their middle: the shared part is counted and scaled twice", aliased=True)
def overlapping(dtype, gen):
    base = random(gen, dtype, 100)
    return [base[:70], random(gen, dtype, 9), base[30:]]


@case("a buffer and its transpose: overlap without equal strides", aliased=True)
def overlapping_strided(dtype, gen):
    base = random(gen, dtype, 12, 12)
    return [base, base.t(), base[3:6, ::2]]


@case("views that interleave or touch and share no element: each scaled once")
def interleaved(dtype, gen):
    base, rows = random(gen, dtype, 90), random(gen, dtype, 8, 10)
    return [base[::2], base[1::2], rows[:, :4], rows[:, 4:]]


@case("the same tensor twice (tied weights listed twice): counted and scaled twice", aliased=True)
def same_twice(dtype, gen):
    grad = random(gen, dtype, 50)
    return [grad, random(gen, dtype, 3), grad]


@case("the same large tensor three times: two threads must not meet in it", aliased=True)
def same_large(dtype, gen):
    grad = random(gen, dtype, 2 * CHUNK + 5)
    return [grad, grad, grad]


@case("values whose squares overflow float32 in an otherwise ordinary list", dtypes=(torch.float32, torch.bfloat16))
def huge(dtype, gen):
    return [place((torch.randn(70, generator=gen) * 1e20).to(dtype)), random(gen, dtype, 70)]


@case("values near the top of float32: the norm still fits", dtypes=(torch.float32, torch.bfloat16))
def huger(dtype, gen):
    return [place((torch.rand(200, generator=gen) * 1e30).to(dtype)), random(gen, dtype, 3)]


@case("values whose squares underflow float32", dtypes=(torch.float32, torch.bfloat16))
def small(dtype, gen):
    return [
        place((torch.randn(70, generator=gen) * 1e-25).to(dtype)),
        place((torch.randn(7, generator=gen) * 1e-24).to(dtype)),
    ]


@case("subnormals, products included: nothing is flushed to zero", dtypes=(torch.float32, *LOW))
def subnormal(dtype, gen):
    tiny = torch.finfo(dtype).smallest_normal
    return [
        place((torch.randn(90, dtype=torch.float64, generator=gen) * 0.3 * tiny).to(dtype)),
        place(torch.full((5,), tiny, dtype=dtype)),
    ]


@case("fp16 close to its largest number: the norm does not fit, the gradients do", dtypes=(torch.float16,))
def half_near_max(dtype, gen):
    return [
        place(torch.tensor([65504.0, -65504.0, 60000.0, 1.0, 0.5], dtype=dtype)),
        place(torch.full((40,), 3e4, dtype=dtype)),
    ]


def _with(dtype, gen, special: float, n: int = 70) -> list[torch.Tensor]:
    """Put `special` first in one tensor, last in another (the tail) and in the middle of a third."""
    out = []
    for at in (0, n - 1, n // 2):
        grad = random(gen, dtype, n)
        grad[at] = special
        out.append(grad)
    return [random(gen, dtype, 20), *out, random(gen, dtype, 20)]


@case("NaN at the start, in the middle and in the tail: a plain max loses it")
def nan(dtype, gen):
    return _with(dtype, gen, math.nan)


@case("a single NaN as the first element, larger ones after it")
def nan_first(dtype, gen):
    grad = random(gen, dtype, 200)
    grad[0] = math.nan
    return [grad, random(gen, dtype, 90)]


@case("a single NaN in a tail of one element")
def nan_tail(dtype, gen):
    grad = random(gen, dtype, 65)
    grad[-1] = math.nan
    return [random(gen, dtype, 90), grad]


@case("inf in one gradient: coefficient 0, 0 * inf is NaN")
def inf(dtype, gen):
    return _with(dtype, gen, math.inf)


@case("-inf in one gradient")
def minus_inf(dtype, gen):
    return _with(dtype, gen, -math.inf)


@case("inf and NaN together, in different tensors")
def inf_and_nan(dtype, gen):
    return [*_with(dtype, gen, math.inf), *_with(dtype, gen, math.nan)]


@case("zeros of both signs among numbers: -0.0 stays -0.0")
def signed_zeros(dtype, gen):
    return [place(torch.tensor([-0.0, 0.0, 1.5, -2.0] * 9, dtype=dtype)), place(torch.tensor(-0.0, dtype=dtype))]


@case("complex gradients: norm of the magnitudes", dtypes=(torch.complex64, torch.complex128), kernel=False)
def complex_numbers(dtype, gen):
    return [random(gen, dtype, 30), random(gen, dtype, 4, 5).t()]


def grid(*, readonly: bool = True, complexes: bool = True) -> list:
    """Return pytest parameters (case, dtype)."""
    return [
        pytest.param(one, dtype, id=f"{one.name}-{str(dtype).removeprefix('torch.')}")
        for one in CASES
        if (readonly or not one.readonly) and (complexes or one.kernel)
        for dtype in one.dtypes
    ]


def in_turn(values: Sequence, case: Case, dtype: torch.dtype, count: int = 1) -> list:
    """Return `count` of the values, which the dtypes of a case share out among them; the next case starts one later."""
    first = CASES.index(case) + count * case.dtypes.index(dtype)
    return [values[(first + i) % len(values)] for i in range(count)]


class Own(torch.Tensor):
    """A subclass, which torch's functions take."""


def parameters(grads) -> list[torch.nn.Parameter]:
    """Return parameters whose `.grad` are exactly these tensors."""
    made: list[torch.nn.Parameter] = []
    for grad in grads:
        like = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
        parameter = torch.nn.Parameter(like, requires_grad=grad.is_floating_point() or grad.is_complex())
        parameter.grad = grad
        made.append(parameter)
    return made
