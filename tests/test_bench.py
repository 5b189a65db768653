"""python -m fastclip bench: the cases are the real models, the gate is strict, and what it writes is complete."""

import contextlib
import importlib.util
import json
import sys
import time
from types import SimpleNamespace

import pytest
import torch

import fastclip
from conftest import BACKENDS
from fastclip import _dispatch, bench
from fastclip.bench import bars, device, main, providers, run, timing
from fastclip.bench.cases import EACH, REGIMES, Case, cases, gpu_cases
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


@pytest.mark.parametrize(
    ("name", "tensors", "elements", "size"),
    [
        ("llama3-8b-1of8", 291, 8_030_261_248 // 8, 2),
        ("llama3-8b-1of8-fp32", 291, 8_030_261_248 // 8, 4),
        ("llama3-8b-1of64-fp32", 291, 8_030_261_248 // 64, 4),
        ("one-huge-bf16", 1, 1_536_000_000, 2),
        ("500-mixed", 500, 225_000_000, 3),
        ("2000x1024x1024", 2000, 2000 << 20, 2),
        ("2000-tiny", 2000, 128_000, 4),
    ],
)
def test_gpu_cases_have_the_sizes_of_the_bars(name, tensors, elements, size):
    case = gpu_cases()[name]
    assert (len(case.tensors), case.elements, case.bytes) == (tensors, elements, size * elements)


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
    names = ["torch.sum", *(provider.name for provider in providers.available(CPU))]
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
        ("each-norm", lambda grads: torch.ones(len(grads)), "norm 0 is 1 where float64 has 120"),
        ("each-clip", lambda grads, max_norm: torch.stack([g.norm() for g in grads]), "gradient 0 (512, 28) has"),
        ("unit-noop", lambda parameters, factor: parameters[1].grad[-1].zero_(), "gradient 1 (512, 128) has 0 instead"),
    ],
)
def test_red_gate_prints_no_time(regime, function, message, monkeypatch, tmp_path, capsys):
    name = next(r.function for r in (*REGIMES, *EACH) if r.name == regime)
    broken = Provider("broken", SimpleNamespace(**{name: function}))
    monkeypatch.setattr(providers, "available", lambda _: [Provider(BASELINE, torch.nn.utils, gated=False), broken])
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
    monkeypatch.setattr(providers, "available", lambda _: [broken])
    path = tmp_path / "chart.png"
    assert main([*ONE_ROUND_EACH, "--regime", "value-clip", "--plot", str(path)]) == 1
    assert path.exists()


def test_regimes_hold_for_every_call():
    """Restored gradients are over the bound in the clipping regimes and untouched by torch in the others."""
    gradients = Gradients(cases()["lstm"], CPU)
    for regime in (*REGIMES, *EACH):
        gradients.restore()
        providers.available(CPU)[0].call(regime, gradients)()
        changed = any(not torch.equal(g, s) for g, s in zip(gradients.grads, gradients.saved, strict=True))
        assert changed == regime.writes, regime.name


def test_saved_run_has_table_chart_and_bars(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(bars, "CPU_BARS", (bars.Bar("lstm", "norm-clip", "ms", 1e-9), bars.Bar("x", "y", "ratio", 1.0)))
    arguments = [*ONE_ROUND_EACH, "--regime", "norm-clip", "--check-bars", "--save", str(tmp_path)]
    rows = tmp_path / "rows.json"
    assert main([*arguments, "--plot", str(tmp_path / "chart.png"), "--json", str(rows)]) == 1
    saved = sorted(path.suffix for path in tmp_path.iterdir())
    assert saved == [".json", ".md", ".png", ".png"]  # rows only where they are asked for
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.glob("*.png"))
    text = next(tmp_path.glob("*.md")).read_text()
    assert "| norm-clip | torch foreach |" in text
    assert "| lstm | norm-clip |" in text
    verdicts = [bar["verdict"] for bar in json.loads(rows.read_text())["bars"]]
    assert verdicts == ["miss", "not measured"]
    assert "not measured" in capsys.readouterr().out
    assert main([*ONE_ROUND_EACH, "--regime", "norm-clip", "--bars"]) == 0
    assert "miss" in capsys.readouterr().out


def test_a_run_that_is_cut_has_written_what_it_knew(tmp_path, monkeypatch):
    runs = iter([run.run_case, _raise])
    monkeypatch.setattr("fastclip.bench.run_case", lambda *arguments: next(runs)(*arguments))
    path = tmp_path / "rows.json"
    with pytest.raises(RuntimeError, match="out of order"):
        main([*ONE_ROUND_EACH, "--case", "1000-tiny", "--regime", "total-norm", "--json", str(path)])
    assert {row["case"] for row in json.loads(path.read_text())["rows"]} == {"lstm"}


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
    assert "pip install 'torch-fastclip[bench]'" in capsys.readouterr().err


def test_a_run_that_is_cut_keeps_its_cases(h100, monkeypatch, tmp_path):
    """Tables and rows are there after every case, and are whole; without matplotlib there is no chart, and no error."""
    monkeypatch.setattr(bench, "_can_draw", lambda: False)
    arguments = ["--device", "cuda", "--case=2000-tiny", "--case=lora-8b-r16", "--save", str(tmp_path / "saved")]
    rows = tmp_path / "rows.json"

    def measured(case, *_):
        done.append(case.name)
        if cut and len(done) == 2:
            raise KeyboardInterrupt
        return [fabricated(case.name)]

    monkeypatch.setattr(bench, "run_case", measured)
    done, cut = [], True
    with pytest.raises(KeyboardInterrupt):
        main([*arguments, "--json", str(rows)])
    assert [row["case"] for row in json.loads(rows.read_text())["rows"]] == done[:1]
    (table,) = (tmp_path / "saved").iterdir()
    assert f"## {done[0]}" in table.read_text()
    cut = False
    assert main([*arguments, "--json", str(rows)]) == 0
    assert len(json.loads(rows.read_text())["rows"]) == 2
    assert [path.suffix for path in (tmp_path / "saved").iterdir()] == [".md"]


def test_bars_alone_do_not_fail_a_run(h100, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "run_case", lambda case, *_: [fabricated(case.name, host_ms=99.0)])
    arguments = ["--device", "cuda", "--case=2000-tiny"]
    assert main([*arguments, "--bars", "--json", str(tmp_path / "rows.json")]) == 0
    assert "miss" in {bar["verdict"] for bar in json.loads((tmp_path / "rows.json").read_text())["bars"]}
    assert main([*arguments, "--check-bars"]) == 1


def test_measure_interleaves_and_keeps_prepare_out():
    calls = []
    entries = [Entry(n, lambda n=n: calls.append(n), lambda n=n: calls.append(f"prepare {n}")) for n in "abc"]
    times = measure(entries, Plan(0.0, 4, 4), CPU)
    assert {name: t["rounds"] for name, t in times.items()} == dict.fromkeys("abc", 4)
    assert calls[::2] == [f"prepare {name}" for name in calls[1::2]]
    rounds = [calls[i + 1 : i + 6 : 2] for i in range(0, 24, 6)]
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)


def test_backends_are_forced_only_inside_the_call():
    names = [p.name for p in providers.available(CPU)]
    assert names[:2] == [BASELINE, "torch for-loop"]
    assert names[2:] == [f"fastclip {n}" for n in BACKENDS]


# What a GPU adds, looked at without one.

H100 = SimpleNamespace(name="NVIDIA H100 80GB HBM3", multi_processor_count=132, L2_cache_size=50 << 20)


@pytest.fixture
def h100(monkeypatch):
    """A GPU that is there as long as nothing is asked of it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: H100)
    monkeypatch.setattr(providers, "available", lambda device: [Provider(f"fastclip {device.type}", fastclip)])


def fabricated(case, regime="norm-clip", provider="fastclip cuda", **values):
    row = {"case": case, "regime": regime, "what": regime, "provider": provider, "rounds": 9, "check": "ok"}
    row |= {"ms": 2.0, "p10": 1.0, "p90": 3.0, "host_ms": 0.25, "ratio": 4.0, "gbs": 8.0, "share": 0.95}
    return row | {"norm_error": None} | values


class Clockwork:
    """Stands in for torch.cuda: keeps what was asked for, in order, and says that 1.5 ms lie between two events."""

    def __init__(self):
        self.log = []

    def Event(self, enable_timing):
        assert enable_timing
        return SimpleNamespace(record=lambda: self.log.append("record"), elapsed_time=lambda end: 1.5)

    def _sleep(self, cycles):
        self.log.append("spin")
        self.cycles = cycles

    def synchronize(self):
        self.log.append("synchronize")


@pytest.fixture
def clockwork(monkeypatch):
    stand_in = Clockwork()
    for name in ("Event", "_sleep", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, getattr(stand_in, name))
    return stand_in


def test_gpu_clock_tells_host_and_device_apart(clockwork):
    """An empty queue for the host's time; a queue that is never empty for the device's."""

    def call():
        clockwork.log.append("call")
        time.sleep(0.01)

    sample = timing.cuda_clock(Entry("x", call, lambda: clockwork.log.append("prepare")))
    assert clockwork.log == [
        *("prepare", "synchronize", "call"),
        *("prepare", "spin", "record", "call", "record", "synchronize"),
    ]
    assert sample["ms"] == 1.5
    assert 10 <= sample["host_ms"] < 1000
    assert clockwork.cycles >= 2 * sample["host_ms"] * 1e6  # of a clock of at most 2 GHz: longer than the call


def test_rows_on_a_gpu(clockwork, monkeypatch):
    """The share is that of a copy, which moves every byte twice; the host's time is apart."""
    at_work = run._ceiling
    monkeypatch.setattr(run, "_ceiling", lambda gradients, _: at_work(gradients, torch.device("cuda")))
    monkeypatch.setitem(timing.CLOCKS, "cpu", timing.cuda_clock)
    only_norms = Provider("other", SimpleNamespace(clip_grad_norm_=torch.nn.utils.clip_grad_norm_), gated=False)
    everyone = [*providers.available(CPU), only_norms]
    rows = run.run_case(cases()["lstm"], list(REGIMES), everyone, Plan(0.0, 2, 2), CPU, cold=True)
    assert {r["regime"] for r in rows if r["provider"] == "other"} == {"norm-noop", "norm-clip"}
    for row in rows:
        passes = next(r.passes for r in REGIMES if r.name == row["regime"])
        passes = 2 if row["provider"] == "device copy" else passes
        assert row["ms"] == 1.5  # of every row, so that the shares are those of the bytes
        assert row["host_ms"] > 0
        assert row["gbs"] == pytest.approx(passes * 214_282 * 4 / 1.5e-3 / 1e9)
        assert row["share"] == pytest.approx(passes / 2)
    assert {r["provider"] for r in rows} == {"device copy", *(p.name for p in everyone)}


@pytest.mark.parametrize("piece", [3, 130, 70_000])
def test_gate_finds_the_element_in_any_batch(piece):
    """Pieces of many tensors are compared at once; what differs is still named."""
    gradients = Gradients(Case("x", "", tuple(((n,), d) for n in (5, 1, 200, 4) for d in (torch.float32,) * 2)), CPU)
    gradients.piece = piece
    assert all(sum(len(g) for _, g, _ in batch) <= piece for batch in gradients._batches())
    value = next(regime for regime in REGIMES if regime.name == "value-noop")
    assert gradients.differences(value, None) is None
    for i, k in ((0, 0), (2, 0), (4, 0), (5, 199), (7, 3)):
        gradients.grads[i][k] = 77
        assert gradients.differences(value, None).startswith(f"gradient {i} {tuple(gradients.grads[i].shape)} has 77 ")
        gradients.restore()


def test_gate_does_not_mix_dtypes():
    dtypes = (torch.float32, torch.bfloat16, torch.float32)
    gradients = Gradients(Case("x", "", tuple(((3,), d) for d in dtypes)), CPU)
    assert [[i for i, _, _ in batch] for batch in gradients._batches()] == [[0], [1], [2]]
    gradients.grads[1][2] = torch.nextafter(gradients.grads[1][2], torch.tensor(9, dtype=torch.bfloat16))
    assert gradients.differences(REGIMES[0], torch.tensor(gradients.total_norm)).startswith("gradient 1 (3,)")


def test_details_of_a_gpu(clockwork, monkeypatch):
    """Launches of one call, a replay, and warm caches; a call that cannot be captured has no time as a graph."""
    calls = []
    event = SimpleNamespace(device_type=torch.autograd.DeviceType.CUDA, name="norm_kernel")
    sync = SimpleNamespace(device_type=torch.autograd.DeviceType.CUDA, name="Stream Sync")
    profile = SimpleNamespace(events=lambda: [event, event, sync, SimpleNamespace(device_type=None, name="host")])
    monkeypatch.setattr(torch.profiler, "profile", lambda activities: contextlib.nullcontext(profile))
    graph = SimpleNamespace(replay=lambda: calls.append("replay"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext())
    entry = Entry("x", lambda: calls.append("call"), lambda: calls.append("cold"))
    found = device.details(entry, lambda: calls.append("warm"))
    assert found == {"launches": 2, "graph_ms": 1.5, "warm_ms": 1.5}
    assert calls.count("warm") == 2 * 9
    assert calls[-2:] == ["cold", "replay"]

    def refuse(graph):
        raise RuntimeError("a wait")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    assert device.details(entry, lambda: None)["graph_ms"] is None


def test_every_bar_has_a_case_and_a_regime():
    regimes = {regime.name for regime in REGIMES}
    for table, listed in ((bars.CPU_BARS, cases()), (bars.GPU_BARS, gpu_cases())):
        assert {bar.case for bar in table} <= set(listed)
        assert {bar.regime for bar in table} <= regimes
        assert len({bar[:3] for bar in table}) == len(table)


def test_bars_of_a_gpu():
    """The table of the GPU; times of a card are judged on that card only, host times apart from device times."""
    rows = [
        fabricated("one-huge-bf16", ms=3.31, share=0.91),
        fabricated("one-huge-bf16", "norm-noop", ms=1.09, share=0.89),
        fabricated("2000-tiny", ms=99.0, host_ms=0.29),
        fabricated("10000-tiny", ms=0.1, host_ms=1.9),
        fabricated("one-huge-bf16", provider="fastclip triton", ms=9.0),
    ]

    def verdicts(gpu):
        judged = bars.check(rows, "fastclip cuda", {"gpu": gpu})
        return {(b["case"], b["regime"], b["key"]): b["verdict"] for b in judged if b["verdict"] != "not measured"}

    anywhere = {
        ("one-huge-bf16", "norm-clip", "share"): "pass",
        ("one-huge-bf16", "norm-noop", "share"): "miss",
        ("2000-tiny", "norm-clip", "host_ms"): "pass",
        ("10000-tiny", "norm-clip", "host_ms"): "miss",
    }
    times = {("one-huge-bf16", "norm-clip", "ms"): "miss", ("one-huge-bf16", "norm-noop", "ms"): "pass"}
    assert verdicts("NVIDIA H100 80GB HBM3") == anywhere | times
    assert verdicts("NVIDIA H200") == anywhere
    text = bars.cells(bars.check(rows, "fastclip cuda", {"gpu": "NVIDIA H100 80GB HBM3"}))
    assert ["10000-tiny", "norm-clip", "1.900", "<= 1.8", "ms of the host", "miss"] in text
    assert ["one-huge-bf16", "norm-clip", "0.91", ">= 0.909", "of a copy's bandwidth", "pass"] in text


def test_report_of_a_gpu(h100, monkeypatch, tmp_path, capsys):
    """All but the measuring: what is asked for, printed and written."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(time, "strftime", lambda _: "2000-01-01")

    def measured(case, regimes, everyone, plan, device, cold, details):
        assert (device.type, cold, details, plan.budget_s) == ("cuda", True, True, 1.0)
        assert [p.name for p in everyone] == ["fastclip cuda"]
        red = {"ms": None, "check": "norm is 1"} if case.name == "lora-8b-r16" else {}
        more = {"warm_ms": 1.75, "graph_ms": None, "launches": 3}
        return [fabricated(case.name, **more, **red), fabricated(case.name, provider="fastclip triton")]

    monkeypatch.setattr(bench, "run_case", measured)
    cases = [f"--case={name}" for name in ("2000-tiny", "lora-8b-r16")]
    rows, folder = tmp_path / "rows.json", tmp_path / "saved"
    assert main(["--device", "cuda", *cases, "--details", "--save", str(folder), "--bars", "--json", str(rows)]) == 1
    saved = {path.suffix: path for path in folder.iterdir()}
    assert set(saved) == {".md", ".png"}
    assert {path.stem for path in saved.values()} == {"2000-01-01-nvidia-h100-80gb-hbm3"}
    report = json.loads(rows.read_text())
    assert report["conditions"]["gpu"] == H100.name
    assert [bar["verdict"] for bar in report["bars"] if bar["case"] == "2000-tiny"] == ["not measured", "pass"]
    text = saved[".md"].read_text()
    assert "2000-01-01, NVIDIA H100 80GB HBM3 (132 SMs, 50 MB of L2), CUDA " in text
    assert "| ms | p10 - p90 | host ms | warm ms | graph ms | launches | ratio | GB/s | of copy |" in text
    assert "| fastclip cuda | 2.000 | 1.000 - 3.000 | 0.250 | 1.750 |  | 3 | 4.00 | 8.0 | 0.95 |" in text
    assert "| norm-clip | fastclip cuda |  |  |  |  |  |  |  |  |  |  | RED: norm is 1 |" in text
    assert saved[".png"].read_bytes().startswith(b"\x89PNG")
    assert "host ms" in capsys.readouterr().out


def test_device_cuda_has_its_own_cases(h100, capsys):
    assert main(["--device", "cuda", "--list"]) == 0
    out = capsys.readouterr().out
    assert all(f"{name}: " in out for name in gpu_cases())
    assert "resnet50" not in out
    assert "providers: fastclip cuda" in out


def test_providers_of_a_gpu(monkeypatch):
    """No loops where there are kernels; others where they can be imported."""
    takes = SimpleNamespace(unavailable=lambda: None, refuses=lambda tensor: None)
    refuses = SimpleNamespace(unavailable=lambda: None, refuses=lambda tensor: "a GPU")
    missing = SimpleNamespace(unavailable=lambda: "not installed")
    for name in ("apex", "apex.contrib", "transformer_engine"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    monkeypatch.setattr(torch, "empty", lambda *_, device: None)

    def names(**backends):
        monkeypatch.setattr(_dispatch, "BACKENDS", backends)
        return [provider.name for provider in providers.available(torch.device("cuda"))]

    kernels = names(cpu=refuses, cuda=takes, triton=takes, eager=takes)
    assert kernels == [BASELINE, "fastclip cuda", "fastclip triton"]
    monkeypatch.setitem(sys.modules, "apex.contrib.clip_grad", SimpleNamespace(clip_grad_norm_=None))
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", SimpleNamespace(optimizers=None))
    loops = names(cpu=refuses, cuda=missing, triton=missing, eager=takes)
    assert loops == [BASELINE, "fastclip eager", "apex", "TransformerEngine"]


def test_device_cuda_without_one(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        main(["--device", "cuda", "--quick"])
    assert "--device cuda: torch sees no CUDA device" in capsys.readouterr().err


def test_multi_tensor_kernels_clip_as_torch_does():
    """The glue around TransformerEngine's kernels, with others in their place."""

    def applier(kernel, overflow, lists, argument):
        return kernel(*lists, argument)

    optimizers = SimpleNamespace(
        multi_tensor_applier=applier,
        multi_tensor_l2norm=lambda tensors, per_tensor: (torch.cat(tensors).float().norm().reshape(1), None),
        multi_tensor_scale=lambda tensors, out, factor: torch._foreach_copy_(out, torch._foreach_mul(tensors, factor)),
    )
    for max_norm in (1.0, 1e9):
        ours, theirs = ([torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2).double())] for _ in "ab")
        for made in (ours, theirs):
            for parameter in made:
                parameter.grad = torch.full_like(parameter, 2.0)
        norm = providers._clip_with_multi_tensor(optimizers, ours, max_norm)
        assert norm.item() == pytest.approx(20**0.5)
        torch.nn.utils.clip_grad_norm_(theirs, max_norm)
        torch.testing.assert_close([p.grad for p in ours], [p.grad for p in theirs])
