"""Checkpoints: whole or not there, resumed exactly, refused when they are another run's."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dbtrain.config import Config
from dbtrain.report import run as report
from dbtrain.runtime import console
from dbtrain.runtime.errors import ConfigError, Preempted
from dbtrain.runtime.run_folder import RunFolder, step_of
from tests import bases
from tests.conftest import Make, Started, dbtrain, slow, train
from tests.runs import tree


@pytest.fixture(autouse=True)
def shards(tmp_path: Path, prepared: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "shards"))


def exported(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "export" / "pytorch_lora_weights.safetensors")


def same(one: Path, other: Path) -> bool:
    a, b = exported(one), exported(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("precision", "optimizer"), [("fp32", {"name": "prodigy"}), slow("fp16", {"name": "adamw", "lr": 1e-3})]
)
def test_train_2n_equals_train_n_then_resume_n_in_a_new_process(
    make: Make, tmp_path: Path, precision: str, optimizer: dict[str, Any]
) -> None:
    settings = {"train__precision": precision, "adapter__dropout": 0.1, "train__ema": 0.9, "optim": optimizer}
    whole = train(make(run_dir=str(tmp_path / "whole"), train__steps=6, **settings))
    make(run_dir=str(tmp_path / "halves"), **settings)
    for steps in (3, 6):
        assert dbtrain("train", tmp_path / "c.yaml", f"train.steps={steps}").returncode == 0
    assert same(whole, tmp_path / "halves")
    last = Path("checkpoints", "step-000006")
    one, other = tree(whole / last), tree(tmp_path / "halves" / last)
    assert {"optimizer.safetensors", "ema/unet/adapter_model.safetensors"} <= one.keys() == other.keys()
    assert all(one[name] == other[name] for name in one if name.endswith(".safetensors"))


@pytest.mark.slow
def test_killed_while_it_trains_and_run_again_gives_the_same_adapter(make: Make, tmp_path: Path) -> None:
    settings = {"train__checkpoint_every": 5, "train__keep": 2, "optim__schedule": "constant"}
    make(train__steps=100_000, **settings)
    run = tmp_path / "run"
    begun = Started("train", tmp_path / "c.yaml")
    begun.wait_for(lambda: (run / "checkpoints" / "step-000005").exists())
    begun.kill()
    steps = step_of(RunFolder(run).checkpoints()[-1]) + 6  # wherever the kill came
    done = dbtrain("train", tmp_path / "c.yaml", f"train.steps={steps}")
    assert done.returncode == 0
    assert "resuming from step" in done.stderr
    whole = train(make(run_dir=str(tmp_path / "whole"), train__steps=steps, **settings))
    assert same(whole, run)
    assert (run / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_a_half_written_checkpoint_is_ignored(make: Make, tmp_path: Path) -> None:
    run = train(make(train__steps=2))
    half = run / "checkpoints" / ".step-000003.tmp"
    shutil.copytree(run / "checkpoints" / "step-000002", half)
    assert [path.name for path in RunFolder(run).checkpoints()] == ["step-000002"]
    train(make(train__steps=4))
    assert [path.name for path in RunFolder(run).checkpoints()] == ["step-000002", "step-000004"]


@pytest.mark.parametrize("harm", ["flipped", *map(slow, ("missing", "no state", "another step"))])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_used(
    make: Make, tmp_path: Path, harm: str
) -> None:
    whole = train(make(run_dir=str(tmp_path / "whole"), train__steps=6))
    run = train(make(train__steps=4))
    moments = run / "checkpoints" / "step-000004" / "optimizer.safetensors"
    if harm == "flipped":
        data = bytearray(moments.read_bytes())
        data[-1] ^= 1
        moments.write_bytes(data)
    if harm == "missing":
        moments.unlink()
    if harm == "no state":
        (moments.parent / "state.json").write_text("[]")
    if harm == "another step":
        state = moments.parent / "state.json"
        state.write_text(state.read_text().replace('"step": 4', '"step": 3'))
    train(make(train__steps=6))
    assert same(whole, run)
    assert (run / "checkpoints" / "step-000004.damaged").is_dir()


def test_only_the_newest_are_kept(make: Make) -> None:
    run = train(make(train__steps=6, train__checkpoint_every=1, train__keep=2))
    assert [path.name for path in RunFolder(run).checkpoints()] == ["step-000005", "step-000006"]


def test_one_that_cannot_be_deleted_is_left_until_the_next_save(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS keeps a file that is open elsewhere, and so its folder is not empty."""
    delete, told, failed = shutil.rmtree, [], []

    def fails_once(path: Path, **options: Any) -> None:
        if Path(path).name == "step-000001" and not failed:
            failed.append(path)
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(path))
        delete(path, **options)

    monkeypatch.setattr(shutil, "rmtree", fails_once)
    monkeypatch.setattr(console, "warn", told.append)
    run = train(make(train__steps=4, train__checkpoint_every=1, train__keep=2))
    assert [path.name for path in RunFolder(run).checkpoints()] == ["step-000003", "step-000004"]
    (line,) = [line for line in told if "deleted" in line]
    assert line.startswith(f"{failed[0]} cannot be deleted: [Errno 39] Directory not empty")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed was 0, is now 1"),
        ({"adapter__rank": 2}, "adapter.rank was 4, is now 2"),
        ({"adapter__targets": ["to_q"]}, "adapter.targets"),
        ({"loss__prior_weight": 0.5}, "loss.prior_weight was 1.0, is now 0.5"),
        ({"train__global_batch": 8}, "train.global_batch was 4, is now 8"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_another_run_s_checkpoint_is_refused_by_name(make: Make, change: dict, named: str) -> None:
    train(make(train__steps=2))
    with pytest.raises(ConfigError, match=named):
        train(make(train__steps=4, **change))


def test_other_shards_are_refused(make: Make, tmp_path: Path) -> None:
    from dbtrain.prepare.prepare import prepare

    train(make(train__steps=2))
    other = make(train__steps=4, prepare__flip=True)
    prepare(other)
    with pytest.raises(ConfigError, match=r"data\.shards was"):
        train(other)


def test_what_does_not_shape_the_data_may_change(make: Make) -> None:
    train(make(train__steps=2))
    run = train(make(train__steps=4, train__micro_batch=4, optim__lr=1e-4, train__precision="bf16"))
    assert (run / "DONE").read_text().startswith("step 4\n")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"prepare__instance_prompt": "a cat"},
            "prepare.instance_prompt was 'a photo of sks dog', is now 'a cat'",
        ),
        ({"prepare__class_prompt": None}, "prepare.class_prompt was 'a photo of a dog', is now None"),
        (
            {"data__prompt_dropout": 0.1, "optim": {"name": "prodigy"}},
            "data.prompt_dropout was 0.0, is now 0.1; optim.name was 'adamw', is now 'prodigy'",
        ),
        ({"adapter__rank": 2}, "adapter.rank was 4, is now 2"),
    ],
)
def test_a_run_that_cannot_go_on_is_refused_before_its_shards_are_made_anew(
    make: Make, tmp_path: Path, change: dict[str, Any], told: str
) -> None:
    train(make(train__steps=1))
    before = tree(tmp_path / "shards")
    make(train__steps=2, **change)
    done = dbtrain("run", tmp_path / "c.yaml")
    assert done.returncode == 2 and told in done.stderr
    assert tree(tmp_path / "shards") == before


@pytest.mark.slow
def test_a_batch_that_ranks_cannot_share_is_refused_before_anything_is_made(
    make: Make, tmp_path: Path
) -> None:
    make(data__shards=str(tmp_path / "new"))
    done = dbtrain("run", tmp_path / "c.yaml", ranks=3)
    assert (
        done.returncode == 2 and "train.global_batch is 4, which 3 ranks x train.micro_batch 1" in done.stderr
    )
    assert not (tmp_path / "new").exists()


def test_a_change_that_no_step_is_left_for_is_refused(make: Make) -> None:
    run = train(make(train__steps=2))
    before = (run / "config.yaml").read_bytes()
    with pytest.raises(
        ConfigError, match=r"already trained to step 2, too far for optim\.lr=0\.0001; increase"
    ):
        train(make(train__steps=2, optim__lr=1e-4))
    assert (run / "config.yaml").read_bytes() == before
    train(make(train__steps=2, train__log_every=1))  # shapes nothing


@pytest.mark.slow
def test_a_record_has_the_settings_of_all_steps(make: Make) -> None:
    """Of the steps that were kept: one that is trained again has the settings of the second time."""
    first = make(train__steps=3, train__checkpoint_every=2)
    train(first)
    shutil.rmtree(RunFolder(first.run_dir).checkpoint(3))
    run = train(make(train__steps=5, optim__lr=1e-4))
    train(make(train__steps=6, optim__lr=1e-4))
    for where, line in (
        (run / "config.yaml", "# optim.lr: 0.001 to step 2, then 0.0001\n"),
        (run / "export" / "README.md", "| learning rate | 0.001 to step 2, then 0.0001; constant |"),
    ):
        assert line in where.read_text()
    assert Config.load(run / "config.yaml").optim.lr == 1e-4
    assert report.read(run, "x").told("optim.lr", None) == "0.001 to step 2, then 0.0001"
    state = json.loads((RunFolder(run).checkpoint(6) / "state.json").read_text())
    assert [segment["from"] for segment in state["segments"]] == [0, 2]


def test_fewer_steps_than_trained_are_refused(make: Make) -> None:
    train(make(train__steps=4))
    with pytest.raises(ConfigError, match=r"step-000004 is past train\.steps \(2\)"):
        train(make(train__steps=2))


def test_a_run_that_is_past_the_step_to_stop_at_does_nothing(make: Make) -> None:
    run = RunFolder(make(train__checkpoint_every=1).run_dir)
    for until, at in ((0, 0), (2, 2), (2, 2), (1, 2)):
        with pytest.raises(Preempted, match=f"at step {at}"):
            train(make(train__checkpoint_every=1), until)
        assert len(run.checkpoints()) == at and not run.done.exists()
    assert len(run.read_metrics()) == 2


def test_the_run_folder_repeats_the_run(make: Make, tmp_path: Path) -> None:
    run = train(make())
    again = dbtrain("train", run / "config.yaml", f"run_dir={tmp_path / 'again'}")
    assert again.returncode == 0
    assert same(run, tmp_path / "again")


def test_a_checkpoint_s_adapter_is_a_peft_folder(make: Make) -> None:
    from diffusers import UNet2DConditionModel
    from peft import PeftModel

    run = train(make())
    unet = UNet2DConditionModel.from_pretrained(bases.sd(), subfolder="unet", dtype=torch.float32)
    model = PeftModel.from_pretrained(unet, str(run / "checkpoints" / "step-000004" / "unet"))
    saved = exported(run)
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    loaded = model.get_submodule(f"base_model.model.{layer}").lora_B["default"].weight  # type: ignore[index, union-attr]
    assert torch.equal(loaded, saved[f"unet.{layer}.lora.up.weight"])
    assert model.get_submodule(f"base_model.model.{layer}").scaling == {"default": 2.0}


def test_a_damaged_checkpoint_does_not_push_out_good_ones(make: Make) -> None:
    settings = {"train__checkpoint_every": 1, "train__keep": 1}
    run = train(make(train__steps=6, **settings))
    (run / "checkpoints" / "step-000006" / "state.json").write_text("{}")
    train(make(train__steps=2, **settings))
    assert [path.name for path in RunFolder(run).checkpoints()] == ["step-000002"]


def test_checkpoints_are_ordered_by_number(tmp_path: Path) -> None:
    for step in (999_900, 1_000_000, 500):
        (tmp_path / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
    assert [step_of(path) for path in RunFolder(tmp_path).checkpoints()] == [500, 999_900, 1_000_000]


def test_spoilt_metrics_do_not_stop_a_run(make: Make) -> None:
    run = train(make(train__steps=2, train__log_every=1))
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(b"\0\0\0\xff\n[1]\nhalf a li")
    train(make(train__steps=4, train__log_every=1))
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]


def test_a_result_that_is_not_finite_is_neither_saved_nor_exported(make: Make) -> None:
    """The loss of the last step says nothing of the weights after it."""
    with pytest.raises(ConfigError, match="NaN or infinite by step 1"):
        train(make(train__steps=1, optim__lr=1e39))
    run = Path(make().run_dir)
    assert not RunFolder(run).checkpoints()
    assert not (run / "export").exists()
    assert "NaN or infinite" in (run / "log.txt").read_text()
