"""A base model from a stranger: nothing in its folder runs, asks, hangs, or leads out of it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

from dbtrain.config import Model
from dbtrain.data.sizes import Size
from dbtrain.evaluate import encoders
from dbtrain.models import locate
from dbtrain.models.base import Base
from dbtrain.models.pretrained import Pretrained
from dbtrain.runtime.errors import ConfigError
from dbtrain.runtime.run_folder import RunFolder
from tests import bases, eyes
from tests.conftest import Make, dbtrain
from tests.hostile import CANARY, CODE, Refused

Harm = Callable[[Path], object]


def copied(source: Path, folder: Path) -> Path:
    """A copy that shares the files, until one is replaced."""
    return Path(shutil.copytree(source, folder, copy_function=os.symlink))


def write(path: Path, text: str | bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())


def edit(folder: Path, name: str, **changes: Any) -> None:
    values = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
    write(folder / name, json.dumps(values | changes))


def index(**changes: Any) -> Harm:
    return lambda folder: edit(folder, "model_index.json", **changes)


def setting(part: str, name: str = "config.json", **changes: Any) -> Harm:
    return lambda folder: edit(folder, f"{part}/{name}", **changes)


def auto(part: str, kind: str, of: str) -> Harm:
    """The stranger's own class, by Transformers' `auto_map`."""

    def harm(folder: Path) -> None:
        edit(folder, "model_index.json", **{part: ["transformers", kind]})
        edit(folder, f"{part}/{of}", model_type="mine", auto_map={
            "AutoConfig": "mine.Mine", "AutoModel": "mine.Mine", "AutoTokenizer": ["mine.Mine", "mine.Mine"],
        })  # fmt: skip
        write(folder / part / "mine.py", CODE)

    return harm


def sharded(part: str, name: str, target: str) -> Harm:
    def harm(folder: Path) -> None:
        for path in (folder / part).glob("*.safetensors"):
            path.unlink()
        write(folder / part / name, json.dumps({"metadata": {}, "weight_map": {"a.weight": target}}))

    return harm


def text(name: str, content: str | bytes) -> Harm:
    return lambda folder: write(folder / name, content)


def special(name: str, make: Callable[[Path], object]) -> Harm:
    def harm(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return harm


def sparse(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(2**40)


SCHEDULER, WEIGHTS = "scheduler_config.json", "diffusion_pytorch_model.safetensors"
UNET, TEXT = "diffusion_pytorch_model.safetensors.index.json", "model.safetensors.index.json"
SD: dict[str, tuple[Harm, str]] = {
    "own model": (auto("text_encoder", "AutoModel", "config.json"), "AutoModel; use a base"),
    "own tokenizer": (auto("tokenizer", "AutoTokenizer", "tokenizer_config.json"), "AutoTokenizer; use a"),
    "own UNet": (auto("unet", "AutoModel", "config.json"), "transformers.AutoModel; use a base"),
    "own VAE": (auto("vae", "AutoModelForCausalLM", "config.json"), "AutoModelForCausalLM; use a base"),
    "own scheduler": (auto("scheduler", "AutoModel", SCHEDULER), "AutoModel, made for another training"),
    "auto_map beside a usual model": (auto("text_encoder", "CLIPTextModel", "config.json"), "sets auto_map"),
    "auto_map beside a usual tokenizer": (auto("tokenizer", "CLIPTokenizer", "config.json"), "sets auto_map"),
    "auto_map beside a usual UNet": (setting("unet", auto_map={"AutoModel": "a.B"}), "sets auto_map"),
    "any library": (index(unet=["os", "system"]), r"'unet' is os\.system; use a base"),
    "own pipeline": (index(_class_name=["mine", "Mine"]), r"is a \['mine', 'Mine'\]; dbtrain trains"),
    "component by path": (index(unet=["../mine", "Mine"]), r"'unet' is \.\./mine\.Mine"),
    "component of no list": (index(unet={"a": 1}), "'unet' is "),
    "text encoder of another family": (index(text_encoder=["transformers", "T5EncoderModel"]), "CLIPTextM"),
    "tokenizer of another family": (index(tokenizer=["transformers", "T5Tokenizer"]), "is transformers.T5"),
    "a kernel of the Hub": (setting("text_encoder", attn_implementation="me/kernel"), "attn_implementation"),
    "a kernel, by its inner name": (setting("text_encoder", _attn_implementation="me/k"), "_attn_impl"),
    "kernels for all layers": (setting("text_encoder", use_kernels=True), "sets use_kernels = True"),
    "quantized by a library": (setting("unet", quantization_config={"quant_method": "gptq"}), "sets quant"),
    "an adapter of another base": (text("text_encoder/adapter_config.json", "{}"), "contains an adapter"),
    "weights elsewhere": (setting("text_encoder", transformers_weights="../x.safetensors"), "transformers_w"),
    "vocabulary elsewhere": (setting("tokenizer", "tokenizer_config.json", vocab_file="/etc/x"), "'/etc/x'"),
    "shards: a pickle": (sharded("unet", UNET, "x.bin"), r"names 'x\.bin'; weights are read from"),
    "shards: a pickle, text": (sharded("text_encoder", TEXT, "pytorch_model.bin"), "weights are read from"),
    "shards: .pt": (sharded("vae", UNET, "x.pt"), r"names 'x\.pt'"),
    "shards: absolute": (sharded("unet", UNET, "/etc/x.safetensors"), "names '/etc/x.safetensors'"),
    "shards: above": (sharded("text_encoder", TEXT, "../x.safetensors"), r"names '\.\./x\.safetensors'"),
    "shards: a number": (sharded("unet", UNET, 7), "names '7'"),  # type: ignore[arg-type]
    "shards: no map": (text(f"unet/{UNET}", '{"weight_map": [1]}'), "is not an index of sharded weights"),
    "an index of a variant": (sharded("unet", UNET.replace("index", "index.fp16"), "x.bin"), "names 'x"),
    "JSON: deep": (text("unet/config.json", '{"a":' + "[" * 200_000), "cannot read .*recursion"),
    "JSON: 5,000 digits": (text("unet/config.json", '{"in_channels": ' + "9" * 5000 + "}"), "4300 digits"),
    "JSON: 4,000 digits": (text("unet/config.json", '{"in_channels": ' + "9" * 4000 + "}"), "4000 digits"),
    "JSON: not UTF-8": (text("vae/config.json", b"\xff\xfe{"), "cannot read .*config.json"),
    "JSON: a list": (text("model_index.json", "[]"), "is not a JSON object"),
    "JSON: endless": (special("vae/config.json", lambda p: p.symlink_to("/dev/zero")), "not a regular file"),
    "JSON: a FIFO": (special("tokenizer/special_tokens_map.json", os.mkfifo), "not a regular file"),
    "JSON: a terabyte": (special("unet/config.json", sparse), "has 1.1 TB"),
    "weights: a FIFO": (special("unet/x.safetensors", os.mkfifo), "'x.safetensors', which is not a regular"),
    "weights: endless": (special("vae/x.safetensors", lambda p: p.symlink_to("/dev/zero")), "not a regular"),
    "weights: a terabyte": (special("unet/x.safetensors", sparse), "has 1.1 TB; a file of a base model has"),
    "weights: a header too large": (
        text(f"unet/{WEIGHTS}", (2**62).to_bytes(8, "little") + b"{}"),
        "cannot load 'unet'",
    ),
    "weights: nothing": (text("text_encoder/model.safetensors", b""), "cannot load 'text_encoder'"),
    "many layers": (setting("unet", layers_per_block=10**9), r"layers_per_block is 1000000000; .* most 200"),
    "many layers, text": (setting("text_encoder", num_hidden_layers=10**9), "num_hidden_layers is 10000"),
    "many layers, nested": (setting("unet", transformer_layers_per_block=[[10**9]]), "transformer_layers"),
    "many blocks": (setting("vae", block_out_channels=[8] * 10**6), "num_layers, by block_out_channels, is"),
    "wide": (setting("text_encoder", max_position_embeddings=10**12), "is a number of 13 digits"),
    "no head": (setting("unet", attention_head_dim=0), "cannot load 'unet'"),
    "NaN": (setting("vae", scaling_factor=float("nan")), "scaling_factor of its vae is nan"),
    "negative": (setting("vae", scaling_factor=-1), "scaling_factor of its vae is -1"),
    "EDM": (index(scheduler=["diffusers", "EDMEulerScheduler"]), "EDMEulerScheduler, made for another train"),
    "EDM, by the config": (setting("scheduler", SCHEDULER, _class_name="EDMEulerScheduler"), "EDMEulerSched"),
    "flow": (index(scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"]), "made for another training"),
    "flow, by its sigmas": (setting("scheduler", SCHEDULER, use_flow_sigmas=True), "use_flow_sigmas = True"),
    "continuous EDM": (setting("scheduler", SCHEDULER, timestep_type="continuous"), "timestep_type = contin"),
    "unknown objective": (setting("scheduler", SCHEDULER, _class_name="Mine"), "scheduler is Mine, made for"),
    "unknown prediction": (setting("scheduler", SCHEDULER, prediction_type="flow_prediction"), "trains eps"),
    "prediction of no text": (setting("scheduler", SCHEDULER, prediction_type=[1]), "trains epsilon"),
    "unknown betas": (setting("scheduler", SCHEDULER, beta_schedule="mine"), "beta_schedule 'mine'"),
    "large betas": (setting("scheduler", SCHEDULER, beta_end=float("inf")), "beta_end inf"),
    "betas of text": (setting("scheduler", SCHEDULER, trained_betas=["a"]), "trained_betas of its own"),
    "few betas": (setting("scheduler", SCHEDULER, trained_betas=[0.1]), "trained_betas of its own"),
    "endless timesteps": (setting("scheduler", SCHEDULER, num_train_timesteps=10**12), "use 1 to 100000"),
    "no timesteps": (setting("scheduler", SCHEDULER, num_train_timesteps=0), "has 0 timesteps"),
}  # fmt: skip


def loaded(model: Model) -> None:
    base = Base.find(model)
    base.family.space(base, Size.square(64))
    for part in base.family.parts:
        base.load(part)


@pytest.mark.parametrize("name", SD)
def test_a_hostile_base_is_refused(name: str, tmp_path: Path, refused: Refused) -> None:
    harm, told = SD[name]
    harm(folder := copied(bases.sd(), tmp_path / "base"))
    refused(lambda: loaded(Model(path=str(folder))), told)


@pytest.mark.parametrize("part", ["text_encoder_2", "tokenizer_2"])
def test_the_second_half_of_an_sdxl_is_checked_too(part: str, tmp_path: Path, refused: Refused) -> None:
    folder = copied(bases.sdxl(), tmp_path / "base")
    auto(part, "AutoModel", "config.json")(folder)
    refused(lambda: loaded(Model(path=str(folder))), f"'{part}' is transformers.AutoModel; use a base where")


def test_the_second_scheduler_of_an_if_is_checked_too(tmp_path: Path, refused: Refused) -> None:
    folder = copied(bases.if_2(), tmp_path / "base")
    edit(folder, "image_noising_scheduler/scheduler_config.json", _class_name="EDMEulerScheduler")
    refused(lambda: loaded(Model(path=str(folder))), "EDMEulerScheduler, made for another training objective")


@pytest.mark.parametrize("entry", ["AutoModel", "CLIPTextModel"])
def test_a_hostile_base_of_the_hub_is_refused(
    entry: str, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    folder = copied(bases.sd(), cache / "models--me--mine" / "snapshots" / ("0" * 40))
    write(cache / "models--me--mine" / "refs" / "main", "0" * 40)
    auto("text_encoder", entry, "config.json")(folder)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    told = {"AutoModel": "transformers.AutoModel; use a base", "CLIPTextModel": "sets auto_map"}[entry]
    for find in (Base.find, lambda model: Base.of(Pretrained.here(model), model)):
        refused(lambda find=find: find(Model(path="me/mine")), told)


def test_the_hub_s_client_is_told_to_trust_no_code(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(DiffusionPipeline, "download", lambda name, **options: asked.update(options) or "x")
    locate.download(Model(path="me/mine"))
    assert asked["trust_remote_code"] is False and asked["use_safetensors"] is True


CONFIGS: dict[str, tuple[Harm, str]] = {
    "own pipeline": (index(_class_name="FluxFillPipeline"), "is a FluxFillPipeline; use one of"),
    "own tokenizer": (auto("tokenizer", "AutoTokenizer", "tokenizer_config.json"), "AutoTokenizer; use a"),
    "auto_map": (auto("tokenizer", "CLIPTokenizer", "config.json"), "sets auto_map"),
    "any library": (index(scheduler=["os", "system"]), r"os\.system, made for another"),
    "any component": (index(controlnet=["os", "system"]), "has a component 'controlnet'"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_a_hostile_config_of_a_single_file_is_refused(
    name: str, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    harm, told = CONFIGS[name]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    harm(folder := copied(bases.sd(), tmp_path / "base"))
    save_file({"model.diffusion_model.x": torch.zeros(1)}, tmp_path / "m.safetensors")
    refused(lambda: loaded(Model(path=str(tmp_path / "m.safetensors"), config=str(folder))), told)
    assert not (tmp_path / "cache").exists()


def test_a_single_file_of_a_terabyte_is_refused(tmp_path: Path, refused: Refused) -> None:
    sparse(tmp_path / "m.safetensors")
    refused(lambda: loaded(Model(path=str(tmp_path / "m.safetensors"))), "has 1.1 TB; a file of a base model")


def test_transformers_never_asks(tmp_path: Path, refused: Refused) -> None:
    """Whatever is not told what to trust is refused, with a yes on standard input."""
    write(
        tmp_path / "config.json", json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}})
    )
    write(tmp_path / "mine.py", CODE)
    locate.hush()

    def asks() -> None:
        with pytest.raises(ValueError, match="custom code"):
            transformers.AutoConfig.from_pretrained(tmp_path)
        raise ConfigError("it did not ask")

    refused(asks, "it did not ask")


@pytest.mark.parametrize("verb", ["prepare", "train", "run", "export", "sample", "evaluate", "doctor"])
def test_every_verb_refuses_a_hostile_base(make: Make, tmp_path: Path, verb: str) -> None:
    folder = copied(bases.sd(), tmp_path / "base")
    auto("tokenizer", "AutoTokenizer", "tokenizer_config.json")(folder)
    make(model__path=str(folder), evaluation__dino=str(eyes.dino()), evaluation__clip=str(eyes.clip()),
         sample__prompts=["a dog"])  # fmt: skip
    RunFolder(tmp_path / "run").export.mkdir(parents=True)
    save_file({}, RunFolder(tmp_path / "run").export / "pytorch_lora_weights.safetensors")
    done = dbtrain(verb, tmp_path / "c.yaml")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "'tokenizer' is transformers.AutoTokenizer" in done.stdout + done.stderr
    assert not Path(CANARY).exists()


@pytest.mark.parametrize("scheduler", ["EDMEulerScheduler", "FlowMatchEulerDiscreteScheduler"])
@pytest.mark.parametrize("verb", ["train", "doctor"])
def test_an_sdxl_of_another_objective_is_not_trained(
    make: Make, tmp_path: Path, verb: str, scheduler: str
) -> None:
    folder = copied(bases.sdxl(), tmp_path / "base")
    edit(folder, "model_index.json", scheduler=["diffusers", scheduler])
    edit(folder, "scheduler/scheduler_config.json", _class_name=scheduler)
    make(model__path=str(folder))
    done = dbtrain(verb, tmp_path / "c.yaml")
    assert done.returncode == 2
    assert f"{scheduler}, made for another training objective" in done.stdout + done.stderr


ENCODERS: dict[str, tuple[Harm, str]] = {
    "own model": (setting(".", model_type="mine", auto_map={"AutoModel": "mine.Mine"}), "sets auto_map"),
    "another model": (setting(".", model_type="bert"), "is a bert, not a"),
    "a kernel of the Hub": (setting(".", attn_implementation="me/kernel"), "sets attn_implementation"),
    "a pickle": (text(TEXT, json.dumps({"weight_map": {"a": "x.bin"}})), "names 'x.bin'"),
    "an adapter": (text("adapter_config.json", "{}"), "contains an adapter"),
    "endless": (special("config.json", lambda path: path.symlink_to("/dev/zero")), "has no config.json"),
    "deep": (text("preprocessor_config.json", "[" * 200_000), "cannot read .*recursion"),
    "many layers": (setting(".", num_hidden_layers=10**9, vision_config={"num_layers": 10**9}), "most 200"),
    "huge images": (setting(".", "preprocessor_config.json", crop_size=10**6, size=10**6), "at most 4096 px"),
    "no images": (setting(".", "preprocessor_config.json", crop_size=-1, size=-1), "at most 4096 px"),
    "one color": (setting(".", "preprocessor_config.json", image_mean=[0.5]), "three finite numbers"),
    "no contrast": (setting(".", "preprocessor_config.json", image_std=[0, 0, 0]), "three finite numbers"),
}  # fmt: skip


@pytest.mark.parametrize("which", ["dino", "clip"])
@pytest.mark.parametrize("name", ENCODERS)
def test_a_hostile_encoder_is_refused(name: str, which: str, tmp_path: Path, refused: Refused) -> None:
    harm, told = ENCODERS[name]
    harm(folder := copied(getattr(eyes, which)(), tmp_path / "encoder"))
    write(folder / "mine.py", CODE)
    refused(lambda: getattr(encoders, which)(str(folder)).load(), told)
