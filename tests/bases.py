"""Base models with random weights, small enough to train in a test, ordinary enough for Diffusers."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from benchmarks.tiny import parts
from dbtrain.runtime import rng
from dbtrain.tiny import world
from tests.session import once

TOKENS = 32
WIDTH = 64  # of every text encoder


def _words() -> CLIPTokenizer:
    words = parts.tokenizer([world.caption(world.scene(number), number) for number in range(500)])
    words.model_max_length = TOKENS
    return words


def _clip(words: CLIPTokenizer, layers: int = 2) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(words), max_position_embeddings=TOKENS, hidden_size=WIDTH, intermediate_size=128,
        num_hidden_layers=layers, num_attention_heads=4, projection_dim=WIDTH,
        bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
    )  # fmt: skip


def _vae() -> Any:
    return AutoencoderKL(
        block_out_channels=(8, 16, 16, 16), layers_per_block=1, norm_num_groups=8, sample_size=64,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip


def _unet(**changes: Any) -> Any:
    settings: dict[str, Any] = {
        "block_out_channels": (32, 64), "layers_per_block": 1, "sample_size": 8, "cross_attention_dim": WIDTH,
        "attention_head_dim": 4, "norm_num_groups": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }  # fmt: skip
    return UNet2DConditionModel(**settings | changes)


# Two levels of one width, one attention between them: compiled in half the time, as most kernels repeat.
SLIM = {
    "block_out_channels": (32, 32), "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
}  # fmt: skip


def _noise(**changes: Any) -> Any:
    settings = {
        "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1,
        "clip_sample": False,
    }  # fmt: skip
    return DDPMScheduler(**settings | changes)


def _save(folder: Path, pipeline: str, components: dict[str, Any], **options: Any) -> None:
    """The components in fp16, as published bases are, as a Diffusers folder."""
    kind: Any = getattr(diffusers, pipeline)
    for part in components.values():
        if hasattr(part, "half"):
            part.half()
    kind(**components, **options).save_pretrained(folder)


@cache
def sd(prediction: str = "epsilon", slim: bool = False) -> Path:
    """A Stable Diffusion of half a million parameters: 64 px, latents (4, 8, 8), tokens (32,).

    A slim one differs in the denoiser only: it takes the same shards.
    """

    def fill(folder: Path) -> None:
        words = _words()
        with rng.seeded("tests", "sd"):
            components = {
                "vae": _vae(), "text_encoder": CLIPTextModel(_clip(words)), "tokenizer": words,
                "unet": _unet(**SLIM if slim else {}), "scheduler": _noise(prediction_type=prediction),
                "safety_checker": None, "feature_extractor": None,
            }  # fmt: skip
        _save(folder, "StableDiffusionPipeline", components, requires_safety_checker=False)

    return once(f"sd-{prediction}{'-slim' if slim else ''}", fill)


@cache
def sdxl(slim: bool = False) -> Path:
    """An SDXL of 64 px: two text encoders side by side, pooled embedding, size and crop."""

    def fill(folder: Path) -> None:
        words = _words()
        with rng.seeded("tests", "sdxl"):
            components = {
                "vae": _vae(), "text_encoder": CLIPTextModel(_clip(words)),
                "text_encoder_2": CLIPTextModelWithProjection(_clip(words, layers=3)),
                "tokenizer": words, "tokenizer_2": _words(), "scheduler": _noise(),
                "unet": _unet(
                    cross_attention_dim=2 * WIDTH, addition_embed_type="text_time", addition_time_embed_dim=8,
                    projection_class_embeddings_input_dim=WIDTH + 6 * 8, **SLIM if slim else {},
                ),
            }  # fmt: skip
        _save(folder, "StableDiffusionXLPipeline", components)

    return once("sdxl-slim" if slim else "sdxl", fill)


def _t5() -> dict[str, Any]:
    letters = [chr(code) for code in range(33, 127)]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((c, -3.0) for c in letters)]
    words = T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=77)
    config = T5Config(
        vocab_size=128, d_model=WIDTH, d_kv=16, d_ff=128, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu", dropout_rate=0.1,
    )  # fmt: skip
    return {"tokenizer": words, "text_encoder": T5EncoderModel(config)}


IF_UNET = {
    "out_channels": 6, "encoder_hid_dim": WIDTH, "encoder_hid_dim_type": "text_proj",
    "cross_attention_dim": 32, "addition_embed_type": "text", "addition_embed_type_num_heads": 2,
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "only_cross_attention": False, "resnet_time_scale_shift": "scale_shift", "act_fn": "gelu",
}  # fmt: skip
IF_NOISE = {
    "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "squaredcos_cap_v2", "steps_offset": 0,
    "clip_sample": True, "variance_type": "learned_range", "thresholding": True, "sample_max_value": 1.5,
    "dynamic_thresholding_ratio": 0.95,
}  # fmt: skip
IF_EXTRAS = {"safety_checker": None, "feature_extractor": None, "watermarker": None}


@cache
def if_1() -> Path:
    """DeepFloyd IF's first stage at 16 px: added-KV attention, a learned variance."""

    def fill(folder: Path) -> None:
        with rng.seeded("tests", "if 1"):
            unet = _unet(in_channels=3, sample_size=16, **IF_UNET)
            components = {"unet": unet, "scheduler": _noise(**IF_NOISE), **_t5(), **IF_EXTRAS}
        _save(folder, "IFPipeline", components, requires_safety_checker=False)

    return once("if-1", fill)


@cache
def if_2() -> Path:
    """DeepFloyd IF's second stage, from 8 to 32 px, with the noise level as class label."""

    def fill(folder: Path) -> None:
        with rng.seeded("tests", "if 2"):
            unet = _unet(in_channels=6, sample_size=32, class_embed_type="timestep", **IF_UNET)
            noise = _noise(**IF_NOISE)
            components = {
                "unet": unet, "scheduler": noise, "image_noising_scheduler": _noise(**IF_NOISE),
                **_t5(), **IF_EXTRAS,
            }  # fmt: skip
        _save(folder, "IFSuperResolutionPipeline", components, requires_safety_checker=False)

    return once("if-2", fill)


SIDES = {"sd": 64, "sdxl": 64, "deepfloyd": 16, "deepfloyd-2": 32}  # px that these are made for
ALL: dict[str, Callable[[], Path]] = {
    "sd": sd, "sd-v": lambda: sd("v_prediction"), "sdxl": sdxl, "if-1": if_1, "if-2": if_2,
    "sd-slim": lambda: sd(slim=True), "sdxl-slim": lambda: sdxl(slim=True),
}  # fmt: skip
OF_FAMILY = {"sd": sd, "sdxl": sdxl, "deepfloyd": if_1, "deepfloyd-2": if_2}
