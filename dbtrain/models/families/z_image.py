"""Z-Image: a flow-matching transformer over image and text tokens as one, with Qwen3 as its text encoder.

Z-Image Team 2025, "Z-Image: An Efficient Image Generation Foundation Model with Single-Stream Diffusion
Transformer", arXiv:2511.22699. Its time runs from noise at 0 to the image at 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dbtrain.models.families.family import (
    QWEN_WORDS,
    Family,
    encode_moments,
    known_as,
    matching,
)
from dbtrain.models.families.space import patch_grids, vae_space
from dbtrain.models.families.transformer import ATTENDED, PATCH, chat, joined_layers, lengths_of, padded_rows
from dbtrain.models.flow_matching import FlowMatching
from dbtrain.models.pretrained import Pretrained

LENGTH = 512  # tokens that it reads at most
LAYERS = (-2,)  # of Qwen3, whose hidden states it reads


def tokenize(tokenizers: Mapping[str, Any], prompts: Sequence[str]) -> dict[str, Tensor]:
    """Token ids of Qwen3's chat, before it thinks, (prompts, longest) int64, and how many each prompt has."""
    found = chat(tokenizers["text_encoder"], prompts, LENGTH, enable_thinking=True)
    rows = zip(found["text_encoder"], found["mask"].bool(), strict=True)
    return padded_rows([tokens[mask] for tokens, mask in rows], "text_encoder")


def embed(encoders: Mapping[str, nn.Module], ids: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Hidden states of each prompt's own tokens: the transformer counts them."""
    rows = []
    for tokens, length in zip(ids["text_encoder"], ids["lengths"].tolist(), strict=True):
        own = tokens[None, :length]
        given = {"text_encoder": own, "mask": torch.ones_like(own)}
        rows.append(joined_layers(encoders["text_encoder"], given, LAYERS)[0])
    return padded_rows(rows)


def conditions(base: Pretrained) -> dict[str, tuple[int | None, ...]]:
    return {"prompt_embeds": (None, base.setting("transformer", "cap_feat_dim", int)), "lengths": ()}


def check(base: Pretrained) -> None:
    """Raise ConfigError unless the transformer fits the VAE and the text encoder."""
    matching(
        base,
        [
            ("transformer", "in_channels", "vae", "latent_channels"),
            ("transformer", "cap_feat_dim", "text_encoder", "hidden_size"),
        ],
    )


def denoise(transformer: nn.Module, x_t: Tensor, t: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
    """The transformer takes lists, (C, 1, h, w) and (L, D) each, and predicts the image minus the noise."""
    texts = zip(condition["prompt_embeds"].to(x_t.dtype), lengths_of(condition), strict=True)
    images = transformer(
        list(x_t.unsqueeze(2)), 1 - t, [text[:length] for text, length in texts], return_dict=False
    )[0]
    return -torch.stack(images).squeeze(2)


def encode_prompt(pipe: Any, prompt: str, guided: bool) -> dict[str, Tensor]:
    """The pipeline's own encoding, which is a list, (1, L, D)."""
    given, empty = pipe.encode_prompt(prompt, pipe.device, guided)
    return {"prompt_embeds": given[0][None]} | ({"negative_prompt_embeds": empty[0][None]} if guided else {})


def arguments(rows: Sequence[Mapping[str, Tensor]], guidance: float) -> dict[str, Any]:
    """Lists of embeddings, and the guidance scale as the pipeline counts it: 0 for none."""
    lists = {name: [row[name][0] for row in rows] for name in rows[0]}
    return lists | {"guidance_scale": max(guidance - 1.0, 0.0)}


FAMILY = Family(
    name="z-image",
    pipeline="ZImagePipeline",
    single_file=("z-image",),
    denoiser="transformer",
    classes={
        "transformer": ("ZImageTransformer2DModel",),
        "vae": ("AutoencoderKL",),
        "text_encoder": ("Qwen3Model", "Qwen3ForCausalLM"),
        "tokenizer": QWEN_WORDS,
    },
    text_encoders={"text_encoder": "tokenizer"},
    tokenize=tokenize,
    embed=embed,
    space=partial(vae_space, patch=PATCH),
    grids=partial(patch_grids, patch=PATCH),
    encode_images=lambda vae, images: {"mean": encode_moments(vae, images)["mean"]},
    sample_posterior=lambda stored, posterior: stored["mean"],
    conditions=conditions,
    check=check,
    denoise=denoise,
    objective=FlowMatching,
    patch=PATCH,
    text_dtype=torch.bfloat16,
    trained_text=(),
    unread=("lm_head",),
    hidden={"text_encoder": LAYERS},
    presets={
        "attention": ATTENDED,
        "diffusers": ("to_q", "to_k", "to_v", "to_out.0"),
        "minimal": ("to_q", "to_v"),
        "all": (*ATTENDED, "feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "adaLN_modulation.0"),
    },
    stored=("mean",),
    texts_as_one=("cap_embedder",),
    pad_to_multiple_of=32,  # as the transformer does
    encode_prompt=encode_prompt,
    arguments=arguments,
    lora_mixin="ZImageLoraLoaderMixin",
    original=(
        (r"(.*)\.attention\.to_[qkv]", r"\1.attention.qkv"),
        (r"(.*)\.attention\.to_out\.0", r"\1.attention.out"),
        (r"all_x_embedder\.2-1", "x_embedder"),
        (r"all_final_layer\.2-1\.(.*)", r"final_layer.\1"),
    ),
    header=known_as("Z-Image", "z_image"),
    keeps_names=True,
)
