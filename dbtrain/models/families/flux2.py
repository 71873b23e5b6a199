"""FLUX.2: a flow-matching transformer of double and single blocks. klein reads with Qwen3, dev with Mistral.

Black Forest Labs 2025, bfl.ai/blog/flux-2, and 2026, bfl.ai/blog/flux2-klein-towards-interactive-visual-
intelligence. The VAE's latents are cut into 2 x 2 patches and normalized by the statistics of a batch norm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from dbtrain.data.sizes import Size
from dbtrain.models.families.family import QWEN_WORDS, Family, encode_apart, known_as
from dbtrain.models.families.space import LatentSpace, latent_shape, patch_grids
from dbtrain.models.families.transformer import (
    ATTENDED,
    DOUBLE,
    PATCH,
    SINGLES,
    chat,
    check_inputs,
    joined_layers,
    positions,
    stacked,
)
from dbtrain.models.flow_matching import FlowMatching
from dbtrain.models.pretrained import Pretrained
from dbtrain.runtime.errors import ConfigError

GUIDANCE = 1.0  # embedded in training, which is for no guidance: github.com/black-forest-labs/flux/issues/79
LENGTH = 512  # tokens; padding is part of what the model was trained on
LAYERS, DEV_LAYERS = (9, 18, 27), (10, 20, 30)  # of Qwen3 and of Mistral, whose hidden states are read


def tokenize(tokenizers: Mapping[str, Any], prompts: Sequence[str]) -> dict[str, Tensor]:
    """Token ids of Qwen3's chat, without thinking, and their mask, (prompts, LENGTH) int64 each."""
    return chat(tokenizers["text_encoder"], prompts, LENGTH, enable_thinking=False)


def tokenize_dev(tokenizers: Mapping[str, Any], prompts: Sequence[str]) -> dict[str, Tensor]:
    """Token ids of Mistral's chat with the pipeline's system message, and their mask."""
    from diffusers.pipelines.flux2.pipeline_flux2 import format_input

    found = [
        tokenizers["text_encoder"].apply_chat_template(
            [message], add_generation_prompt=False, tokenize=True, return_dict=True, return_tensors="pt",
            padding="max_length", max_length=LENGTH,
        )
        for message in format_input(list(prompts))
    ]  # fmt: skip
    return stacked(found, prompts, LENGTH)


def embed(
    encoders: Mapping[str, nn.Module], ids: Mapping[str, Tensor], layers: Sequence[int] = LAYERS
) -> dict[str, Tensor]:
    """Three hidden states side by side, (prompts, L, 3 D). The transformer attends to padding too."""
    return {"prompt_embeds": joined_layers(encoders["text_encoder"], ids, layers)}


def conditions(base: Pretrained) -> dict[str, tuple[int | None, ...]]:
    return {"prompt_embeds": (LENGTH, base.setting("transformer", "joint_attention_dim", int))}


def check(base: Pretrained, layers: Sequence[int] = LAYERS) -> None:
    """Raise ConfigError unless the transformer fits the VAE and the text encoder."""
    check_inputs(base, {
        "in_channels": PATCH**2 * base.setting("vae", "latent_channels", int),
        "joint_attention_dim": len(layers) * base.setting("text_encoder", "hidden_size", int),
    })  # fmt: skip
    if (there := base.setting("text_encoder", "num_hidden_layers", int)) < max(layers):
        raise ConfigError(
            f"base model {base.name}: its text encoder has {there} layers, but {max(layers)} are read"
        )


def space(base: Pretrained, size: Size) -> LatentSpace:
    """Patches of the VAE's latents, normalized. The statistics are weights of the VAE."""
    channels, height, width = latent_shape(base, size, PATCH)
    mean, var = (base.tensor("vae", f"bn.running_{name}").double() for name in ("mean", "var"))
    std = (var + base.setting("vae", "batch_norm_eps", float)).sqrt()
    shape = (channels * PATCH**2, height // PATCH, width // PATCH)
    return LatentSpace(shape, tuple((1 / std).tolist()), tuple(mean.tolist()))


def encode_images(vae: Any, images: Tensor) -> dict[str, Tensor]:
    """The mode of the VAE's posterior in patches, (B, 4 C, h / 2, w / 2) fp32, as the model was trained."""
    parameter = next(vae.parameters())
    mode = vae.encode(images.to(parameter.device, parameter.dtype)).latent_dist.mode()
    return {"mean": pixel_unshuffle(mode.float(), PATCH)}


def decode(vae: Any, latents: Tensor) -> Tensor:
    return vae.decode(pixel_shuffle(latents, PATCH), return_dict=False)[0]


def generated(latents: Tensor, space: LatentSpace) -> Tensor:
    """The pipeline returns the VAE's latents, without normalization and patches."""
    return space.scaled(pixel_unshuffle(latents.float(), PATCH))


def denoise(transformer: Any, x_t: Tensor, t: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
    text = condition["prompt_embeds"].to(x_t.dtype)
    velocity = transformer(
        hidden_states=x_t.flatten(2).transpose(1, 2), timestep=t, encoder_hidden_states=text,
        guidance=t.new_full(t.shape, GUIDANCE) if transformer.config.guidance_embeds else None,
        txt_ids=positions(1, 1, 1, text.shape[1], device=x_t.device),
        img_ids=positions(1, *x_t.shape[2:], 1, device=x_t.device), return_dict=False,
    )[0]  # fmt: skip
    return velocity.transpose(1, 2).reshape(x_t.shape)


def distilled(base: Pretrained) -> str | None:
    return "FLUX.2-klein-base of the same size" if base.index.get("is_distilled") else None


def header(base: Pretrained) -> dict[str, str]:
    """The names of FLUX.2 klein of this size in musubi-tuner."""
    size = "9b" if base.config("transformer").get("num_attention_heads", 0) > 24 else "4b"
    return known_as(f"Flux.2-klein-{size}", f"flux_2_klein_{size}")(base)


SINGLE = ("to_qkv_mlp_proj", "attn.to_out")  # attention and MLP of a single block are two layers
ATTENTION = (*ATTENDED, *SINGLE)
KLEIN = Family(
    name="flux2-klein",
    pipeline="Flux2KleinPipeline",
    denoiser="transformer",
    classes={
        "transformer": ("Flux2Transformer2DModel",),
        "vae": ("AutoencoderKLFlux2",),
        "text_encoder": ("Qwen3ForCausalLM",),
        "tokenizer": QWEN_WORDS,
    },
    text_encoders={"text_encoder": "tokenizer"},
    tokenize=tokenize,
    embed=embed,
    space=space,
    grids=partial(patch_grids, patch=PATCH),
    encode_images=encode_images,
    sample_posterior=lambda stored, posterior: stored["mean"],
    conditions=conditions,
    check=check,
    denoise=denoise,
    objective=FlowMatching,
    text_dtype=torch.bfloat16,
    trained_text=(),
    unread=("lm_head",),
    hidden={"text_encoder": LAYERS},
    presets={
        "attention": ATTENTION,
        "diffusers": ("to_q", "to_k", "to_v", "to_out.0", *SINGLE),
        "minimal": ("to_q", "to_v", "to_qkv_mlp_proj"),
        "all": (*ATTENTION, "linear_in", "linear_out"),
    },
    stored=("mean",),
    encode_prompt=encode_apart,
    generated=generated,
    decode=decode,
    needs_vae=True,
    distilled=distilled,
    lora_mixin="Flux2LoraLoaderMixin",
    header=header,
    original=(
        *((rf"{DOUBLE}attn\.to_{part}", r"double_blocks.\1.img_attn.qkv") for part in "qkv"),
        *((rf"{DOUBLE}attn\.add_{part}_proj", r"double_blocks.\1.txt_attn.qkv") for part in "qkv"),
        (rf"{DOUBLE}attn\.to_out\.0", r"double_blocks.\1.img_attn.proj"),
        (rf"{DOUBLE}attn\.to_add_out", r"double_blocks.\1.txt_attn.proj"),
        *(
            (rf"{DOUBLE}{ours}\.linear_{side}", rf"double_blocks.\1.{theirs}.{number}")
            for ours, theirs in (("ff", "img_mlp"), ("ff_context", "txt_mlp"))
            for side, number in (("in", 0), ("out", 2))
        ),
        (rf"{SINGLES}attn\.to_qkv_mlp_proj", r"single_blocks.\1.linear1"),
        (rf"{SINGLES}attn\.to_out", r"single_blocks.\1.linear2"),
        ("x_embedder", "img_in"),
        ("context_embedder", "txt_in"),
        *(
            (rf"time_guidance_embed\.{ours}_embedder\.linear_{number}", f"{theirs}_in.{side}_layer")
            for ours, theirs in (("timestep", "time"), ("guidance", "guidance"))
            for number, side in ((1, "in"), (2, "out"))
        ),
        (r"(\w+_stream_modulation\w*)\.linear", r"\1.lin"),
        ("proj_out", "final_layer.linear"),
    ),
)
DEV = replace(
    KLEIN,
    name="flux2-dev",
    pipeline="Flux2Pipeline",
    classes={
        **KLEIN.classes,
        "text_encoder": ("Mistral3ForConditionalGeneration",),
        "tokenizer": ("TokenizersBackend", "PixtralProcessor"),
    },
    tokenize=tokenize_dev,
    embed=partial(embed, layers=DEV_LAYERS),
    unread=("lm_head", "model.vision_tower", "model.multi_modal_projector"),
    hidden={"text_encoder": DEV_LAYERS},
    check=partial(check, layers=DEV_LAYERS),
    encode_prompt=lambda pipe, prompt, guided: encode_apart(pipe, prompt, False),  # guidance is embedded
    generated=lambda tokens, space: tokens.transpose(1, 2).reshape(-1, *space.shape).float(),
    distilled=lambda base: None,
    header=known_as("Flux.2-dev", "flux_2_dev"),
)
