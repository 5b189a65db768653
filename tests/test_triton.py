"""The Triton backend: its table in plain Python, its kernels in the interpreter, its place among the backends."""

from __future__ import annotations

import importlib.util
import itertools
import math
import re
import struct
from pathlib import Path

import pytest
import torch

import fastclip
import reference
import subproc
from fastclip import _ops
from fastclip.backends import triton_

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
CLIP_H = Path(__file__).parents[1] / "csrc" / "clip.h"
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
def test_high_orders():
    assert interpret("high_orders") == 9


@needs_triton
def test_coefficients_below_float32():
    assert interpret("coefficients") == 20


@needs_triton
def test_any_grid_gives_the_same_bits():
    assert interpret("grids") == 12


@needs_triton
def test_the_norm_is_rounded_once():
    assert interpret("rounding") == 20


@needs_triton
def test_ops():
    assert interpret("ops") == 7


@needs_triton
def test_each_tensor():
    assert interpret("each") == 8 * 18


@needs_triton
def test_launches():
    assert interpret("launches") == 10


@needs_triton
def test_zeros_are_read_once():
    assert interpret("zeros") == 8


# The table


def rows(table):
    """Each launch's dtype and rows (chunks before, address, elements, slot), read back from the words."""
    out = {}
    for launch in table.launches:
        tensors, chunks = table.words[launch.offset : launch.offset + 2]
        assert chunks == launch.chunks
        words = table.words[launch.offset + 4 : launch.offset + 4 + 4 * tensors]
        out[launch.dtype] = [tuple(words[i : i + 4]) for i in range(0, len(words), 4)]
    return out


@pytest.mark.parametrize("count", [1, 2_000, 10_000])
def test_one_dtype_is_one_launch(count):
    """So a call launches one kernel for each pass, whatever the number of tensors."""
    table = triton_.make_table([(4096 * i, 1000, torch.float32) for i in range(count)], triton_.CHUNK)
    assert len(table.launches) == 1
    assert table.launches[0].chunks == table.slots == count
    assert rows(table)[torch.float32] == [(i, 4096 * i, 1000, i) for i in range(count)]
    assert len(table.words) == 8 + 4 * count


@pytest.mark.skipif(not CLIP_H.exists(), reason="csrc/ is not beside tests/")
def test_chunks_are_those_of_the_compiled_kernels():
    """Partials of all engines are of the same elements."""
    assert re.findall(r"kChunkSize = (\d+);", CLIP_H.read_text()) == [str(triton_.CHUNK)]


def test_chunk_boundaries():
    sizes = (1, 127, 128, 129, 255, 256, 257)
    table = triton_.make_table([(1024 * i, n, torch.bfloat16) for i, n in enumerate(sizes)], 128)
    before = 0
    for (first, _, numel, slot), n in zip(rows(table)[torch.bfloat16], sizes, strict=True):
        assert (first, numel, slot) == (before, n, before)
        before += math.ceil(n / 128)
    assert table.slots == table.launches[0].chunks == before


def test_slots_follow_the_list_across_dtypes():
    """The order of combination is that of the list, as on the CPU, not that of the launches."""
    f32, bf16 = torch.float32, torch.bfloat16
    table = triton_.make_table([(0, 300, f32), (4096, 5, bf16), (8192, 10, f32), (12288, 200, bf16)], 128)
    assert rows(table) == {f32: [(0, 0, 300, 0), (3, 8192, 10, 4)], bf16: [(0, 4096, 5, 3), (1, 12288, 200, 5)]}
    assert table.slots == 7


def test_order_zero_has_a_slot_for_each_tensor():
    table = triton_.make_table([(0, 300, torch.float32), (4096, 300, torch.float32)], 128, norm_type=0.0)
    assert rows(table)[torch.float32] == [(0, 0, 300, 0), (3, 4096, 300, 1)]
    assert table.slots == 2


def test_more_than_2_31_elements():
    """On paper: every number of the table is 64 bits wide, and no chunk is larger than 32 bits can count."""
    many, address = 5 * 2**31 + 3, 2**46
    table = triton_.make_table([(address, many, torch.bfloat16), (2 * address, 1, torch.bfloat16)], triton_.CHUNK)
    chunks = math.ceil(many / triton_.CHUNK)
    assert rows(table)[torch.bfloat16] == [(0, address, many, 0), (chunks, 2 * address, 1, chunks)]
    assert triton_.CHUNK < 2**31


def test_numbers_cross_as_their_bits():
    table = triton_.make_table([(0, 1, torch.float16)], 8, norm_type=3.0, max_norm=1e300)
    assert struct.pack("=3q", *table.words[1:4]) == struct.pack("=3d", 3.0, 1 / 3.0, 1e300)
    bounded = triton_.make_table([(0, 1, torch.float16)], 8, bounds=lambda dtype: (-math.inf, 0.5))
    offset = bounded.launches[0].offset
    assert struct.pack("=2q", *bounded.words[offset + 2 : offset + 4]) == struct.pack("=2d", -math.inf, 0.5)


def test_every_part_of_a_table_is_aligned():
    """Pointers into it differ in nothing that a kernel is specialised by."""
    table = triton_.make_table([(64 * i, 3 + i, dtype) for i, dtype in enumerate(3 * reference.FLOATS)], 8)
    assert len(table.launches) == 4
    assert all(launch.offset * 8 % 16 == 0 for launch in table.launches)


def test_rounds():
    """What is listed twice, or overlaps, is written one after the other; all else at once."""
    f32, bf16 = torch.float32, torch.bfloat16
    assert triton_.write_rounds([]) == []
    assert triton_.write_rounds([(400, 10, f32), (0, 100, f32), (440, 1, bf16)]) == [[0, 1, 2]]
    assert triton_.write_rounds([(0, 100, f32), (396, 1, f32)]) == [[0], [1]]
    assert triton_.write_rounds([(0, 1, f32), (8, 1, f32), (0, 1, f32), (0, 1, f32)]) == [[0, 1], [2], [3]]
    assert triton_.write_rounds([(100, 4, bf16), (900, 4, f32), (0, 200, bf16)]) == [[0, 1], [2]]


@pytest.mark.skipif(_ops.tables is None, reason="the reader is not there")
@pytest.mark.parametrize("options", list(itertools.product((2.0, 0.0), (False, True), (False, True))))
def test_the_reader_fills_the_same_tables(monkeypatch, options):
    norm_type, with_places, in_rounds = options
    monkeypatch.setattr(triton_, "_DEVICES", ("cpu",))
    base = torch.zeros(200_000)
    tensors = [torch.zeros(n, dtype=dtype) for n in (0, 1, 70_000) for dtype in reference.FLOATS]
    tensors += [base, torch.zeros(3, 4).t(), torch.nn.Parameter(base[5:9]), base[:1], torch.zeros(0, 3)]
    numbers = {"norm_type": norm_type, "max_norm": 0.3, "bounds": lambda dtype: (-dtype.itemsize, dtype.itemsize)}
    given = numbers | {"with_places": with_places, "in_rounds": in_rounds}
    for some in (tensors, tensors[3:6], tensors[:4], []):
        by_reader = triton_.tables(some, **given)
        with monkeypatch.context() as patch:
            patch.setattr(_ops, "tables", None)
            in_python = triton_.tables(some, **given)
        assert by_reader == in_python
    assert len(triton_.tables(tensors, **given)) == (3 if in_rounds else 1)


@pytest.mark.skipif(_ops.tables is None, reason="the reader is not there")
@pytest.mark.parametrize(
    "odd", [torch.ones(8)[::2], torch.ones(2).int(), torch.ones(2).to_sparse(), torch.ones(2, device="meta")]
)
def test_the_reader_leaves_what_it_cannot_fill_to_python(odd):
    assert _ops.tables([torch.ones(2), odd], 128, False, False, False) is None


@pytest.mark.parametrize(
    ("tensor", "dense"),
    [
        (torch.empty(4, 5, 6).permute(2, 0, 1), True),
        (torch.empty(1, 7).t(), True),
        (torch.empty(6)[2:3].as_strided((1, 1), (7, 99)), True),
        (torch.empty(0, 4).t(), True),
        (torch.empty(6)[::2], False),
        (torch.empty(1).expand(5), False),
        (torch.empty(4, 6)[:, :3], False),
        (torch.empty(9).as_strided((3, 3), (2, 1)), False),
    ],
)
def test_dense(tensor, dense):
    assert triton_._is_dense(tensor) == dense


# Its place among the backends


def test_says_why_it_cannot_be_used():
    if torch.cuda.is_available() or torch.xpu.is_available():
        pytest.skip("there is a GPU here")
    reason = fastclip.backends()["triton"]
    assert "no GPU" in reason or "not installed" in reason
    assert triton_.refuses(torch.ones(2)) == "no Triton kernels for cpu tensors"
    with pytest.raises(ValueError, match="triton"), fastclip.use_backend("triton"):
        pass


def test_comes_between_the_compiled_kernels_and_eager():
    assert list(fastclip.backends()) == ["cpu", "cuda", "triton", "eager"]


def test_is_imported_by_the_first_call_alone(tmp_path):
    script = "import sys, fastclip; fastclip.backends(); sys.exit('triton' in sys.modules)"
    assert subproc.python("-c", script, cwd=tmp_path).returncode == 0


def test_absent(tmp_path):
    script = "import sys; sys.modules['triton'] = None; import fastclip; print(fastclip.backends()['triton'])"
    result = subproc.python("-c", script, cwd=tmp_path)
    assert "triton is not installed" in result.stdout, result.stderr


@needs_triton
def test_serves_the_ops_of_devices_without_compiled_kernels(tmp_path):
    # A torch that was built for GPUs, as far as fastclip can see.
    script = (
        "import torch; torch.version.cuda = '13.0'; import fastclip;"
        "has = torch._C._dispatch_has_kernel_for_dispatch_key;"
        "print(*(has('fastclip::' + op, key) for key in ('CUDA', 'XPU') for op in "
        "('norm_partial', 'scale_', 'clamp_', 'clip_grad_norm_')))"
    )
    result = subproc.python("-c", script, cwd=tmp_path)
    assert result.stdout.split() == ["True"] * 8, result.stderr


@needs_triton
def test_environment_variable(tmp_path):
    script = (
        "import fastclip, torch; p = torch.nn.Parameter(torch.zeros(2)); p.grad = torch.tensor([3.0, 4.0]);"
        "print(fastclip.why([p])[0].backend, fastclip.clip_grad_norm_([p], 1.0).item(), p.grad.tolist())"
    )
    env = {"TRITON_INTERPRET": "1", "FASTCLIP_BACKEND": "triton"}
    result = subproc.python("-c", script, cwd=tmp_path, env=env)
    assert result.stdout.split()[:2] == ["triton", "5.0"], result.stderr
    assert result.stdout.split(maxsplit=2)[2].startswith("[0.599999"), result.stdout
