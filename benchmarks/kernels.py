"""Each pass once over large lists, between the marks of a profiler: ncu --profile-from-start off ... kernels.py

The lists are those of a 1/64 shard of an 8B model, bfloat16 and float32, out of the L2.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext

import torch

import fastclip
from fastclip.bench.cases import cases, gpu_cases
from fastclip.bench.gradients import Gradients


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--backend", help="such as triton; without, the preferred one")
    parser.add_argument("--case", nargs="+", default=["llama3-8b-1of64", "llama3-8b-1of64-fp32"])
    options = parser.parse_args()
    listed = gpu_cases() if options.device == "cuda" else cases()
    on_gpu = options.device == "cuda"
    for name in options.case:
        made = Gradients(listed[name], torch.device(options.device))
        scratch = torch.zeros((512 << 20) // 4 if on_gpu else 1, device=options.device)
        calls = (
            lambda made=made: fastclip.clip_grad_norm_(made.parameters, 2 * made.total_norm),
            lambda made=made: fastclip.clip_grad_norm_(made.parameters, 0.3 * made.total_norm),
            lambda made=made: fastclip.clip_grad_value_(made.parameters, 100.0),
            lambda made=made: fastclip.clip_grad_value_(made.parameters, 1.0),
        )
        with fastclip.use_backend(options.backend) if options.backend else nullcontext():
            for call in calls:
                made.restore()
                call()  # compiled and loaded
            for call in calls:
                made.restore()
                scratch.zero_()
                if on_gpu:
                    torch.cuda.synchronize()
                    torch.cuda.profiler.start()
                call()
                if on_gpu:
                    torch.cuda.synchronize()
                    torch.cuda.profiler.stop()
        del made


if __name__ == "__main__":
    main()
