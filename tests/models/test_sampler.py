"""Bars move while images are generated, and what is measured is the time of the denoising steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from dbtrain.config import Model
from dbtrain.data.sizes import Size
from dbtrain.models import sampler
from dbtrain.models.base import Base
from dbtrain.runtime import console, pace
from tests import bases
from tests.conftest import slow

SQUARE = Size.square(64)


@pytest.mark.parametrize("folder", [bases.sd, *map(slow, (bases.sdxl, bases.if_1, bases.if_2))])
def test_a_bar_moves_at_each_denoising_step(
    folder: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter(range(1000))
    monkeypatch.setattr(pace, "clock", lambda: 10.0 * next(now))  # ten seconds between any two looks
    monkeypatch.setattr(pace, "measured", {})
    base = Base.find(Model(path=str(folder())))
    pipe = sampler.build(base, torch.float32, torch.device("cpu"))
    low_res = [Image.new("RGB", (16, 16))] * 2 if base.family.enlarges > 1 else []
    rows = 2 * sampler.encode(pipe, base.family, ["a dog"], 5.0)
    moved: list[float] = []
    with console.bar(8, "images", "image") as bar:
        update = bar.update
        monkeypatch.setattr(bar, "update", lambda count: (moved.append(count), update(count)))
        bar.update(4)
        with sampler.moving(pipe, bar, 2, "image"):
            seeds = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
            assert len(sampler.generate_encoded(pipe, base.family, rows, seeds, 3, 5.0, SQUARE, low_res)) == 2
        assert moved == pytest.approx([4, *[2 / 4] * 3, 2 / 4]) and bar.n == pytest.approx(6)
    assert pace.each("image step") == 10 / 2, "between two steps, for two images"
    assert pace.each("image") == 10 / 2, "from the last step to the images"
