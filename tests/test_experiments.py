"""benchmarks/experiments: each runs, and writes a table that parses and a chart that is not blank; the accountant."""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks" / "experiments"
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    names = ("common", *(path.stem for path in FOLDER.glob("*.py")))

    def module(name):
        for each in names:
            monkeypatch.delitem(sys.modules, each, raising=False)
        return importlib.import_module(name)

    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ["adding", "cliff", "private", "relaxed"])
def test_quick(name, load, tmp_path):
    from matplotlib.image import imread

    assert load(name).main(["--quick", "--out", str(tmp_path)]) == 0
    lines = (tmp_path / f"{name}.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len(cells) >= 4
    assert {len(row) for row in cells} == {len(cells[0])}
    assert set(cells[1]) == {"---"}
    assert all(cell for row in cells for cell in row)
    assert imread(tmp_path / f"{name}.png").std() > 0.02


@pytest.mark.parametrize(("q", "noise"), [(0.01, 1.0), (0.09, 0.7), (0.5, 3.0)])
def test_accountant(q, noise, load):
    """Order 2 in closed form; order 5 against the integral."""
    private = load("private")
    closed = math.log1p(q * q * math.expm1(1 / noise**2))
    assert private.sampled_gaussian_rdp(q, noise, 2) == pytest.approx(closed, rel=1e-9)
    x = torch.linspace(-40 * noise, 40 * noise, 200_001, dtype=torch.float64)
    density = torch.exp(-(x**2) / (2 * noise**2)) / (noise * math.sqrt(2 * math.pi))
    ratio = 1 - q + q * torch.exp((2 * x - 1) / (2 * noise**2))
    moment = torch.trapezoid(density * ratio**5, x).item()
    assert private.sampled_gaussian_rdp(q, noise, 5) == pytest.approx(math.log(moment) / 4, rel=1e-6)


def test_epsilon_grows_with_steps_and_falls_with_noise(load):
    private = load("private")
    assert private.epsilon(0.1, 0.0, 1, 1e-5) == math.inf
    few, many, noisy = (private.epsilon(0.1, *run, 1e-5) for run in ((1.0, 10), (1.0, 100), (2.0, 100)))
    assert few < many
    assert noisy < many
