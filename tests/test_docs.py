"""The documentation is true: examples run, links lead somewhere, and the tests that claims name exist."""

import doctest
import importlib
import re
from pathlib import Path

import pytest

import fastclip

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    "name", ["_dispatch", "adapters", "amp", "clip", "functional", "monitor.monitor", "optimizers", "patch", "policy"]
)
def test_examples_run(name):
    result = doctest.testmod(importlib.import_module(f"fastclip.{name}"))
    assert result.attempted > 0
    assert result.failed == 0


def test_examples_of_the_vocabulary_run():
    path = ROOT / "docs" / "vocabulary.md"
    if not path.exists():
        pytest.skip("an installed package has no docs")
    result = doctest.testfile(str(path), module_relative=False)
    assert result.attempted > 20
    assert result.failed == 0


def test_every_public_function_has_an_example():
    public = [getattr(fastclip, name) for name in fastclip.__all__ if name not in ("functional", "GradientWarning")]
    public += [getattr(module, name) for module in (fastclip.functional, fastclip.policy) for name in module.__all__]
    for each in public:
        assert ">>> " in each.__doc__, each


def documents():
    # An installed package has no README beside its tests.
    return [path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if path.exists()]


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), target


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.name)
def test_named_tests_exist(path):
    code = "\n".join(test.read_text() for test in (ROOT / "tests").glob("*.py"))
    for name in re.findall(r"`(test_\w+)`", path.read_text()):
        assert f"def {name}(" in code, name
    for name in re.findall(r"`(?:tests/)?(test_\w+\.py)`", path.read_text()):
        assert (ROOT / "tests" / name).exists(), name
