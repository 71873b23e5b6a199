"""Config: what it takes, what it refuses, and what it then says."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from dbtrain.config import Config, Prepare, fields
from dbtrain.runtime.errors import ConfigError
from tests.conftest import ROOT

MINIMAL = "run_dir: runs/x\nmodel: {path: tiny}\ndata: {shards: s}\n"


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
    text = "model: {path: tiny}\ndata: {shards: s}\noptim: {lrr: 1}\ntrain: {steps: many}\n"
    told = problems(tmp_path, text, "nonsense", "adapter.kind=lorax")
    assert len(told) == 5
    assert any("'run_dir' is missing" in line for line in told)
    assert any("unknown key 'optim.lrr'; did you mean 'optim.lr'?" in line for line in told)
    assert any("train.steps is 'many'" in line for line in told)
    assert any("override 'nonsense'" in line for line in told)
    assert any("adapter.kind is 'lorax'; choose from 'lora'" in line for line in told)


def test_a_diff_needs_a_format_beside_it(tmp_path: Path) -> None:
    (told,) = problems(tmp_path, MINIMAL, "export.formats=diff")
    assert told.endswith("leaves no adapter to sample or convert; list another format too, e.g. peft,diff")
    assert load(tmp_path, MINIMAL, "export.formats=peft,diff").export.formats == ("peft", "diff")


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
        ("adapter.targets=[]", "targets is empty"),
        ("faults.timeout_s=1e15", "faults.timeout_s is 1000000000000000.0: should be less than or equal to"),
        ("faults.stop_before_s=1e15", "faults.stop_before_s is 1000000000000000.0: should be less than or"),
        ("evaluation.images=9223372036854775808", "evaluation.images is 9223372036854775808: should be less"),
        ("evaluation.class_images=9223372036854775808", "evaluation.class_images is 922337203685477580"),
    ],
)
def test_a_wrong_value_is_named(tmp_path: Path, override: str, told: str) -> None:
    assert any(told in line for line in problems(tmp_path, MINIMAL, override))


def test_lora_plus_is_for_lora(tmp_path: Path) -> None:
    up = "optim.lora_plus_ratio=4"
    for kind in ("loha", "lokr"):
        (line,) = problems(tmp_path, MINIMAL, up, f"adapter.kind={kind}")
        assert line.startswith(f"optim.lora_plus_ratio is 4, which is for LoRA, but adapter.kind is '{kind}'")
        assert load(tmp_path, MINIMAL, up, f"adapter.kind={kind}", "adapter.text_encoder={}")


@pytest.mark.parametrize(
    ("value", "told"),
    [("-1", "-1: should be greater than or equal to 0"), ("few", "'few': should be a valid integer")],
)
def test_a_number_or_a_word_has_one_message(tmp_path: Path, value: str, told: str) -> None:
    lines = problems(tmp_path, MINIMAL, f"train.swap_blocks={value}")
    assert lines == (f"train.swap_blocks is {told}, or 'auto'",)


PREPARE = "prepare: {photos: p, instance_prompt: a, class_prompt: b}\nadapter: {alpha: 3}\n"
READ = [  # override, and the value that it means: the type of the setting decides
    ("prepare.photos=/data/My Photos #2", "/data/My Photos #2"),
    ("prepare.instance_prompt=a photo of sks mug #1, side", "a photo of sks mug #1, side"),
    ("prepare.instance_prompt=&sks mug", "&sks mug"),
    ("prepare.instance_prompt=a: b", "a: b"),
    ("prepare.instance_prompt=*star*", "*star*"),
    ("prepare.instance_prompt=[sks] mug", "[sks] mug"),
    ("prepare.instance_prompt='x: y'", "x: y"),
    ("prepare.instance_prompt='x' and 'y'", "'x' and 'y'"),
    ("prepare.class_prompt=null", None),
    ("prepare.class_prompt=", None),
    ("run_dir=007", "007"),
    ("run_dir=2024-05-01", "2024-05-01"),
    ("run_dir=on", "on"),
    ("model.revision=1234567", "1234567"),
    ("evaluation.prompts=a {} on the beach", ("a {} on the beach",)),
    ("sample.prompts=a photo of sks dog", ("a photo of sks dog",)),
    ("sample.prompts=[a, 'b, c', 007, null]", ("a", "b, c", "007", "null")),
    ("sample.prompts=[]", ()),
    ("export.formats=kohya,peft", ("kohya", "peft")),
    ("export.formats=[kohya, peft]", ("kohya", "peft")),
    ("adapter.targets=[to_q, to_k]", ("to_q", "to_k")),
    ("adapter.targets=mid_block.*[qk]", "mid_block.*[qk]"),
    ("train.steps=0500", 500),
    ("train.steps=1_000", 1000),
    ("optim.lr=.5", 0.5),
    ("optim.lr=2", 2.0),
    ("train.compile=true", True),
    ("train.compile=regional", "regional"),
]


@pytest.mark.parametrize(("override", "value"), READ)
def test_the_type_of_a_setting_decides_how_an_override_is_read(
    tmp_path: Path, override: str, value: object
) -> None:
    cfg: object = load(tmp_path, MINIMAL + PREPARE, override)
    for key in override.partition("=")[0].split("."):
        cfg = getattr(cfg, key)
    assert cfg == value and type(cfg) is type(value)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("train.steps=8:20", "train.steps is '8:20'"),
        ("train.steps=0x10", "train.steps is '0x10'"),
        ("train.keep=1e2", "train.keep is 100.0"),
        ("sample.prompts=[mug #1, b]", "quote the items of a list"),
        ("optim={lr: [}", "is not valid YAML"),
    ],
)
def test_an_override_that_means_nothing_is_refused(tmp_path: Path, override: str, told: str) -> None:
    (line,) = problems(tmp_path, MINIMAL, override)
    assert told in line


def test_a_mapping_changes_the_keys_that_it_has(tmp_path: Path) -> None:
    cfg = load(tmp_path, MINIMAL + PREPARE, "adapter={rank: 8, text_encoder: {rank: 2}}",
               "adapter.text_encoder={alpha: 4}")  # fmt: skip
    assert (cfg.adapter.rank, cfg.adapter.alpha) == (8, 3)
    assert cfg.adapter.text_encoder and cfg.adapter.text_encoder.rank == 2


@pytest.mark.parametrize(("override", "ranks"), [
    ("adapter.ranks={}", {}), ("adapter={ranks: {}}", {}), ("adapter.ranks=null", {}),
    ("adapter.ranks={b.*: 2}", {"b.*": 2}), ("adapter={ranks: {b.*: 2}}", {"b.*": 2}),
    ("adapter={rank: 8}", {"a.*": 8}), ("adapter={}", {"a.*": 8}),
])  # fmt: skip
def test_a_mapping_for_a_setting_replaces_that_of_the_file(
    tmp_path: Path, override: str, ranks: dict[str, int]
) -> None:
    text = MINIMAL + "adapter: {alpha: 3, ranks: {a.*: 8}, text_encoder: {ranks: {a.*: 8}}}\n"
    cfg = load(tmp_path, text, override)
    assert (cfg.adapter.ranks, cfg.adapter.alpha) == (ranks, 3)
    cfg = load(tmp_path, text, override.replace("adapter", "adapter.text_encoder"))
    assert cfg.adapter.text_encoder and cfg.adapter.text_encoder.ranks == ranks
    assert cfg.adapter.ranks == {"a.*": 8}


def test_a_file_is_read_by_type_too(tmp_path: Path) -> None:
    text = "run_dir: 007\nmodel: {path: tiny, revision: 123}\ndata: {shards: 2024-05-01}\n"
    text += "train: {steps: 0500}\nprepare: {photos: on, instance_prompt: a, class_prompt: null}\n"
    cfg = load(tmp_path, text + "sample: {prompts: one}\nexport: {formats: kohya}\n")
    assert cfg.prepare and (cfg.prepare.photos, cfg.prepare.class_prompt) == ("on", None)
    assert (cfg.run_dir, cfg.model.revision, cfg.data.shards) == ("007", "123", "2024-05-01")
    assert (cfg.train.steps, cfg.sample.prompts, cfg.export.formats) == (500, ("one",), ("kohya",))


def test_the_base_model_has_to_be_named(tmp_path: Path) -> None:
    for text in ("run_dir: r\ndata: {shards: s}\n", "run_dir: r\ndata: {shards: s}\nmodel: {}\n"):
        (line,) = problems(tmp_path, text)
        assert "is missing; name the base model, e.g. model.path=" in line


SUBJECT = """
subject: {name: rex, token: sks, class_word: dog}
model: {path: tiny}
prepare: {photos: p, instance_prompt: "a photo of {}", class_prompt: "a photo of a {class}"}
validation: {prompts: ["a {token} toy", "no {words}"]}
sample: {prompts: "{} on the beach"}
evaluation: {prompts: "a {} in a box"}
"""


def test_folders_and_prompts_follow_from_the_subject(tmp_path: Path) -> None:
    cfg = load(tmp_path, SUBJECT)
    assert (cfg.run_dir, cfg.data.shards) == ("runs/rex", "shards/rex")
    assert cfg.prepare and cfg.prepare.instance_prompt == "a photo of sks dog"
    assert cfg.prepare.class_prompt == "a photo of a dog"
    assert cfg.validation.prompts == ("a sks toy", "no {words}")
    assert cfg.sample.prompts == ("sks dog on the beach",)
    assert cfg.evaluation.prompts == ("a {} in a box",), "evaluate needs both forms of it"


def test_another_subject_is_one_section(tmp_path: Path) -> None:
    cfg = load(tmp_path, SUBJECT, "subject.name=tom", "subject.class_word=cat", "data.cache_gib=2")
    assert (cfg.run_dir, cfg.data.shards, cfg.data.cache_gib) == ("runs/tom", "shards/tom", 2.0)
    assert cfg.prepare and cfg.prepare.instance_prompt == "a photo of sks cat"
    assert cfg.sample.prompts == ("sks cat on the beach",)
    assert load(tmp_path, cfg.dump()) == cfg
    own = load(tmp_path, SUBJECT, "run_dir=here", "data.shards=there")
    assert (own.run_dir, own.data.shards) == ("here", "there")


def test_a_prompt_without_its_words_is_refused(tmp_path: Path) -> None:
    (line,) = problems(tmp_path, SUBJECT, "subject.class_word=null")
    assert "prepare.instance_prompt: 'a photo of {}' needs words" in line
    told = problems(tmp_path, SUBJECT, "subject.name=a/b")
    assert any("subject.name is 'a/b'" in line for line in told)


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


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["train.compile=true"], "compile is true; set compile to regional, or shard to none"),
        (["train.cuda_graph=true"], "cuda_graph is true; set cuda_graph to false, or shard to none"),
        (["train.channels_last=true"], "channels_last is true; set channels_last to false, or shard to none"),
        (["adapter.dora=true"], "adapter.dora is true, but train.shard is 'all'"),
    ],
)
def test_what_sharded_weights_do_not_allow_is_refused(overrides: list[str], told: str) -> None:
    values = {"run_dir": "x", "model": {"path": "tiny"}, "data": {"shards": "y"}}
    Config.from_dict(values, [*overrides, "train.shard=none"])
    with pytest.raises(ConfigError, match=re.escape(told)):
        Config.from_dict(values, [*overrides, "train.shard=all"])
