"""Looking at a run while it trains: it must change nothing, and show what `sample` shows."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image, ImageDraw
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dbtrain.config import Config
from dbtrain.data import prompt_table, shards
from dbtrain.data.shards import HELD_OUT, Manifest
from dbtrain.models import kernels, sampler
from dbtrain.models.base import Base
from dbtrain.models.families import sd
from dbtrain.prepare.prepare import prepare
from dbtrain.runtime import preemption
from dbtrain.runtime.errors import ConfigError, Preempted
from dbtrain.runtime.hashing import sha256_of
from dbtrain.runtime.run_folder import RunFolder
from dbtrain.sample import sample
from dbtrain.sample.sample import NO_ADAPTER, Mix
from dbtrain.train import held_out_loss, loop, setup
from tests import bases
from tests.conftest import Make, at, dbtrain, draw_photo, slow, thinned, train
from tests.networks import Dispatched

PROMPTS = ["a photo of sks dog", "a photo of a dog in the snow"]
HELD = {"prepare__held_out": 1, "prepare__class_held_out": 3, "validation__timesteps": 4}


def trained(cfg: Config) -> dict[str, str]:
    """What a run leaves, by name: the losses, and the adapter."""
    loop.train(cfg)
    run = Path(cfg.run_dir)
    found = [
        run / "metrics.jsonl",
        *run.glob("checkpoints/*/*.safetensors"),
    ]
    return {str(path.relative_to(run)): sha256_of(path) for path in found}


def lines(run: str | Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(run) / name).read_text().splitlines()]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


@pytest.mark.parametrize("precision", ["fp32", slow("bf16")])
def test_pictures_change_no_loss_by_a_bit(make: Make, tmp_path: Path, prepared: Path, precision: str) -> None:
    same = partial(make, data__shards=str(prepared), train__precision=precision, adapter__dropout=0.1)
    off = trained(same(run_dir=str(tmp_path / "off")))
    on = trained(same(run_dir=str(tmp_path / "on"), validation__prompts=PROMPTS, validation__every=1))
    assert off == on
    steps = sorted(path.name for path in (tmp_path / "on" / "validation").glob("step-*"))
    assert steps == [f"step-{step:06d}" for step in range(5)]
    assert not (tmp_path / "off" / "validation").exists()


def test_prompts_are_encoded_before_the_denoiser_takes_memory(
    make: Make, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sharded one is loaded to the GPU."""

    class Loading(Exception):
        pass

    def build(*_: Any, **__: Any) -> None:
        raise Loading

    monkeypatch.setattr(setup.DreamBooth, "build", build)
    cfg = make(data__shards=str(prepared), validation__prompts=PROMPTS)
    with pytest.raises(Loading):
        loop.train(cfg)
    assert list(RunFolder(cfg.run_dir).validation.glob("prompts-*"))


@pytest.mark.slow
def test_the_pictures_are_those_of_sample(make: Make, tmp_path: Path, prepared: Path) -> None:
    cfg = make(data__shards=str(prepared), validation__prompts=PROMPTS, optim__lr=1e-2)
    train(cfg)
    mixes = [NO_ADAPTER, Mix.parse(cfg.run_dir)]
    drawn = sample.sample(cfg, PROMPTS, mixes, tmp_path / "drawn").parent
    for number, step in enumerate((0, cfg.train.steps)):
        for prompt in range(len(PROMPTS)):
            for seed in range(2):
                mine = RunFolder(cfg.run_dir).validation_sheet(step).parent / f"{prompt:02d}-seed{seed}.png"
                gap = pixels(mine) - pixels(drawn / f"{number:02d}-{prompt:02d}-seed{seed}.png")
                assert abs(gap).max() <= 1, (step, prompt, seed)  # sums in another order, rounded to bytes
    events = EventAccumulator(str(Path(cfg.run_dir) / "tb")).Reload()
    assert [image.step for image in events.Images("validation")] == [0, 4]
    gone = pixels(RunFolder(cfg.run_dir).validation_sheet(0)) - pixels(
        RunFolder(cfg.run_dir).validation_sheet(4)
    )
    assert abs(gone).max() > 1


def small(path: Path) -> str:
    picture = Image.new("RGB", (16, 16), "white")
    ImageDraw.Draw(picture).ellipse((3, 3, 12, 12), fill="red")
    picture.save(path)
    return str(path)


SHOWN = {"sd with text encoder": "sd", "sdxl": "sdxl", "if_1": "deepfloyd", "if_2": "deepfloyd-2"}


@pytest.mark.parametrize("base", thinned(SHOWN, 2))
def test_every_family_is_shown(make: Make, tmp_path: Path, base: str) -> None:
    changes: dict[str, Any] = {
        "prepare__class_prompt": None, "prepare__resolution": bases.SIDES[SHOWN[base]],
        "validation__prompts": PROMPTS,
    }  # fmt: skip
    if base.startswith("sd "):
        changes["adapter__text_encoder"] = {"rank": 4}
    if base == "if_2":
        changes["sample__low_res"] = [small(tmp_path / "small.png")]
    cfg = make(
        model__path=str(bases.OF_FAMILY[SHOWN[base]]()), train__steps=2, optim__lr=1e-2, **changes
    )  # fmt: skip
    prepare(cfg)
    loop.train(cfg)
    before, after = (pixels(RunFolder(cfg.run_dir).validation_sheet(step)) for step in (0, 2))
    assert before.shape == after.shape and (before != after).any()


def test_what_is_kept_back_is_not_trained_on(make: Make) -> None:
    cfg = make(prepare__variants=3, prepare__crop="random", **HELD)
    folder = prepare(cfg)
    roles = Manifest.read(at(folder)).roles
    sources = {
        role: {row.meta["source"] for shard in every for row in shards.read(at(folder), shard)}
        for role, every in roles.items()
    }
    assert len(sources[HELD_OUT["instance"]]) == 1 and len(sources[HELD_OUT["class"]]) == 3
    assert all(not sources[role] & sources[held] for role, held in HELD_OUT.items())
    photos = {path.name for path in Path(cfg.prepare.photos).iterdir() if path.suffix.lower() != ".txt"}  # type: ignore[union-attr]
    assert sources["instance"] | sources[HELD_OUT["instance"]] <= photos
    assert len(sources["class"]) == 5
    (only,) = roles[HELD_OUT["instance"]]
    assert len(only.keys) == 1  # one crop of the photo, however many are trained on


def test_keeping_everything_back_is_refused(make: Make) -> None:
    with pytest.raises(ConfigError, match=r"prepare\.class_held_out is 8, but there are only 8 class images"):
        prepare(make(prepare__class_held_out=8))


def test_the_held_out_loss_is_the_objective_s_own(make: Make) -> None:
    cfg = make(validation__every=2, **HELD)
    place = at(prepare(cfg))
    loop.train(cfg)
    found = lines(cfg.run_dir, "validation.jsonl")
    assert [line["step"] for line in found] == [0, 2, 4]
    assert found[0]["timesteps"] == [125, 375, 625, 875]
    for line in found:
        for role, name in (("instance", "held_out_instance"), ("prior", "held_out_prior")):
            assert line[name] == pytest.approx(np.mean(line["by_timestep"][role]))

    # The base's own loss of the photo, by Diffusers' scheduler and UNet.
    base, manifest = Base.find(cfg.model), Manifest.read(place)
    table = prompt_table.read(place, manifest.prompts)
    unet, noising = base.load("unet"), DDPMScheduler.from_pretrained(base.folder / "scheduler")
    losses = []
    for one in held_out_loss.rows(manifest, place, sd.FAMILY, "instance", 4):
        drawn = held_out_loss.batch_of([one])
        latent = one.row.tensors["mean"] + one.row.tensors["std"] * drawn.posterior
        x0 = latent * base.config("vae")["scaling_factor"]
        t = torch.tensor([int(one.u * 1000)])
        x_t = noising.add_noise(x0, drawn.noise, t)
        hidden = table["condition.prompt_embeds"][[one.row.meta["prompt"]]]
        with torch.no_grad():
            losses.append((unet(x_t, t, hidden).sample - drawn.noise).square().mean().item())
    assert found[0]["by_timestep"]["instance"] == pytest.approx(losses, rel=1e-4)
    assert found[-1]["by_timestep"]["instance"] != found[0]["by_timestep"]["instance"]


@pytest.mark.slow
def test_losses_of_another_kind_are_measured_anew_and_pictures_of_old_prompts_go(
    make: Make, tmp_path: Path
) -> None:
    same = partial(make, **HELD | {"train__steps": 2})
    cfg = same(validation__prompts=PROMPTS)
    prepare(cfg)
    loop.train(cfg)
    folder = RunFolder(cfg.run_dir).validation_sheet(2).parent
    drawn = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    loop.train(same(validation__prompts=PROMPTS, validation__timesteps=3))
    found = lines(cfg.run_dir, "validation.jsonl")
    assert [(line["step"], len(line["timesteps"])) for line in found] == [(2, 3)]
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == drawn
    loop.train(same(validation__prompts=PROMPTS[:1], validation__timesteps=3))
    assert lines(cfg.run_dir, "validation.jsonl") == found
    assert sorted(path.name for path in folder.iterdir()) == ["00-seed0.png", "00-seed1.png", "sheet.png"]


def test_no_twin_of_a_held_out_photo_is_trained_on(make: Make, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for name, number in (("a", 0), ("a copy", 0), ("b", 1), ("b copy", 1)):
        draw_photo(tmp_path / "photos" / f"{name}.png", number)
    cfg = make(prepare__photos=str(tmp_path / "photos"), prepare__held_out=1, prepare__class_prompt=None)
    place = at(prepare(cfg))
    rows = {
        role: [row.meta["key"] for shard in every for row in shards.read(place, shard)]
        for role, every in Manifest.read(place).roles.items()
    }
    assert [len(keys) for keys in rows.values()] == [2, 2]
    assert not set(rows["instance"]) & set(rows[HELD_OUT["instance"]])


def test_prompts_are_encoded_once_and_kept_with_the_run(
    make: Make, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    original = sampler.encode
    monkeypatch.setattr(sampler, "encode", lambda *args: calls.append(1) or original(*args))
    cfg = make(data__shards=str(prepared), validation__prompts=PROMPTS)
    with pytest.raises(Preempted):
        loop.train(cfg, until=2)
    loop.train(cfg)
    assert len(calls) == 1


@pytest.mark.slow
def test_looking_more_often_changes_nothing(make: Make, tmp_path: Path) -> None:
    cfg = make(**HELD)
    prepare(cfg)
    rare, often = (
        trained(make(run_dir=str(tmp_path / str(every)), validation__every=every, **HELD))
        for every in (99, 1)
    )
    assert rare == often


def test_training_losses_are_told_apart_by_timestep(make: Make, prepared: Path) -> None:
    cfg = make(data__shards=str(prepared), train__steps=6, train__log_every=4)
    loop.train(cfg)
    metrics, found = lines(cfg.run_dir, "metrics.jsonl"), lines(cfg.run_dir, "timesteps.jsonl")
    assert [line["step"] for line in found] == [2, 4, 6]  # log steps, and checkpoints
    for role, key in (("instance", "loss_instance"), ("prior", "loss_prior")):
        assert sum(sum(line[role]["rows"]) for line in found) == 6 * cfg.train.global_batch
        total = sum(sum(line[role]["loss"]) for line in found) / cfg.train.global_batch
        assert total == pytest.approx(sum(line[key] for line in metrics))
    assert sum(count > 0 for count in found[0]["instance"]["rows"]) > 1


@pytest.mark.slow
def test_a_run_that_is_stopped_while_it_is_looked_at_goes_on_there(
    make: Make, tmp_path: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    same = partial(make, data__shards=str(prepared), validation__prompts=PROMPTS, validation__every=3,
                   train__checkpoint_every=4, sample__batch=1)  # fmt: skip
    whole = trained(same(run_dir=str(tmp_path / "whole")))
    cfg, asked = same(run_dir=str(tmp_path / "stopped")), []

    def stop_at_the_sixth() -> None:
        asked.append(1)
        if len(asked) == 6:  # the second picture after step 3
            raise Preempted("the job's time is over")

    monkeypatch.setattr(preemption, "check", stop_at_the_sixth)
    with pytest.raises(Preempted):
        loop.train(cfg)
    monkeypatch.undo()
    run = Path(cfg.run_dir)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000003"]
    assert not RunFolder(run).validation_sheet(3).exists()
    after = trained(cfg)
    del (
        whole["checkpoints/step-000004/optimizer.safetensors"],
        after["checkpoints/step-000003/optimizer.safetensors"],
    )
    assert {name: after[name] for name in whole if name in after}.items() <= whole.items()
    for step in (0, 3, 4):
        mine, theirs = (RunFolder(tmp_path / name).validation_sheet(step) for name in ("stopped", "whole"))
        assert mine.read_bytes() == theirs.read_bytes()


def test_a_last_look_that_a_kill_left_out_is_made_up_for(make: Make, prepared: Path) -> None:
    cfg = make(data__shards=str(prepared), validation__prompts=PROMPTS)
    before = trained(cfg)
    sheet = RunFolder(cfg.run_dir).validation_sheet(cfg.train.steps)
    shown = sheet.read_bytes()
    sheet.unlink()
    assert trained(cfg) == before
    assert sheet.read_bytes() == shown


@pytest.mark.slow
def test_steps_between_two_looks_launch_no_more(
    make: Make, tmp_path: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []
    original = setup.compute_step

    def counted(*args: Any) -> Any:
        with Dispatched() as mode:
            outcome = original(*args)
        counts.append(mode.total)
        return outcome

    monkeypatch.setattr(setup, "compute_step", counted)
    for name, prompts in (("off", []), ("on", PROMPTS)):
        loop.train(make(data__shards=str(prepared), run_dir=str(tmp_path / name), train__precision="bf16",
                         validation__prompts=prompts, validation__every=2))  # fmt: skip
    off, on = counts[:4], counts[4:]
    assert off == on and len(on) == 4


@pytest.mark.slow
def test_looking_compiles_nothing_anew(
    make: Make, tmp_path: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._dynamo.utils import counters

    monkeypatch.setattr(kernels, "compile_module", partial(kernels.compile_module, backend="eager"))
    slim = str(bases.sd(size="slim"))
    same = partial(make, model__path=slim, data__shards=str(prepared), train__compile=True)
    graphs = []
    for name, more in (("off", {}), ("on", {"validation__prompts": PROMPTS, "validation__every": 1})):
        torch._dynamo.reset()
        counters.clear()
        trained(same(run_dir=str(tmp_path / name), **more))
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [1, 1]
    assert len({sha256_of(tmp_path / name / "metrics.jsonl") for name in ("off", "on")}) == 1


@pytest.mark.slow
def test_two_ranks_see_what_one_sees(make: Make, tmp_path: Path) -> None:
    cfg = make(train__steps=2, validation__prompts=PROMPTS, validation__every=1, sample__batch=1, **HELD)
    prepare(cfg)
    loop.train(cfg)
    path = tmp_path / "c.yaml"
    done = dbtrain("train", path, f"run_dir={tmp_path / 'two'}", ranks=2)
    assert done.returncode == 0, done.stderr
    for one, two in zip(
        lines(cfg.run_dir, "validation.jsonl"), lines(tmp_path / "two", "validation.jsonl"), strict=True
    ):
        assert one["held_out_instance"] == pytest.approx(two["held_out_instance"], rel=1e-3)
        assert one["step"] == two["step"]
    before = [
        RunFolder(run).validation_sheet(0).read_bytes() for run in (Path(cfg.run_dir), tmp_path / "two")
    ]
    assert before[0] == before[1]
    after = [pixels(RunFolder(run).validation_sheet(2)) for run in (Path(cfg.run_dir), tmp_path / "two")]
    assert abs(after[0] - after[1]).max() <= 3
