"""A denoiser that generates: what it takes is what was counted, and what there is no room for is swapped."""

from __future__ import annotations

import pytest
import torch

from dbtrain.config import Model, Train
from dbtrain.data.sizes import Size
from dbtrain.models import block_swap, denoiser
from dbtrain.models.base import Base
from dbtrain.models.block_swap import Swapped
from dbtrain.models.blocks import blocks
from dbtrain.models.denoiser import Work
from dbtrain.models.memory_counter import MemoryCounter
from tests import bases

CPU = torch.device("cpu")


def test_it_takes_what_was_counted() -> None:
    base, rows = Base.find(Model(path=str(bases.flux1()))), 4
    found = denoiser.needs(base, "full", torch.float32, Work(rows, Size.square(64), 40))
    module = denoiser.load(base, "full", torch.float32)
    weights = sum(-(-tensor.nbytes // 512) * 512 for tensor in (*module.parameters(), *module.buffers()))
    assert found.resident == pytest.approx(weights, rel=0.01)
    shapes = base.family.conditions(base).items()
    condition = {part: torch.zeros(rows, *(size or 40 for size in shape)) for part, shape in shapes}
    noise = torch.zeros(rows, *base.family.space(base, Size.square(64)).shape)
    with torch.no_grad(), MemoryCounter(512) as counter:
        base.family.denoise(module, noise, torch.ones(rows), condition)
    assert found.temporary == pytest.approx(counter.peak, rel=0.1)
    with_vae = denoiser.needs(base, "full", torch.float32, Work(1, Size.square(64), 40, ("vae",)))
    assert with_vae.resident > found.resident and with_vae.temporary > found.temporary / rows


def test_blocks_are_swapped_where_there_is_no_room_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    base, work = Base.find(Model(path=str(bases.sd(size="whole")))), Work(1, Size.square(64), 32)
    found = denoiser.needs(base, "full", torch.float32, work)
    lacking = block_swap.saved_bytes(found.blocks, 5)
    monkeypatch.setattr(denoiser, "PLENTY", 1e9)
    monkeypatch.setattr(denoiser, "needs", lambda *_: found)
    for has, train, count in (
        (found.swapped(0), Train(), 0), (found.swapped(5) + 9, Train(), 5),
        (found.swapped(5) + 9, Train(swap_blocks=9, gradient_checkpointing="blocks"), 9), (0.0, Train(), 12),
    ):  # fmt: skip
        monkeypatch.setattr(denoiser, "free", lambda device, has=has: has)
        module = denoiser.load(base, "full", torch.float32)
        assert denoiser.swap(base, module, train, CPU, work) == count
        assert sum(isinstance(block, Swapped) for block in blocks(module)) == count
    assert lacking > 0
