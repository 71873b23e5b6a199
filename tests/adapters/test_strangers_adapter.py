"""An adapter from a stranger: whatever its tensors and settings say, one line and bounded memory."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file

from dbtrain.adapters.formats import peft_folder
from dbtrain.adapters.formats.common import CONFIGS
from dbtrain.config import Model
from dbtrain.sample.pipeline import AdapterPipeline
from tests import bases
from tests.hostile import Refused

LAYER = "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
WIDE = 64  # inputs and outputs of that layer
Harm = Callable[[Path], object]
LORA: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": [LAYER]}
ZEROS = {"lora_A": torch.zeros(2, WIDE), "lora_B": torch.zeros(WIDE, 2)}


def folder(at: Path) -> Path:
    """A sound LoRA of one layer, as PEFT writes it."""
    (at / "unet").mkdir(parents=True)
    named = {f"{peft_folder.PREFIX}{LAYER}.{part}.weight": tensor for part, tensor in ZEROS.items()}
    save_file(named, at / "unet" / peft_folder.WEIGHTS, {"format": "pt"})
    (at / "unet" / peft_folder.CONFIG).write_text(json.dumps(LORA))
    return at


def says(**settings: Any) -> Harm:
    return lambda at: (at / "unet" / peft_folder.CONFIG).write_text(json.dumps(LORA | settings))


def text(content: str) -> Harm:
    return lambda at: (at / "unet" / peft_folder.CONFIG).write_text(content)


def weights(content: bytes) -> Harm:
    return lambda at: (at / "unet" / peft_folder.WEIGHTS).write_bytes(content)


def special(name: str, make: Callable[[Path], object]) -> Harm:
    def harm(at: Path) -> None:
        (at / "unet" / name).unlink()
        make(at / "unet" / name)

    return harm


def sparse(path: Path) -> None:
    """A terabyte of zeros, which the header says is one tensor."""
    header = json.dumps({"x": {"dtype": "F16", "shape": [2**39], "data_offsets": [0, 2**40]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + 2**40)


FOLDERS: dict[str, tuple[Harm, str]] = {
    "rank of billions": (says(r=10**9), "its rank is 1000000000, but its tensors have at most 2"),
    "rank of a layer": (says(rank_pattern={LAYER: 10**9}), "its rank is 1000000000"),
    "rank of 400 digits": (says(r=10**400, lora_alpha=10**400), "its rank is a number of 401 digits"),
    "rank of 5,000 digits": (text('{"r": ' + "9" * 5000 + "}"), "cannot read .*4300 digits"),
    "LoHa of billions": (says(peft_type="LOHA", alpha=1, r=10**9), "its rank is 1000000000"),
    "LoKr of 400 digits": (says(peft_type="LOKR", alpha=1, r=10**400), "its rank is a number of 401 digits"),
    "rank of text": (says(r="2"), "its settings are damaged"),
    "no rank": (says(r=0), "its settings are damaged"),
    "negative rank": (says(r=-1), "the scale of .* is -"),
    "alpha without end": (says(lora_alpha=float("inf")), "its alpha is inf"),
    "alpha of 400 digits": (says(lora_alpha=10**400), "damaged|its alpha is a number of 401 digits"),
    "alpha of NaN": (says(lora_alpha=float("nan")), "its alpha is nan"),
    "alpha of a layer": (says(alpha_pattern={LAYER: float("inf")}), "its alpha is inf"),
    "a slow pattern": (says(rank_pattern={"(a+)+$": 2}), "its rank_pattern has the regular expression"),
    "a pattern of no table": (says(rank_pattern=[1]), "its rank_pattern is not a table"),
    "copies of layers": (says(layer_replication=[[0, 10**9]]), "its setting layer_replication is not supp"),
    "copies of modules": (says(modules_to_save=["conv_in"]), "its setting modules_to_save is not supported"),
    "another package": (says(megatron_config={"a": 1}, megatron_core="antigravity"), "megatron_config"),
    "other parameters": (says(target_parameters=["conv_in.weight"]), "target_parameters is not supported"),
    "a decomposition of the base": (says(init_lora_weights="pissa"), "init_lora_weights = pissa; convert"),
    "another kind": (says(peft_type="BOFT"), "of the kind BOFT"),
    "a kind of no text": (says(peft_type=[1]), r"of the kind \[1\]"),
    "settings: deep": (text("[" * 200_000), "cannot read .*recursion"),
    "settings: a list": (text("[1]"), "is not a JSON object"),
    "settings: a terabyte": (
        special(peft_folder.CONFIG, lambda path: (path.touch(), os.truncate(path, 2**40))), "has 1.1 TB"
    ),
    "settings: a FIFO": (special(peft_folder.CONFIG, os.mkfifo), "is missing, or is not a regular file"),
    "weights: a FIFO": (special(peft_folder.WEIGHTS, os.mkfifo), "is not a regular file"),
    "weights: endless": (special(peft_folder.WEIGHTS, lambda p: p.symlink_to("/dev/zero")), "not a regular"),
    "weights: a terabyte": (special(peft_folder.WEIGHTS, sparse), "has 1.1 TB; use one of at most 4 GB"),
    "weights: a header too large": (weights((2**62).to_bytes(8, "little") + b"{}"), "[Hh]eader"),
    "weights: a header of garbage": (weights((9).to_bytes(8, "little") + b"\xff" * 9), "[Hh]eader"),
    "weights: nothing": (weights(b""), "is not a PEFT adapter"),
    "weights: no tensors": (weights(save({})), "it has no tensors of an adapter"),
    "weights: another layer": (weights(save({"x.lora_A.weight": torch.zeros(2, 2)})), "matches no module of"),
}  # fmt: skip
KOHYA = "lora_unet_" + LAYER.replace(".", "_")
DOWN, UP = torch.zeros(2, WIDE), torch.zeros(WIDE, 2)
FILES: dict[str, tuple[dict[str, torch.Tensor], dict[str, str], str]] = {
    "kohya: settings of 5,000 digits": (
        {f"{KOHYA}.lora_down.weight": DOWN}, {CONFIGS: "9" * 5000}, "4300 digits"
    ),
    "kohya: settings are deep": ({f"{KOHYA}.alpha": DOWN}, {CONFIGS: "[" * 200_000}, "recursion"),
    "kohya: a rank of billions": (
        {f"{KOHYA}.lora_down.weight": DOWN, f"{KOHYA}.lora_up.weight": UP},
        {CONFIGS: json.dumps({"unet": LORA | {"r": 10**9}})}, "its rank is 1000000000",
    ),
    "kohya: many alphas": ({f"{KOHYA}.lora_down.weight": DOWN, f"{KOHYA}.alpha": UP}, {}, "damaged"),
    "kohya: only a DoRA": ({f"{KOHYA}.dora_scale": UP}, {}, "must be of one kind"),
    "kohya: alpha is NaN": (
        {f"{KOHYA}.lora_down.weight": DOWN, f"{KOHYA}.alpha": torch.tensor(float("nan"))}, {}, "alpha is nan"
    ),
    "diffusers: metadata is a list": (
        {f"unet.{LAYER}.lora.down.weight": DOWN}, {"lora_adapter_metadata": "[]"}, "is not a JSON object"
    ),
    "diffusers: a rank of billions": (
        {f"unet.{LAYER}.lora.down.weight": DOWN, f"unet.{LAYER}.lora.up.weight": UP},
        {"lora_adapter_metadata": '{"unet.r": 1000000000}'}, "its rank is 1000000000",
    ),
    "another model's": ({"x": DOWN}, {}, "its tensor x matches no format"),
}  # fmt: skip


@pytest.fixture(scope="module")
def pipe() -> AdapterPipeline:
    return AdapterPipeline.load(Model(path=str(bases.sd())))


@pytest.mark.parametrize("name", FOLDERS)
def test_a_hostile_adapter_folder_is_refused(
    name: str, pipe: AdapterPipeline, tmp_path: Path, refused: Refused
) -> None:
    harm, told = FOLDERS[name]
    harm(at := folder(tmp_path / "adapter"))
    refused(lambda: pipe.add("it", at), told)
    assert pipe.names() == set()


@pytest.mark.parametrize("name", FILES)
def test_a_hostile_adapter_file_is_refused(
    name: str, pipe: AdapterPipeline, tmp_path: Path, refused: Refused
) -> None:
    tensors, header, told = FILES[name]
    save_file(tensors, tmp_path / "a.safetensors", header)
    refused(lambda: pipe.add("it", tmp_path / "a.safetensors"), told)
    assert pipe.names() == set()


def test_a_slow_regular_expression_for_the_layers_is_not_searched(
    pipe: AdapterPipeline, tmp_path: Path
) -> None:
    """The layers are those of the tensors."""
    at = folder(tmp_path / "adapter")
    says(target_modules=r"(((\w+\.?)+)+)+!")(at)
    pipe.add("it", at)
    assert pipe.names() == {"it"}
    pipe.remove("it")
