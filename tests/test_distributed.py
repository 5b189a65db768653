"""Sharded gradients: the checks of sharded.py, each on 2 and on 4 gloo ranks."""

from __future__ import annotations

import functools

import pytest
import ranks
import sharded
import torch.distributed

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")


@functools.cache
def results(world_size: int) -> dict[str, str]:
    return ranks.run("sharded", world_size)


@pytest.mark.parametrize("name", sharded.CHECKS)
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks(world_size, name):
    error = results(world_size)[name]
    assert not error, error
