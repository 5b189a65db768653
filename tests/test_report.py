"""python -m fastclip report: what it reads, says and draws."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

import fastclip
from fastclip import report

np = pytest.importorskip("numpy")
charts = pytest.importorskip("fastclip.report.charts", exc_type=ImportError)
from fastclip.report import verdict  # noqa: E402
from fastclip.report.log import Run, read  # noqa: E402


def record(step: int, norm: float, max_norm: float | None = 1.0, prefix: str = "train/", **more: object) -> dict:
    tags = {"grad_norm": norm, "grad_nonfinite": 0 if math.isfinite(norm) else 3}
    if max_norm is not None:
        coef = min(1.0, max_norm / (norm + 1e-6))
        tags |= {"grad_norm_clipped": norm * coef, "grad_clip_coef": coef, "grad_max_norm": max_norm}
    for i in range(2):
        tags[f"grad_norm/layers.{i}.weight"] = norm / (i + 1)
    return {"step": step, **{prefix + tag: value for tag, value in (tags | more).items()}}


def write(path: Path, *runs: list[dict]) -> Path:
    lines = []
    for records in runs:
        lines.append(json.dumps({"format": "fastclip-monitor", "version": 1}))
        lines += [re.sub(r"\b(NaN|-?Infinity)\b", r'"\1"', json.dumps(each)) for each in records]
    path.write_text("\n".join(lines) + "\n")
    return path


def wave(i: int) -> float:
    return 2 + math.sin(i)


def say(capsys, tmp_path, *logs: Path, html: bool = False) -> str:
    arguments = [*map(str, logs), "--out", str(tmp_path / "out"), *(["--html"] if html else [])]
    assert report.main(arguments) == 0
    return capsys.readouterr().out


def shown(path: Path) -> bool:
    """Whether a picture is one, with more than a few colours."""
    from matplotlib.image import imread

    pixels = imread(path)[..., :3].reshape(-1, 3)
    return len(np.unique((pixels * 15).astype(int), axis=0)) > 5


def test_of_a_real_run(tmp_path, capsys):
    torch.manual_seed(0)
    model = nn.ModuleList([nn.RNN(3, 8, batch_first=True), nn.Linear(8, 1)])
    log = tmp_path / "log.jsonl"
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    with fastclip.GradMonitor(model, writer=log) as monitor:
        monitor.watch_hidden(model[0])
        for _ in range(60):
            optimizer.zero_grad()
            x = torch.randn(8, 6, 3)
            loss = (model[1](model[0](x)[0][:, -1]) - x.sum((1, 2)).unsqueeze(1)).square().mean()
            loss.backward()
            monitor.clip_grad_norm_(3.0, loss=loss)
            optimizer.step()
    out = say(capsys, tmp_path, log, html=True)
    names = {"norms.png", "loss.png", "layers.png", "coefficients.png", "hidden-RNN.png", "report.html"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    assert all(shown(path) for path in (tmp_path / "out").glob("*.png"))
    assert "log.jsonl: 60 steps" in out
    assert re.search(r"clipped in \d+ of 60 steps \(\d+%\) by max_norm 3", out)
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 5
    assert not re.search(r'(src|href)="(?!data:)', page)


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ([record(i, wave(i), 10.0) for i in range(60)], ["never clipped", "it has held back nothing so far"]),
        ([record(i, wave(i), 2.5) for i in range(60)], ["healthy", "by max_norm 2.5"]),
        ([record(i, 50 * wave(i)) for i in range(60)], ["clipped too often", "clipped in 60 of 60 steps (100%)"]),
        ([record(i, wave(i) * (400 if i == 50 else 1), 2.5) for i in range(60)], ["exploding", "at step 50"]),
        (
            [record(i, 1.8 ** max(i - 20, 0), 2.5) for i in range(40)],
            ["exploding", "it grew exponentially from step"],
        ),
        (
            [record(i, math.nan if i in (7, 9) else wave(i), 2.5) for i in range(60)],
            ["non-finite", "2 of 60 steps, first at step 7 in 'layers.0.weight' and 1 other"],
        ),
        (
            [record(i, 1.0, 2.5, **{"grad_norm/layers.1.weight": 1e-9}) for i in range(60)],
            ["vanishing", "the gradients of layers.1 fall below 1e-7 of the largest"],
        ),
        ([record(i, math.nan) for i in range(30)], ["30 of 30 steps", "no bound can be suggested"]),
        ([record(i, wave(i), None) for i in range(30)], ["30 steps: healthy", "nothing was clipped by norm"]),
        ([record(i, 1.0) for i in range(3)], ["3 steps: healthy", "of these few steps"]),
        ([record(0, 1.0, loss=3.0)], ["1 steps: healthy"]),
    ],
    ids=lambda value: value[0].split(":")[0] if isinstance(value[0], str) else "",
)
def test_verdicts(tmp_path, records, words):
    (run,) = read(write(tmp_path / "log.jsonl", records))
    found = verdict.of(run)
    for word in words:
        assert word in "\n".join([found.headline, *found.lines])
    if len(records) < 3 or not math.isfinite(records[0]["train/grad_norm"]):  # the odd ones
        assert all(shown(picture.path) for picture in charts.draw(tmp_path, [run], [found]))


def test_the_suggestion(tmp_path, capsys):
    """The start, spikes and what is not finite do not move it."""
    norms = [100 * math.exp(-i / 5) + wave(i) for i in range(200)]
    norms[150], norms[160] = 1e6, math.inf
    out = say(capsys, tmp_path, write(tmp_path / "log.jsonl", [record(i, n) for i, n in enumerate(norms)]))
    assert "suggested max_norm: 3, the 90th percentile of the finite norms of the second half" in out


def test_several_logs_and_runs(tmp_path, capsys):
    first = write(tmp_path / "one.jsonl", [record(i, wave(i)) for i in range(30)], [record(i, 1.0) for i in range(9)])
    resumed = write(tmp_path / "two.jsonl", [record(i, 1.0) for i in range(9)], [record(i, 2.0) for i in range(9, 20)])
    out = say(capsys, tmp_path, first, resumed)
    assert [line.split(":")[0] for line in out.splitlines() if "steps:" in line] == [
        "one.jsonl",
        "one.jsonl#2",
        "two.jsonl",
    ]
    assert "two.jsonl: 20 steps" in out
    assert (tmp_path / "out" / "layers-3.png").exists()


def test_a_csv_of_any_prefix(tmp_path, capsys):
    model = nn.Linear(2, 1)
    with fastclip.GradMonitor(model, writer=tmp_path / "log.csv", prefix="my/") as monitor:
        for i in range(5):
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, math.inf if i == 3 else 1.0)
            with pytest.warns(fastclip.GradientWarning) if i == 3 else pytest.MonkeyPatch.context():
                monitor.clip_grad_norm_(1.0, loss=0.5)
    text = (tmp_path / "log.csv").read_text()
    (tmp_path / "log.csv").write_text(text[:-20])
    out = say(capsys, tmp_path, tmp_path / "log.csv")
    assert "log.csv: 4 steps: non-finite" in out
    assert "first at step 3 in 'weight' and 1 other" in out
    assert "the last line is cut" in out


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("gone.jsonl", None, "gone.jsonl: there is no such file"),
        ("log.jsonl", "", "log.jsonl: is empty"),
        ("log.jsonl", '{"format": "fastclip-monitor", "version": 1}\n', "log.jsonl: has no records yet"),
        ("log.jsonl", "epoch 1: loss 3\n", "line 1 is not JSON: 'epoch 1: loss 3"),
        ("log.jsonl", '{"loss": 3}\n', "line 1 is not a record of a GradMonitor"),
        ("log.jsonl", '{"step": 3, "loss": 3}\n', "its first line does not say so"),
        ("log.jsonl", '{"format": "fastclip-monitor"}\n{"step": 0, "x": 1}\n', "its records have no grad_norm"),
        ("log.jsonl", '{"format": "fastclip-monitor"}\n{"step":\n{"step": 1}\n', "line 2 is not JSON"),
        ("log.csv", "a,b\n1,2\n", "its columns are a, b"),
    ],
)
def test_what_is_not_a_log(tmp_path, capsys, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    assert report.main([str(tmp_path / name), "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_last_line_that_is_cut(tmp_path, capsys):
    log = write(tmp_path / "log.jsonl", [record(i, wave(i)) for i in range(9)])
    log.write_text(log.read_text()[:-30])
    out = say(capsys, tmp_path, log)
    assert "log.jsonl: 8 steps" in out
    assert "(the last line, 10, is cut and left out)" in out


def test_very_many_steps_are_drawn_in_stretches(tmp_path):
    count = 50_000
    norms = 2 + np.sin(np.arange(count))
    norms[30_001] = 500
    layers = {f"layers.{i}.weight": norms.astype(np.float32) / (i + 1) for i in range(8)}
    coefs = np.minimum(1, 2.5 / norms)
    columns = {"grad_norm": norms, "grad_max_norm": np.full(count, 2.5), "grad_clip_coef": coefs, "loss": norms}
    run = Run("log", np.arange(count), columns | {"grad_norm_clipped": norms * coefs}, layers, {})
    pictures = charts.draw(tmp_path, [run], [verdict.Verdict("", [], [], None, {})])
    assert all(shown(picture.path) for picture in pictures)
    assert sum(picture.path.stat().st_size for picture in pictures) < 1_000_000


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium on PATH")
def test_the_page_in_a_browser(tmp_path, capsys):
    say(capsys, tmp_path, write(tmp_path / "log.jsonl", [record(i, wave(i), 2.5) for i in range(60)]), html=True)
    picture = tmp_path / "page.png"
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--window-size=1200,2400", f"--screenshot={picture}", f"file://{tmp_path / 'out' / 'report.html'}"]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    assert shown(picture)
