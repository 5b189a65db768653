"""The cases, gradient lists with the shapes of real models, and the regimes: which call with which bound."""

from dataclasses import dataclass

import torch

TensorSpec = tuple[tuple[int, ...], torch.dtype]

_GIB = 1 << 30


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
    """One call and one bound; `passes` is how many times all bytes must cross memory, the floor of that call."""

    name: str
    what: str
    function: str
    bound: float | None
    passes: int
    writes: bool = False

    @property
    def returns_norm(self) -> bool:
        return self.function != "clip_grad_value_"

    def arguments(self, total_norm: float) -> tuple[float, ...]:
        """The arguments after the tensors; a norm bound is relative to the true norm, a value bound absolute."""
        if self.bound is None:
            return ()
        return (self.bound * total_norm if self.returns_norm else self.bound,)


# The gradients are standard normal: nothing exceeds 100, and 32 % exceed 1, so that every cache line has to be written.
# 0.3 is far enough from 1 that torch clips, too, where its norm is 29 % low.
REGIMES = (
    Regime("total-norm", "norm alone", "get_total_norm", None, 1),
    Regime("norm-noop", "by norm, not clipping", "clip_grad_norm_", 2.0, 1),
    Regime("norm-clip", "by norm, clipping", "clip_grad_norm_", 0.3, 3, writes=True),
    Regime("value-noop", "by value, not clipping", "clip_grad_value_", 100.0, 1),
    Regime("value-clip", "by value, clipping", "clip_grad_value_", 1.0, 2, writes=True),
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


def _lora_8b(rank: int = 16) -> list[tuple[int, ...]]:
    projections = ((4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096))  # q, k, v, o as (in, out)
    return [shape for inp, out in projections for shape in ((rank, inp), (out, rank))] * 32


def _llama3_8b_shard(ranks: int = 64) -> list[tuple[int, ...]]:
    d, kv, ffn, vocab = 4096, 1024, 14336, 128256
    layer = [(d, d), (kv, d), (kv, d), (d, d), (ffn, d), (ffn, d), (d, ffn), (d,), (d,)]
    whole = [(vocab, d), *layer * 32, (d,), (vocab, d)]
    return [(rows // ranks, *rest) for rows, *rest in whole]  # sharded along dim 0, which 64 divides everywhere


def cases(quick: bool = False) -> dict[str, Case]:
    """All cases by name; `quick` makes the one huge tensor 128 MiB instead of 1 GiB."""
    fp32, bf16 = torch.float32, torch.bfloat16
    huge = (_GIB // 8 if quick else _GIB) // fp32.itemsize
    return {
        case.name: case
        for case in (
            Case("gpt2-124m-fp32", "GPT-2 124M, float32", _specs(_gpt2(), fp32)),
            Case("gpt2-124m-bf16", "GPT-2 124M, bfloat16", _specs(_gpt2(), bf16)),
            Case("resnet50", "ResNet-50, float32", _specs(_resnet50(), fp32)),
            Case("lstm", "LSTM 28-128 x 2 layers and a linear head, float32", _specs(_lstm(), fp32)),
            Case("1000x64x64", "1,000 tensors of 64 x 64, float32", _specs([(64, 64)] * 1000, fp32)),
            Case("1000-tiny", "1,000 tensors of 64, float32", _specs([(64,)] * 1000, fp32)),
            Case("10000-tiny", "10,000 tensors of 64, float32", _specs([(64,)] * 10_000, fp32)),
            Case("one-huge", "one float32 tensor", _specs([(huge,)], fp32)),
            Case("lora-8b-r16", "LoRA of rank 16 on q, k, v, o of Llama-3-8B, float32", _specs(_lora_8b(), fp32)),
            Case("llama3-8b-1of64", "one of 64 shards of Llama-3-8B, bfloat16", _specs(_llama3_8b_shard(), bf16)),
        )
    }
