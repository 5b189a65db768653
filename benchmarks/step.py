"""Whole optimizer steps: torch's clip and step against each way of fastclip, with the bytes that must move.

    python benchmarks/step.py            # every case, a table in Markdown; 4 GB, and minutes for torch's loop of AdamW
    python benchmarks/step.py --case gpt2 --dtype float32 --optimizer AdamW --kind fused --seconds 10
    python benchmarks/step.py --whole    # the share of the clip in a training step of GPT-2 124M

All ways of a row run in one process, once in each round, in an order that is shuffled every round, on the same
parameters, gradients and state; times are first deciles, which other work on the machine moves least. B is the bytes of
all gradients, which are written back before each call, outside of the clock.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import fastclip
from fastclip.amp import unscale_and_clip_grad_norm_
from fastclip.bench.cases import cases
from fastclip.bench.timing import Entry, Plan, measure

CPU = torch.device("cpu")
SCALE = 1024.0
# Times B: what a step reads and writes by itself.
STEP_BYTES = {"SGD": 3, "AdamW": 7}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def shapes_of(case: str) -> list[tuple[int, ...]]:
    if case == "mlp":  # 100 small tensors
        return [shape for _ in range(50) for shape in ((64, 64), (64,))]
    return [shape for shape, _ in cases()["gpt2-124m-fp32"].tensors]


class Setup:
    """Parameters with gradients that can be written back, one optimizer, and the norm of the gradients."""

    def __init__(self, case: str, dtype: torch.dtype, optimizer: str, fused: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        self.saved = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes_of(case)]
        self.parameters = [nn.Parameter(torch.zeros_like(grad)) for grad in self.saved]
        for parameter, grad in zip(self.parameters, self.saved, strict=True):
            parameter.grad = grad.clone()
        # None is torch's default, a loop on the CPU.
        self.optimizer = getattr(torch.optim, optimizer)(self.parameters, lr=1e-3, fused=fused or None)
        self.optimizer.step()  # the state is there
        self.total_norm = fastclip.get_total_norm(self.saved, norm_dtype=torch.float64).item()
        self.scaler: torch.amp.GradScaler | None = None

    def prepare(self) -> None:
        torch._foreach_copy_([parameter.grad for parameter in self.parameters], self.saved)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
        self.scaler.scale(torch.ones(()))

    def clip_and_step(self, clip: Callable[..., Tensor], max_norm: float) -> Callable[[], None]:
        def call() -> None:
            clip(self.parameters, max_norm)
            self.optimizer.step()

        return call

    def torch_amp(self, max_norm: float) -> None:
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.parameters, max_norm)

    def amp(self, max_norm: float) -> None:
        unscale_and_clip_grad_norm_(self.scaler, self.optimizer, self.parameters, max_norm)


def entries_of(setup: Setup, fused: bool, clips: bool) -> list[Entry]:
    max_norm = setup.total_norm * (0.3 if clips else 2)

    def hook(defer: bool | str) -> Callable:
        return lambda: fastclip.clip_on_step(setup.optimizer, max_norm, defer=defer)

    step, prepare = setup.optimizer.step, setup.prepare
    entries = [
        Entry("step alone", step, prepare),
        Entry("torch", setup.clip_and_step(nn.utils.clip_grad_norm_, max_norm), prepare),
        Entry("in place", setup.clip_and_step(fastclip.clip_grad_norm_, max_norm), prepare),
        Entry("on step", step, prepare, hook("auto" if fused else False)),
        Entry("torch AMP", lambda: setup.torch_amp(max_norm / SCALE), prepare),
        Entry("AMP", lambda: setup.amp(max_norm / SCALE), prepare),
    ]
    if fused:
        entries.append(Entry("on step, in place", step, prepare, hook(False)))
    return entries


def bytes_of(way: str, optimizer: str, fused: bool, clips: bool) -> int:
    """Times B, on paper: each pass reads or writes all gradients."""
    step = STEP_BYTES[optimizer]
    in_place = 3 if clips else 1
    return {
        "step alone": step,
        "torch": step + 3,
        "in place": step + in_place,
        "on step": step + ((2 if clips else 1) if fused else in_place),  # the kernel writes the quotient back
        "on step, in place": step + in_place,
        "torch AMP": 5,
        "AMP": 3,
    }[way]


def rows(args: argparse.Namespace) -> None:
    ways = ("step alone", "torch", "in place", "on step", "on step, in place", "torch AMP", "AMP")
    print("| gradients | optimizer | clips | " + " | ".join(ways) + " | in place | on step | AMP |")
    print("|---" * (6 + len(ways)) + "|")
    plan = Plan(args.seconds, 7, 300)
    for case in args.case:
        for dtype in args.dtype:
            for optimizer in args.optimizer:
                for fused in (kind == "fused" for kind in args.kind):
                    setup = Setup(case, DTYPES[dtype], optimizer, fused)
                    for clips in (False, True):
                        times = measure(entries_of(setup, fused, clips), plan, CPU)
                        ms = {way: row["p10"] for way, row in times.items()}
                        cells = [
                            f"{ms[way]:.3g} ms, {bytes_of(way, optimizer, fused, clips)}B" if way in ms else ""
                            for way in ways
                        ]
                        faster = [
                            f"{ms['torch'] / ms['in place']:.2f}x",
                            f"{ms['torch'] / ms['on step']:.2f}x",
                            f"{ms['torch AMP'] / ms['AMP']:.2f}x",
                        ]
                        name = f"{optimizer}, fused" if fused else optimizer
                        head = [f"{case} {dtype}", name, "yes" if clips else "no"]
                        print("| " + " | ".join([*head, *cells, *faster]) + " |", flush=True)
                    del setup


class Gpt2(nn.Module):
    """GPT-2 124M in torch's own layers: what its forward and backward cost."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(50257, 768), nn.Embedding(1024, 768)
        layer = nn.TransformerEncoderLayer(768, 12, 3072, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 12, nn.LayerNorm(768), enable_nested_tensor=False)

    def forward(self, tokens: Tensor) -> Tensor:
        size = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(size)
        x = self.tokens(tokens) + self.places.weight[:size]
        return self.layers(x, mask=mask, is_causal=True) @ self.tokens.weight.T


def whole(args: argparse.Namespace) -> None:
    """One training step in its parts, on as many tokens as are asked for."""
    torch.manual_seed(0)
    model = Gpt2()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(0, 50257, (args.batch, args.tokens + 1))
    parts: dict[str, list[float]] = {"forward and backward": [], "torch's clip": [], "fastclip's clip": [], "step": []}

    def timed(part: str, call: Callable[[], object]) -> None:
        start = time.perf_counter()
        call()
        parts[part].append((time.perf_counter() - start) * 1e3)

    def train() -> None:
        logits = model(tokens[:, :-1])
        nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()

    for i in range(args.steps):
        optimizer.zero_grad()
        timed("forward and backward", train)
        clips = [("torch's clip", nn.utils.clip_grad_norm_), ("fastclip's clip", fastclip.clip_grad_norm_)]
        for name, clip in clips if i % 2 else clips[::-1]:
            timed(name, lambda clip=clip: clip(model.parameters(), 1e9))
        timed("step", optimizer.step)
    medians = {part: statistics.median(values) for part, values in parts.items()}
    print(f"GPT-2 124M, float32, {args.batch} x {args.tokens} tokens, AdamW fused, nothing to clip:")
    for name in ("torch's clip", "fastclip's clip"):
        total = medians["forward and backward"] + medians["step"] + medians[name]
        print(f"{name}: {medians[name]:.3g} ms of {total:.4g} ms, {100 * medians[name] / total:.2g} %")
    print(", ".join(f"{part} {value:.4g} ms" for part, value in medians.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=("gpt2", "mlp"), default=["gpt2", "mlp"])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--optimizer", nargs="+", choices=STEP_BYTES, default=["AdamW", "SGD"])
    parser.add_argument("--kind", nargs="+", choices=("fused", "loop"), default=["fused", "loop"])
    parser.add_argument("--seconds", type=float, default=6.0, help="for each row")
    parser.add_argument("--whole", action="store_true", help="forward, backward, clip and step of one model")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args()
    whole(args) if args.whole else rows(args)


if __name__ == "__main__":
    main()
