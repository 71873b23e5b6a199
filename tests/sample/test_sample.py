"""Pictures: fixed by their seeds, adapters switched on one base, a sheet that says what is what."""

from __future__ import annotations

import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dbtrain.adapters import inject
from dbtrain.adapters.formats import registry as formats
from dbtrain.adapters.formats import word_file
from dbtrain.adapters.tokens import Word
from dbtrain.config import AdapterSettings, Model
from dbtrain.models import denoiser, sampler
from dbtrain.models.base import Base
from dbtrain.runtime.errors import ConfigError
from dbtrain.sample.sample import NO_ADAPTER, AdapterPipeline, Kept, Mix, sample, sample_run
from tests import bases
from tests.conftest import Make, train


@pytest.fixture
def runs(make: Make, tmp_path: Path, prepared: Path) -> list[Path]:
    """Two runs with different adapters."""
    shutil.copytree(prepared, tmp_path / "shards")
    return [
        train(make(run_dir=str(tmp_path / name), seed=seed, optim__lr=1e-2, train__steps=2))
        for seed, name in enumerate(("one", "two"))
    ]


def pixels(pipe: AdapterPipeline, seeds: tuple[int, ...] = (0,)) -> list[np.ndarray]:
    return [np.asarray(p) for p in pipe.generate(["a photo of sks dog"] * len(seeds), seeds, steps=2)]


@pytest.mark.slow
def test_adapters_are_switched_mixed_and_taken_off_one_base(
    runs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = []
    original = sampler.build
    monkeypatch.setattr(sampler, "build", lambda *args: loads.append(1) or original(*args))
    pipe = AdapterPipeline.load(Model(path=str(bases.sd())))
    (bare,) = pixels(pipe)
    pipe.add("one", runs[0])
    pipe.add("two", runs[1] / "export" / "pytorch_lora_weights.safetensors")
    uses = [{"one": 1.0}, {"two": 1.0}, {"one": 1.0, "two": 1.0}, {"one": 0.5}, {}, {"one": 1.0}]
    pictures = []
    for use in uses:
        pipe.use(use)
        pictures += pixels(pipe)
    different = [bare, *pictures[:4]]
    assert all(not np.array_equal(a, b) for i, a in enumerate(different) for b in different[:i])
    assert np.array_equal(pictures[4], bare)
    assert np.array_equal(pictures[5], pictures[0])
    assert len(loads) == 1


def test_a_picture_depends_on_its_seed_and_not_on_its_batch(runs: list[Path]) -> None:
    pipe = AdapterPipeline.load(Model(path=str(bases.sd())))
    together = pixels(pipe, (0, 1, 2))
    for seed in range(3):
        (alone,) = pixels(pipe, (seed,))
        assert np.abs(alone.astype(int) - together[seed]).max() <= 1
    assert not np.array_equal(together[0], together[1])


@pytest.mark.slow
def test_the_sheet_and_its_pictures(make: Make, runs: list[Path], tmp_path: Path) -> None:
    cfg = make(sample__images=3, sample__seed=5)
    mixes = [Mix.parse(t) for t in ("none", f"{runs[0]}:0.5", f"{runs[0]}:1+{runs[1]}:0.25")]
    sheet = sample(cfg, ["a photo of sks dog", "a dog"], mixes, tmp_path / "out")
    drawn = sorted(path.name for path in (tmp_path / "out").glob("*seed*.png"))
    assert len(drawn) == 3 * 2 * 3
    assert drawn[0] == "00-00-seed5.png"
    with Image.open(tmp_path / "out" / "02-01-seed7.png") as picture:
        note = json.loads(picture.text["dbtrain"])  # type: ignore[attr-defined]
        assert picture.size == (64, 64)
    assert (note["prompt"], note["seed"]) == ("a dog", 7)
    assert "one:1 + " in note["adapters"] and "two:0.25" in note["adapters"]
    with Image.open(sheet) as picture:
        assert picture.height > 6 * 96


@pytest.mark.slow
def test_a_sheet_is_drawn_again_only_when_something_changed(
    make: Make, runs: list[Path], tmp_path: Path
) -> None:
    cfg, out = make(run_dir=str(runs[0]), sample__prompts=["a dog"]), tmp_path / "out"
    sheet = sample(cfg, ["a dog"], [Mix.parse(str(runs[0]))], out)
    stamp = sheet.stat().st_mtime_ns
    sample(cfg, ["a dog"], [Mix.parse(str(runs[0]))], out)
    assert sheet.stat().st_mtime_ns == stamp
    sample(cfg, ["a dog"], [Mix.parse(f"{runs[0]}:0.5")], out)
    assert sheet.stat().st_mtime_ns != stamp


@pytest.mark.slow
def test_a_base_that_is_kept_gives_the_images_of_one_loaded_anew(
    make: Make, runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After adapters of every sort: on blocks, on text encoders, on biases, of words."""
    base = Base.find(make().model)
    paths = [str(runs[0]), str(adapter(base, tmp_path / "b", bias="all")),
             str(adapter(base, tmp_path / "c", kind="lokr")), str(runs[1])]  # fmt: skip
    word_file.write(Path(paths[2]), base.family, [Word("sks", {"text_encoder": torch.ones(1, bases.WIDTH)})])
    loads: list[None] = []
    build = sampler.build
    monkeypatch.setattr(sampler, "build", lambda *args: loads.append(None) or build(*args))

    def images(name: str, kept: Kept | None) -> list[dict[str, bytes]]:
        found = []
        for number, text in enumerate((*paths, "none")):
            out = tmp_path / name / str(number)
            sample(make(sample__images=1), ["a photo of sks dog"], [Mix.parse(text)], out, kept)
            found.append({path.name: path.read_bytes() for path in out.iterdir()})
        return found

    anew, kept = images("anew", None), Kept()
    assert len(loads) == len(anew) == len({str(sorted(one.items())) for one in anew})
    assert images("kept", kept) == anew and len(loads) == len(anew) + 1
    for other in ({"sample__precision": "bf16"}, {"train__base_linears": "int8"}, {"sample__guidance": 2.0}):
        cfg = make(sample__images=1, **other)
        both = [sample(cfg, ["a dog"], [NO_ADAPTER], tmp_path / str((other, way)), way).parent
                for way in (kept, None)]  # fmt: skip
        one, again = ((folder / "00-00-seed0.png").read_bytes() for folder in both)
        assert one == again
    assert kept._pipe
    unet = weakref.ref(kept._pipe.components["unet"])
    kept.free()
    assert unet() is None, "its memory is free at once"


def test_run_draws_the_config_s_prompts_without_and_with_the_adapter(make: Make, runs: list[Path]) -> None:
    assert sample_run(make(run_dir=str(runs[0]))) is None
    sheet = sample_run(make(run_dir=str(runs[0]), sample__prompts=["a dog"], train__steps=2))
    assert sheet is not None
    assert sheet.parent.name == "step-000002"
    bare, adapted = (np.asarray(Image.open(sheet.parent / f"0{m}-00-seed0.png")) for m in (0, 1))
    assert not np.array_equal(bare, adapted)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("none", ()),
        ("runs/a", (("runs/a", 1.0),)),
        ("runs/a:0.5", (("runs/a", 0.5),)),
        ("a:1+b:0.25", (("a", 1.0), ("b", 0.25))),
        ("c:/x/y", (("c:/x/y", 1.0),)),
        ("a:-0.5", (("a", -0.5),)),
    ],
)
def test_mixes_are_read_from_text(text: str, parts: tuple) -> None:
    assert Mix.parse(text).parts == parts


def test_an_adapter_for_another_base_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file
    from torch import zeros

    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora"
    save_file(
        {f"{layer}.down.weight": zeros(4, 320), f"{layer}.up.weight": zeros(320, 4)},
        tmp_path / "a.safetensors",
    )
    pipe = AdapterPipeline.load(Model(path=str(bases.sd())))
    with pytest.raises(ConfigError, match="does not fit the base: "):
        pipe.add("a", tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_text("nothing")
    with pytest.raises(ConfigError, match="not a safetensors file"):
        pipe.add("b", tmp_path / "b.safetensors")
    assert not pipe.names()


@pytest.mark.slow
def test_a_run_folder_may_have_any_name(make: Make, tmp_path: Path, prepared: Path) -> None:
    """`run` takes its folder as it is, where `--adapter` would read a scale or a mix."""
    shutil.copytree(prepared, tmp_path / "shards")
    for name in ("none", "a+b", "dog:2"):
        cfg = make(run_dir=str(tmp_path / name), train__steps=2, optim__lr=1e-2, sample__prompts=["a dog"])
        sheet = sample_run(cfg.model_copy(update={"run_dir": str(train(cfg))}))
        assert sheet is not None
        bare, adapted = (np.asarray(Image.open(sheet.parent / f"0{m}-00-seed0.png")) for m in (0, 1))
        assert not np.array_equal(bare, adapted)


@pytest.mark.slow
def test_lost_pictures_and_another_base_are_drawn_again(make: Make, runs: list[Path], tmp_path: Path) -> None:
    cfg, out = make(), tmp_path / "out"
    sheet = sample(cfg, ["a dog"], [Mix.parse(str(runs[0]))], out)
    (out / "00-00-seed1.png").unlink()
    sample(cfg, ["a dog"], [Mix.parse(str(runs[0]))], out)
    assert (out / "00-00-seed1.png").is_file()
    stamp = sheet.stat().st_mtime_ns
    model = shutil.copytree(bases.sd(), tmp_path / "model")
    (model / "scheduler" / "scheduler_config.json").write_text(
        (model / "scheduler" / "scheduler_config.json").read_text().replace("0.012", "0.02")
    )
    sample(make(model__path=str(model), sample__images=1), ["a dog"], [Mix.parse(str(runs[0]))], out)
    assert sheet.stat().st_mtime_ns != stamp
    assert not (out / "00-00-seed1.png").exists(), "a picture of the earlier sheet"


def test_a_checkpoint_is_an_adapter_too(runs: list[Path]) -> None:
    pipe = AdapterPipeline.load(Model(path=str(bases.sd())))
    checkpoint = sorted((runs[0] / "checkpoints").iterdir())[-1]
    pipe.add("export", runs[0])
    for name, path in {"folder": checkpoint, "component": checkpoint / "unet",
                       "file": checkpoint / "unet" / "adapter_model.safetensors"}.items():  # fmt: skip
        pipe.add(name, path)
        pictures = []
        for mine in (name, "export"):
            pipe.use({mine: 1.0})
            pictures.append(np.asarray(pipe.generate("a dog", [0], steps=1)[0], dtype=int))
        assert np.abs(pictures[0] - pictures[1]).max() <= 1
    with pytest.raises(ConfigError, match="no adapter 'b'"):
        pipe.use({"b": 1.0})


def adapter(base: Base, folder: Path, **settings: Any) -> Path:
    """An adapter on the denoiser and on the first text encoder, with weights that matter."""
    states, parts = {}, {base.family.denoiser: "denoiser", base.family.adaptable_text[0]: "text_encoder"}
    for name, part in parts.items():
        module = base.load(name)
        inject.attach(module, AdapterSettings(rank=2, **settings if part == "denoiser" else {}), part, 0)
        for parameter in inject.trainable(module).values():
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
        states[name] = inject.collect(module)
    return formats.write("peft", folder, base.family, states)


@pytest.mark.slow
def test_what_does_not_fit_is_swapped_or_loaded_only_to_encode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same images, of adapters on blocks and encoders, biases too, added before and after."""
    base = Base.find(Model(path=str(bases.flux1())))
    paths = [adapter(base, tmp_path / "a", bias="all"), adapter(base, tmp_path / "b", targets=["to_q"])]

    def images(pipe: AdapterPipeline) -> list[bytes]:
        pipe.add("one", paths[0])
        found = [pipe.generate("a dog", 0, 1, 1.0, 64)]
        for use in ("one", {}, {"one": 1.0, "two": 0.5}):
            if use == {}:
                pipe.add("two", paths[1])
            pipe.use(use)
            found.append(pipe.generate(["a dog", "a cat"], [0, 1], 1, 1.0, 64))
        return [image.tobytes() for made in found for image in made]

    whole = images(AdapterPipeline(base, "fp32"))
    assert len(set(whole)) == 6, "the base's first image is there twice"
    monkeypatch.setattr(denoiser, "free", lambda device: 1.0)
    pipe = AdapterPipeline(base, "fp32")
    assert pipe.pipe.text_encoder_2 is None and pipe.pipe.text_encoder is not None
    assert images(pipe) == whole
    assert pipe.swapped == 3
    with pytest.raises(ConfigError, match="cannot be merged into a denoiser with 3 swapped blocks"):
        pipe.merge()


def test_samples_are_stored_as_training_stores_the_base(make: Make, tmp_path: Path) -> None:
    prompts, mixes = ["a dog"], [Mix.parse("none")]
    sheets = [
        sample(make(sample__images=1, train__base_linears=linears), prompts, mixes)
        for linears in ("full", "int8")
    ]
    one, other = (np.asarray(Image.open(sheet.parent / "00-00-seed0.png"), dtype=int) for sheet in sheets)
    assert sheets[0] != sheets[1] and 0 < np.abs(one - other).max() < 64
    with pytest.raises(ConfigError, match="base_linears=int8; generate without merging"):
        AdapterPipeline(Base.find(make().model), "fp32", train=make(train__base_linears="int8").train).merge()
