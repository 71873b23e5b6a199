"""FLUX.1: a flow-matching transformer of double and single blocks, with CLIP and T5 as text encoders.

Black Forest Labs 2024, github.com/black-forest-labs/flux. `dev` was distilled to take the guidance scale as
an input, `schnell` to generate images in four steps. Others are neither, and take classifier-free guidance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dbtrain.models.families.family import (
    CLIP_WORDS,
    T5_WORDS,
    Family,
    encode_apart,
    known_as,
    side_by_side,
    tokenize_clip,
)
from dbtrain.models.families.space import vae_space
from dbtrain.models.families.transformer import (
    ATTENDED,
    COMMON,
    FEED_FORWARD,
    FLUX_BLOCKS,
    PATCH,
    check_inputs,
    packed,
    positions,
    t5_states,
    t5_words,
    text_and_pooled,
    unpacked,
    unpacked_x0,
)
from dbtrain.models.pretrained import Pretrained

LENGTH, OF_SCHNELL = 512, 256  # tokens of T5; padding is part of what the model was trained on
NAMES = ("prompt_embeds", "pooled_prompt_embeds")


def tokenize(
    tokenizers: Mapping[str, Any], prompts: Sequence[str], length: int = LENGTH
) -> dict[str, Tensor]:
    """Token ids, (prompts, length) int64 for T5 and CLIP's length for CLIP, which may read only a start."""
    ids = tokenize_clip({"text_encoder": tokenizers["text_encoder"]}, prompts)
    if "text_encoder_2" in tokenizers:
        ids["text_encoder_2"] = t5_words(tokenizers["text_encoder_2"], prompts, length).input_ids
    return ids


def embed(encoders: Mapping[str, nn.Module], ids: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """T5's last hidden states, (prompts, L, D), and CLIP's pooled output, (prompts, D). No mask anywhere."""
    found = {"pooled_prompt_embeds": encoders["text_encoder"](ids["text_encoder"]).pooler_output}
    if "text_encoder_2" in ids:
        found["prompt_embeds"] = t5_states(encoders["text_encoder_2"], ids["text_encoder_2"])
    return found


def check(base: Pretrained) -> None:
    """Raise ConfigError unless the transformer fits the VAE and the text encoders."""
    check_inputs(base, {
        "in_channels": PATCH**2 * base.setting("vae", "latent_channels", int),
        "pooled_projection_dim": base.setting("text_encoder", "hidden_size", int),
        "joint_attention_dim": base.setting("text_encoder_2", "d_model", int),
    })  # fmt: skip


def denoise(transformer: Any, x_t: Tensor, t: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
    """The velocity. A guidance scale of 1 leaves `dev` free of what its distillation added."""
    height, width = x_t.shape[2:]
    text = condition["prompt_embeds"].to(x_t.dtype)
    velocity = transformer(
        hidden_states=packed(x_t), timestep=t, encoder_hidden_states=text,
        guidance=torch.ones_like(t) if transformer.config.guidance_embeds else None,
        pooled_projections=condition["pooled_prompt_embeds"].to(x_t.dtype),
        txt_ids=text.new_zeros(text.shape[1], 3),
        img_ids=positions(1, height // PATCH, width // PATCH, device=x_t.device), return_dict=False,
    )[0]  # fmt: skip
    return unpacked(velocity, height, width)


def distilled(base: Pretrained) -> str | None:
    """Of those without an embedded guidance, schnell alone has a scheduler that shifts nothing."""
    guided = base.config("transformer").get("guidance_embeds")
    return None if guided or base.config("scheduler").get("use_dynamic_shifting") else "FLUX.1-dev"


def fitted(family: Family, base: Pretrained) -> Family:
    """The family as for `dev`, or schnell, or one that was made from them and has no embedded guidance."""
    if base.config("transformer").get("guidance_embeds"):
        return family
    if not distilled(base):
        return replace(family, encode_prompt=partial(encode_apart, names=NAMES), arguments=arguments)
    return replace(
        family,
        tokenize=partial(tokenize, length=OF_SCHNELL),
        conditions=partial(text_and_pooled, length=OF_SCHNELL),
        encode_prompt=lambda pipe, prompt, guided: encode_apart(
            pipe, prompt, False, NAMES, max_sequence_length=OF_SCHNELL
        ),
    )


def arguments(rows: Sequence[Mapping[str, Tensor]], guidance: float) -> dict[str, Any]:
    """Encoded prompts and the classifier-free guidance scale, which has a name of its own here."""
    return side_by_side(rows, guidance) | {"true_cfg_scale": guidance}


def header(base: Pretrained) -> dict[str, str]:
    """The names of this version in Stability AI's model specification and in sd-scripts."""
    return known_as(f"flux-1-{'schnell' if distilled(base) else 'dev'}", "flux1")(base)


SINGLE = ("proj_mlp", "single_transformer_blocks.*.proj_out")  # their attention has no output of its own
MODULATION = ("norm1.linear", "norm1_context.linear", "norm.linear")
ALL = (*ATTENDED, *SINGLE, *FEED_FORWARD)
FAMILY = Family(
    name="flux1",
    pipeline="FluxPipeline",
    single_file=("flux-dev", "flux-schnell"),
    classes={
        "transformer": ("FluxTransformer2DModel",),
        "vae": ("AutoencoderKL",),
        "text_encoder": ("CLIPTextModel",),
        "text_encoder_2": ("T5EncoderModel",),
        "tokenizer": CLIP_WORDS,
        "tokenizer_2": T5_WORDS,
    },
    text_encoders={"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"},
    trained_text=("text_encoder",),
    hidden={"text_encoder_2": (-1,)},
    tokenize=tokenize,
    embed=embed,
    space=partial(vae_space, patch=PATCH),
    conditions=partial(text_and_pooled, length=LENGTH),
    check=check,
    denoise=denoise,
    presets={
        "attention": (*ATTENDED, *SINGLE[1:]),
        "diffusers": (*ATTENDED, *FEED_FORWARD),
        "minimal": ("to_q", "to_v"),
        "all": (*ALL, *MODULATION),
    },
    encode_prompt=lambda pipe, prompt, guided: encode_apart(pipe, prompt, False, NAMES),
    generated=unpacked_x0,
    distilled=distilled,
    fitted=fitted,
    loads_words=True,
    lora_mixin="FluxLoraLoaderMixin",
    header=header,
    original=(
        *FLUX_BLOCKS,
        ("x_embedder", "img_in"),
        ("context_embedder", "txt_in"),
        ("proj_out", "final_layer.linear"),
        *(
            (rf"time_text_embed\.{ours}_embedder\.linear_{number}", f"{theirs}_in.{side}_layer")
            for ours, theirs in (("timestep", "time"), ("guidance", "guidance"), ("text", "vector"))
            for number, side in ((1, "in"), (2, "out"))
        ),
    ),
    keeps_names=True,
    comfyui_prefix="transformer",
    **COMMON,
)
