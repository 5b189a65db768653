"""The same call to torch and to fastclip: results, dtypes, warnings with their line, errors."""

from __future__ import annotations

import inspect
import itertools
import math
import sys
import warnings
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.utils as torchs
from torch._subclasses.fake_tensor import FakeTensorMode

import fastclip
import reference
from cases import parameters

NAMES = ("clip_grad_norm_", "clip_grad_value_", "get_total_norm", "clip_grads_with_norm_")


class Outcome(NamedTuple):
    """What a call did: what came back or was raised, and what it warned about."""

    value: Any
    error: BaseException | None
    warned: list[tuple[type, str, str, int]]


def outcome(call, module) -> Outcome:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            value, error = call(module), None
        except Exception as raised:
            value, error = None, raised
    return Outcome(value, error, [(w.category, str(w.message), w.filename, w.lineno) for w in caught])


def same(call) -> tuple[Outcome, Outcome]:
    """Run `call(module)` with torch and with fastclip; exception type and warnings must agree."""
    theirs, ours = outcome(call, torchs), outcome(call, fastclip)
    assert type(ours.error) is type(theirs.error), f"torch: {theirs.error!r}, fastclip: {ours.error!r}"
    assert ours.warned == theirs.warned
    return theirs, ours


def same_tensor(call) -> torch.Tensor:
    """As `same`, for a call that returns a tensor: type, dtype, device, shape and value agree."""
    theirs, ours = (o.value for o in same(call))
    assert type(ours) is type(theirs)
    assert (ours.dtype, ours.device, ours.shape, ours.requires_grad) == (
        theirs.dtype,
        theirs.device,
        theirs.shape,
        theirs.requires_grad,
    )
    if not ours.is_meta:
        bound = 2 * reference.tolerance(ours.dtype).norm  # torch rounds per-tensor norms, too
        torch.testing.assert_close(ours, theirs, rtol=4 * bound, atol=0, equal_nan=True)
    return ours


def one(dtype=torch.float32) -> list[torch.nn.Parameter]:
    return parameters([torch.tensor([3.0, 4.0], dtype=dtype)])


# Signatures


@pytest.mark.parametrize("name", NAMES)
def test_signature(name):
    """Names, order, kinds and defaults of torch; ours may add keyword-only arguments."""
    ours = list(inspect.signature(getattr(fastclip, name)).parameters.values())
    theirs = list(inspect.signature(getattr(torchs, name)).parameters.values())
    added = ours[len(theirs) :]
    assert [(p.name, p.kind, p.default) for p in ours[: len(theirs)]] == [(p.name, p.kind, p.default) for p in theirs]
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in added)
    norms, policies = ["norm_dtype", "process_group", "is_duplicate"], ["nonfinite", "found_inf", "inv_scale"]
    expected = {"clip_grad_norm_": norms + policies, "get_total_norm": norms, "clip_grad_value_": policies}
    assert [p.name for p in added] == expected.get(name, [])


def test_positional_and_keyword_arguments():
    for call in (
        lambda F: F.clip_grad_norm_(one(), 1.0, 1.0, True, False),
        lambda F: F.clip_grad_norm_(parameters=one(), max_norm=1, norm_type=1, error_if_nonfinite=True, foreach=True),
        lambda F: F.get_total_norm([torch.ones(3)], 3, True, None),
        lambda F: F.get_total_norm(tensors=[torch.ones(3)], norm_type=3, error_if_nonfinite=True, foreach=True),
    ):
        same_tensor(call)
    same(lambda F: F.clip_grads_with_norm_(parameters=one(), max_norm=1.0, total_norm=torch.tensor(5.0), foreach=None))
    same(lambda F: F.clip_grad_value_(parameters=one(), clip_value=1.0, foreach=False))


@pytest.mark.parametrize("name", NAMES)
def test_unknown_keyword(name):
    _, ours = same(lambda F: getattr(F, name)(one(), bogus=1))
    assert isinstance(ours.error, TypeError)


def test_norm_dtype_is_keyword_only():
    with pytest.raises(TypeError):
        fastclip.clip_grad_norm_(one(), 1.0, 2.0, False, None, torch.float32)
    with pytest.raises(TypeError):
        fastclip.get_total_norm(one(), 2.0, False, None, torch.float32)


# Table 1.2: dtypes and values


@pytest.mark.parametrize("dtype", [*reference.FLOATS, torch.complex64, torch.complex128])
@pytest.mark.parametrize("foreach", [None, True, False])
def test_one_dtype(dtype, foreach):
    grads = [torch.randn(4, 5).to(dtype), torch.randn(7).to(dtype)]
    same_tensor(lambda F: F.get_total_norm(grads, foreach=foreach))
    same_tensor(lambda F: F.clip_grad_norm_(parameters([g.clone() for g in grads]), 1.0, foreach=foreach))


@pytest.mark.parametrize("count", [2, 3])
def test_every_dtype_mix(count):
    """The returned dtype is torch's promotion, whatever the order of the list; each gradient keeps its own."""
    dtypes = [*reference.FLOATS, torch.complex64, torch.complex128]
    for mix in itertools.permutations(dtypes, count):
        grads = [torch.tensor([3.0, 4.0]).to(dtype) for dtype in mix]  # each norm is exactly 5
        same_tensor(lambda F: F.get_total_norm(grads))  # noqa: B023
        same_tensor(lambda F: F.clip_grad_norm_(parameters([g.clone() for g in grads]), 1.0))  # noqa: B023
        fastclip.clip_grad_norm_(parameters(grads), 1.0)
        assert [g.dtype for g in grads] == list(mix)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("foreach", [None, True, False])
def test_gradients_in_full_precision(backend, dtype, foreach):
    """float32 and float64: torch's own numbers, to one rounding of its coefficient and norm more."""
    shapes = [(3,), (40, 41), (), (2, 3, 4), (1,)]
    for norm_type in (2.0, 1.0, math.inf, 3.0, 0.5):
        ours = [torch.randn(s, dtype=dtype) for s in shapes]
        theirs = [g.clone() for g in ours]
        norm = fastclip.clip_grad_norm_(parameters(ours), 1.0, norm_type, foreach=foreach)
        torch_norm = torchs.clip_grad_norm_(parameters(theirs), 1.0, norm_type, foreach=foreach)
        rtol = 64 * torch.finfo(dtype).eps
        torch.testing.assert_close(norm, torch_norm, rtol=rtol, atol=0)
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=0)


NORM_TYPES = [2, 1, 0.5, 3, math.inf, -math.inf, -1, 0, 0.0, True, "inf", "-inf", "2", " 2 ", np.float32(3)]


@pytest.mark.parametrize(
    "norm_type", [*NORM_TYPES, torch.tensor(2.0), torch.tensor([1.0]), torch.tensor(3)], ids=lambda p: repr(p)
)
def test_norm_type_forms(backend, norm_type):
    grads = [torch.tensor([3.0, 4.0]), torch.tensor([[-2.0]])]
    same_tensor(lambda F: F.get_total_norm(grads, norm_type))
    same_tensor(lambda F: F.clip_grad_norm_(parameters([g.clone() for g in grads]), 1.0, norm_type))


@pytest.mark.parametrize("norm_type", [math.nan, "nan"])
def test_norm_type_nan(backend, norm_type):
    def call(F):
        made = one()
        return F.clip_grad_norm_(made, 1.0, norm_type), made[0].grad

    theirs, ours = same(call)
    for got, want in zip(ours.value, theirs.value, strict=True):
        assert want.isnan().all()
        assert got.isnan().all()


@pytest.mark.parametrize(
    "max_norm",
    ["1.0", "inf", True, 2, np.float64(0.5), np.int64(1), torch.tensor(0.5), torch.tensor([0.5], dtype=torch.float64),
     torch.tensor(0.5, requires_grad=True), 0, 0.0, -1.0, math.inf, -math.inf, math.nan, "nan", 5.0, 4.9999, 5.0001],
    ids=lambda v: repr(v),
)  # fmt: skip
def test_max_norm_forms(backend, max_norm):
    def clipped(F):
        made = parameters([torch.tensor([3.0, 0.0]), torch.tensor([[-4.0]])])
        assert F.clip_grad_norm_(made, max_norm).item() == 5
        return [p.grad for p in made]

    def scaled(F):
        made = parameters([torch.tensor([3.0, 0.0]), torch.tensor([[-4.0]])])
        F.clip_grads_with_norm_(made, max_norm, torch.tensor(5.0))
        return [p.grad for p in made]

    for call in (clipped, scaled):
        theirs, ours = same(call)
        torch.testing.assert_close(ours.value, theirs.value, rtol=4e-7, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "clip_value",
    ["2", " 0.5", "inf", True, 2, np.float32(0.1), np.int64(1), torch.tensor(0.5), torch.tensor([1.5]),
     torch.tensor(0.5, requires_grad=True), 0, -1, "-1", math.inf, -math.inf, math.nan],
    ids=lambda v: repr(v),
)  # fmt: skip
@pytest.mark.parametrize("foreach", [None, True, False])
def test_clip_value_forms(backend, clip_value, foreach):
    def call(F):
        made = parameters([torch.tensor([-3.0, math.nan, math.inf, -math.inf, 1.0, -0.0, 0.3])])
        assert F.clip_grad_value_(made, clip_value, foreach) is None
        return made[0].grad

    theirs, ours = same(call)
    reference.assert_bits([ours.value], [theirs.value])


def test_foreach_changes_no_bit(backend):
    """As in torch, where the foreach kernels of the CPU are loops."""
    results = []
    for foreach in (None, True, False):
        torch.manual_seed(3)
        grads = [torch.randn(300), torch.randn(7, dtype=torch.float64), torch.randn(40, 50).t()]
        norm = fastclip.clip_grad_norm_(parameters(grads), 1.0, foreach=foreach)
        fastclip.clip_grads_with_norm_(parameters(grads), 0.5, norm, foreach)
        fastclip.clip_grad_value_(parameters(grads), 1e-3, foreach)
        results.append([norm, fastclip.get_total_norm(grads, foreach=foreach), *grads])
    for other in results[1:]:
        reference.assert_bits(other, results[0])


def test_negative_max_norm_by_hand(backend):
    made = one()
    fastclip.clip_grad_norm_(made, -1.0)
    torch.testing.assert_close(made[0].grad, torch.tensor([-0.6, -0.8]))


SPECIAL = {
    "nan": ([math.nan, 1.0], [2.0]),
    "inf": ([math.inf, 1.0], [2.0, -0.0]),
    "minus inf": ([-math.inf, 1.0], [0.0]),
    "inf and nan": ([math.inf, 1.0], [math.nan]),
    "all inf": ([math.inf, math.inf], [-math.inf]),
}


@pytest.mark.parametrize("norm_type", [2.0, 1.0, 3.0, 0.5, math.inf, -math.inf, 0.0, -1.0, -2.0])
@pytest.mark.parametrize("dtype", reference.FLOATS)
def test_nonfinite_gradients(backend, dtype, norm_type):
    """NaN and inf fall out of torch's arithmetic: which entries are NaN, 0, finite or infinite is the same.

    Low dtypes against torch in float32: in fp16, 1 / (0 + 1e-6) is inf, which is the rounding that we leave out.
    A bound of inf leaves ours as they were, where torch has NaN from 0 * inf.
    """
    for name, values in SPECIAL.items():
        for max_norm in (1.0, 0.0, -1.0, math.inf, math.nan):

            def call(F):
                wide = torch.float32 if dtype in reference.LOW and F is torchs else dtype
                made = parameters([torch.tensor(v, dtype=wide) for v in values])  # noqa: B023
                return F.clip_grad_norm_(made, max_norm, norm_type), *(p.grad for p in made)  # noqa: B023

            with reference.during(name, max_norm):
                theirs, ours = same(call)
                want_all = theirs.value
                if max_norm == math.inf:
                    want_all = (want_all[0], *(torch.tensor(v, dtype=dtype) for v in values))
                for got, want in zip(ours.value, want_all, strict=True):
                    rtol = 8 * torch.finfo(dtype).eps
                    torch.testing.assert_close(got, want.to(dtype), rtol=rtol, atol=0, equal_nan=True)


@pytest.mark.parametrize("total_norm", [math.nan, math.inf, 0.0, -1e-6, 1e-30])
@pytest.mark.parametrize("max_norm", [1.0, 0.0, math.inf, -math.inf, math.nan, -2.0])
def test_nonfinite_total_norm(backend, total_norm, max_norm):
    def call(F):
        made = parameters([torch.tensor([3.0, -0.0, math.inf, math.nan], dtype=torch.float64)])
        F.clip_grads_with_norm_(made, max_norm, torch.tensor(total_norm, dtype=torch.float64))
        return made[0].grad

    theirs, ours = same(call)
    want = theirs.value
    if max_norm == math.inf:  # torch has NaN from a norm that is not finite
        want = torch.tensor([3.0, -0.0, math.inf, math.nan], dtype=torch.float64)
    torch.testing.assert_close(ours.value, want, rtol=1e-12, atol=0, equal_nan=True)


def test_gradients_of_two_calls_are_bitwise_torchs(backend):
    """The coefficient 0.5 and the norm 4 are exact in every dtype, so torch and fastclip agree bit by bit."""
    for dtype in reference.FLOATS:
        ours, theirs = (parameters([torch.tensor([2.0, -2.0, 2.0, -2.0], dtype=dtype)]) for _ in range(2))
        for F, made in ((fastclip, ours), (torchs, theirs)):
            F.clip_grads_with_norm_(made, 0.5, torch.tensor(1.0 - 1e-6, dtype=torch.float64))
        reference.assert_bits([ours[0].grad], [theirs[0].grad])


# Nothing to do, and the forms a list can take


EMPTY = {"list": list, "tuple": tuple, "set": set, "iter": lambda: iter([]), "map": lambda: map(id, []), "dict": dict}


@pytest.mark.parametrize("empty", EMPTY.values(), ids=EMPTY)
def test_no_parameters(backend, empty):
    zero = same_tensor(lambda F: F.clip_grad_norm_(empty(), 1.0))
    assert zero.item() == 0
    same_tensor(lambda F: F.get_total_norm(empty()))
    same_tensor(lambda F: F.clip_grad_norm_(empty(), 1.0, error_if_nonfinite=True))
    same(lambda F: F.clip_grads_with_norm_(empty(), 1.0, torch.tensor(1.0)))


def test_no_gradients(backend):
    bare = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
    same_tensor(lambda F: F.clip_grad_norm_(bare, 1.0))
    same_tensor(lambda F: F.clip_grad_norm_(bare, 1.0, error_if_nonfinite=True))
    same(lambda F: F.clip_grads_with_norm_(bare, 1.0, None))
    some = [bare[0], *one(), bare[1]]
    assert same_tensor(lambda F: F.clip_grad_norm_(some, 100.0)).item() == 5


def test_zero_has_the_default_dtype_and_device(backend):
    torch.set_default_dtype(torch.float64)
    try:
        assert same_tensor(lambda F: F.clip_grad_norm_([], 1.0)).dtype == torch.float64
        assert same_tensor(lambda F: F.get_total_norm([])).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        assert same_tensor(lambda F: F.clip_grad_norm_([], 1.0)).is_meta
        assert same_tensor(lambda F: F.get_total_norm([])).is_meta


def test_arguments_are_read_even_without_gradients(backend):
    for call in (
        lambda F: F.clip_grad_norm_([], None),
        lambda F: F.clip_grad_norm_([], "x"),
        lambda F: F.clip_grad_norm_([], 1.0, "fro"),
        lambda F: F.get_total_norm([], "fro"),
        lambda F: F.get_total_norm([], None),
        lambda F: F.clip_grads_with_norm_([], None, torch.tensor(1.0)),
    ):
        assert same(call)[1].error is not None


def test_forms_of_parameters(backend):
    layer = torch.nn.Linear(3, 2)
    layer(torch.ones(1, 3)).sum().backward()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for form in (
        lambda: layer.parameters(),
        lambda: list(layer.parameters()),
        lambda: tuple(layer.parameters()),
        lambda: set(layer.parameters()),
        lambda: optimizer.param_groups[0]["params"],
        lambda: dict(layer.named_parameters()).values(),
        lambda: (p for p in layer.parameters()),
        lambda: iter(list(layer.parameters())),
        lambda: layer.weight,
    ):
        same_tensor(lambda F: F.clip_grad_norm_(form(), 1e9))  # noqa: B023
        for F in (torchs, fastclip):
            F.clip_grads_with_norm_(form(), 1e9, torch.tensor(1.0))
            F.clip_grad_value_(form(), 1e9)


def test_generator_is_really_used(backend):
    """A generator can be walked once; norm and scaling both need it."""
    for call in (
        lambda made: fastclip.clip_grad_norm_((p for p in made), 1.0),
        lambda made: fastclip.clip_grads_with_norm_((p for p in made), 1.0, torch.tensor(5.0)),
        lambda made: fastclip.clip_grad_value_((p for p in made), 0.6),
    ):
        made = one()
        call(made)
        assert made[0].grad.abs().max() < 1
    assert fastclip.get_total_norm(g for g in [torch.ones(4)]).item() == 2


def test_single_tensor(backend):
    """A 2-D tensor is one tensor, not its rows; order 0 counts it once."""
    matrix = torch.arange(6.0).view(2, 3)
    for norm_type in (2.0, 0.0):
        same_tensor(lambda F: F.get_total_norm(matrix, norm_type))  # noqa: B023
    for F in (torchs, fastclip):
        (parameter,) = one()
        assert F.clip_grad_norm_(parameter, 1.0).item() == 5
        torch.testing.assert_close(parameter.grad, torch.tensor([0.6, 0.8]))
        F.clip_grad_value_(parameter, 0.7)
        F.clip_grads_with_norm_(parameter, 1.0, torch.tensor(2.0))
        torch.testing.assert_close(parameter.grad, torch.tensor([0.3, 0.35]))


def test_same_parameter_twice(backend):
    def call(F):
        made = one()
        return F.clip_grad_norm_([*made, *made], 1.0), made[0].grad

    theirs, ours = same(call)
    assert ours.value[0].item() == pytest.approx(math.sqrt(50))
    torch.testing.assert_close(ours.value, theirs.value)
    torch.testing.assert_close(ours.value[1], torch.tensor([3.0, 4.0]) / 50)


@pytest.mark.parametrize("dtype", reference.FLOATS)
def test_overlapping_views(backend, dtype):
    """Counted and scaled twice, one after the other: by exact powers of two, so bit by bit as torch."""

    def call(F):
        base = torch.arange(1.0, 13.0).to(dtype)
        F.clip_grads_with_norm_(
            parameters([base[:8], base[4:], base.view(3, 4).t()[1:3]]), 0.5, torch.tensor(1 - 1e-6, dtype=torch.float64)
        )
        return base

    theirs, ours = same(call)
    reference.assert_bits([ours.value], [theirs.value])


def test_view_that_overlaps_itself(fence):
    """Strides that visit an element twice, none of them 0: torch does not refuse it, and neither do we."""
    for clip in (lambda F, made: F.clip_grad_norm_(made, 1.0), lambda F, made: F.clip_grad_value_(made, 7.0)):
        ours, theirs = (torch.arange(1.0, 21.0).as_strided((3, 3), (1, 1), 5) for _ in range(2))
        beside = fence([ours])
        clip(torchs, parameters([theirs]))
        clip(fastclip, parameters([ours]))
        assert beside.outside_unchanged()
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    same_tensor(lambda F: F.get_total_norm([ours]))


# Warnings


def test_empty_generator_warns_at_the_callers_line(backend):
    """Only clip_grad_norm_, only for a generator, and the line is the line of the call."""
    for F in (torchs, fastclip):
        line = sys._getframe().f_lineno + 2
        with pytest.warns(UserWarning, match="empty generator") as caught:
            norm = F.clip_grad_norm_((p for p in []), 1.0)
        assert norm.item() == 0
        assert [(str(w.message), w.filename, w.lineno) for w in caught] == [
            ("`parameters` is an empty generator, no gradient clipping will occur.", __file__, line)
        ]
    for call in (
        lambda F: F.clip_grad_norm_((p for p in ()), 1.0),
        lambda F: F.clip_grad_norm_(torch.nn.ReLU().parameters(), 1.0),
        lambda F: F.clip_grad_norm_(iter([]), 1.0),
        lambda F: F.clip_grad_norm_([], 1.0),
        lambda F: F.clip_grad_norm_((p for p in [torch.nn.Parameter(torch.ones(1))]), 1.0),
        lambda F: F.get_total_norm(g for g in ()),
        lambda F: F.clip_grads_with_norm_((p for p in ()), 1.0, torch.tensor(1.0)),
    ):
        same(call)


def test_empty_generator_warns_before_a_bad_argument(backend):
    _, ours = same(lambda F: F.clip_grad_norm_((p for p in ()), None))
    assert len(ours.warned) == 1


# error_if_nonfinite


@pytest.mark.parametrize("norm_type", [2.0, 1, "inf", -math.inf, True, 3, torch.tensor(2.0)], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_error_if_nonfinite(backend, bad, norm_type, fence):
    """torch's text word by word, and nothing was written: neither data nor version."""
    finite = bad if norm_type == -math.inf else 3.0  # or the smallest magnitude would be 3
    grads = [torch.tensor([finite, bad]), torch.full((2,), bad)]
    before, versions = fence(grads), [g._version for g in grads]
    for call in (
        lambda F: F.clip_grad_norm_(parameters(grads), 1.0, norm_type, error_if_nonfinite=True),
        lambda F: F.get_total_norm(grads, norm_type, error_if_nonfinite=True),
        lambda F: F.clip_grad_norm_(parameters(grads), None, norm_type, error_if_nonfinite=True),
    ):
        theirs, ours = same(call)
        assert isinstance(ours.error, RuntimeError)
        assert str(ours.error) == str(theirs.error)
    assert before.unchanged()
    assert [g._version for g in grads] == versions


def test_error_if_nonfinite_on_finite_gradients(backend):
    same_tensor(lambda F: F.clip_grad_norm_(one(), 1.0, error_if_nonfinite=True))
    grads = [torch.tensor([math.nan, 1.0])]
    same_tensor(lambda F: F.get_total_norm(grads, 0, True))  # order 0 of a NaN is a count


# Layouts, devices, subclasses, modes


def test_meta_gradients():
    def call(F):
        made = parameters([torch.empty(3, 4, device="meta"), torch.empty(2, device="meta", dtype=torch.bfloat16)])
        F.clip_grad_value_(made, 1.0)
        F.clip_grads_with_norm_(made, 1.0, torch.empty((), device="meta"))
        return F.clip_grad_norm_(made, 1.0)

    assert same_tensor(call).is_meta
    same_tensor(lambda F: F.get_total_norm([torch.empty(3, device="meta", dtype=torch.float16)], math.inf))
    same(lambda F: F.clip_grad_norm_(parameters([torch.empty(3, device="meta")]), 1.0, error_if_nonfinite=True))


@pytest.mark.parametrize("name", NAMES)
def test_foreach_true_on_meta(name):
    made = parameters([torch.empty(3, device="meta")])
    rest = {"clip_grad_norm_": (1.0,), "clip_grad_value_": (1.0,), "clip_grads_with_norm_": (1.0, torch.tensor(1.0))}
    theirs, ours = same(lambda F: getattr(F, name)(made, *rest.get(name, ()), foreach=True))
    assert str(ours.error) == str(theirs.error)
    assert "foreach=True was passed, but can't use the foreach API on meta tensors" in str(ours.error)


def test_fake_tensors():
    with FakeTensorMode():
        made = parameters([torch.randn(3), torch.randn(4, 2).bfloat16()])
        for foreach in (None, True):
            norm = same_tensor_fake(lambda F: F.clip_grad_norm_(made, 1.0, foreach=foreach))  # noqa: B023
            assert norm.shape == ()
        same(lambda F: F.clip_grad_value_(made, 1.0))
        same(lambda F: F.clip_grads_with_norm_(made, 1.0, torch.tensor(5.0)))
        _, ours = same(lambda F: F.clip_grad_norm_(made, 1.0, error_if_nonfinite=True))
        assert type(ours.error).__name__ == "DataDependentOutputException"


def same_tensor_fake(call) -> torch.Tensor:
    theirs, ours = (o.value for o in same(call))
    assert (type(ours), ours.dtype, ours.device, ours.shape) == (
        type(theirs),
        theirs.dtype,
        theirs.device,
        theirs.shape,
    )
    return ours


class Plain(torch.Tensor):
    """A subclass that overrides nothing."""


class Recorder(torch.Tensor):
    """A subclass that sees every function."""

    seen: tuple[str, ...] = ()

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        Recorder.seen += (getattr(function, "__name__", ""),)
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.parametrize("cls", [Plain, Recorder])
def test_subclasses_keep_their_type(cls):
    """Subclasses go to torch's own functions: same type and bits, and their overrides are called."""

    def call(F):
        Recorder.seen = ()
        grads = [torch.tensor([3.0, 0.3]).as_subclass(cls), torch.tensor([4.0, 0.7])]
        made = parameters(grads)
        norm = F.clip_grad_norm_(made, 1.0)
        F.clip_grad_value_(made, 0.7)
        F.clip_grads_with_norm_(made, 0.1, F.get_total_norm(grads))
        return norm, grads[0], grads[1], Recorder.seen

    theirs, ours = same(call)
    assert [type(v) for v in ours.value] == [type(v) for v in theirs.value]
    reference.assert_bits(
        [v.as_subclass(torch.Tensor) for v in ours.value[:3]], [v.as_subclass(torch.Tensor) for v in theirs.value[:3]]
    )
    assert any("norm" in name for name in ours.value[3]) == (cls is Recorder)


def test_dispatch_subclass():
    """A wrapper with `__torch_dispatch__` has no storage to read; it has to see torch's own ops."""
    tensors = pytest.importorskip("torch.testing._internal.two_tensor")

    def call(F):
        grad = tensors.TwoTensor(torch.tensor([3.0, 4.0]), torch.tensor([30.0, 40.0]))
        made = parameters([grad])
        norm = F.clip_grad_norm_(made, 1.0)
        return type(norm), norm.a, norm.b, grad.a, grad.b

    theirs, ours = same(call)
    assert ours.value[0] is theirs.value[0] is tensors.TwoTensor
    reference.assert_bits(ours.value[1:], theirs.value[1:])


def test_dtensor_stays_a_dtensor():
    """On a mesh of one rank: DTensor in, DTensor out, torch's numbers."""
    dist = pytest.importorskip("torch.distributed")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))

        def call(F):
            made = parameters([distribute_tensor(torch.tensor([3.0, 4.0]), mesh, [Shard(0)])])
            norm = F.clip_grad_norm_(made, 1.0)
            F.clip_grad_value_(made, 0.7)
            return type(norm), norm.placements, norm.full_tensor(), made[0].grad.full_tensor()

        theirs, ours = same(call)
        assert ours.value[0] is DTensor
        assert ours.value[:2] == theirs.value[:2]
        reference.assert_bits(ours.value[2:], theirs.value[2:])
    finally:
        dist.destroy_process_group()


def test_parameters_as_tensors(backend):
    """`get_total_norm(model.parameters())`: a plain tensor that needs no gradient."""
    layer = torch.nn.Linear(3, 2)
    norm = same_tensor(lambda F: F.get_total_norm(layer.parameters()))
    assert not norm.requires_grad


def test_default_device_does_not_leak(backend):
    """A default device of meta has no say where there are gradients."""
    made = one()
    with torch.device("meta"):
        assert same_tensor(lambda F: F.clip_grad_norm_(made, 10.0)).item() == 5
        for F in (torchs, fastclip):
            F.clip_grad_value_(made, 10.0)
            F.clip_grads_with_norm_(made, 10.0, torch.tensor(5.0, device="cpu"))


def test_default_dtype_does_not_leak(backend):
    torch.set_default_dtype(torch.float64)
    try:
        for dtype in reference.FLOATS:
            made = parameters([torch.tensor([3.0, 4.0], dtype=dtype)])
            assert fastclip.clip_grad_norm_(made, 1.0).dtype == dtype
            assert made[0].grad.dtype == dtype
    finally:
        torch.set_default_dtype(torch.float32)


def test_autocast_has_no_effect(backend):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same_tensor(lambda F: F.clip_grad_norm_(one(), 1.0)).dtype == torch.float32


def test_torch_deterministic_mode(backend):
    """`use_deterministic_algorithms` finds nothing to complain about."""
    torch.use_deterministic_algorithms(True)
    try:
        same_tensor(lambda F: F.clip_grad_norm_(one(), 1.0))
    finally:
        torch.use_deterministic_algorithms(False)


LAZY = {"conj": lambda: torch.tensor([3 + 4j, 1j]).conj(), "neg": lambda: torch.tensor([3 + 4j, 1 - 2j]).conj().imag}


@pytest.mark.parametrize("clip", ["norm", "with norm", "value", "negative value"])
@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("lazy", LAZY.values(), ids=LAZY)
def test_conj_and_neg_bits(lazy, foreach, clip):
    """With foreach torch refuses to write them, without it works: the same error or the right values, nothing else."""
    same_tensor(lambda F: F.get_total_norm([lazy()], foreach=foreach))

    def call(F, foreach):
        grad = lazy()
        made = parameters([grad])
        if clip == "norm":
            F.clip_grad_norm_(made, 1.0, foreach=foreach)
        elif clip == "with norm":
            F.clip_grads_with_norm_(made, 1.0, torch.tensor(5.0), foreach)
        else:
            F.clip_grad_value_(made, 0.5 if clip == "value" else -0.5, foreach)
        return grad.resolve_conj().resolve_neg()

    ours = outcome(lambda F: call(F, foreach), fastclip)
    if ours.error is None:
        torch.testing.assert_close(ours.value, call(torchs, False))
    else:
        errors = [outcome(lambda F: call(F, how), torchs).error for how in (foreach, False)]  # noqa: B023
        assert type(ours.error) in map(type, errors)
