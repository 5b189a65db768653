"""The verb stats and the op tensor_stats: of each tensor a sum of squares, a largest magnitude and two counts."""

from __future__ import annotations

import math

import pytest
import torch

import fastclip
import on_cpu
import reference
import ways
from cases import CASES
from fastclip import gradients
from fastclip.backends import eager

pytestmark = pytest.mark.usefixtures("world")


@pytest.fixture(params=ways.WAYS)
def way(request):
    return ways.WAYS[request.param]


def expected(tensor: torch.Tensor) -> list[float]:
    """The four numbers in float64."""
    x = tensor.to(torch.complex128 if tensor.is_complex() else torch.float64).abs().flatten()
    largest = x.max().item() if len(x) and not x.isnan().any() else math.nan if len(x) else 0.0
    return [math.fsum((x * x).tolist()), largest, (~tensor.isfinite()).sum().item(), (tensor == 0).sum().item()]


def check(table: torch.Tensor, tensors: list[torch.Tensor]) -> None:
    assert table.shape == (len(tensors), 4)
    assert table.dtype == torch.float64
    for row, tensor in zip(table.tolist(), tensors, strict=True):
        squares, *rest = expected(tensor)
        reference.assert_norm(torch.tensor(row[0], dtype=torch.float64).sqrt(), math.sqrt(squares), torch.float64)
        assert row[1:] == pytest.approx(rest, rel=0, abs=0, nan_ok=True)


def of(tensors: list[torch.Tensor]) -> gradients.Gradients:
    return gradients.of(tensors, gradients=False, writes=False)


@pytest.mark.parametrize("dtype", reference.FLOATS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_each_case(backend, case, dtype):
    tensors = [t for t in case.make(dtype) if not t.is_complex()] if dtype in case.dtypes else []
    if tensors:
        check(of(tensors).stats()[0], tensors)


def mixed() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(6)
    tensors = [torch.randn(n, generator=generator).to(d) for n in (5, 70_000) for d in reference.FLOATS]
    tensors[1][::2] = 0
    tensors[4][[3, 65_999]] = math.inf
    tensors[6][12_345] = math.nan
    tensors[7][:66_000] = -0.0
    return [*tensors, torch.randn(9, 8, generator=generator)[:, ::3], torch.zeros(0), tensors[0]]


def test_every_way(way):
    tensors = mixed()
    with way.context():
        read = gradients.of([*tensors, *way.beside()], gradients=False, writes=False, **way.options())
        table, norm = read.stats_and_norm()
        plain = read.total_norm(2.0)
    assert torch.equal(norm, plain) or (norm.isnan() and plain.isnan())
    order = [next(i for i, t in enumerate(tensors) if t is r) for r in read.tensors if any(t is r for t in tensors)]
    check(table[: len(tensors)].double(), [tensors[i] for i in order])


@pytest.mark.parametrize("threads", [1, 2])
def test_the_bits_of_the_norm(cpu, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for dtype in reference.FLOATS:
            tensors = [torch.randn(n, generator=torch.Generator().manual_seed(n)).to(dtype) for n in (3, 200_003, 999)]
            table, partial = of(tensors).stats()
            assert torch.equal(partial, of(tensors).norm_partial(2.0))
            assert torch.equal(table[1, 0].sqrt(), of(tensors[1:2]).total_norm(2.0))
            assert torch.equal(table[:, 1].amax(), of(tensors).total_norm(math.inf))
            assert torch.equal(torch.ops.fastclip.tensor_stats(tensors), table)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("n", [0, 1, 31, 511, 513, 2047, 2049, 4097, 65_537])
@pytest.mark.parametrize("dtype", reference.FLOATS)
def test_counts_at_the_edges_of_blocks(cpu, dtype, n):
    tensor = torch.ones(n, dtype=dtype)
    tensor[: n // 3] = 0
    tensor[n // 3 : n // 2] = math.inf
    tensor[-1:] = -math.inf
    assert of([tensor]).stats()[0][0, 2:].tolist() == [n // 2 - n // 3 + (n > 0), n // 3]


@pytest.mark.skipif(on_cpu.unavailable() is not None, reason=str(on_cpu.unavailable()))
def test_the_simulated_gpu():
    tensors = [*mixed(), torch.randn(90, 800)[:, ::2]]
    tensors += [torch.randn(1 + i % 3) for i in range(2045)]  # more than a table holds
    finite = [t for t in tensors if t.isfinite().all()]
    with on_cpu.use():
        table, _ = of(tensors).stats()
        check(table, tensors)
        table, partial = of(finite).stats()
        assert torch.equal(partial, of(finite).norm_partial(2.0))
        assert torch.equal(getattr(torch.ops, on_cpu.NAMESPACE).tensor_stats(finite), table)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning")
def test_complex_and_sparse():
    dense = torch.tensor([0.0, 3.0, 0.0, math.nan, -4.0])
    sparse = torch.sparse_coo_tensor([[1, 3, 1]], [1.0, math.nan, 2.0], (5,))
    tensors = [torch.tensor([3 + 4j, 0j, complex(math.inf, 0)]), dense]
    check(eager.tensor_stats(tensors), tensors)
    assert of([sparse]).stats()[0][0, 2:].tolist() == [1, 3]


def test_nothing():
    table, norm = of([]).stats_and_norm()
    assert table.shape == (0, 4)
    assert norm == 0


def test_a_subclass():
    class Mine(torch.Tensor):
        pass

    tensor = torch.tensor([3.0, 0.0, -4.0]).as_subclass(Mine)
    table, norm = gradients.of([tensor], gradients=False, writes=False).stats_and_norm()
    assert table.tolist() == [[25.0, 4.0, 0.0, 1.0]]
    assert norm == 5


def test_a_norm_that_is_known_is_not_computed_again(cpu, monkeypatch):
    grads = [torch.tensor([3.0, 4.0])]
    read = gradients.of(grads, gradients=False)
    _, norm = read.stats_and_norm()
    monkeypatch.setattr(read, "total_norm", None)
    clip = gradients.Clip(1.0, 2.0, inv_scale=0.5)
    scaled = read.norm_of(clip, norm)
    read.clip_by_(clip, scaled)
    assert scaled == 2.5
    assert grads[0].tolist() == pytest.approx([0.6, 0.8])
    assert fastclip.get_total_norm(grads) == pytest.approx(1.0)
