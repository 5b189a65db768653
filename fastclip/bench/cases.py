"""The cases, gradient lists with the shapes of real models, and the regimes: which call with which bound."""

from dataclasses import dataclass

import torch

TensorSpec = tuple[tuple[int, ...], torch.dtype]

_GIB = 1 << 30
_FP32, _BF16 = torch.float32, torch.bfloat16


@dataclass(frozen=True)
class Case:
    """A named gradient list: one (shape, dtype) per parameter."""

    name: str
    what: str
    tensors: tuple[TensorSpec, ...]

    @property
    def elements(self) -> int:
        return sum(torch.Size(shape).numel() for shape, _ in self.tensors)

    @property
    def bytes(self) -> int:
        return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in self.tensors)


@dataclass(frozen=True)
class Regime:
    """One call and one bound; `passes` is how many times all bytes must cross memory, the floor of that call.

    `over` is what the function takes: parameters, their gradients, or parameters whose values have memory, too.
    """

    name: str
    what: str
    function: str
    bound: float | None
    passes: int
    writes: bool = False
    over: str = "parameters"

    @property
    def returns_norm(self) -> bool:
        return self.function in ("clip_grad_norm_", "get_total_norm")

    def arguments(self, total_norm: float) -> tuple[float, ...]:
        """The arguments after the tensors; a bound of the total norm is relative to it, all others are absolute."""
        if self.bound is None:
            return ()
        return (self.bound * total_norm if self.returns_norm else self.bound,)


# The gradients are standard normal: nothing exceeds 100, and 32 % exceed 1, so that every cache line has to be written.
# 0.3 is far enough from 1 that torch clips, too, where its norm is 29 % low.
REGIMES = (
    Regime("total-norm", "norm alone", "get_total_norm", None, 1, over="grads"),
    Regime("norm-noop", "by norm, not clipping", "clip_grad_norm_", 2.0, 1),
    Regime("norm-clip", "by norm, clipping", "clip_grad_norm_", 0.3, 3, writes=True),
    Regime("value-noop", "by value, not clipping", "clip_grad_value_", 100.0, 1),
    Regime("value-clip", "by value, clipping", "clip_grad_value_", 1.0, 2, writes=True),
)
# Run where they are named. No tensor has a norm of 1e6; each, and each row of one, is about as long as its weight. A
# row is written while it is in the cache.
EACH = (
    Regime("each-norm", "the norm of each tensor", "get_tensor_norms", None, 1, over="grads"),
    Regime("each-noop", "each by its own norm, not clipping", "clip_by_norm_", 1e6, 1, over="grads"),
    Regime("each-clip", "each by its own norm, clipping", "clip_by_norm_", 1e-3, 3, writes=True, over="grads"),
    Regime("unit-noop", "adaptive, not clipping", "adaptive_clip_grad_", 100.0, 2, over="weights"),
    Regime("unit-clip", "adaptive, clipping", "adaptive_clip_grad_", 1e-3, 3, writes=True, over="weights"),
)


def _specs(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> tuple[TensorSpec, ...]:
    return tuple((shape, dtype) for shape in shapes)


def _gpt2() -> list[tuple[int, ...]]:
    d = 768
    block = [(d,), (d,), (3 * d, d), (3 * d,), (d, d), (d,), (d,), (d,), (4 * d, d), (4 * d,), (d, 4 * d), (d,)]
    return [(50257, d), (1024, d), *block * 12, (d,), (d,)]


def _resnet50() -> list[tuple[int, ...]]:
    def conv_bn(out: int, inp: int, k: int) -> list[tuple[int, ...]]:
        return [(out, inp, k, k), (out,), (out,)]

    shapes, inp = conv_bn(64, 3, 7), 64
    for width, depth in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for i in range(depth):
            shapes += conv_bn(width, inp, 1) + conv_bn(width, width, 3) + conv_bn(4 * width, width, 1)
            if i == 0:
                shapes += conv_bn(4 * width, inp, 1)
            inp = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def _lstm() -> list[tuple[int, ...]]:
    gates = 4 * 128
    return [
        (gates, 28),
        (gates, 128),
        (gates,),
        (gates,),
        (gates, 128),
        (gates, 128),
        (gates,),
        (gates,),
        (10, 128),
        (10,),
    ]


def _lora(rank: int = 16) -> Case:
    projections = ((4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096))  # q, k, v, o as (in, out)
    shapes = [shape for inp, out in projections for shape in ((rank, inp), (out, rank))] * 32
    return Case("lora-8b-r16", "LoRA of rank 16 on q, k, v, o of Llama-3-8B, float32", _specs(shapes, _FP32))


def _llama3_8b_shard(ranks: int) -> list[tuple[int, ...]]:
    d, kv, ffn, vocab = 4096, 1024, 14336, 128256
    layer = [(d, d), (kv, d), (kv, d), (d, d), (ffn, d), (ffn, d), (d, ffn), (d,), (d,)]
    whole = [(vocab, d), *layer * 32, (d,), (vocab, d)]
    return [(rows // ranks, *rest) for rows, *rest in whole]  # sharded along dim 0, which 64 divides everywhere


def _by_name(*listed: Case) -> dict[str, Case]:
    return {case.name: case for case in listed}


def _gpt2_cases() -> tuple[Case, ...]:
    return (
        Case("gpt2-124m-fp32", "GPT-2 124M, float32", _specs(_gpt2(), _FP32)),
        Case("gpt2-124m-bf16", "GPT-2 124M, bfloat16", _specs(_gpt2(), _BF16)),
    )


def _many(name: str, count: int, shape: tuple[int, ...], dtype: torch.dtype = _FP32) -> Case:
    sizes = " x ".join(map(str, shape))
    return Case(name, f"{count:,} tensors of {sizes}, {_name(dtype)}", _specs([shape] * count, dtype))


def _shard(ranks: int, dtype: torch.dtype, suffix: str = "") -> Case:
    what = f"one of {ranks} shards of Llama-3-8B, {_name(dtype)}"
    return Case(f"llama3-8b-1of{ranks}{suffix}", what, _specs(_llama3_8b_shard(ranks), dtype))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def cases(quick: bool = False) -> dict[str, Case]:
    """All cases of a CPU by name; `quick` makes the one huge tensor 128 MiB instead of 1 GiB."""
    huge = (_GIB // 8 if quick else _GIB) // _FP32.itemsize
    return _by_name(
        *_gpt2_cases(),
        Case("resnet50", "ResNet-50, float32", _specs(_resnet50(), _FP32)),
        Case("lstm", "LSTM 28-128 x 2 layers and a linear head, float32", _specs(_lstm(), _FP32)),
        _many("1000x64x64", 1000, (64, 64)),
        _many("1000-tiny", 1000, (64,)),
        _many("10000-tiny", 10_000, (64,)),
        Case("one-huge", "one float32 tensor", _specs([(huge,)], _FP32)),
        _lora(),
        _shard(64, _BF16),
    )


def gpu_cases() -> dict[str, Case]:
    """All cases of a GPU by name; the largest takes 13 GB: the gradients, their saved copy and a target to copy to."""
    mixed = [((600, 750), dtype) for dtype in (_FP32, _BF16)] * 250
    return _by_name(
        *_gpt2_cases(),
        _shard(8, _BF16),
        _shard(8, _FP32, "-fp32"),
        _shard(64, _BF16),
        _shard(64, _FP32, "-fp32"),
        Case("one-huge-bf16", "one bfloat16 tensor", _specs([(1_536_000_000,)], _BF16)),
        Case("500-mixed", "500 matrices, float32 and bfloat16 in turn", tuple(mixed)),
        _many("2000x1024x1024", 2000, (1024, 1024), _BF16),
        _lora(),
        _many("1000x64x64", 1000, (64, 64)),
        _many("2000-tiny", 2000, (64,)),
        _many("10000-tiny", 10_000, (64,)),
    )
