"""Config: what it takes, what it refuses, and what it then says."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from dbtrain.config import Config, Prepare, fields
from dbtrain.runtime.errors import ConfigError
from tests.conftest import ROOT

MINIMAL = "run_dir: runs/x\ndata: {shards: s}\n"


def load(tmp_path: Path, text: str, *overrides: str) -> Config:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return Config.load(path, overrides)


def problems(tmp_path: Path, text: str, *overrides: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, *overrides)
    return caught.value.problems


def test_overrides_are_yaml_and_1e_4_is_a_number(tmp_path: Path) -> None:
    cfg = load(
        tmp_path, MINIMAL, "optim.lr=1e-4", "train.steps=7", "sample.prompts=[a, b]", "train.compile=true"
    )
    assert (cfg.optim.lr, cfg.train.steps, cfg.sample.prompts) == (1e-4, 7, ("a", "b"))
    assert cfg.train.compile is True


def test_1e_4_in_the_file_is_a_number_too(tmp_path: Path) -> None:
    assert load(tmp_path, MINIMAL + "optim: {lr: 5e-5}\n").optim.lr == 5e-5


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    text = "data: {shards: s}\noptim: {lrr: 1}\ntrain: {steps: many}\n"
    told = problems(tmp_path, text, "nonsense", "adapter.kind=lorax")
    assert len(told) == 5
    assert any("'run_dir' is missing" in line for line in told)
    assert any("unknown key 'optim.lrr'; did you mean 'optim.lr'?" in line for line in told)
    assert any("train.steps is 'many'" in line for line in told)
    assert any("override 'nonsense'" in line for line in told)
    assert any("adapter.kind is 'lorax'; choose from 'lora'" in line for line in told)


def test_a_key_in_the_wrong_section_is_pointed_to_its_own(tmp_path: Path) -> None:
    assert problems(tmp_path, MINIMAL, "train.lr=1") == ("unknown key 'train.lr'; did you mean 'optim.lr'?",)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("train.global_batch=0", "train.global_batch is 0"),
        ("train.steps=2.5", "train.steps is 2.5"),
        ("train.compile=1", "train.compile is '1'; choose from False, True or 'regional'"),
        ("optim.lr=-1", "optim.lr is -1"),
        ("optim.lr=.nan", "optim.lr is nan"),
        ("adapter.rank=big", "adapter.rank is 'big'"),
        ("train=3", "'train' is a section"),
        ("train.steps.deep=3", "train.steps"),
        ("optim.warmup_steps=501", "optim.warmup_steps is 501"),
        ("train.micro_batch=3", "global_batch is 4, which is not divisible by micro_batch (3)"),
        ("adapter.targets=7", "adapter.targets is 7"),
    ],
)
def test_a_wrong_value_is_named(tmp_path: Path, override: str, told: str) -> None:
    assert any(told in line for line in problems(tmp_path, MINIMAL, override))


def test_a_path_that_is_not_utf_8_is_refused_with_a_way_out() -> None:
    """It comes from a Windows zip; neither YAML nor a manifest can hold it."""
    values = yaml.safe_load(MINIMAL)
    values["prepare"] = {"photos": os.fsdecode(b"caf\xe9"), "instance_prompt": "a photo of sks dog"}
    with pytest.raises(ConfigError, match=r"prepare\.photos is 'caf.*', whose bytes are not UTF-8; rename"):
        Config.from_dict(values)


def test_center_crop_has_one_variant(tmp_path: Path) -> None:
    text = MINIMAL + "prepare: {photos: p, instance_prompt: a, variants: 3}\n"
    assert any("variants is 3" in line for line in problems(tmp_path, text))


@pytest.mark.parametrize("text", ["[1, 2]", "run_dir: [", "", "run_dir: a\nrun_dir: b\n"])
def test_what_is_no_config_is_refused(tmp_path: Path, text: str) -> None:
    assert len(problems(tmp_path, text)) == 1


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        Config.load("nowhere.yaml")


def test_the_resolved_config_is_the_config(tmp_path: Path) -> None:
    cfg = load(tmp_path, MINIMAL, "prepare.photos=p", "prepare.instance_prompt='x: y'", "optim.lr=1e-7")
    assert load(tmp_path, cfg.dump()) == cfg


def test_config_is_frozen(tmp_path: Path) -> None:
    with pytest.raises(ValidationError):
        load(tmp_path, MINIMAL).train.steps = 3  # type: ignore[misc]


def test_every_key_has_a_line_of_help() -> None:
    assert all(field.description for _, field in fields())


def test_class_images_are_only_held_out_where_there_are_any() -> None:
    with pytest.raises(ValidationError, match="class_held_out is 2, but there are no class images"):
        Prepare(photos="photos", instance_prompt="a photo of sks dog", class_held_out=2)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_every_shipped_config_loads(path: Path) -> None:
    assert Config.load(path).run_dir
    assert yaml.safe_load(path.read_text())
