"""Images with different adapters in one batch are those that each adapter makes alone, in one loop."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dbtrain.adapters import inject
from dbtrain.adapters.by_row import Scales, batches
from dbtrain.adapters.formats import registry as formats
from dbtrain.config import AdapterSettings, Train
from dbtrain.models import denoiser
from dbtrain.models.base import Base
from dbtrain.runtime.errors import ConfigError
from dbtrain.sample.pipeline import AdapterPipeline
from dbtrain.sample.sample import Mix, sample
from tests import bases
from tests.conftest import Make

EVERY_LAYER = r"(?!cap_embedder).*"
USES: list[Scales | str] = ["two", {}, {"one": 0.5, "two": -1.0}, "one", {"two": 0.5}]
PROMPTS = ["a dog", "a photo of a dog on the beach at night with a red hat", "a cat", "a dog", "a dog"]
FAMILIES = ["sd", "sdxl", "if-1", *bases.FLOW]


def adapter(base: Base, folder: Path, seed: int, text: bool = True, **settings: Any) -> Path:
    """An adapter on all layers of the denoiser, and on a text encoder if one can have it."""
    states = {}
    for name in (base.family.denoiser, *base.family.adaptable_text[:text]):
        part = "denoiser" if name == base.family.denoiser else "text_encoder"
        module = base.load(name)
        mine = {"targets": EVERY_LAYER, "rank": 2, **settings} if part == "denoiser" else {"rank": 2}
        inject.attach(module, AdapterSettings(**mine), part, 0)
        generator = torch.Generator().manual_seed(seed)
        for parameter in inject.trainable(module).values():
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
        states[name] = inject.collect(module)
    return formats.write("peft", folder, base.family, states)


class Recorded:
    """What the denoiser predicts in each call, row by row."""

    def __init__(self, pipe: AdapterPipeline) -> None:
        self.pipe = pipe
        self.calls: list[list[Tensor]] = []
        module = pipe.components[pipe.family.denoiser]
        module.register_forward_hook(lambda _, __, output: self.calls.append(list(output[0])))

    def __call__(self, *adapters: Scales | str, first: int = 0) -> tuple[list[list[Tensor]], list[Any]]:
        """Calls and pixels of images with these adapters; image i has prompt and seed `first` + i."""
        self.calls = []
        last, side = first + len(adapters), bases.SIDES.get(self.pipe.family.name, 64)
        images = self.pipe.generate(PROMPTS[first:last], range(first, last), 2, 3.0, side, adapters=adapters)
        return self.calls, [np.asarray(image, dtype=int) for image in images]


def check(pipe: AdapterPipeline, uses: Sequence[Scales | str] = USES) -> None:
    """Each row of each call of the denoiser, guided or not, is that of the image alone."""
    recorded = Recorded(pipe)
    calls, images = recorded(*uses)
    alone = []
    for place, use in enumerate(uses):
        mine, (image,) = recorded(use, first=place)
        assert len(mine) == len(calls), "one loop for all"
        for together, single in zip(calls, mine, strict=True):
            rows = together[place :: len(uses)]
            for row, expected in zip(rows, single, strict=True):
                torch.testing.assert_close(row, expected, atol=1e-4, rtol=1e-4)
        assert np.abs(image - images[place]).max() <= 1
        alone.append(calls[0][place])
    assert all((one - other).abs().max() > 1e-2 for i, one in enumerate(alone) for other in alone[:i])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_of_every_family(family: str, tmp_path: Path) -> None:
    pipe = AdapterPipeline.load(str(bases.ALL[family]()))
    for seed, name in enumerate(("one", "two")):
        pipe.add(name, adapter(pipe.base, tmp_path / name, seed))
    pipe.use({"one": 0.25})
    check(pipe)
    assert pipe.scales == {"one": 0.25}, "what was in use is in use again"


@pytest.mark.parametrize(
    ("one", "two"),
    [({"kind": "loha"}, {}), ({"dora": True}, {"kind": "lokr"}), ({"dora": True}, {"kind": "loha"})],
    ids=str,
)
def test_kinds_that_nest_in_each_other(one: dict[str, Any], two: dict[str, Any], tmp_path: Path) -> None:
    pipe = AdapterPipeline.load(str(bases.sd()))
    pipe.add("one", adapter(pipe.base, tmp_path / "one", 0, **one))
    pipe.add("two", adapter(pipe.base, tmp_path / "two", 1, **two))
    check(pipe)


@pytest.mark.parametrize("linears", ["int8", "nf4", "int8-dynamic"])
def test_a_quantized_base(linears: Any, tmp_path: Path) -> None:
    base = Base.find(bases.model("flux1"))
    pipe = AdapterPipeline(base, "fp32", train=Train(base_linears=linears))
    for seed, name in enumerate(("one", "two")):
        pipe.add(name, adapter(base, tmp_path / name, seed))
    check(pipe)


def test_batches() -> None:
    one, two, odd = {"one": 1.0}, {"two": 1.0}, {"odd": 1.0}
    assert batches([odd, one, {}, odd, two, {"odd": 0.5}], {"one", "two"}) == [[1, 2, 4], [0, 3], [5]]
    assert batches([odd, odd], {"one"}) == [[0, 1]]
