"""The Triton backend: its plan in plain Python, its kernels in the interpreter."""

from __future__ import annotations

import importlib.util

import pytest
import reference
import subproc
import torch

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in reference.FLOATS}


def interpret(function: str, *args):
    """Run a function of interpreted.py in a process whose Triton interprets."""
    result = subproc.call(f"interpreted:{function}", *args, env={"TRITON_INTERPRET": "1"})
    assert not result.error, result.error
    return result.value


@needs_triton
@pytest.mark.parametrize("dtype", NAMES.values(), ids=NAMES)
def test_norms(dtype):
    assert interpret("norms", dtype) >= 150


@needs_triton
@pytest.mark.parametrize("dtype", NAMES.values(), ids=NAMES)
def test_clips(dtype):
    assert interpret("clips", dtype) >= 25


@needs_triton
@pytest.mark.parametrize("dtype", NAMES.values(), ids=NAMES)
def test_values(dtype):
    assert interpret("values", dtype) >= 25


@needs_triton
def test_any_grid_gives_the_same_bits():
    assert interpret("grids") == 20


@needs_triton
def test_the_norm_is_rounded_once():
    assert interpret("rounding") == 20
