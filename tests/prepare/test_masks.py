"""Masks: where they come from, that they follow their photos, and what the loss makes of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageOps

from dbtrain.config import Config
from dbtrain.data import masks, shards
from dbtrain.data.dataloader import LatentStream
from dbtrain.data.photo_files import listing
from dbtrain.data.shards import MASK, Manifest
from dbtrain.data.sizes import Size
from dbtrain.models.objectives import losses
from dbtrain.prepare.prepare import prepare
from dbtrain.runtime.errors import ConfigError
from dbtrain.train import held_out_loss
from dbtrain.train.inputs import Inputs
from tests import bases
from tests.conftest import Make, at, thinned, train
from tests.networks import build
from tests.runs import relative
from tests.session import once

SUBJECT = (20, 24, 60, 56)  # left, top, right, bottom: px of the drawn photos


def draw(folder: Path, number: int, size: tuple[int, int] = (96, 80)) -> Path:
    """A red subject in a crowded picture."""
    generator = np.random.default_rng(number)
    picture = Image.fromarray(generator.integers(0, 255, (*size[::-1], 3), np.uint8))
    ImageDraw.Draw(picture).rectangle(SUBJECT, fill=(230, 20, 30))
    picture.save(path := folder / f"{number}.png")
    return path


def mask_of(size: tuple[int, int] = (96, 80)) -> Image.Image:
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).rectangle(SUBJECT, fill=255)
    return mask


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Photos with a mask each, in all the places where one may be."""
    folder = tmp_path / "masked"
    (folder / masks.FOLDER).mkdir(parents=True)
    for number, name in enumerate(("0.mask.png", "1-masklabel.png", f"{masks.FOLDER}/2.png", None)):
        path = draw(folder, number)
        if name:
            mask_of().save(folder / name)
        else:
            photo = Image.open(path).convert("RGB")
            photo.putalpha(mask_of())
            photo.save(path)
    return folder


def configured(make: Make, folder: Path, base: str = "sd", **changes: Any) -> Config:
    settings = {
        "model__path": str(bases.OF_FAMILY[base]()), "prepare__resolution": bases.SIDES[base],
        "prepare__photos": str(folder), "prepare__mask": True, "train__micro_batch": 2,
    }  # fmt: skip
    return make(**settings | changes)


def rows(folder: Path, role: str = "instance") -> list[shards.Row]:
    manifest = Manifest.read(at(folder))
    return [row for shard in manifest.roles[role] for row in shards.read(at(folder), shard, manifest)]


def test_a_mask_may_be_in_several_places(folder: Path) -> None:
    photos = listing(folder).photos
    assert [path.name for path in photos] == ["0.png", "1.png", "2.png", "3.png"], "masks are no photos"
    assert all(masks.load(path).tobytes() == mask_of().tobytes() for path in photos)
    (folder / "0.mask.png").unlink()
    with pytest.raises(ConfigError, match=r"0\.png has neither a mask 0\.mask\.png beside it nor"):
        masks.load(photos[0])
    mask_of((50, 50)).save(folder / "0.mask.png")
    with pytest.raises(ConfigError, match=r"50 x 50 px, of another shape than its photo of 96 x 80 px"):
        masks.load(photos[0])
    mask_of().resize((48, 40)).save(folder / "0.mask.png")
    assert masks.load(photos[0]).size == (96, 80)


def test_a_photo_whose_alpha_is_solid_has_no_mask(tmp_path: Path) -> None:
    photo = Image.open(draw(tmp_path, 0)).convert("RGBA")
    photo.save(solid := tmp_path / "solid.png")
    assert not masks.is_there(solid)
    with pytest.raises(ConfigError, match=r"solid\.png has neither a mask .* nor transparent parts"):
        masks.load(solid)
    photo.putpixel((3, 4), (0, 0, 0, 254))
    photo.save(cut := tmp_path / "cut.png")
    assert masks.is_there(cut) and masks.load(cut).getextrema() == (254, 255)


@pytest.mark.parametrize(("dtype", "values"), [
    (np.uint16, (0, 500, 30000, 65535)), (np.float32, (0.0, 0.0076, 0.4578, 1.0)),
])  # fmt: skip
def test_a_deep_mask_keeps_its_shades(tmp_path: Path, dtype: type, values: tuple[float, ...]) -> None:
    photo = tmp_path / "0.png"
    Image.new("RGB", (4, 4)).save(photo)
    deep = Image.fromarray(np.tile(np.array(values, dtype), (4, 1)))
    deep.save(tmp_path / "0.mask.png", "TIFF")
    assert [*masks.load(photo).crop((0, 0, 4, 1)).tobytes()] == [0, 2, 117, 255]


def test_a_mask_is_upright_as_its_photo(tmp_path: Path) -> None:
    photo = Image.open(draw(tmp_path, 0))
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.save(tmp_path / "turned.jpg", exif=exif)
    ImageOps.exif_transpose(photo)
    upright = mask_of().transpose(Image.Transpose.ROTATE_270)
    upright.save(tmp_path / "turned.mask.png")
    assert masks.load(tmp_path / "turned.jpg").tobytes() == upright.tobytes()


@pytest.mark.parametrize("settings", [
    {}, {"prepare__crop": "random", "prepare__variants": 4, "prepare__flip": True},
    {"prepare__buckets": True},
    {"prepare__augment": {"rotate": 20, "hue": 40}, "prepare__variants": 3},
], ids=["center", "random", "buckets", "turned"])  # fmt: skip
def test_the_stored_mask_covers_the_subject_of_each_crop(make: Make, folder: Path, settings: Any) -> None:
    """In pixel space a row's image is there to compare with."""
    cfg = configured(make, folder, "deepfloyd", prepare__resolution=32, loss__prior="none", **settings)
    found = rows(prepare(cfg))
    assert len(found) >= 4
    for row in found:
        red, green, _ = row.tensors["pixels"].float()
        subject = ((red > 180) & (green < 90)).float()  # few others are so red
        mask = row.tensors[MASK][0].float() / 255
        inside = (subject * (mask > 0.9)).sum() / (mask > 0.9).sum().clamp_min(1)
        assert inside > 0.97, row.meta
        assert (subject * (mask < 0.1)).sum() / subject.sum() < 0.25, row.meta


def test_masked_rows_alone_have_one_and_an_edited_mask_encodes_one_photo(
    make: Make, folder: Path, encoded: list[str]
) -> None:
    cfg = configured(make, folder)
    out = prepare(cfg)
    assert all(row.tensors[MASK].dtype == torch.uint8 for row in rows(out))
    assert all(row.tensors[MASK].shape == (1, *row.tensors["mean"].shape[1:]) for row in rows(out))
    assert not any(MASK in row.tensors for row in rows(out, "class"))
    encoded.clear()
    mask_of().transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(folder / "0.mask.png")
    with pytest.raises(ConfigError, match=r"the mask of 0\.png was edited"):
        Inputs.find(cfg)
    prepare(cfg)
    assert encoded == ["0.png"]


def test_the_loss_is_a_weighted_mean() -> None:
    error = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    one, signal = torch.ones(2, 1, 8, 8), torch.ones(2)
    torch.testing.assert_close(losses(error, signal, None, one), losses(error, signal))
    small = torch.zeros(2, 1, 8, 8)
    small[:, :, 2:4, 2:4] = 1
    torch.testing.assert_close(
        losses(error, signal, None, small), error[:, :, 2:4, 2:4].square().flatten(1).mean(1)
    )
    assert losses(error, signal, None, 0 * one).tolist() == [0, 0], "no subject in the crop: no loss"


@pytest.mark.parametrize("base", thinned(bases.OF_FAMILY, 4))
def test_no_gradient_from_outside_the_mask(make: Make, folder: Path, base: str) -> None:
    """With background 0 the loss does not see what is outside, and class images count whole."""
    own = folder.parent / "own"  # class images, which an upscaler needs
    own.mkdir()
    for number in range(4):
        draw(own, number)
    cfg = configured(make, folder, base, prepare__class_images=4, prepare__class_dir=str(own))
    out = prepare(cfg)
    model, inputs = build(cfg, out), Inputs.find(cfg)
    weights, family = {"instance": 1.0, "class": 1.0}, inputs.base.family
    stream = LatentStream(at(out), inputs.manifest, inputs.share, weights, seed=1, extra=family.row,
                          stored=family.stored, background=0.0)  # fmt: skip
    batch = next(stream)
    stream.close()
    seen: list[torch.Tensor] = []
    real = model.family.denoise

    def denoise(*args: Any) -> torch.Tensor:
        prediction = real(*args)
        prediction.retain_grad()
        seen.append(prediction)
        return prediction

    model.family = replace(model.family, denoise=denoise)
    model(batch).sum().backward()
    gradient = seen[-1].grad
    assert gradient is not None
    inside = batch.stored[MASK][:2] > 0
    assert inside.any() and not inside.all()
    assert (gradient[:2] * ~inside).abs().max() == 0
    assert (gradient[:2] * inside).abs().max() > 0
    assert (gradient[2:].abs().amax(1) > 0).float().mean() > 0.99, "class rows have no mask"


@pytest.mark.slow
def test_a_run_with_masks_and_one_whose_background_counts_fully(make: Make, folder: Path) -> None:
    runs = {}
    for name, changes in {
        "plain": {"prepare__mask": False}, "full": {"loss__mask": {"background": 1.0}},
        "masked": {}, "small": {"train__micro_batch": 1},
    }.items():  # fmt: skip
        run = folder.parent / "runs" / name
        cfg = configured(make, folder, run_dir=str(run), data__shards=str(run / "shards"), **changes)
        prepare(cfg)
        train(cfg)
        runs[name] = run
    assert relative(runs["plain"], runs["full"]) < 1e-3, "background 1 is no mask"
    assert relative(runs["plain"], runs["masked"]) > 5e-3
    assert relative(runs["masked"], runs["small"]) < 1e-3
    with pytest.raises(ConfigError, match=r"loss\.mask\.background was 0.1, is now 0.5"):
        run = runs["masked"]
        train(configured(make, folder, run_dir=str(run), data__shards=str(run / "shards"), train__steps=6,
                         loss__mask={"background": 0.5}))  # fmt: skip


def test_resident_rows_have_the_same_masks(make: Make, folder: Path) -> None:
    cfg = configured(make, folder)
    out = prepare(cfg)
    inputs = Inputs.find(cfg)
    streams = [
        LatentStream(at(out), inputs.manifest, inputs.share, {"instance": 1.0, "class": 1.0}, seed=1,
                     resident_gib=gib, background=0.2) for gib in (0.0, 1.0)
    ]  # fmt: skip
    for _ in range(4):
        one, other = map(next, streams)
        assert torch.equal(one.stored[MASK], other.stored[MASK])
        assert one.background.tolist() == pytest.approx([0.2, 0.2, 1.0, 1.0])
        assert one.places is not None and (one.places[2:] == 1).all()
        assert one.places[:2].min() == pytest.approx(0.2)
    for stream in streams:
        stream.close()


def test_reducing_keeps_shares() -> None:
    mask = Image.new("L", (16, 8))
    mask.paste(255, (0, 0, 4, 8))
    assert masks.reduced(mask, Size(1, 2))[0].tolist() == [[127, 0]] or masks.reduced(mask, Size(1, 2))[
        0
    ].tolist() == [[128, 0]]


@pytest.fixture(scope="session")
def clipseg() -> Path:
    """A CLIPSeg with random weights, whose masks therefore mean nothing."""
    from transformers import CLIPSegConfig, CLIPSegForImageSegmentation

    def make_it(folder: Path) -> None:
        words = bases.clip_words()
        text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                "vocab_size": len(words), "max_position_embeddings": 77, "projection_dim": 16}  # fmt: skip
        vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3, "image_size": 64,
                  "num_attention_heads": 2, "patch_size": 16, "projection_dim": 16}  # fmt: skip
        torch.manual_seed(0)
        model = CLIPSegForImageSegmentation(CLIPSegConfig(
            text_config=text, vision_config=vision, projection_dim=16, reduce_dim=16,
            extract_layers=[0, 1, 2], decoder_num_attention_heads=2, decoder_intermediate_size=16,
        ))  # fmt: skip
        torch.nn.init.constant_(model.decoder.transposed_convolution.bias, 0.3)
        model.save_pretrained(folder)
        words.save_pretrained(folder)

    return once("clipseg", make_it)


def test_a_model_makes_the_masks_that_are_missing_once(
    make: Make, folder: Path, clipseg: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = (folder / "0.mask.png").read_bytes()
    (folder / masks.FOLDER / "2.png").unlink()
    cfg = configured(make, folder, prepare__mask="auto", prepare__mask_model=str(clipseg))
    prepare(cfg)
    made = folder / masks.FOLDER / "2.png"
    assert Image.open(made).size == (96, 80) and Image.open(made).mode == "L"
    assert (folder / "0.mask.png").read_bytes() == kept, "a mask of the user's was replaced"
    assert sorted(path.name for path in (folder / masks.FOLDER).iterdir()) == ["2.png"], "made for others too"
    mask_of().save(made)  # corrected by hand
    corrected = made.read_bytes()
    prepare(cfg)
    assert made.read_bytes() == corrected
    made.unlink()
    with pytest.raises(ConfigError, match=r"nothing says what to find .*; set subject\.class_word"):
        prepare(configured(make, folder, prepare__mask="auto", subject={"token": "sks"}))
    draw(folder, 2).rename(folder / "2.webp")
    draw(folder, 2)
    with pytest.raises(ConfigError, match=r"photos .*2\.png and 2\.webp would both have .*masks/2\.png; ren"):
        prepare(cfg)
    assert not made.exists()
    (folder / "2.webp").unlink()
    with pytest.raises(ConfigError, match=r"prepare\.mask_model: .* is a clip_text_model, not a CLIPSeg"):
        whole = Path(cfg.model.path) / "text_encoder"
        prepare(configured(make, folder, prepare__mask="auto", prepare__mask_model=str(whole)))


def test_held_out_photos_are_measured_with_their_masks_and_noise_of_every_channel(
    make: Make, folder: Path
) -> None:
    cfg = configured(make, folder, prepare__held_out=1, prepare__class_held_out=2, validation__timesteps=2)
    manifest, storage = Manifest.read(at(out := prepare(cfg))), at(out)
    family = Inputs.find(cfg).base.family
    every = [
        row for role in ("instance", "class")
        for row in held_out_loss.rows(manifest, storage, family, role, cfg.validation.timesteps)
    ]  # fmt: skip
    batch = held_out_loss.batch_of(every, 0.25)
    assert batch.noise.shape == batch.posterior.shape == batch.stored["mean"].shape
    assert batch.background.tolist() == [0.25] * 2 + [1.0] * 4
    found = held_out_loss.measure(build(cfg, out), every, cfg)
    assert found["held_out_instance"] > 0 and found["held_out_prior"] > 0
