"""Per-example clipping with noise (DP-SGD) on 1,797 real digits: accuracy against the bound and the noise.

    python benchmarks/experiments/private.py [--out DIR] [--quick]

Abadi et al. (arXiv:1607.00133), algorithm 1: every example enters a step by itself with probability q (Poisson
sampling: batches vary in size); the gradients are clipped one by one and summed; noise of noise_multiplier * bound is
added to the sum, and the whole divided by the expected size of a batch. Epsilon holds for adding or removing one of the
training images. It does not cover the choice among the table's rows.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import torch
from common import COLOURS, figure, parse, spread, write
from torch import nn
from torch.func import functional_call, grad, vmap

import fastclip
from fastclip.demo import digits

BOUNDS, NOISES, SEEDS = (0.1, 1.0, 10.0), (0.0, 0.7, 1.5, 3.0), (1, 2, 3)
BATCH, STEPS, DELTA = 128, 300, 1e-4  # delta is below 1 / 1437
RATE = 0.5  # over the bound: a step of clipped gradients is then as long for every bound
ORDERS = range(2, 257)


def sampled_gaussian_rdp(q: float, noise_multiplier: float, order: int) -> float:
    """The Renyi divergence of one step with Poisson sampling, at an integer order.

    Mironov, Talwar and Zhang (arXiv:1908.10530), of the sampled Gaussian mechanism:
    ``log(sum_k C(a, k) (1 - q)^(a - k) q^k exp((k^2 - k) / (2 sigma^2))) / (a - 1)``.
    """
    terms = [
        math.lgamma(order + 1)
        - math.lgamma(k + 1)
        - math.lgamma(order - k + 1)
        + ((order - k) * math.log1p(-q) if k < order else 0.0)
        + k * math.log(q)
        + (k * k - k) / (2 * noise_multiplier**2)
        for k in range(order + 1)
    ]
    return torch.logsumexp(torch.tensor(terms, dtype=torch.float64), 0).item() / (order - 1)


def epsilon(q: float, noise_multiplier: float, steps: int, delta: float) -> float:
    """Of all steps together; Canonne, Kamath and Steinke (arXiv:2004.00010), proposition 12, at the best order."""
    if noise_multiplier == 0:
        return math.inf
    return min(
        steps * sampled_gaussian_rdp(q, noise_multiplier, order)
        + math.log1p(-1 / order)
        - (math.log(delta) + math.log(order)) / (order - 1)
        for order in ORDERS
    )


def train(bound: float, noise_multiplier: float, seed: int, steps: int) -> tuple[float, float]:
    """The accuracy on the test images, and the share of examples whose gradient was clipped."""
    train_x, train_y, test_x, test_y = digits.load(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    parameters = dict(model.named_parameters())
    weights = {name: parameter.detach() for name, parameter in parameters.items()}
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(parameters.values(), lr=RATE / bound)

    def loss(weights, image, label):
        return nn.functional.cross_entropy(functional_call(model, weights, (image.unsqueeze(0),)), label.unsqueeze(0))

    grads_of = vmap(grad(loss), in_dims=(None, 0, 0))
    seen = clipped = 0
    for _ in range(steps):
        drawn = torch.rand(len(train_x), generator=generator) < BATCH / len(train_x)
        per_example = list(grads_of(weights, train_x[drawn], train_y[drawn]).values())
        sums, count = fastclip.functional.per_example_clip(per_example, bound)
        for parameter, total in zip(parameters.values(), sums, strict=True):
            noise = torch.randn(total.shape, generator=generator)
            parameter.grad = (total + noise_multiplier * bound * noise) / BATCH
        optimizer.step()
        seen, clipped = seen + int(drawn.sum()), clipped + int(count)
    with torch.no_grad():
        accuracy = (model(test_x).argmax(1) == test_y).float().mean().item()
    return accuracy, clipped / max(seen, 1)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(__doc__, argv)
    seeds, noises, steps = (SEEDS[:1], NOISES[:2], 3) if arguments.quick else (SEEDS, NOISES, STEPS)
    q = BATCH / len(digits.load(1)[0])
    drawn, axes = figure(1, f"DP-SGD on digits: accuracy after {steps} steps, median and range over seeds")
    rows = []
    for colour, bound in zip(COLOURS, BOUNDS, strict=False):
        lows, middles, highs = [], [], []
        for noise in noises:
            accuracies, shares = zip(*(train(bound, noise, seed, steps) for seed in seeds), strict=True)
            spent = epsilon(q, noise, steps, DELTA)
            cells = (f"{bound:g}", f"{noise:g}", f"{spent:.2f}" if math.isfinite(spent) else "inf")
            rows.append((*cells, spread(accuracies, ".1%"), spread(shares, ".0%")))
            middle = sorted(accuracies)[len(accuracies) // 2]
            middles.append(middle)
            lows.append(middle - min(accuracies))
            highs.append(max(accuracies) - middle)
        axes[0].errorbar(noises, middles, (lows, highs), color=colour, marker="o", capsize=3, label=f"bound {bound:g}")
    axes[0].set(xlabel="noise multiplier (noise / bound)", ylabel="accuracy on the test images", ylim=(0.8, 1))
    axes[0].legend()
    columns = ("bound", "noise multiplier", f"epsilon at delta {DELTA:g}", "test accuracy", "examples clipped")
    write(arguments, "private", columns, rows, drawn)
    return 0


if __name__ == "__main__":
    sys.exit(main())
