"""Every kernel that moves bytes, over bf16 and float32, for a profiler: ncu python benchmarks/kernels.py

128 tensors of a million elements each: more than the L2 of any card, and small enough for a profiler that runs each
kernel several times.
"""

from __future__ import annotations

import argparse

import torch

import fastclip


def run(dtype: torch.dtype, tensors: int, elements: int, device: str) -> None:
    parameters = [torch.nn.Parameter(torch.empty(elements, dtype=dtype, device=device)) for _ in range(tensors)]
    for parameter in parameters:
        parameter.grad = torch.randn(elements, dtype=dtype, device=device)
    norm = fastclip.get_total_norm([parameter.grad for parameter in parameters])
    fastclip.get_total_norm([parameter.grad for parameter in parameters], float("inf"))
    fastclip.clip_grad_norm_(parameters, 2 * norm.item())
    fastclip.clip_grad_norm_(parameters, 0.3 * norm.item())
    fastclip.clip_grad_value_(parameters, 100.0)
    fastclip.clip_grad_value_(parameters, 0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tensors", type=int, default=128)
    parser.add_argument("--elements", type=int, default=1 << 20)
    options = parser.parse_args()
    for dtype in (torch.bfloat16, torch.float32):
        run(dtype, options.tensors, options.elements, options.device)
    if options.device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
