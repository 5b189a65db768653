"""fastclip.policy against the rules in plain Python: histories, averages, spikes, norms that are not finite."""

from __future__ import annotations

import copy
import math
import statistics

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from torch._subclasses.fake_tensor import FakeTensorMode

import fastclip
import subproc
import ways
from cases import Own
from fastclip import policy

NORMS = [1.0, 1.2, 0.9, 1.1, 1.0, 5.0, 0.8, 1.3, 30.0, 1.0, 0.7, 1.05, 2.0, 1.0, 0.95, 9.0, 1.1, 1.0]


def steps(made, norms, losses=None):
    """The norm of the gradient after each step."""
    weight, out = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64)), []
    for i, norm in enumerate(norms):
        weight.grad = torch.tensor([0.6, -0.8], dtype=torch.float64) * norm
        before = made.clip_([weight], loss=None if losses is None else losses[i])
        assert before.item() == pytest.approx(norm, nan_ok=True)
        out.append(weight.grad.norm().item())
    return out


# The rules in plain Python.


def autoclip(norms, percentile, history, include_current, max_norm=math.inf):
    past, out = [], []
    for norm in norms:
        if include_current:
            past.append(norm)
        kept = past[-history:] if history else past
        bound = min(np.percentile(kept, percentile) if kept else math.inf, max_norm)
        if not include_current:
            past.append(norm)
        out.append(norm * min(bound / (norm + 1e-6), 1) if bound < math.inf else norm)
    return out


def zclip(norms, max_norm, mode, target, clip_factor, skip, warmup=5, alpha=0.97, threshold=2.5):
    warm, mean, var, out = [], 0.0, 0.0, []
    for norm in norms:
        if len(warm) < warmup:
            warm.append(norm)
            out.append(norm * min(max_norm / (norm + 1e-6), 1) if max_norm < math.inf else norm)
            mean, var = statistics.fmean(warm), statistics.pvariance(warm)
            continue
        std = math.sqrt(var)
        z = (norm - mean) / (std + 1e-6)
        spike, value = z > threshold, norm
        if mode == "percentile":
            spike = norm > mean + threshold * std
            value = mean + threshold * std if spike else norm
        elif spike:
            value = (mean + threshold * std / (z / threshold)) * clip_factor if target == "adaptive" else mean
        bound = min(value, max_norm)
        out.append(norm * bound / (norm + 1e-6) if norm > bound else norm)
        if not (skip and spike):
            mean = alpha * mean + (1 - alpha) * value
            var = alpha * var + (1 - alpha) * (value - mean) ** 2
    return out


def adagc(norms, max_norm, ratio=1.04, beta=0.9, warmup=4):
    """Of several tensors: a list of norms for each step."""
    average, out = [math.inf] * len(norms[0]), []
    for i, row in enumerate(norms):
        coef = min(max_norm / (math.hypot(*row) + 1e-6), 1)
        clipped = []
        for k, norm in enumerate(row):
            if i < warmup:
                clipped.append(norm * coef)
                average[k] = min(average[k], norm * coef)
                continue
            above = norm > ratio * average[k]
            clipped.append(norm * ratio * average[k] / (norm + 1e-6) if above else norm)
            average[k] = beta * average[k] + (1 - beta) * (ratio * average[k] if above else norm)
        out.append(clipped)
    return out


def spikes(values, window=6, sigma=2.0, least=4):
    out = []
    for i, value in enumerate(values):
        past = values[max(0, i - window) : i]
        out.append(float(len(past) >= least and value > statistics.fmean(past) + sigma * statistics.stdev(past)))
    return out


@pytest.mark.parametrize("history", [None, 1, 4, 100])
@pytest.mark.parametrize("include_current", [True, False])
@pytest.mark.parametrize(("percentile", "max_norm"), [(10.0, None), (0.0, None), (100.0, 2.0), (37.5, None)])
def test_autoclip(percentile, history, include_current, max_norm):
    made = policy.AutoClip(percentile, history, include_current, max_norm)
    expected = autoclip(NORMS, percentile, history, include_current, max_norm or math.inf)
    assert steps(made, NORMS) == pytest.approx(expected, rel=1e-9)


def test_autoclip_over_a_long_history():
    """Past the first 1,024 steps its memory grows."""
    norms = torch.rand(2500, generator=torch.Generator().manual_seed(1), dtype=torch.float64).tolist()
    made = policy.AutoClip(25.0)
    assert steps(made, norms) == pytest.approx(autoclip(norms, 25.0, None, True), rel=1e-9)
    assert made.state_dict()["sorted"].numel() == 4096


@pytest.mark.parametrize("mode", ["zscore", "percentile"])
@pytest.mark.parametrize("target", ["adaptive", "mean"])
@pytest.mark.parametrize(("max_norm", "factor", "skip"), [(None, 1.0, False), (1.05, 0.9, False), (None, 1.0, True)])
def test_zclip(mode, target, max_norm, factor, skip):
    made = policy.ZClip(
        max_norm=max_norm, warmup_steps=5, mode=mode, target=target, clip_factor=factor, skip_on_spike=skip
    )
    expected = zclip(NORMS, max_norm or math.inf, mode, target, factor, skip)
    assert steps(made, NORMS) == pytest.approx(expected, rel=1e-9)


def test_adagc():
    rows = [[norm, 3.0 / norm, 0.5 + 0.1 * i] for i, norm in enumerate(NORMS)]
    made = policy.AdaGC(max_norm=2.0, beta=0.9, warmup_steps=4)
    weights = [torch.nn.Parameter(torch.zeros(2, dtype=torch.float64)) for _ in range(3)]
    for row, expected in zip(rows, adagc(rows, 2.0), strict=True):
        for weight, norm in zip(weights, row, strict=True):
            weight.grad = torch.tensor([0.6, -0.8], dtype=torch.float64) * norm
        assert made.clip_(weights).item() == pytest.approx(math.hypot(*row))
        assert [w.grad.norm().item() for w in weights] == pytest.approx(expected, rel=1e-9)


def test_adagc_where_a_gradient_is_missing_or_zero():
    """Neither becomes an average of 0, which would freeze the tensor for ever."""
    made = policy.AdaGC(warmup_steps=2)
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(3)]
    for i in range(6):
        weights[0].grad = torch.tensor([0.3])
        weights[1].grad = None if i < 3 else torch.tensor([0.4])
        weights[2].grad = torch.tensor([0.0 if i < 3 else 0.5])
        made.clip_(weights)
    assert [w.grad.item() for w in weights] == pytest.approx([0.3, 0.4, 0.5])
    with pytest.raises(ValueError, match="parameters: expected the same 3 at every step, got 2"):
        made.clip_(weights[:2])


def test_adagc_with_a_bound_of_zero():
    """A norm of 0 starts no average there either; infinity times 0 would."""
    made, weights = policy.AdaGC(max_norm=0.0, warmup_steps=2), [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    for _ in range(3):
        weights[0].grad, weights[1].grad = torch.tensor([0.3]), torch.tensor([0.0])
        made.clip_(weights)
    assert made.state_dict()["average"].tolist() == [0.0, math.inf]


def test_adagc_of_a_list_that_is_read_in_another_order():
    """Of several backends, and with a parameter that has no gradient: each average is that of its parameter."""
    averages = []
    for second in (torch.float64, torch.complex128):
        made = policy.AdaGC(warmup_steps=4)
        dtypes = [torch.float64, second, torch.float64, torch.float64]
        weights = [torch.nn.Parameter(torch.zeros(2, dtype=dtype)) for dtype in dtypes]
        for i, norm in enumerate(NORMS):
            for k in (0, 1, 3):
                weights[k].grad = torch.tensor([0.6, -0.8], dtype=weights[k].dtype) * (norm + k)
            if i % 5 == 4:
                weights[0].grad = None
            made.clip_(weights)
        averages.append(made.state_dict()["average"])
    torch.testing.assert_close(averages[1], averages[0], rtol=1e-12, atol=0)
    assert averages[0].isinf().tolist() == [False, False, True, False]


def test_skip_on_spike():
    made = policy.SkipOnSpike(window=6, sigma=2.0, min_history=4)
    weight, seen = torch.nn.Parameter(torch.zeros(1)), []
    for norm in NORMS:
        weight.grad = torch.tensor([norm])
        made.clip_([weight])
        assert weight.grad.item() == pytest.approx(norm)
        assert (made.skip.dtype, made.skip.shape) == (torch.float32, ())
        seen.append(made.skip.item())
    assert seen == spikes(NORMS)
    assert 1.0 in seen


@pytest.mark.parametrize("as_tensor", [True, False])
def test_skip_on_a_spike_of_the_loss(as_tensor):
    made = policy.SkipOnSpike(window=6, sigma=2.0, min_history=4, max_norm=0.5)
    with ways.one_rank():
        seen = []
        for loss in NORMS:
            out = steps(made, [1.0], [torch.tensor(loss) if as_tensor else loss])
            assert out == pytest.approx([0.5], rel=1e-5)
            seen.append(made.skip.item())
    assert seen == spikes(NORMS)


def test_fused_optimizers_skip():
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=1.0, fused=True)
    made = policy.SkipOnSpike(window=8, min_history=2)
    for grad, moved in ((1.0, 1), (1.0, 2), (1.0, 3), (50.0, 3), (math.nan, 3), (1.0, 4)):
        weight.grad = torch.full((2,), grad)
        made.clip_([weight])
        optimizer.grad_scale, optimizer.found_inf = None, made.skip
        optimizer.step()
        assert weight.tolist() == [-moved, -moved]


MADE = {
    "AutoClip": lambda: policy.AutoClip(30.0),
    "AutoClip, window": lambda: policy.AutoClip(30.0, history=5),
    "AutoClip, past": lambda: policy.AutoClip(30.0, include_current=False),
    "ZClip": lambda: policy.ZClip(warmup_steps=4),
    "ZClip, skip": lambda: policy.ZClip(warmup_steps=4, skip_on_spike=True, mode="percentile"),
    "AdaGC": lambda: policy.AdaGC(warmup_steps=4),
    "SkipOnSpike": lambda: policy.SkipOnSpike(window=6, min_history=4, max_norm=2.0),
}


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("name", MADE)
def test_a_norm_that_is_not_finite_is_as_if_it_had_not_been(name, broken):
    plain, met = MADE[name](), MADE[name]()
    expected = steps(plain, NORMS)
    out = []
    for i, norm in enumerate(NORMS):
        if i in (0, 2, 4, 10):
            steps_broken(met, broken)
            if name == "SkipOnSpike":
                assert met.skip == 1
        out += steps(met, [norm])
    assert out == expected
    assert (met.steps, met.nonfinite_steps) == (len(NORMS), 4)
    for key, value in plain.state_dict().items():
        assert key == "nonfinite_steps" or torch.equal(value.nan_to_num(-1), met.state_dict()[key].nan_to_num(-1)), key


def steps_broken(made, broken):
    weight = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    weight.grad = torch.tensor([1.0, broken], dtype=torch.float64)
    made.clip_([weight])


@pytest.mark.parametrize("cut", [0, 3, 9])
@pytest.mark.parametrize("name", MADE)
def test_goes_on_from_a_checkpoint(name, cut, tmp_path):
    whole, first, second = MADE[name](), MADE[name](), MADE[name]()
    expected = steps(whole, NORMS)
    out = steps(first, NORMS[:cut])
    torch.save(first.state_dict(), tmp_path / "state")
    saved = copy.deepcopy(first.state_dict())
    second.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert out + steps(second, NORMS[cut:]) == expected
    assert all(torch.equal(a.nan_to_num(), saved[k].nan_to_num()) for k, a in first.state_dict().items())
    whole.reset()
    assert steps(whole, NORMS) == expected


def test_a_state_of_something_else_is_refused():
    with pytest.raises(ValueError, match="state_dict"):
        policy.ZClip().load_state_dict({"mean": torch.tensor(1.0)})
    states = {}
    for name, make in MADE.items():
        made = make()
        steps(made, NORMS)
        states[name] = made.state_dict()
    for name, make in MADE.items():
        for state in states.values():
            if state.keys() != states[name].keys():
                with pytest.raises(ValueError, match="state_dict"):
                    make().load_state_dict(state)
    for made, state in (
        (policy.AutoClip(history=5), policy.AutoClip(history=6)),
        (policy.ZClip(), policy.ZClip(warmup_steps=5)),
        (policy.SkipOnSpike(), policy.SkipOnSpike(window=100)),
    ):
        steps(state, NORMS)
        with pytest.raises(ValueError, match="for these arguments"):
            made.load_state_dict(state.state_dict())
        assert steps(made, NORMS[:2])  # it is as it was
    with pytest.raises(TypeError, match=r"state: .*None"):
        policy.ZClip().load_state_dict(None)


@pytest.mark.parametrize("name", MADE)
def test_a_state_whose_counts_were_cast_goes_on(name):
    whole, first, second = MADE[name](), MADE[name](), MADE[name]()
    expected = steps(whole, NORMS)
    steps(first, NORMS[:5])
    second.load_state_dict({key: value.double() for key, value in first.state_dict().items()})
    assert steps(second, NORMS[5:]) == expected[5:]


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_without_a_bound_no_norm_reaches_the_gradients(broken):
    for own in (False, True):
        for made in (policy.SkipOnSpike(), policy.ZClip(max_norm=None, warmup_steps=3)):
            weights = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
            weights[0].grad, grad = torch.tensor([1.0, 2.0]), torch.tensor([broken, 3.0])
            weights[1].data = weights[1].data.as_subclass(Own) if own else weights[1].data
            weights[1].grad = grad.as_subclass(Own) if own else grad
            made.clip_(weights)
            assert weights[0].grad.tolist() == [1.0, 2.0]
            assert weights[1].grad[1] == 3.0


def test_a_trace_leaves_nothing_in_a_policy():
    made = policy.AdaGC(warmup_steps=1)
    weights = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    with FakeTensorMode(allow_non_fake_inputs=True):
        traced = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
        traced[0].grad = torch.ones(2)
        made.clip_(traced)
    made.reset()
    weights[0].grad = torch.tensor([3.0, 4.0])
    assert made.clip_(weights) == 5.0


def test_a_threshold_beyond_measure_makes_no_nan():
    made, weight = (
        policy.ZClip(warmup_steps=2, max_norm=None, z_threshold=1e200, eps=0.0),
        torch.nn.Parameter(torch.zeros(1)),
    )
    for norm in (1.0, 1.0, 2.0):
        weight.grad = torch.tensor([norm])
        made.clip_([weight])
    assert weight.grad.isfinite()


def test_a_count_that_was_read_is_no_part_of_the_state():
    made = policy.ZClip()
    steps(made, NORMS[:2])
    count = made.steps
    count += 5
    assert made.steps == 2


@pytest.mark.parametrize("loss", ["high", 10**400, torch.ones(2), torch.tensor(1 + 1j)])
def test_a_loss_is_a_number(loss):
    made = policy.SkipOnSpike(window=4, min_history=2)
    with pytest.raises((TypeError, ValueError, OverflowError), match=r"^loss: "):
        steps(made, [1.0], [loss])
    assert made.steps == 0


@pytest.mark.parametrize("name", MADE)
def test_tensor_subclasses_and_another_default_device(name):
    expected, made = steps(MADE[name](), NORMS[:6]), MADE[name]()
    weights = [torch.nn.Parameter(torch.zeros(2, dtype=torch.float64)) for _ in range(2)]
    found = []
    with torch.device("meta"):
        for norm in NORMS[:6]:
            grad = torch.tensor([0.6, -0.8], dtype=torch.float64, device="cpu") * norm
            weights[0].grad = grad.as_subclass(Own)
            made.clip_(weights)
            found.append(weights[0].grad.norm().item())
    assert found == pytest.approx(expected, rel=1e-12)


class NoSync(ways.Dispatch):
    """No number may leave the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.equal.default,
            torch.ops.aten.nonzero.default,
        ), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", MADE)
def test_no_step_waits_for_the_device(backend, name):
    made = MADE[name]()
    weights = [torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(3))]
    with NoSync():
        for norm in NORMS:
            weights[0].grad = torch.full((2,), norm)
            weights[1].grad = torch.full((3,), norm / 2) if norm < 8 else None
            made.clip_(weights, loss=torch.tensor(norm))


# With the four that read, write and finish a list which is watched.
OPS = {
    "AutoClip": 29,
    "AutoClip, window": 38,
    "AutoClip, past": 30,
    "ZClip": 34,
    "ZClip, skip": 32,
    "AdaGC": 27,
    "SkipOnSpike": 31,
}


@pytest.mark.parametrize("name", MADE)
def test_a_step_takes_few_ops(cpu, name):
    """On a GPU each is a launch."""
    made, weight = MADE[name](), torch.nn.Parameter(torch.zeros(2))
    for _ in range(2):
        weight.grad = torch.ones(2)
        with ways.Watcher() as ops:
            made.clip_([weight])
    assert len(ops.seen) <= OPS[name], ops.seen


@pytest.mark.parametrize("name", ["AutoClip, window", "ZClip", "AdaGC", "SkipOnSpike"])
def test_is_compiled_once(name):
    """But for the first step, which makes the state."""
    made, weights = MADE[name](), [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    graphs = torch._dynamo.testing.CompileCounter()
    step = torch.compile(lambda: made.clip_(weights), backend=graphs, fullgraph=True)
    for norm in NORMS[:5]:
        weights[0].grad = torch.tensor([0.6, -0.8]) * norm
        step()
    assert (made.steps, graphs.frame_count) == (5, 2)


@pytest.mark.parametrize("name", MADE)
def test_a_state_of_another_width_goes_on(name):
    """That of a device that has no float64."""
    whole, first, second = MADE[name](), MADE[name](), MADE[name]()
    expected = steps(whole, NORMS)
    steps(first, NORMS[:9])
    narrow = {key: value.float() if value.is_floating_point() else value for key, value in first.state_dict().items()}
    second.load_state_dict(narrow)
    assert steps(second, NORMS[9:]) == pytest.approx(expected[9:], rel=1e-5)
    assert {value.dtype for value in second.state_dict().values()} == {torch.float64, torch.int64}


@pytest.mark.parametrize("name", MADE)
def test_without_gradients_nothing_happens(name):
    made = MADE[name]()
    assert made.clip_([torch.nn.Parameter(torch.zeros(2))]) == 0
    assert made.steps == 0


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: policy.AutoClip(101.0), "percentile: .*101"),
        (lambda: policy.AutoClip(True), "percentile: .*True"),
        (lambda: policy.AutoClip(history=0), "history: .*0"),
        (lambda: policy.ZClip(alpha=1.5), r"alpha: .*1\.5"),
        (lambda: policy.ZClip(max_norm=-1.0), r"max_norm: .*-1\.0"),
        (lambda: policy.ZClip(mode="median"), "mode: .*'median'"),
        (lambda: policy.ZClip(warmup_steps=0), "warmup_steps: .*0"),
        (lambda: policy.AdaGC(beta=math.nan), "beta: .*nan"),
        (lambda: policy.AdaGC(ratio=math.inf), "ratio: expected a finite number above 0, got inf"),
        (lambda: policy.AdaGC(ratio=0), "ratio: expected a finite number above 0, got 0"),
        (lambda: policy.SkipOnSpike(window=10, min_history=11), "min_history: .*11"),
        (lambda: policy.SkipOnSpike(sigma="6"), "sigma: .*'6'"),
    ],
)
def test_nonsense_is_refused(make, error):
    with pytest.raises((TypeError, ValueError), match=error):
        make()


def test_is_imported_when_first_used():
    script = "import sys, fastclip; assert 'fastclip.policy' not in sys.modules; fastclip.policy.ZClip"
    assert not (child := subproc.execute(script)).error, child
    with pytest.raises(AttributeError, match="no attribute 'policies'"):
        fastclip.policies  # noqa: B018
