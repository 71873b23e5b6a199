"""Photos in their own shapes: the sizes that are stored, the batches, and the runs."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dbtrain.config import Config, Prepare
from dbtrain.data import photos as files
from dbtrain.data import sequence, sizes
from dbtrain.data.dataloader import LatentStream, Resident
from dbtrain.data.order import RankSlice
from dbtrain.data.shards import Manifest
from dbtrain.data.sizes import Size
from dbtrain.models import kernels
from dbtrain.models.base import Base
from dbtrain.models.families.space import unet_grids
from dbtrain.prepare.prepare import prepare
from dbtrain.runtime.errors import ConfigError, Preempted
from dbtrain.runtime.run_folder import RunFolder
from dbtrain.train.inputs import Inputs
from tests import bases
from tests.conftest import Make, at, dbtrain, draw_photo, thinned, train
from tests.networks import build, stream
from tests.runs import relative, tree

SHAPES = [(160, 120), (120, 160), (192, 108), (96, 96), (100, 230)]  # width, height


@pytest.fixture
def shapes(tmp_path: Path) -> Path:
    """Photos in five shapes, and a sixth that has the shape of the first."""
    folder = tmp_path / "shapes"
    folder.mkdir()
    for number, size in enumerate([*SHAPES, SHAPES[0]]):
        draw_photo(folder / f"{number}.png", number, size)
    return folder


CLOSE = 1e-4  # of adapters: AdamW's first steps enlarge the rounding of tiny gradients, more on some CPUs


def configured(make: Make, shapes: Path, base: str = "sd", **changes: Any) -> Config:
    """A run on these photos; class images are ours, which upscalers need."""
    own = shapes.parent / "own"
    own.mkdir(exist_ok=True)
    for number in range(6):
        draw_photo(own / f"{number}.png", number, [(120, 90), (90, 120), (80, 80)][number % 3])
    settings = {
        "model__path": str(bases.OF_FAMILY[base]()), "prepare__resolution": bases.SIDES[base],
        "prepare__photos": str(shapes), "prepare__buckets": True, "prepare__class_dir": str(own),
        "prepare__class_images": 6, "train__steps": 6, "train__checkpoint_every": 6,
        "train__micro_batch": 4, "train__global_batch": 4, "prepare__flip": True,
    }  # fmt: skip
    return make(**settings | changes)


@pytest.mark.parametrize(("side", "grids"), [
    (512, (64, 32, 16, 8)), (1024, (32, 16, 8)), (1024, (16,)), (768, (64, 32, 16, 8)), (64, (8, 4)),
])  # fmt: skip
def test_sizes_keep_what_photos_show_at_the_square_s_area(side: int, grids: tuple[int, ...]) -> None:
    chance = random.Random(0)
    for _ in range(100):
        tall, wide = chance.randint(500, 4000), chance.randint(500, 4000)
        if max(tall, wide) > sizes.THINNEST * min(tall, wide):
            continue
        size = sizes.closest(tall, wide, side, grids)
        assert sizes.kept(tall, wide, size) >= 0.95, (tall, wide, size)
        assert side**2 / sizes.AREAS <= size.area <= side**2 * sizes.AREAS
        assert all(length % grids[-1] == 0 for length in size)
    assert sizes.closest(3000, 3000, side, grids) == Size.square(side)


def test_a_photo_is_stored_at_all_resolutions_that_do_not_enlarge_it() -> None:
    def found(height: int, width: int, **settings: Any) -> list[str]:
        cfg = Prepare(photos="x", instance_prompt="x", **settings)
        return [str(size) for size in sizes.for_photo(height, width, cfg, (64, 32))]

    several = {"resolution": (768, 512)}
    assert found(1000, 2000, **several) == ["512x512", "768x768"]
    assert found(600, 700, **several) == ["512x512"]
    assert found(300, 300, **several) == ["512x512"]
    assert found(1000, 1500, **several, buckets=True) == ["640x448", "960x640"]
    assert found(1000, 1500, buckets=("768x512", "512x768")) == ["768x512"]
    assert found(1500, 1000, buckets=("768x512", "512x768")) == ["512x768"]
    with pytest.raises(ValueError, match=r"resolution is \[512, 768\], but buckets lists all sizes"):
        found(1, 1, **several, buckets=("768x512",))


def test_quotas_are_proportional_and_leave_no_size_empty() -> None:
    a, b, c = Size(1, 1), Size(1, 2), Size(2, 1)
    assert sizes.quotas({a: 3, b: 1, c: 1}, 200) == {a: 120, b: 40, c: 40}
    assert sizes.quotas({a: 300, b: 1}, 5) == {a: 4, b: 1}
    assert sizes.quotas({a: 1, b: 1, c: 1}, 7) == {a: 3, b: 2, c: 2}


def test_every_photo_is_stored_whole_and_every_batch_has_one_size(make: Make, shapes: Path) -> None:
    cfg = configured(make, shapes, prepare__class_dir=str(shapes.parent / "generated"))
    folder = prepare(cfg)
    manifest = Manifest.read(at(folder))
    grids = unet_grids(Base.find(cfg.model))
    wanted = {sizes.closest(height, width, 64, grids) for width, height in SHAPES}
    assert len(wanted) == 5 and set(manifest.sizes) == wanted
    for role in ("instance", "class"):
        assert {manifest.size(shard) for shard in manifest.roles[role]} == wanted, role
    stored = {
        row.meta["source"]: (manifest.size(shard), row)
        for shard in manifest.roles["instance"]
        for row in files_of(folder, manifest, shard)
    }
    for name, (size, row) in stored.items():
        tall, wide = row.meta["original_size"]
        assert sizes.kept(tall, wide, size) >= 0.95, name
        assert tuple(row.tensors["mean"].shape) == manifest.shape(size)

    share = RankSlice(4, 2)
    with_classes = {"instance": 1.0, "class": 1.0}
    stream = LatentStream(at(folder), manifest, share, with_classes, seed=3)
    seen: Counter[str] = Counter()
    try:
        for step in range(24):
            batches = [next(stream) for _ in range(stream.batches)]
            assert len({batch.noise.shape[1:] for batch in batches}) == 1, "a step has one size"
            positions = [(step, k) for k in range(4)]
            seen.update(stream.source("instance", step * 4 + k) for step, k in positions)
    finally:
        stream.close()
    assert set(seen.values()) == {16}, "each photo as often as the others, whatever its shape"


def files_of(folder: Path, manifest: Manifest, shard: Any) -> list[Any]:
    from dbtrain.data import shards

    return shards.read(at(folder), shard, manifest)


def test_a_rank_keeps_a_table_for_each_shape(make: Make, shapes: Path) -> None:
    folder = prepare(cfg := configured(make, shapes))
    manifest, share = Manifest.read(at(folder)), RankSlice(4, 4)
    plain, resident = (
        LatentStream(at(folder), manifest, share, {"instance": 1.0, "class": 1.0}, seed=cfg.seed,
                     resident_gib=gib) for gib in (0.0, 1.0)
    )  # fmt: skip
    assert isinstance(resident.resident, Resident)
    for _ in range(12):
        one, other = next(plain), next(resident)
        assert all(torch.equal(one.stored[name], other.stored[name]) for name in one.stored)
    plain.close(), resident.close()
    assert len(resident.resident.tables) == 5


@pytest.mark.parametrize("base", thinned(bases.OF_FAMILY, 6))
def test_every_family_trains_on_all_shapes_whatever_the_micro_batch(
    make: Make, tmp_path: Path, shapes: Path, base: str
) -> None:
    for micro in (4, 1):
        cfg = configured(make, shapes, base, train__micro_batch=micro, run_dir=str(tmp_path / f"m{micro}"),
                         train__log_every=1)  # fmt: skip
        prepare(cfg)
        train(cfg)
    assert len(Manifest.read(at(Path(cfg.data.shards))).sizes) >= 4
    # AdamW's first steps have one length for all gradients, and so enlarge the rounding of the least of them.
    assert relative(tmp_path / "m4", tmp_path / "m1") < 1e-3
    for one, other in zip(*(lines(tmp_path / f"m{micro}") for micro in (4, 1)), strict=True):
        assert one["rows"] == other["rows"]
        for name in ("loss", "grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=1e-5)


def lines(run: Path) -> list[Any]:
    """What a run told of each step."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_ranks_agree_on_the_sizes_and_a_resumed_run_goes_on_bit_for_bit(
    make: Make, tmp_path: Path, shapes: Path
) -> None:
    configured(make, shapes, train__micro_batch=1, train__steps=8, train__checkpoint_every=3)
    config = tmp_path / "c.yaml"
    assert dbtrain("prepare", config).returncode == 0
    for ranks in (1, 2, 4):
        micro = 4 // ranks
        done = dbtrain("train", config, f"run_dir={tmp_path / f'r{ranks}'}", f"train.micro_batch={micro}",
                       ranks=ranks)  # fmt: skip
        assert done.returncode == 0, done.stderr
    for ranks in (2, 4):
        assert relative(tmp_path / "r1", tmp_path / f"r{ranks}") < CLOSE
    stopped = Config.load(config, [f"run_dir={tmp_path / 'r'}", "train.micro_batch=4"])
    with pytest.raises(Preempted):
        train(stopped, until=5)
    train(stopped)
    whole, resumed = (tree(tmp_path / run / "checkpoints") for run in ("r1", "r"))
    newest = max(name.partition("/")[0] for name in whole)
    for name in whole:
        if name.startswith(newest) and name.endswith("safetensors"):
            assert whole[name] == resumed[name], name


@pytest.mark.slow
def test_square_class_images_are_batches_of_their_own(make: Make, shapes: Path) -> None:
    cfg = configured(make, shapes, prepare__class_buckets=False, train__micro_batch=2)
    folder = prepare(cfg)
    manifest = Manifest.read(at(folder))
    assert {manifest.size(shard) for shard in manifest.roles["class"]} == {Size.square(64)}
    assert sequence.apart(manifest, {"instance": "instance", "class": "class"})
    train(cfg)
    steps = lines(Path(cfg.run_dir))
    assert len(steps) == 6
    whole = configured(make, shapes, prepare__class_buckets=False, run_dir=str(shapes.parent / "whole"))
    train(whole)
    assert relative(Path(cfg.run_dir), Path(whole.run_dir)) < CLOSE


def test_sdxl_is_told_the_size_of_each_batch(make: Make, shapes: Path) -> None:
    cfg = configured(make, shapes, "sdxl")
    prepare(cfg)
    inputs = Inputs.find(cfg)
    stream = LatentStream(inputs.storage, inputs.manifest, inputs.share, {"instance": 1.0}, seed=1,
                          extra=inputs.base.family.row)  # fmt: skip
    for _ in range(10):
        batch = next(stream)
        cells = batch.noise.shape[2:]
        px = [[float(side) * 64 / inputs.manifest.latent_shape[-1] for side in cells]] * 4
        assert batch.extra["time_ids"][:, 4:].tolist() == px
    stream.close()


def test_settings_and_photos_that_cannot_be(make: Make, shapes: Path) -> None:
    with pytest.raises(ConfigError, match=r"class_images is 3, but the photos have 5 sizes; use at least 5"):
        prepare(configured(make, shapes, prepare__class_images=3))
    with pytest.raises(ConfigError, match=r"prepare\.buckets has 70x64, which the VAE of .* cannot divide"):
        prepare(configured(make, shapes, prepare__buckets=["70x64"]))
    with pytest.raises(ConfigError, match=r"prepare\.buckets"):
        configured(make, shapes, prepare__buckets=["wide"])
    cfg = configured(make, shapes)
    prepare(cfg)
    plain = configured(make, shapes, prepare__buckets=False)
    with pytest.raises(ConfigError, match=r"was made with prepare\.buckets True, now None"):
        Inputs.find(plain)


def test_photos_of_one_shape_need_no_sizes(make: Make, tmp_path: Path) -> None:
    """Squares are stored as before: the setting alone changes no shard."""
    folder = tmp_path / "squares"
    folder.mkdir()
    for number in range(3):
        draw_photo(folder / f"{number}.png", number, (90, 90))
    files_by = {}
    for buckets in (False, True):
        cfg = configured(make, folder, prepare__buckets=buckets, data__shards=str(tmp_path / f"s{buckets}"))
        files_by[buckets] = {
            name: data for name, data in tree(prepare(cfg)).items() if name != "manifest.json"
        }
    assert files_by[True] == files_by[False]


def test_a_crop_covers_its_size_exactly() -> None:
    cfg = Prepare(photos="x", instance_prompt="x")
    photo = Image.new("RGB", (301, 199), "white")
    size = Size(48, 72)
    (crop,) = files.crops("key", 199, 301, size, cfg, seed=0)
    assert files.pixels(photo, crop, size).shape == (3, 48, 72)
    assert files.pixels(photo, crop, size).min() == 1.0, "no border"


@pytest.mark.slow
def test_validation_images_have_the_sizes_in_turn(make: Make, shapes: Path) -> None:
    cfg = configured(make, shapes, train__steps=1, train__checkpoint_every=1, sample__batch=3,
                     validation__prompts=["a photo of sks dog"], validation__images=7)  # fmt: skip
    prepare(cfg)
    train(cfg)
    found = Manifest.read(at(Path(cfg.data.shards))).sizes_of("instance")
    for folder in RunFolder(cfg.run_dir).validations():
        for number, path in enumerate(sorted(folder.glob("??-seed*.png"))):
            with Image.open(path) as picture:
                assert Size(picture.height, picture.width) == found[number % len(found)], path


def test_held_out_photos_keep_their_shapes(make: Make, shapes: Path) -> None:
    cfg = configured(make, shapes, prepare__held_out=2, prepare__class_held_out=1, train__steps=1,
                     train__checkpoint_every=1, validation__timesteps=2)  # fmt: skip
    prepare(cfg)
    train(cfg)
    manifest = Manifest.read(at(Path(cfg.data.shards)))
    assert set(manifest.sizes_of("class")) == set(manifest.sizes_of("instance"))
    (line, *_) = RunFolder(cfg.run_dir).table("validation").read_text().splitlines()
    assert "held_out_instance" in line and "held_out_prior" in line


@pytest.mark.slow
def test_the_denoiser_is_compiled_once_a_size(make: Make, shapes: Path) -> None:
    """With code of its own for each: a second shape would else make it general, and slower."""
    for number in (0, 1, 4, 5):
        (shapes / f"{number}.png").unlink()
    cfg = configured(make, shapes, model__path=str(bases.sd(size="slim")))
    folder = prepare(cfg)
    model = build(cfg, folder)
    made: list[tuple[int, ...]] = []

    def backend(graph: Any, inputs: Any) -> Any:
        made.append(next(tuple(one.shape) for one in inputs if getattr(one, "ndim", 0) == 4))
        return graph.forward

    kernels.compile_module(model.denoiser, True, backend=backend, dynamic=False)
    batches = stream(cfg, folder)
    with torch.no_grad():
        for _ in range(8):
            model(next(batches))
    batches.close()
    assert len(made) == len(Manifest.read(at(folder)).sizes) == 2
    torch._dynamo.reset()
