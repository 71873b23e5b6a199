"""Functions that the families of flow-matching transformers share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle
from torch.nn.utils.rnn import pad_sequence

from dbtrain.models.families.family import LatentSpace, encode_moments, sample_moments
from dbtrain.models.flow_matching import FlowMatching
from dbtrain.models.pretrained import Pretrained
from dbtrain.runtime.errors import ConfigError

# The linear layers of attention over an image's and a text's tokens, as Diffusers names them.
ATTENDED = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")

DOUBLE, SINGLES = r"transformer_blocks\.(\d+)\.", r"single_transformer_blocks\.(\d+)\."
# The modules of FLUX.1's blocks, which Chroma has too, and their names in the original code. Queries, keys
# and values are one layer there, in this order; in single blocks, with the input of the MLP after them.
FLUX_BLOCKS = (
    *((rf"{DOUBLE}attn\.to_{part}", r"double_blocks.\1.img_attn.qkv") for part in "qkv"),
    *((rf"{DOUBLE}attn\.add_{part}_proj", r"double_blocks.\1.txt_attn.qkv") for part in "qkv"),
    (rf"{DOUBLE}attn\.to_out\.0", r"double_blocks.\1.img_attn.proj"),
    (rf"{DOUBLE}attn\.to_add_out", r"double_blocks.\1.txt_attn.proj"),
    (rf"{DOUBLE}ff\.net\.([02])(?:\.proj)?", r"double_blocks.\1.img_mlp.\2"),
    (rf"{DOUBLE}ff_context\.net\.([02])(?:\.proj)?", r"double_blocks.\1.txt_mlp.\2"),
    (rf"{DOUBLE}norm1\.linear", r"double_blocks.\1.img_mod.lin"),
    (rf"{DOUBLE}norm1_context\.linear", r"double_blocks.\1.txt_mod.lin"),
    *((rf"{SINGLES}attn\.to_{part}", r"single_blocks.\1.linear1") for part in "qkv"),
    (rf"{SINGLES}proj_mlp", r"single_blocks.\1.linear1"),
    (rf"{SINGLES}proj_out", r"single_blocks.\1.linear2"),
    (rf"{SINGLES}norm\.linear", r"single_blocks.\1.modulation.lin"),
)

PATCH = 2  # latents per token in each direction
# What the families have in common whose VAE is Stable Diffusion's, with more channels.
COMMON: dict[str, Any] = {
    "denoiser": "transformer", "encode_images": encode_moments, "sample_posterior": sample_moments,
    "objective": FlowMatching, "patch": PATCH, "text_dtype": torch.bfloat16, "trains_text": False,
}  # fmt: skip


def check_length(prompt: str, count: int, length: int, where: str) -> None:
    """Raise ConfigError for a prompt with more tokens than the model reads."""
    if count > length:
        raise ConfigError(
            f"prompt '{prompt[:60]}…' has {count} tokens {where}, but the model reads {length}; shorten it"
        )


def t5_words(tokenizer: Any, prompts: Sequence[str], length: int) -> Any:
    """T5's tokens, with their mask, padded to (prompts, length) int64.

    Raises ConfigError for a prompt that is too long.
    """
    for prompt, ids in zip(prompts, tokenizer(list(prompts)).input_ids, strict=True):
        check_length(prompt, len(ids), length, "of T5")
    return tokenizer(list(prompts), padding="max_length", max_length=length, return_tensors="pt")


def t5_states(encoder: Any, ids: Tensor) -> Tensor:
    """T5's last hidden states, (prompts, L, D), one prompt after the other. Padding is not masked."""
    return torch.cat([encoder(row[None])[0] for row in ids])


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
        check_length(prompt, len(tokenizer(text).input_ids), length, "with the model's template")
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
        states = encoder.model(
            input_ids=tokens[None], attention_mask=mask[None], output_hidden_states=True, use_cache=False
        ).hidden_states
        rows.append(torch.cat([states[layer] for layer in layers], dim=-1))
    return torch.cat(rows)


def text_and_pooled(base: Pretrained, length: int | None) -> dict[str, tuple[int | None, ...]]:
    """Shapes of a prompt's embeddings, for transformers that take `length` of them, and a pooled one."""
    return {
        "prompt_embeds": (length, base.setting("transformer", "joint_attention_dim", int)),
        "pooled_prompt_embeds": (base.setting("transformer", "pooled_projection_dim", int),),
    }


def check_inputs(base: Pretrained, needed: Mapping[str, int]) -> None:
    """Raise ConfigError unless the transformer's settings are those that its VAE and text encoders need."""
    for name, value in needed.items():
        if (found := base.setting("transformer", name, int)) != value:
            raise ConfigError(
                f"base model {base.name} does not fit together: {name} of its transformer is {found}, but "
                f"its VAE and text encoders give {value}"
            )


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
