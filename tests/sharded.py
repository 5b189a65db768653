"""What every rank checks about sharded gradients, against the same gradients in one piece."""

from __future__ import annotations

import contextlib
import math
import warnings
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, init_device_mesh

import fastclip
import reference
from fastclip import distributed, functional, gradients
from ranks import Check, check

CHECKS: dict[str, Check] = {}
NORM_TYPES = (2.0, 1.0, 3.0, math.inf, 0.5)
# One row (empty shards on all ranks but one), odd (uneven), and large enough for several rows per rank.
SHAPES = ((1, 6), (5, 3), (7,), (16, 8))


def full_tensors(shapes=SHAPES, dtype=torch.float32, seed=1) -> list[torch.Tensor]:
    """The gradients in one piece, equal on every rank."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def mesh_1d():
    return init_device_mesh("cpu", (dist.get_world_size(),))


def mesh_2d():
    return init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("dp", "tp"))


def sharded(full: torch.Tensor, mesh, placements) -> DTensor:
    """This rank's piece of a tensor; where it is Partial the ranks hold different summands."""
    targets = [Replicate() if p.is_partial() else p for p in placements]
    tensor = distribute_tensor(full, mesh, targets, src_data_rank=None)
    local = tensor.to_local().clone()
    for d, p in enumerate(placements):
        if p.is_partial():
            n, i = mesh.size(d), mesh.get_local_rank(d)
            summand = local * (2, -1, 0, 0)[i] if n > 1 else local  # no rounding in products or sum
            local = summand * n if p.reduce_op == "avg" else summand
    return DTensor.from_local(local, mesh, placements, shape=full.shape, stride=full.stride(), run_check=False)


def parameter(grad: torch.Tensor | None, like: torch.Tensor | None = None) -> nn.Parameter:
    like = grad if like is None else like
    if isinstance(like, DTensor) and any(p.is_partial() for p in like.placements):
        like = like.redistribute(placements=[Replicate() if p.is_partial() else p for p in like.placements])
    p = nn.Parameter(torch.zeros_like(like))
    p.grad = grad
    return p


def plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_same_on_all_ranks(value: object) -> None:
    everywhere = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, value)
    assert len(set(everywhere)) == 1, everywhere


def assert_clipped(make, fulls) -> None:
    """Norm and clipped gradients are those of the unsharded ones, and the norm has the same bits on all ranks.

    Args:
        make: returns the parameters, anew for every norm type.
        fulls: the gradients in one piece.
    """
    for norm_type in NORM_TYPES:
        expected = reference.total_norm(fulls, norm_type)
        max_norm = expected / 3
        parameters = make()
        with during(norm_type):
            norm = fastclip.clip_grad_norm_(parameters, max_norm, norm_type, norm_dtype=torch.float64)
            value = (norm.to_local() if isinstance(norm, DTensor) else norm).item()
            reference.assert_norm(torch.tensor(value, dtype=torch.float64), expected, torch.float64)
            assert_same_on_all_ranks(value.hex())
            clipped = reference.clip_by_norm(fulls, reference.clip_coef(expected, max_norm))
            for p, want in zip(parameters, clipped, strict=True):
                torch.testing.assert_close(plain(p.grad).double(), want, rtol=1e-6, atol=1e-9)


@contextlib.contextmanager
def during(*what):
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"{what}: {error}") from None


@contextlib.contextmanager
def collectives():
    """The bytes of every all-reduce that fastclip starts."""
    sizes: list[int] = []
    original = dist.all_reduce

    def counting(tensor, *args, **kwargs):
        sizes.append(tensor.numel() * tensor.element_size())
        return original(tensor, *args, **kwargs)

    dist.all_reduce = counting
    try:
        yield sizes
    finally:
        dist.all_reduce = original


def _every_tensor(mesh, placements):
    fulls = full_tensors(((1, 6), (5, 3), (16, 8)))
    assert_clipped(lambda: [parameter(sharded(full, mesh, placements)) for full in fulls], fulls)


@check(CHECKS)
def a_norm_and_a_coefficient_for_each():
    """Over uneven, empty, partial and replicated shards beside plain tensors, in the order of the list."""
    fulls = [*full_tensors(), *full_tensors(((4, 4), (3,)), seed=2)]
    mesh = mesh_1d()
    placements = ([Shard(0)], [Shard(0)], [Shard(0)], [Replicate()], [Partial("sum")])

    def make():
        return [sharded(f, mesh, p) for f, p in zip(fulls, placements, strict=False)] + [fulls[-1].clone()]

    for norm_type in (*NORM_TYPES, -math.inf, 0.0):
        norms = fastclip.get_tensor_norms(make(), norm_type, norm_dtype=torch.float64)
        for norm, full in zip(norms, fulls, strict=True):
            with during(norm_type, full.shape):
                reference.assert_norm(norm, reference.total_norm([full], norm_type), torch.float64)
    fulls[0][0, 0], fulls[1][-1, -1] = 0.0, math.inf
    tensors = make()
    read = gradients.of(tensors, gradients=False, writes=False)
    table, norm = read.stats_and_norm()
    order = functional._order(read, tensors) or range(len(tensors))
    assert norm == read.total_norm(2.0) == math.inf
    for row, full in zip(table[list(order)].tolist(), fulls, strict=True):
        with during("stats", full.shape):
            squares = full.double().square().sum().item()
            assert row[0] == pytest.approx(squares, rel=1e-12)
            assert row[1:] == [full.abs().max(), (~full.isfinite()).sum(), (full == 0).sum()]
    fulls[1][-1, -1] = 1.0
    tensors = make()
    norms = fastclip.functional.clip_by_norm_(tensors, 1.5)
    assert_same_on_all_ranks(tuple(norms.tolist()))
    for got, full, norm in zip(tensors, fulls, norms.tolist(), strict=True):
        torch.testing.assert_close(plain(got), full * min(1.5 / norm, 1))


@check(CHECKS)
def a_monitor_records_what_all_ranks_hold():
    """To the same numbers on each, and the first alone writes unless all are to."""
    mesh, fulls = mesh_1d(), full_tensors()
    named = [(f"p{i}", parameter(sharded(full, mesh, [Shard(0)]))) for i, full in enumerate(fulls)]
    written = {ranks: [] for ranks in ("first", "all")}
    for ranks, seen in written.items():
        monitor = fastclip.GradMonitor(named, writer=lambda record, step, seen=seen: seen.append(record), ranks=ranks)
        for (_, made), full in zip(named, fulls, strict=True):
            made.grad = sharded(full, mesh, [Shard(0)])
        norm = monitor.clip_grad_norm_(1.0)
        record = monitor.records[0]
        monitor.close()
        reference.assert_norm(
            torch.tensor(record["train/grad_norm"], dtype=torch.float64), reference.total_norm(fulls, 2.0)
        )
        assert float(plain(norm)) == pytest.approx(record["train/grad_norm"])
        for (name, made), full in zip(named, fulls, strict=True):
            if f"train/grad_norm/{name}" in record:  # a rank may hold nothing of it
                assert record[f"train/grad_norm/{name}"] == pytest.approx(float(full.norm()))
                assert record[f"train/grad_max/{name}"] == pytest.approx(float(full.abs().max()))
            torch.testing.assert_close(plain(made.grad), full / (record["train/grad_norm"] + 1e-6))
    assert len(written["all"]) == 1
    assert len(written["first"]) == (dist.get_rank() == 0)
    # A rank without gradients takes part.
    monitor = fastclip.GradMonitor(named)
    for (_, made), full in zip(named, fulls, strict=True):
        made.grad = None if dist.get_rank() == 1 else sharded(full, mesh, [Shard(0)])
    others = [part for full in fulls for rank, part in enumerate(full.chunk(mesh.size())) if rank != 1]
    held = reference.total_norm(others, 2.0)
    for clip in (lambda: monitor.clip_grad_norm_(1e9), monitor.observe, lambda: monitor.clip_grad_value_(1e9)):
        clip()
        assert monitor.records[-1]["train/grad_norm"] == pytest.approx(held)


@check(CHECKS)
def a_policy_acts_alike_on_all_ranks():
    """By a norm that shards add up to, and by a loss that one rank alone sees rise."""
    mesh, (full,) = mesh_1d(), full_tensors(((5, 3),))
    policies = [fastclip.policy.AdaGC(warmup_steps=2), fastclip.policy.ZClip(warmup_steps=2)]
    for policy in policies:
        for scale in (1.0, 1.2, 50.0):
            made = parameter(sharded(full * scale, mesh, [Shard(0)]))
            policy.clip_([made])
            assert_same_on_all_ranks(float(plain(made.grad).norm()))
        assert plain(made.grad).norm() < 3 * full.norm()
    skipping = fastclip.policy.SkipOnSpike(window=8, min_history=2)
    for i in range(5):
        rises = i == 4 and dist.get_rank() == 1
        skipping.clip_([parameter(full.clone())], loss=100.0 if rises else 1.0 + 0.01 * i)
        assert skipping.skip.item() == (i == 4), i


@check(CHECKS)
def a_policy_goes_on_where_a_rank_has_no_gradient():
    """The norm is that of all ranks, so that the rank learns it; it votes on the loss, or the others would wait."""
    mesh, (full,) = mesh_1d(), full_tensors(((8, 3),))
    policies = [fastclip.policy.ZClip(warmup_steps=2), fastclip.policy.SkipOnSpike(window=4, min_history=2)]
    for policy in policies:
        for step in range(3):
            made = parameter(sharded(full, mesh, [Shard(0)]))
            if dist.get_rank() == 1:
                made.grad = None
            policy.clip_([made], loss=1.0)
            assert policy.steps == step + 1
        assert_same_on_all_ranks(str({name: value.tolist() for name, value in policy.state_dict().items()}))


def _placements():
    yield from ((mesh_1d(), [p]) for p in (Shard(0), Shard(1), Replicate(), Partial("sum")))
    yield from ((mesh_2d(), p) for p in ([Shard(0), Shard(1)], [Replicate(), Shard(0)], [Shard(0), Shard(0)]))


@check(CHECKS)
def units_of_shards():
    """Rows and columns in one shard or over several, empty and uneven ones, beside a plain tensor."""
    fulls = [*full_tensors(((1, 6), (5, 3), (16, 8))), *full_tensors(((4, 5),), seed=2)]
    for mesh, placements in _placements():
        for dim, norm_type in ((0, 2.0), (1, 2.0), ((0, 1), 1.0), (0, math.inf), (1, -math.inf), (0, 3.0), (0, 0.0)):
            expected = [full.clone() for full in fulls]
            tensors = [*(sharded(full, mesh, placements) for full in fulls[:-1]), fulls[-1].clone()]
            norms = fastclip.functional.clip_by_norm_(expected, 0.5, norm_type, dim)
            found = fastclip.functional.clip_by_norm_(tensors, 0.5, norm_type, dim)
            with during(placements, dim, norm_type):
                torch.testing.assert_close([plain(t) for t in tensors], expected, rtol=1e-5, atol=1e-7)
                torch.testing.assert_close([plain(norm) for norm in found], norms, rtol=1e-5, atol=1e-7)


@check(CHECKS)
def averages_are_of_all_elements():
    fulls = [*full_tensors(((4, 5),), seed=2), *full_tensors(((1, 6), (5, 3), (16, 8)))]
    for mesh, placements in _placements():
        for clip in (fastclip.functional.clip_by_average_norm_, fastclip.functional.clip_by_block_rms_):
            expected = [full.clone() for full in fulls]
            tensors = [fulls[0].clone(), *(sharded(full, mesh, placements) for full in fulls[1:])]
            with during(placements, clip):
                torch.testing.assert_close(plain(clip(tensors, 0.1)), clip(expected, 0.1), rtol=1e-5, atol=1e-7)
                torch.testing.assert_close([plain(t) for t in tensors], expected, rtol=1e-5, atol=1e-7)


@check(CHECKS)
def adaptive_clip_of_shards():
    """A bias that is sharded is one unit over all ranks."""
    shapes = ((5, 3), (7,), (16, 8))
    pairs = list(zip(full_tensors(shapes), full_tensors(shapes, seed=5), strict=True))
    for mesh, placements in ((mesh_1d(), [Shard(0)]), (mesh_1d(), [Replicate()]), (mesh_2d(), [Replicate(), Shard(0)])):
        for unit, norm_type in (("output", 2.0), ("tensor", 2.0), ("output", math.inf)):
            grads = []
            for piece in (lambda full: full.clone(), lambda full: sharded(full, mesh, placements)):  # noqa: B023
                parameters = [nn.Parameter(piece(weight)) for _, weight in pairs]
                for p, (grad, _) in zip(parameters, pairs, strict=True):
                    p.grad = piece(grad)
                fastclip.adaptive_clip_grad_(parameters, 0.2, norm_type=norm_type, unit=unit)
                grads.append([plain(p.grad) for p in parameters])
            with during(placements, unit, norm_type):
                torch.testing.assert_close(grads[1], grads[0], rtol=1e-5, atol=1e-7)


@check(CHECKS)
def shard_rows():
    """Uneven and empty shards among them."""
    _every_tensor(mesh_1d(), [Shard(0)])


@check(CHECKS)
def shard_columns():
    _every_tensor(mesh_1d(), [Shard(1)])


@check(CHECKS)
def replicate():
    """Counted once; no collective."""
    with collectives() as sizes:
        _every_tensor(mesh_1d(), [Replicate()])
    assert sizes == []


@check(CHECKS)
def partial_sum():
    _every_tensor(mesh_1d(), [Partial("sum")])


@check(CHECKS)
def partial_avg():
    _every_tensor(mesh_1d(), [Partial("avg")])


@check(CHECKS)
def shard_both_dimensions():
    _every_tensor(mesh_2d(), [Shard(0), Shard(1)])


@check(CHECKS)
def shard_one_dimension_twice():
    _every_tensor(mesh_2d(), [Shard(0), Shard(0)])


@check(CHECKS)
def hybrid_shard():
    _every_tensor(mesh_2d(), [Replicate(), Shard(0)])


@check(CHECKS)
def hybrid_shard_the_other_way():
    _every_tensor(mesh_2d(), [Shard(0), Replicate()])


@check(CHECKS)
def partial_and_shard():
    _every_tensor(mesh_2d(), [Partial("sum"), Shard(0)])


@check(CHECKS)
def placements_mixed_on_one_mesh():
    mesh = mesh_2d()
    kinds = ([Shard(0), Shard(0)], [Replicate(), Shard(0)], [Shard(0), Replicate()], [Replicate(), Replicate()])
    fulls = full_tensors()
    assert_clipped(lambda: [parameter(sharded(f, mesh, k)) for f, k in zip(fulls, kinds, strict=True)], fulls)


@check(CHECKS)
def several_meshes():
    """torch raises: all operands of its stack have to be on one mesh."""
    one, two = mesh_1d(), mesh_2d()
    fulls = full_tensors()
    kinds = ((one, [Shard(0)]), (two, [Shard(0), Shard(1)]), (one, [Replicate()]), (two, [Replicate(), Shard(0)]))
    fulls[2] = fulls[2].reshape(7, 1)

    def make():
        return [parameter(sharded(f, *k)) for f, k in zip(fulls, kinds, strict=True)]

    assert_clipped(make, fulls)
    with collectives() as sizes:
        norm = fastclip.clip_grad_norm_(make(), 1.0)
    assert type(norm) is torch.Tensor
    assert len(sizes) == 1


@check(CHECKS)
def beside_plain_tensors():
    """torch raises; a plain gradient is whole on every rank and counts once."""
    mesh, fulls = mesh_1d(), full_tensors()
    for odd in (0, 1):

        def make(odd=odd):
            return [parameter(sharded(f, mesh, [Shard(0)]) if i % 2 == odd else f.clone()) for i, f in enumerate(fulls)]

        assert_clipped(make, fulls)


@check(CHECKS)
def infinities_and_nan_on_one_rank():
    mesh = mesh_1d()
    for norm_type in (2.0, math.inf, -math.inf, 1.0, -1.0):
        for bad in (math.nan, math.inf):
            full = torch.arange(1.0, 17.0)
            full[0] = bad
            expected = reference.total_norm([full], norm_type)
            grad = sharded(full, mesh, [Shard(0)])
            got = fastclip.get_total_norm([grad], norm_type).full_tensor().item()
            with during(norm_type, bad):
                reference.assert_norm(torch.tensor(got), expected)
            if norm_type == 2:
                before = grad.to_local().clone()
                with pytest.raises(RuntimeError, match="is non-finite, so it cannot be clipped"):
                    fastclip.clip_grad_norm_([parameter(grad)], 1.0, error_if_nonfinite=True)
                reference.assert_bits([grad.to_local()], [before])
                fastclip.clip_grad_norm_([parameter(grad)], 1.0)
                factor = math.nan if math.isnan(bad) else 0.0
                reference.assert_bits([grad.to_local()], [before * factor])


@check(CHECKS)
def gradients_missing_on_one_rank():
    """torch reduces vectors of different lengths: a wrong norm on one rank, a hang on another."""
    mesh, fulls = mesh_1d(), full_tensors()
    lost = torch.zeros_like(fulls[3])
    rows = sharded(torch.arange(16.0).reshape(16, 1).expand(16, 8).contiguous(), mesh, [Shard(0)]).to_local()
    mine = sharded(fulls[3], mesh, [Shard(0)]).to_local()
    last = dist.get_world_size() - 1
    if dist.get_rank() != last:
        lost[rows[:, 0].long()] = mine
    dist.all_reduce(lost)
    kept = [*fulls[:3], lost]

    def make():
        grads = [sharded(f, mesh, [Shard(0)]) for f in fulls]
        return [parameter(None if i == 3 and dist.get_rank() == last else g, g) for i, g in enumerate(grads)]

    for norm_type in NORM_TYPES:
        norm = fastclip.clip_grad_norm_(make(), 1.0, norm_type, norm_dtype=torch.float64).full_tensor()
        reference.assert_norm(norm, reference.total_norm(kept, norm_type), torch.float64)
        assert_same_on_all_ranks(norm.item().hex())


@check(CHECKS)
def rank_without_gradients():
    """torch returns 0 there at once, and the others wait for ever."""
    mesh, rank = mesh_1d(), dist.get_rank()
    for norm_type, expected in ((2.0, math.sqrt(8 * (dist.get_world_size() - 1))), (math.inf, 1.0), (1.0, None)):
        grad = DTensor.from_local(torch.ones(8), mesh, [Shard(0)], run_check=False)
        p = parameter(None if rank == 0 else grad, grad)
        norm = fastclip.clip_grad_norm_([p], 1.0, norm_type)
        assert isinstance(norm, DTensor)
        assert norm.dtype == torch.float32
        expected = expected or 8.0 * (dist.get_world_size() - 1)
        reference.assert_norm(norm.full_tensor(), expected)
        assert (p.grad is None) == (rank == 0)


@check(CHECKS)
def no_gradients_anywhere():
    p = parameter(None, sharded(torch.ones(8), mesh_1d(), [Shard(0)]))
    assert fastclip.clip_grad_norm_([p], 1.0).full_tensor().item() == 0
    fastclip.clip_grads_with_norm_([p], 1.0, torch.tensor(3.0))
    fastclip.clip_grad_value_([p], 1.0)


@check(CHECKS)
def order_zero_counts_a_sharded_tensor_once():
    """As torch: the number of tensors that hold a non-zero, wherever it lies."""
    mesh = mesh_1d()
    only_first = torch.zeros(16)
    only_first[0] = 1
    fulls = [torch.ones(16), torch.zeros(16), only_first]
    grads = [sharded(f, mesh, [Shard(0)]) for f in fulls]
    assert nn.utils.get_total_norm(grads, 0).full_tensor().item() == 2
    assert fastclip.get_total_norm(grads, 0).full_tensor().item() == 2
    assert fastclip.get_total_norm([*grads, torch.ones(3)], 0).item() == 3


@check(CHECKS)
def as_torch_returns_it():
    """A DTensor with Replicate placements in torch's dtype; for inf torch's is still Partial."""
    mesh = mesh_2d()
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        fulls = full_tensors(((16, 8), (4, 6)), dtype)
        for norm_type in (2.0, 1.0):
            grads = [sharded(f, mesh, [Replicate(), Shard(0)]) for f in fulls]
            theirs, ours = nn.utils.get_total_norm(grads, norm_type), fastclip.get_total_norm(grads, norm_type)
            assert type(ours) is type(theirs) is DTensor
            assert (ours.dtype, ours.shape, ours.device) == (theirs.dtype, theirs.shape, theirs.device)
            assert ours.device_mesh == theirs.device_mesh
            assert all(p.is_replicate() for p in ours.placements)
            reference.assert_norm(ours.to_local(), reference.total_norm(fulls, norm_type), dtype)
        (group,) = fastclip.why([parameter(g) for g in grads])
        assert (group.count, group.device) == (2, "cpu")
        inf = fastclip.get_total_norm(grads, math.inf)
        assert all(p.is_replicate() for p in inf.placements)


@check(CHECKS)
def placements_and_storage_stay():
    one, two = mesh_1d(), mesh_2d()
    for mesh, placements in ((one, [Shard(0)]), (one, [Partial("sum")]), (two, [Replicate(), Shard(0)])):
        grad = sharded(torch.arange(1.0, 17.0), mesh, placements)
        local = grad._local_tensor
        p = parameter(grad)
        version, expected = local._version, local.clone()
        norm = fastclip.clip_grad_norm_([p], 1.0, norm_dtype=torch.float64).to_local().item()
        assert p.grad is grad
        assert grad.placements == tuple(placements)
        assert grad._local_tensor is local
        assert local._version > version
        reference.scale_rounded_([expected], reference.clip_coef(norm, 1.0))
        reference.assert_bits([local], [expected])


@check(CHECKS)
def fp16_is_not_reduced_in_fp16():
    """Two ranks with a norm of 400 each: the squares are above 65,504, and torch says inf and zeroes all."""
    mesh = mesh_1d()
    full = torch.full((4 * dist.get_world_size(),), 200.0, dtype=torch.float16)
    theirs, ours = sharded(full, mesh, [Shard(0)]), sharded(full, mesh, [Shard(0)])
    assert nn.utils.clip_grad_norm_([parameter(theirs)], 1.0).full_tensor().isinf()
    assert not theirs.to_local().any()
    norm = fastclip.clip_grad_norm_([parameter(ours)], 1.0).full_tensor()
    reference.assert_norm(norm, reference.total_norm([full]), torch.float16)
    assert ours.to_local().all()


@check(CHECKS)
def split_pair_with_a_reduced_norm():
    """What trainers with pipelines do between the two calls: norm to a plain tensor, to another dtype, back."""
    mesh, fulls = mesh_1d(), full_tensors()
    expected = reference.total_norm(fulls)
    clipped = reference.clip_by_norm(fulls, reference.clip_coef(expected, 1.0))
    for convert in (lambda n: n, lambda n: n.full_tensor(), lambda n: n.full_tensor().double()):
        parameters = [parameter(sharded(f, mesh, [Shard(0)])) for f in fulls]
        norm = fastclip.get_total_norm([p.grad for p in parameters], foreach=True)
        fastclip.clip_grads_with_norm_(parameters, 1.0, convert(norm), foreach=True)
        for p, want in zip(parameters, clipped, strict=True):
            torch.testing.assert_close(p.grad.full_tensor().double(), want, rtol=1e-6, atol=1e-9)


@check(CHECKS)
def norm_that_torch_left_partial():
    """torch's inf norm has placements Partial(max): it is reduced, not read."""
    mesh = mesh_1d()
    grad = sharded(torch.arange(1.0, 17.0), mesh, [Shard(0)])
    norm = nn.utils.get_total_norm([grad], math.inf)
    fastclip.clip_grads_with_norm_([parameter(grad)], 1.0, norm)
    torch.testing.assert_close(grad.full_tensor(), torch.arange(1.0, 17.0) / 16, rtol=1e-6, atol=0)
    ours = torch.arange(1.0, 17.0)
    fastclip.clip_grads_with_norm_([parameter(ours)], 1.0, norm)
    torch.testing.assert_close(ours, torch.arange(1.0, 17.0) / 16, rtol=1e-6, atol=0)


@check(CHECKS)
def value():
    mesh, fulls = mesh_1d(), full_tensors()
    parameters = [parameter(sharded(f, mesh, [Shard(0)])) for f in fulls]
    assert fastclip.clip_grad_value_(parameters, 0.5) is None
    for p, full in zip(parameters, fulls, strict=True):
        reference.assert_bits([p.grad.full_tensor()], [full.clamp(-0.5, 0.5)])
    partial = sharded(fulls[1], mesh, [Partial("sum")])
    for clip in (nn.utils.clip_grad_value_, fastclip.clip_grad_value_):
        with pytest.raises(RuntimeError, match=r"(?i)partial"):
            clip([parameter(partial)], 0.5)


@check(CHECKS)
def one_collective_for_each_set_of_sharded_dimensions():
    one, two = mesh_1d(), mesh_2d()
    shapes = [(16, 8)] * 5
    for norm_type in (2.0, math.inf, -math.inf):
        for kinds, sizes in (
            ([(one, [Shard(0)])] * 5, [8]),
            ([(two, [Replicate(), Shard(0)])] * 5, [8] if two.size(1) > 1 else []),
            ([(two, [Shard(0), Shard(1)])] * 5, [8]),
        ):
            grads = [sharded(f, *kind) for f, kind in zip(full_tensors(shapes), kinds, strict=True)]
            with collectives() as seen:
                fastclip.get_total_norm(grads, norm_type)
            # Below 0 a second number tells whether there are elements at all.
            assert seen == [size * (2 if norm_type < 0 else 1) for size in sizes], (norm_type, seen, sizes)


@check(CHECKS)
def equal_for_every_way_to_shard():
    """The same model, cut differently: the same float64 norm to its last bits, and the same float32 norm."""
    fulls = full_tensors(((64, 48), (48, 64), (64, 1), (33, 5)), seed=3)
    norms = [fastclip.get_total_norm(fulls, norm_dtype=torch.float64).item()]
    for mesh, placements in (
        (mesh_1d(), [Shard(0)]),
        (mesh_1d(), [Shard(1)]),
        (mesh_1d(), [Replicate()]),
        (mesh_2d(), [Shard(0), Shard(1)]),
        (mesh_2d(), [Replicate(), Shard(0)]),
        (mesh_2d(), [Shard(1), Shard(0)]),
    ):
        grads = [sharded(f, mesh, placements) for f in fulls]
        norms.append(fastclip.get_total_norm(grads, norm_dtype=torch.float64).to_local().item())
    assert max(norms) - min(norms) <= 4 * math.ulp(norms[0]), norms
    assert len({torch.tensor(n, dtype=torch.float64).float().item() for n in norms}) == 1
    assert_same_on_all_ranks(tuple(n.hex() for n in norms))


@check(CHECKS)
def pipeline_stages():
    """Each rank holds other parameters, plain ones; one that two stages share counts once."""
    rank, world = dist.get_rank(), dist.get_world_size()
    tied = torch.full((3,), 2.0)
    fulls = [tied, *[torch.full((rank + 1,), float(rank + 1)) for rank in range(world)]]
    for norm_type in NORM_TYPES:
        p, shared = parameter(fulls[rank + 1].clone()), parameter(tied.clone())
        expected = reference.total_norm(fulls, norm_type)
        norm = fastclip.clip_grad_norm_(
            [p, shared],
            expected / 2,
            norm_type,
            process_group=dist.group.WORLD,
            is_duplicate=lambda q, shared=shared: q is shared and rank > 0,
            norm_dtype=torch.float64,
        )
        assert type(norm) is torch.Tensor
        reference.assert_norm(norm, expected, torch.float64)
        torch.testing.assert_close(p.grad, fulls[rank + 1] / 2, rtol=1e-5, atol=0)
        torch.testing.assert_close(shared.grad, tied / 2, rtol=1e-5, atol=0)


@check(CHECKS)
def stage_without_parameters():
    grads = [] if dist.get_rank() == 0 else [torch.ones(4)]
    parameters = [parameter(g) for g in grads]
    norm = fastclip.clip_grad_norm_(iter(parameters), 1.0, process_group=[dist.group.WORLD])
    assert norm.item() == 2 * torch.tensor(dist.get_world_size() - 1.0).sqrt().item()


@check(CHECKS)
def pipeline_of_meshes():
    """Two stages, each sharded over its own mesh: reduced over the mesh, then over the stages."""
    both = mesh_2d()
    mesh, stage = both["tp"], both.get_local_rank("dp")
    fulls = [torch.arange(1.0, 9.0), torch.arange(9.0, 20.0)]
    for norm_type in NORM_TYPES:
        grad = sharded(fulls[stage], mesh, [Shard(0)])
        norm = fastclip.get_total_norm([grad], norm_type, process_group=both.get_group("dp"), norm_dtype=torch.float64)
        reference.assert_norm(norm.full_tensor(), reference.total_norm(fulls, norm_type), torch.float64)


@check(CHECKS)
def flat_shards():
    """What ZeRO optimizers hold: a slice of one flat buffer on each rank."""
    flat = torch.arange(1.0, 1 + 8 * dist.get_world_size())
    mine = parameter(flat.chunk(dist.get_world_size())[dist.get_rank()].clone())
    norm = fastclip.clip_grad_norm_([mine], 1.0, process_group=dist.group.WORLD)
    reference.assert_norm(norm, reference.total_norm([flat]), torch.float32)


@check(CHECKS)
def meshes_that_do_not_span_the_world():
    """One reduction for each group, as no single one covers all."""
    both = mesh_2d()
    fulls = full_tensors(((16, 8), (5, 3)))

    def make():
        return [parameter(sharded(f, both[name], [Shard(0)])) for f, name in zip(fulls, ("dp", "tp"), strict=True)]

    assert_clipped(make, fulls)
    parameters = make()
    with collectives() as sizes:
        fastclip.clip_grad_norm_(parameters, 1.0)
    assert sizes == [8] * sum(both.size(d) > 1 for d in (0, 1)), sizes


@check(CHECKS)
def one_group_after_the_other():
    """Two partials that share a group go through it together."""
    both = mesh_2d()
    dp, tp = both.get_group("dp"), both.get_group("tp")
    routes = [distributed.Route((dp, tp)), distributed.Route((tp,)), distributed.Route(())]
    partials = [torch.tensor([1.0 + dist.get_rank()], dtype=torch.float64) for _ in routes]
    i, width = dist.get_rank() // both.size(1), both.size(1)
    with collectives() as sizes:
        reduced = distributed.reduce(partials, routes, 2.0)
    world = dist.get_world_size()
    row = sum(1.0 + i * width + j for j in range(width))
    assert [r.item() for r in reduced] == [world * (world + 1) / 2, row, 1.0 + dist.get_rank()]
    assert sizes == [8, 16]


@check(CHECKS)
def group_that_cannot_reduce_on_the_gradients_device():
    """CPU gradients, as after offloading, and a group with NCCL only: the error says what to pass."""
    grad = sharded(torch.ones(16), mesh_1d(), [Shard(0)])
    with mock.patch.object(dist, "get_backend_config", return_value="cuda:nccl"):
        if torch.accelerator.is_available():
            return
        with pytest.raises(RuntimeError, match=r"initialise it with a backend for that device, as in .*cpu:gloo"):
            fastclip.get_total_norm([grad])


@check(CHECKS)
def wrong_process_group():
    for wrong in ("dp", 3, [None], [dist.GroupMember.NON_GROUP_MEMBER]):
        with pytest.raises(TypeError, match="process_group: expected a ProcessGroup"):
            fastclip.get_total_norm([torch.ones(2)], process_group=wrong)


def _model():
    torch.manual_seed(0)
    block = lambda: nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6), nn.LayerNorm(6))  # noqa: E731
    return nn.Sequential(block(), block(), nn.Linear(6, 3, bias=False))


def _train(model, clip, steps=3):
    """The norms and losses of some steps; the same data on all ranks, so that sharding changes nothing."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(5)
    seen = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(torch.randn(4, 6, generator=generator)).square().mean()
        loss = loss.full_tensor() if isinstance(loss, DTensor) else loss
        loss.backward()
        norm = clip(model.parameters(), 0.05)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        optimizer.step()
        seen.append((loss.item(), norm.item()))
    return seen


def _assert_trains_alike(shard) -> None:
    expected = _train(_model(), fastclip.clip_grad_norm_)
    model = _model()
    shard(model)
    got = _train(model, fastclip.clip_grad_norm_)
    torch.testing.assert_close(torch.tensor(got), torch.tensor(expected), rtol=1e-5, atol=1e-6)
    assert_same_on_all_ranks(str(got))


@check(CHECKS)
def fsdp2_trains_as_unsharded():
    from torch.distributed.fsdp import fully_shard

    def shard(model):
        for block in model:
            fully_shard(block, mesh=mesh_1d())
        fully_shard(model, mesh=mesh_1d())

    _assert_trains_alike(shard)


@check(CHECKS)
def fsdp2_hybrid_trains_as_unsharded():
    from torch.distributed.fsdp import fully_shard

    _assert_trains_alike(lambda model: fully_shard(model, mesh=mesh_2d()))


def _tensor_parallel(model, mesh):
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    for block in list(model)[:2]:
        parallelize_module(block, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


@check(CHECKS)
def tensor_parallel_trains_as_unsharded():
    """The LayerNorms stay plain tensors: torch refuses the mixed list."""
    _assert_trains_alike(lambda model: _tensor_parallel(model, mesh_1d()))


@check(CHECKS)
def fsdp2_over_tensor_parallel_trains_as_unsharded():
    """_StridedShard, and LayerNorms on a one-dimensional mesh beside linears on a two-dimensional one."""
    from torch.distributed.fsdp import fully_shard

    mesh = mesh_2d()

    def shard(model):
        _tensor_parallel(model, mesh["tp"])
        for block in model:
            fully_shard(block, mesh=mesh["dp"])
        fully_shard(model, mesh=mesh["dp"])
        names = {type(p).__name__ for parameter in model.parameters() for p in parameter.placements}
        assert "_StridedShard" in names or mesh.size(1) == 1, names

    _assert_trains_alike(shard)


def _fsdp1(strategy, use_orig_params=True, dtype=torch.float32):
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = _model().to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about the strategy and about FSDP1's age
        return FullyShardedDataParallel(
            model, device_id=torch.device("cpu"), sharding_strategy=strategy, use_orig_params=use_orig_params
        )


def _step(model, dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(5)
    (model(torch.randn(4, 6, generator=generator).to(dtype)).square().mean() * scale).backward()


@check(CHECKS)
def fsdp1_as_unpatched():
    """Norm, its dtype, and the gradients are those of torch's method, for every strategy and p."""
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    torchs = FullyShardedDataParallel.clip_grad_norm_
    for strategy in (ShardingStrategy.FULL_SHARD, ShardingStrategy.SHARD_GRAD_OP, ShardingStrategy.NO_SHARD):
        for use_orig_params in (True, False):
            model = _fsdp1(strategy, use_orig_params)
            for norm_type in (2.0, 1.0, math.inf):
                results = []
                for patched in (False, True):
                    model.zero_grad()
                    _step(model, scale=100.0)
                    with fastclip.patch() if patched else contextlib.nullcontext():
                        assert (FullyShardedDataParallel.clip_grad_norm_ is torchs) != patched
                        norm = model.clip_grad_norm_(0.5, norm_type)
                    results.append([norm, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
                with during(strategy, use_orig_params, norm_type):
                    for ours, theirs in zip(*results[::-1], strict=True):
                        assert ours.dtype == theirs.dtype
                        torch.testing.assert_close(ours, theirs, rtol=3e-6, atol=1e-9)
                    assert_same_on_all_ranks(results[1][0].item().hex())
    assert FullyShardedDataParallel.clip_grad_norm_ is torchs


@check(CHECKS)
def fsdp1_dtype_and_no_gradients():
    from torch.distributed.fsdp import ShardingStrategy

    model = _fsdp1(ShardingStrategy.FULL_SHARD, dtype=torch.bfloat16)
    with fastclip.patch():
        with pytest.warns(UserWarning, match=r"with no gradients -- returning the total norm in the default dtype"):
            norm = model.clip_grad_norm_(1.0)
        assert (norm.dtype, norm.item()) == (torch.float32, 0.0)
        _step(model, torch.bfloat16)
        assert model.clip_grad_norm_(1.0).dtype == torch.bfloat16


def _assert_patch_changes_nothing(make, clip) -> None:
    """Loss and norm of every step are equal to rounding with and without the patch."""
    unpatched = _train(make(), clip)
    with fastclip.patch():
        patched = _train(make(), clip)
    torch.testing.assert_close(torch.tensor(patched), torch.tensor(unpatched), rtol=1e-5, atol=1e-7)
    assert_same_on_all_ranks(str(patched))


def _fsdp2():
    from torch.distributed.fsdp import fully_shard

    model = _model()
    for block in model:
        fully_shard(block, mesh=mesh_1d())
    return fully_shard(model, mesh=mesh_1d())


@check(CHECKS)
def fsdp2_as_unpatched():
    _assert_patch_changes_nothing(_fsdp2, lambda *args: nn.utils.clip_grad_norm_(*args))


@check(CHECKS)
def ddp_as_unpatched():
    ddp = nn.parallel.DistributedDataParallel
    _assert_patch_changes_nothing(lambda: ddp(_model()), lambda *args: nn.utils.clip_grad_norm_(*args))


@check(CHECKS)
def two_norms_joined_by_the_caller():
    """torchtitan's way: norms of two halves, made plain, their powers added over a group, one factor for both."""

    def clip(parameters, max_norm):
        parameters = list(parameters)
        halves = parameters[:5], parameters[5:]
        norms = [nn.utils.get_total_norm([p.grad for p in half], 2.0, False, True) for half in halves]
        norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
        total = norms[0] ** 2 + norms[1] ** 2
        dist.all_reduce(total, group=dist.group.WORLD)  # as over stages, which here all hold the same
        total = (total / dist.get_world_size()) ** 0.5
        for half in halves:
            nn.utils.clip_grads_with_norm_(half, max_norm, total, True)
        return total

    _assert_patch_changes_nothing(_fsdp2, clip)


@check(CHECKS)
def the_norm_of_nothing_is_zero():
    """Of negative orders, too: DTensors without elements, and none at all on a rank of a process group."""
    mesh = mesh_1d()
    for norm_type in (2.0, math.inf, 0.0, -math.inf, -1.0, -2.0):
        with during(norm_type):
            grads = [sharded(torch.empty(0, 3), mesh, [Shard(0)]), sharded(torch.empty(4, 0), mesh, [Replicate()])]
            assert fastclip.get_total_norm(grads, norm_type).full_tensor().item() == 0
            assert fastclip.clip_grad_norm_([parameter(g) for g in grads], 1.0, norm_type).full_tensor().item() == 0
            assert fastclip.get_total_norm([], norm_type, process_group=dist.group.WORLD).item() == 0
            # What one rank has is the norm of all.
            mine = [torch.tensor([3.0])] if dist.get_rank() == 0 else []
            one = fastclip.get_total_norm(mine, norm_type, process_group=dist.group.WORLD)
            assert one.item() == (1 if norm_type == 0 else 3)


def _fsdp1_with_one_left_alone(use_orig_params):
    """A model of which one module is ignored by FSDP, and its parameters."""
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Linear(12, 3))
    alone = nn.Linear(3, 2)
    model.append(alone)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about FSDP1's age
        wrapped = FullyShardedDataParallel(
            model,
            device_id=torch.device("cpu"),
            sharding_strategy=ShardingStrategy.FULL_SHARD,
            use_orig_params=use_orig_params,
            ignored_states=list(alone.parameters()),
        )
    return wrapped, list(alone.parameters())


@check(CHECKS)
def fsdp1_inf_norm_with_what_is_not_sharded():
    """Where a parameter that FSDP ignores has other gradients on each rank, all ranks agree on the largest."""
    for use_orig_params in (True, False):
        results = []
        for patched in (False, True):
            model, alone = _fsdp1_with_one_left_alone(use_orig_params)
            _step(model)
            for p in alone:
                p.grad.fill_(100.0 + dist.get_rank())
            with fastclip.patch() if patched else contextlib.nullcontext():
                norm = model.clip_grad_norm_(1.0, math.inf)
            results.append([norm, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
        assert_same_on_all_ranks(results[1][0].item())
        assert results[1][0].item() == 99.0 + dist.get_world_size()
        for theirs, ours in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=3e-6, atol=1e-9)


@check(CHECKS)
def what_is_not_finite_on_one_rank():
    """Every rank takes the same decision, from the reduced norm."""
    last = dist.get_rank() == dist.get_world_size() - 1
    for nonfinite, bad in (("zero", math.nan), ("zero", 1.0), ("sanitize", math.inf), ("propagate", -math.inf)):
        grads = [sharded(full, mesh_1d(), [Shard(0)]) for full in full_tensors()]
        if last:
            grads[3].to_local()[-1, -1] = bad
        made, found_inf = [parameter(grad) for grad in grads], torch.tensor(math.nan)
        whole = [plain(grad).clone() for grad in grads]
        norm = fastclip.clip_grad_norm_(made, 0.5, nonfinite=nonfinite, found_inf=found_inf, inv_scale=0.25)
        if nonfinite == "sanitize":
            whole = [grad.masked_fill(~grad.isfinite(), 0.0) for grad in whole]
        expected = reference.total_norm(whole) * 0.25
        with during(nonfinite, bad):
            assert_same_on_all_ranks(plain(norm).item().hex())
            assert found_inf.item() == (not math.isfinite(expected))
            factor = reference.clip_coef(expected, 0.5) * 0.25
            for p, want in zip(made, whole, strict=True):
                zeroed = nonfinite == "zero" and not math.isfinite(expected)
                want = torch.zeros_like(want) if zeroed else want * factor
                torch.testing.assert_close(plain(p.grad), want, rtol=1e-6, atol=0, equal_nan=True)
            found_inf.fill_(math.nan)
            fastclip.clip_grad_value_([parameter(g) for g in grads], 1.0, found_inf=found_inf, inv_scale=2.0)
            assert found_inf.item() == (nonfinite == "propagate")


@check(CHECKS)
def a_plain_gradient_of_one_rank_that_is_not_finite():
    grads = [torch.tensor([3.0, math.nan if dist.get_rank() == 0 else 4.0])]
    found_inf = torch.tensor(math.nan)
    group = dist.group.WORLD
    fastclip.clip_grad_norm_([parameter(grads[0])], 1.0, process_group=group, nonfinite="zero", found_inf=found_inf)
    assert found_inf.item() == 1.0
    assert grads[0].tolist() == [0.0, 0.0]


@check(CHECKS)
def partial_gradients_cannot_be_sanitized():
    """Their values are sums that are not there yet; nothing is written."""
    grad = sharded(full_tensors()[3], mesh_1d(), [Partial()])
    before = grad.to_local().clone()
    with pytest.raises(RuntimeError, match="nonfinite: a gradient with Partial placements"):
        fastclip.clip_grad_norm_([parameter(grad)], 1.0, nonfinite="sanitize")
    assert torch.equal(grad.to_local(), before)


@check(CHECKS)
def steps_of_sharded_parameters():
    """Clipped and skipped on step: one decision, and the weights of the whole parameters."""
    for name, defer in (("AdamW", "auto"), ("Adam", True), ("SGD", "auto")):
        whole = [nn.Parameter(full) for full in full_tensors(seed=2)]
        pieces = [nn.Parameter(sharded(full, mesh_1d(), [Shard(0)])) for full in full_tensors(seed=2)]
        make, options = getattr(torch.optim, name), {} if name == "SGD" else {"fused": True}
        mine, other = make(pieces, lr=0.01, **options), make(whole, lr=0.01, **options)
        handle = fastclip.clip_on_step(mine, 1.0, nonfinite="skip", defer=defer)
        for step in range(10):
            fulls = full_tensors(seed=step)
            if step == 4:
                fulls[3][-1, -1] = math.nan  # on the last rank
            for piece, p, full in zip(pieces, whole, fulls, strict=True):
                piece.grad, p.grad = sharded(full, mesh_1d(), [Shard(0)]), full
            mine.step()
            if step != 4:
                torch.nn.utils.clip_grad_norm_(whole, 1.0)
                other.step()
        assert handle.skipped_steps == 1
        for piece, p in zip(pieces, whole, strict=True):
            torch.testing.assert_close(plain(piece).detach(), p.detach(), rtol=1e-5, atol=1e-7)


@check(CHECKS)
def fsdp1_norm_of_order_zero():
    """torch divides by zero. A count that all ranks agree on, or one error on all of them; nothing is left waiting."""
    from torch.distributed.fsdp import ShardingStrategy

    for use_orig_params in (True, False):
        model = _fsdp1(ShardingStrategy.FULL_SHARD, use_orig_params)
        _step(model)
        before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        with fastclip.patch():
            try:
                got = model.clip_grad_norm_(1e9, 0).item()
            except ValueError as error:
                got = str(error)
                assert "norm_type" in got
        assert_same_on_all_ranks(got)
        reference.assert_bits([p.grad for p in model.parameters() if p.grad is not None], before)
