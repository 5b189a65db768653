"""Edge cases once through every op of a backend, small enough for compute-sanitizer: python tests/gpu_edges.py

All numbers are made on the CPU and copied with their guard bands, so that nearly all kernels are the backend's, and
every byte that they may read is initialised.
"""

from __future__ import annotations

import argparse
import math

import torch

import fastclip
import reference
from cases import CASES, clone, parameters, poison
from fastclip import gradients
from fastclip._dispatch import BACKENDS

# The edges of vectors, chunks and layouts; each in all dtypes at once.
NAMES = {
    "zero_dim",
    "one_element",
    "vector_widths",
    "chunk_exact",
    "chunks_with_tail",
    "misaligned",
    "misaligned_chunk",
    "sliced_columns",
    "step_two",
    "permuted",
    "with_empties",
    "only_empties",
    "many_tiny",
    "overlapping",
    "same_twice",
    "nan",
}
NORM_TYPES = (2.0, 1.0, 3.0, math.inf, -math.inf, 0.0)
# One past each table of a launch (csrc/cuda/chunk_table.h).
COUNTS = (255, 2041)


def lists() -> dict[str, list[torch.Tensor]]:
    cases = {case.name: case for case in CASES if case.name in NAMES}
    assert set(cases) == NAMES
    made = {name: [t for dtype in case.dtypes for t in case.make(dtype)] for name, case in cases.items()}
    for count in COUNTS:
        base = poison(8 * count, torch.float32)
        made[f"{count} tensors"] = [base[8 * i : 8 * i + 3].fill_(i % 7) for i in range(count)]
    return made


def check(on_cpu: list[torch.Tensor], device: torch.device, backend) -> None:
    """Every op over copies of a list; the results are compared, too."""
    for norm_type in NORM_TYPES:
        tensors, expected = clone(on_cpu, device), clone(on_cpu)
        norm = reference.total_norm(on_cpu, norm_type)
        max_norm = norm / 3 if 0 < norm < math.inf else 0.5
        returned = backend.clip_grad_norm_(tensors, max_norm, norm_type, dtype=torch.float64).cpu()
        reference.assert_norm(returned, norm, torch.float64)
        reference.scale_rounded_(expected, reference.clip_coef(returned.item(), max_norm))
        reference.assert_bits([t.cpu() for t in tensors], expected)
    tensors, expected = clone(on_cpu, device), clone(on_cpu)
    partial = backend.norm_partial(tensors, 1.0).cpu()
    reference.assert_norm(partial, reference.total_norm(on_cpu, 1.0), torch.float64)
    backend.scale_(tensors, torch.tensor(0.37, dtype=torch.float64).to(device))
    reference.scale_rounded_(expected, 0.37)
    backend.clamp_(tensors, -0.25, 0.25)
    reference.assert_bits([t.cpu() for t in tensors], reference.clip_by_value(expected, 0.25))
    tensors, expected = clone(on_cpu, device), clone(on_cpu)
    coefs = torch.linspace(0.25, 1.0, len(tensors), dtype=torch.float64)
    of_each = gradients.of(tensors, gradients=False)
    norms = of_each.norms(2.0).cpu().tolist()
    for tensor, norm in zip(on_cpu, norms, strict=True):
        reference.assert_norm(torch.tensor(norm, dtype=torch.float64), reference.total_norm([tensor]), torch.float64)
    of_each.scale_each_(coefs.to(device))
    for tensor, coef in zip(expected, coefs.tolist(), strict=True):
        reference.scale_rounded_([tensor], coef)
    reference.assert_bits([t.cpu() for t in tensors], expected)
    numbers = {"found_inf": torch.ones((), device=device), "inv_scale": torch.full((), 0.5, device=device)}
    made = parameters(clone(on_cpu, device))
    norm = fastclip.clip_grad_norm_(made, 0.5, nonfinite="zero", **numbers)
    assert numbers["found_inf"].item() == (not norm.isfinite().item())
    fastclip.clip_grad_norm_(made, 0.5, nonfinite="sanitize")
    fastclip.clip_grads_with_norm_(made, 0.5, norm)
    assert all(p.grad.isfinite().all() for p in made) or not norm.isfinite()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", default="cuda")
    options = parser.parse_args()
    with fastclip.use_backend(options.backend):
        made = lists()
        for name, tensors in made.items():
            with reference.during(name):
                check(tensors, torch.device(options.device), BACKENDS[options.backend])
    print(f"{len(made)} lists: right")


if __name__ == "__main__":
    main()
