"""`python -m fastclip demo`: what it writes, what it says, and what the experiments must show."""

from __future__ import annotations

import contextlib
import csv
import io
import math
import sys
from itertools import pairwise

import pytest
import torch

from fastclip import demo
from fastclip.demo import cliff, digits, regression

STEPS = 3
FILES = ("digits.csv", "regression.csv", "cliff.csv", "norms.png", "losses.png", "times.png", "cliff.png")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a short run, which held a file of somebody else and an old one of the demo."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "notes.txt").write_text("mine")
    (folder / "digits.csv").write_text("old")
    return folder


@pytest.fixture(scope="module")
def output(folder):
    """What a run of three steps prints."""
    with contextlib.redirect_stdout(io.StringIO()) as text:
        assert demo.main(["--steps", str(STEPS), "--out", str(folder)]) == 0
    return text.getvalue()


def read(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_files(folder, output):
    """Charts and tables are there and named in the output; other files stay."""
    for name in FILES:
        assert (folder / name).stat().st_size > 500
        assert str(folder / name) in output
    assert (folder / "notes.txt").read_text() == "mine"


@pytest.mark.usefixtures("output")
def test_digits_csv(folder):
    rows = read(folder / "digits.csv")
    assert list(rows[0]) == ["step", "kind", "library", "loss", "total_norm", "clipped", "clip_us"]
    assert len(rows) == 6 * STEPS
    assert all(float(row["loss"]) > 0 and float(row["clip_us"]) >= 0 for row in rows)
    assert {row["kind"] for row in rows if row["total_norm"] == ""} == {"value"}


@pytest.mark.usefixtures("output")
def test_regression_csv(folder):
    """Every layer at every step, and a total that is the norm of the layers' norms."""
    rows = read(folder / "regression.csv")
    assert list(rows[0]) == ["step", "rate", "kind", "layer", "norm", "loss", "clipped"]
    assert len(rows) == 6 * 3 * STEPS
    norms = {(row["step"], row["rate"], row["kind"], row["layer"]): float(row["norm"]) for row in rows}
    for (step, rate, kind, layer), norm in norms.items():
        if layer == "total":
            parts = (norms[step, rate, kind, name] for name in ("fc1", "fc2"))
            assert norm == pytest.approx(math.hypot(*parts), rel=1e-12)


def test_says_what_three_steps_cannot_show(output):
    assert "not exploded yet" in output
    assert "value, fastclip against torch: losses bit-equal in all 3 steps" in output


def test_unclipped_explodes_and_clipped_converges():
    """At both rates; the unclipped runs stop soon after, and the article's rate needs five steps or so."""
    runs = regression.run(200, None, 1, lambda *progress: None)
    for none, value, norm in (runs[:3], runs[3:]):
        assert none.nonfinite_step is not None
        assert len(none.losses) == none.nonfinite_step + regression.STEPS_AFTER_NONFINITE
        assert not math.isfinite(none.loss_after)
        assert value.loss_after < value.loss_before / 50
        assert norm.loss_after < norm.loss_before / 1000
        assert all(map(math.isfinite, value.losses + norm.losses))
    assert 0 < sum(runs[2].clipped) < len(runs[2].clipped) / 2
    assert runs[3].nonfinite_step < 10


def test_cliff_gradient_and_wall():
    """The error at a fixed point of the recurrence, and a wall: a small step in b changes it by half its range."""
    at = torch.tensor
    # x_0 is a fixed point: sigmoid(x_50) = sigmoid(0.5).
    w, half = at(3.0, dtype=torch.float64), torch.sigmoid(at(0.5, dtype=torch.float64))
    assert cliff.error(w, 0.5 - w * half).item() == pytest.approx((half.item() - 0.7) ** 2, rel=1e-9)
    wall = 0.5 - 5.5 * half
    above, below = (cliff.error(at(5.5, dtype=torch.float64), wall + side).item() for side in (0.01, -0.01))
    assert below > 0.2
    assert above < 0.1


def test_cliff_throws_the_unclipped_far():
    wall = cliff.run(None, None, 1, lambda *progress: None)
    none, norm = wall.descents
    assert max(none.norms) > 100
    assert none.path[-1][0] > cliff.WEIGHTS[1]
    assert norm.errors[-1] < none.errors[-1] / 10
    assert all(math.dist(*pair) <= cliff.RATE * cliff.MAX_NORM * 1.001 for pair in pairwise(norm.path))
    assert (wall.ends["norm"] < cliff.SOLVED).sum() > 2 * (wall.ends["none"] < cliff.SOLVED).sum()


def test_same_seed_same_runs():
    first, second = (regression.run(20, None, 7, lambda *progress: None) for _ in range(2))
    assert [run.losses[:10] for run in first[1:3]] == [run.losses[:10] for run in second[1:3]]
    assert [run.norms["fc1"] for run in first[1:3]] == [run.norms["fc1"] for run in second[1:3]]


def test_digits_are_real_and_split():
    train_x, train_y, test_x, test_y = digits.load(seed=1)
    assert train_x.shape == (1437, 8, 8)
    assert test_x.shape == (360, 8, 8)
    assert (train_x.min(), train_x.max()) == (0, 1)
    assert sorted(set(train_y.tolist())) == sorted(set(test_y.tolist())) == list(range(10))


def test_batches_cover_each_epoch():
    order = digits.batches(10, 4, 6, seed=3)
    assert [len(batch) for batch in order] == [4, 4, 2, 4, 4, 2]
    assert torch.cat(order[:3]).sort().values.tolist() == list(range(10))


@pytest.mark.parametrize(("calls", "kept"), [(1, 1), (3, 2), (20, 10), (30, 20)])
def test_warm_up_leaves_times(calls, kept):
    run = digits.Run("norm", "torch", print, clip_us=[float(call) for call in range(calls)])
    assert len(run.times()) == kept
    assert run.quartiles()[1] >= min(run.times())


@pytest.mark.parametrize("name", ["rich", "sklearn", "matplotlib"])
def test_missing_extra(name, monkeypatch, capsys, tmp_path):
    """One line that says what to install, before anything is trained or written."""
    monkeypatch.setitem(sys.modules, name, None)
    assert demo.main(["--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert name in error
    assert "pip install 'torch-fastclip[demo]'" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps: must be a whole number from 1 to 1e9, got '0'"),
        (["--steps", "1.5"], "--steps: must be a whole number"),
        (["--max-norm", "nan"], "--max-norm: must be a finite number above 0, got 'nan'"),
        (["--max-norm", "inf"], "--max-norm: must be a finite number above 0, got 'inf'"),
        (["--max-norm", "0"], "--max-norm: must be a finite number above 0, got '0'"),
        (["--seed", "-1"], "--seed: must be a whole number from 0"),
        (["--threads", "0"], "--threads: must be a whole number from 1"),
        (["--out", __file__], "--out: must be a folder"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        demo.main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
