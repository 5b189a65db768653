"""The ops as PyTorch sees them: opcheck, compile, tracing, versions, autograd."""

from __future__ import annotations

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import fastclip
import reference
from cases import grid, parameters
from fastclip._dispatch import BACKENDS

OPS = torch.ops.fastclip
SCHEMAS = {
    "norm_partial": "fastclip::norm_partial(Tensor[] tensors, float norm_type) -> Tensor",
    "tensor_norms": "fastclip::tensor_norms(Tensor[] tensors, float norm_type) -> Tensor",
    "tensor_stats": "fastclip::tensor_stats(Tensor[] tensors) -> Tensor",
    "scale_": "fastclip::scale_(Tensor(a!)[] tensors, Tensor clip_coef, *, bool zero=False) -> ()",
    "scale_each_": "fastclip::scale_each_(Tensor(a!)[] tensors, Tensor coefs) -> ()",
    "sanitize_": "fastclip::sanitize_(Tensor(a!)[] tensors) -> ()",
    "clamp_": "fastclip::clamp_(Tensor(a!)[] tensors, float min, float max) -> ()",
    "clip_grad_norm_": (
        "fastclip::clip_grad_norm_(Tensor(a!)[] grads, float max_norm, float norm_type, int nonfinite=0, "
        "Tensor(b!)? found_inf=None, Tensor? inv_scale=None, *, ScalarType? dtype=None) -> Tensor"
    ),
}


def lists() -> dict[str, list[torch.Tensor]]:
    return {
        "plain": [torch.randn(5), torch.randn(3, 4)],
        "mixed dtypes": [torch.randn(5, dtype=d) for d in reference.FLOATS],
        "strided": [torch.randn(6, 4).t(), torch.randn(9)[::2], torch.randn(())],
        "requires grad": [torch.randn(5, requires_grad=True), torch.randn(3, requires_grad=True)],
    }


def arguments(name: str, count: int = 2) -> list[tuple[tuple, dict]]:
    """Return what follows a list of so many tensors."""
    return {
        "norm_partial": [((2.0,), {}), ((math.inf,), {}), ((0.0,), {})],
        "tensor_norms": [((2.0,), {}), ((math.inf,), {}), ((0.0,), {})],
        "tensor_stats": [((), {})],
        "scale_": [((torch.tensor(0.5, dtype=torch.float64),), {}), ((torch.tensor(0.0),), {"zero": True})],
        "scale_each_": [((torch.linspace(0.25, 1, count, dtype=torch.float64),), {})],
        "sanitize_": [((), {})],
        "clamp_": [((-0.1, 0.1), {})],
        "clip_grad_norm_": [
            ((0.1, 2.0), {}),
            ((0.1, math.inf), {"dtype": torch.float64}),
            ((0.1, 2.0, 1, torch.tensor(0.0), torch.tensor(0.5)), {}),
        ],
    }[name]


@pytest.mark.parametrize("name", SCHEMAS)
def test_schema(name):
    assert str(getattr(OPS, name).default._schema) == SCHEMAS[name]


@pytest.mark.parametrize("backend_name", BACKENDS)
def test_every_backend_has_every_op(backend_name):
    # What a list of a GPU needs is looked up only there: under a mode, or beside other lists.
    names = vars(BACKENDS[backend_name])
    assert set(SCHEMAS) <= names.keys() | names.get("_KERNELS", {}).keys()


# torch >= 2.14: its own check reads the .grad of a tensor that is not a leaf.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("kind", ["plain", "mixed dtypes", "strided", "requires grad"])
@pytest.mark.parametrize("name", SCHEMAS)
def test_opcheck(cpu, name, kind):
    """Schema and aliasing, autograd registration, fake kernel, AOT dispatch with fixed and dynamic shapes."""
    for rest, options in arguments(name, len(lists()[kind])):
        checked = torch.library.opcheck(getattr(OPS, name).default, (lists()[kind], *rest), options)
        assert set(checked.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", SCHEMAS)
def test_fake_matches_the_kernel(cpu, name):
    for tensors in lists().values():
        for rest, options in arguments(name, len(tensors)):
            real = getattr(OPS, name)([t.detach().clone() for t in tensors], *rest, **options)
            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                fake = getattr(OPS, name)([mode.from_tensor(t.detach()) for t in tensors], *rest, **options)
            assert (real is None) == (fake is None)
            if real is not None:
                assert (fake.dtype, fake.shape, fake.device) == (real.dtype, real.shape, real.device)


@pytest.mark.parametrize("dtype", reference.FLOATS)
def test_norm_partial_is_before_the_root(cpu, dtype):
    tensors = [torch.tensor([3.0, -4.0], dtype=dtype), torch.tensor(2.0, dtype=dtype)]
    for norm_type, expected in ((2.0, 29.0), (1.0, 9.0), (3.0, 99.0), (math.inf, 4.0), (-math.inf, 2.0), (0.0, 2.0)):
        partial = OPS.norm_partial(tensors, norm_type)
        assert partial.dtype == torch.float64
        assert partial.shape == ()
        assert partial.item() == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize(("case", "dtype"), grid(readonly=False, complexes=False))
def test_ops_agree_with_the_functions(cpu, case, dtype):
    """Called as ops, as a trace or a mode sees them, the kernels give the bits of the public functions."""
    for norm_type in (2.0, 1.0, math.inf, -math.inf, 0.0, 3.0):
        ours, theirs = case.make(dtype), case.make(dtype)
        rooted = OPS.norm_partial(ours, norm_type) ** (1 / norm_type if norm_type in (2.0, 3.0) else 1)
        norm = OPS.clip_grad_norm_(ours, 0.3, norm_type, dtype=torch.float64)
        expected = fastclip.clip_grad_norm_(parameters(theirs), 0.3, norm_type, norm_dtype=torch.float64)
        with reference.during(norm_type):
            reference.assert_bits([norm, *ours], [expected, *theirs])
            if any(t.numel() for t in ours):  # the smallest of nothing is inf before it is called 0
                assert rooted.item() == pytest.approx(expected.item(), rel=1e-15, abs=0, nan_ok=True)
    ours, theirs = case.make(dtype), case.make(dtype)
    default = OPS.clip_grad_norm_(ours, 0.3, 2.0)
    reference.assert_bits([default, *ours], [fastclip.clip_grad_norm_(parameters(theirs), 0.3), *theirs])
    OPS.scale_(ours, torch.tensor(0.37, dtype=torch.float64))
    reference.scale_rounded_(theirs, 0.37)
    OPS.clamp_(ours, -0.01, 0.02)
    for grad in theirs:
        grad.clamp_(-0.01, 0.02)
    reference.assert_bits(ours, theirs)


def test_ops_do_not_return_their_inputs(cpu):
    """A result must not share memory with what was written."""
    grads = [torch.tensor([2.0])]
    norm = OPS.clip_grad_norm_(grads, 0.5, 2.0)
    assert norm.untyped_storage().data_ptr() != grads[0].untyped_storage().data_ptr()
    assert OPS.scale_(grads, torch.tensor(0.5, dtype=torch.float64)) is None
    assert OPS.clamp_(grads, -1.0, 1.0) is None


# Versions and autograd


@pytest.mark.parametrize("max_norm", [0.1, 1e9, 0.0])
@pytest.mark.parametrize("foreach", [None, True, False])
def test_version_counters(backend, max_norm, foreach):
    """One step per gradient as torch takes it, also when nothing is clipped; none for a norm."""
    grads = [torch.randn(3), torch.randn(4, 4).t(), torch.randn(5, dtype=torch.bfloat16), torch.randn(6)[::2]]
    versions = [g._version for g in grads]
    fastclip.get_total_norm(grads, foreach=foreach)
    assert [g._version for g in grads] == versions
    norm = fastclip.clip_grad_norm_(parameters(grads), max_norm, foreach=foreach)
    assert [g._version for g in grads] == [v + 1 for v in versions]
    fastclip.clip_grads_with_norm_(parameters(grads), max_norm, norm, foreach)
    assert [g._version for g in grads] == [v + 2 for v in versions]
    fastclip.clip_grad_value_(parameters(grads), 100.0, foreach)
    assert all(v + 3 <= g._version <= v + 4 for g, v in zip(grads, versions, strict=True))


@pytest.mark.parametrize("name", ["scale_", "scale_each_", "sanitize_", "clamp_", "clip_grad_norm_"])
def test_direct_calls_bump_versions(cpu, name):
    for rest, options in arguments(name):
        tensors = [torch.randn(3), torch.randn(2, 2)]
        versions = [t._version for t in tensors]
        getattr(OPS, name)(tensors, *rest, **options)
        assert [t._version for t in tensors] == [v + 1 for v in versions]


CLIPS = {
    "norm": lambda made: fastclip.clip_grad_norm_(made, 0.1),
    "norm, nothing clipped": lambda made: fastclip.clip_grad_norm_(made, 1e9),
    "with norm": lambda made: fastclip.clip_grads_with_norm_(made, 0.1, torch.tensor(5.0)),
    "value": lambda made: fastclip.clip_grad_value_(made, 0.1),
    "value, nothing clipped": lambda made: fastclip.clip_grad_value_(made, 1e9),
}


@pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS)
def test_autograd_notices_the_write(backend, clip):
    """A gradient that autograd saved for a backward and that is clipped meanwhile: an error, not a wrong number."""
    weight = torch.ones(3, requires_grad=True)
    grad = torch.tensor([1.0, 2.0, 3.0])
    loss = (weight * grad).sum()
    clip(parameters([grad]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS)
def test_views_share_the_version(backend, clip):
    base = torch.ones(6)
    version = base._version
    clip(parameters([base[2:4]]))
    assert base._version > version


@pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS)
def test_nothing_is_recorded(backend, clip):
    """Gradients of create_graph may be written; the norm needs no gradient; a later backward through them raises."""
    weight = torch.tensor([1.0, 2.0], requires_grad=True)
    (grad,) = torch.autograd.grad((weight**3).sum(), weight, create_graph=True)
    product = grad * grad  # saves grad
    weight.grad, node = grad, grad.grad_fn
    result = clip([weight])
    assert grad.grad_fn is node
    assert grad.requires_grad
    if result is not None:
        assert not result.requires_grad
        assert result.grad_fn is None
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_ops_record_nothing_when_called_directly(cpu):
    """Outside no_grad, with inputs that require gradients."""
    tensors = [torch.randn(3, requires_grad=True) * 2]
    node = tensors[0].grad_fn
    for result in (OPS.norm_partial(tensors, 2.0), OPS.clip_grad_norm_(tensors, 1.0, 2.0)):
        assert not result.requires_grad
    OPS.clamp_(tensors, -0.1, 0.1)
    assert tensors[0].grad_fn is node


def test_norm_of_tensors_that_require_grad(backend):
    norm = fastclip.get_total_norm([torch.tensor([3.0, 4.0], requires_grad=True)])
    assert norm.item() == 5
    assert not norm.requires_grad


def test_grad_mode_is_given_back(backend):
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            fastclip.clip_grad_norm_(parameters([torch.ones(2)]), 1.0)
            fastclip.clip_grad_value_(parameters([torch.ones(2)]), 1.0)
            assert torch.is_grad_enabled() == enabled


@pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS)
def test_inference_mode(backend, clip, fence):
    """Inside it clipping works; outside an inference tensor must not be written, nor anything listed before it."""
    with torch.inference_mode():
        made = parameters([torch.tensor([3.0, 4.0])])
        norm = clip(made)
        if norm is not None:
            assert norm.item() == 5
        grad = torch.tensor([3.0, 4.0])
    ordinary = torch.tensor([1.0, 2.0])
    before, version = fence([ordinary, grad]), ordinary._version
    with pytest.raises(RuntimeError, match="inference tensor"):
        clip(parameters([ordinary, grad]))
    assert before.unchanged()
    assert ordinary._version - version <= 1
    assert fastclip.get_total_norm([grad]).item() == 5


def test_inside_no_grad_and_backward_hooks(backend):
    """Clipping from a post-accumulate hook, in the middle of a backward, on autograd's own thread."""
    weight = torch.tensor([3.0, 4.0], requires_grad=True)

    def hook(parameter):
        fastclip.clip_grad_norm_([parameter], 1.0)

    weight.register_post_accumulate_grad_hook(hook)
    (weight * weight / 2).sum().backward()
    torch.testing.assert_close(weight.grad, torch.tensor([0.6, 0.8]))


# Tracing


def test_fake_tensor_mode_runs_no_kernel(backend):
    with FakeTensorMode():
        made = parameters([torch.empty(10**6, 10**6), torch.empty(5, dtype=torch.float64)])  # 4 TB, if it were real
        norm = fastclip.clip_grad_norm_(made, 1.0)
        assert norm.dtype == torch.float64
        fastclip.clip_grad_value_(made, 1.0)
        fastclip.clip_grads_with_norm_(made, 1.0, norm)
        assert (
            fastclip.get_total_norm([p.grad for p in made], math.inf, norm_dtype=torch.float32).dtype == torch.float32
        )


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(backend, mode):
    def clip(a, b):
        norm = fastclip.clip_grad_norm_(parameters([a, b]), 1.0)
        fastclip.clip_grad_value_(parameters([a, b]), 0.7)
        return norm + fastclip.get_total_norm([a, b])

    graph = make_fx(clip, tracing_mode=mode)(torch.ones(3), torch.ones(2))
    ours, theirs = ([torch.tensor([3.0, 0.0, 0.3]), torch.tensor([4.0, 0.0])] for _ in range(2))
    assert torch.equal(graph(*ours), clip(*theirs))
    reference.assert_bits(ours, theirs)


def test_functionalize_reads(backend):
    norm = torch.func.functionalize(lambda a, b: fastclip.get_total_norm([a, b]))(
        torch.tensor([3.0]), torch.tensor(4.0)
    )
    assert norm.item() == 5


def test_functionalize_writes():
    """Nobody forces a backend: under a transform the choice is torch's own ops."""

    def clip(a):
        a = a.clone()
        fastclip.clip_grad_norm_(parameters([a]), 1.0)
        return a

    torch.testing.assert_close(torch.func.functionalize(clip)(torch.tensor([3.0, 4.0])), torch.tensor([0.6, 0.8]))


def step(made, total_norm):
    """Every public function once, with a generator for an argument."""
    norm = fastclip.clip_grad_norm_((p for p in made), 1.0)
    fastclip.clip_grad_value_(made, 0.3)
    again = fastclip.get_total_norm([p.grad for p in made], math.inf, norm_dtype=torch.float64)
    fastclip.clip_grads_with_norm_(made, 0.5, total_norm)
    return norm, again


def gradients():
    torch.manual_seed(1)
    return [torch.randn(3, 4), torch.randn(5, dtype=torch.float64), torch.randn(6, 2, dtype=torch.bfloat16).t()]


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compile(backend, compiler):
    ours, theirs = gradients(), gradients()
    made = parameters(ours)
    pointers = [g.data_ptr() for g in ours]
    torch._dynamo.reset()
    results = torch.compile(step, backend=compiler, fullgraph=True)(made, torch.tensor(2.0))
    torch.testing.assert_close(results, step(parameters(theirs), torch.tensor(2.0)), rtol=1e-6, atol=0)
    reference.assert_bits(ours, theirs)
    assert [g.data_ptr() for g in ours] == pointers
    assert all(g._version > 0 for g in ours)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, in its own backend
def test_compile_inductor():
    """The ops as inductor calls them, without code of its own around them, which would take a C++ compiler long."""

    def clip(made):
        fastclip.clip_grad_value_(made, 3.5)
        return fastclip.clip_grad_norm_(made, 1.0)

    torch._dynamo.reset()
    made = parameters([torch.tensor([3.0, 0.0]), torch.tensor([[4.0], [0.0]]).t()])
    norm = torch.compile(clip, backend="inductor", fullgraph=True)(made)
    assert norm.item() == pytest.approx(math.hypot(3, 3.5), rel=1e-7)
    factor = 1 / math.hypot(3, 3.5)
    torch.testing.assert_close(made[0].grad, torch.tensor([3 * factor, 0]))
    torch.testing.assert_close(made[1].grad, torch.tensor([[3.5 * factor, 0]]))
    torch._dynamo.reset()


def test_compile_has_one_graph():
    torch._dynamo.reset()
    report = torch._dynamo.explain(step)(parameters(gradients()), torch.tensor(2.0))
    assert (report.graph_count, report.graph_break_count) == (1, 0)
    torch._dynamo.reset()


def test_compile_does_not_recompile_per_step():
    torch._dynamo.reset()
    seen = []

    def count(graph, inputs):
        seen.append(graph)
        return graph.forward

    compiled = torch.compile(step, backend=count, fullgraph=True)
    made = parameters(gradients())
    for _ in range(3):
        compiled(made, torch.tensor(2.0))
    assert len(seen) == 1
    torch._dynamo.reset()


def test_compile_with_error_if_nonfinite():
    """A graph break, as in torch, and then the right thing."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda made: fastclip.clip_grad_norm_(made, 1.0, error_if_nonfinite=True), backend="eager")
    assert compiled(parameters([torch.tensor([3.0, 4.0])])).item() == 5
    with pytest.raises(RuntimeError, match="is non-finite, so it cannot be clipped"):
        compiled(parameters([torch.tensor([3.0, math.nan])]))
    torch._dynamo.reset()


def test_compile_no_gradients():
    torch._dynamo.reset()
    compiled = torch.compile(lambda made: fastclip.clip_grad_norm_(made, 1.0), backend="eager", fullgraph=True)
    assert compiled([torch.nn.Parameter(torch.ones(2))]).item() == 0
    torch._dynamo.reset()
