"""fastclip in the place of torch.nn.utils, and back."""

from __future__ import annotations

import inspect
import pickle

import pytest
import torch
import torch.nn.utils as torchs
from torch.nn.utils import clip_grad, clip_grad_norm_  # the early import that a patch has to reach

import fastclip
from cases import parameters
from conftest import TORCH_FUNCTIONS

PLACES = (
    (torchs, "clip_grad_norm_", "clip_grad_norm_"),
    (torchs, "clip_grad_value_", "clip_grad_value_"),
    (torchs, "get_total_norm", "get_total_norm"),
    (torchs, "clip_grads_with_norm_", "clip_grads_with_norm_"),
    (clip_grad, "clip_grad_norm_", "clip_grad_norm_"),
    (clip_grad, "clip_grad_value_", "clip_grad_value_"),
    (clip_grad, "_get_total_norm", "get_total_norm"),
    (clip_grad, "_clip_grads_with_norm_", "clip_grads_with_norm_"),
)


def patched() -> bool:
    """True or False for all eight names at once; anything between is an error."""
    ours = [getattr(module, name) is getattr(fastclip, own) for module, name, own in PLACES]
    theirs = [getattr(module, name) is TORCH_FUNCTIONS[module, name] for module, name, _ in PLACES]
    assert all(ours) or all(theirs), list(zip(PLACES, ours, strict=True))
    return all(ours)


@pytest.fixture(autouse=True)
def unpatched():
    yield
    fastclip.unpatch()


def huge() -> list[torch.nn.Parameter]:
    """Gradients of which torch finds the norm inf and fastclip 5e20."""
    return parameters([torch.tensor([3e20, 4e20])])


def test_patch_and_undo():
    handle = fastclip.patch()
    assert patched()
    handle.undo()
    assert not patched()
    handle.undo()
    assert not patched()


def test_unpatch():
    fastclip.unpatch()
    assert not patched()
    fastclip.patch()
    fastclip.patch()
    fastclip.unpatch()
    assert not patched()
    fastclip.unpatch()
    assert not patched()


def test_context_manager():
    with fastclip.patch() as handle:
        assert patched()
        assert callable(handle.undo)
    assert not patched()
    with pytest.raises(KeyError), fastclip.patch():
        raise KeyError
    assert not patched()
    with fastclip.patch() as handle:
        handle.undo()
        assert not patched()
    assert not patched()


def test_nested():
    """A patch inside a patch does nothing and undoes nothing."""
    with fastclip.patch():
        with fastclip.patch():
            assert patched()
        assert patched()
        fastclip.patch().undo()
        assert patched()
    assert not patched()


def test_a_stale_handle_undoes_nothing():
    stale = fastclip.patch()
    fastclip.unpatch()
    with fastclip.patch():
        stale.undo()
        assert patched()
    assert not patched()


def test_many_rounds():
    for _ in range(3):
        with fastclip.patch():
            assert patched()
        assert not patched()


def test_attribute_lookups_are_reached():
    assert torchs.clip_grad_norm_(huge(), 1.0).isinf()
    with fastclip.patch():
        for function in (torchs.clip_grad_norm_, clip_grad.clip_grad_norm_, torch.nn.utils.clip_grad_norm_):
            made = huge()
            assert function(made, 1.0).item() == pytest.approx(5e20)
            torch.testing.assert_close(made[0].grad, torch.tensor([0.6, 0.8]))
        assert torchs.get_total_norm([huge()[0].grad]).item() == pytest.approx(5e20)
        assert clip_grad._get_total_norm([huge()[0].grad]).item() == pytest.approx(5e20)
        assert torchs.clip_grad_value_([], 1.0) is None
    assert torchs.clip_grad_norm_(huge(), 1.0).isinf()
    with pytest.raises(RuntimeError):
        torchs.clip_grad_value_([], 1.0)


def test_early_from_import_is_reached():
    """`from torch.nn.utils import clip_grad_norm_` at the top of this file, long before the patch."""
    assert clip_grad_norm_ is not fastclip.clip_grad_norm_
    with fastclip.patch():
        made = huge()
        assert clip_grad_norm_(made, 1.0).item() == pytest.approx(5e20)
        torch.testing.assert_close(made[0].grad, torch.tensor([0.6, 0.8]))
    assert clip_grad_norm_(huge(), 1.0).isinf()


def test_deprecated_name_is_reached():
    with fastclip.patch(), pytest.warns(FutureWarning, match="clip_grad_norm_"):
        assert torchs.clip_grad_norm(huge(), 1.0).item() == pytest.approx(5e20)


def test_private_pair_is_reached():
    """As verl uses it: both private names imported inside a function."""
    with fastclip.patch():
        from torch.nn.utils.clip_grad import _clip_grads_with_norm_, _get_total_norm

        made = huge()
        _clip_grads_with_norm_(made, 1.0, _get_total_norm([p.grad for p in made]))
        torch.testing.assert_close(made[0].grad, torch.tensor([0.6, 0.8]))


def test_fastclip_does_not_call_itself():
    """What goes to torch's own functions (subclasses) reaches torch's, not the patched names: no recursion."""

    class Sub(torch.Tensor):
        pass

    for context in (fastclip.patch, lambda: pytest.MonkeyPatch.context()):
        with context():
            grad = torch.tensor([3.0, 4.0]).as_subclass(Sub)
            assert fastclip.clip_grad_norm_(parameters([grad]), 1.0).item() == 5
            fastclip.clip_grad_value_(parameters([grad]), 0.7)
            fastclip.clip_grads_with_norm_(parameters([grad]), 1.0, fastclip.get_total_norm([grad]))
            torch.testing.assert_close(grad.as_subclass(torch.Tensor), torch.tensor([0.6, 0.7]), rtol=1e-5, atol=0)


def test_empty_generator_still_names_the_caller():
    with fastclip.patch():
        for function in (torchs.clip_grad_norm_, fastclip.clip_grad_norm_, clip_grad_norm_):
            with pytest.warns(UserWarning, match="empty generator") as caught:
                function((p for p in ()), 1.0)
            assert caught[0].filename == __file__


@pytest.mark.parametrize("module_and_name", TORCH_FUNCTIONS, ids=lambda key: f"{key[0].__name__}.{key[1]}")
def test_signatures_stay(module_and_name):
    module, name = module_and_name
    before = [
        (p.name, p.kind, p.default) for p in inspect.signature(TORCH_FUNCTIONS[module_and_name]).parameters.values()
    ]
    with fastclip.patch():
        after = inspect.signature(getattr(module, name)).parameters.values()
    assert [(p.name, p.kind, p.default) for p in after if p.kind is not p.KEYWORD_ONLY] == before


@pytest.mark.parametrize("name", ["clip_grad_norm_", "clip_grad_value_", "get_total_norm", "clip_grads_with_norm_"])
def test_pickle_by_reference(name):
    """A dataloader worker or a trainer that pickles its clip function gets the same one."""
    function = getattr(fastclip, name)
    assert pickle.loads(pickle.dumps(function)) is function
    with fastclip.patch():
        assert pickle.loads(pickle.dumps(getattr(torchs, name))) is function


def test_patched_function_compiles():
    """A traced step uses what is in place, and un-patching recompiles."""
    torch._dynamo.reset()
    # torch 2.10 cannot trace its own function in one graph.
    whole = torch.__version__ >= "2.11"
    step = torch.compile(lambda made: torchs.clip_grad_norm_(made, 1.0), backend="eager", fullgraph=whole)
    with fastclip.patch():
        assert step(huge()).item() == pytest.approx(5e20)
    assert step(huge()).isinf()
    with fastclip.patch():
        assert step(huge()).item() == pytest.approx(5e20)
    torch._dynamo.reset()


def test_training_is_unchanged():
    """The same model trained with and without the patch: equal weights to float32 rounding, step by step."""

    def train() -> list[torch.Tensor]:
        torch.manual_seed(4)
        model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        inputs = torch.randn(32, 6)
        for _ in range(15):
            optimizer.zero_grad()
            ((model(inputs).squeeze(1) - inputs.sum(1)) ** 2 * 10).mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            torch.nn.utils.clip_grad_value_(model.parameters(), 0.2)
            optimizer.step()
        return [p.detach() for p in model.parameters()]

    theirs = train()
    with fastclip.patch():
        ours = train()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_unpatch_leaves_alone_what_somebody_put_there_later():
    fastclip.patch()
    ours = torchs.clip_grad_norm_

    def wrapper(*args, **kwargs):
        return ours(*args, **kwargs)

    torchs.clip_grad_norm_ = wrapper
    try:
        fastclip.unpatch()
        assert torchs.clip_grad_norm_ is wrapper
        assert torchs.clip_grad_norm_(huge(), 1.0).item() == pytest.approx(5e20)
        assert torchs.clip_grad_value_ is TORCH_FUNCTIONS[torchs, "clip_grad_value_"]
        assert clip_grad.clip_grad_norm_ is TORCH_FUNCTIONS[clip_grad, "clip_grad_norm_"]
        with fastclip.patch():
            assert patched()
        assert torchs.clip_grad_norm_ is wrapper
    finally:
        torchs.clip_grad_norm_ = TORCH_FUNCTIONS[torchs, "clip_grad_norm_"]


@pytest.mark.parametrize("module_and_name", TORCH_FUNCTIONS, ids=lambda key: f"{key[0].__name__}.{key[1]}")
def test_torchs_originals_pickle(module_and_name):
    """A trainer that imported them by name before, and is itself sent to another process."""
    original = TORCH_FUNCTIONS[module_and_name]
    before = pickle.dumps(original)
    with fastclip.patch():
        during = pickle.dumps(original)
        assert pickle.loads(during) is original
        # Where they were pickled before the patch, they arrive as what is now in their place.
        assert pickle.loads(before) is not original
    assert pickle.dumps(original) == before
    assert original.__module__ == "torch.nn.utils.clip_grad"


def test_a_wrapper_that_is_no_function_can_be_patched(monkeypatch):
    import functools

    partial = functools.partial(TORCH_FUNCTIONS[torchs, "clip_grad_norm_"], foreach=False)
    monkeypatch.setattr(torchs, "clip_grad_norm_", partial)
    with fastclip.patch():
        assert torchs.clip_grad_norm_ is fastclip.clip_grad_norm_
    assert torchs.clip_grad_norm_ is partial
