"""Clipping as a part of an optimizer's step: the same weights as clip and then step, by every way and optimizer."""

from __future__ import annotations

import copy
import functools
import gc
import math
import weakref

import pytest
import torch
import torch.nn.utils as torchs

import fastclip
import reference
import ways
from cases import parameters

STEPS = 100
SHAPES = ((7, 5), (5,), (3, 4))
# The fused kernels of the CPU, and everything else in torch.optim that takes dense gradients.
FUSED = {
    "Adam": functools.partial(torch.optim.Adam, lr=1e-2, amsgrad=True, fused=True),
    "AdamW": functools.partial(torch.optim.AdamW, lr=1e-2, fused=True),
    "SGD": functools.partial(torch.optim.SGD, lr=1e-2, momentum=0.9, nesterov=True, weight_decay=1e-2, fused=True),
    "Adagrad": functools.partial(torch.optim.Adagrad, lr=1e-2, fused=True),
}
OPTIMIZERS = {
    **{f"{name} fused": make for name, make in FUSED.items()},
    "AdamW": functools.partial(torch.optim.AdamW, lr=1e-2, foreach=False),
    "SGD": functools.partial(torch.optim.SGD, lr=1e-2, momentum=0.9, foreach=True),
    "Adagrad": functools.partial(torch.optim.Adagrad, lr=1e-2),
    **{
        name: functools.partial(getattr(torch.optim, name), lr=1e-2)
        for name in ("Adam", "RMSprop", "NAdam", "RAdam", "Adamax", "Adadelta", "Adafactor", "ASGD", "Rprop")
    },
}


def weights(dtype: torch.dtype = torch.float32, shapes=SHAPES) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def give_gradients(params, step: int, scale: float = 1.0) -> None:
    """Every third step has nothing to clip."""
    generator = torch.Generator().manual_seed(step)
    size = (0.01 if step % 3 == 0 else 3.0) * scale
    for parameter in params:
        parameter.grad = (torch.randn(parameter.shape, generator=generator) * size).to(parameter.dtype)


def distance(ours, theirs) -> float:
    """The distance of two lists, relative to the length of the second."""
    difference = [a.detach().double() - b.detach().double() for a, b in zip(ours, theirs, strict=True)]
    return reference.total_norm(difference) / reference.total_norm(theirs)


def train(params, optimizer, clip=None, before_step=lambda step: None) -> None:
    for step in range(STEPS):
        give_gradients(params, step)
        before_step(step)
        if clip is not None:
            clip(params)
        optimizer.step()


# The same weights


@pytest.mark.parametrize("defer", ["auto", False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_same_weights_as_clip_then_step(name, dtype, defer):
    """Against torch's clip in float32; in bfloat16, whose norm torch rounds, against ours."""
    if defer is True and "fused" not in name:
        return
    ours, theirs = weights(dtype), weights(dtype)
    clip = torchs.clip_grad_norm_ if dtype == torch.float32 else fastclip.clip_grad_norm_
    train(theirs, OPTIMIZERS[name](theirs), lambda params: clip(params, 1.0))
    optimizer = OPTIMIZERS[name](ours)
    handle = fastclip.clip_on_step(optimizer, 1.0, defer=defer)
    train(ours, optimizer)
    if dtype == torch.float32 or defer is False or "fused" not in name:
        assert distance(ours, theirs) <= 1e-5
    else:  # a quotient in place of a product may round a gradient the other way, and a weight with it
        assert distance(ours, theirs) <= torch.finfo(dtype).eps
    assert handle.total_norm.isfinite()
    assert not hasattr(optimizer, "grad_scale")
    assert not hasattr(optimizer, "found_inf")


@pytest.mark.parametrize("bound", [{"max_norm": 1.0, "per_tensor": True}, {"clip_value": 0.3}, {"max_norm": math.inf}])
def test_other_bounds(bound):
    ours, theirs = weights(), weights()

    def clip(params):
        if "clip_value" in bound:
            torchs.clip_grad_value_(params, 0.3)
        elif bound["max_norm"] == 1.0:
            for parameter in params:
                torchs.clip_grad_norm_([parameter], 1.0)

    train(theirs, FUSED["AdamW"](theirs), clip)
    optimizer = FUSED["AdamW"](ours)
    handle = fastclip.clip_on_step(optimizer, **bound)
    train(ours, optimizer)
    assert distance(ours, theirs) <= 1e-5
    assert (handle.clip_coef is None) == ("clip_value" in bound or "per_tensor" in bound)


@pytest.mark.parametrize("defer", [True, False])
@pytest.mark.parametrize("norm_type", [1.0, 3.0, math.inf])
def test_other_norms(norm_type, defer):
    ours, theirs = weights(), weights()
    train(theirs, FUSED["SGD"](theirs), lambda params: torchs.clip_grad_norm_(params, 0.5, norm_type))
    optimizer = FUSED["SGD"](ours)
    fastclip.clip_on_step(optimizer, 0.5, norm_type, defer=defer)
    train(ours, optimizer)
    assert distance(ours, theirs) <= 1e-5


def closure_of(params, target: float = 2.0):
    def closure():
        for parameter in params:
            parameter.grad = None
        loss = sum(((parameter - target) ** 2).sum() for parameter in params)
        loss.backward()
        return loss

    return closure


def test_closures():
    """LBFGS evaluates its own many times, and each gradient is clipped; others once, by position or by name.

    LBFGS makes much of a rounding, so that it is compared with our own clip.
    """
    for make in (functools.partial(torch.optim.LBFGS, lr=0.1, max_iter=3), FUSED["AdamW"], OPTIMIZERS["SGD"]):
        ours, theirs = weights(), weights()
        closures = closure_of(ours), closure_of(theirs)

        def clipped(theirs=theirs, closures=closures):
            loss = closures[1]()
            fastclip.clip_grad_norm_(theirs, 10.0)
            return loss

        mine, other = make(ours), make(theirs)
        handle = fastclip.clip_on_step(mine, 10.0)
        for step in range(5):
            loss = mine.step(closures[0]) if step % 2 else mine.step(closure=closures[0])
            expected = other.step(clipped)
            torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
        assert distance(ours, theirs) <= 1e-5
        assert handle.total_norm > 0


def test_sparse_gradients_and_muon():
    for make, shapes in ((torch.optim.SparseAdam, ((6, 3),)), (torch.optim.Muon, ((6, 3), (4, 4)))):
        ours, theirs = weights(shapes=shapes), weights(shapes=shapes)
        mine, other = make(ours), make(theirs)
        handle = fastclip.clip_on_step(mine, 0.5)
        for step in range(20):
            for params in (ours, theirs):
                give_gradients(params, step)
                if make is torch.optim.SparseAdam:
                    params[0].grad = torch.sparse_coo_tensor(
                        torch.tensor([[1, 4]]), params[0].grad[:2], (6, 3), check_invariants=True
                    ).coalesce()
            fastclip.clip_grad_norm_(theirs, 0.5)
            mine.step()
            other.step()
        reference.assert_bits([p.detach() for p in ours], [p.detach() for p in theirs])
        assert handle.total_norm > 0


def test_dtensors():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    with ways.one_rank():
        mesh = init_device_mesh("cpu", (1,))
        for name, defer in (("AdamW", "auto"), ("AdamW", False), ("Adam", True)):
            plain, sharded = weights(), []
            for parameter in weights():
                sharded.append(torch.nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(0)])))
            mine, other = FUSED[name](sharded), FUSED[name](plain)
            handle = fastclip.clip_on_step(mine, 1.0, defer=defer)
            for step in range(STEPS):
                give_gradients(plain, step)
                for ours, theirs in zip(sharded, plain, strict=True):
                    ours.grad = distribute_tensor(theirs.grad.clone(), mesh, [Shard(0)])
                torchs.clip_grad_norm_(plain, 1.0)
                mine.step()
                other.step()
            assert type(handle.total_norm) is torch.Tensor
            assert distance([p.full_tensor() for p in sharded], plain) <= 1e-5


def test_a_second_step_without_new_gradients_divides_once():
    for defer in ("auto", True, False):
        ours, theirs = weights(), weights()
        mine, other = FUSED["SGD"](ours), FUSED["SGD"](theirs)
        fastclip.clip_on_step(mine, 1.0, defer=defer)
        give_gradients(ours, 1)
        give_gradients(theirs, 1)
        for _ in range(3):
            torchs.clip_grad_norm_(theirs, 1.0)
            mine.step()
            other.step()
        assert distance(ours, theirs) <= 1e-5


# Groups


def test_groups_that_are_left_out():
    """Out of the norm, the clip and the skip; a coefficient for all cannot be left to the optimizer then."""
    for name in ("AdamW fused", "Adam", "SGD fused"):
        ours, theirs = weights(), weights()
        made = []
        for params in (ours, theirs):
            groups = [{"params": params[:2]}, {"params": params[2:], "clip_grad": False}]
            made.append(OPTIMIZERS[name](groups))
        mine, other = made
        assert [p is q for p, q in zip(fastclip.clippable(mine), ours[:2], strict=True)] == [True, True]
        handle = fastclip.clip_on_step(mine, 1.0, nonfinite="skip")
        for step in range(30):
            give_gradients(ours, step)
            give_gradients(theirs, step)
            if step == 7:
                ours[0].grad[0, 0] = math.nan
                theirs[0].grad = theirs[1].grad = None
            norm = torchs.clip_grad_norm_(theirs[:2], 1.0)
            mine.step()
            other.step()
            if step != 7:
                torch.testing.assert_close(handle.total_norm.float(), norm)
        assert distance(ours, theirs) <= 1e-5
        assert handle.skipped_steps == 1


def test_a_group_that_is_added_later():
    ours, theirs = weights(), weights()
    mine, other = FUSED["AdamW"](ours[:1]), FUSED["AdamW"](theirs[:1])
    handle = fastclip.clip_on_step(mine, 1.0)
    for step in range(20):
        if step == 5:
            mine.add_param_group({"params": ours[1:]})
            other.add_param_group({"params": theirs[1:]})
        give_gradients(ours, step)
        give_gradients(theirs, step)
        norm = torchs.clip_grad_norm_(fastclip.clippable(other), 1.0)
        mine.step()
        other.step()
        torch.testing.assert_close(handle.total_norm.float(), norm)
    assert distance(ours, theirs) <= 1e-5


def test_a_checkpoint_in_between():
    """The flag of a group travels with it; the hook stays on the optimizer that it is on."""
    ours = weights()
    optimizer = FUSED["AdamW"]([{"params": ours[:2]}, {"params": ours[2:], "clip_grad": False}])
    handle = fastclip.clip_on_step(optimizer, 1.0)
    for step in range(3):
        give_gradients(ours, step)
        optimizer.step()
    saved, at = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in ours]
    results = []
    for _ in range(2):
        optimizer.load_state_dict(copy.deepcopy(saved))
        for parameter, value in zip(ours, at, strict=True):
            parameter.data.copy_(value)
        assert len(fastclip.clippable(optimizer)) == 2
        for step in range(3, 8):
            give_gradients(ours, step)
            optimizer.step()
        results.append([p.detach().clone() for p in ours])
    reference.assert_bits(*results)
    assert handle.clip_coef < 1


def test_several_optimizers_and_wrapped_ones():
    class Wrapper(torch.optim.Optimizer):  # as Accelerate's
        def __init__(self, optimizer):
            self.optimizer = optimizer

        def step(self, closure=None):
            return self.optimizer.step(closure)

    first, second, third = weights(), weights(), weights()
    made = [FUSED["AdamW"](first), OPTIMIZERS["SGD"](second)]
    handles = [fastclip.clip_on_step(made[0], 1.0), fastclip.clip_on_step(Wrapper(made[1]), 0.5)]
    for step in range(10):
        for params, optimizer in zip((first, second), (made[0], Wrapper(made[1])), strict=True):
            give_gradients(params, step)
            optimizer.step()
    train_other = OPTIMIZERS["SGD"](third)
    for step in range(10):
        give_gradients(third, step)
        torchs.clip_grad_norm_(third, 0.5)
        train_other.step()
    assert distance(second, third) <= 1e-5
    assert handles[0].clip_coef == pytest.approx(2 * handles[1].clip_coef.item()) or handles[0].clip_coef == 1


# GradScaler


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("defer", ["auto", True, False])
@pytest.mark.parametrize("name", ["AdamW fused", "SGD fused", "SGD"])
def test_with_a_live_grad_scaler(name, defer, unscale):
    if defer is True and "fused" not in name:
        return
    ours, theirs = weights(), weights()
    mine, other = OPTIMIZERS[name](ours), OPTIMIZERS[name](theirs)
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=5) for _ in range(2)]
    handle = fastclip.clip_on_step(mine, 1.0, defer=defer)
    for step in range(STEPS):
        for params, scaler in zip((ours, theirs), scalers, strict=True):
            scaler.scale(torch.ones(()))
            give_gradients(params, step, scaler.get_scale())
            if step % 10 == 4:
                params[1].grad[2] = math.inf
        if unscale:
            scalers[0].unscale_(mine)
        scalers[1].unscale_(other)
        norm = torchs.clip_grad_norm_(theirs, 1.0)
        scalers[0].step(mine)
        scalers[1].step(other)
        for scaler in scalers:
            scaler.update()
        assert scalers[0].state_dict() == scalers[1].state_dict()
        if step % 10 != 4:
            torch.testing.assert_close(handle.total_norm.float(), norm)
    assert distance(ours, theirs) <= 1e-5


@pytest.mark.parametrize("bound", [{"max_norm": 1.0, "per_tensor": True}, {"clip_value": 0.3}])
def test_other_bounds_of_scaled_gradients(bound):
    ours, theirs = weights(), weights()
    mine, other = FUSED["AdamW"](ours), FUSED["AdamW"](theirs)
    fastclip.clip_on_step(mine, **bound)
    fastclip.clip_on_step(other, **bound)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(20):
        scaler.scale(torch.ones(()))
        give_gradients(ours, step, 1024.0)
        give_gradients(theirs, step)
        scaler.step(mine)
        scaler.update()
        other.step()
    assert distance(ours, theirs) <= 1e-5


@pytest.mark.parametrize(
    "bound", ["policy", {"max_norm": 1.0, "per_tensor": True}, {"clip_value": 0.3}, {"max_norm": 1}]
)
def test_scaled_gradients_with_a_group_that_is_left_out(bound):
    """A policy sees norms without the scale; groups that are not clipped lose it too."""
    results = []
    for scale in (1.0, 1024.0):
        params = weights()
        groups = [{"params": params[:2]}, {"params": params[2:], "clip_grad": False}]
        optimizer = torch.optim.SGD(groups, lr=0.1, fused=True)
        chosen = {"policy": fastclip.policy.ZClip(warmup_steps=2)} if bound == "policy" else bound
        handle = fastclip.clip_on_step(optimizer, **chosen)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10**6)
        for step in range(6):
            scaler.scale(torch.ones(()))
            give_gradients(params, step, scale)
            scaler.step(optimizer)
            scaler.update()
        results.append((params, handle.total_norm))
    assert distance(results[1][0], results[0][0]) <= 1e-5
    torch.testing.assert_close(results[1][1], results[0][1])


# nonfinite


def snapshot(params, optimizer):
    return copy.deepcopy([[p.detach() for p in params], optimizer.state_dict()["state"]])


def same_snapshot(a, b) -> None:
    reference.assert_bits(a[0], b[0])
    assert a[1].keys() == b[1].keys()
    for one, other in zip(a[1].values(), b[1].values(), strict=True):
        assert one.keys() == other.keys()
        for x, y in zip(one.values(), other.values(), strict=True):
            assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("bound", [{"max_norm": 1.0}, {"clip_value": 1.0}, {"max_norm": 1.0, "per_tensor": True}, {}])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_skip_leaves_parameters_and_state_bitwise(name, bound, first):
    ours = weights()
    optimizer = OPTIMIZERS[name](ours)
    handle = fastclip.clip_on_step(optimizer, **bound, nonfinite="skip")
    if not first:
        give_gradients(ours, 1)
        optimizer.step()
    before = snapshot(ours, optimizer)
    for bad in (math.nan, math.inf):
        give_gradients(ours, 2)
        ours[1].grad[3] = bad
        grads = [p.grad for p in ours]
        optimizer.step()
        same_snapshot(snapshot(ours, optimizer), before)
        assert all(p.grad is grad for p, grad in zip(ours, grads, strict=True))
    assert (handle.skipped_steps, handle.consecutive_skips) == (2, 2)
    give_gradients(ours, 3)
    optimizer.step()
    assert (handle.skipped_steps, handle.consecutive_skips) == (2, 0)
    assert not torch.equal(ours[0].detach(), before[0][0])


def test_max_skips_names_step_count_and_parameter():
    names = ["embedding", "bias", "head"]
    for named in (True, False):
        ours = weights()
        optimizer = torch.optim.AdamW(zip(names, ours, strict=True) if named else ours, lr=1e-2, fused=True)
        fastclip.clip_on_step(optimizer, 1.0, nonfinite="skip", max_skips=3)
        before = None
        for step in range(7):
            give_gradients(ours, step)
            if step in (1, 2, 4, 5, 6):
                ours[1].grad[0] = ours[2].grad[0, 0] = math.nan
                before = before or snapshot(ours, optimizer)
            if step < 6:
                optimizer.step()
                before = None
                continue
            before = snapshot(ours, optimizer)
            where = "bias" if named else r"param_groups\[0\]\['params'\]\[1\]"
            with pytest.raises(
                RuntimeError, match=rf"max_skips: at step 7, 3 steps in a row .*: {where}, of shape \(5,\)"
            ):
                optimizer.step()
            same_snapshot(snapshot(ours, optimizer), before)


def test_raise_and_zero():
    ours = weights()
    optimizer = OPTIMIZERS["SGD"](ours)
    with fastclip.clip_on_step(optimizer, 1.0, nonfinite="raise"):
        give_gradients(ours, 1)
        ours[0].grad[0, 0] = math.nan
        before = snapshot(ours, optimizer)
        with pytest.raises(RuntimeError, match="non-finite"):
            optimizer.step()
        same_snapshot(snapshot(ours, optimizer), before)
    with fastclip.clip_on_step(optimizer, 1.0, nonfinite="zero") as handle:
        optimizer.step()
        assert all(p.grad.count_nonzero() == 0 for p in ours)
        assert handle.clip_coef == 0


def test_propagate_is_torchs_arithmetic():
    for defer in (True, False):
        ours, theirs = weights(), weights()
        mine, other = FUSED["SGD"](ours), FUSED["SGD"](theirs)
        fastclip.clip_on_step(mine, 1.0, defer=defer)
        for params in (ours, theirs):
            give_gradients(params, 1)
            params[0].grad[0, 0] = math.inf
        torchs.clip_grad_norm_(theirs, 1.0)
        mine.step()
        other.step()
        torch.testing.assert_close([p.detach() for p in ours], [p.detach() for p in theirs], equal_nan=True)


def test_a_step_that_raises_leaves_nothing_behind():
    ours = weights()
    optimizer = FUSED["AdamW"](ours)
    fastclip.clip_on_step(optimizer, 1.0, defer=True)
    give_gradients(ours, 1)
    optimizer.param_groups[0]["betas"] = None
    with pytest.raises(TypeError):
        optimizer.step()
    optimizer.param_groups[0]["betas"] = (0.9, 0.999)
    theirs = weights()
    other = FUSED["AdamW"](theirs)
    for step in range(2, 5):
        for params in (ours, theirs):
            give_gradients(params, step)
        torchs.clip_grad_norm_(theirs, 1.0)
        optimizer.step()
        other.step()
    assert distance(ours, theirs) <= 1e-5
    assert not hasattr(optimizer, "grad_scale")


def test_a_coefficient_that_the_kernel_cannot_hold():
    """1e-3 / 6e39 is divided by in place."""
    for defer in (True, "auto", False):
        weight = torch.nn.Parameter(torch.zeros(400))
        weight.grad = torch.full((400,), 3e38)
        optimizer = torch.optim.SGD([weight], lr=1.0, fused=True)
        fastclip.clip_on_step(optimizer, 1e-3, defer=defer)
        optimizer.step()
        torch.testing.assert_close(weight.detach(), torch.full((400,), -1e-3 / 20))


# The handle


def test_removed_after_a_step_that_raised_or_inside_of_one():
    params = weights()
    optimizer = FUSED["AdamW"](params)
    handle = fastclip.clip_on_step(optimizer, 1.0, defer=True)
    give_gradients(params, 1)
    optimizer.param_groups[0]["betas"] = None
    with pytest.raises(TypeError):
        optimizer.step()
    handle.remove()
    assert not hasattr(optimizer, "grad_scale")
    optimizer.param_groups[0]["betas"] = (0.9, 0.999)
    handle = fastclip.clip_on_step(optimizer, 1.0, defer=True)
    closure = closure_of(params)

    def last():
        handle.remove()
        return closure()

    optimizer.step(last)
    assert not hasattr(optimizer, "grad_scale")


def test_remove():
    ours = weights()
    optimizer = OPTIMIZERS["SGD"](ours)
    handle = fastclip.clip_on_step(optimizer, 1.0)
    with pytest.raises(RuntimeError, match="this SGD is clipped on step already"):
        fastclip.clip_optimizer(optimizer, clipnorm=1.0)
    handle.remove()
    handle.remove()
    give_gradients(ours, 1)
    grads = [p.grad.clone() for p in ours]
    optimizer.step()
    reference.assert_bits([p.grad for p in ours], grads)
    fastclip.clip_on_step(optimizer, 1.0).remove()


def test_the_optimizer_is_not_kept_alive():
    optimizer = OPTIMIZERS["SGD"](weights())
    handle, gone = fastclip.clip_on_step(optimizer, 1.0), weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    handle.remove()


def test_without_gradients():
    ours = weights()
    optimizer = FUSED["AdamW"](ours)
    handle = fastclip.clip_on_step(optimizer, 1.0, nonfinite="skip", max_skips=1)
    optimizer.step()
    assert handle.total_norm == 0
    assert handle.skipped_steps == 0
    assert handle.clip_coef == 1


def test_a_policy():
    class Halve:
        def __init__(self):
            self.losses = []

        def clip_(self, parameters, *, loss=None):
            self.losses.append(loss)
            return fastclip.clip_grad_norm_(parameters, 0.5)

    ours, theirs, policy = weights(), weights(), Halve()
    mine, other = OPTIMIZERS["SGD"](ours), OPTIMIZERS["SGD"](theirs)
    handle = fastclip.clip_on_step(mine, policy=policy)
    for step in range(3):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        fastclip.clip_grad_norm_(theirs, 0.5)
        mine.step()
        other.step()
    reference.assert_bits([p.detach() for p in ours], [p.detach() for p in theirs])
    assert handle.total_norm > 0
    loss = mine.step(closure_of(ours))
    assert policy.losses == [None, None, None, loss]


# Keras's words


@pytest.mark.parametrize(
    ("keras", "ours"),
    [
        ({"clipvalue": 0.3}, {"clip_value": 0.3}),
        ({"clipnorm": 0.5}, {"max_norm": 0.5, "per_tensor": True}),
        ({"global_clipnorm": 0.5}, {"max_norm": 0.5}),
    ],
)
def test_clip_optimizer(keras, ours):
    results = []
    for make in (lambda o: fastclip.clip_optimizer(o, **keras), lambda o: fastclip.clip_on_step(o, **ours)):
        params = weights()
        optimizer = FUSED["AdamW"](params)
        make(optimizer)
        train(params, optimizer)
        results.append([p.detach() for p in params])
    reference.assert_bits(*results)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        (
            {"clipnorm": 1.0, "clipvalue": 1.0},
            ValueError,
            "Only one of `clipnorm`, `clipvalue` and `global_clipnorm` can",
        ),
        ({}, ValueError, "Expected one of `clipnorm`, `clipvalue` and `global_clipnorm`"),
        *(
            ({name: value}, error, rf"{name}: expected a number.* got {value!r}")
            for name in ("clipnorm", "clipvalue", "global_clipnorm")
            for value, error in (
                (0, ValueError),
                (-1.0, ValueError),
                (math.nan, ValueError),
                (True, TypeError),
                ("1", TypeError),
            )
        ),
    ],
    ids=str,
)
def test_clip_optimizer_refuses(options, error, text):
    optimizer = OPTIMIZERS["SGD"](weights())
    with pytest.raises(error, match=text):
        fastclip.clip_optimizer(optimizer, **options)
    fastclip.clip_optimizer(optimizer, clipnorm=1.0)  # nothing was left on it


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({}, ValueError, "max_norm, clip_value, policy: expected one of them, got none"),
        ({"max_norm": 1.0, "clip_value": 1.0}, ValueError, "got max_norm and clip_value"),
        ({"max_norm": 0.0}, ValueError, "max_norm: expected a number greater than 0, got 0.0"),
        ({"max_norm": "1"}, TypeError, "max_norm: expected a number, got '1'"),
        ({"clip_value": True}, TypeError, "clip_value: expected a number, got True"),
        ({"max_norm": 1.0, "norm_type": "2"}, TypeError, "norm_type: expected a number, got '2'"),
        ({"max_norm": 1.0, "nonfinite": "sanitize"}, ValueError, "nonfinite: expected one of .*'skip', got 'sanitize'"),
        ({"max_norm": 1.0, "max_skips": 3}, ValueError, "max_skips: expected nonfinite='skip' with it"),
        (
            {"max_norm": 1.0, "nonfinite": "skip", "max_skips": 0},
            ValueError,
            "max_skips: expected an integer of at least 1",
        ),
        ({"clip_value": 1.0, "per_tensor": True}, ValueError, "per_tensor: expected a max_norm"),
        ({"max_norm": 10**400}, OverflowError, "max_norm: expected a number"),
        ({"max_norm": 1.0, "defer": 0}, ValueError, "defer: expected True, False or 'auto', got 0"),
        ({"policy": fastclip.policy.ZClip}, TypeError, "policy: expected an object"),
        ({"policy": 3.5}, TypeError, r"policy: expected an object with clip_\(parameters"),
        ({"max_norm": 1.0, "defer": "always"}, ValueError, "defer: expected True, False or 'auto', got 'always'"),
        (
            {"max_norm": 1.0, "defer": True},
            ValueError,
            "defer: expected an optimizer with fused=True in all groups, got SGD",
        ),
    ],
    ids=lambda value: str(value)[:50],
)
def test_errors(options, error, text):
    optimizer = OPTIMIZERS["SGD"](weights())
    with pytest.raises(error, match=text):
        fastclip.clip_on_step(optimizer, **options)
    assert not optimizer._optimizer_step_pre_hooks


def test_more_errors():
    for defer, groups in (
        ("expected all groups to be clipped", [{"params": weights(), "clip_grad": False}]),
        ("fused=True in all groups", [{"params": weights()}, {"params": weights(), "fused": False}]),
    ):
        with pytest.raises(ValueError, match=f"defer: .*{defer}"):
            fastclip.clip_on_step(torch.optim.AdamW(groups, fused=True), 1.0, defer=True)
    with pytest.raises(ValueError, match="nonfinite: 'skip' with LBFGS"):
        fastclip.clip_on_step(torch.optim.LBFGS(weights()), 1.0, nonfinite="skip")
    with pytest.raises(TypeError, match=r"optimizer: expected a torch\.optim\.Optimizer, got"):
        fastclip.clip_on_step(parameters([torch.ones(2)]), 1.0)


# Compilers


@pytest.mark.filterwarnings("ignore")  # of inductor, about torch
def test_compiled_clip_and_step():
    """Clip and step as one graph of inductor's."""
    ours, theirs = weights(), weights()
    mine, other = (torch.optim.AdamW(params, lr=1e-2, foreach=True) for params in (ours, theirs))

    @torch.compile
    def step():
        fastclip.clip_grad_norm_(ours, 1.0)
        mine.step()

    for i in range(5):
        give_gradients(ours, i)
        give_gradients(theirs, i)
        step()
        torchs.clip_grad_norm_(theirs, 1.0)
        other.step()
    assert distance(ours, theirs) <= 1e-5
