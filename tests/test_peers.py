"""The real packages beside fastclip, where they are installed: pip install torch-fastclip[peers]."""

from __future__ import annotations

import importlib.util
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import fastclip
from cases import parameters
from fastclip import functional as F
from fastclip import policy

pytestmark = pytest.mark.filterwarnings("ignore")
os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("JAX_PLATFORMS", "cpu")


def lists(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((5, 3), (7,), (), (2, 3, 4), (4, 4))
    tensors = [torch.randn(shape, generator=generator) * 10.0 ** (seed % 3 - 1) for shape in shapes]
    tensors[1].zero_()
    return tensors


def broken() -> tuple[list[torch.Tensor], ...]:
    return [torch.tensor([1.0, -2.0]), torch.tensor([math.inf, 3.0])], [torch.tensor([math.nan, 1.0]), torch.ones(2)]


def close(ours, theirs, rtol=1e-6):
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, torch.from_numpy(np.array(other)), rtol=rtol, atol=1e-12, equal_nan=True)


def as_numpy(tensors):
    return [t.numpy().copy() for t in tensors]


@pytest.mark.parametrize("seed", range(3))
def test_optax(seed):
    optax = pytest.importorskip("optax", exc_type=ImportError)
    for make, clip in (
        (lambda: optax.clip(0.3), lambda g: F.clip_by_value_(g, -0.3, 0.3)),
        (lambda: optax.clip_by_block_rms(0.5), lambda g: F.clip_by_block_rms_(g, 0.5)),
        (lambda: optax.clip_by_global_norm(1.0), lambda g: F.clip_by_global_norm_(g, 1.0)),
    ):
        for grads in (lists(seed), *broken()):
            theirs, _ = make().update(as_numpy(grads), make().init(as_numpy(grads)))
            clip(grads)
            close(grads, theirs)


@pytest.mark.parametrize("per_layer", [False, True])
def test_optax_per_example(per_layer):
    optax = pytest.importorskip("optax", exc_type=ImportError)
    grads = [torch.randn(6, 5, 3), torch.randn(6, 7), torch.randn(6)]
    theirs_of = optax.per_example_layer_norm_clip if per_layer else optax.per_example_global_norm_clip
    theirs, count = theirs_of(as_numpy(grads), 2.0)
    sums, clipped = F.per_example_clip(grads, 2.0, per_layer=per_layer)
    close(sums, theirs, 1e-5)
    assert np.array(count).tolist() == clipped.tolist()


def test_optax_adaptive():
    """Its units are columns, ours rows: the transposed weight has the same ones."""
    optax = pytest.importorskip("optax", exc_type=ImportError)
    weight, grad = torch.randn(5, 3), torch.randn(5, 3)
    transform = optax.adaptive_grad_clip(0.1)
    theirs, _ = transform.update(as_numpy([grad]), transform.init(as_numpy([weight])), as_numpy([weight]))
    made = torch.nn.Parameter(weight.t().contiguous())
    made.grad = grad.t().contiguous()
    fastclip.adaptive_clip_grad_([made], 0.1)
    close([made.grad.t().contiguous()], theirs)


@pytest.mark.parametrize("seed", range(3))
def test_keras(seed):
    keras = pytest.importorskip("keras", exc_type=ImportError)
    for options, clip in (
        ({"clipvalue": 0.3}, lambda g: F.clip_by_value_(g, -0.3, 0.3)),
        ({"clipnorm": 0.7}, lambda g: F.clip_by_norm_(g, 0.7)),
        ({"global_clipnorm": 0.7}, lambda g: F.clip_by_global_norm_(g, 0.7)),
    ):
        grads = lists(seed)
        given = [keras.ops.convert_to_tensor(g) for g in as_numpy(grads)]
        theirs = keras.optimizers.SGD(**options)._clip_gradients(given)
        clip(grads)
        close(grads, theirs)


@pytest.mark.parametrize("norm_type", [2.0, 1.0])
def test_timm(norm_type):
    found = importlib.util.find_spec("timm")
    if found is None:
        pytest.skip("timm is not installed")
    # The module alone: the package imports torchvision.
    path = Path(found.origin).parent / "utils" / "agc.py"
    spec = importlib.util.spec_from_file_location("timm_agc", path)
    agc = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(agc)
    shapes = ((8, 3, 3, 3), (4, 6), (5,), ())
    weights = [torch.randn(shape) for shape in shapes]
    grads = [torch.randn(shape) * 0.05 for shape in shapes]
    ours, theirs = ([torch.nn.Parameter(w.clone()) for w in weights] for _ in range(2))
    for made in (ours, theirs):
        for p, g in zip(made, grads, strict=True):
            p.grad = g.clone()
    fastclip.adaptive_clip_grad_(ours, 0.02, norm_type=norm_type)
    agc.adaptive_clip_grad(theirs, 0.02, norm_type=norm_type)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=1e-9)


NORMS = [1.0, 1.2, 0.9, 1.1, 1.0, 0.8, 5.0, 1.3, 30.0, 1.0, 0.7, 1.05, 2.0, 1.0, 0.95, 9.0, 1.1, 1.0]


@pytest.mark.parametrize("mode", ["zscore", "percentile"])
@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_zclip(mode, max_norm):
    zclip = pytest.importorskip("zclip", exc_type=ImportError)
    theirs = zclip.ZClip(mode=mode, alpha=0.97, z_thresh=2.5, max_grad_norm=max_norm, warmup_steps=5)
    ours = policy.ZClip(mode=mode, max_norm=max_norm, warmup_steps=5)
    model = torch.nn.Linear(2, 1, bias=False)
    for norm in NORMS:
        model.weight.grad = torch.tensor([[0.6, -0.8]]) * norm
        theirs.step(model)
        (weight,) = parameters([torch.tensor([[0.6, -0.8]]) * norm])
        ours.clip_([weight])
        torch.testing.assert_close(weight.grad, model.weight.grad, rtol=1e-4, atol=0)


def test_opacus():
    pytest.importorskip("opacus", exc_type=ImportError)
    from opacus.optimizers import DPOptimizer

    grads = [torch.randn(6, 5, 3), torch.randn(6, 7)]
    made = [torch.nn.Parameter(torch.zeros(g.shape[1:])) for g in grads]
    for p, g in zip(made, grads, strict=True):
        p.grad_sample = g.clone()
    optimizer = DPOptimizer(
        torch.optim.SGD(made, lr=1.0), noise_multiplier=0.0, max_grad_norm=2.0, expected_batch_size=6
    )
    optimizer.clip_and_accumulate()
    sums, _ = F.per_example_clip(grads, 2.0)
    for p, total in zip(made, sums, strict=True):
        torch.testing.assert_close(total, p.summed_grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("history", [4, 1000])
def test_autoclip(history):
    autoclip = pytest.importorskip("autoclip.torch", exc_type=ImportError)
    theirs = torch.nn.Parameter(torch.zeros(2))
    clipper = autoclip.QuantileClip([theirs], quantile=0.6, history_length=history, global_threshold=True)
    ours = policy.AutoClip(percentile=60.0, history=history, include_current=False)
    for norm in NORMS:
        theirs.grad = torch.tensor([0.6, -0.8]) * norm
        clipper.step()
        (weight,) = parameters([torch.tensor([0.6, -0.8]) * norm])
        ours.clip_([weight])
        torch.testing.assert_close(weight.grad, theirs.grad, rtol=1e-5, atol=0)


def test_pytorch_optimizer_adagc():
    package = pytest.importorskip("pytorch_optimizer", exc_type=ImportError)
    made = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    # Its Adam keeps the clipped gradient itself where the first moment forgets at once.
    options = {"lr": 0.0, "betas": (0.0, 0.9), "beta": 0.98, "lambda_rel": 1.05, "weight_decay": 0.0, "eps": 1e-8}
    theirs = package.AdaGC(made, **options, warmup_steps=6)
    ours = policy.AdaGC(ratio=1.05, beta=0.98, warmup_steps=5, eps=1e-8)
    for norm in NORMS:
        grads = [torch.tensor([0.6, -0.8]) * norm, torch.tensor([0.5, 0.2]) / norm]
        for parameter, grad in zip(made, grads, strict=True):
            parameter.grad = grad.clone()
        theirs.step()
        mine = parameters(grads)
        ours.clip_(mine)
        for weight, parameter in zip(mine, made, strict=True):
            torch.testing.assert_close(weight.grad, theirs.state[parameter]["exp_avg"], rtol=1e-5, atol=0)
