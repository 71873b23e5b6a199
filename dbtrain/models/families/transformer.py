"""Functions that the families of flow-matching transformers share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle
from torch.nn.utils.rnn import pad_sequence

from dbtrain.models.families.family import LatentSpace
from dbtrain.runtime.errors import ConfigError

# The linear layers of attention over an image's and a text's tokens, as Diffusers names them.
ATTENDED = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")

PATCH = 2  # latents per token in each direction


def chat(tokenizer: Any, prompts: Sequence[str], length: int, **template: Any) -> dict[str, Tensor]:
    """Token ids of prompts as messages of a user, in the model's chat template, and their mask.

    (prompts, length) int64 each, padded on the right. Raises ConfigError for a prompt that is too long:
    cutting it would cut off the end of the template too.
    """
    found = []
    for prompt in prompts:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, **template
        )
        count = len(tokenizer(text).input_ids)
        if count > length:
            raise ConfigError(
                f"prompt '{prompt[:60]}…' has {count} tokens with the model's template, but the model "
                f"reads {length}; shorten it"
            )
        found.append(tokenizer(text, padding="max_length", max_length=length, return_tensors="pt"))
    return {
        "text_encoder": torch.cat([one.input_ids for one in found]),
        "mask": torch.cat([one.attention_mask for one in found]),
    }


def joined_layers(encoder: Any, ids: Mapping[str, Tensor], layers: Sequence[int]) -> Tensor:
    """Hidden states of some layers of a language model side by side, (prompts, L, layers D).

    Prompts are encoded one by one: none depends on another, and memory does not grow with them.
    """
    rows = []
    for tokens, mask in zip(ids["text_encoder"], ids["mask"], strict=True):
        states = getattr(encoder, "model", encoder)(
            input_ids=tokens[None], attention_mask=mask[None], output_hidden_states=True, use_cache=False
        ).hidden_states
        rows.append(torch.cat([states[layer] for layer in layers], dim=-1))
    return torch.cat(rows)


def packed(x: Tensor) -> Tensor:
    """Tokens of 2 x 2 latents, (rows, h / 2 w / 2, 4 C), row by row, from (rows, C, h, w)."""
    return pixel_unshuffle(x, PATCH).flatten(2).transpose(1, 2)


def unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `packed`: (rows, C, height, width)."""
    return pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height // PATCH, width // PATCH)), PATCH)


def unpacked_x0(tokens: Tensor, space: LatentSpace) -> Tensor:
    """x0 from the tokens that a pipeline returns."""
    return unpacked(tokens, *space.shape[1:])


def padded_rows(rows: Sequence[Tensor]) -> dict[str, Tensor]:
    """Embeddings of prompts, (L, ...) each, padded with zeros to the longest, and their lengths.

    -> `prompt_embeds`, (prompts, longest, ...), and `lengths`, (prompts,) int64.
    """
    lengths = torch.tensor([len(row) for row in rows])
    return {"prompt_embeds": pad_sequence(list(rows), batch_first=True), "lengths": lengths}


def shared_text(condition: Mapping[str, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """A batch's text, (rows, longest, ...) in `dtype`, and its mask, (rows, longest) bool, if any.

    The lengths are on the CPU, so that nothing waits for the device.
    """
    lengths = condition["lengths"]
    longest = int(lengths.max())
    text = condition["prompt_embeds"][:, :longest].to(dtype)
    if bool((lengths == longest).all()):
        return text, None
    mask = torch.arange(longest)[None] < lengths[:, None]
    return text, mask.to(text.device, non_blocking=True)


def positions(*sizes: int, device: torch.device) -> Tensor:
    """The points of a grid, for rotary embeddings, (points, len(sizes)) int64; the last runs fastest."""
    return torch.cartesian_prod(*(torch.arange(size, device=device) for size in sizes))
