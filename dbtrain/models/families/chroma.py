"""Chroma: FLUX.1's transformer without CLIP and guidance, which sees of a prompt's padding one token only.

Lodestone Rock 2025, huggingface.co/lodestones/Chroma1-HD.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dbtrain.models.families import transformer as dit
from dbtrain.models.families.family import T5_WORDS, Family, known_as
from dbtrain.models.families.flux1 import ALL, LENGTH, SINGLE
from dbtrain.models.families.space import vae_space
from dbtrain.models.pretrained import Pretrained


def tokenize(tokenizers: Mapping[str, Any], prompts: Sequence[str]) -> dict[str, Tensor]:
    """T5's token ids and their mask, (prompts, LENGTH) int64 each."""
    found = dit.t5_words(tokenizers["text_encoder"], prompts, LENGTH)
    return {"text_encoder": found.input_ids, "mask": found.attention_mask}


def embed(encoders: Mapping[str, Any], ids: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """T5's last hidden states, up to the first of the padding, (prompts, longest, D), and their lengths."""
    rows = []
    for tokens, mask in zip(ids["text_encoder"], ids["mask"], strict=True):
        states = encoders["text_encoder"](tokens[None], attention_mask=mask[None])[0]
        rows.append(states[0, : int(mask.sum()) + 1])
    return dit.padded_rows(rows)


def conditions(base: Pretrained) -> dict[str, tuple[int | None, ...]]:
    return {"prompt_embeds": (None, base.setting("transformer", "joint_attention_dim", int)), "lengths": ()}


def check(base: Pretrained) -> None:
    """Raise ConfigError unless the transformer fits the VAE and the text encoder."""
    dit.check_inputs(base, {
        "in_channels": dit.PATCH**2 * base.setting("vae", "latent_channels", int),
        "joint_attention_dim": base.setting("text_encoder", "d_model", int),
    })  # fmt: skip


def denoise(transformer: nn.Module, x_t: Tensor, t: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
    """The velocity, for the rows of each length of prompts in turn, which then need no mask.

    With gradient checkpointing, Diffusers gives the single blocks no mask. With `passes` in the condition,
    there are as many, whatever the lengths: those that are too many repeat the last and add nothing.
    """
    lengths = dit.lengths_of(condition)
    each = sorted(set(lengths))
    found = list(x_t)
    for number in range(int(condition.get("passes", len(each)))):
        length = each[min(number, len(each) - 1)]
        rows = [row for row, its in enumerate(lengths) if its == length]
        x, level, text = (
            torch.stack([values[row] for row in rows]) for values in (x_t, t, condition["prompt_embeds"])
        )
        made = velocities(transformer, x, level, text[:, :length].to(x_t.dtype))
        for row, velocity in zip(rows, made, strict=True):
            found[row] = velocity if number < len(each) else found[row] + 0 * velocity
    return torch.stack(found)


def velocities(transformer: nn.Module, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
    """The velocity of rows whose prompts have the same length, (rows, C, h, w)."""
    height, width = x_t.shape[2:]
    tokens = transformer(
        hidden_states=dit.packed(x_t), timestep=t, encoder_hidden_states=text,
        txt_ids=text.new_zeros(text.shape[1], 3), return_dict=False,
        img_ids=dit.positions(1, height // dit.PATCH, width // dit.PATCH, device=x_t.device),
    )[0]  # fmt: skip
    return dit.unpacked(tokens, height, width)


def encode_prompt(pipe: Any, prompt: str, guided: bool) -> dict[str, Tensor]:
    """A prompt and the empty one, without the tokens that the pipeline means to mask.

    Its masks are floats, which attention adds instead, so that they mask nothing
    (huggingface/diffusers#11724).
    """
    text, _, mask, negative, _, other = pipe.encode_prompt(
        prompt, device=pipe.device, num_images_per_prompt=1, do_classifier_free_guidance=guided
    )
    found = {"prompt_embeds": text[:, mask[0].bool()]}
    return found | ({"negative_prompt_embeds": negative[:, other[0].bool()]} if guided else {})


FAMILY = Family(
    name="chroma",
    pipeline="ChromaPipeline",
    single_file=("chroma",),
    classes={
        "transformer": ("ChromaTransformer2DModel",),
        "vae": ("AutoencoderKL",),
        "text_encoder": ("T5EncoderModel",),
        "tokenizer": T5_WORDS,
    },
    text_encoders={"text_encoder": "tokenizer"},
    trained_text=(),
    hidden={"text_encoder": (-1,)},
    tokenize=tokenize,
    embed=embed,
    space=partial(vae_space, patch=dit.PATCH),
    conditions=conditions,
    check=check,
    denoise=denoise,
    pad_to_multiple_of=1,
    presets={
        "attention": (*dit.ATTENDED, *SINGLE[1:]),
        "diffusers": (*dit.ATTENDED, *dit.FEED_FORWARD),
        "minimal": ("to_q", "to_v"),
        "all": ALL,
    },
    encode_prompt=encode_prompt,
    arguments=lambda rows, guidance: {
        "guidance_scale": guidance,
        **dit.padded_texts(rows, "prompt_attention_mask"),
    },
    generated=dit.unpacked_x0,
    lora_mixin="FluxLoraLoaderMixin",
    original=(
        *dit.FLUX_BLOCKS,
        ("x_embedder", "img_in"),
        ("context_embedder", "txt_in"),
        ("proj_out", "final_layer.linear"),
    ),
    header=known_as("chroma", "chroma"),
    keeps_names=True,
    comfyui_prefix="transformer",
    **dit.COMMON,
)
