"""Images with different adapters in one batch are those that each adapter makes alone, in one loop."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from torch import Tensor
from torch.nn.modules.module import register_module_forward_pre_hook

from dbtrain.adapters import inject
from dbtrain.adapters.by_row import Scales, batches
from dbtrain.adapters.formats import registry as formats
from dbtrain.adapters.formats import word_file
from dbtrain.adapters.tokens import Word
from dbtrain.config import AdapterSettings, Model, Train
from dbtrain.models import denoiser
from dbtrain.models.base import Base
from dbtrain.runtime.errors import ConfigError
from dbtrain.sample.pipeline import AdapterPipeline
from dbtrain.sample.sample import Mix, sample
from tests import bases
from tests.conftest import Make, slow, thinned

EVERY_LAYER = r"(?!cap_embedder).*"
USES: list[Scales | str] = ["two", {}, {"one": 0.5, "two": -1.0}, "one", {"two": 0.5}]
PROMPTS = ["sks", "a photo of sks on the beach at night with a red hat", "a cat, sks", "sks dog", "sks"]
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


def with_two(pipe: AdapterPipeline, folder: Path, *settings: dict[str, Any]) -> AdapterPipeline:
    """The pipeline, with the adapters "one" and "two", which may have settings."""
    for seed, name in enumerate(("one", "two")):
        mine = settings[seed] if settings else {}
        pipe.add(name, adapter(pipe.base, folder / name, seed, **mine))
    return pipe


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


@pytest.mark.parametrize("family", thinned(FAMILIES, 12))
def test_every_layer_of_every_family(family: str, tmp_path: Path) -> None:
    pipe = with_two(AdapterPipeline.load(str(bases.ALL[family]())), tmp_path)
    pipe.use({"one": 0.25})
    check(pipe)
    assert pipe.scales == {"one": 0.25}, "what was in use is in use again"


@pytest.mark.parametrize(
    ("one", "two"),
    [slow({"kind": "loha"}, {}), ({"dora": True}, {"kind": "lokr"}), slow({"dora": True}, {"kind": "loha"})],
    ids=str,
)
def test_kinds_that_nest_in_each_other(one: dict[str, Any], two: dict[str, Any], tmp_path: Path) -> None:
    check(with_two(AdapterPipeline.load(str(bases.sd())), tmp_path, one, two))


@pytest.mark.parametrize("linears", ["int8", slow("nf4")])
def test_a_quantized_base(linears: Any, tmp_path: Path) -> None:
    base = Base.find(Model(path=str(bases.sd())))
    check(with_two(AdapterPipeline(base, "fp32", train=Train(base_linears=linears)), tmp_path))


@pytest.mark.slow
def test_blocks_that_are_swapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(denoiser, "free", lambda device: 1.0)
    pipe = with_two(AdapterPipeline.load(str(bases.flux1())), tmp_path)
    check(pipe)
    assert pipe.swapped == 3


def test_compiled_code_is_not_run(tmp_path: Path) -> None:
    """It was compiled for an adapter, and knows nothing of rows."""
    pipe, ran = with_two(AdapterPipeline.load(str(bases.sd(size="slim"))), tmp_path), 0

    def counting(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        def run(*args: Any) -> Any:
            nonlocal ran
            ran += 1
            return graph(*args)

        return run

    pipe.components["unet"].mid_block.compile(backend=counting)
    pipe.use("one")
    pipe.generate(PROMPTS[:1], [0], 1)
    before = ran
    pipe.generate(PROMPTS[:2], [0, 1], 1, adapters=["one", "two"])
    assert ran == before > 0


def test_each_adapter_reads_its_own_word(tmp_path: Path) -> None:
    """All have learned the same one, which no two of one mix may have."""
    pipe = AdapterPipeline.load(str(bases.sd()))
    names = ("one", "two", "three")
    for seed, name in enumerate(names):
        path = adapter(pipe.base, tmp_path / name, 0)  # the same weights
        rows = torch.randn(1 + seed, bases.WIDTH, generator=torch.Generator().manual_seed(seed))
        word_file.write(path, pipe.family, [Word("sks", {"text_encoder": rows})])
        pipe.add(name, path)
    check(pipe, ["two", {}, "three", {"one": 0.5}])
    pipe.use("one")
    with pytest.raises(ConfigError, match="two of the adapters have learned the word 'sks'"):
        pipe.generate(PROMPTS[:2], [0, 1], 1, adapters=["one", {"two": 1.0, "three": 1.0}])
    assert pipe.scales == {"one": 1.0} and [word.text for word in pipe.spoken] == ["sks"]


@pytest.mark.slow
def test_images_with_the_adapters_in_use_leave_them_merged(tmp_path: Path) -> None:
    pipe = with_two(AdapterPipeline.load(str(bases.sd())), tmp_path)
    merged = lambda: any(layer.merged for layer in pipe._layers())  # noqa: E731
    recorded = Recorded(pipe)
    expected = recorded("one", "two")[1]
    pipe.use("one")
    pipe.merge()
    recorded("one", "one")
    assert merged()
    assert all(np.abs(a - b).max() <= 1 for a, b in zip(recorded("one", "two")[1], expected, strict=True))
    assert not merged() and pipe.scales == {"one": 1.0}


@pytest.mark.slow
def test_what_cannot_share_a_batch_is_refused(tmp_path: Path) -> None:
    pipe = with_two(AdapterPipeline.load(str(bases.z_image())), tmp_path)
    for name, settings in {"text": {"targets": "cap_embedder.*"}, "bias": {"bias": "all"}}.items():
        pipe.add(name, adapter(pipe.base, tmp_path / name, 2, **settings))
    assert pipe.together(["text", "one", {}, "bias", "two", "text"]) == [[1, 2, 4], [0, 5], [3]]
    Recorded(pipe)("bias", "bias")
    for adapters in (["one", "bias"], ["text", {}], ["one"]):
        with pytest.raises(ConfigError, match="does not fit one batch of 2 images"):
            pipe.generate("a dog", [0, 1], 1, adapters=adapters)
    with pytest.raises(ConfigError, match="there is no adapter 'other'"):
        pipe.generate("a dog", [0, 1], 1, adapters=["other", "one"])


@pytest.mark.slow
def test_sample_runs_one_loop_for_four_adapters(make: Make, tmp_path: Path) -> None:
    """One with trained biases takes another loop. The images are those of batches of one."""
    settings: dict[str, Any] = {"sample__images": 1, "sample__steps": 2, "sample__precision": "fp32"}
    base, mixes = Base.find(make().model), []
    for seed in range(5):
        bias = {"bias": "all", "text": False} if seed == 4 else {}
        mixes.append(Mix.parse(str(adapter(base, tmp_path / f"adapter{seed}", seed, **bias))))

    def drawn(count: int, batch: int) -> tuple[int, list[np.ndarray]]:
        """Calls of the denoiser, and the images."""
        calls = []

        def count_calls(module: Any, _: Any) -> None:
            if isinstance(module, UNet2DConditionModel):
                calls.append(1)

        cfg = make(**settings, sample__batch=batch)
        with register_module_forward_pre_hook(count_calls):
            sheet = sample(cfg, ["a dog"], mixes[:count], tmp_path / f"{count}-{batch}")
        return len(calls), [np.asarray(Image.open(path), int) for path in sorted(sheet.parent.glob("*seed*"))]

    alone, expected = drawn(5, 1)
    assert alone == 5 * 2
    calls, images = drawn(4, 4)
    assert calls == 2
    assert all(np.abs(a - b).max() <= 1 for a, b in zip(images, expected, strict=False))
    calls, images = drawn(5, 8)
    assert calls == 2 * 2
    assert all(np.abs(a - b).max() <= 1 for a, b in zip(images, expected, strict=True))


def test_batches() -> None:
    one, two, odd = {"one": 1.0}, {"two": 1.0}, {"odd": 1.0}
    assert batches([odd, one, {}, odd, two, {"odd": 0.5}], {"one", "two"}) == [[1, 2, 4], [0, 3], [5]]
    assert batches([odd, odd], {"one"}) == [[0, 1]]
