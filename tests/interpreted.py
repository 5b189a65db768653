"""What test_triton.py runs in processes of their own, under TRITON_INTERPRET=1: the kernels on CPU tensors.

It proves values, offsets, masks and the table. It proves nothing about the compiler, about speed, or about memory order
between programs, which run one after the other here.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

import fastclip
import reference
from cases import CASES, parameters, random
from fastclip.backends import eager, triton_, triton_kernels
from fastclip.gradients import of as gradients_of
from test_norms import check_high_orders
from test_ops import gradients, step


def check_compiled(compiler: str) -> None:
    """One graph over every public function, with the bits of the same calls untraced."""
    ours, theirs = gradients(), gradients()
    results = torch.compile(step, backend=compiler, fullgraph=True)(parameters(ours), torch.tensor(2.0))
    torch.testing.assert_close(results, step(parameters(theirs), torch.tensor(2.0)), rtol=1e-6, atol=0)
    reference.assert_bits(ours, theirs)


OTHER_ORDERS = [p for p in reference.NORM_TYPES if triton_.norm_kind(p) == 5]


def prepare(lanes: int = 2048) -> None:
    """Make the interpreter fast enough for the whole grid: wide blocks, and no work that repeats itself.

    Every call of a device function patches triton.language anew, which takes longer than the function: here each
    module is patched once. Integers are checked for overflow in `grids` alone.
    """
    np.seterr(all="ignore")  # log2(0), and what follows from inf and NaN
    triton_.LANES = lanes
    patch, patched = interpreter._patch_lang, set()

    def patch_once(function):
        modules = {id(value) for value in function.__globals__.values()} & {id(interpreter.tl), id(interpreter.tl.core)}
        if not modules <= patched:
            patched.update(modules)
            patch(function)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch_once
    check_overflow(False)


def check_overflow(on: bool) -> None:
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=on)


def taken(dtype: torch.dtype, *, readonly: bool = True):
    """The cases of a dtype that the backend takes whole."""
    for case in CASES:
        if dtype in case.dtypes and (readonly or not case.readonly):
            # Every tensor takes the interpreter 10 ms or more, and a table has no size at which it changes.
            tensors = case.make(dtype)[:40]
            if not any(triton_.refuses(t) for t in tensors):
                yield case, tensors


def norms(dtype: torch.dtype) -> int:
    """Every case against the oracle: 2, 1, inf, -inf, 0, and one of the other orders, in turn."""
    prepare()
    done, others = 0, itertools.cycle(OTHER_ORDERS)
    for case, tensors in taken(dtype):
        for norm_type in (2.0, 1.0, math.inf, -math.inf, 0.0, next(others)):
            expected = reference.total_norm(tensors, norm_type)
            with fastclip.use_backend("triton"), reference_of(case, dtype, norm_type):
                wide = fastclip.get_total_norm(tensors, norm_type, norm_dtype=torch.float64)
                reference.assert_norm(wide, expected, torch.float64)
            done += 1
    return done


def clips(dtype: torch.dtype) -> int:
    """The fused clip of every case, bit by bit, which the wide norm defines."""
    prepare()
    done = 0
    for i, (case, grads) in enumerate(taken(dtype, readonly=False)):
        norm_type = (2.0, math.inf, 3.0)[i % 3]
        norm = reference.total_norm(grads, norm_type)
        max_norm = norm / 3 if 0 < norm < math.inf else 0.5
        twins = case.make(dtype)[: len(grads)]
        with fastclip.use_backend("triton"), reference_of(case, dtype, norm_type):
            wide = fastclip.clip_grad_norm_(parameters(grads), max_norm, norm_type, norm_dtype=torch.float64)
            reference.assert_norm(wide, norm, torch.float64)
            reference.scale_rounded_(twins, reference.clip_coef(wide.item(), max_norm))
            reference.assert_bits(grads, twins)
        done += 1
    return done


def rounding() -> int:
    """The fused clip returns the wide norm rounded once, in the dtype that torch promises or that was asked for."""
    prepare()
    generator = torch.Generator().manual_seed(7)
    done = 0
    for dtype, norm_dtype in itertools.product(reference.FLOATS, (None, *reference.FLOATS)):
        grads = [random(generator, dtype, 9), random(generator, dtype, 4)]
        wide = reference.total_norm(grads)
        with fastclip.use_backend("triton"):
            norm = fastclip.clip_grad_norm_(parameters(grads), 1e9, norm_dtype=norm_dtype)
        assert norm.dtype == (norm_dtype or dtype)
        if norm.dtype != torch.float64:
            assert norm.item() == float(np.float64(wide)) or norm == torch.tensor(wide, dtype=torch.float64).to(
                norm.dtype
            )
        done += 1
    return done


def high_orders() -> int:
    """Powers that leave float64: the norm alone, and the one of the fused clip."""
    prepare()
    check_high_orders(dense(triton_.total_norm))
    clip = torch.ops.fastclip_triton.clip_grad_norm_
    check_high_orders(
        dense(lambda tensors, p: clip([t.clone() for t in tensors], 1.0, p, dtype=torch.float64)), (torch.float32,)
    )
    for norm_type in reference.NORM_TYPES:
        expected = reference.total_norm([torch.arange(9.0), torch.ones(3).half()], norm_type)
        norm = triton_.total_norm([torch.arange(9.0), torch.ones(3).half()], norm_type)
        reference.assert_norm(norm, expected, torch.float64)
    return len(reference.NORM_TYPES)


def dense(total_norm):
    return lambda tensors, norm_type: total_norm([t.contiguous() for t in tensors], norm_type)


def coefficients() -> int:
    """Those that float32 has no normal number for: products in float64, rounded once."""
    prepare()
    done, generator = 0, torch.Generator().manual_seed(7)
    for coef, dtype in itertools.product((1e-40, -1e-44, 1e-300, 2.0**-126, 0.0), reference.FLOATS):
        grads = [random(generator, dtype, n, offset=k) for n, k in ((1, 0), (5, 1), (9_000, 3), (4_096, 0))]
        grads = [g.mul_(min(1e37, torch.finfo(dtype).max / 8)) for g in grads]
        grads.append(torch.tensor([math.inf, math.nan, -0.0], dtype=dtype))
        twins = [g.clone() for g in grads]
        torch.ops.fastclip_triton.scale_(grads, torch.tensor(coef, dtype=torch.float64))
        reference.scale_rounded_(twins, coef)
        reference.assert_bits(grads, twins)
        done += 1
    return done


def values(dtype: torch.dtype) -> int:
    prepare()
    done, clip_values = 0, itertools.cycle((0.5, 1e-3, 0.3, -0.5, math.inf, math.nan))
    for case, grads in taken(dtype, readonly=False):
        clip_value = next(clip_values)
        expected = reference.clip_by_value(grads, clip_value)
        with fastclip.use_backend("triton"), reference_of(case, dtype, clip_value):
            fastclip.clip_grad_value_(parameters(grads), clip_value)
            reference.assert_bits(grads, expected)
        done += 1
    return done


def grids() -> int:
    """The same bits for any number of programs, with chunks so small that boundaries fall everywhere."""
    prepare(lanes=4)
    check_overflow(True)
    triton_.CHUNK = 128
    done = 0
    for dtype in reference.FLOATS:
        results = []
        for programs in (1, 3, 64):
            triton_._programs = lambda device, chunks, programs=programs: min(chunks, programs)
            generator = torch.Generator().manual_seed(3)
            grads = [random(generator, dtype, n, offset=k) for n, k in ((1, 0), (127, 1), (257, 3))]
            grads.append(random(generator, torch.float32, 140, offset=1))
            expected = {p: reference.total_norm(grads, p) for p in (2.0, 1.0, math.inf, -math.inf, 0.0, 3.0)}
            with fastclip.use_backend("triton"):
                norms = {p: fastclip.get_total_norm(grads, p, norm_dtype=torch.float64) for p in expected}
                for p, norm in norms.items():
                    reference.assert_norm(norm, expected[p], torch.float64)
                fastclip.clip_grad_norm_(parameters(grads), 1.0)
                fastclip.clip_grad_value_(parameters(grads), 0.05)
            results.append([*norms.values(), *grads])
            done += 1
        for other in results[1:]:
            reference.assert_bits(other, results[0])
    return done


def ops() -> int:
    """What PyTorch sees: opcheck, versions, one graph; and what is refused, with nothing written."""
    prepare()
    tensors = [torch.randn(5), torch.randn(4, 3).t(), torch.randn(7, dtype=torch.bfloat16)]
    half = torch.tensor(0.5, dtype=torch.float64)
    thirds = torch.tensor([0.5, 1.0, 0.25], dtype=torch.float64)
    arguments = {"norm_partial": (2.0,), "scale_": (half,), "clamp_": (-0.1, 0.1), "clip_grad_norm_": (0.1, 2.0)}
    arguments |= {"tensor_norms": (2.0,), "tensor_stats": (), "scale_each_": (thirds,)}
    done = 0
    for name, rest in arguments.items():
        checked = torch.library.opcheck(getattr(torch.ops.fastclip_triton, name).default, (tensors, *rest))
        assert set(checked.values()) == {"SUCCESS"}, checked
        done += 1
    with fastclip.use_backend("triton"):
        check_compiled("aot_eager")
        versions = [t._version for t in tensors]
        fastclip.clip_grad_norm_(parameters(tensors), 1e9)
        assert [t._version for t in tensors] == [v + 1 for v in versions]
        strided = torch.ones(8)[::2]
        for call in (fastclip.clip_grad_norm_, fastclip.clip_grad_value_):
            with pytest.raises(ValueError, match="strides that leave holes"):
                call(parameters([tensors[0], strided]), 0.1)
        with pytest.raises(RuntimeError, match=r"tensors\[1\] cannot be taken by Triton: strides"):
            torch.ops.fastclip_triton.scale_([tensors[0], strided], half)
        with pytest.raises(RuntimeError, match="clip_value"):
            fastclip.clip_grad_value_(parameters([tensors[0], torch.ones(2).half()]), 1e6)
        assert torch.equal(strided, torch.ones(4))
        assert [t._version for t in tensors] == [v + 1 for v in versions]
        assert fastclip.why(parameters(tensors))[0].backend == "triton"
    return done


def each() -> int:
    """A norm and a coefficient for each tensor: over dtypes, empty ones, several chunks, duplicates and overlaps."""
    prepare()
    generator, done = torch.Generator().manual_seed(3), 0

    def make():
        generator.manual_seed(3)
        base = random(generator, torch.float32, 300)
        tensors = [random(generator, dtype, n) for n in (1, 37, triton_.CHUNK + 5) for dtype in reference.FLOATS]
        return [*tensors, torch.zeros(0), base[:200], base[150:], torch.zeros(3), base[:200], torch.empty(0)]

    tensors = make()
    for norm_type in (2.0, 1.0, math.inf, -math.inf, 0.0, 3.0, 30.0, -1.0):
        with fastclip.use_backend("triton"):
            norms = gradients_of(tensors, gradients=False, writes=False).norms(norm_type)
        for tensor, norm in zip(tensors, norms, strict=True):
            with reference.during(norm_type, tensor.dtype, len(tensor)):
                reference.assert_norm(norm, reference.total_norm([tensor], norm_type), torch.float64)
            done += 1
    tensors[4][3], tensors[5][7], tensors[6][:9] = math.nan, -math.inf, 0.0
    with fastclip.use_backend("triton"):
        found = gradients_of(tensors, gradients=False, writes=False).stats()[0]
    torch.testing.assert_close(found, eager.tensor_stats(tensors), rtol=1e-12, atol=0, equal_nan=True)
    tensors = make()
    coefs = torch.linspace(0.25, 1, len(tensors), dtype=torch.float64)
    coefs[1], coefs[2] = 1.0, 1e-40
    expected = make()
    for tensor, coef in zip(expected, coefs, strict=True):
        reference.scale_rounded_([tensor], coef.item())
    with fastclip.use_backend("triton"):
        gradients_of(tensors, gradients=False).scale_each_(coefs)
    reference.assert_bits(tensors, expected)
    return done


def launches() -> int:
    """The kernels of a call, and no op of torch's beside them that would be one more."""
    prepare()
    ran: list[str] = []
    launch = interpreter.GridExecutor.__call__

    def counted(self, *args, **kwargs):
        ran.append(self.fn.__name__.removesuffix("_kernel"))
        return launch(self, *args, **kwargs)

    interpreter.GridExecutor.__call__ = counted
    norm = ["norm_partial", "norm_finalize"]
    grads = [torch.linspace(-1, 1, 9), torch.ones(70_000)]
    found_inf, inv_scale = torch.tensor(7.0), torch.tensor(0.25, dtype=torch.float64)
    clip = fastclip.clip_grad_norm_
    params = parameters(grads)
    total = torch.tensor(3.0, dtype=torch.bfloat16)
    repeated = [grads[1], grads[0], grads[1], grads[1][5:]]
    calls = {
        "clip": (lambda: clip(params, 1.0), [*norm, "scale"]),
        "zero": (lambda: clip(params, 1.0, nonfinite="zero"), [*norm, "scale"]),
        "found": (lambda: clip(params, 1.0, found_inf=found_inf), [*norm, "scale"]),
        "scaled": (lambda: clip(params, 1.0, inv_scale=inv_scale, found_inf=found_inf), [*norm, "scale"]),
        "sanitize": (lambda: clip(params, 1.0, nonfinite="sanitize"), ["sanitize", *norm, "scale"]),
        "norm": (lambda: fastclip.get_total_norm(grads), norm),
        "with": (lambda: fastclip.clip_grads_with_norm_(params, 1.0, total), ["coef", "scale"]),
        "value": (lambda: fastclip.clip_grad_value_(params, 0.1), ["clamp"]),
        "repeated": (lambda: fastclip.clip_grad_norm_(parameters(repeated), 1.0), [*norm, *["scale"] * 3]),
        "repeated value": (lambda: fastclip.clip_grad_value_(parameters(repeated), 0.1), ["clamp"] * 3),
    }
    for name, (call, expected) in calls.items():
        ran.clear()
        with fastclip.use_backend("triton"):
            call()
        assert ran == expected, (name, ran)
        if expected[-1] == "scale" and name != "with":  # what is watched goes through ops there
            with fastclip.use_backend("triton"), torch.autograd.profiler.profile() as profile:
                call()
            names = {event.name for event in profile.function_events if event.name.startswith("aten::")}
            # The interpreter copies what it is given.
            views = {"aten::view", "aten::reshape", "aten::to", "aten::resolve_neg"}
            copies = {"aten::new_empty", "aten::set_", "aten::copy_"}
            assert names <= copies | {"aten::empty", "aten::slice", "aten::as_strided", "aten::detach", *views}, names
    return len(calls)


def zeros() -> int:
    """A chunk of zeros is not summed again; one whose squares leave float32 is, and its norm is right."""
    prepare()
    again: list[bool] = []
    wide = triton_kernels._sum_body_wide
    run = type(wide).__call__

    def counted(self, *args, **kwargs):
        again.append(self is wide)
        return run(self, *args, **kwargs)

    type(wide).__call__ = counted
    done = 0
    tiny = {torch.float32: 2.0**-100, torch.bfloat16: 2.0**-100, torch.float16: 2.0**-24}
    for dtype, value in itertools.product(tiny, (0.0, -0.0, 1.0)):
        if value == 1.0 and dtype == torch.float16:
            continue  # no square of it leaves float32
        again.clear()
        tensor = torch.full((9_000,), value * tiny[dtype] if value == 1.0 else value, dtype=dtype)
        norm = triton_.total_norm([tensor], 2.0)
        assert any(again) == (value == 1.0), (dtype, value)
        reference.assert_norm(norm, reference.total_norm([tensor]), torch.float64)
        done += 1
    return done


class reference_of:
    """Names the case in what is raised."""

    def __init__(self, case, *what):
        self.what = f"{case.name} {what}"

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if error is not None:
            raise AssertionError(f"{self.what}: {error!r}") from error


def policies() -> int:
    """Zeros, sanitized elements, a scale and found_inf, of every dtype."""
    prepare()
    done, generator = 0, torch.Generator().manual_seed(7)
    for bad, dtype, nonfinite in itertools.product((1.0, math.nan), reference.FLOATS, (0, 1, 2)):
        grads = [random(generator, dtype, n, offset=k) for n, k in ((1, 0), (5, 1), (9_000, 3))]
        grads[2][8_999] = bad
        twins, found_inf = [g.clone() for g in grads], torch.tensor(7.0)
        if nonfinite == 2:
            twins = [g.masked_fill(~g.isfinite(), 0.0) for g in grads]
        arguments = 0.5, 2.0, nonfinite, found_inf, torch.tensor(0.25)
        norm = torch.ops.fastclip_triton.clip_grad_norm_(grads, *arguments, dtype=torch.float64).item()
        reference.assert_norm(torch.tensor(norm, dtype=torch.float64), reference.total_norm(twins) * 0.25)
        assert found_inf.item() == (not math.isfinite(norm))
        if nonfinite == 1 and not math.isfinite(norm):
            twins = [torch.zeros_like(g) for g in grads]
        else:
            reference.scale_rounded_(twins, reference.clip_coef(norm, 0.5) * 0.25)
        reference.assert_bits(grads, twins)
        done += 1
    return done
