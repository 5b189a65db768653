"""Better than torch on purpose: one test per row of the README's "Different from torch".

Each test first shows what torch does, so that the row disappears from the README the day torch changes.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.utils as torchs

import fastclip
import reference
from cases import CHUNK, parameters, random
from subproc import call


@pytest.mark.parametrize("dtype", reference.LOW)
def test_low_precision_is_wide_until_the_end(backend, dtype):
    """Over random models: the reported norm is right to one rounding, and clipping ends at max_norm."""
    generator = torch.Generator().manual_seed(8)
    torch_off = torch_above = 0.0
    row = reference.tolerance(dtype)
    for _ in range(60):
        grads = [random(generator, dtype, n) for n in (300, 7, 64, 1000)]
        theirs = [g.clone() for g in grads]
        expected = reference.total_norm(grads)
        torch_norm = torchs.clip_grad_norm_(parameters(theirs), 1.0).item()
        torch_off = max(torch_off, abs(torch_norm / expected - 1))
        torch_above = max(torch_above, reference.total_norm(theirs))
        reference.assert_norm(fastclip.get_total_norm(grads), expected, dtype)
        fastclip.clip_grad_norm_(parameters(grads), 1.0)
        # Rounding errors of single elements average out: far below one rounding, where torch's are systematic.
        assert abs(reference.total_norm(grads) - 1) < row.grad / 4
    assert torch_off > row.norm or torch_above > 1 + row.grad / 4


def test_low_precision_by_hand(backend):
    """bf16 [3, 4] clipped to 1: torch's 0.6016 and 0.8008 are also ours, since 0.6 and 0.8 are not in bf16."""
    grads = [torch.tensor([3.0, 4.0], dtype=torch.bfloat16)]
    assert fastclip.clip_grad_norm_(parameters(grads), 1.0).item() == 5
    assert grads[0].tolist() == [0.6015625, 0.80078125]


def test_low_precision_does_not_depend_on_company(backend):
    """A float32 gradient of zero in the list changes no bit of a bf16 gradient; in torch it does."""
    generator = torch.Generator().manual_seed(3)
    differs = False
    for _ in range(20):
        values = random(generator, torch.bfloat16, 64)
        alone, beside, torch_alone, torch_beside = (values.clone() for _ in range(4))
        fastclip.clip_grad_norm_(parameters([alone]), 1.0)
        fastclip.clip_grad_norm_(parameters([beside, torch.zeros(1)]), 1.0)
        reference.assert_bits([beside], [alone])
        torchs.clip_grad_norm_(parameters([torch_alone]), 1.0)
        torchs.clip_grad_norm_(parameters([torch_beside, torch.zeros(1)]), 1.0)
        differs |= not torch.equal(torch_alone, torch_beside)
    assert differs


@pytest.mark.parametrize("dtype", reference.LOW)
def test_norm_dtype_returns_the_wide_norm(backend, dtype):
    """1 + 1/1024 is no norm of bf16 or fp16; `norm_dtype` returns it, and without it torch's dtype stays."""
    grads = [torch.full((1025,), 1 / 32, dtype=dtype)]
    expected = math.sqrt(1025) / 32
    assert fastclip.get_total_norm(grads, norm_dtype=torch.float32).item() == torch.tensor(expected).item()
    assert fastclip.get_total_norm(grads, norm_dtype=torch.float64).item() == pytest.approx(expected, rel=1e-15)
    wide = fastclip.clip_grad_norm_(parameters([grads[0].clone()]), 1.0, norm_dtype=torch.float32)
    assert wide.item() == torch.tensor(expected).item()
    assert fastclip.get_total_norm(grads).dtype == torchs.get_total_norm(grads).dtype == dtype


def test_fp16_overflow_is_clipped_not_zeroed(backend):
    """Norm above 65,504: torch returns inf and zeroes all gradients; ours are clipped by the true norm."""
    values = torch.tensor([60000.0, -60000.0, 30000.0], dtype=torch.float16)
    theirs, ours, split = (values.clone() for _ in range(3))
    assert torchs.clip_grad_norm_(parameters([theirs]), 1.0).isinf()
    assert not theirs.any()

    assert fastclip.clip_grad_norm_(parameters([ours]), 1.0, error_if_nonfinite=True).item() == math.inf
    torch.testing.assert_close(ours.float(), torch.tensor([2 / 3, -2 / 3, 1 / 3]), rtol=1e-3, atol=0)
    wide = fastclip.get_total_norm([split], error_if_nonfinite=True, norm_dtype=torch.float32)
    assert wide.item() == 90000
    fastclip.clip_grads_with_norm_(parameters([split]), 1.0, wide)
    reference.assert_bits([split], [ours])


def test_fp16_overflow_in_one_norm(backend):
    """L1 of ordinary numbers: 1,000 tensors of 100 are 100,000."""
    grads = [torch.full((1,), 100.0, dtype=torch.float16) for _ in range(1000)]
    assert torchs.get_total_norm(grads, 1).isinf()
    assert fastclip.get_total_norm(grads, 1).isinf()
    assert fastclip.get_total_norm(grads, 1, norm_dtype=torch.float32).item() == 100_000
    assert fastclip.clip_grad_norm_(parameters(grads), 1000.0, 1).isinf()
    assert {g.item() for g in grads} == {1.0}


def test_error_if_nonfinite_still_sees_a_nonfinite_norm(backend):
    """The wide norm of a real infinity is infinite, whatever `norm_dtype` can hold."""
    for bad in (math.inf, math.nan):
        grads = [torch.tensor([1.0, bad], dtype=torch.float16)]
        for norm_dtype in (None, torch.float32, torch.float64):
            with pytest.raises(RuntimeError, match="is non-finite, so it cannot be clipped"):
                fastclip.get_total_norm(grads, error_if_nonfinite=True, norm_dtype=norm_dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e20, 1e30])
def test_large_values_do_not_overflow(backend, dtype, scale):
    """Squares beyond float32: torch says inf and zeroes everything."""
    values = (torch.tensor([3.0, 4.0], dtype=torch.float64) * scale).to(dtype)
    expected = reference.total_norm([values])
    theirs, ours = values.clone(), values.clone()
    assert torchs.clip_grad_norm_(parameters([theirs]), 1.0).isinf()
    assert not theirs.any()
    reference.assert_norm(fastclip.clip_grad_norm_(parameters([ours]), 1.0, error_if_nonfinite=True), expected, dtype)
    torch.testing.assert_close(ours.float(), torch.tensor([0.6, 0.8]), rtol=torch.finfo(dtype).eps, atol=0)


def test_norm_beyond_float32_still_clips(backend):
    """The norm itself does not fit float32: returned as inf, gradients clipped by the true one."""
    ours = torch.full((4,), 3e38)
    assert fastclip.clip_grad_norm_(parameters([ours]), 1.0).isinf()
    torch.testing.assert_close(ours, torch.full((4,), 0.5), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_values_do_not_underflow(backend, dtype):
    """Squares below float32's smallest number: torch says 0."""
    values = (torch.tensor([3.0, 4.0], dtype=torch.float64) * 1e-25).to(dtype)
    assert torchs.get_total_norm([values]).item() == 0
    reference.assert_norm(fastclip.get_total_norm([values]), reference.total_norm([values]), dtype)
    clipped = values.clone()
    fastclip.clip_grad_norm_(parameters([clipped]), 1e-8)  # the epsilon stays torch's: 1e-8 / 1e-6
    torch.testing.assert_close(clipped.double(), values.double() / 100, rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_empty_value_clip_returns_none(backend):
    """torch raises RuntimeError from its C++ grouping."""
    frozen = [torch.nn.Parameter(torch.ones(2))]
    for nothing in (list, tuple, lambda: frozen, lambda: iter(()), lambda: (p for p in ())):
        with pytest.raises(RuntimeError):
            torchs.clip_grad_value_(nothing(), 1.0)
        assert fastclip.clip_grad_value_(nothing(), 1.0) is None


@pytest.mark.parametrize("norm_type", [math.inf, -math.inf, -1.0])
@pytest.mark.parametrize("dtype", reference.FLOATS)
def test_empty_tensor_contributes_nothing(backend, dtype, norm_type):
    """torch raises where the order has no identity; the norm of nothing but empty tensors is 0."""
    empty, full = torch.empty(0, 3, dtype=dtype), torch.tensor([3.0, -4.0], dtype=dtype)
    with pytest.raises(RuntimeError, match="identity"):
        torchs.get_total_norm([empty, full], norm_type)
    alone = fastclip.get_total_norm([full], norm_type).item()
    for tensors in ([empty, full], [full, empty], [empty, full, empty]):
        assert fastclip.get_total_norm(tensors, norm_type).item() == alone
    nothing = fastclip.get_total_norm([empty, empty], norm_type, error_if_nonfinite=True)
    assert (nothing.item(), nothing.dtype) == (0, dtype)
    fastclip.clip_grad_norm_(parameters([empty, full]), 1.0, norm_type)
    assert full[0].item() == pytest.approx(3 / (alone + 1e-6), rel=2 * torch.finfo(dtype).eps)


def embedding(dtype=torch.float32):
    """Return a weight whose sparse gradient, with row 1 twice, is [[0, 0], [3, 3], [0, 0], [-1, -1]]."""
    values = torch.tensor([[1.0, 1.0], [-1.0, -1.0], [2.0, 2.0]], dtype=dtype)
    grad = torch.sparse_coo_tensor([[1, 3, 1]], values, (4, 2), check_invariants=True)
    assert not grad.is_coalesced()
    weight = torch.nn.Parameter(torch.zeros(4, 2, dtype=dtype))
    weight.grad = grad
    return weight


# torch 2.11 and 2.12 say so whatever is asked of them.
@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning")
@pytest.mark.parametrize("coalesced", [False, True])
def test_sparse_gradients(coalesced):
    """torch 2.13 raises NotImplementedError: here norm and clipping are those of the coalesced values."""
    dense = torch.tensor([[0.0, 0.0], [3.0, 3.0], [0.0, 0.0], [-1.0, -1.0]])

    def weight():
        made = embedding()
        if coalesced:
            made.grad = made.grad.coalesce()
        return made

    for norm_type, expected in ((2, math.sqrt(20)), (1, 8.0), (math.inf, 3.0), (-math.inf, 1.0), (0, 1.0)):
        made = weight()
        norm = fastclip.clip_grad_norm_([made], 0.5, norm_type)
        assert norm.item() == pytest.approx(expected, rel=1e-6)
        assert fastclip.get_total_norm([weight().grad], norm_type).item() == norm.item()
        assert made.grad.is_sparse
        torch.testing.assert_close(made.grad.to_dense(), dense * 0.5 / (expected + 1e-6))
    made = weight()
    fastclip.clip_grad_value_([made], 2.0)
    torch.testing.assert_close(made.grad.to_dense(), dense.clamp(-2, 2))
    made = weight()
    fastclip.clip_grads_with_norm_([made], 1.0, torch.tensor(4.0))
    torch.testing.assert_close(made.grad.to_dense(), dense / 4)


def test_sparse_beside_dense():
    """One list of an Embedding(sparse=True) and ordinary layers; the model trains on."""
    torch.manual_seed(0)
    layers = torch.nn.Embedding(10, 4, sparse=True), torch.nn.Linear(4, 1)
    (layers[1](layers[0](torch.tensor([1, 2, 1]))) * 50).sum().backward()
    made = [p for layer in layers for p in layer.parameters()]
    expected = math.sqrt(sum(p.grad.to_dense().double().square().sum().item() for p in made))
    assert fastclip.clip_grad_norm_(made, 1.0).item() == pytest.approx(expected, rel=1e-6)
    after = math.sqrt(sum(p.grad.to_dense().double().square().sum().item() for p in made))
    assert after == pytest.approx(1.0, rel=1e-5)
    torch.optim.SGD(made, lr=0.1).step()


def test_sparse_error_if_nonfinite():
    made = embedding()
    made.grad._values()[0] = math.nan
    with pytest.raises(RuntimeError, match="is non-finite, so it cannot be clipped"):
        fastclip.clip_grad_norm_([made], 1.0, error_if_nonfinite=True)


def pass_gradients() -> list[list[tuple[str, str, int]]]:
    """In a child, where nobody was warned before: what is caught for each kind of list."""
    import sys
    import warnings

    import fastclip

    caught = []
    layer = torch.nn.Linear(2, 2)
    layer(torch.ones(2)).sum().backward()
    frozen = torch.nn.Linear(2, 2).requires_grad_(False)
    for given in (
        [torch.nn.Parameter(torch.ones(2))],  # no gradient yet
        frozen.parameters(),
        [torch.ones(2, requires_grad=True)],
        [],
        list(layer.parameters()),
        [p.grad for p in layer.parameters()],
    ):
        for function, rest in (
            (fastclip.clip_grad_norm_, (1.0,)),
            (fastclip.clip_grad_value_, (1.0,)),
            (fastclip.clip_grads_with_norm_, (1.0, torch.tensor(3.0))),
        ):
            given = list(given)
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                line = sys._getframe().f_lineno + 1
                function(given, *rest)
            caught.append([(w.category.__name__, w.filename == __file__, w.lineno - line) for w in seen])
    return caught


def test_gradients_in_place_of_parameters_warn():
    """A silent no-op in torch that shipped in a large library: one UserWarning at the caller's line."""
    child = call("test_better:pass_gradients")
    assert not child.error, child.error
    *others, norm, value, with_norm = child.value
    assert not any(others)
    assert norm == [("UserWarning", True, 0)]
    for later in (value, with_norm):
        assert later in ([], [("UserWarning", True, 0)])


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_gradients_in_place_of_parameters_change_nothing(backend, fence):
    grads = [torch.tensor([3.0, 4.0])]
    before = fence(grads)
    assert fastclip.clip_grad_norm_(grads, 1.0).item() == 0
    assert before.unchanged()


def clip_read_only_pages() -> str:
    """In a child that a write would kill: gradients in memory mapped without write permission."""
    import ctypes
    import mmap

    import numpy as np

    def read_only(values):
        memory = mmap.mmap(-1, values.nbytes)
        shared = np.frombuffer(memory, dtype=values.dtype)
        shared[:] = values
        grad = torch.from_numpy(shared)
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mprotect(ctypes.c_void_p(grad.data_ptr()), ctypes.c_size_t(values.nbytes), mmap.PROT_READ):
            raise OSError(ctypes.get_errno(), "mprotect")
        return parameters([grad])

    with fastclip.use_backend("cpu"):
        quarters = np.full(3 * CHUNK, 0.25, dtype=np.float32)
        made = read_only(quarters)
        fastclip.clip_grad_norm_(made, 1e9)
        fastclip.clip_grad_norm_(made, math.inf, math.inf)
        fastclip.clip_grads_with_norm_(made, 1.0, torch.tensor(0.5))
        fastclip.clip_grad_value_(made, 0.25)
        fastclip.clip_grad_value_(made, math.inf)
        # NaN and the bound itself look as if they had to be clipped, and stay what they are.
        quarters[::3], quarters[1::3] = math.nan, 0.5
        for dtype in (np.float32, np.float64, np.float16):
            fastclip.clip_grad_value_(read_only(quarters.astype(dtype)), 0.5)
    return "not written"


def test_nothing_is_written_when_nothing_is_clipped(cpu):
    """The pages below the gradients are read-only: the first write would end the process."""
    child = call("test_better:clip_read_only_pages")
    assert child.value == "not written", child
