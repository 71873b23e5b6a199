"""A base in one file, under the names of Stability's own code, as A1111 and ComfyUI have it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file, save_file
from torch import Tensor

from dbtrain.config import Model
from dbtrain.models import locate
from dbtrain.models.base import Base
from dbtrain.models.ddpm import DDPM
from dbtrain.models.families import registry as families
from dbtrain.prepare.prepare import prepare
from dbtrain.runtime.errors import ConfigError
from tests import bases
from tests.conftest import Make, dbtrain, train

LAYERS = 1  # resnets of a level on the way down, of the tests' base
RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
          "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}  # fmt: skip
UNET = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
        "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}  # fmt: skip
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def renamed(name: str, table: dict[str, str]) -> str:
    for ours, theirs in table.items():
        if name.startswith(f"{ours}."):
            return theirs + name[len(ours) :]
    return name


def unet_name(name: str, attentive: set[int]) -> str:
    if match := re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", name):
        way, level, what, number, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
        first = level * (LAYERS + 1) + (1 if way == "down" else 0)
        block = f"{'input' if way == 'down' else 'output'}_blocks"
        if what == "downsamplers":
            return f"{block}.{(level + 1) * (LAYERS + 1)}.0.op.{rest.removeprefix('conv.')}"
        if what == "upsamplers":
            return f"{block}.{first + LAYERS}.{2 if level in attentive else 1}.{rest}"
        inner = renamed(rest, RESNET) if what == "resnets" else rest
        return f"{block}.{first + number}.{0 if what == 'resnets' else 1}.{inner}"
    if match := re.match(r"mid_block\.(\w+)\.(\d+)\.(.*)", name):
        if match[1] == "resnets":
            return f"middle_block.{2 * int(match[2])}.{renamed(match[3], RESNET)}"
        return f"middle_block.1.{match[3]}"
    return renamed(name, UNET)


def vae_name(name: str) -> str:
    if match := re.match(r"(encoder|decoder)\.(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", name):
        part, way, level, what, number, rest = match.groups()
        level = level if way == "down" else str(3 - int(level))
        if what == "resnets":
            return f"{part}.{way}.{level}.block.{number}.{rest.replace('conv_shortcut', 'nin_shortcut')}"
        return f"{part}.{way}.{level}.{way}sample.{rest}"
    if match := re.match(r"(encoder|decoder)\.mid_block\.(\w+)\.(\d+)\.(.*)", name):
        if match[2] == "resnets":
            return f"{match[1]}.mid.block_{int(match[3]) + 1}.{match[4]}"
        return f"{match[1]}.mid.attn_1.{renamed(match[4], ATTENTION)}"
    return name.replace("conv_norm_out", "norm_out")


@pytest.fixture(scope="module")
def single_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = bases.sd(size="whole")
    unet = load_file(base / "unet" / "diffusion_pytorch_model.safetensors")
    attentive = {int(n.split(".")[1]) for n in unet if n.startswith("up_blocks") and ".attentions." in n}
    tensors: dict[str, Tensor] = {
        f"model.diffusion_model.{unet_name(n, attentive)}": t for n, t in unet.items()
    }
    for name, tensor in load_file(base / "vae" / "diffusion_pytorch_model.safetensors").items():
        attention = ".attentions." in name and name.endswith(".weight") and tensor.dim() == 2
        tensors[f"first_stage_model.{vae_name(name)}"] = tensor[:, :, None, None] if attention else tensor
    for name, tensor in load_file(base / "text_encoder" / "model.safetensors").items():
        nested = name if name.startswith("text_model.") else f"text_model.{name}"
        tensors[f"cond_stage_model.transformer.{nested}"] = tensor
    path = tmp_path_factory.mktemp("single") / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_every_weight_of_a_single_file_arrives(single_file: Path) -> None:
    base = Base.find(Model(path=str(single_file), config=str(bases.sd(size="whole"))))
    original = Base.find(Model(path=str(bases.sd(size="whole"))))
    for component in ("unet", "vae", "text_encoder"):
        here, there = (one.load(component).state_dict() for one in (base, original))
        assert here.keys() == there.keys()
        assert all(torch.equal(here[name], there[name]) for name in there), component


def test_a_file_of_black_forest_labs_is_read(tmp_path: Path, single_file: Path) -> None:
    shutil.copy(single_file, tmp_path / "model.sft")
    base = Base.find(Model(path=str(tmp_path / "model.sft"), config=str(bases.sd(size="whole"))))
    assert base.family.name == "sd"


def test_each_part_of_a_single_file_keeps_its_precision(tmp_path: Path, single_file: Path) -> None:
    """A UNet in fp8 beside a VAE and a text encoder in fp16, of which none is rounded."""
    tensors = load_file(single_file)
    unet = {name for name in tensors if name.startswith("model.diffusion_model.")}
    eighths = {name: tensors[name].to(torch.float8_e4m3fn) for name in unet}
    path = tmp_path / "fp8.safetensors"
    save_file(tensors | eighths | {"alphas_cumprod": torch.ones(9)}, path)
    config = str(bases.sd(size="whole"))
    base, original = Base.find(Model(path=str(path), config=config)), Base.find(Model(path=config))
    for component, dtype in (
        ("unet", torch.bfloat16),
        ("vae", torch.float16),
        ("text_encoder", torch.float16),
    ):
        assert {base.tensor(component, name).dtype for name in base.weights(component).names} == {dtype}
        here, there = (one.load(component).state_dict() for one in (base, original))
        if component == "unet":
            there = {name: tensor.to(torch.float8_e4m3fn).float() for name, tensor in there.items()}
        assert all(torch.equal(here[name], there[name]) for name in there), component


@pytest.mark.parametrize(
    ("marks", "prediction", "signal"),
    [((), "epsilon", 0.06), (("v_pred",), "v_prediction", 0.06), (("v_pred", "ztsnr"), "v_prediction", 0)],
)
def test_the_marks_of_v_prediction_are_read(
    tmp_path: Path, single_file: Path, marks: tuple[str, ...], prediction: str, signal: float
) -> None:
    """Empty tensors, as in NoobAI-XL. `signal`: the share of the image at the last timestep."""
    path = tmp_path / "marked.safetensors"
    save_file(load_file(single_file) | {mark: torch.tensor([]) for mark in marks}, path)
    base = Base.find(Model(path=str(path), config=str(bases.sd(size="whole"))))
    objective = DDPM.of(base.config("scheduler"))
    assert objective.prediction == prediction
    assert abs(float(objective.alphas_cumprod[-1].sqrt()) - signal) < 0.01
    if "ztsnr" in marks:
        assert base.config("scheduler")["timestep_spacing"] == "trailing"


V2 = "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"


@pytest.mark.parametrize(
    ("tensors", "config", "said"),
    [
        ({V2: torch.ones(1, 1024)}, None, r"predicts v \(768 px\) or noise .* set model.config to sd2-comm"),
        ({"a": torch.ones(1)}, None, r"does not read from one file: unknown; use one of v1, v2, xl_base, "),
        ({"a": torch.ones(1)}, "if-1", r"is a IFPipeline; use one of (?!.*FluxPipeline.*FluxPipeline)"),
        ({locate.EDM: torch.ones(1)}, "sd", "has edm_vpred.sigma_max: it is made for another training obj"),
    ],
    ids=["sd2", "unknown", "unfit config", "edm"],
)
def test_a_file_that_may_be_trained_wrong_is_refused(
    tmp_path: Path, tensors: dict[str, Tensor], config: str | None, said: str
) -> None:
    path = tmp_path / "odd.safetensors"
    save_file({"first_stage_model.encoder.conv_in.weight": torch.ones(1), **tensors}, path)
    with pytest.raises(ConfigError, match=said):
        Base.find(Model(path=str(path), config=config and str(bases.ALL[config]())))


@pytest.mark.slow
def test_the_whole_job_with_a_single_file(make: Make, tmp_path: Path, single_file: Path) -> None:
    make(model={"path": str(single_file), "config": str(bases.sd(size="whole"))}, train__steps=1,
         sample__prompts=["a dog"], sample__images=1, sample__steps=1)  # fmt: skip
    done = dbtrain("run", tmp_path / "c.yaml", ranks=2)
    assert done.returncode == 0
    assert (tmp_path / "run" / "DONE").is_file()


def test_what_is_no_single_file_is_refused(tmp_path: Path, single_file: Path) -> None:
    (tmp_path / "model.ckpt").write_bytes(b"pickle")
    with pytest.raises(ConfigError, match=r"is not a \.safetensors file; other formats are pickles"):
        Base.find(Model(path=str(tmp_path / "model.ckpt")))
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match=r"is quantized \(GGUF\)"):
        Base.find(Model(path=str(tmp_path / "model.gguf")))
    (tmp_path / "cut.safetensors").write_bytes(single_file.read_bytes()[:1000])
    with pytest.raises(ConfigError, match="cannot read a model"):
        Base.find(Model(path=str(tmp_path / "cut.safetensors"), config=str(bases.sd(size="whole"))))
    assert not list((tmp_path / "cache").rglob("model_index.json"))


def test_a_single_file_without_some_weights_is_refused(tmp_path: Path, single_file: Path) -> None:
    tensors = load_file(single_file)
    for name in ("model.diffusion_model.out.2.weight",
                 "cond_stage_model.transformer.text_model.final_layer_norm.weight"):  # fmt: skip
        save_file({key: tensor for key, tensor in tensors.items() if key != name}, tmp_path / "a.safetensors")
        with pytest.raises(
            ConfigError, match=r"cannot read a model from|lacks 1 weights of a CLIPTextModel, e.g. "
        ):
            Base.find(Model(path=str(tmp_path / "a.safetensors"), config=str(bases.sd(size="whole"))))


@pytest.fixture
def transformer(tmp_path: Path) -> Path:
    """The transformer of a Z-Image as its authors and ComfyUI have it."""
    tensors = load_file(bases.z_image() / "transformer" / "diffusion_pytorch_model.safetensors")
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith((".to_k.weight", ".to_v.weight")):
            continue
        if name.endswith(".to_q.weight"):
            parts = [tensors[name.replace(".to_q.", f".to_{part}.")] for part in "qkv"]
            name, tensor = name.replace(".to_q.", ".qkv."), torch.cat(parts)
        for ours, theirs in Z_IMAGE.items():
            name = name.replace(ours, theirs)
        found[name] = tensor
    path = tmp_path / "z-image.safetensors"
    save_file(found, path)
    return path


Z_IMAGE = {"all_final_layer.2-1.": "final_layer.", "all_x_embedder.2-1.": "x_embedder.",
           ".to_out.0.": ".out.", ".norm_k.": ".k_norm.", ".norm_q.": ".q_norm."}  # fmt: skip


def test_a_transformer_in_one_file_takes_the_rest_from_a_folder(make: Make, transformer: Path) -> None:
    cfg = make(model={"path": str(transformer), "config": str(bases.z_image())}, prepare__resolution=64,
               train__steps=1, prepare__class_prompt=None)  # fmt: skip
    base, original = Base.find(cfg.model), Base.find(Model(path=str(bases.z_image())))
    here, there = (one.load("transformer").state_dict() for one in (base, original))
    assert here.keys() == there.keys()
    assert all(torch.equal(here[name], there[name]) for name in there)
    parts = (part for part in base.family.parts if part != "transformer")
    assert all(base.key(part) == original.key(part) for part in parts)
    prepare(cfg)
    assert (train(cfg) / "export").is_dir()


@pytest.mark.parametrize("name", ["qwen-image", "krea2", "flux2-klein", "flux2-dev"])
def test_a_transformer_alone_is_read_for_pipelines_that_no_file_holds_whole(
    tmp_path: Path, name: str
) -> None:
    original = Base.find(Model(path=str(bases.OF_FAMILY[name]())))
    path = tmp_path / "transformer.safetensors"
    save_file(load_file(original.folder / "transformer" / "diffusion_pytorch_model.safetensors"), path)
    base = Base.find(Model(path=str(path), config=str(original.folder)))
    assert base.family.name == name
    here, there = (one.load("transformer").state_dict() for one in (base, original))
    assert here.keys() == there.keys()
    assert all(torch.equal(here[name], there[name]) for name in there)
    save_file(load_file(path) | {"vae.encoder.conv_in.weight": torch.ones(1)}, path)
    with pytest.raises(ConfigError, match="has more than a transformer, which cannot be read for a"):
        Base.find(Model(path=str(path), config=str(original.folder)))


def test_a_transformer_without_the_rest_or_with_scales_is_refused(tmp_path: Path, transformer: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=r"denoiser \(kind: z-image-turbo\) without VAE and text encoders; set model.config to a folder",
    ):
        Base.find(Model(path=str(transformer)))
    tensors = load_file(transformer)
    save_file(tensors | {"layers.0.attention.qkv.scale_weight": torch.ones(1)}, tmp_path / "fp8.safetensors")
    with pytest.raises(ConfigError, match=r"is quantized, with scales such as layers\.0.*; use one in bf16"):
        Base.find(Model(path=str(tmp_path / "fp8.safetensors"), config=str(bases.z_image())))


def test_the_kinds_of_models_in_one_file_are_those_that_diffusers_tells_apart() -> None:
    known = single_file_utils.DIFFUSERS_DEFAULT_PIPELINE_PATHS
    for kind, pipeline in locate.IN_A_FILE.items():
        assert any(name.startswith(kind) for name in known), kind
        assert pipeline in {family.pipeline for family in families.FAMILIES.values()}
