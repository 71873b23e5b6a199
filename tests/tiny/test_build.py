"""The base model's own training, in seconds: every stage runs, stops, goes on, and makes a real folder."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from benchmarks.tiny import build, fit, parts
from dbtrain.config import Model
from dbtrain.models.base import Base
from dbtrain.models.families.registry import detect
from dbtrain.tiny import world


def made(work: Path, out: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "mixed", lambda device: nullcontext())  # bf16 is slow on many CPUs
        build.main(
            f"--work {work} --out {out} --pictures 48 --vae-steps 1 1 --vae-batch 4 "
            "--unet-steps 2 --unet-batch 4 --each 0".split()
        )
    return out


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that was built in one go."""
    folder = tmp_path_factory.mktemp("build")
    return made(folder / "work", folder / "model")


@pytest.mark.slow
def test_the_build_makes_an_ordinary_diffusers_folder(whole: Path) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(whole, dtype=torch.float32, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    picture = pipe("a photo of a mug", num_inference_steps=2, generator=torch.Generator().manual_seed(0))
    assert picture.images[0].size == (64, 64)
    base = Base.find(Model(path=str(whole)))
    assert detect(base, Model(path=str(whole))).name == "sd"
    assert sum(p.stat().st_size for p in whole.rglob("*") if p.is_file()) <= 16 * 2**20


@pytest.mark.slow
def test_a_stage_that_was_stopped_ends_like_one_that_was_not(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "SAVE_S", 0.0)  # save after every step
    original = fit.Stage._save

    def stopping(self: fit.Stage, step: int) -> None:
        original(self, step)
        if self.path.name == "denoiser" and step == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(fit.Stage, "_save", stopping)
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path / "halves", tmp_path / "b")
    monkeypatch.setattr(fit.Stage, "_save", original)
    halves = made(tmp_path / "halves", tmp_path / "b")
    for part in ("unet/diffusion_pytorch_model", "text_encoder/model", "vae/diffusion_pytorch_model"):
        one, other = (load_file(folder / f"{part}.safetensors") for folder in (whole, halves))
        assert all(torch.equal(one[name], other[name]) for name in one), part


def test_the_tokenizer_knows_the_world_s_words_and_splits_identifiers() -> None:
    words = parts.tokenizer(world.captions([world.scene(n) for n in range(400)]))
    for word in ("mug", "robot", "beach", "photo", "stripes"):
        assert len(words(word).input_ids) == 3, word  # start, the word, end
    assert all(len(words(name).input_ids) > 3 for name in world.IDENTIFIERS)
    longest = max(len(words(text).input_ids) for text in world.captions([world.scene(n) for n in range(400)]))
    assert longest <= parts.TOKENS
