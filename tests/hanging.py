"""A check that hangs on purpose, between two that do not."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

import fastclip
from ranks import Check, check

CHECKS: dict[str, Check] = {}


@check(CHECKS)
def before():
    assert fastclip.get_total_norm([torch.ones(2)], process_group=dist.group.WORLD).item() == 2


@check(CHECKS)
def one_rank_stays_out():
    if dist.get_rank() == 1:
        time.sleep(600)
    fastclip.get_total_norm([torch.ones(2)], process_group=dist.group.WORLD)


@check(CHECKS)
def after():
    raise AssertionError("reached")
