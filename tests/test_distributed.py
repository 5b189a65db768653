"""Sharded gradients: the checks of sharded.py, each on 2 and on 4 gloo ranks."""

from __future__ import annotations

import functools

import pytest
import torch.distributed

import ranks
import sharded
import subproc
from ranks import Run

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")


@functools.cache
def results() -> dict[str, dict[str, str]]:
    """All at once, so that torch is imported for them once."""
    runs = {"2": Run("sharded", 2), "4": Run("sharded", 4), "hanging": Run("hanging", 2, 2)}
    return dict(zip(runs, ranks.run(*runs.values()), strict=True))


@pytest.mark.parametrize("name", sharded.CHECKS)
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks(world_size, name):
    error = results()[str(world_size)][name]
    assert not error, error


def test_plain_tensors_import_no_dtensor():
    """Who clips plain tensors does not pay for the import of torch.distributed.tensor, nor FSDP's."""
    code = """
import sys, torch, fastclip
fastclip.patch()
weight = torch.nn.Parameter(torch.ones(2))
weight.grad = torch.ones(2)
torch.nn.utils.clip_grad_norm_([weight], 1.0)
torch.nn.utils.clip_grad_value_([weight], 1.0)
torch.nn.utils.clip_grads_with_norm_([weight], 1.0, torch.nn.utils.get_total_norm([weight.grad]))
assert not {"torch.distributed.tensor", "torch.distributed.fsdp"} & set(sys.modules)
"""
    child = subproc.execute(code)
    assert (child.error, child.stderr) == ("", "")


def test_a_hang_is_reported_with_the_stacks_of_all_ranks():
    """One rank stays out, the other waits in the reduction: an error that shows where."""
    outcome = results()["hanging"]
    assert outcome["before"] == ""
    for rank in (0, 1):
        assert f"rank {rank}: hung or died" in outcome["one_rank_stays_out"]
    assert "all_reduce" in outcome["one_rank_stays_out"]
    assert "not reached" in outcome["after"]
