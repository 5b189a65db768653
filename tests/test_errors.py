"""Bad input: torch's exception type, a message that names argument and value, and not one byte changed."""

from __future__ import annotations

import math
import re

import pytest
import torch
import torch.nn.utils as torchs

import fastclip
import subproc
from cases import parameters
from fastclip import _ops
from test_parity import outcome

NAMES = ("clip_grad_norm_", "clip_grad_value_", "get_total_norm", "clip_grads_with_norm_")


def rejected(call, fence, grads, *, names=(), error=None) -> BaseException:
    """Check that `call` raises as torch does (or `error`), names what was wrong, and changed no data and no version."""
    before, versions = fence(grads), [g._version for g in grads]
    ours = outcome(call, fastclip).error
    assert ours is not None, "no error"
    assert before.unchanged()
    assert [g._version for g in grads if not g.is_inference()] == versions
    if error is None:
        theirs = outcome(call, torchs).error
        assert theirs is not None, "torch takes it"
        error = type(theirs)
    assert type(ours) is error, f"{ours!r} is no {error}"
    for name in names:
        assert name in str(ours), f"{name!r} is not named in {str(ours)!r}"
    return ours


@pytest.fixture
def grads():
    return [torch.tensor([3.0, -4.0]), torch.tensor([[5.0]], dtype=torch.bfloat16)]


BAD_NUMBERS = [None, "x", "", [1.0], (), 1j, object, torch.tensor([1.0, 2.0]), torch.tensor(1j), {}]


@pytest.mark.parametrize("bad", BAD_NUMBERS, ids=repr)
def test_max_norm(backend, grads, bad, fence):
    named = ("max_norm", repr(bad))
    rejected(lambda F: F.clip_grad_norm_(parameters(grads), bad), fence, grads, names=named)
    rejected(lambda F: F.clip_grad_norm_([], bad), fence, grads, names=named)
    rejected(lambda F: F.clip_grads_with_norm_(parameters(grads), bad, torch.tensor(1.0)), fence, grads, names=named)


@pytest.mark.parametrize("bad", BAD_NUMBERS, ids=repr)
def test_clip_value(backend, grads, bad, fence):
    named = ("clip_value", repr(bad))
    rejected(lambda F: F.clip_grad_value_(parameters(grads), bad), fence, grads, names=named)


@pytest.mark.parametrize("bad", [*BAD_NUMBERS, "fro", "nuc", "1,0"], ids=repr)
def test_norm_type(backend, grads, bad, fence):
    named = ("norm_type", repr(bad))
    rejected(lambda F: F.clip_grad_norm_(parameters(grads), 1.0, bad), fence, grads, names=named)
    rejected(lambda F: F.get_total_norm(grads, bad), fence, grads, names=named)
    rejected(lambda F: F.get_total_norm([], bad), fence, grads, names=named)


def test_first_bad_argument_wins(backend, grads, fence):
    """norm_type is read before max_norm, as in torch."""
    rejected(lambda F: F.clip_grad_norm_(parameters(grads), "x", "fro"), fence, grads, names=("norm_type", "fro"))


@pytest.mark.parametrize("bad", [torch.int64, torch.complex64, torch.bool, "float32", 32], ids=repr)
def test_norm_dtype(backend, grads, bad, fence):
    """Only a float dtype can hold a norm."""
    for call in (
        lambda: fastclip.clip_grad_norm_(parameters(grads), 1.0, norm_dtype=bad),
        lambda: fastclip.get_total_norm(grads, norm_dtype=bad),
        lambda: fastclip.get_total_norm([], norm_dtype=bad),
    ):
        before = fence(grads)
        with pytest.raises((TypeError, ValueError), match="norm_dtype") as raised:
            call()
        assert str(bad).removeprefix("torch.") in str(raised.value)
        assert before.unchanged()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("foreach", [None, False])
def test_clip_value_that_does_not_fit(backend, dtype, foreach, fence):
    """A bound above the largest number of a gradient's dtype: torch's error before anything is written."""
    too_large = {torch.float16: 1e6, torch.bfloat16: 1e39, torch.float32: 1e39}[dtype]
    grads = [torch.tensor([1e300, 1.0], dtype=torch.float64), torch.tensor([7.0, 1.0], dtype=dtype)]
    error = rejected(
        lambda F: F.clip_grad_value_(parameters(grads), too_large, foreach),
        fence,
        grads,
        names=("clip_value", f"{too_large}"),
    )
    assert isinstance(error, RuntimeError)
    fastclip.clip_grad_value_(parameters(grads[:1]), too_large)
    assert grads[0].tolist() == [too_large, 1.0]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "bad",
    [
        lambda: torch.nn.Linear(2, 2),
        lambda: [{"params": list(torch.nn.Linear(2, 2).parameters())}],
        lambda: list(torch.nn.Linear(2, 2).named_parameters()),
        lambda: [list(torch.nn.Linear(2, 2).parameters())],
        lambda: None,
        lambda: 3,
        lambda: [None],
        lambda: ["a"],
        lambda: [1.0],
        lambda: "ab",
    ],
    ids=["module", "param groups", "named_parameters", "nested", "None", "int", "Nones", "strings", "floats", "str"],
)  # fmt: skip
def test_what_is_no_list_of_tensors(backend, name, bad, fence):
    rest = {"clip_grad_norm_": (1.0,), "clip_grad_value_": (1.0,), "clip_grads_with_norm_": (1.0, torch.tensor(1.0))}
    rejected(lambda F: getattr(F, name)(bad(), *rest.get(name, ())), fence, [])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("at", [0, 1])
def test_none_among_tensors(backend, name, at, grads, fence):
    """None in place of a parameter, first or later: an error as in torch, and the others stay as they were."""
    made = parameters(grads)
    given = grads if name == "get_total_norm" else made
    rest = {"clip_grad_norm_": (1.0,), "clip_grad_value_": (1.0,), "clip_grads_with_norm_": (1.0, torch.tensor(9.0))}

    def call(F):
        return getattr(F, name)([*given[:at], None, *given[at:]], *rest.get(name, ()))

    theirs = outcome(call, torchs).error
    error = rejected(call, fence, grads, error=type(theirs))
    assert isinstance(error, (AttributeError, RuntimeError))


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int32, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2], ids=str
)
def test_dtypes_without_a_norm(dtype, fence):
    """Integers, booleans, float8: torch's exception type, alone or beside ordinary gradients."""
    odd = torch.tensor([3.0, 1.0]).to(dtype)
    for tensors in ([odd], [torch.tensor([3.0, 4.0]), odd]):
        rejected(lambda F: F.get_total_norm(tensors), fence, tensors)  # noqa: B023
        rejected(lambda F: F.clip_grad_norm_(parameters(tensors), 1.0), fence, tensors)  # noqa: B023


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool], ids=str)
def test_integer_gradients_are_not_written(dtype, fence):
    tensors = [torch.tensor([3.0, 4.0]), torch.tensor([3, 1]).to(dtype)]
    for call in (
        lambda F: F.clip_grad_value_(parameters(tensors), 0.5),
        lambda F: F.clip_grads_with_norm_(parameters(tensors), 1.0, torch.tensor(5.0)),
    ):
        theirs = outcome(lambda F: call_on_clones(F, call, tensors), torchs).error  # noqa: B023
        rejected(call, fence, tensors, error=type(theirs) if theirs else RuntimeError)


def call_on_clones(F, call, tensors):
    saved = [t.clone() for t in tensors]
    try:
        return call(F)
    finally:
        for t, was in zip(tensors, saved, strict=True):
            t.copy_(was)


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch: quantized tensors are deprecated
def test_quantised_gradients(fence):
    odd = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
    for tensors in ([odd], [torch.tensor([3.0, 4.0]), odd]):
        theirs, ours = (outcome(lambda F: F.get_total_norm(tensors), F).error for F in (torchs, fastclip))  # noqa: B023
        assert type(ours) is type(theirs)
    assert odd.dequantize().tolist() == torch.ones(3).tolist()


WRITERS = {
    "norm": lambda F, made: F.clip_grad_norm_(made, 1.0),
    "norm, nothing to clip": lambda F, made: F.clip_grad_norm_(made, 1e9),
    "with norm": lambda F, made: F.clip_grads_with_norm_(made, 1.0, torch.tensor(5.0)),
    "value": lambda F, made: F.clip_grad_value_(made, 0.1),
    "value, nothing to clip": lambda F, made: F.clip_grad_value_(made, 1e9),
}


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("shape", [((1,), (4,)), ((3, 1), (3, 5)), ((1, 3), (2, 3))], ids=str)
@pytest.mark.parametrize("clip", WRITERS.values(), ids=WRITERS)
def test_expanded_gradients(backend, clip, shape, foreach, fence):
    """Stride 0 cannot be written: torch's error, and the ordinary gradient before it keeps its bytes."""
    small, large = shape
    grads = [torch.tensor([3.0, 4.0]), torch.ones(small).expand(large)]
    before, version = fence(grads), grads[0]._version
    with pytest.raises(RuntimeError, match="more than one element of the written-to tensor refers to a single memory"):
        clip(fastclip, parameters(grads))
    assert before.unchanged()
    assert grads[0]._version == version
    with pytest.raises(RuntimeError, match="more than one element of the written-to tensor"):
        clip(torchs, parameters(grads))


@pytest.mark.parametrize("clip", ["value", "value, nothing to clip"])
def test_complex_values_cannot_be_clamped(clip, fence):
    grads = [torch.tensor([3.0, 4.0]), torch.tensor([3 + 4j])]
    before = fence(grads)
    with pytest.raises(NotImplementedError):
        WRITERS[clip](fastclip, parameters(grads))
    assert before.unchanged()


@pytest.mark.parametrize("clip", WRITERS.values(), ids=WRITERS)
def test_lazy_conj_beside_ordinary(clip, fence):
    """If the conj bit makes it raise, the ordinary gradient before it is as it was."""
    grads = [torch.tensor([3.0, 4.0]), torch.tensor([3 + 4j, 1j]).conj().imag]
    before = fence(grads)
    try:
        clip(fastclip, parameters(grads))
    except RuntimeError:
        assert before.unchanged()
    else:
        assert before.outside_unchanged()


@pytest.mark.parametrize("order", [1, -1])
def test_meta_beside_cpu(order, fence):
    """No norm over a device without data; by value torch just does both."""
    grads = [torch.tensor([3.0, 4.0]), torch.empty(2, device="meta")][::order]
    before = fence(grads)
    for call in (
        lambda F: F.clip_grad_norm_(parameters(grads), 1.0),
        lambda F: F.get_total_norm(grads),
    ):
        theirs, ours = outcome(call, torchs), outcome(call, fastclip)
        assert type(ours.error) is type(theirs.error)
        assert before.unchanged()


BAD_NORMS = [5.0, 5, None, "5", [5.0], torch.tensor([5.0]), torch.tensor([[5.0]]), torch.tensor([5.0, 6.0]),
             torch.tensor(5 + 0j), torch.empty(0)]  # fmt: skip


@pytest.mark.parametrize("foreach", [None, True])
@pytest.mark.parametrize("bad", BAD_NORMS, ids=repr)
def test_total_norm(backend, bad, foreach, grads, fence):
    """A number is no tensor; one element is not 0-dim; complex cannot be compared."""
    grads = grads[:1]
    named = () if isinstance(bad, torch.Tensor) else ("total_norm", repr(bad))
    rejected(lambda F: F.clip_grads_with_norm_(parameters(grads), 1.0, bad, foreach), fence, grads, names=named)


def test_total_norm_of_one_element_without_foreach(backend, grads):
    """Shape [1] works where torch broadcasts it."""
    ours, theirs = ([g.clone() for g in grads] for _ in range(2))
    for F, given in ((fastclip, ours), (torchs, theirs)):
        F.clip_grads_with_norm_(parameters(given), 1.0, torch.tensor([5.0]), foreach=False)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("bad", BAD_NORMS, ids=repr)
def test_total_norm_is_not_read_without_gradients(backend, bad):
    assert fastclip.clip_grads_with_norm_([], 1.0, bad) is None
    assert torchs.clip_grads_with_norm_([], 1.0, bad) is None


# Backends


def everything_listed(message: str) -> bool:
    reasons = fastclip.backends()
    return all(name in message for name in reasons) and all(r in message for r in reasons.values() if r)


def test_backends_lists_reasons():
    listed = fastclip.backends()
    assert list(listed) == [n for n in ("cpu", "cuda", "triton", "eager") if n in listed]
    assert "eager" in listed
    assert listed["eager"] is None
    assert all(reason is None or (isinstance(reason, str) and reason) for reason in listed.values())


class CudaLibrary:
    """What _ops asks of libfastclip_cuda.so."""

    def __init__(self, refusal):
        self.registered = []
        self.fastclip_cuda_open_driver = lambda name: refusal
        self.fastclip_cuda_init = lambda *where: self.registered.append(where)
        self.fastclip_cuda_unsupported = lambda device: None


@pytest.mark.parametrize(
    ("cuda", "built", "refusal", "reason"),
    [
        (None, True, None, "this torch was not built for CUDA"),
        ("13.0", False, None, "libfastclip_cuda.so was not built"),
        ("13.0", True, b"no NVIDIA driver (libcuda.so.1)", "no NVIDIA driver"),
        ("12.8", True, None, None),
    ],
)
def test_when_the_cuda_library_is_used(monkeypatch, cuda, built, refusal, reason):
    library = CudaLibrary(refusal)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    absent = None, "libfastclip_cuda.so was not built (no NVRTC, or USE_CUDA=0, at install time)"
    monkeypatch.setattr(_ops, "_load", lambda name, without: (library, None) if built else absent)
    loaded, why = _ops._load_cuda_library()
    if reason is None:
        assert (loaded, why) == (library, None)
        assert library.registered == [(b"fastclip", b"CUDA")]
    else:
        assert loaded is None
        assert reason in why
        assert not library.registered


@pytest.mark.parametrize("devices", [0, 1])
def test_a_driver_without_a_device_is_a_reason(monkeypatch, devices):
    """A container without the device, or CUDA_VISIBLE_DEVICES="": the library is loaded, and has nothing to run on."""
    monkeypatch.setattr(_ops, "cuda_unavailable", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: devices > 0)
    reason = fastclip.backends()["cuda"]
    assert reason is None if devices else "no device" in reason


def test_cpu_is_available(cpu):
    assert fastclip.backends()["cpu"] is None


@pytest.mark.parametrize("name", ["bogus", "", "Native", None, 3])
def test_unknown_backend(name):
    with pytest.raises(ValueError, match=re.escape(repr(name))) as raised, fastclip.use_backend(name):
        pytest.fail("entered")
    assert everything_listed(str(raised.value))


def test_unavailable_backend():
    for name, reason in fastclip.backends().items():
        if reason is not None:
            with pytest.raises(ValueError, match=name) as raised, fastclip.use_backend(name):
                pytest.fail("entered")
            assert everything_listed(str(raised.value))


def test_backend_is_given_back():
    made = parameters([torch.ones(2)])
    usual = fastclip.why(made)[0].backend
    with fastclip.use_backend("eager"):
        assert fastclip.why(made)[0].backend == "eager"
        with fastclip.use_backend(usual):
            assert fastclip.why(made)[0].backend == usual
        assert fastclip.why(made)[0].backend == "eager"
        with pytest.raises(ValueError, match="bogus"), fastclip.use_backend("bogus"):
            pass
        assert fastclip.why(made)[0].backend == "eager"
    assert fastclip.why(made)[0].backend == usual
    with pytest.raises(KeyError), fastclip.use_backend("eager"):
        raise KeyError
    assert fastclip.why(made)[0].backend == usual


def forced_cpu_cases():
    sparse = torch.nn.Parameter(torch.zeros(4, 2))
    sparse.grad = torch.sparse_coo_tensor([[1, 3]], torch.ones(2, 2), (4, 2), check_invariants=True)
    return {
        "complex": parameters([torch.tensor([3 + 4j])]),
        "sparse": [sparse],
        "subclass": parameters([torch.tensor([3.0]).as_subclass(type("Sub", (torch.Tensor,), {}))]),
    }


@pytest.mark.parametrize("kind", ["complex", "sparse", "subclass"])
def test_forced_backend_that_cannot(cpu, kind, fence):
    """Forced is forced: ValueError, and the ordinary gradient in the same list is untouched."""
    (odd,) = forced_cpu_cases()[kind]
    ordinary = torch.tensor([3.0, 4.0])
    made = [*parameters([ordinary]), odd]
    before = fence([ordinary])
    for call in (
        lambda: fastclip.clip_grad_norm_(made, 1.0),
        lambda: fastclip.clip_grad_value_(made, 1.0),
        lambda: fastclip.clip_grads_with_norm_(made, 1.0, torch.tensor(5.0)),
        lambda: fastclip.get_total_norm([p.grad for p in made]),
    ):
        with pytest.raises(ValueError, match="cpu"):
            call()
        assert before.unchanged()


# why


def test_why_names_backend_and_reason():
    odd = forced_cpu_cases()
    made = [*parameters([torch.ones(2), torch.ones(3, dtype=torch.bfloat16)]), odd["complex"][0], odd["sparse"][0]]
    groups = fastclip.why([*made, torch.nn.Parameter(torch.ones(1))])
    assert sum(group.count for group in groups) == 4
    for group in groups:
        assert group._fields == ("backend", "device", "dtypes", "count", "reason")
        assert group.backend in fastclip.backends()
        text = str(group)
        assert "\n" not in text
        assert group.backend in text
        assert group.reason
        assert group.reason in text
    by_dtype = {dtype: group for group in groups for dtype in group.dtypes}
    assert by_dtype["complex64"].backend == "eager"
    if fastclip.backends()["cpu"] is None:
        assert "complex" in by_dtype["complex64"].reason
        assert by_dtype["bfloat16"].backend == "cpu"


def test_why_forms():
    assert fastclip.why([]) == []
    assert fastclip.why([torch.nn.Parameter(torch.ones(1))]) == []
    (parameter,) = parameters([torch.ones(2)])
    assert sum(g.count for g in fastclip.why(parameter)) == 1
    assert sum(g.count for g in fastclip.why(p for p in [parameter])) == 1
    assert math.isfinite(fastclip.get_total_norm([parameter.grad]).item())


def backend_at_import():
    import fastclip

    return fastclip.why(parameters([torch.ones(2)]))[0].backend


def test_backend_variable():
    """FASTCLIP_BACKEND is read at import: a name is used, an unknown one is an error that lists what there is."""
    child = subproc.call("test_errors:backend_at_import", env={"FASTCLIP_BACKEND": "eager"})
    assert child.value == "eager", child
    child = subproc.call("test_errors:backend_at_import", env={"FASTCLIP_BACKEND": "bogus"})
    assert "ValueError" in child.error
    assert "bogus" in child.error
    assert "FASTCLIP_BACKEND" in child.error
    assert all(name in child.error for name in fastclip.backends())


def test_public_names():
    assert fastclip.__all__ == sorted(fastclip.__all__)
    assert set(fastclip.__all__) >= {*NAMES, "backends", "patch", "unpatch", "use_backend", "why"}
    assert all(hasattr(fastclip, name) for name in [*fastclip.__all__, "__version__"])
    public = {name for name in fastclip.__all__ if not name.startswith("_")}
    assert all(getattr(fastclip, name).__doc__ for name in public)
