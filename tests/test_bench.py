"""python -m fastclip bench: the cases are the real models, the gate is strict, and what it writes is complete."""

import importlib.util
import json
import sys
from types import SimpleNamespace

import pytest
import torch

import fastclip
from fastclip.bench import bars, main, providers
from fastclip.bench.cases import REGIMES, cases
from fastclip.bench.gradients import Gradients
from fastclip.bench.providers import BASELINE, Provider
from fastclip.bench.timing import Entry, Plan, measure

ONE_ROUND_EACH = ["--case", "lstm", "--rounds", "2"]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread():
    """On a busy machine a parallel region waits far longer for its threads than these small cases compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("name", "tensors", "elements"),
    [
        ("gpt2-124m-fp32", 148, 124_439_808),
        ("gpt2-124m-bf16", 148, 124_439_808),
        ("resnet50", 161, 25_557_032),
        ("lora-8b-r16", 256, 13_631_488),
        ("llama3-8b-1of64", 291, 8_030_261_248 // 64),
        ("one-huge", 1, (1 << 30) // 4),
    ],
)
def test_cases_have_the_sizes_of_the_real_models(name, tensors, elements):
    case = cases()[name]
    assert (len(case.tensors), case.elements) == (tensors, elements)


def test_lstm_case_is_the_module():
    lstm, head = torch.nn.LSTM(28, 128, 2), torch.nn.Linear(128, 10)
    shapes = [tuple(p.shape) for p in (*lstm.parameters(), *head.parameters())]
    assert [shape for shape, _ in cases()["lstm"].tensors] == shapes


def test_json_has_every_regime_and_provider(tmp_path, capsys):
    path = tmp_path / "new" / "report.json"
    assert main([*ONE_ROUND_EACH, "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    assert set(report) == {"schema", "conditions", "cases", "rows"}
    conditions = {"date", "cpu", "cores", "threads", "load", "caches", "torch", "fastclip", "isa", "commit", "command"}
    assert set(report["conditions"]) == conditions
    assert report["cases"][0]["elements"] == 214_282
    names = ["torch.sum", *(provider.name for provider in providers.available())]
    assert [(r["regime"], r["provider"]) for r in report["rows"]] == [(r.name, n) for r in REGIMES for n in names]
    for row in report["rows"]:
        assert 0 < row["p10"] <= row["ms"] <= row["p90"]
        assert row["rounds"] == 2
        assert row["gbs"] > 0
        assert row["check"] == ("ok" if row["provider"].startswith("fastclip") else "")
        assert (row["norm_error"] is not None) == ("norm" in row["regime"] and row["provider"] != "torch.sum")
        if row["provider"] == BASELINE:
            assert row["ratio"] == 1
    assert "fastclip eager" in capsys.readouterr().out


def _clip_too_much(parameters, max_norm, **_):
    total_norm = fastclip.clip_grad_norm_(parameters, max_norm)
    parameters[-1].grad[-1] *= 1.001
    return total_norm


def _raise(*_, **__):
    raise RuntimeError("out of order")


@pytest.mark.parametrize(
    ("regime", "function", "message"),
    [
        ("total-norm", lambda tensors: torch.tensor(1.0), "norm is 1 where float64 has 46"),
        ("total-norm", lambda tensors: torch.tensor(float("nan")), "norm is nan"),
        ("norm-noop", lambda parameters, max_norm: None, "no norm was returned"),
        ("norm-noop", _clip_too_much, "gradient 9 (10,) has"),
        ("norm-clip", _clip_too_much, "gradient 9 (10,) has"),
        ("value-noop", lambda parameters, clip_value: parameters[0].grad.zero_(), "gradient 0 (512, 28) has 0"),
        ("value-clip", lambda parameters, clip_value: None, "gradient 0 (512, 28) has"),
        ("value-clip", _raise, "raised RuntimeError: out of order"),
    ],
)
def test_red_gate_prints_no_time(regime, function, message, monkeypatch, tmp_path, capsys):
    name = next(r.function for r in REGIMES if r.name == regime)
    broken = Provider("broken", SimpleNamespace(**{name: function}))
    monkeypatch.setattr(providers, "available", lambda: [Provider(BASELINE, torch.nn.utils, gated=False), broken])
    path = tmp_path / "report.json"
    assert main([*ONE_ROUND_EACH, "--regime", regime, "--json", str(path)]) == 1
    row = next(r for r in json.loads(path.read_text())["rows"] if r["provider"] == "broken")
    assert [row[key] for key in ("ms", "p10", "p90", "ratio", "gbs", "share")] == [None] * 6
    assert message in row["check"]
    line = next(line for line in capsys.readouterr().out.splitlines() if "broken" in line)
    assert "RED" in line
    assert not any(character.isdigit() for character in line.split("RED")[0])


def test_chart_of_nothing_but_red_rows_is_empty(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    broken = Provider("fastclip broken", SimpleNamespace(clip_grad_value_=_raise))
    monkeypatch.setattr(providers, "available", lambda: [broken])
    path = tmp_path / "chart.png"
    assert main([*ONE_ROUND_EACH, "--regime", "value-clip", "--plot", str(path)]) == 1
    assert path.exists()


def test_regimes_hold_for_every_call():
    """Restored gradients are over the bound in the clipping regimes and untouched by torch in the others."""
    gradients = Gradients(cases()["lstm"], CPU)
    for regime in REGIMES:
        gradients.restore()
        providers.available()[0].call(regime, gradients)()
        changed = any(not torch.equal(g, s) for g, s in zip(gradients.grads, gradients.saved, strict=True))
        assert changed == regime.writes, regime.name


def test_saved_run_has_table_chart_and_bars(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(bars, "CPU_BARS", (bars.Bar("lstm", "norm-clip", "ms", 1e-9), bars.Bar("x", "y", "ratio", 1.0)))
    arguments = [*ONE_ROUND_EACH, "--regime", "norm-clip", "--check-bars", "--save", str(tmp_path)]
    assert main([*arguments, "--plot", str(tmp_path / "chart.png")]) == 1
    saved = sorted(path.suffix for path in tmp_path.iterdir())
    assert saved == [".json", ".md", ".png", ".png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.glob("*.png"))
    text = next(tmp_path.glob("*.md")).read_text()
    assert "| norm-clip | torch foreach |" in text
    assert "| lstm | norm-clip |" in text
    verdicts = [bar["verdict"] for bar in json.loads(next(tmp_path.glob("*.json")).read_text())["bars"]]
    assert verdicts == ["miss", "not measured"]
    assert "not measured" in capsys.readouterr().out


def test_tables_without_rich(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich", None)
    assert main([*ONE_ROUND_EACH, "--regime", "total-norm", "--cold", "--threads", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "2 threads" in lines[0]
    assert "cold caches" in lines[0]
    assert lines[3].split()[:3] == ["regime", "provider", "ms"]


def test_list_and_bad_names(capsys):
    assert main(["--list"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in (*cases(), *(r.name for r in REGIMES), BASELINE))
    for arguments, message in (
        (["--case", "gpt5"], "'resnet50'"),
        (["--regime", "often"], "'value-clip'"),
        (["--rounds", "1"], "--rounds must be at least 2, got 1"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
        assert message in capsys.readouterr().err


def test_chart_without_matplotlib_is_refused_before_any_work(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        main(["--plot", "chart.png"])
    assert "pip install 'fastclip[bench]'" in capsys.readouterr().err


def test_measure_interleaves_and_keeps_prepare_out():
    calls = []
    entries = [Entry(n, lambda n=n: calls.append(n), lambda n=n: calls.append(f"prepare {n}")) for n in "abc"]
    times = measure(entries, Plan(0.0, 4, 4), CPU)
    assert {name: t["rounds"] for name, t in times.items()} == dict.fromkeys("abc", 4)
    assert calls[::2] == [f"prepare {name}" for name in calls[1::2]]
    rounds = [calls[i + 1 : i + 6 : 2] for i in range(0, 24, 6)]
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)


def test_backends_are_forced_only_inside_the_call():
    names = [p.name for p in providers.available()]
    assert names[:2] == [BASELINE, "torch for-loop"]
    assert names[2:] == [f"fastclip {n}" for n, reason in fastclip.backends().items() if reason is None]
