"""The Triton kernels: what they take, their table, and the launches. Triton itself is imported by the first call.

One call copies one table to the device, from pinned memory, and launches one kernel for each dtype in the list and
each pass over memory, and one that finishes the norm: three for gradients of one dtype, whatever their number. What is
listed twice, or overlaps, is written in rounds, each with a table. Devices without float64 (Intel Arc) are refused,
because the norm is finished in it.
"""

from __future__ import annotations

import importlib.util
import math
import os
import struct
from array import array
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _ops
from ..arithmetic import is_power
from . import eager

NAME = "triton"
ENGINE = None
# Elements of a chunk, as kChunkSize in csrc/clip.h.
CHUNK = 65_536
WARPS = 4
# Lanes of a block of work, each with a vector of 16 bytes.
LANES = WARPS * (64 if torch.version.hip else 32)
# Programs for each multiprocessor in kernels that write: 8 KB in flight each, where 16 KB hide the latency of an H100.
PROGRAMS = 6
_FINALIZE_BLOCK = 1024
# Slots that tensor_norms_kernel takes at once: most tensors have few.
_TENSOR_BLOCK = 128

# In the order of Dtype in csrc/clip.h.
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_OPMATH = {dtype: torch.float64 if dtype == torch.float64 else torch.float32 for dtype in _DTYPES}
_WIDE = torch.float64

_MISSING = None
if not importlib.util.find_spec("triton"):
    _MISSING = "triton is not installed (pip install 'torch-fastclip[triton]')"
_INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"
_DEVICES = ("cpu",) if _INTERPRETS else ("cuda", "xpu")


def unavailable() -> str | None:
    if _MISSING:
        return _MISSING
    if _INTERPRETS or torch.cuda.is_available() or torch.xpu.is_available():
        return None
    return "no GPU (TRITON_INTERPRET=1 runs the kernels on the CPU, for tests)"


def refuses(tensor: Tensor) -> str | None:
    device = tensor.device
    if device.type not in _DEVICES:
        return f"no Triton kernels for {device.type} tensors"
    if tensor.layout != torch.strided:
        return f"layout {tensor.layout}"
    if tensor.dtype not in _DTYPES:
        return f"dtype {tensor.dtype}"
    if device.type == "xpu" and not torch.xpu.get_device_properties(device).has_fp64:
        return "a device without float64"
    if not torch.compiler.is_compiling() and tensor.is_neg():
        return "negative bit"
    if not tensor.is_contiguous() and not _is_dense(tensor):
        return "strides that leave holes or overlap"
    return None


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements are one run of memory in some order of the dimensions."""
    if torch.compiler.is_compiling():
        # Dynamo cannot read the strides of a gradient; these are the layouts that gradients have.
        channels_last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
        return channels_last or (tensor.dim() >= 2 and tensor.mT.is_contiguous())
    reach = 1
    for stride, size in sorted((stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        if size != 1:
            if stride != reach:
                return tensor.numel() == 0
            reach *= size
    return True


# The table: plain Python, no device.


class Launch(NamedTuple):
    """The tensors of one dtype, which one launch takes."""

    dtype: torch.dtype
    offset: int  # of its words in the table
    chunks: int
    tensors: int


class Table(NamedTuple):
    words: array  # see triton_kernels.py
    launches: list[Launch]
    slots: int


def make_table(
    spans: Sequence[tuple[int, int, torch.dtype]],
    chunk: int,
    *,
    norm_type: float = 2.0,
    max_norm: float = 0.0,
    bounds: Callable[[torch.dtype], tuple[float, float]] | None = None,
    places: Sequence[int] | None = None,
) -> Table:
    """Lays out the table of a list.

    Args:
        spans: address, number of elements (not 0) and dtype of each tensor.
        chunk: elements of a chunk.
        norm_type, max_norm: what the norm kernels read.
        bounds: what clamp_kernel reads, for each dtype.
        places: of each tensor in the list, for kernels that have a number for each.
    """
    own_places: dict[torch.dtype, list[int]] = {}
    rows: dict[torch.dtype, list[int]] = {}
    chunks: dict[torch.dtype, int] = {}
    slot = 0
    for i, (address, numel, dtype) in enumerate(spans):
        own_places.setdefault(dtype, []).append(places[i] if places else i)
        before = chunks.get(dtype, 0)
        own = -(-numel // chunk)
        rows.setdefault(dtype, []).extend((before, address, numel, slot))
        chunks[dtype] = before + own
        slot += own if norm_type else 1
    words = array("q", (slot, 0, 0, 0))
    launches = []
    for dtype, own_rows in rows.items():
        launches.append(Launch(dtype, len(words), chunks[dtype], len(own_rows) // 4))
        words.extend((len(own_rows) // 4, chunks[dtype], 0, 0))
        words.extend(own_rows)
        if places is not None:
            words.extend(own_places[dtype])
            words.extend([0] * (len(words) % 2))  # the next launch, too, starts at a multiple of 16 bytes
    return _with_numbers(Table(words, launches, slot), norm_type, max_norm, bounds)


def _with_numbers(
    table: Table, norm_type: float, max_norm: float, bounds: Callable[[torch.dtype], tuple[float, float]] | None
) -> Table:
    root = 1 / norm_type if norm_type else 0.0
    table.words[1:4] = array("q", _bits(norm_type, root, max_norm))
    for launch in table.launches:
        numbers = bounds(launch.dtype) if bounds else (norm_type, 0.0)
        table.words[launch.offset + 2 : launch.offset + 4] = array("q", _bits(*numbers))
    return table


def write_rounds(spans: Sequence[tuple[int, int, torch.dtype]]) -> list[list[int]]:
    """The indices of tensors that can be written at once, as in csrc/views.cpp: torch writes what is listed twice, or
    overlaps, one after the other."""
    clusters: list[list[int]] = []
    reach = -1
    addresses = [address for address, _, _ in spans]
    for i in sorted(range(len(spans)), key=addresses.__getitem__):
        address, numel, dtype = spans[i]
        if address >= reach:
            clusters.append([i])
            reach = address + numel * dtype.itemsize
        else:
            clusters[-1].append(i)
            reach = max(reach, address + numel * dtype.itemsize)
    if len(clusters) == len(spans):
        return [list(range(len(spans)))] if spans else []
    turns = {i: turn for cluster in clusters for turn, i in enumerate(sorted(cluster))}
    rounds: list[list[int]] = [[] for _ in range(max(map(len, clusters), default=0))]
    for i in range(len(spans)):
        rounds[turns[i]].append(i)
    return rounds


def norm_kind(norm_type: float) -> int:
    """As NormKind in csrc/clip.h."""
    if math.isinf(norm_type):
        return 2 if norm_type > 0 else 3
    return {2.0: 0, 1.0: 1, 0.0: 4}.get(norm_type, 5)


def _bits(*numbers: float) -> tuple[int, ...]:
    return struct.unpack(f"={len(numbers)}q", struct.pack(f"={len(numbers)}d", *numbers))


def _read_places(tensors: Sequence[Tensor]) -> list[tuple[int, tuple[int, int, torch.dtype]]]:
    """The spans of the tensors that have elements, each after its place in the list.

    Raises:
        RuntimeError: a tensor is refused, or not on the device of the first.
    """
    device = tensors[0].device if tensors else None
    spans = []
    for i, tensor in enumerate(tensors):
        reason = refuses(tensor)
        if reason is None and tensor.device != device:
            reason = f"device {tensor.device}, but tensors[0] is on {device}"
        if reason:
            raise RuntimeError(f"fastclip: tensors[{i}] cannot be taken by Triton: {reason}")
        if numel := tensor.numel():
            spans.append((i, (tensor.data_ptr(), numel, tensor.dtype)))
    return spans


def tables(
    tensors: Sequence[Tensor],
    *,
    norm_type: float = 2.0,
    max_norm: float = 0.0,
    bounds: Callable[[torch.dtype], tuple[float, float]] | None = None,
    with_places: bool = False,
    in_rounds: bool = False,
) -> list[Table]:
    """Reads tensors into one table, ``in_rounds`` one for each round of writes; none where they have no elements.

    By csrc/reader.cpp, or in Python what it does not take, and where it is not there.

    Raises:
        RuntimeError: a tensor is refused, or not on the device of the first.
    """
    found = None
    if _ops.tables and tensors and refuses(tensors[0]) is None and not any(map(Tensor.is_neg, tensors)):
        found = _ops.tables(list(tensors), CHUNK, norm_type == 0, with_places, in_rounds)
    if found is not None:
        return [_with_numbers(_from_reader(*table), norm_type, max_norm, bounds) for table in found]
    placed = _read_places(tensors)
    spans = [span for _, span in placed]
    rounds = write_rounds(spans) if in_rounds else [range(len(spans))] if spans else []
    return [
        make_table(
            [spans[i] for i in together],
            CHUNK,
            norm_type=norm_type,
            max_norm=max_norm,
            bounds=bounds,
            places=[placed[i][0] for i in together] if with_places else None,
        )
        for together in rounds
    ]


def _from_reader(words: bytes, launches: list[tuple[int, int, int, int]], slots: int) -> Table:
    return Table(array("q", words), [Launch(_DTYPES[dtype], *rest) for dtype, *rest in launches], slots)


# The launches.

# Pinned memory that a graph copies from whenever it is replayed: never freed, never used twice.
_slabs: list[Tensor] = []
_reserve: dict[torch.device, Tensor] = {}


def _pinned(size: int, device: torch.device) -> Tensor:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        reserve = _reserve.get(device)
        if reserve is None or reserve.numel() < size:
            raise RuntimeError(
                "fastclip: CUDA graph capture needs memory that only a call outside of it can set aside: warm up with "
                "the same gradients first"
            )
        _reserve[device] = reserve[size:]
        return reserve[:size]
    if device.type == "cuda" and (device not in _reserve or _reserve[device].numel() < 4 * size):
        _slabs.append(torch.empty(max(16 * size, 8192), dtype=torch.int64, pin_memory=True))
        _reserve[device] = _slabs[-1]
    return torch.empty(size, dtype=torch.int64, pin_memory=True)


def _to_device(words: array, device: torch.device) -> Tensor:
    here = torch.frombuffer(words, dtype=torch.int64)
    if device.type == "cpu":
        return here
    pinned = _pinned(len(words), device)
    pinned.copy_(here)
    return pinned.to(device, non_blocking=True)


_multiprocessors: dict[torch.device, int] = {}


def _programs(device: torch.device, chunks: int) -> int:
    if device not in _multiprocessors:
        count = 1
        if device.type != "cpu":
            properties = torch.get_device_module(device).get_device_properties(device)
            count = getattr(properties, "multi_processor_count", None) or properties.gpu_subslice_count
        _multiprocessors[device] = count
    return min(chunks, _multiprocessors[device] * PROGRAMS)


def _on(device: torch.device) -> AbstractContextManager[object]:
    """The scope in which kernels go to a device."""
    return nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)


def _launch_all(kernel: str, table: Table, words: Tensor, *tensors: Tensor, **constants: Any) -> None:
    for launch in table.launches:
        _launch(kernel, launch, words, *tensors, **constants)


def _launch(
    kernel: str, launch: Launch, words: Tensor, *tensors: Tensor, programs: int | None = None, **constants: Any
) -> None:
    from . import triton_kernels

    getattr(triton_kernels, kernel)[(programs or _programs(words.device, launch.chunks),)](
        words[launch.offset :],
        *tensors,
        **constants,
        DTYPE=_element(launch.dtype),
        CHUNK=CHUNK,
        BLOCK=LANES * 16 // launch.dtype.itemsize,
        num_warps=WARPS,
        # A fused multiply-add would undo the exact sums.
        enable_fp_fusion=False,
    )


def _element(dtype: torch.dtype) -> object:
    import triton.language as tl

    return getattr(tl, str(dtype).removeprefix("torch."))


def _launch_partials(table: Table, words: Tensor, norm_type: float, power: bool) -> tuple[Tensor, bool]:
    """The partial of every chunk, and whether they are norms, which they may be with `power`."""
    new = torch.zeros if norm_type == 0 else torch.empty
    partials = new(table.slots, dtype=_WIDE, device=words.device)
    in_units = [power and eager.powers_leave_float64(launch.dtype, norm_type) for launch in table.launches]
    kind, norms = norm_kind(norm_type), any(in_units)
    for launch, in_unit in zip(table.launches, in_units, strict=True):
        _launch(
            "norm_partial_kernel",
            launch,
            words,
            partials,
            programs=launch.chunks,
            KIND=kind,
            NORMS=norms,
            IN_UNIT=in_unit,
        )
    return partials, norms


def _launch_norm(
    table: Table,
    words: Tensor,
    norm_type: float,
    out: Tensor,
    clip_coef: Tensor | None = None,
    found_inf: Tensor | None = None,
    inv_scale: Tensor | None = None,
    *,
    root: bool = True,
    zero: bool = False,
) -> None:
    """Writes the norm to `out`, or without `root` the combined partial; and to `clip_coef` and `found_inf` theirs."""
    from . import triton_kernels

    kind = norm_kind(norm_type)
    partials, norms = _launch_partials(table, words, norm_type, root and is_power(norm_type))
    triton_kernels.norm_finalize_kernel[(1,)](
        words,
        partials,
        out,
        out if clip_coef is None else clip_coef,
        found_inf,
        inv_scale,
        KIND=kind,
        NORMS=norms,
        ROOT=root,
        CLIP=clip_coef is not None,
        ZERO=zero,
        BLOCK=_FINALIZE_BLOCK,
        num_warps=WARPS,
        enable_fp_fusion=False,
    )


def _norm_partial(tensors: list[Tensor], norm_type: float) -> Tensor:
    return _norm_of(tensors, norm_type, math.inf if norm_type == -math.inf else 0.0, root=False)


def total_norm(tensors: list[Tensor], norm_type: float) -> Tensor:
    """The wide norm over all elements of all tensors; 0 where there are none."""
    return _norm_of(tensors, norm_type, 0.0, root=True)


def _norm_of(tensors: list[Tensor], norm_type: float, of_nothing: float, root: bool) -> Tensor:
    read, device = tables(tensors, norm_type=norm_type), tensors[0].device
    if not read:
        return torch.full((), of_nothing, dtype=_WIDE, device=device)
    with _on(device):
        out = torch.empty((), dtype=_WIDE, device=device)
        _launch_norm(read[0], _to_device(read[0].words, device), norm_type, out, root=root)
    return out


def clip_coef(total_norm: Tensor, max_norm: float) -> Tensor:
    """The coefficient of arithmetic.clip_coef, by one kernel, from a 0-dim norm of any dtype that Triton takes."""
    from . import triton_kernels

    device = total_norm.device
    with _on(device):
        coef = torch.empty((), dtype=_WIDE, device=device)
        words = _to_device(_with_numbers(Table(array("q", (0, 0, 0, 0)), [], 0), 2.0, max_norm, None).words, device)
        triton_kernels.coef_kernel[(1,)](words, total_norm, coef, num_warps=1)
    return coef


def _tensor_norms(tensors: list[Tensor], norm_type: float) -> Tensor:
    from . import triton_kernels

    read, device = tables(tensors, norm_type=norm_type, with_places=True), tensors[0].device
    if not read:
        return torch.zeros(len(tensors), dtype=_WIDE, device=device)
    with _on(device):
        table = read[0]
        is_full = sum(launch.tensors for launch in table.launches) == len(tensors)
        norms = (torch.empty if is_full else torch.zeros)(len(tensors), dtype=_WIDE, device=device)
        words = _to_device(table.words, device)
        partials, are_norms = _launch_partials(table, words, norm_type, is_power(norm_type))
        for launch in table.launches:
            triton_kernels.tensor_norms_kernel[(launch.tensors,)](
                words,
                words[launch.offset :],
                partials,
                norms,
                KIND=norm_kind(norm_type),
                NORMS=are_norms,
                CHUNK=CHUNK,
                BLOCK=_TENSOR_BLOCK,
                num_warps=1,
                enable_fp_fusion=False,
            )
    return norms


def _tensor_stats(tensors: list[Tensor]) -> Tensor:
    from . import triton_kernels

    read, device = tables(tensors, with_places=True), tensors[0].device
    stats = torch.zeros(len(tensors), 4, dtype=_WIDE, device=device)
    if not read:
        return stats
    (table,) = read
    with _on(device):
        words = _to_device(table.words, device)
        partials = torch.empty(table.slots, 4, dtype=_WIDE, device=device)
        for launch in table.launches:
            _launch("stats_partial_kernel", launch, words, partials, programs=launch.chunks)
            triton_kernels.stats_finish_kernel[(launch.tensors,)](
                words[launch.offset :], partials, stats, CHUNK=CHUNK, BLOCK=_TENSOR_BLOCK, num_warps=1
            )
    return stats


def _scale_each_(tensors: list[Tensor], coefs: Tensor) -> None:
    read = tables(tensors, with_places=True, in_rounds=True)
    device = tensors[0].device if tensors else coefs.device
    if coefs.shape != (len(tensors),) or coefs.dtype != _WIDE or not coefs.is_contiguous() or coefs.device != device:
        raise RuntimeError(
            f"fastclip: coefs: expected a contiguous float64 tensor of {len(tensors)} elements on {device}, got "
            f"{coefs.dtype} of shape {tuple(coefs.shape)} on {coefs.device}"
        )
    _write(read, device, "scale_each_kernel", coefs)


def _write(rounds: list[Table], device: torch.device, kernel: str, *tensors: Tensor, **constants: Any) -> None:
    for table in rounds:
        with _on(device):
            _launch_all(kernel, table, _to_device(table.words, device), *tensors, **constants)


def _scale_(tensors: list[Tensor], clip_coef: Tensor, *, zero: bool = False) -> None:
    read = tables(tensors, in_rounds=True)
    _check_number(clip_coef, tensors[0].device if read else clip_coef.device, "clip_coef")
    _write(read, clip_coef.device, "scale_kernel", clip_coef, ZERO=zero)


def takes_number(number: Tensor, device: torch.device) -> bool:
    """Whether kernels on a device can read a number where it is."""
    return number.dim() == 0 and number.dtype in _DTYPES and number.device == device and not number.is_neg()


def _check_number(number: Tensor, device: torch.device, name: str) -> None:
    if not takes_number(number, device):
        raise RuntimeError(
            f"fastclip: {name}: expected a 0-dim floating-point tensor on {device}, got one of {number.dim()} "
            f"dimensions, {number.dtype}, on {number.device}"
        )


def _sanitize_(tensors: list[Tensor]) -> None:
    # Writing what overlaps twice changes nothing.
    _write(tables(tensors), tensors[0].device if tensors else torch.device("cpu"), "sanitize_kernel")


def _clamp_(tensors: list[Tensor], min: float, max: float) -> None:
    read = tables(tensors, bounds=lambda dtype: (_round(min, dtype), _round(max, dtype)), in_rounds=True)
    if not read:
        return
    device = tensors[0].device
    if math.isnan(min) or math.isnan(max):
        _write(read, device, "scale_kernel", torch.full((), math.nan, dtype=_WIDE, device=device), ZERO=False)
    else:
        _write(read, device, "clamp_kernel")


def _round(bound: float, dtype: torch.dtype) -> float:
    """As torch refuses a Python number that its dtype cannot hold."""
    if torch.finfo(dtype).max < abs(bound) < math.inf:
        raise RuntimeError(f"clip_value: value cannot be converted to type {dtype} without overflow: {bound}")
    # A CPU tensor: no device waits.
    return torch.tensor(bound, dtype=_OPMATH[dtype], device="cpu").to(dtype).item()


def _clip_grad_norm_(
    grads: list[Tensor],
    max_norm: float,
    norm_type: float,
    nonfinite: int = 0,
    found_inf: Tensor | None = None,
    inv_scale: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    device = grads[0].device
    rounds = tables(grads, norm_type=norm_type, max_norm=max_norm, in_rounds=True)
    dtype = dtype or _ops.promoted_dtype(grads)
    if dtype not in _DTYPES:
        raise RuntimeError(f"fastclip: dtype: expected float32, float64, bfloat16 or float16, got {dtype}")
    if found_inf is not None:
        _check_number(found_inf, device, "found_inf")
        if found_inf.dtype != torch.float32:
            raise RuntimeError(f"fastclip: found_inf: expected a float32 tensor, got {found_inf.dtype}")
    if inv_scale is not None:
        _check_number(inv_scale, device, "inv_scale")
    if not rounds:
        if found_inf is not None:
            found_inf.zero_()
        return torch.zeros((), dtype=dtype, device=device)
    with _on(device):
        table = rounds[0] if len(rounds) == 1 else tables(grads, norm_type=norm_type, max_norm=max_norm)[0]
        words = _to_device(table.words, device)
        if nonfinite == 2:
            _launch_all("sanitize_kernel", table, words)
        out = torch.empty((), dtype=dtype, device=device)
        coef = torch.empty((), dtype=_WIDE, device=device)
        zero = nonfinite == 1
        _launch_norm(table, words, norm_type, out, coef, found_inf, inv_scale, zero=zero)
        if len(rounds) == 1:
            _launch_all("scale_kernel", table, words, coef, ZERO=zero)
        else:
            _write(rounds, device, "scale_kernel", coef, ZERO=zero)
    return out


# The ops: a namespace that is Triton's on every device, and fastclip's own on devices that nothing else serves.

_KERNELS = {
    "norm_partial": _norm_partial,
    "tensor_norms": _tensor_norms,
    "tensor_stats": _tensor_stats,
    "scale_": _scale_,
    "scale_each_": _scale_each_,
    "sanitize_": _sanitize_,
    "clamp_": _clamp_,
    "clip_grad_norm_": _clip_grad_norm_,
}
# Without a GPU in sight nothing is defined, so that importing fastclip takes no longer.
_BUILT_FOR_GPUS = bool(torch.version.cuda or torch.version.hip or torch.xpu._is_compiled())
_USABLE = not _MISSING and (_INTERPRETS or _BUILT_FOR_GPUS)
# The device types whose torch.ops.fastclip.* are Triton's: those that no compiled library serves.
_SERVED = frozenset({"cuda", "xpu"} - _ops.compiled_for if _USABLE and not _INTERPRETS else ())

if _USABLE:
    _library = _ops.define("fastclip_triton")
    for _name, _kernel in _KERNELS.items():
        for _device in ("cpu", "cuda", "xpu"):
            _library.impl(_name, _kernel, _device.upper())
        for _device in _SERVED:
            _ops.library.impl(_name, _kernel, _device.upper())
    norm_partial = torch.ops.fastclip_triton.norm_partial.default
    tensor_norms = torch.ops.fastclip_triton.tensor_norms.default
    tensor_stats = torch.ops.fastclip_triton.tensor_stats.default
    scale_ = torch.ops.fastclip_triton.scale_.default
    scale_each_ = torch.ops.fastclip_triton.scale_each_.default
    sanitize_ = torch.ops.fastclip_triton.sanitize_.default
    clamp_ = torch.ops.fastclip_triton.clamp_.default
    clip_grad_norm_ = torch.ops.fastclip_triton.clip_grad_norm_.default
