"""Stable Diffusion 1.x and 2.x: CLIP text encoder, VAE latents, UNet; epsilon or v-prediction.

Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models", arXiv:2112.10752.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from dbtrain.errors import ConfigError
from dbtrain.families.base import Family, draw_latents, encode_moments, tokenize_clip
from dbtrain.pretrained import Pretrained


def tokenize(tokenizers: Mapping[str, Any], prompts: Sequence[str]) -> dict[str, Tensor]:
    return {"text_encoder": tokenize_clip(tokenizers["text_encoder"], prompts)}


def embed(encoders: Mapping[str, nn.Module], ids: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Last hidden state after CLIP's final norm, (prompts, L, D). SD passes no attention mask."""
    return {"prompt_embeds": encoders["text_encoder"](ids["text_encoder"])[0]}


def check(base: Pretrained) -> None:
    pairs = [
        ("unet", "in_channels", "vae", "latent_channels"),
        ("unet", "cross_attention_dim", "text_encoder", "hidden_size"),
    ]
    for one, name, other, its_name in pairs:
        here, there = base.setting(one, name, int), base.setting(other, its_name, int)
        if here != there:
            raise ConfigError(
                f"base model {base.name} does not fit together: {name} of its {one} is {here}, "
                f"but {its_name} of its {other} is {there}"
            )


def denoise(unet: nn.Module, x_t: Tensor, t: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
    return unet(x_t, t, condition["prompt_embeds"], return_dict=False)[0]


FAMILY = Family(
    name="sd",
    pipeline="StableDiffusionPipeline",
    denoiser="unet",
    text_encoders={"text_encoder": "tokenizer"},
    targets=("to_q", "to_k", "to_v", "to_out.0"),
    tokenize=tokenize,
    embed=embed,
    encode_images=encode_moments,
    draw=draw_latents,
    check=check,
    denoise=denoise,
)
