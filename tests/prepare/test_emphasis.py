"""Photos in folders, seen more or less often: shards, batches, gradients, and what a page says."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from dbtrain.config import Config
from dbtrain.data import shards
from dbtrain.data.order import RankSlice
from dbtrain.data.shards import MASK, Manifest
from dbtrain.doctor.doctor import check
from dbtrain.doctor.dry_run import shortened
from dbtrain.fleet import listing
from dbtrain.prepare.prepare import prepare
from dbtrain.report import crops
from dbtrain.runtime.errors import ConfigError, Preempted
from dbtrain.runtime.run_folder import RunFolder
from dbtrain.train import loop
from dbtrain.train.inputs import Inputs
from tests.conftest import Make, at, draw_photo
from tests.networks import awake, build, stream

PLACES = {"2_close/a.png": 2, "2_close/b.png": 2, "6_far/a.png": 6, "c.png": 1}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A tree of kohya's: two photos of one name, each with a caption and a mask of its own."""
    root = tmp_path / "tree"
    for number, name in enumerate(PLACES):
        (path := root / name).parent.mkdir(parents=True, exist_ok=True)
        draw_photo(path, number)
        path.with_suffix(".txt").write_text(f"sks dog, {name}")
        Image.new("L", (96, 80), 40 * number + 40).save(path.with_name(f"{path.stem}.mask.png"))
    (root / "0_off").mkdir()
    draw_photo(root / "0_off" / "d.png", 9)
    return root


def configured(make: Make, tree: Path, **changes: Any) -> Config:
    settings = {"prepare__photos": str(tree), "prepare__subfolders": True, "train__micro_batch": 2}
    return make(**settings | changes)


def seen(cfg: Config, count: int, **options: Any) -> Counter[str]:
    """How often each photo is among the first rows."""
    found = stream(cfg, Path(cfg.data.shards), **options)
    try:
        return Counter(found.source("instance", position) for position in range(count))
    finally:
        found.close()


def files(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.name != shards.MANIFEST}


def test_a_tree_of_kohya_s(make: Make, tree: Path, encoded: list[str], caplog: Any) -> None:
    cfg = configured(make, tree, prepare__captions=True, prepare__mask=True)
    with caplog.at_level(logging.INFO, "dbtrain"):
        manifest = Manifest.read(at(out := prepare(cfg)))
    assert "4 instance crops, 11 in an epoch, " in caplog.text
    assert sorted(encoded[:4]) == ["a.png", "a.png", "b.png", "c.png"]
    rows = [(row, shard.emphasis(k).repeats) for shard in manifest.roles["instance"]
            for k, row in enumerate(shards.read(at(out), shard, manifest))]  # fmt: skip
    assert {row.meta["source"]: count for row, count in rows} == PLACES
    for row, _ in rows:  # what lies beside each photo is its own
        name = row.meta["source"]
        assert manifest.prompts.texts[row.meta["prompt"]] == f"sks dog, {name}"
        assert row.tensors[MASK].unique().tolist() == [40 * list(PLACES).index(name) + 40]
    assert seen(cfg, 11) == PLACES and seen(cfg, 33) == {name: 3 * count for name, count in PLACES.items()}
    assert all(not shard.repeats and not shard.weights for shard in manifest.roles["class"])
    made = manifest.sources["instance"]
    assert {name: one.repeats for name, one in made.items()} == PLACES

    # What changed since is named by its path.
    (tree / "6_far" / "a.txt").write_text("another")
    with pytest.raises(ConfigError, match=r"the caption of 6_far/a\.png was edited"):
        Inputs.find(cfg)
    (tree / "6_far").rename(tree / "5_far")
    with pytest.raises(ConfigError, match=r"5_far/a\.png was added, 6_far/a\.png was removed"):
        Inputs.find(cfg)
    encoded.clear()
    prepare(cfg)
    assert encoded == [] and seen(cfg, 10)["5_far/a.png"] == 5


def test_other_repeats_and_weights_write_the_manifest_only(
    make: Make, tree: Path, encoded: list[str]
) -> None:
    out = prepare(configured(make, tree, prepare__repeats={"*_*": 1}))
    manifest, plain, there = out / shards.MANIFEST, (out / shards.MANIFEST).read_text(), files(out)
    values = json.loads(plain)
    keys = {key for role in values["roles"].values() for shard in role for key in shard}
    assert not {"repeats", "weights"} & (keys | values["request"].keys() - {"repeats"})
    encoded.clear()
    cfg = configured(make, tree, prepare__repeats={"*_*": 1, "c.png": 4}, prepare__weights={"2_close": 0.5})
    assert cfg.prepare
    with pytest.raises(
        ConfigError, match=r"prepare\.repeats {'\*_\*': 1}, now {.*'c.png': 4}.*rerun: dbtrain pre"
    ):
        Inputs.find(cfg)
    prepare(cfg)
    assert encoded == [] and files(out) == there and manifest.read_text() != plain
    assert seen(cfg, 7) == {name: 4 if name == "c.png" else 1 for name in PLACES}
    Inputs.find(cfg)
    one, other = (
        Config.from_dict(cfg.model_dump() | {"prepare": cfg.prepare.model_dump() | {"repeats": repeats}})
        for repeats in ({"c.png": 4, "*": 1}, {"*": 1, "c.png": 4})
    )
    prepare(one)
    with pytest.raises(ConfigError, match=r"c\.png is seen more or less often"):
        Inputs.find(other)
    prepare(configured(make, tree, prepare__repeats={"*_*": 1}))
    assert manifest.read_text() == plain and files(out) == there


def test_a_weight_scales_the_gradient_of_its_photo_alone(make: Make, tree: Path) -> None:
    cfg = configured(make, tree, prepare__repeats={"*": 1}, train__global_batch=2)
    plain = Manifest.read(at(out := prepare(cfg)))
    model = awake(build(cfg, out))
    before = stream(cfg, out)
    batch, sources = next(before), [before.source("instance", position) for position in (0, 1)]
    before.close()

    def gradient(weight: torch.Tensor) -> torch.Tensor:
        model.zero_grad()
        (weight * model(batch)).sum().backward()
        return torch.cat([p.grad.flatten() for p in model.trainable().values() if p.grad is not None])

    whole, one = gradient(batch.weight), gradient(batch.weight * torch.tensor([1.0, 0, 0, 0]))
    cfg = configured(
        make, tree, prepare__repeats={"*": 1}, prepare__weights={sources[0]: 2}, train__global_batch=2
    )
    prepare(cfg)
    after = stream(cfg, out)
    weighted = next(after)
    after.close()
    assert torch.equal(weighted.weight, batch.weight * torch.tensor([2.0, 1, 1, 1])), "its class row is not"
    assert torch.equal(weighted.noise, batch.noise) and weighted.seen == batch.seen
    torch.testing.assert_close(gradient(weighted.weight), whole + one)
    assert (whole + one - whole).abs().max() > 1e-4
    assert plain.roles["class"] == Manifest.read(at(out)).roles["class"]


def test_ranks_together_see_what_one_sees_and_resident_rows_weigh_the_same(make: Make, tree: Path) -> None:
    out = prepare(cfg := configured(make, tree, prepare__weights={"*.png": 2, "6_far": 3}))

    def weights(world: int, **options: Any) -> list[list[float]]:
        """Of the instance rows of each of some steps."""
        ranks = [stream(cfg, out, share=RankSlice(4, 1, rank, world), **options) for rank in range(world)]
        try:
            return [
                [float(next(one).weight[0]) for one in ranks for _ in range(one.batches)] for _ in range(6)
            ]
        finally:
            for one in ranks:
                one.close()

    found = weights(1)
    assert {weight for step in found for weight in step} == {0.5, 0.75}
    assert found == weights(2) == weights(4) == weights(1, resident_gib=1.0)


def test_in_shapes_and_with_held_out_photos_each_is_seen_as_often_as_it_says(make: Make, tree: Path) -> None:
    draw_photo(tree / "2_close" / "b.png", 1, (80, 160))
    cfg = configured(make, tree, prepare__buckets=True, prepare__class_dir=str(tree.parent / "own"),
                     train__global_batch=1, train__micro_batch=1, prepare__held_out=1)  # fmt: skip
    manifest = Manifest.read(at(prepare(cfg)))
    assert len(manifest.sizes_of("instance")) == 2, "b.png has a shape of its own"
    (held_out,) = manifest.roles["instance-held-out"]
    assert not held_out.repeats
    trained = {row.meta["source"] for shard in manifest.roles["instance"]
               for row in shards.read(at(Path(cfg.data.shards)), shard)}  # fmt: skip
    epoch = sum(shard.epoch for shard in manifest.roles["instance"])
    counts = seen(cfg, 20 * epoch)
    for name in trained:
        assert counts[name] / counts["2_close/b.png"] == pytest.approx(PLACES[name] / PLACES["2_close/b.png"])


@pytest.mark.parametrize("settings", [
    {"crop": "random", "variants": 6, "flip": True}, {"resolution": [32, 64]},
])  # fmt: skip
def test_photos_with_fewer_crops_or_sizes_are_seen_as_often(
    make: Make, tmp_path: Path, settings: dict[str, Any]
) -> None:
    (folder := tmp_path / "photos").mkdir()
    for number, size in enumerate(((64, 64), (65, 64), (128, 64), (40, 50))):
        draw_photo(folder / f"{number}.png", number, size)
    changes = {f"prepare__{name}": value for name, value in settings.items()}
    cfg = make(prepare__photos=str(folder), **changes)
    manifest = Manifest.read(at(prepare(cfg)))
    rows = [len(shard.keys) for shard in manifest.roles["instance"]]
    epoch = sum(shard.epoch for shard in manifest.roles["instance"])
    assert sum(rows) < epoch
    counts = seen(cfg, 4 * epoch)
    assert set(counts.values()) == {epoch} and len(counts) == 4


def test_a_run_goes_on_bit_by_bit_and_refuses_other_repeats(make: Make, tree: Path) -> None:
    settings = {"prepare__weights": {"c.png": 3}, "loss__prior": "none", "train__steps": 2}
    out = prepare(make_one := configured(make, tree, **settings))
    lines = []
    for name, stops in (("whole", [None]), ("parts", [1, None])):
        cfg = make_one.override(f"run_dir={tree.parent / name}")
        for until in stops:
            with contextlib.suppress(Preempted):
                loop.train(cfg, until)
        lines.append(RunFolder(cfg.run_dir).table("metrics").read_text())
    assert lines[0] == lines[1] and lines[0].count("\n") == 2
    other = configured(make, tree, prepare__repeats={"c.png": 2}, **settings).override(
        f"run_dir={cfg.run_dir}"
    )
    assert prepare(other) == out
    with pytest.raises(ConfigError, match=r"prepare\.repeats was {}, is now {'c\.png': 2}"):
        loop.train(other.override("train.steps=6"))


def test_of_several_subjects_one_has_what_a_pattern_means(make: Make, tree: Path) -> None:
    other = tree.parent / "other" / "3_y"
    other.mkdir(parents=True)
    draw_photo(other / "x.png", 7)
    several = [{"token": token, "class_word": "dog", "photos": str(folder)}
               for token, folder in (("sks", tree), ("xyz", other.parent))]  # fmt: skip
    settings = {"subjects": several, "prepare__instance_prompt": "a photo of {}", "loss__prior": "none",
                "subject": {}}  # fmt: skip
    manifest = Manifest.read(at(prepare(configured(make, tree, **settings, prepare__repeats={"6_far": 4}))))
    first, second = ([shard for shard in manifest.roles["instance"] if shard.part == part] for part in (0, 1))
    assert sum(shard.epoch for shard in first) == 9 and not second[0].repeats
    with pytest.raises(ConfigError, match=r"'7_far' matches no photo; did you mean '6_far'"):
        prepare(configured(make, tree, **settings, prepare__repeats={"7_far": 4}))


def test_what_is_refused(make: Make, tree: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"prepare\.class_dir is .*6_far, in prepare\.photos .*use a folder outs"
    ):
        configured(make, tree, prepare__class_dir=str(tree / "6_far"))
    with pytest.raises(ConfigError, match=r"'up' matches no photo; the folders are 2_close, 6_far"):
        prepare(configured(make, tree, prepare__weights={"up": 2}))
    with pytest.raises(ConfigError, match=r"photos is '.*x\.tar', no folder; set it to false"):
        prepare(configured(make, (tree / "x.tar")))
    (tree / "c.png").unlink()
    told = r"there are no photos in .*, but 2 in its folder '2_close'; use that, or set prepare\.subfol"
    with pytest.raises(ConfigError, match=told):
        prepare(configured(make, tree, prepare__subfolders=False))
    values = json.loads((prepare(configured(make, tree)) / shards.MANIFEST).read_text())
    shard = values["roles"]["instance"][0]
    for wrong, told in (([1], "of other rows than keys"), ([0] * 4, "greater than or equal to 1"),
                        ([2000] * 4, "less than or equal to 1000"), ([1000] * 1001, "too many")):  # fmt: skip
        keys = [str(number) for number in range(max(4, len(wrong)))]
        with pytest.raises(ValueError, match=told):
            shards.Shard.model_validate(shard | {"keys": keys, "repeats": wrong})


def test_doctor_and_report_say_it(make: Make, tree: Path) -> None:
    cfg = configured(
        make, tree, prepare__weights={"6_far": 0.5}, prepare__class_prompt=None, train__steps=100
    )
    lines = [(name, one.level, one.what) for name, one in check(tree.parent / "c.yaml")]
    assert [(level, what) for name, level, what in lines if name == "repeats"] == [
        ("ok", "once an epoch: c.png"), ("ok", "2 times an epoch: 2_close/a.png, 2_close/b.png"),
        ("ok", "6 times an epoch, loss × 0.5: 6_far/a.png"),
    ]  # fmt: skip
    said = {name: what for name, _, what in lines}
    assert "each of 4 photos 36.4 to 218 times" in said["passes"]
    assert any("the folder '0_off' with 1 photos is not read" in what for *_, what in lines)
    prepare(cfg)
    (sheet,) = crops.data_sheets([SimpleNamespace(cfg=cfg, label="one")], 4)  # type: ignore[list-item]
    given, stored = sheet.parts
    captions = {picture.captions[0]: picture.captions for picture in given.pictures}
    assert list(captions) == list(PLACES)
    assert captions["6_far/a.png"][2:] == ["6 times an epoch", "loss × 0.5"]
    assert {one.captions[0]: one.captions[3:-1] for one in stored.pictures} == {
        "2_close/a.png": ["2 times an epoch"], "2_close/b.png": ["2 times an epoch"], "c.png": [],
        "6_far/a.png": ["6 times an epoch", "loss × 0.5"],
    }  # fmt: skip


def test_a_dry_run_has_copies_without_folders(make: Make, tree: Path, tmp_path: Path) -> None:
    cfg = configured(make, tree, prepare__captions=True, prepare__mask=True, prepare__weights={"2_close": 2})
    (folder := tmp_path / "scratch").mkdir()
    short = shortened(cfg, folder).prepare
    assert short and (short.subfolders, short.repeats, short.weights) == (False, {}, {})
    assert sorted(path.name for path in Path(short.photos).iterdir()) == [
        "0-a.mask.png", "0-a.png", "0-a.txt", "1-b.mask.png", "1-b.png", "1-b.txt",
    ]  # fmt: skip


def test_a_fleet_of_trees(make: Make, tree: Path) -> None:
    subjects = tree.parent / "subjects"
    shutil.copytree(tree, subjects / "rex")
    shutil.copytree(tree / "6_far", subjects / "bella" / "6_far")
    configured(make, tree, subject={})
    found = listing.read(tree.parent / "c.yaml", subjects)
    assert [(one.name, one.problem) for one in found] == [("bella", None), ("rex", None)]
    table = tree.parent / "list.yaml"
    table.write_text("- {photos: subjects/rex, prepare: {repeats: {2_close: 5}}}\n"
                     "- {photos: subjects/bella, prepare.subfolders: false}\n")  # fmt: skip
    rex, bella = listing.read(tree.parent / "c.yaml", table)
    assert rex.cfg and rex.cfg.prepare and rex.cfg.prepare.repeats == {"2_close": 5}
    assert bella.problem and "but 1 in its folder '6_far'" in bella.problem
