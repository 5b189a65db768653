"""What holds for any gradients: bounds, idempotence, symmetry, and the same bits for any number of threads."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastclip
import reference
from cases import parameters, place

# Derandomized: a red run is red again. No deadline: the machine may be busy.
check = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

dtypes = st.sampled_from(reference.FLOATS)
norm_types = st.sampled_from([2.0, 1.0, math.inf, 3.0, 0.5, 1.5])
max_norms = st.floats(1e-3, 1e3)


@st.composite
def gradients(draw, same_dtype: bool = False, low: float = -1e4, high: float = 1e4):
    """Draw one to five tensors of up to 300 elements, misaligned or strided, of any float dtypes."""
    out = []
    shared = draw(dtypes)
    for _ in range(draw(st.integers(1, 5))):
        dtype = shared if same_dtype else draw(dtypes)
        size = draw(st.integers(0, 300))
        seed = draw(st.integers(0, 2**31))
        few = draw(st.lists(st.floats(low, high, width=16), max_size=size and 6))
        generator = torch.Generator().manual_seed(seed)
        scale = draw(st.sampled_from([1.0, 1e-3, 100.0]))
        values = torch.randn(size, dtype=torch.float64, generator=generator) * scale
        values[: len(few)] = torch.tensor(few, dtype=torch.float64)[:size]
        values = values.clamp(low, high).to(dtype)
        layout = draw(st.sampled_from(["flat", "misaligned", "step", "transposed"]))
        if layout == "step":
            out.append(place(values.repeat_interleave(2))[::2])
        elif layout == "transposed":
            out.append(place(values[: size // 3 * 3].reshape(-1, 3)).t())
        else:
            out.append(place(values, offset=draw(st.integers(1, 15)) if layout == "misaligned" else 0))
    return out


def copies(grads):
    """Return clones that keep strides."""
    return [torch.empty_strided(g.shape, g.stride(), dtype=g.dtype).copy_(g) for g in grads]


def rounding(grads) -> tuple[float, float]:
    """Return the largest relative and, over all elements, absolute error that clipping can leave in the norm."""
    rows = [reference.tolerance(g.dtype) for g in grads]
    return max(r.grad for r in rows), sum(r.absolute * g.numel() for r, g in zip(rows, grads, strict=True))


@check
@given(grads=gradients(), max_norm=max_norms, norm_type=norm_types)
def test_norm_after_is_at_most_max_norm(backend, grads, max_norm, norm_type):
    """And not far below it if something was clipped, and no element grew or changed its sign."""
    before, norm = copies(grads), reference.total_norm(grads, norm_type)
    fastclip.clip_grad_norm_(parameters(grads), max_norm, norm_type)
    relative, absolute = rounding(grads)
    after = reference.total_norm(grads, norm_type)
    # Below 1 the root amplifies the rounding of tiny elements; their sum is what is bounded then.
    if norm_type >= 1:
        assert after <= max_norm * (1 + relative) + absolute
        assert after >= min(norm, max_norm * norm / (norm + 1e-6)) * (1 - relative) - absolute
    for was, now in zip(before, grads, strict=True):
        assert bool((now.abs() <= was.abs()).all())
        assert bool((now * was >= 0).all())
        if norm + 1e-6 <= max_norm * (1 - 1e-6):
            reference.assert_bits([now], [was])


@check
@given(grads=gradients(), max_norm=max_norms, norm_type=norm_types)
def test_clipping_twice_changes_nothing(backend, grads, max_norm, norm_type):
    """The second time the norm is max_norm to rounding; what can still move is that rounding and the epsilon."""
    fastclip.clip_grad_norm_(parameters(grads), max_norm, norm_type)
    once = copies(grads)
    fastclip.clip_grad_norm_(parameters(grads), max_norm, norm_type)
    relative, _ = rounding(grads)
    if norm_type >= 1:
        for first, second in zip(once, grads, strict=True):
            row = reference.tolerance(first.dtype)
            moved = (second.double() - first.double()).abs()
            allowed = first.double().abs() * (relative + row.grad + 2e-6 / max_norm) + 2 * row.absolute
            assert bool((moved <= allowed).all())


@check
@given(grads=gradients(), clip_value=st.floats(0, 100, width=32))
def test_value_clip_is_idempotent(backend, grads, clip_value):
    """Inside the bound nothing changes, and the second time nothing at all."""
    before = copies(grads)
    fastclip.clip_grad_value_(parameters(grads), clip_value)
    for was, now in zip(before, grads, strict=True):
        bound = torch.tensor(clip_value, dtype=torch.float64).to(now.dtype)
        assert bool((now.abs() <= bound).all())
        inside = was.abs() <= bound
        reference.assert_bits([now[inside]], [was[inside]])
        assert bool((now[~inside] == bound.copysign(was[~inside])).all())
    once = copies(grads)
    fastclip.clip_grad_value_(parameters(grads), clip_value)
    reference.assert_bits(grads, once)


@check
@given(data=st.data(), grads=gradients(), norm_type=norm_types)
def test_order_of_tensors_does_not_matter(backend, data, grads, norm_type):
    """Same norm to float64's rounding, and each gradient the same result wherever it stands in the list."""
    order = data.draw(st.permutations(range(len(grads))))
    shuffled = [copies(grads)[i] for i in order]
    one = fastclip.clip_grad_norm_(parameters(grads), 1.0, norm_type, norm_dtype=torch.float64).item()
    two = fastclip.clip_grad_norm_(parameters(shuffled), 1.0, norm_type, norm_dtype=torch.float64).item()
    assert one == pytest.approx(two, rel=2 * reference.WIDE, abs=0)
    for position, i in enumerate(order):
        torch.testing.assert_close(
            shuffled[position], grads[i], rtol=2 * reference.tolerance(grads[i].dtype).grad, atol=1e-7
        )


@check
@given(grads=gradients(same_dtype=True), power=st.integers(-3, 3))
def test_norm_scales(backend, grads, power):
    """Times a power of two is exact in every dtype here, so the norm scales bit by bit."""
    factor = 2.0**power
    keep = [g.abs() >= 2.0**-8 for g in grads]  # far from subnormals
    grads = [torch.where(k, g, torch.zeros_like(g)).clamp(-500, 500) for k, g in zip(keep, grads, strict=True)]
    scaled = [g * factor for g in grads]
    for norm_type in (2.0, 1.0, math.inf):
        one = fastclip.get_total_norm(grads, norm_type, norm_dtype=torch.float64).item()
        two = fastclip.get_total_norm(scaled, norm_type, norm_dtype=torch.float64).item()
        assert two == one * factor


@check
@given(grads=gradients(), norm_type=norm_types)
def test_norm_against_the_oracle(backend, grads, norm_type):
    norm = fastclip.get_total_norm(grads, norm_type, norm_dtype=torch.float64)
    reference.assert_norm(norm, reference.total_norm(grads, norm_type))


@check
@given(grads=gradients(), norm_type=norm_types)
def test_layout_does_not_matter(backend, grads, norm_type):
    """Contiguous copies have the same norm to float64's rounding, and clip to the same values."""
    contiguous = [g.clone(memory_format=torch.contiguous_format) for g in grads]
    one = fastclip.clip_grad_norm_(parameters(grads), 1.0, norm_type, norm_dtype=torch.float64).item()
    two = fastclip.clip_grad_norm_(parameters(contiguous), 1.0, norm_type, norm_dtype=torch.float64).item()
    assert one == pytest.approx(two, rel=2 * reference.WIDE, abs=0)


@check
@given(grads=gradients(), threads=st.integers(2, 4), norm_type=norm_types, max_norm=max_norms)
def test_threads_do_not_matter(cpu, grads, threads, norm_type, max_norm):
    grads = [*grads, torch.randn(140_000, generator=torch.Generator().manual_seed(6))]
    before, results = torch.get_num_threads(), []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            made = copies(grads)
            norm = fastclip.clip_grad_norm_(parameters(made), max_norm, norm_type, norm_dtype=torch.float64)
            fastclip.clip_grad_value_(parameters(made), max_norm / 50)
            results.append([norm, *made])
    finally:
        torch.set_num_threads(before)
    reference.assert_bits(*results)


@check
@given(grads=gradients(), max_norm=max_norms)
def test_negative_max_norm_is_the_mirror_image(backend, grads, max_norm):
    """Same magnitudes with the sign turned, whenever the positive one clips."""
    mirrored = copies(grads)
    norm = reference.total_norm(grads)
    fastclip.clip_grad_norm_(parameters(grads), max_norm)
    fastclip.clip_grad_norm_(parameters(mirrored), -max_norm)
    if norm > max_norm * (1 + 1e-6):
        reference.assert_bits([-g for g in mirrored], grads)
