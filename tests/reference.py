"""The float64 oracle of every test and the one tolerance table; independent of fastclip."""

from __future__ import annotations

import contextlib
import math
from typing import NamedTuple

import numpy as np
import torch

LOW = (torch.bfloat16, torch.float16)
FLOATS = (torch.float32, torch.float64, *LOW)
NORM_TYPES = (2.0, 1.0, math.inf, -math.inf, 0.0, 0.5, 3.0, -1.0, -2.0)

# Unit roundoff u: one rounding to nearest is off by at most a factor 1 +- u.
_U = {dtype: torch.finfo(dtype).eps / 2 for dtype in FLOATS}
# Half the distance between subnormals: what one rounding adds where the result is subnormal.
_TINY = {dtype: torch.finfo(dtype).smallest_normal * _U[dtype] for dtype in FLOATS}

# Error of the float64 norm before its one rounding. A chunk has 65,536 elements in 32 lanes: at most 2,048 + 5
# additions of u64 = 1.1e-16 each, and the root divides by p. With pow at 1 ulp per element and p >= 0.5: 1e-12.
WIDE = 1e-12


class Tolerance(NamedTuple):
    """Largest error of a result: ``relative * |expected| + absolute``."""

    norm: float  # relative: one rounding of the result dtype on top of the wide norm
    grad: float  # relative: coefficient cast to opmath, product in opmath, one rounding of the gradient dtype
    absolute: float  # of norms and gradients: one rounding among subnormals


_U32 = _U[torch.float32]
_SLACK = 1 + 1e-6  # second-order terms of the products of roundings
TOLERANCES = {
    # Norm: float64 -> dtype. Gradient: coefficient -> dtype, then the product -> dtype.
    torch.float64: Tolerance(WIDE, WIDE, _SLACK * _TINY[torch.float64]),
    torch.float32: Tolerance(_SLACK * _U32 + WIDE, _SLACK * 2 * _U32 + WIDE, _SLACK * _TINY[torch.float32]),
    # Norm: float64 -> float32 -> dtype. Gradient: coefficient -> float32, the product -> float32 -> dtype.
    **{
        dtype: Tolerance(
            norm=_SLACK * (_U[dtype] + _U32) + WIDE,
            grad=_SLACK * (_U[dtype] + 2 * _U32) + WIDE,
            absolute=_SLACK * (_TINY[dtype] + _TINY[torch.float32]),
        )
        for dtype in LOW
    },
}
_REAL = {torch.complex64: torch.float32, torch.complex128: torch.float64}


def tolerance(dtype: torch.dtype) -> Tolerance:
    """Return the row of a dtype; complex numbers have the row of their parts."""
    return TOLERANCES[_REAL.get(dtype, dtype)]


def magnitudes(tensor: torch.Tensor) -> np.ndarray:
    """Return |x| of every element as a flat float64 array; a sparse tensor is its coalesced values."""
    tensor = tensor.detach()
    if tensor.is_sparse:
        tensor = tensor.coalesce().values()
    wide = torch.complex128 if tensor.is_complex() else torch.float64
    return np.abs(tensor.to(wide).resolve_conj().resolve_neg().reshape(-1).numpy())


def total_norm(tensors, norm_type: float | str = 2.0) -> float:
    """Return the norm of all elements; order 0 counts the tensors that hold a non-zero, as torch does."""
    norm_type = float(norm_type)
    values = [magnitudes(t) for t in tensors]
    if norm_type == 0:
        return float(sum(bool((v != 0).any()) for v in values))
    flat = np.concatenate(values) if values else np.empty(0)
    if flat.size == 0:
        return 0.0
    if norm_type == math.inf:
        return float(flat.max())  # numpy's max and min keep NaN
    if norm_type == -math.inf:
        return float(flat.min())
    extreme = flat.max() if norm_type > 0 else flat.min()
    unit = extreme if 0 < extreme < math.inf else 1.0  # in which no power leaves float64
    with np.errstate(all="ignore"):
        return float(unit * np.sum((flat / unit) ** norm_type) ** (1 / np.float64(norm_type)))


def clip_coef(norm: float, max_norm: float) -> float:
    """Return torch's factor: reciprocal, then product, then at most 1 with NaN kept; 1 if the bound is inf."""
    if max_norm == math.inf:
        return 1.0
    with np.errstate(all="ignore"):
        coef = float(np.float64(1.0) / (np.float64(norm) + 1e-6) * np.float64(max_norm))
    return 1.0 if coef > 1 else coef


def widen(tensors) -> list[torch.Tensor]:
    """Return float64 (complex128) copies that alias one another as the originals do."""
    storages: dict[tuple, torch.Tensor] = {}
    wide = []
    for t in tensors:
        t = t.detach()
        key = t.untyped_storage().data_ptr(), t.dtype
        if key not in storages:
            flat = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())
            storages[key] = flat.to(torch.complex128 if t.is_complex() else torch.float64, copy=True)
        wide.append(storages[key].as_strided(t.shape, t.stride(), t.storage_offset()))
    return wide


def writes(tensors) -> list[torch.Tensor]:
    """Return, for each tensor, how often each of its elements is written when the list is walked once."""
    counts = widen(tensors)
    for count in counts:
        count.zero_()
    for count in counts:
        count += 1
    return [count.real for count in counts]


def clip_by_norm(tensors, coef: float) -> list[torch.Tensor]:
    """Return float64 gradients after one multiplication per list entry: what is listed twice is multiplied twice."""
    wide = widen(tensors)
    for t in wide:
        t.mul_(coef)
    return wide


def scale_rounded_(tensors, coef: float) -> None:
    """Multiply in place as the bits are defined: opmath(g) * opmath(coef), rounded once to the gradient's dtype.

    Opmath is float32, or float64 for float64 and where float32 has no normal number for the coefficient.
    """
    below = 0 < abs(coef) < torch.finfo(torch.float32).tiny
    for t in tensors:
        opmath = torch.float64 if below or t.dtype == torch.float64 else torch.float32
        t.copy_(t.to(opmath) * torch.tensor(coef, dtype=torch.float64).to(opmath))


def clip_by_value(tensors, clip_value: float) -> list[torch.Tensor]:
    """Return gradients after torch's clamp, which keeps NaN; in their own dtype, so that the bound is rounded to it."""
    out = [t.detach().clone() for t in tensors]
    for t in out:
        bound = torch.tensor(clip_value, dtype=torch.float64).to(t.dtype)
        t.copy_(torch.minimum(torch.maximum(t, -bound), bound))
    return out


def assert_norm(actual: torch.Tensor, expected: float, dtype: torch.dtype | None = None) -> None:
    """Check a returned norm: dtype, 0-dim, and the one rounding the table allows."""
    assert actual.shape == ()
    if dtype is not None:
        assert actual.dtype == dtype
    row, value = tolerance(actual.dtype), actual.double().item()
    limit = torch.finfo(actual.dtype).max
    if math.isnan(expected):
        assert math.isnan(value)
    elif expected > limit * (1 + row.norm):
        assert value == math.inf
    elif not (expected > limit and value == math.inf):  # within the last half ulp either rounding is right
        bound = row.norm * expected + row.absolute
        assert abs(value - expected) <= bound, f"{value!r} is not {expected!r} within {bound:.3g}"


def _flat(tensors) -> torch.Tensor:
    """Return all elements in one row; complex ones as their parts."""
    return torch.cat([(torch.view_as_real(t) if t.is_complex() else t).reshape(-1) for t in tensors])


def _by_dtype(actual) -> list[list[int]]:
    groups: dict[torch.dtype, list[int]] = {}
    for i, t in enumerate(actual):
        groups.setdefault(t.dtype, []).append(i)
    return list(groups.values())


def assert_grads(actual, expected, times=None) -> None:
    """Check gradients against float64 ones; `times` says how often each element was rounded (default once)."""
    assert [t.shape for t in actual] == [t.shape for t in expected]
    for group in _by_dtype(actual):
        row = tolerance(actual[group[0]].dtype)
        got, want = _flat(actual[i] for i in group).double(), _flat(expected[i] for i in group).double()
        n = 1.0
        if times is not None:
            n = _flat(torch.complex(times[i], times[i]) if actual[i].is_complex() else times[i] for i in group)
        same = (got == want) | (got.isnan() & want.isnan())
        close = (got - want).abs() <= n * (row.grad * want.abs() + row.absolute)
        bad = ~(same | close)
        assert not bad.any(), f"{_where(bad, actual, group)}: {got[bad][:4].tolist()} is not {want[bad][:4].tolist()}"


def assert_bits(actual, expected) -> None:
    """Check that tensors are equal bit by bit, NaN equal to NaN and -0.0 different from 0.0."""
    assert [(t.shape, t.dtype) for t in actual] == [(t.shape, t.dtype) for t in expected]
    for group in _by_dtype(actual):
        got, want = _flat(actual[i].detach() for i in group), _flat(expected[i].detach() for i in group)
        bad = ~(((got == want) & (torch.signbit(got) == torch.signbit(want))) | (got.isnan() & want.isnan()))
        assert not bad.any(), f"{_where(bad, actual, group)}: {got[bad][:4].tolist()} is not {want[bad][:4].tolist()}"


def _where(bad: torch.Tensor, tensors, group: list[int]) -> str:
    """Name the first tensor with a bad element."""
    at = int(bad.nonzero()[0])
    for i in group:
        size = tensors[i].numel() * (2 if tensors[i].is_complex() else 1)
        if at < size:
            return f"tensor {i} of {len(tensors)}, {tensors[i].dtype}, element {at}, {int(bad.sum())} bad in all"
        at -= size
    return ""


@contextlib.contextmanager
def during(*what):
    """Say in a failure which turn of a loop it was."""
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"{what}: {error}") from None
