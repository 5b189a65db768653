"""Backends, environment and hygiene: what a test changes, it gives back."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# The library reads these once at import; a test that needs one starts a process of its own.
os.environ.pop("FASTCLIP_BACKEND", None)
# Idle OpenMP threads sleep instead of spinning: on a busy machine the suite is several times faster.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Tests import their neighbours by name, from wherever pytest was started.
sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch

import fastclip
from fastclip import _dispatch

# Those for CPU tensors; test_gpu.py is about the others.
BACKENDS = [
    name
    for name, backend in _dispatch.BACKENDS.items()
    if backend.unavailable() is None and backend.refuses(torch.empty(0)) is None
]
TORCH_FUNCTIONS = {
    (module, name): getattr(module, name)
    for module, names in (
        (torch.nn.utils, ("clip_grad_norm_", "clip_grad_value_", "get_total_norm", "clip_grads_with_norm_")),
        (
            torch.nn.utils.clip_grad,
            ("clip_grad_norm_", "clip_grad_value_", "_get_total_norm", "_clip_grads_with_norm_"),
        ),
    )
    for name in names
}


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: needs gigabytes of memory; runs only with -m slow")


def pytest_collection_modifyitems(config, items):
    if not config.option.markexpr:
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


@pytest.fixture(scope="module")
def world():
    """A process group of this process alone, for ways that are sharded."""
    if not torch.distributed.is_available():
        pytest.skip("torch without distributed")
    import ways

    with ways.one_rank():
        yield


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Force each available backend in turn."""
    with fastclip.use_backend(request.param):
        yield request.param


@pytest.fixture
def cpu():
    """Force the cpu backend; without it the test fails, unless a pure-Python install is what is being tested."""
    if "cpu" not in BACKENDS:
        assert os.environ.get("FASTCLIP_TEST_PURE") == "1", fastclip.backends()["cpu"]
        pytest.skip("pure-Python install")
    with fastclip.use_backend("cpu"):
        yield


@pytest.fixture(autouse=True)
def hygiene():
    """Same seed before each test; after it the process is as it was."""
    torch.manual_seed(0)
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    yield
    changed = [name for (module, name), was in TORCH_FUNCTIONS.items() if getattr(module, name) is not was]
    fastclip.unpatch()
    assert torch.get_num_threads() == threads
    assert torch.get_default_dtype() == dtype
    assert not changed, f"still patched: {changed}"


class Fence:
    """The bytes of every storage below some tensors, as they were."""

    def __init__(self, tensors):
        self.views = {}
        for t in tensors:
            if t.layout == torch.strided and not t.is_meta:
                self.views.setdefault(t.untyped_storage().data_ptr(), []).append(t)
        self.before = {storage: self._bytes(views[0]).clone() for storage, views in self.views.items()}

    @staticmethod
    def _bytes(tensor):
        return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())

    def unchanged(self) -> bool:
        """True if no byte differs, inside the tensors or beside them."""
        return all(torch.equal(was, self._bytes(self.views[storage][0])) for storage, was in self.before.items())

    def outside_unchanged(self) -> bool:
        """True if no byte differs that belongs to none of the tensors."""
        for storage, views in self.views.items():
            size, was, now = views[0].element_size(), self.before[storage], self._bytes(views[0])
            elements = torch.arange(len(was) // size, device=was.device)
            outside = torch.ones_like(elements, dtype=torch.bool)
            inside = [elements.as_strided(t.shape, t.stride(), t.storage_offset()).reshape(-1) for t in views]
            outside[torch.cat(inside)] = False
            if not torch.equal(was.view(-1, size)[outside], now.view(-1, size)[outside]):
                return False
        return True


@pytest.fixture
def fence():
    """Return a function that takes a snapshot of all storages below some tensors."""
    return Fence
