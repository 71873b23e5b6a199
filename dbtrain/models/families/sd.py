"""Stable Diffusion 1.x and 2.x: a CLIP text encoder, VAE latents and a UNet; epsilon or v-prediction.

Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models", arXiv:2112.10752.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

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


def embed(encoders: Mapping[str, nn.Module], ids: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """CLIP's last hidden states after the final norm, (prompts, L, D). SD uses no attention mask."""
    return {"prompt_embeds": encoders["text_encoder"](ids["text_encoder"])[0]}


def conditions(base: Pretrained) -> dict[str, tuple[int | None, ...]]:
    return {"prompt_embeds": (None, base.setting("unet", "cross_attention_dim", int))}


def check(base: Pretrained) -> None:
    matching(base, [
        ("unet", "in_channels", "vae", "latent_channels"),
        ("unet", "cross_attention_dim", "text_encoder", "hidden_size"),
    ])  # fmt: skip


def denoise(unet: nn.Module, x_t: Tensor, t: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
    return unet(x_t, t, condition["prompt_embeds"].to(x_t.dtype), return_dict=False)[0]


def header(base: Pretrained) -> dict[str, str]:
    """The names of this version in sd-scripts and in Stability AI's model specification."""
    v2 = base.config("unet").get("cross_attention_dim") == 1024  # the width of OpenCLIP
    v = base.config("scheduler").get("prediction_type") == "v_prediction"
    architecture = f"v2-{'768-v' if v else '512'}" if v2 else "v1"
    return {
        "ss_base_model_version": f"sd_v{1 + v2}{'_v' * v}",
        "ss_v2": str(v2),
        "modelspec.architecture": f"stable-diffusion-{architecture}/lora",
        "modelspec.prediction_type": "v" if v else "epsilon",
    }


FAMILY = Family(
    name="sd",
    pipeline="StableDiffusionPipeline",
    single_file=("v1", "v2"),
    denoiser="unet",
    classes={
        "unet": ("UNet2DConditionModel",),
        "vae": ("AutoencoderKL",),
        "text_encoder": ("CLIPTextModel",),
        "tokenizer": CLIP_WORDS,
    },
    text_encoders={"text_encoder": "tokenizer"},
    tokenize=tokenize_clip,
    embed=embed,
    space=vae_space,
    grids=unet_grids,
    encode_images=encode_moments,
    sample_posterior=sample_moments,
    conditions=conditions,
    check=check,
    denoise=denoise,
    loads_words=True,
    kohya={"unet": "lora_unet", "text_encoder": "lora_te"},
    header=header,
)
