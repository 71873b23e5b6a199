"""A failed collective is reported as a lost rank; any other error is not."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as torch_dist

from dbtrain.runtime import dist


class Beats:
    """A heartbeat that another rank no longer answers."""

    step = 7

    def absent(self) -> tuple[str, bool]:
        return "rank 1 is gone", False


def test_each_collective_that_waits_for_a_lost_rank_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that have time left when the first one gives up."""
    monkeypatch.setattr(dist, "_heartbeat", Beats())
    store = torch_dist.HashStore()
    with ThreadPoolExecutor(2) as both:
        patience = timedelta(seconds=1)
        ours, _theirs = both.map(lambda rank: torch_dist.ProcessGroupGloo(store, rank, 2, patience), (0, 1))
    waiting = []
    for _ in range(2):
        waiting.append(ours.allreduce(torch.ones(3)))
        time.sleep(0.5)
    problems = []
    for work in waiting:
        with pytest.raises(RuntimeError) as raised:
            work.wait()
        problems.append(dist.lost(raised.value))
    assert all(
        one and str(one).startswith("rank 1 is gone; this rank gives up at step 7") for one in problems
    )
    assert dist.lost(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
