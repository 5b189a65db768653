"""GradMonitor: what it records, that it clips to the same bits and waits for nothing, its writers and alarms."""

from __future__ import annotations

import csv
import gc
import json
import math
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional

import fastclip
import reference
import subproc
from fastclip import GradientWarning, GradMonitor
from fastclip.monitor import alarms, monitor


def model_with_grads(scale: float = 1.0, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    made = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 2)).to(dtype)
    for parameter in made.parameters():
        parameter.grad = (torch.randn(parameter.shape) * scale).to(dtype)
    made[2].bias.grad[0] = 0
    return made


def grads(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm_type": math.inf},
        {"norm_type": 3.0},
        {"inv_scale": 0.125},
        {"inv_scale": torch.tensor(0.125), "nonfinite": "zero"},
        {"nonfinite": "sanitize"},
        {"error_if_nonfinite": True},
        {"norm_dtype": torch.float64},
    ],
    ids=str,
)
def test_the_bits_of_the_plain_clip(backend, dtype, options):
    for max_norm in (0.5, 1e9, math.inf):
        model, other = model_with_grads(dtype=dtype), model_with_grads(dtype=dtype)
        watching = GradMonitor(model)
        norm = watching.clip_grad_norm_(max_norm, **options)
        expected = fastclip.clip_grad_norm_(other.parameters(), max_norm, **options)
        assert torch.equal(norm, expected)
        reference.assert_bits(grads(model), grads(other))
        record = watching.records[0]
        assert record["train/grad_norm"] == pytest.approx(float(expected), rel=torch.finfo(norm.dtype).eps)


def test_a_record():
    model = model_with_grads()
    before = {name: parameter.grad.double() for name, parameter in model.named_parameters()}
    watching = GradMonitor(model, every=3)
    watching.clip_grad_norm_(1.0, loss=torch.tensor(2.5, requires_grad=True), inv_scale=0.5)
    watching.observe(loss=1.5)
    watching.clip_grad_value_(0.25)
    first, second, third = watching.records
    norm = math.sqrt(sum(float(g.square().sum()) for g in before.values())) / 2
    assert first["train/grad_norm"] == pytest.approx(norm, rel=1e-12)
    assert first["train/grad_clip_coef"] == pytest.approx(1 / (norm + 1e-6), rel=1e-12)
    assert first["train/grad_norm_clipped"] == pytest.approx(norm / (norm + 1e-6), rel=1e-12)
    assert (first["train/loss"], second["train/loss"], "train/loss" in third) == (2.5, 1.5, False)
    assert [record["step"] for record in (first, second, third)] == [0, 1, 2]
    for name, grad in before.items():
        assert first[f"train/grad_norm/{name}"] == pytest.approx(float(grad.norm()) / 2, rel=1e-6)
        assert first[f"train/grad_max/{name}"] == pytest.approx(float(grad.abs().max()) / 2, rel=1e-6)
        assert first[f"train/grad_zeros/{name}"] == int((grad == 0).sum())
    # What was clipped before is seen by the next; after a clip by value the norm is not known.
    assert second["train/grad_norm"] == pytest.approx(1.0, abs=1e-4)
    assert second["train/grad_clip_coef"] == 1
    assert "train/grad_norm_clipped" not in third
    assert all(float(grad.abs().max()) <= 0.25 for grad in grads(model))


def test_parameters_come_and_go():
    model = model_with_grads()
    watching = GradMonitor(model, layers="weight")
    model[0].bias.grad = None
    model[2].weight.requires_grad_(False).grad = None
    watching.clip_grad_norm_(1.0)
    stranger = nn.Parameter(torch.zeros(1))
    stranger.grad = torch.tensor([2.0])
    watching.clip_grad_norm_(1e9, parameters=iter([stranger, model[2].bias]))
    for parameter in model.parameters():
        parameter.grad = None
    watching.clip_grad_norm_(1.0)
    first, second = watching.records
    assert [tag for tag in first if "/grad_norm/" in tag] == ["train/grad_norm/0.weight"]
    assert second["train/grad_norm"] > 2
    assert not [tag for tag in second if "/grad_norm/" in tag]


def test_shared_parameters_and_pairs():
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([3.0, 4.0])
    watching = GradMonitor([("first", weight), ("second", weight)], prefix="")
    watching.clip_grad_norm_(1e9, parameters=[weight])
    assert watching.records[0]["grad_norm/first"] == 5
    with pytest.raises(TypeError, match="model: expected a Module or pairs"):
        GradMonitor([weight])


class Watching(torch.utils._python_dispatch.TorchDispatchMode):
    """Fails where a number is asked for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "the host waits for a number"
        return func(*args, **(kwargs or {}))


def test_no_call_waits(cpu):
    model = model_with_grads()
    watching = GradMonitor(model, every=100)
    with Watching():
        for _ in range(5):
            watching.clip_grad_norm_(1.0, loss=torch.tensor(1.0))
            watching.clip_grad_value_(1.0, loss=torch.tensor(1.0))
            watching.observe()
    assert len(watching._waiting) == 15
    assert len(watching.records) == 15


@pytest.mark.parametrize("every", [1, 4, 7])
def test_every_so_many_calls_and_at_the_end(every, tmp_path):
    model, seen = model_with_grads(), []
    with GradMonitor(model, every=every, writer=[tmp_path / "log.jsonl", lambda record, step: seen.append(step)]) as m:
        for step in range(10):
            m.clip_grad_norm_(1.0)
            assert len(seen) == (step + 1) // every * every
    assert seen == list(range(10))
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 11


LEAVE = """
import fastclip, torch
weight = torch.nn.Parameter(torch.zeros(2))
weight.grad = torch.ones(2)
monitor = fastclip.GradMonitor([("weight", weight)], every=100, writer="log.jsonl")
for _ in range(3):
    monitor.clip_grad_norm_(1.0)
"""


def test_at_exit(tmp_path):
    child = subproc.python("-c", LEAVE, cwd=tmp_path)
    assert child.returncode == 0, child.stderr
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 4


def test_memory_is_given_back():
    import weakref

    model = model_with_grads()
    watching = GradMonitor(model, every=1, keep=5)
    for _ in range(50):
        watching.clip_grad_norm_(1.0)
    assert len(watching.records) == 5
    reference_ = weakref.ref(watching)
    del watching
    gc.collect()
    assert reference_() is None


def test_writers(tmp_path):
    class Board:
        def __init__(self):
            self.scalars = []

        def add_scalar(self, tag, value, step):
            self.scalars.append((tag, value, step))

    model, board, dicts = model_with_grads(), Board(), []
    model[0].weight.grad[0, 0] = math.inf
    paths = [tmp_path / "new" / "log.jsonl", str(tmp_path / "log.csv")]
    with GradMonitor(model, writer=[paths, board, lambda *given: dicts.append(given)], alarms=False) as watching:
        watching.watch_hidden(model)
        model(torch.randn(3, 7)).sum().backward()
        watching.clip_grad_norm_(1.0)
    head, line = (json.loads(text) for text in paths[0].read_text().splitlines())
    assert head["format"] == "fastclip-monitor"
    assert line["train/grad_norm"] == "Infinity"
    assert line["train/grad_norm_clipped"] == "NaN"
    assert len(line["train/grad_hidden/Sequential"]) == 3
    ((tags, step),) = dicts
    assert step == 0
    assert list(line) == ["step", *tags]
    assert [scalar[0] for scalar in board.scalars] == [tag for tag in tags if "hidden" not in tag]
    with open(paths[1], newline="") as file:
        (row,) = csv.DictReader(file)
    assert float(row["train/grad_norm"]) == math.inf
    assert next(iter(row)) == "step"


def test_a_writer_that_fails_is_left_out():
    def fail(record, step):
        raise OSError("no space left on device")

    seen = []
    model = model_with_grads()
    watching = GradMonitor(model, writer=[fail, lambda record, step: seen.append(step)])
    with pytest.warns(GradientWarning, match=r"fail: OSError: no space left on device; .*training goes on"):
        watching.clip_grad_norm_(1.0)
    watching.clip_grad_norm_(1.0)
    assert seen == [0, 1]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"every": 0}, ValueError, "every: expected an integer of at least 1, got 0"),
        ({"every": True}, ValueError, "every: .* got True"),
        ({"keep": 0.5}, ValueError, "keep: .* got 0.5"),
        ({"ranks": "some"}, ValueError, "ranks: expected 'first' or 'all', got 'some'"),
        ({"layers": 3}, TypeError, "layers: .* got 3"),
        ({"writer": "log.txt"}, ValueError, "writer: expected a path that ends in .jsonl or .csv, got 'log.txt'"),
        ({"writer": 3}, TypeError, "writer: .* got 3"),
    ],
)
def test_refusals(arguments, error, message):
    with pytest.raises(error, match=message):
        GradMonitor(nn.Linear(1, 1), **arguments)


def test_errors_leave_gradients_and_records_alone():
    model, other = model_with_grads(), model_with_grads()
    watching = GradMonitor(model)
    model[0].weight.grad[0, 0] = other[0].weight.grad[0, 0] = math.nan
    for call, match in (
        (lambda: watching.clip_grad_norm_(1.0, error_if_nonfinite=True), "non-finite"),
        (lambda: watching.clip_grad_norm_(1.0, nonfinite="never"), "nonfinite: expected one of"),
        (lambda: watching.clip_grad_norm_("one"), "max_norm: expected a number, got 'one'"),
    ):
        with pytest.raises((RuntimeError, ValueError), match=match):
            call()
    reference.assert_bits(grads(model), grads(other))
    assert watching.records == []


def test_state_goes_on():
    model = model_with_grads()
    one, other = GradMonitor(model), GradMonitor(model)
    for _ in range(30):
        one.clip_grad_norm_(1e9, loss=1.0)
    state = pickle.loads(pickle.dumps(one.state_dict()))
    other.load_state_dict(state)
    assert other.step == 30
    model[0].weight.grad.fill_(1e9)
    for each in (one, other):
        with pytest.warns(GradientWarning, match=r"step 30: the gradient norm jumped"):
            each.observe()
    with pytest.raises(ValueError, match="state: expected what"):
        other.load_state_dict({"steps": 3})


def test_summary():
    model = model_with_grads()
    watching = GradMonitor(model, alarms=False)
    weight = model[0].weight
    parameters = [weight]
    for norm in [*range(1, 101), math.nan]:
        weight.grad = torch.zeros_like(weight)
        weight.grad[0, 0] = norm
        watching.clip_grad_norm_(50.5, parameters=parameters)
    found = watching.summary()
    assert found["steps"] == 101
    assert found["nonfinite_steps"] == 1
    assert found["grad_norm_p50"] == pytest.approx(50.5)
    assert found["grad_norm_p90"] == pytest.approx(90.1)
    assert found["grad_clip_fraction"] == pytest.approx(50 / 101, abs=1e-9)
    assert found["layers"] == {"0.weight": pytest.approx(50.5)}


# By whomever.


def test_patch_with_a_monitor():
    model, other = model_with_grads(), model_with_grads()
    by_name = torch.nn.utils.clip_grad_norm_
    watching = GradMonitor(model)
    with fastclip.patch(monitor=watching):
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        torch.nn.utils.clip_grad_norm_(other.parameters(), 1.0)
        torch.nn.utils.clip_grad_value_(model.parameters(), 0.125)
        by_name(model.parameters(), 0.5)
        total = torch.nn.utils.get_total_norm(grads(model))
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), 0.25, total)
    assert torch.nn.utils.clip_grad_norm_ is by_name
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    first, *rest = watching.records
    assert first["train/grad_norm"] == pytest.approx(float(norm))
    assert first["train/grad_norm_clipped"] == pytest.approx(1.0, abs=1e-4)
    bounds = [record.get("train/grad_max_norm") for record in (first, *rest)]
    assert bounds == [1.0, None, 0.5, 0.25]
    with pytest.raises(TypeError, match="monitor: expected a GradMonitor, got 3"):
        fastclip.patch(monitor=3)


def test_patches_over_each_other():
    torchs = torch.nn.utils.clip_grad_norm_
    model = model_with_grads()
    watching = GradMonitor(model)
    below = fastclip.patch()
    ours = torch.nn.utils.clip_grad_norm_
    above = fastclip.patch(monitor=watching)
    assert torch.nn.utils.clip_grad_norm_ is not ours
    below.undo()  # out of turn
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert len(watching.records) == 1
    above.undo()
    assert torch.nn.utils.clip_grad_norm_ is torchs
    fastclip.patch(monitor=watching)
    fastclip.unpatch()
    assert torch.nn.utils.clip_grad_norm_ is torchs


SCRIPT = """
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_
def train(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(3, 6)).square().sum().backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
train(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 1)))
train(nn.Linear(6, 2))
"""


def test_run_with_a_monitor(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    run = subproc.python("-m", "fastclip", "run", "--monitor", "log.jsonl", "script.py", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [record.get("step") for record in records] == [None, 0, 1, 2, 3]
    assert "train/grad_norm/1.weight" in records[1]
    other = [json.loads(line) for line in (tmp_path / "log.1.jsonl").read_text().splitlines()]
    assert "train/grad_norm/weight" in other[1]
    bad = subproc.python("-m", "fastclip", "run", "--monitor", "log.txt", "script.py", cwd=tmp_path)
    assert bad.returncode == 2
    assert "argument --monitor: expected a path that ends in .jsonl or .csv, got 'log.txt'" in bad.stderr


def test_amp(cpu):
    model = model_with_grads()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.zero_grad()
    watching = GradMonitor(model)
    scaler.scale(model(torch.ones(2, 7)).square().sum()).backward()
    scaled = fastclip.get_total_norm(grads(model))
    norm = fastclip.amp.unscale_and_clip_grad_norm_(scaler, optimizer, model.parameters(), 1.0, monitor=watching)
    scaler.step(optimizer)
    scaler.update()
    record = watching.records[0]
    assert record["train/grad_norm"] == pytest.approx(float(norm))
    assert float(norm) == pytest.approx(float(scaled) / 1024)
    assert record["train/grad_max/2.weight"] < 1024


# Along a module.


def test_hidden_over_time():
    torch.manual_seed(0)
    rnn, head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 1)
    watching = GradMonitor(rnn)
    handle = watching.watch_hidden(rnn, "lstm")
    x = torch.randn(2, 9, 3)
    head(rnn(x)[0][:, -1]).sum().backward()
    watching.observe()
    x.requires_grad_()
    head(rnn(x)[0][:, -1]).sum().backward()
    watching.observe()
    # Packed, time comes first.
    packed = nn.utils.rnn.pack_padded_sequence(x.detach(), torch.tensor([9, 9]), batch_first=True)
    head(rnn(packed)[1][0][-1]).sum().backward()
    watching.observe()
    expected = x.grad.norm(dim=(0, 2)).tolist()
    for record in watching.records:
        assert record["train/grad_hidden/lstm"] == pytest.approx(expected, rel=1e-5)
    handle.remove()
    head(rnn(x)[0][:, -1]).sum().backward()
    watching.observe()
    assert "train/grad_hidden/lstm" not in watching.records[-1]


@pytest.mark.parametrize("kind", ["cell", "layers"])
def test_hidden_of_cells_and_layers(kind):
    torch.manual_seed(0)
    if kind == "cell":
        module, h = nn.RNNCell(3, 3), torch.zeros(2, 3)
        watching = GradMonitor(module)
        watching.watch_hidden(module, kind)
        kept = []
        for _ in range(6):
            h = module(torch.randn(2, 3), h)
            h.retain_grad()
            kept.append(h)
        h.sum().backward()
    else:
        module = nn.Sequential(*[nn.Linear(3, 3) for _ in range(6)])
        watching = GradMonitor(module)
        watching.watch_hidden(module, kind)
        kept, h = [], torch.randn(2, 3)
        module[0].register_forward_pre_hook(lambda *_: kept.clear())
        for layer in module:
            layer.register_forward_hook(lambda _, __, out: (out.retain_grad(), kept.append(out))[0])
        module(h).sum().backward()
    watching.observe()
    assert watching.records[0][f"train/grad_hidden/{kind}"] == pytest.approx([float(k.grad.norm()) for k in kept])


# Alarms.


def row(step: int, norm: float, **given: object) -> monitor.Row:
    norms = torch.tensor(given.pop("norms", [norm]), dtype=torch.float32)
    zeros = torch.zeros_like(norms)
    names = tuple(f"layers.{i}.weight" for i in range(len(norms)))
    fields = {
        "clipped": norm,
        "coef": 1.0,
        "nonfinite": 0,
        "loss": None,
        "names": names,
        "norms": norms,
        "largest": zeros,
        "zeros": zeros,
        "first_nonfinite": None,
        "others_nonfinite": 0,
        "max_norm": None,
        "hidden": {},
    }
    return monitor.Row(step=step, norm=norm, **(fields | given))


def fired(rows) -> list[tuple[int, str]]:
    found, alarm = [], alarms.Alarms()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for each in rows:
            alarm.look(each)
            found += [(each.step, str(warning.message)) for warning in caught[len(found) :]]
    return found


def wavy(i: int) -> float:
    return 1.0 + 0.3 * math.sin(i)


def test_alarm_of_what_is_not_finite():
    bad = {"nonfinite": 7, "first_nonfinite": "layers.3.bias", "others_nonfinite": 2}
    rows = [row(i, math.nan, **bad) if i in (4, 5, 9) else row(i, wavy(i)) for i in range(12)]
    found = fired(rows)
    assert [step for step, _ in found] == [4, 9]  # once until it is over
    assert "7 elements of the gradient are not finite, first in 'layers.3.bias' and 2 other parameters" in found[0][1]
    (overflow,) = fired([row(0, math.inf)])
    assert "their squares overflow" in overflow[1]


def test_alarm_of_jumps():
    rows = [row(i, 50.0 if i in (40, 41, 60) else wavy(i), loss=90.0 if i == 50 else 2 + wavy(i)) for i in range(64)]
    found = fired(rows)
    assert [step for step, _ in found] == [40, 50, 60]
    assert "the gradient norm jumped to 50, from about 1" in found[0][1]
    assert "the loss jumped to 90, from about 3" in found[1][1]
    assert fired([row(i, 50.0 if i == 10 else 1.0) for i in range(20)]) == []  # too early to know
    assert len(fired([row(0, 1.0, loss=math.nan)])) == 1


def test_alarm_of_growth():
    found = fired(row(i, wavy(i) if i < 20 else 1.8 ** (i - 20)) for i in range(40))
    assert any(step < 34 and "grows exponentially, 1." in text for step, text in found)
    assert fired(row(i, 1.05**i) for i in range(60)) == []


def test_alarm_of_vanishing_layers():
    def at(i: int) -> monitor.Row:
        return row(i, 1.0, norms=[1.0, 1e-9 if i >= 5 else 0.5, 0.0])

    (found,) = fired(at(i) for i in range(60))
    assert found[0] == 5 + alarms.VANISHING_STEPS - 1
    assert "the gradient of layer 'layers.1' vanishes" in found[1]


def test_alarm_of_bounds():
    found = fired(row(i, 2.0, coef=0.5, max_norm=1.0) for i in range(1200))
    assert [step for step, _ in found] == [alarms.ALWAYS_STEPS - 1]
    assert "max_norm 1 clipped 100% of the last 500 steps" in found[0][1]
    found = fired(row(i, wavy(i), max_norm=100.0) for i in range(3000))
    assert [step for step, _ in found] == [alarms.NEVER_STEPS - 1]
    assert fired(row(i, wavy(i), max_norm=5.0) for i in range(3000)) == []


def small_runs():
    """Ordinary trainings: (model, loss of a batch, optimizer)."""
    torch.manual_seed(0)
    x = torch.randn(256, 8)
    y = (x[:, :1] * 2 - x[:, 1:2]).tanh()
    labels = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    mlp = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
    yield "mlp", mlp, lambda i: functional.mse_loss(mlp(x[i]), y[i]), torch.optim.SGD(mlp.parameters(), 0.05, 0.9)
    classifier = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 3))
    yield (
        "classifier",
        classifier,
        lambda i: functional.cross_entropy(classifier(x[i]), labels[i]),
        torch.optim.Adam(classifier.parameters(), 1e-2),
    )
    lstm = nn.ModuleList([nn.LSTM(4, 16, batch_first=True), nn.Linear(16, 3)])
    yield (
        "lstm",
        lstm,
        lambda i: functional.cross_entropy(lstm[1](lstm[0](x[i].reshape(-1, 2, 4))[0][:, -1]), labels[i]),
        torch.optim.RMSprop(lstm.parameters(), 1e-3),
    )
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
    transformer = nn.ModuleList([layer, nn.Linear(8, 3)])
    yield (
        "transformer",
        transformer,
        lambda i: functional.cross_entropy(transformer[1](layer(x[i].reshape(-1, 1, 8))[:, 0]), labels[i]),
        torch.optim.AdamW(transformer.parameters(), 1e-3),
    )
    # A bias before a normalisation has no gradient but rounding.
    cnn = nn.Sequential(nn.Conv1d(1, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3))
    yield (
        "cnn",
        cnn,
        lambda i: functional.cross_entropy(cnn(x[i].unsqueeze(1)), labels[i]),
        torch.optim.SGD(cnn.parameters(), 0.1),
    )
    embedding = nn.ModuleList([nn.Embedding(50, 8), nn.Linear(8, 3)])
    tokens = torch.randint(0, 9, (256,))
    yield (
        "embedding",
        embedding,
        lambda i: functional.cross_entropy(embedding[1](embedding[0](tokens[i])), labels[i]),
        torch.optim.Adam(embedding.parameters(), 1e-2),
    )


def test_ordinary_runs_are_quiet():
    for name, model, loss_of, optimizer in small_runs():
        watching = GradMonitor(model, every=50)
        with warnings.catch_warnings():
            warnings.simplefilter("error", GradientWarning)
            for step in range(150):
                batch = torch.randint(0, 256, (32,), generator=torch.Generator().manual_seed(step))
                optimizer.zero_grad()
                loss = loss_of(batch)
                loss.backward()
                watching.clip_grad_norm_(1.0, loss=loss)
                optimizer.step()
            watching.close()
        assert len(watching.records) == 150, name
