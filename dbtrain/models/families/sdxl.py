"""Stable Diffusion XL (base): conditions on two CLIP text encoders, a pooled embedding, and size and crop.

Podell et al. 2023, "SDXL: Improving Latent Diffusion Models", arXiv:2307.01952.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dbtrain.data.sizes import Size
from dbtrain.models.families.family import (
    CLIP_WORDS,
    Family,
    encode_moments,
    matching,
    sample_moments,
    tokenize_clip,
)
from dbtrain.models.families.space import unet_grids, vae_space
from dbtrain.models.pretrained import Pretrained
from dbtrain.runtime.errors import ConfigError

TIME_IDS = 6  # original height and width, crop top and left, target height and width: px


def embed(encoders: Mapping[str, nn.Module], ids: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The penultimate hidden states of both encoders, concatenated, (prompts, L, D1 + D2), and the second's
    projected pooled output, (prompts, D2)."""
    first = encoders["text_encoder"](ids["text_encoder"], output_hidden_states=True)
    second = encoders["text_encoder_2"](ids["text_encoder_2"], output_hidden_states=True)
    hidden = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
    return {"prompt_embeds": hidden, "pooled": second.text_embeds}


def row(meta: Mapping[str, Any], size: Size) -> dict[str, Tensor]:
    """The row's size and crop, (6,), which tell the denoiser crops from whole images."""
    ids = [*meta["original_size"], *meta["crop"], *size]
    return {"time_ids": torch.tensor(ids, dtype=torch.float32)}


def idle(name: str, encoder: nn.Module) -> tuple[str, ...]:
    """The last layer and the final norm of the first encoder, whose outputs `embed` does not use."""
    if name != "text_encoder":
        return ()
    config: Any = encoder.config
    last = (f".encoder.layers.{config.num_hidden_layers - 1}", ".final_layer_norm")
    return tuple(module for module, _ in encoder.named_modules() if f".{module}".endswith(last))


def conditions(base: Pretrained) -> dict[str, tuple[int | None, ...]]:
    pooled = base.setting("text_encoder_2", "projection_dim", int)
    return {
        "prompt_embeds": (None, base.setting("unet", "cross_attention_dim", int)), "pooled": (pooled,)
    }  # fmt: skip


def check(base: Pretrained) -> None:
    if base.index.get("requires_aesthetics_score") or base.index.get("text_encoder") in (None, [None, None]):
        raise ConfigError(f"{base.name} is an SDXL refiner; dbtrain trains the base model")
    pooled = base.setting("text_encoder_2", "projection_dim", int)
    wide = pooled + TIME_IDS * base.setting("unet", "addition_time_embed_dim", int)
    matching(base, [("unet", "in_channels", "vae", "latent_channels")])
    hidden = sum(base.setting(name, "hidden_size", int) for name in FAMILY.text_encoders)
    for name, needed in (("cross_attention_dim", hidden), ("projection_class_embeddings_input_dim", wide)):
        if (found := base.setting("unet", name, int)) != needed:
            raise ConfigError(
                f"base model {base.name} does not fit together: {name} of its unet is {found}, "
                f"but its text encoders give {needed}"
            )


def denoise(unet: nn.Module, x_t: Tensor, t: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
    added = {"text_embeds": condition["pooled"], "time_ids": condition["time_ids"]}
    hidden = condition["prompt_embeds"].to(x_t.dtype)
    return unet(x_t, t, hidden, added_cond_kwargs=added, return_dict=False)[0]


def header(base: Pretrained) -> dict[str, str]:
    """The names of SDXL in sd-scripts and in Stability AI's model specification."""
    v = base.config("scheduler").get("prediction_type") == "v_prediction"
    return {
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_v2": "False",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.prediction_type": "v" if v else "epsilon",
    }


FAMILY = Family(
    name="sdxl",
    pipeline="StableDiffusionXLPipeline",
    single_file=("xl_base",),
    denoiser="unet",
    classes={
        "unet": ("UNet2DConditionModel",),
        "vae": ("AutoencoderKL",),
        "text_encoder": ("CLIPTextModel",),
        "tokenizer": CLIP_WORDS,
        "text_encoder_2": ("CLIPTextModelWithProjection",),
        "tokenizer_2": CLIP_WORDS,
    },
    text_encoders={"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"},
    tokenize=tokenize_clip,
    embed=embed,
    space=vae_space,
    grids=unet_grids,
    encode_images=encode_moments,
    sample_posterior=sample_moments,
    conditions=conditions,
    check=check,
    denoise=denoise,
    row=row,
    idle=idle,
    loads_words=True,
    lora_mixin="StableDiffusionXLLoraLoaderMixin",
    kohya={"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"},
    header=header,
    sgm=True,
)
