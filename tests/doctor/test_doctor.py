"""Before a job is queued: every planted fault is found, told with a cure, and hides no other."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image, ImageFilter
from safetensors.torch import load_file

from dbtrain.config import Config
from dbtrain.doctor import disk, doctor
from dbtrain.doctor.case import Case, Finding
from dbtrain.models.base import Base
from dbtrain.prepare import duration
from dbtrain.runtime import lock
from dbtrain.runtime.errors import ConfigError
from tests import bases
from tests.conftest import Make, config_in, dbtrain, draw_photo, slow, train

Rows = list[tuple[str, Finding]]


@dataclass
class Site:
    """A good config with files of its own, for a fault to be planted into."""

    folder: Path
    photos: Path
    changes: dict[str, Any]
    patch: pytest.MonkeyPatch
    prepared: Path  # shards of the photos at `originals`
    originals: Path
    trained: Path
    overrides: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)

    def base(self) -> Path:
        """A copy of the base, to be damaged."""
        copy = self.folder / "base"
        shutil.copytree(bases.sd(), copy)
        self.changes["model__path"] = str(copy)
        return copy

    def shards(self) -> Path:
        """Shards of the config, with the photos that they were made of."""
        self.changes["prepare__photos"] = str(self.originals)
        return Path(shutil.copytree(self.prepared, self.folder / "shards"))

    def run(self) -> None:
        """The folder of a run that was trained on those shards."""
        self.shards()
        shutil.copytree(self.trained, self.folder / "run")
        self.changes |= {"train__steps": 1, "optim__warmup_steps": 0}

    def photo(self) -> Image.Image:
        return Image.open(self.photos / "2.png")

    def env(self, **values: str) -> None:
        for name, value in values.items():
            self.patch.setenv(name, value)


def change(path: Path, **values: Any) -> None:
    """Put values into a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def config(**values: Any) -> Callable[[Site], None]:
    return lambda site: site.changes.update(values)


def overrides(*items: str) -> Callable[[Site], None]:
    return lambda site: site.overrides.extend(items)


def environment(**values: str) -> Callable[[Site], None]:
    return lambda site: site.env(**values)


def no_photos(site: Site) -> None:
    for path in site.photos.iterdir():
        path.unlink()


def few_photos(site: Site) -> None:
    for number in (0, 1, 3):
        (site.photos / f"{number}.png").unlink()


def corrupt_photo(site: Site) -> None:
    path = site.photos / "3.png"
    path.write_bytes(path.read_bytes()[:300])


def tiny_photo(site: Site) -> None:
    site.photo().resize((50, 40)).save(site.photos / "5.png")


def blurred_photo(site: Site) -> None:
    draw_photo(site.photos / "5.png", 5, (512, 512))
    Image.open(site.photos / "5.png").filter(ImageFilter.GaussianBlur(12)).save(site.photos / "5.png")


def same_photo(site: Site) -> None:
    shutil.copyfile(site.photos / "2.png", site.photos / "5.png")


def near_photo(site: Site) -> None:
    site.photo().resize((192, 160)).save(site.photos / "5.jpg", quality=60)


def long_photo(site: Site) -> None:
    wide = Image.new("RGB", (300, 90), "grey")
    wide.paste(site.photo(), (204, 5))
    wide.save(site.photos / "5.png")


def a_missing_caption(site: Site) -> None:
    site.changes["prepare__captions"] = True
    for path in sorted(site.photos.glob("*.png"))[1:]:
        path.with_suffix(".txt").write_text("a photo of sks dog outside")


def captions(text: str) -> Callable[[Site], None]:
    def plant(site: Site) -> None:
        site.changes["prepare__captions"] = True
        for path in site.photos.glob("*.png"):
            path.with_suffix(".txt").write_text(text)

    return plant


def captions_unread(site: Site) -> None:
    captions("a photo of sks dog")(site)
    del site.changes["prepare__captions"]


def photos_in_subfolder(site: Site) -> None:
    (site.photos / "10_sks dog").mkdir()
    for path in site.photos.glob("*.png"):
        path.rename(site.photos / "10_sks dog" / path.name)


def more_photos_in_subfolder(site: Site) -> None:
    shutil.copytree(site.photos, site.photos / "more")


def raw_photo(site: Site) -> None:
    (site.photos / "6.dng").write_bytes(b"raw")


def heic_photo(site: Site) -> None:
    site.patch.setattr("dbtrain.data.photo_files._formats", lambda kind: ["PNG"])  # without pillow-heif
    (site.photos / "6.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")


def broken_profile(site: Site) -> None:
    site.photo().save(site.photos / "5.png", icc_profile=b"no profile")


def class_dir_is_photos(site: Site) -> None:
    site.changes["prepare__class_dir"] = str(site.photos)


def class_dir_misspelt(site: Site) -> None:
    shutil.copytree(site.photos, site.folder / "dogs")
    site.changes["prepare__class_dir"] = str(site.folder / "dog")


def changed_photo(site: Site) -> None:
    manifest = json.loads((site.shards() / "manifest.json").read_text())
    next(iter(manifest["sources"]["instance"].values()))["sha256"] = "0" * 64
    change(site.folder / "shards" / "manifest.json", **manifest)


def corrupt_class_image(site: Site) -> None:
    folder = site.folder / "class"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"no picture")
    site.changes["prepare__class_dir"] = str(folder)


def pickled_weights(site: Site) -> None:
    unet = site.base() / "unet"
    next(unet.glob("*.safetensors")).rename(unet / "diffusion_pytorch_model.bin")


def another_variant(site: Site) -> None:
    unet = site.base() / "unet"
    next(unet.glob("*.safetensors")).rename(unet / "diffusion_pytorch_model.fp16.safetensors")


def truncated_weights(site: Site) -> None:
    path = next((site.base() / "vae").glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1000])


def incomplete_shards_of_weights(site: Site) -> None:
    unet = site.base() / "unet"
    path = next(unet.glob("*.safetensors"))
    path.rename(unet / "diffusion_pytorch_model-00001-of-00002.safetensors")
    names = {"a": "diffusion_pytorch_model-00001-of-00002.safetensors",
             "b": "diffusion_pytorch_model-00002-of-00002.safetensors"}  # fmt: skip
    (unet / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def no_vocabulary(site: Site) -> None:
    for path in (site.base() / "tokenizer").iterdir():
        if path.name != "tokenizer_config.json":
            path.unlink()


def no_component(site: Site) -> None:
    shutil.rmtree(site.base() / "vae")


def parts_of_other_bases(site: Site) -> None:
    change(site.base() / "unet" / "config.json", cross_attention_dim=48)


def not_on_the_hub_s_cache(offline: bool) -> Callable[[Site], None]:
    def plant(site: Site) -> None:
        site.patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
        site.changes["model__path"] = "nobody/no-such-model"

    return plant


def named_turbo(site: Site) -> None:
    site.changes["model__path"] = str(site.base().rename(site.folder / "some-turbo"))


def training_adapter(name: str, offline: bool = False) -> Callable[[Site], None]:
    def plant(site: Site) -> None:
        site.patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
        site.changes["model__training_adapter"] = name

    return plant


def truncated_shard(site: Site) -> None:
    path = next(site.shards().glob("instance-*.tar"))
    path.write_bytes(path.read_bytes()[:-100])


def missing_shard(site: Site) -> None:
    next(site.shards().glob("class-*.tar")).unlink()


def shards_of_another_base(site: Site) -> None:
    site.shards()
    encoder = next((site.base() / "text_encoder").glob("*.safetensors"))
    data = bytearray(encoder.read_bytes())
    data[-1] ^= 1
    encoder.write_bytes(bytes(data))


def shards_of_other_settings(site: Site) -> None:
    site.shards()
    site.changes["prepare__flip"] = True


def many_ranks_and_no_memory(site: Site) -> None:
    site.shards()
    site.changes |= {"data__cache_gib": 1e-6, "train__global_batch": 4}
    site.options["ranks"] = 4


def file_for_run_dir(site: Site) -> None:
    (site.folder / "run").write_text("a file")


def file_for_shards(site: Site) -> None:
    (site.folder / "shards").write_text("a file")


def run_of_another_seed(site: Site) -> None:
    site.run()
    site.changes["seed"] = 7


def damaged_checkpoint(site: Site) -> None:
    site.run()
    next((site.folder / "run" / "checkpoints").glob("*/optimizer.safetensors")).write_bytes(b"")


def locked(site: Site) -> None:
    mine = lock.Lock.take(site.folder / "run")
    assert mine
    site.options["release"] = mine


def locked_elsewhere(site: Site) -> None:
    locked(site)
    change(site.folder / "run" / lock.NAME, machine="another", host="node7")


def full_disk(site: Site) -> None:
    usage = shutil.disk_usage(site.folder)
    site.patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000_000))


def no_push(token: str | None) -> Callable[[Site], None]:
    def plant(site: Site) -> None:
        site.patch.setattr("huggingface_hub.get_token", lambda: token)
        site.patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        site.changes["hub__repo"] = "me/dog"

    return plant


def no_compiler(site: Site) -> None:
    site.changes["train__compile"] = True
    site.env(PATH=str(site.folder), CXX="none++", CC="none")


def no_wandb(site: Site) -> None:
    site.changes["train__wandb"] = "dogs"
    site.patch.setitem(sys.modules, "wandb", None)


def old_package(site: Site) -> None:
    site.patch.setattr("importlib.metadata.requires", lambda name: ["torch>=99", "no-such-package>=1"])


def old_gpu(site: Site) -> None:
    about = type("About", (), {"name": "Tesla T4", "total_memory": 16 << 30})
    site.patch.setattr(torch.cuda, "is_available", lambda: True)
    site.patch.setattr(torch.cuda, "device_count", lambda: 1)
    site.patch.setattr(torch.cuda, "get_device_properties", lambda device: about)
    site.patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    site.patch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    site.changes["train__precision"] = "bf16"


def graph_elsewhere(site: Site) -> None:
    site.changes["train__cuda_graph"] = True
    site.options["gib"] = 24.0


def upscaler_without_class_images(site: Site) -> None:
    site.changes |= {"model__path": str(bases.if_2()), "prepare__resolution": 32}


def out_of_time(site: Site) -> None:
    site.env(SLURM_JOB_ID="7", SLURM_JOB_END_TIME=str(int(time.time()) + 60))


RANK = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
TASKS = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_GPUS_ON_NODE": "4",
}
SAME = {"prepare__instance_prompt": "a photo of a dog"}

# (what is planted, check that finds it, level, words of what it says)
FAULTS: list[Any] = [
    (overrides("train.step=3"), "config", "error", "unknown key 'train.step'"),
    (config(optim__lr=-1.0), "config", "error", "optim.lr is -1"),
    (config(**SAME), "prompts", "warning", "has the same words"),
    (config(prepare__class_prompt="a photo of a dog outside"), "prompts", "", "'a photo of sks dog'"),
    (config(prepare__instance_prompt="a dog", prepare__class_prompt="a big dog"), "prompts", "warning",
     "has no word"),
    (config(prepare__class_prompt="a photo of an animal"), "prompts", "warning", "shares no class word"),
    (config(validation__prompts=["a photo of zwx cat"]), "prompts", "warning",
     "validation.prompts: 'a photo of zwx cat' has no word of 'a photo of sks dog'"),
    (config(sample__prompts=["a dog on the moon"]), "prompts", "warning", "none has 'sks'"),
    (config(subject={"token": "zwx"}), "prompts", "warning",
     "subject.token is 'zwx', but prepare.instance_prompt is"),
    (config(model__path="tiny", prepare__resolution=512), "model", "warning", "a toy that knows drawings"),
    (config(loss__prior_weight=0.0), "prompts", "warning", "loss.prior_weight is 0"),
    (config(loss__prior="prediction", loss__prior_weight=0.0), "prompts", "warning",
     "nothing preserves the class"),
    (config(loss__prior="prediction"), "class images", "", "none needed: loss.prior is prediction"),
    (config(optim__lr=0.1), "learning rates", "warning", "optim.lr is 0.1"),
    (config(optim={"name": "prodigy", "lr": 0.1}), "learning rates", "warning", "factors of Prodigy's rate"),
    (config(optim={"name": "prodigy", "lr": 1e-4}), "config", "error", "optim.lr is 0.0001, but for prodigy"),
    (config(adapter__ranks={"to_w": 2}), "adapter", "error", "'to_w' fits no module with an adapter"),
    (config(train__steps=4), "passes", "warning", "too rarely"),
    (config(train__steps=100_000), "passes", "warning", "overfits"),
    (config(prepare__photos="no/such/folder"), "photos", "error", "is not a directory"),
    (no_photos, "photos", "error", "there are no photos"),
    (few_photos, "photos", "warning", "2 photos are few"),
    (corrupt_photo, "photos", "error", "cannot read photo"),
    (tiny_photo, "photos", "warning", "5.png (50 x 40)"),
    (overrides("prepare.augment.hue=90", "prepare.augment.rotate=5", "prepare.variants=4"),
     "photos", "warning", "prepare.augment is strong: hue 90;"),
    (overrides("prepare.augment.rotate=5"), "photos", "warning", "one variant of each photo"),
    (blurred_photo, "photos", "warning", "blurred (sharpness below 110): 5.png"),
    (same_photo, "photos", "warning", "2.png = 5.png"),
    (near_photo, "photos", "warning", "2.png ~ 5.jpg"),
    (long_photo, "photos", "warning",
     "5.png (at 74,0 of 213 x 64 px; 70% is cut off, a square closer to the right"),
    (a_missing_caption, "captions", "error", "has no caption 0.txt"),
    (captions("a dog"), "captions", "warning", "5 of 5 captions do not name the subject ('sks')"),
    (captions("sks dog, " + "very " * 40), "captions", "warning", "tokens of 32)"),
    (config(prepare__instance_prompt="a photo of sks dog " + "very " * 40), "prompt length", "warning",
     "no effect: prepare.instance_prompt ("),
    (config(prepare__class_prompt="a photo of a dog " + "very " * 40), "prompt length", "warning",
     "prepare.class_prompt ("),
    (config(sample__prompts=["a sks dog", "a sks dog " + "very " * 40]), "prompt length", "warning",
     "no effect: sample.prompts, no. 2 ("),
    (config(validation__prompts=["a sks dog " + "very " * 40]), "prompt length", "warning",
     "validation.prompts, no. 1 ("),
    (config(evaluation__prompts=["a {} " + "very " * 40]), "prompt length", "warning",
     "evaluation.prompts, no. 1 ("),
    (config(prepare__memory_gib=1e-6), "text encoders", "error", "need 0.01 GiB even layer by layer"),
    (captions_unread, "photos", "warning", "captions are not read: 0.txt"),
    (photos_in_subfolder, "photos", "error", "but 5 in its folder '10_sks dog'"),
    (more_photos_in_subfolder, "photos", "warning", "the folder 'more' with 5 photos is not read"),
    (raw_photo, "photos", "warning", "neither photos nor their captions: 6.dng"),
    (heic_photo, "photos", "error", "6.heic is a file of format HEIC"),
    (broken_profile, "photos", "warning", "5.png: its color profile cannot be used"),
    (class_dir_is_photos, "class images", "error", "the folder of prepare.photos"),
    (class_dir_misspelt, "class images", "warning", "'dogs' beside it has photos"),
    (changed_photo, "shards", "error", "was replaced"),
    (corrupt_class_image, "class images", "error", "a.png"),
    (upscaler_without_class_images, "class images", "error", "cannot generate class images"),
    (config(prepare__held_out=5), "passes", "error", "is 5, but there are only 5 instance images"),
    (config(prepare__class_held_out=9), "class images", "error", "leaves none to train on"),
    (config(validation__prompts=["a dog"], sample__low_res=["small.png"]), "images", "error",
     "sample.low_res has 1 images"),
    (pickled_weights, "model", "error", "only as a pickle (diffusion_pytorch_model.bin)"),
    (another_variant, "model", "error", "no weights of variant null"),
    (truncated_weights, "model", "error", "is damaged or truncated"),
    (incomplete_shards_of_weights, "model", "error", "is missing 1 of 2 files"),
    (no_vocabulary, "model", "error", "has no vocabulary"),
    (no_component, "model", "error", "no component 'vae'"),
    (parts_of_other_bases, "model", "error", "does not fit together"),
    (config(model__path="/no/such/model"), "model", "error", "neither a local folder nor the name of"),
    (not_on_the_hub_s_cache(offline=True), "model", "error", "and HF_HUB_OFFLINE is set"),
    (not_on_the_hub_s_cache(offline=False), "model", "warning", "not in the Hub's cache"),
    (named_turbo, "model", "warning", "by its name ('turbo') it was distilled to"),
    (training_adapter("nobody/nothing"), "model", "warning", "'nobody/nothing' is not in the Hub's cache"),
    (training_adapter("no/such.safetensors"), "model", "error", "'no/such.safetensors' is neither a file"),
    (config(adapter__start="no/such.safetensors"), "model", "error", "no/such.safetensors' is neither"),
    (config(prepare__resolution=60), "model", "error", "cannot divide"),
    (config(adapter__targets=["to_q", "to_x"]), "adapter", "error", "to_x"),
    (config(adapter__targets="no.*such"), "adapter", "error", "no.*such"),
    (config(adapter__targets="(to_q"), "adapter", "error", "not a valid regular expression"),
    (lambda site: site.options.update(ranks=3), "batch", "error", "which 3 ranks"),
    (many_ranks_and_no_memory, "batch", "warning", "4 ranks, but 1 shards"),
    (truncated_shard, "shards", "error", "truncated or altered"),
    (missing_shard, "shards", "error", "is missing"),
    (shards_of_another_base, "shards", "error", "whose text_encoder differ"),
    (shards_of_other_settings, "shards", "error", "prepare.flip False, now True"),
    (config(prepare=None), "shards", "error", "has no manifest.json"),
    (file_for_run_dir, "run folder", "error", "is not a directory"),
    (run_of_another_seed, "run folder", "error", "seed was 0, is now 7"),
    (damaged_checkpoint, "run folder", "warning", "is damaged"),
    (Site.run, "run folder", "warning", "already trained to step 1"),
    (locked, "run folder", "error", "run_dir is in use by another run"),
    (locked_elsewhere, "run folder", "warning", "on node7), if it is still running"),
    (config(run_dir="/proc/run"), "write access", "error", "cannot write to run_dir /proc/run"),
    (file_for_shards, "write access", "error", "Not a directory"),
    (full_disk, "disk", "error", "10 MB free"),
    (config(train__cuda_graph=True), "GPU", "error", "there is no CUDA GPU here"),
    (overrides("prepare.sampling.precision=bf16"), "GPU", "warning", "sampling.precision is bf16"),
    slow((graph_elsewhere, "GPU", "warning", "no GPU to try it on")),
    (old_gpu, "GPU", "warning", "which Tesla T4 emulates"),
    (no_compiler, "compiler", "error", "train.compile needs the compiler none"),
    (no_push(token=None), "Hub", "error", "there is no Hub token"),
    (no_push(token="hf_a"), "Hub", "error", "but so is HF_HUB_OFFLINE"),
    (no_wandb, "extras", "error", "train.wandb needs wandb"),
    (old_package, "packages", "error", "needs >=99"),
    (old_package, "packages", "error", "no-such-package is not installed"),
    (environment(RANK="1"), "processes", "error", "WORLD_SIZE is not set"),
    (environment(WORLD_SIZE="2"), "processes", "error", "RANK is not set"),
    (environment(RANK="2", WORLD_SIZE="two"), "processes", "error", "not a number"),
    (environment(**RANK | {"RANK": "2"}), "processes", "error", "RANK is 2, but WORLD_SIZE is 2"),
    (environment(RANK="0", WORLD_SIZE="2"), "processes", "error", "no MASTER_ADDR and no MASTER_PORT"),
    (environment(**RANK), "processes", "warning", "LOCAL_RANK is not set"),
    (environment(**TASKS), "processes", "error", "8 tasks on a node with 4 GPUs"),
    (out_of_time, "job", "error", "a run stops 120 s before"),
    (environment(SLURM_JOB_ID="7"), "job", "warning", "SLURM_JOB_END_TIME is not set"),
    slow((lambda site: site.options.update(gib=0.1), "memory", "error", "training needs")),
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, photos: Path, class_dir: Path, prepared: Path) -> Path:
    """The folder of a run of one step."""
    folder = tmp_path_factory.mktemp("trained")
    cfg = config_in(folder, photos, class_dir, data__shards=str(prepared), train__steps=1)
    return train(cfg)


@pytest.fixture
def site(
    tmp_path: Path,
    prepared: Path,
    trained: Path,
    class_dir: Path,
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Site:
    for name in [name for name in os.environ if name.startswith("SLURM_")] + list(RANK):
        monkeypatch.delenv(name, raising=False)
    mine = tmp_path / "photos"
    mine.mkdir()
    for number in range(5):
        draw_photo(mine / f"{number}.png", number)
    good = {"train__steps": 200, "prepare__photos": str(mine)}
    return Site(tmp_path, mine, good, monkeypatch, prepared, photos, trained)


@pytest.fixture
def look(site: Site, class_dir: Path) -> Callable[[], Rows]:
    """Everything that doctor finds on the site."""

    def check() -> Rows:
        options = {k: value for k, value in site.options.items() if k != "release"}
        try:
            plain(site, class_dir)
            return list(doctor.check(site.folder / "c.yaml", site.overrides, **options))
        finally:
            if "release" in site.options:
                site.options["release"].release()

    return check


def plain(site: Site, class_dir: Path) -> None:
    """The config file, valid or not."""
    config_in(site.folder, site.photos, class_dir)
    path = site.folder / "c.yaml"
    values = yaml.safe_load(path.read_text())
    for name, value in site.changes.items():
        *sections, key = name.split("__")
        inner = values
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[key] = value
    path.write_text(yaml.safe_dump(values))


def levels(rows: Rows) -> set[str]:
    return {found.level for _, found in rows}


def checks(rows: Rows) -> set[str]:
    return {name for name, _ in rows}


ALL = {
    "config", "packages", "processes", "prompts", "learning rates", "job", "extras", "model", "adapter",
    "photos", "captions", "prompt length", "text encoders", "passes", "class images", "images", "shards",
    "batch", "run folder", "write access", "disk", "GPU", "compiler", "Hub", "memory", "time",
}  # fmt: skip


def _id(fault: Any) -> str:
    return fault[3] if isinstance(fault, tuple) else str(fault)


@pytest.mark.parametrize("fault", FAULTS, ids=_id)
def test_a_fault_is_found_and_every_other_check_still_made(
    fault: tuple[Callable[[Site], None], str, str, str], site: Site, look: Callable[[], Rows]
) -> None:
    plant, check, level, words = fault
    plant(site)
    rows = look()
    told = [found for name, found in rows if name == check and words in found.what]
    assert told, "\n".join(doctor.table(iter(rows)))
    if level:
        assert told[0].level == level and told[0].cure
    assert checks(rows) == (ALL if check != "config" else {"config", "packages", "processes"})


def test_a_good_config_has_no_errors_and_nothing_is_left_behind(site: Site, look: Callable[[], Rows]) -> None:
    site.shards()
    look()
    before = sorted(site.folder.rglob("*"))
    rows = look()
    assert levels(rows) <= {"ok", ""} and checks(rows) == ALL, "\n".join(doctor.table(iter(rows)))
    assert sorted(site.folder.rglob("*")) == before


def test_faults_are_told_together_and_give_exit_code_2(site: Site, look: Callable[[], Rows]) -> None:
    truncated_weights(site)
    corrupt_photo(site)
    blurred_photo(site)
    look()
    done = dbtrain("doctor", site.folder / "c.yaml", "--ranks", 3)
    assert done.returncode == 2 and done.stderr == ""
    lines = done.stdout.splitlines()
    first = {line[:8].strip(): line for line in reversed(lines) if line[:5] in ("error", "warni")}
    assert lines[-1] == "3 errors, 1 warning" and set(first) == {"error", "warning"}
    cures = [after.strip() for line, after in itertools.pairwise(lines) if line.startswith("error")]
    assert len(cures) == 3 and all(cure.startswith("-> ") for cure in cures)


def test_a_plain_call_loads_no_weights_and_none_of_the_large_libraries(
    site: Site, look: Callable[[], Rows]
) -> None:
    """What makes it fast, with a run to go on with, which is most to look at; and it exits with 0."""
    site.run()
    look()
    code = (
        "import sys; from dbtrain.__main__ import app; from dbtrain.models.pretrained import Pretrained\n"
        "del Pretrained.load, Pretrained.skeleton\n"
        f"app(['doctor', {str(site.folder / 'c.yaml')!r}], standalone_mode=False)\n"
        "assert not {'diffusers', 'transformers', 'peft', 'torch._dynamo'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "already trained to step 1" in done.stdout, done.stderr


def test_ranks_but_the_first_keep_quiet(site: Site, look: Callable[[], Rows]) -> None:
    look()
    done = dbtrain("doctor", site.folder / "c.yaml", **RANK)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_adapter_s_size_is_that_of_the_trained_one(site: Site, look: Callable[[], Rows]) -> None:
    rows = look()
    weights = next(site.trained.glob("checkpoints/*/unet/adapter_model.safetensors"))
    count = sum(tensor.numel() for tensor in load_file(weights).values())
    assert any(name == "adapter" and f"about {count:,} parameters" in found.what for name, found in rows)


@pytest.mark.slow
@pytest.mark.usefixtures("forks")
def test_a_dry_run_runs_and_leaves_nothing(site: Site, look: Callable[[], Rows], tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    site.env(TMPDIR=str(scratch))
    site.patch.setattr("tempfile.tempdir", None)
    site.options["dry_run"] = True
    site.env(XDG_CACHE_HOME=str(tmp_path / "cache"))
    site.changes |= {"sample__prompts": ["a {}", "b {}"], "validation__prompts": ["a {}"]}
    rows = look()
    told = [found for name, found in rows if name == "dry run"]
    assert [found.level for found in told] == ["ok", "ok", "ok"]
    assert "2 steps, " in told[1].what and "export/pytorch_lora_weights.safetensors" in told[1].what
    assert (
        not list(scratch.iterdir()) and not (tmp_path / "run").exists() and not (tmp_path / "shards").exists()
    )
    total, *caveat = (found for name, found in rows if name == "time")
    assert not re.search("unknown|not measured", total.what) and total.what.startswith("about ")
    assert f"measured on {duration.device()}, 1 process" in total.what
    assert re.fullmatch(r"on SLURM: sbatch --time=\d\d:\d\d:00 launch/train.sbatch CONFIG", total.cure)
    assert torch.cuda.is_available() or "not the time on a cluster's GPU" in caveat[0].what


def test_the_time_is_told_for_each_device_that_was_measured(site: Site, look: Callable[[], Rows]) -> None:
    site.env(XDG_CACHE_HOME=str(site.folder / "cache"))
    assert [found.what for name, found in look() if name == "time"] == [
        "unknown: nothing was measured yet with these settings and number of processes"
    ]
    folder = duration._folder(Config.load(site.folder / "c.yaml"))
    assert folder
    folder.mkdir(parents=True)
    for name, step_s in (("H100", 9.0), ("A100", 18.0)):
        rates = {"step": (step_s, 0, 50), "checkpoint": (0.0, 0, 50), "loading for train": (9.0, 0, 1)}
        (folder / f"{name}.json").write_text(json.dumps({"device": name, "ranks": 1, "rates": rates}))
    site.shards()
    found = [found for name, found in look() if name == "time"]
    assert [one.what for one in found] == [
        "about 1 h 00 min: training 1 h 00 min, loading 9 s; measured on A100, 1 process",
        "about 30 min 09 s: training 30 min 00 s, loading 9 s; measured on H100, 1 process",
    ]
    assert [one.cure.split()[3] for one in found] == ["--time=01:30:00", "--time=00:45:00"]


def test_no_time_is_told_of_a_job_that_cannot_start(site: Site, look: Callable[[], Rows]) -> None:
    no_photos(site)
    (found,) = (found for name, found in look() if name == "time")
    assert found.level == "skipped"


def test_a_job_that_is_done_takes_no_time(site: Site, look: Callable[[], Rows]) -> None:
    site.run()
    assert [found.what for name, found in look() if name == "time"] == ["nothing is left to do"]


@pytest.mark.usefixtures("forks")
def test_a_dry_run_tells_the_run_s_own_error(site: Site, look: Callable[[], Rows]) -> None:
    site.changes["optim__lr"] = 1e30
    site.options["dry_run"] = True
    told = [found for name, found in look() if name == "dry run"]
    assert [found.level for found in told] == ["ok", "error"]
    assert "train ended with exit code 2" in told[1].what and told[1].cure


def test_the_disk_check_counts_a_diff_in_full(make: Make) -> None:
    cases = []
    for formats in (["peft"], ["peft", "diff"]):
        cases.append(Case(make(export__formats=formats, adapter__targets="attention")))
        cases[-1].base, cases[-1].manifest = Base.find(cases[-1].cfg.model), None
    unet = cases[0].base.load("unet")
    whole = sum(4 * layer.weight.numel() for name, layer in unet.named_modules()
                if name.endswith((".to_q", ".to_k", ".to_v", ".to_out.0")))  # fmt: skip
    sizes = [{what: size for what, _, size in disk._needs(case)} for case in cases]
    (name,) = (what for what in sizes[0] if "export" in what)
    assert sizes[1][name] - sizes[0][name] == whole


@pytest.mark.parametrize("gib", [0.0, -1.0, inf, nan])
def test_a_gpu_has_a_size(tmp_path: Path, gib: float) -> None:
    with pytest.raises(ConfigError, match=rf"--gib is {gib:g}, .* use e.g. --gib 24"):
        next(doctor.check(tmp_path / "c.yaml", gib=gib))
