"""Bases of real architecture with random weights, and shards of random latents, made on the spot.

`folder` makes a whole Diffusers pipeline folder (SD-1.5: 2 GB, SDXL: 7 GB), `outline` one without weights
whose components `Random` makes straight on the device, for what only times the step.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import safetensors.torch
import torch
from torch import Tensor, nn

from dbtrain import tiny
from dbtrain.config import Model
from dbtrain.data import shards
from dbtrain.models.base import Base
from dbtrain.models.families import registry as families
from dbtrain.models.families.family import Family
from dbtrain.models.locate import hush
from dbtrain.runtime import console, dist, files, rng

SIDES = {"tiny": 64, "sd15": 512, "sdxl": 1024}  # px
TOKENS = 77
VOCABULARY = 49408
SHARD_ROWS = 16


def unets() -> dict[str, dict[str, Any]]:
    """Settings of the denoisers, as published; what is not said is Diffusers' default, which is SD-1's."""
    xl = {
        "sample_size": 128, "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20), "transformer_layers_per_block": (1, 2, 10),
        "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    }  # fmt: skip
    return {"sd15": {"sample_size": 64, "cross_attention_dim": 768}, "sdxl": xl}


def _text_encoder(kind: str) -> Callable[[], Any]:
    """CLIP-L, or the larger one of SDXL."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    large = kind == "bigG"
    settings: dict[str, Any] = {
        "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
        "projection_dim": 1280, "hidden_act": "gelu",
    } if large else {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "projection_dim": 768, "hidden_act": "quick_gelu",
    }  # fmt: skip
    config = CLIPTextConfig(vocab_size=VOCABULARY, max_position_embeddings=TOKENS, **settings)
    return lambda: (CLIPTextModelWithProjection if large else CLIPTextModel)(config)


def _models(model: str) -> dict[str, Callable[[], Any]]:
    """How to make each component with weights."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    wide: Any = {
        "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4,
        "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
        "sample_size": SIDES[model], "scaling_factor": 0.13025 if model == "sdxl" else 0.18215,
        "force_upcast": model == "sdxl",
    }  # fmt: skip
    made = {
        "unet": lambda: UNet2DConditionModel(**unets()[model]), "vae": lambda: AutoencoderKL(**wide),
        "text_encoder": _text_encoder("L"),
    }  # fmt: skip
    return made | ({"text_encoder_2": _text_encoder("bigG")} if model == "sdxl" else {})


def _words() -> Any:
    """CLIP's tokenizer with a small vocabulary, padded to CLIP's length."""
    from benchmarks.tiny import parts
    from dbtrain.tiny import world

    words = parts.tokenizer([world.caption(world.scene(number), number) for number in range(500)])
    words.model_max_length = TOKENS
    return words


def _scheduler() -> Any:
    from diffusers import DDPMScheduler

    return DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False
    )


def model(name: str, work: Path, weights: bool = False) -> Model:
    """The config's model: the embedded base, a folder with random weights, or one without weights."""
    if name == "tiny":
        return Model(path="tiny")
    return Model(path=str((folder if weights else outline)(name, work)), variant=None)


def outline(model: str, work: Path) -> Path:
    """The model's folder without weights: index, configs, tokenizers and scheduler."""
    return _made(model, work, weights=False)


def folder(model: str, work: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """The model's folder with random weights as `dtype` safetensors; `tiny` is the embedded base."""
    return _made(model, work, weights=True, dtype=dtype)


def _made(model: str, work: Path, weights: bool, dtype: torch.dtype = torch.bfloat16) -> Path:
    if model == "tiny":
        return tiny.path()
    place = work / "bases" / (f"{model}-{str(dtype).removeprefix('torch.')}" if weights else model)
    if not place.exists():
        files.write_folder_atomically(place, lambda part: _fill(model, part, weights, dtype))
    return place


def _fill(model: str, place: Path, weights: bool, dtype: torch.dtype) -> None:
    hush()
    makers = _models(model)
    tokenizers = {name.replace("text_encoder", "tokenizer"): _words for name in makers if "text" in name}
    index: dict[str, Any] = {
        "_class_name": families.get("sdxl" if model == "sdxl" else "sd").pipeline,
        "_diffusers_version": "0.38.0",
        **({"force_zeros_for_empty_prompt": True} if model == "sdxl" else {
            "safety_checker": [None, None], "feature_extractor": [None, None],
            "requires_safety_checker": False}),
    }  # fmt: skip
    with console.bar(len(makers), f"random {model}", "component") as bar:
        for name, make in (makers | tokenizers | {"scheduler": _scheduler}).items():
            if name in makers and weights:
                part: Any = randomized(make, name, dtype)
                part.save_pretrained(place / name)
                del part
            elif name in makers:
                with torch.device("meta"):
                    part = make()
                (place / name).mkdir()
                part.config.architectures = None
                _save_config(part, place / name)
            else:
                part = make()
                part.save_pretrained(place / name)
            index[name] = _index_entry(model, name)
            bar.update(name in makers)
    files.write(place / "model_index.json", json.dumps(index, indent=1) + "\n")


def _index_entry(model: str, name: str) -> list[str]:
    known = {
        "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "DDPMScheduler"], "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    }  # fmt: skip
    return known.get(name, ["transformers", "CLIPTokenizer"])


def _save_config(part: Any, place: Path) -> None:
    if isinstance(part.config, dict):  # a Diffusers model
        part.save_config(place)
    else:
        part.config.save_pretrained(place)


def randomized(make: Callable[[], Any], name: str, dtype: torch.dtype) -> nn.Module:
    """A module with weights drawn straight on this rank's device, in `dtype`: small normals, norms at 1.

    Drawn in their own dtype and place, as fp32 SDXL on a CPU first would take minutes.
    """
    with torch.device("meta"):
        module: nn.Module = make()
    module = module.to(dtype).to_empty(device=dist.device())
    draw = torch.Generator(dist.device()).manual_seed(rng.seed_of("benchmark base", name))
    with torch.no_grad():
        for label, value in module.named_parameters():
            if "norm" in label and value.ndim == 1:
                value.fill_(float(label.endswith("weight")))
            elif value.ndim == 1:
                value.zero_()
            else:
                value.normal_(0.0, value[0].numel() ** -0.5 if value.ndim > 1 else 0.02, generator=draw)
        for label, buffer in module.named_buffers():
            assert label.endswith("position_ids"), f"a buffer that to_empty() left without content: {label}"
            buffer.copy_(torch.arange(buffer.shape[-1], device=buffer.device).expand_as(buffer))
    return module.requires_grad_(False).eval()


class Random(Base):
    """A base whose weights are drawn when they are asked for, on the device: only its configs are read."""

    def load(self, component: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
        kind = self._class(component)
        if not issubclass(kind, nn.Module):
            return super().load(component, dtype, **options)
        return randomized(lambda: self._empty(component), component, dtype)

    def _empty(self, component: str) -> nn.Module:
        return self.skeleton(component)


@contextmanager
def without_weights() -> Iterator[None]:
    """In the block, bases are `Random` wherever their folder holds no weights."""
    find = Base.find

    def found(cfg: Model) -> Base:
        base = find(cfg)
        return (
            base
            if any(base.folder.glob("*/*.safetensors"))
            else Random(base.name, base.folder, None, base.family)
        )

    with mock.patch.object(Base, "find", found):
        yield


def write_shards(place: Path, model: str, base: Base, rows: int, roles: tuple[str, ...]) -> Path:
    """Shards of random latents and prompt embeddings, of the shapes that `prepare` would give."""
    if (place / shards.MANIFEST).exists():
        return place
    place.mkdir(parents=True, exist_ok=True)
    family = base.family
    space = family.space(base, SIDES[model])
    draw = torch.Generator().manual_seed(0)
    made = {role: tuple(_shard(place, role, n, min(SHARD_ROWS, rows - n), space.shape, SIDES[model], draw)
                        for n in range(0, rows, SHARD_ROWS)) for role in roles}  # fmt: skip
    data = safetensors.torch.save(_prompts(base, family, draw))
    (place / "prompts-000000000000.safetensors").write_bytes(data)
    prompts = shards.Prompts(
        file="prompts-000000000000.safetensors", sha256=hashlib.sha256(data).hexdigest(),
        texts=("a photo of sks mug", "a photo of a mug"),
    )  # fmt: skip
    manifest = shards.Manifest(
        version=shards.VERSION, family=family.name, base=base.name, components={},
        request={"resolution": SIDES[model]}, latent_shape=space.shape, latent_scale=space.scale,
        latent_shift=space.shift, prompts=prompts, roles=made,
    )  # fmt: skip
    files.write_atomically(place / shards.MANIFEST, manifest.text())
    return place


def _shard(
    place: Path, role: str, first: int, rows: int, shape: tuple[int, ...], side: int, draw: torch.Generator
) -> shards.Shard:
    metas = [
        {"source": f"{role}{first + n}.png", "original_size": [side, side], "crop": [0, 0], "flip": False,
         "prompt": int(role == "class"), "key": f"{role}{first + n:08d}"} for n in range(rows)
    ]  # fmt: skip
    tensors = [{"mean": torch.randn(shape, generator=draw), "std": torch.rand(shape, generator=draw)}
               for _ in metas]  # fmt: skip
    data = shards.pack([shards.Row(t, m) for t, m in zip(tensors, metas, strict=True)])
    file = f"{role}-{first // SHARD_ROWS:05d}-000000000000.tar"
    (place / file).write_bytes(data)
    keys = tuple(str(meta["key"]) for meta in metas)
    return shards.Shard(file=file, bytes=len(data), sha256=hashlib.sha256(data).hexdigest(), keys=keys)


def _prompts(base: Base, family: Family, draw: torch.Generator) -> dict[str, Tensor]:
    """A table of two prompts, with what the family's `embed` would give."""
    wide = base.setting("unet", "cross_attention_dim", int)
    length = base.setting("text_encoder", "max_position_embeddings", int)
    table = {"condition.prompt_embeds": torch.randn(2, length, wide, generator=draw)}
    if "text_encoder_2" in family.text_encoders:
        pooled = base.setting("text_encoder_2", "projection_dim", int)
        table["condition.pooled"] = torch.randn(2, pooled, generator=draw)
    ids = {f"ids.{encoder}": torch.zeros(2, length, dtype=torch.int64) for encoder in family.text_encoders}
    return table | ids
