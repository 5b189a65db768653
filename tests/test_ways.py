"""Every public function by every way (ways.py): the same numbers, versions, dtypes, errors."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.utils as torchs

import reference
import ways
from cases import CASES, parameters, random

pytestmark = pytest.mark.usefixtures("world")


@pytest.fixture(params=ways.WAYS)
def way(request):
    return ways.WAYS[request.param]


def negative(gen):
    return [
        random(gen, torch.float32, 9),
        torch._neg_view(random(gen, torch.float32, 20)),
        random(gen, torch.bfloat16, 3),
    ]


def complex_among_floats(gen):
    return [random(gen, torch.float32, 9), random(gen, torch.complex64, 20), random(gen, torch.float32, 4, 5).t()]


def sparse_among_floats(gen):
    sparse = torch.sparse_coo_tensor(
        torch.tensor([[1, 3]]), random(gen, torch.float32, 2, 3), (5, 3), check_invariants=True
    ).coalesce()
    return [random(gen, torch.float32, 9), sparse, random(gen, torch.float32, 4)]


# One of each thing that a way could see otherwise than its neighbour.
_NAMES = {
    "zero_dim": torch.float32,
    "chunks_with_tail": torch.float32,
    "transposed": torch.bfloat16,
    "sliced_columns": torch.float32,
    "with_empties": torch.float64,
    "only_empties": torch.float32,
    "mixed_dtypes": torch.float32,
    "mixed_low": torch.float32,
    "overlapping": torch.float32,
    "same_twice": torch.float16,
    "nan": torch.float32,
    "expanded": torch.float32,
    "complex_numbers": torch.complex64,
}
READ = {case.name: lambda case=case: case.make(_NAMES[case.name]) for case in CASES if case.name in _NAMES}
READ |= {
    build.__name__: lambda build=build: build(torch.Generator().manual_seed(9))
    for build in (negative, complex_among_floats, sparse_among_floats)
}
WRITTEN = [name for name in READ if name != "expanded"]
# Views of one memory, a tensor listed twice, a sparse tensor and its values: each has one version counter.
SHARING = ("overlapping", "same_twice", "with_empties", "only_empties", "sparse_among_floats")
CLAMPED = [name for name in WRITTEN if "complex" not in name]


def plain(tensors):
    """The same numbers where the reference looks: in memory, with their signs."""
    return [t.to_dense() if t.is_sparse else t.resolve_neg() for t in tensors]


def floats(tensors):
    """What has magnitudes; a sparse tensor counts by its values, which for order -inf are not its zeros."""
    return [t.coalesce().values() if t.is_sparse else t for t in tensors]


@pytest.mark.parametrize("name", READ)
def test_norm(way, name, fence):
    for norm_type in (2.0, 1.0, math.inf, -math.inf, 0.0, 3.0, -1.0):
        tensors = READ[name]()
        before = fence(tensors)
        norm = way.get_total_norm(tensors, norm_type, norm_dtype=torch.float64)
        with reference.during(norm_type):
            reference.assert_norm(norm, reference.total_norm(floats(tensors), norm_type), torch.float64)
        assert before.unchanged()


@pytest.mark.parametrize("name", WRITTEN)
def test_clip(way, name, fence):
    """In one call, then in two, then by a bound that leaves all as it is; one version each."""
    for norm_type in (2.0, math.inf):
        grads = READ[name]()
        norm = reference.total_norm(floats(grads), norm_type)
        max_norm = norm / 3 if norm > 0 else 1.0
        for split in (False, True):
            grads = READ[name]()
            before, times = fence(grads), reference.writes(plain(grads))
            versions = [g._version for g in grads]
            expected = reference.clip_by_norm(plain(grads), reference.clip_coef(norm, max_norm))
            if split:
                way.clip_grads_with_norm_(grads, max_norm, torch.tensor(norm, dtype=torch.float64))
            else:
                got = way.clip_grad_norm_(grads, max_norm, norm_type, norm_dtype=torch.float64)
                reference.assert_norm(got, norm, torch.float64)
            with reference.during(norm_type, split):
                reference.assert_grads(plain(grads), expected, times)
                bumped = [g._version - v for g, v in zip(grads, versions, strict=True)]
                assert min(bumped) >= 1
                assert max(bumped) == 1 or name in SHARING, bumped
            assert before.outside_unchanged()


@pytest.mark.parametrize("name", CLAMPED)
@pytest.mark.parametrize("clip_value", [0.5, -0.25])
def test_value(way, name, clip_value, fence):
    grads = READ[name]()
    before = fence(grads)
    expected = reference.clip_by_value(plain(grads), clip_value)
    if name == "sparse_among_floats":
        # Zeros that are not there are not set to a negative bound.
        expected[1] = expected[1].where(grads[1].to_dense() != 0, 0.0)
    if name in ("overlapping", "same_twice"):
        expected = READ[name]()
        for grad in expected:
            grad.clamp_(-clip_value, clip_value)
    way.clip_grad_value_(grads, clip_value)
    reference.assert_bits(plain(grads), expected)
    assert before.outside_unchanged()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_temporary_of_the_negative_bit(way, dtype):
    """A way that resolves the bit has to keep the copy for as long as it reads it."""
    tensors = [torch._neg_view(torch.arange(1.0, 1001, dtype=dtype)) for _ in range(9)]
    for norm_type in (2.0, math.inf, -math.inf, 1.0):
        norm = way.get_total_norm(tensors, norm_type, norm_dtype=torch.float64)
        reference.assert_norm(norm, reference.total_norm(tensors, norm_type), torch.float64)
    norm = reference.total_norm(tensors)
    expected = reference.clip_by_norm(plain(tensors), reference.clip_coef(norm, 1.0))
    reference.assert_norm(way.clip_grad_norm_(tensors, 1.0, norm_dtype=torch.float64), norm, torch.float64)
    reference.assert_grads(plain(tensors), expected)


@pytest.mark.parametrize("norm_type", [2.0, 0.0, math.inf, -math.inf, -1.0, -2.0, -0.5])
def test_the_norm_of_nothing_is_zero(way, norm_type):
    """Of whatever order: no tensor, or tensors without elements."""
    for tensors in ([], [torch.empty(0)], [torch.empty(0), torch.empty(3, 0, dtype=torch.bfloat16)]):
        assert way.get_total_norm(tensors, norm_type).item() == 0
        assert way.clip_grad_norm_(tensors, 1.0, norm_type).item() == 0


def test_an_expanded_gradient_without_elements_is_taken(way):
    """No element shares memory with another where there is none."""
    for empty in (torch.zeros(1, 0).expand(3, 0), torch.zeros(0, 1).expand(0, 5), torch.zeros(1).expand(0, 7)):
        grads = [torch.tensor([3.0, 4.0]), empty]
        assert way.clip_grad_norm_(grads, 1.0).item() == 5
        torch.testing.assert_close(grads[0], torch.tensor([0.6, 0.8]))
        way.clip_grads_with_norm_(grads, 1.0, torch.tensor(2.0))
        torch.testing.assert_close(grads[0], torch.tensor([0.3, 0.4]))
        way.clip_grad_value_(grads, 0.35)
        torch.testing.assert_close(grads[0], torch.tensor([0.3, 0.35]))


@pytest.mark.parametrize("norm_dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_can_hold_the_norm(way, norm_dtype):
    """Rounded from the wide norm; its own way to do it is no matter."""
    for dtype in reference.FLOATS:
        grads = [torch.tensor([3.0, 4.3], dtype=dtype), torch.full((40,), 0.37, dtype=dtype)]
        wide = reference.total_norm(grads)
        norms = way.get_total_norm(grads, norm_dtype=norm_dtype), way.clip_grad_norm_(grads, 1.0, norm_dtype=norm_dtype)
        for norm in norms:
            assert norm.dtype == norm_dtype
            assert norm.float().item() == torch.tensor(wide, dtype=torch.float64).to(norm_dtype).float().item()
        assert reference.total_norm(grads) == pytest.approx(1, rel=1e-2)


@pytest.mark.parametrize(
    ("odd", "error"),
    [
        (lambda: torch.ones(1).expand(4), "more than one element of the written-to tensor"),
        (lambda: torch.ones(3, dtype=torch.int64), None),
        (lambda: torch.ones(3, dtype=torch.float8_e5m2), None),
    ],
    ids=["expanded", "int64", "float8"],
)
def test_what_is_refused_leaves_all_as_it_was(way, odd, error, fence):
    """The bad gradient last: an error of torch's type, no other gradient written, no version bumped."""
    grads = [torch.tensor([3.0, -4.0]), torch.tensor([[5.0]], dtype=torch.bfloat16), odd()]
    made = parameters([g.clone() if g.dtype.is_floating_point and 0 not in g.stride() else g for g in grads])
    before, versions = fence(grads), [g._version for g in grads]
    with pytest.raises((RuntimeError, NotImplementedError)) as theirs:
        torchs.clip_grad_norm_(made, 1.0)
    with pytest.raises(theirs.type, match=error):
        way.clip_grad_norm_(grads, 1.0)
    assert before.unchanged()
    assert [g._version for g in grads] == versions


@pytest.mark.parametrize("norm_type", [2.0, -1.0, -math.inf])
def test_a_bound_that_does_not_fit_and_a_norm_that_is_not_finite(way, norm_type, fence):
    grads = [torch.tensor([3.0, math.nan]), torch.tensor([5.0], dtype=torch.float16)]
    before, versions = fence(grads), [g._version for g in grads]
    with pytest.raises(RuntimeError, match="clip_value"):
        way.clip_grad_value_(grads, 1e6)
    with pytest.raises(RuntimeError, match="is non-finite, so it cannot be clipped"):
        way.clip_grad_norm_(grads, 1.0, norm_type, error_if_nonfinite=True)
    with pytest.raises(RuntimeError, match="is non-finite, so it cannot be clipped"):
        way.get_total_norm(grads, norm_type, error_if_nonfinite=True)
    assert before.unchanged()
    assert [g._version for g in grads] == versions
