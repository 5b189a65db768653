"""Unscale and clip in one: torch's recipes of automatic mixed precision, both ways, with infs injected."""

from __future__ import annotations

import functools
import math

import pytest
import torch
import torch.nn.utils as torchs

import fastclip
import fastclip.amp
import reference
import subproc
import ways
from test_step import distance

STEPS = 100
OPTIMIZERS = {
    "AdamW fused": functools.partial(torch.optim.AdamW, lr=1e-2, fused=True),
    "AdamW": functools.partial(torch.optim.AdamW, lr=1e-2),
    "SGD fused": functools.partial(torch.optim.SGD, lr=1e-2, momentum=0.9, fused=True),
    "SGD": functools.partial(torch.optim.SGD, lr=1e-2, momentum=0.9, foreach=True),
}


def unscale_then_clip(scaler, optimizer, parameters, max_norm, norm_type=2.0):
    """Torch's recipe."""
    scaler.unscale_(optimizer)
    return torchs.clip_grad_norm_(parameters, max_norm, norm_type)


WAYS = (fastclip.amp.unscale_and_clip_grad_norm_, unscale_then_clip)


def model(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.GELU(), torch.nn.Linear(8, 1))


def scaler_of(**options) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=7, **options)


def batch(step: int, size: float = 1.0):
    generator = torch.Generator().manual_seed(step)
    return size * torch.randn(5, 6, generator=generator), torch.randn(5, 1, generator=generator)


def inject(step: int, net: torch.nn.Module) -> None:
    """Every ninth step has an inf or a NaN."""
    if step % 9 == 4:
        net[2].bias.grad[0] = math.inf if step % 2 else math.nan


def state_of(scaler, *optimizers) -> list:
    return [scaler.state_dict(), [dict(scaler._per_optimizer_states[id(o)])["stage"] for o in optimizers]]


def one_step(net, optimizer, scaler, step, way, max_norm, norm_type=2.0):
    inputs, targets = batch(step)
    optimizer.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = torch.nn.functional.mse_loss(net(inputs), targets)
    scaler.scale(loss).backward()
    inject(step, net)
    norm = way(scaler, optimizer, net.parameters(), max_norm, norm_type)
    state = state_of(scaler, optimizer)
    scaler.step(optimizer)
    scaler.update()
    return norm, state, state_of(scaler)


def same_runs(run) -> None:
    """Every parameter after every step, and all that a run returns, both ways."""
    (ours, mine), (theirs, other) = (run(way) for way in WAYS)
    assert len(ours) == len(theirs) == STEPS
    for step, (got, want) in enumerate(zip(ours, theirs, strict=True)):
        with reference.during(step):
            assert got[1:] == want[1:]
            for a, b in zip(got[0], want[0], strict=True):
                assert a.dtype == b.dtype
                torch.testing.assert_close(a, b, rtol=1e-4, atol=0, equal_nan=True)
    assert distance(mine, other) <= 1e-5


@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf, 3.0, 0.0])
@pytest.mark.parametrize("max_norm", [0.5, math.inf])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_clipping_recipe(name, max_norm, norm_type):
    def run(way):
        net, scaler = model(), scaler_of()
        optimizer, seen = OPTIMIZERS[name](net.parameters()), []
        for step in range(STEPS):
            norm, *states = one_step(net, optimizer, scaler, step, way, max_norm, norm_type)
            seen.append(([norm], *states))
        return seen, list(net.parameters())

    same_runs(run)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_accumulation_recipe(name):
    def run(way):
        net, scaler = model(), scaler_of()
        optimizer, seen = OPTIMIZERS[name](net.parameters()), []
        for step in range(STEPS):
            inputs, targets = batch(step)
            scaler.scale(torch.nn.functional.mse_loss(net(inputs), targets) / 4).backward()
            norms = []
            if (step + 1) % 4 == 0:
                inject(step // 4, net)
                norms = [way(scaler, optimizer, net.parameters(), 0.1)]
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
            seen.append((norms, state_of(scaler)))
        return seen, list(net.parameters())

    same_runs(run)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_several_optimizers(name, together):
    """Two models, two losses, two optimizers, one scaler; an inf in one skips that one alone."""

    def run(way):
        nets, scaler, seen = [model(0), model(1)], scaler_of(), []
        optimizers = [OPTIMIZERS[name](nets[0].parameters()), OPTIMIZERS["SGD"](nets[1].parameters())]
        everything = [p for net in nets for p in net.parameters()]
        for step in range(STEPS):
            (inputs, targets), norms = batch(step), []
            for optimizer in optimizers:
                optimizer.zero_grad()
            outputs = [net(inputs) for net in nets]
            first = torch.nn.functional.mse_loss(2 * outputs[0] + 3 * outputs[1], targets)
            second = torch.nn.functional.mse_loss(3 * outputs[0] - 5 * outputs[1], targets)
            scaler.scale(first).backward(retain_graph=True)
            scaler.scale(second).backward()
            inject(step, nets[step % 2])
            if together:  # one norm over both, which an inf in one makes infinite for the other
                inject(step, nets[1 - step % 2])
                scaler.unscale_(optimizers[1])
                norms.append(way(scaler, optimizers[0], everything, 0.5))
            else:
                for i in (1, 0):
                    norms.append(way(scaler, optimizers[i], nets[i].parameters(), 0.5))
            states = state_of(scaler, *optimizers)
            for optimizer in optimizers:
                scaler.step(optimizer)
            scaler.update()
            seen.append((norms, states, state_of(scaler)))
        return seen, everything

    same_runs(run)


def test_parameters_that_are_a_part_of_the_optimizers():
    def run(way):
        net, scaler = model(), scaler_of()
        optimizer, seen = OPTIMIZERS["AdamW"](net.parameters()), []
        for step in range(STEPS):
            optimizer.zero_grad()
            inputs, targets = batch(step)
            scaler.scale(torch.nn.functional.mse_loss(net(inputs), targets)).backward()
            inject(step, net)  # beside the parameters that are clipped
            norm = way(scaler, optimizer, net[0].parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
            seen.append(([norm], state_of(scaler)))
        return seen, list(net.parameters())

    same_runs(run)


def test_a_scaler_that_is_disabled():
    def run(way):
        net, scaler = model(), scaler_of(enabled=False)
        optimizer, seen = OPTIMIZERS["AdamW fused"](net.parameters()), []
        for step in range(STEPS):
            optimizer.zero_grad()
            inputs, targets = batch(step)
            scaler.scale(torch.nn.functional.mse_loss(net(inputs), targets)).backward()
            norm = way(scaler, optimizer, net.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
            seen.append(([norm], state_of(scaler)))
        return seen, list(net.parameters())

    same_runs(run)


def test_dtensors():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    with ways.one_rank():
        mesh, scaler = init_device_mesh("cpu", (1,)), scaler_of()
        scaler.scale(torch.ones(()))
        weight = torch.nn.Parameter(distribute_tensor(torch.zeros(4), mesh, [Shard(0)]))
        optimizer = OPTIMIZERS["SGD"]([weight])
        for bad in (False, True):
            grad = torch.tensor([3.0, 4.0, 0.0, math.nan if bad else 0.0]) * scaler.get_scale()
            weight.grad = distribute_tensor(grad, mesh, [Shard(0)])
            norm = fastclip.amp.unscale_and_clip_grad_norm_(scaler, optimizer, [weight], 1.0)
            assert type(norm) is type(weight.data)
            scaler.step(optimizer)
            scaler.update()
        torch.testing.assert_close(weight.data.full_tensor(), torch.tensor([-0.006, -0.008, 0.0, 0.0]))
        assert scaler.get_scale() == 2.0**9


def test_each_gradient_is_written_at_most_once():
    """The coefficient is 1 and so is the scale: nothing is written; else one product of both."""
    for scale, max_norm in ((1.0, 1e9), (2.0**10, 1e9), (2.0**10, 0.1)):
        weight = torch.nn.Parameter(torch.zeros(3))
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        scaler.scale(torch.ones(()))
        weight.grad = torch.tensor([1.0, 2.0, 3.0])
        expected = weight.grad.clone()
        version = weight.grad._version
        optimizer = OPTIMIZERS["SGD"]([weight])
        norm = fastclip.amp.unscale_and_clip_grad_norm_(scaler, optimizer, [weight], max_norm)
        assert weight.grad._version == version + 1
        wide = reference.total_norm([expected]) / scale
        reference.assert_norm(norm, wide)
        reference.scale_rounded_([expected], reference.clip_coef(wide, max_norm) / scale)
        torch.testing.assert_close(weight.grad, expected, rtol=2e-7, atol=0)


# Errors


def ready(scaler=None):
    weight = torch.nn.Parameter(torch.zeros(2))
    scaler = scaler or scaler_of()
    scaler.scale(torch.ones(()))
    weight.grad = torch.tensor([3.0, 4.0])
    return scaler, OPTIMIZERS["SGD"]([weight]), weight


@pytest.mark.parametrize("way", WAYS)
def test_called_twice_or_after_the_step(way):
    for before in (way, lambda scaler, optimizer, *_: scaler.unscale_(optimizer)):
        scaler, optimizer, weight = ready()
        before(scaler, optimizer, [weight], 1.0)
        grad = weight.grad.clone()
        with pytest.raises(RuntimeError, match=r"unscale_\(\) has already been called on this optimizer"):
            way(scaler, optimizer, [weight], 1.0)
        assert torch.equal(weight.grad, grad)
    scaler.step(optimizer)
    with pytest.raises(RuntimeError, match=r"unscale_\(\) is being called after step\(\)"):
        way(scaler, optimizer, [weight], 1.0)
    scaler, optimizer, weight = ready()
    way(scaler, optimizer, [weight], 1.0)
    with pytest.raises(RuntimeError, match=r"unscale_\(\) has already been called"):
        scaler.unscale_(optimizer)


@pytest.mark.parametrize("way", WAYS)
def test_float16_gradients(way):
    weight = torch.nn.Parameter(torch.zeros(2, dtype=torch.float16))
    scaler, _, _ = ready()
    weight.grad = torch.ones(2, dtype=torch.float16)
    with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
        way(scaler, OPTIMIZERS["SGD"]([weight]), [weight], 1.0)
    assert weight.grad.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("way", WAYS)
def test_before_the_first_scale_and_without_gradients(way):
    scaler, optimizer, weight = ready()
    with pytest.raises(AssertionError, match="Attempted unscale_ but _scale is None"):
        way(scaler_of(), optimizer, [weight], 1.0)
    weight.grad = None
    assert way(scaler, optimizer, [weight], 1.0) == 0
    with pytest.raises(AssertionError, match="No inf checks were recorded"):
        scaler.step(optimizer)


def test_a_refused_gradient_leaves_the_step_as_it_was():
    """Nothing is written, and the optimizer can still be unscaled."""
    scaler, optimizer, weight = ready()
    other = torch.nn.Parameter(torch.zeros(2))
    other.grad = torch.ones(1).expand(2)
    optimizer.add_param_group({"params": [other]})
    with pytest.raises(RuntimeError, match="more than one element"):
        fastclip.amp.unscale_and_clip_grad_norm_(scaler, optimizer, [weight, other], 1.0)
    assert weight.grad.tolist() == [3.0, 4.0]
    other.grad = None
    fastclip.amp.unscale_and_clip_grad_norm_(scaler, optimizer, [weight, other], 1.0)


def test_a_parameter_that_is_listed_twice_is_unscaled_once():
    for bound in (math.inf, 1.0):
        results = []
        for way in WAYS:
            scaler, optimizer, weight = ready()
            results.append((way(scaler, optimizer, [weight, weight], bound), weight.grad))
        torch.testing.assert_close(results[0], results[1])


def test_the_order_of_the_norm_is_named():
    scaler, optimizer, weight = ready()
    with pytest.raises(TypeError, match="norm_type: expected a number, got None"):
        fastclip.amp.unscale_and_clip_grad_norm_(scaler, optimizer, [weight], 1.0, None)
    assert weight.grad.tolist() == [3.0, 4.0]


def test_a_scaler_with_an_unscale_of_its_own():
    """As FSDP's, which reduces over its ranks."""

    class Counting(torch.amp.GradScaler):
        calls = 0

        def unscale_(self, optimizer):
            self.calls += 1
            super().unscale_(optimizer)

    scaler, optimizer, weight = ready(Counting("cpu", init_scale=2.0))
    norm = fastclip.amp.unscale_and_clip_grad_norm_(scaler, optimizer, [weight], 1.0)
    assert (scaler.calls, norm) == (1, 2.5)


def test_amp_and_integrations_are_imported_when_asked_for():
    code = (
        "import sys, fastclip; assert 'fastclip.amp' not in sys.modules; fastclip.amp.unscale_and_clip_grad_norm_; "
        "fastclip.integrations; assert 'lightning' not in sys.modules; import pytest; "
        "pytest.raises(AttributeError, lambda: fastclip.nothing)"
    )
    assert not (child := subproc.execute(code)).error, child
