"""Stable Diffusion 3 and 3.5: a flow-matching transformer of joint blocks, with two CLIPs and T5.

Esser et al. 2024, "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis",
arXiv:2403.03206. A base may come without its T5, which is then zeros, as in its pipeline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from dbtrain.data.sizes import Size
from dbtrain.models.families import transformer as dit
from dbtrain.models.families.family import (
    CLIP_WORDS,
    T5_WORDS,
    Family,
    encode_by_family,
    encode_guided,
    tokenize_clip,
)
from dbtrain.models.families.space import LatentSpace, named, vae_space
from dbtrain.models.pretrained import Pretrained
from dbtrain.runtime.errors import ConfigError

LENGTH = 256  # tokens of T5, as the pipeline reads; Diffusers' script trains with 77
CLIPS, T5 = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}, "text_encoder_3"


def tokenize(tokenizers: Mapping[str, Any], prompts: Sequence[str]) -> dict[str, Tensor]:
    """Token ids, (prompts, LENGTH) int64 for T5 and CLIP's own length for the CLIPs."""
    ids = tokenize_clip({name: tokenizers[name] for name in CLIPS}, prompts)
    if T5 in tokenizers:
        ids[T5] = dit.t5_words(tokenizers[T5], prompts, LENGTH).input_ids
    return ids


def embed(encoders: Mapping[str, nn.Module], ids: Mapping[str, Tensor], width: int = 0) -> dict[str, Tensor]:
    """Both CLIPs side by side, then T5 or zeros of `width`, (prompts, L, D); the CLIPs' pooled outputs."""
    found = [encoders[name](ids[name], output_hidden_states=True) for name in CLIPS]
    clip = torch.cat([one.hidden_states[-2] for one in found], dim=-1)
    pooled = torch.cat([one.text_embeds for one in found], dim=-1)
    frozen = ids.get("prompt_embeds", clip.new_zeros(len(clip), LENGTH, width))[:, -LENGTH:].to(clip.dtype)
    t5 = dit.t5_states(encoders[T5], ids[T5]) if T5 in ids else frozen
    clip = pad(clip, (0, t5.shape[-1] - clip.shape[-1]))
    return {"prompt_embeds": torch.cat([clip, t5], dim=1), "pooled_prompt_embeds": pooled}


def check(base: Pretrained) -> None:
    """Raise ConfigError unless the transformer fits the VAE and the text encoders."""
    clips = sum(base.setting(name, "hidden_size", int) for name in CLIPS)
    source = (T5, "d_model") if has_t5(base) else ("transformer", "joint_attention_dim")
    dit.check_inputs(base, {
        "in_channels": base.setting("vae", "latent_channels", int),
        "pooled_projection_dim": sum(base.setting(name, "projection_dim", int) for name in CLIPS),
        "joint_attention_dim": max(clips, base.setting(*source, int)),
    })  # fmt: skip


def space(base: Pretrained, size: Size) -> LatentSpace:
    """The VAE's latents. Raises ConfigError for a side beyond the positions that the transformer knows."""
    found = vae_space(base, size, dit.PATCH)
    most, tokens = base.setting("transformer", "pos_embed_max_size", int), max(found.shape[1:]) // dit.PATCH
    if tokens > most:
        known = most * max(size) // tokens
        raise ConfigError(f"{named(size)}; use at most {known}, where {base.name} has positions")
    return found


def denoise(transformer: nn.Module, x_t: Tensor, t: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
    return transformer(
        hidden_states=x_t, timestep=1000 * t, encoder_hidden_states=condition["prompt_embeds"].to(x_t.dtype),
        pooled_projections=condition["pooled_prompt_embeds"].to(x_t.dtype), return_dict=False,
    )[0]  # fmt: skip


def has_t5(base: Pretrained) -> bool:
    return base.index.get(T5) not in (None, [None, None])


def fitted(family: Family, base: Pretrained) -> Family:
    """The family with or without T5, whose width its pipeline would read from a loaded transformer."""
    if has_t5(base):
        return family
    width = base.setting("transformer", "joint_attention_dim", int)
    without = replace(family, text_encoders=CLIPS, embed=partial(embed, width=width))
    return replace(without, encode_prompt=partial(encode_by_family, family=without))


def header(base: Pretrained) -> dict[str, str]:
    """The name of this version in Stability AI's model specification, by its blocks."""
    config = base.config("transformer")
    large = config.get("num_layers", 0) > 24
    version = "3.5-large" if large else "3.5-medium" if config.get("dual_attention_layers") else "3-medium"
    return {"modelspec.architecture": f"stable-diffusion-v{version}/lora"}


def idle(name: str, component: Any) -> tuple[str, ...]:
    """The last block drops its text, and with it the text's queries."""
    if name in CLIPS:
        return ()
    return (f"transformer_blocks.{len(component.transformer_blocks) - 1}.attn.add_q_proj",)


BLOCK, JOINT = r"transformer_blocks\.(\d+)\.", r"joint_blocks.\1."
FAMILY = Family(
    name="sd3",
    pipeline="StableDiffusion3Pipeline",
    single_file=("sd3",),
    classes={
        "transformer": ("SD3Transformer2DModel",),
        "vae": ("AutoencoderKL",),
        **dict.fromkeys(CLIPS, ("CLIPTextModelWithProjection",)),
        T5: ("T5EncoderModel",),
        **dict.fromkeys(CLIPS.values(), CLIP_WORDS),
        "tokenizer_3": T5_WORDS,
    },
    text_encoders={**CLIPS, T5: "tokenizer_3"},
    trained_text=tuple(CLIPS),
    hidden={T5: (-1,)},
    tokenize=tokenize,
    embed=embed,
    space=space,
    conditions=lambda base: dit.text_and_pooled(
        base, LENGTH + base.setting("text_encoder", "max_position_embeddings", int)
    ),
    check=check,
    denoise=denoise,
    presets={  # `attn2` is the second attention of 3.5 medium
        "attention": dit.ATTENDED,
        "diffusers": tuple(f"attn.{name}" for name in dit.ATTENDED),
        "minimal": ("to_q", "to_v"),
        "all": (*dit.ATTENDED, *dit.FEED_FORWARD, "norm1.linear", "norm1_context.linear"),
    },
    encode_prompt=partial(encode_guided, prompt_2=None, prompt_3=None),
    lora_mixin="SD3LoraLoaderMixin",
    header=header,
    original=(
        *((rf"{BLOCK}(attn2?)\.to_{part}", rf"{JOINT}x_block.\2.qkv") for part in "qkv"),
        *((rf"{BLOCK}attn\.add_{part}_proj", rf"{JOINT}context_block.attn.qkv") for part in "qkv"),
        (rf"{BLOCK}(attn2?)\.to_out\.0", rf"{JOINT}x_block.\2.proj"),
        (rf"{BLOCK}attn\.to_add_out", rf"{JOINT}context_block.attn.proj"),
        (rf"{BLOCK}ff\.net\.0\.proj", rf"{JOINT}x_block.mlp.fc1"),
        (rf"{BLOCK}ff\.net\.2", rf"{JOINT}x_block.mlp.fc2"),
        (rf"{BLOCK}ff_context\.net\.0\.proj", rf"{JOINT}context_block.mlp.fc1"),
        (rf"{BLOCK}ff_context\.net\.2", rf"{JOINT}context_block.mlp.fc2"),
        (rf"{BLOCK}norm1\.linear", rf"{JOINT}x_block.adaLN_modulation.1"),
        (rf"{BLOCK}norm1_context\.linear", rf"{JOINT}context_block.adaLN_modulation.1"),
        *(
            (rf"time_text_embed\.{ours}_embedder\.linear_{number}", f"{theirs}_embedder.mlp.{place}")
            for ours, theirs in (("timestep", "t"), ("text", "y"))
            for number, place in ((1, 0), (2, 2))
        ),
        (r"pos_embed\.proj", "x_embedder.proj"),
        (r"norm_out\.linear", "final_layer.adaLN_modulation.1"),
        ("proj_out", "final_layer.linear"),
    ),
    keeps_names=True,
    comfyui_prefix="transformer",
    fitted=fitted,
    idle=idle,
    **dit.COMMON,
)
