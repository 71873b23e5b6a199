"""Krea 2: a flow-matching transformer over text and image as one sequence, with Qwen3-VL as its text encoder.

Krea 2026, github.com/krea-ai/krea-2. It has Qwen-Image's VAE, and reads prompts in Qwen-Image's message, by
hidden states of twelve layers. Its norms stay in fp32 in every precision.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dbtrain.models.families import transformer as shared
from dbtrain.models.families.family import (
    QWEN_WORDS,
    Family,
    encode_apart,
    side_by_side,
)
from dbtrain.models.pretrained import Pretrained
from dbtrain.runtime.errors import ConfigError

LAYERS = tuple(range(2, 36, 3))  # of Qwen3-VL, whose hidden states it reads


def embed(encoders: Mapping[str, Any], ids: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Hidden states of twelve layers, (prompts, L, 12, D), and their lengths.

    The pipeline pads prompts within the message and numbers their tokens as if it did not: so we do not.
    """
    return shared.in_message_states(
        encoders["text_encoder"], ids, lambda states: torch.stack([states[layer] for layer in LAYERS], dim=2)
    )


def conditions(base: Pretrained) -> dict[str, tuple[int | None, ...]]:
    width = base.setting("transformer", "text_hidden_dim", int)
    return {"prompt_embeds": (None, len(LAYERS), width), "lengths": ()}


def check(base: Pretrained) -> None:
    """Raise ConfigError unless the transformer fits the VAE, the text encoder and the pipeline's settings."""
    width = base.setting("text_encoder", "hidden_size", int)
    shared.check_frames(base, text_hidden_dim=width, num_text_layers=len(LAYERS))
    if (layers := base.setting("text_encoder", "num_hidden_layers", int)) <= max(LAYERS):
        raise ConfigError(
            f"base model {base.name}: its text encoder has {layers} layers, but {max(LAYERS) + 1} are needed"
        )
    for name, value in (("text_encoder_select_layers", list(LAYERS)), ("patch_size", shared.PATCH)):
        if (there := base.index.get(name)) not in (None, value):
            raise ConfigError(
                f"base model {base.name}: {name} in model_index.json is {str(there)[:60]}; dbtrain trains "
                f"Krea 2 with {value}"
            )


def denoise(transformer: nn.Module, x_t: Tensor, t: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
    """All of the text is at the origin; the image's tokens are at (0, y, x)."""
    text, mask = shared.shared_text(condition, x_t.dtype)
    height, width = x_t.shape[2:]
    grid = shared.positions(1, height // shared.PATCH, width // shared.PATCH, device=x_t.device)
    velocity = transformer(
        hidden_states=shared.packed(x_t), encoder_hidden_states=text, timestep=t,
        position_ids=torch.cat([grid.new_zeros(text.shape[1], 3), grid]), encoder_attention_mask=mask,
        return_dict=False,
    )[0]  # fmt: skip
    return shared.unpacked(velocity, height, width)


def arguments(rows: Sequence[Mapping[str, Tensor]], guidance: float) -> dict[str, Any]:
    """Encoded prompts with their masks, and the guidance scale as the pipeline counts it: 0 for none."""
    return side_by_side(rows, max(guidance - 1, 0.0))


# (pattern, name) of the two kinds of blocks in the original code, and of the layers within.
BLOCKS = (
    (r"transformer_blocks\.(\d+)", r"blocks.\1"),
    (r"text_fusion\.(\w+_blocks\.\d+)", r"txtfusion.\1"),
)
WITHIN = (
    (r"attn\.to_([qkv])", r"attn.w\2"),
    (r"attn\.to_out\.0", "attn.wo"),
    (r"attn\.to_gate", "attn.gate"),
    (r"ff\.(gate|up|down)", r"mlp.\2"),
)
OUTSIDE = (
    (r"img_in", "first"),
    (r"final_layer\.linear", "last.linear"),
    (r"time_embed\.linear_1", "tmlp.0"),
    (r"time_embed\.linear_2", "tmlp.2"),
    (r"time_mod_proj", "tproj.1"),
    (r"txt_in\.linear_1", "txtmlp.1"),
    (r"txt_in\.linear_2", "txtmlp.3"),
    (r"text_fusion\.projector", "txtfusion.projector"),
)
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "to_gate")  # of the text's blocks too
MLP = ("ff.gate", "ff.up", "ff.down")
FAMILY = Family(
    name="krea2",
    pipeline="Krea2Pipeline",
    classes={
        "transformer": ("Krea2Transformer2DModel",),
        "vae": ("AutoencoderKLQwenImage",),
        "text_encoder": ("Qwen3VLModel",),
        "tokenizer": QWEN_WORDS,
    },
    embed=embed,
    conditions=conditions,
    check=check,
    denoise=denoise,
    pad_to_multiple_of=shared.PAD_TO_MULTIPLE_OF,
    unread=("visual",),
    hidden={"text_encoder": LAYERS},
    presets={
        "attention": ATTENTION,
        "diffusers": (
            *(*ATTENTION, "ff.up", "ff.down"),
            *("img_in", "final_layer.linear", "text_fusion.projector", "time_mod_proj"),
            *("txt_in.linear_1", "txt_in.linear_2", "time_embed.linear_1", "time_embed.linear_2"),
        ),
        "minimal": ("to_q", "to_v"),
        "all": (*ATTENTION, *MLP),
    },
    encode_prompt=partial(encode_apart, names=("prompt_embeds", "prompt_embeds_mask")),
    arguments=arguments,
    distilled=lambda base: "krea/Krea-2-Raw" if base.index.get("is_distilled") else None,
    lora_mixin="Krea2LoraLoaderMixin",
    original=(
        *((rf"{block}\.{layer}", f"{there}.{name}") for block, there in BLOCKS for layer, name in WITHIN),
        *OUTSIDE,
    ),
    **shared.FRAMES,
)
