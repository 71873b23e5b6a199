"""DeepFloyd IF: pixel diffusion with a T5 text encoder and a UNet that also predicts the variance.

DeepFloyd Lab at StabilityAI 2023, github.com/deep-floyd/IF, after Saharia et al. 2022, "Imagen",
arXiv:2205.11487. Stage I generates 64 px images, stage II enlarges them to 256 px.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from dbtrain.data.batch import Batch
from dbtrain.models.ddpm import DDPM
from dbtrain.models.families.family import (
    T5_WORDS,
    Family,
    matching,
    padded,
)
from dbtrain.models.families.space import pixel_space, unet_grids
from dbtrain.models.pretrained import Pretrained
from dbtrain.runtime.errors import ConfigError

LENGTH = 77  # tokens, as in IFPipeline
ENLARGES = 4  # stage II: output px per input px


def tokenize(tokenizers: Mapping[str, Any], prompts: Sequence[str]) -> dict[str, Tensor]:
    """T5 token ids and mask, (prompts, LENGTH) int64 each, in lower case as in IFPipeline."""
    found = padded(tokenizers["text_encoder"], [prompt.lower().strip() for prompt in prompts], LENGTH)
    return {"text_encoder": found.input_ids, "mask": found.attention_mask}


def embed(encoders: Mapping[str, nn.Module], ids: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """T5's last hidden states, (prompts, L, D). Padding is masked in T5, not in the UNet."""
    return {"prompt_embeds": encoders["text_encoder"](ids["text_encoder"], attention_mask=ids["mask"])[0]}


def encode_images(vae: nn.Module | None, images: Tensor) -> dict[str, Tensor]:
    """The pixels themselves, (B, 3, H, W) uint8."""
    return {"pixels": ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)}


def unit_pixels(stored: Mapping[str, Tensor], posterior: Tensor) -> Tensor:
    return stored["pixels"].float() / 127.5 - 1


def conditions(base: Pretrained) -> dict[str, tuple[int | None, ...]]:
    return {"prompt_embeds": (None, base.setting("text_encoder", "d_model", int))}


def check(base: Pretrained, channels: int) -> None:
    """Raise ConfigError unless the UNet takes `channels`, returns 3 or (with variance) 6, and fits the T5."""
    for name, expected in (("in_channels", (channels,)), ("out_channels", (3, 6))):
        if (found := base.setting("unet", name, int)) not in expected:
            raise ConfigError(f"base model {base.name}: {name} of its unet is {found}, not {expected[0]}")
    wide = "encoder_hid_dim" if base.config("unet").get("encoder_hid_dim") else "cross_attention_dim"
    matching(base, [("unet", wide, "text_encoder", "d_model")])


def denoise(unet: nn.Module, x_t: Tensor, t: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
    """Stage I. Drops the predicted variance, which gets no loss."""
    prediction = unet(x_t, t, condition["prompt_embeds"].to(x_t.dtype), return_dict=False)[0]
    return prediction[:, : x_t.shape[1]]


def denoise_2(unet: nn.Module, x_t: Tensor, t: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
    """Stage II. Input: x_t and the noisy enlarged small image; its noise level as the class label."""
    both = torch.cat([x_t, condition["small"].to(x_t.dtype)], dim=1)
    prediction = unet(
        both, t, condition["prompt_embeds"].to(x_t.dtype), class_labels=condition["level"], return_dict=False
    )[0]
    return prediction[:, : x_t.shape[1]]


def small_image(x0: Tensor, x_t: Tensor, t: Tensor, batch: Batch, noising: DDPM | None) -> dict[str, Tensor]:
    """The image to enlarge in stage II: x0, reduced, resized as in IFSuperResolutionPipeline, with noise.

    Its noise level is a random timestep, which the UNet gets too. The noise is the row's `posterior`, which
    pixels do not need otherwise.
    """
    assert noising is not None
    size = x0.shape[2:]
    small = interpolate(x0, size=[max(1, side // ENLARGES) for side in size], mode="bilinear", antialias=True)
    large = interpolate(small, size=size, mode="bilinear", align_corners=True)
    level = noising.timesteps(batch.level)
    return {"small": noising.corrupt(large, batch.posterior, level), "level": level}


def itself(x0: Tensor, x_t: Tensor, t: Tensor, batch: Batch, noising: DDPM | None) -> dict[str, Tensor]:
    """x_t once more and its timestep, as in Diffusers' training script for stage II."""
    return {"small": x_t, "level": t}


STAGE_1 = Family(
    name="deepfloyd",
    pipeline="IFPipeline",
    denoiser="unet",
    classes={
        "unet": ("UNet2DConditionModel",),
        "text_encoder": ("T5EncoderModel",),
        "tokenizer": T5_WORDS,
    },
    text_encoders={"text_encoder": "tokenizer"},
    hidden={"text_encoder": (-1,)},
    tokenize=tokenize,
    embed=embed,
    space=pixel_space,
    grids=unet_grids,
    encode_images=encode_images,
    sample_posterior=unit_pixels,
    conditions=conditions,
    check=partial(check, channels=3),
    denoise=denoise,
    stored=("pixels",),
    vae=None,
    lora_loads=("unet",),  # IFPipeline's loader does not support T5
    sampler={"variance_type": "fixed_small"},  # the adapter does not train the variance
)
STAGE_2 = replace(
    STAGE_1,
    name="deepfloyd-2",
    pipeline="IFSuperResolutionPipeline",
    check=partial(check, channels=6),
    denoise=denoise_2,
    noising="image_noising_scheduler",
    sees={"image": small_image, "itself": itself},
    enlarges=ENLARGES,
)
