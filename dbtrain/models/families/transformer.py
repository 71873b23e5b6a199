"""Functions that the families of flow-matching transformers share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, pixel_shuffle, pixel_unshuffle
from torch.nn.utils.rnn import pad_sequence

from dbtrain.data.sizes import Size
from dbtrain.models.families.family import encode_moments, sample_moments
from dbtrain.models.families.space import LatentSpace, latent_sides, patch_grids
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
PAD_TO_MULTIPLE_OF = 64  # tokens, in slots, of texts that are padded together
# What the families have in common whose VAE is Stable Diffusion's, with more channels.
COMMON: dict[str, Any] = {
    "denoiser": "transformer", "encode_images": encode_moments, "sample_posterior": sample_moments,
    "objective": FlowMatching, "patch": PATCH, "grids": partial(patch_grids, patch=PATCH),
    "text_dtype": torch.bfloat16,
}  # fmt: skip


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
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, **template
        )
        for prompt in prompts
    ]
    found = [tokenizer(text, padding="max_length", max_length=length, return_tensors="pt") for text in texts]
    return stacked(found, prompts, length)


def stacked(found: Sequence[Any], prompts: Sequence[str], length: int) -> dict[str, Tensor]:
    """Token ids and mask of prompts, (prompts, length) int64 each, from a tokenizer's output for each one.

    Raises ConfigError for a prompt that is longer.
    """
    for prompt, one in zip(prompts, found, strict=True):
        check_length(prompt, one["input_ids"].shape[1], length)
    return {
        "text_encoder": torch.cat([one["input_ids"] for one in found]),
        "mask": torch.cat([one["attention_mask"] for one in found]),
    }


def check_length(prompt: str, count: int, length: int, where: str = "with the model's template") -> None:
    """Raise ConfigError if a prompt has more tokens than the model reads."""
    if count > length:
        raise ConfigError(
            f"prompt '{prompt[:60]}…' has {count} tokens {where}, but the model reads {length}; shorten it"
        )


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


def text_and_pooled(base: Pretrained, length: int) -> dict[str, tuple[int | None, ...]]:
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


def padded_rows(rows: Sequence[Tensor], name: str = "prompt_embeds") -> dict[str, Tensor]:
    """Embeddings of prompts, (L, ...) each, padded with zeros to the longest, and their lengths.

    -> `name`, (prompts, longest, ...), and `lengths`, (prompts,) int64.
    """
    lengths = torch.tensor([len(row) for row in rows])
    return {name: pad_sequence(list(rows), batch_first=True), "lengths": lengths}


def lengths_of(condition: Mapping[str, Tensor]) -> list[int]:
    """How many rows of each prompt are text; all without `lengths`.

    They are on the CPU, so that nothing waits for the device.
    """
    rows, longest = condition["prompt_embeds"].shape[:2]
    return condition["lengths"].tolist() if "lengths" in condition else [longest] * rows


def shared_text(condition: Mapping[str, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """A batch's text, (rows, longest, ...) in `dtype`, and its mask, (rows, longest) bool, if any.

    With a `padded_length` in the condition, all texts are padded to it, and there is always a mask.
    """
    lengths = lengths_of(condition)
    longest = int(condition["padded_length"]) if "padded_length" in condition else max(lengths)
    text = condition["prompt_embeds"][:, :longest].to(dtype)
    if "padded_length" not in condition and min(lengths) == longest:
        return text, None
    text = pad(text, [0, 0] * (text.dim() - 2) + [0, longest - text.shape[1]])
    return text, mask_of(lengths, text.device, longest)


def mask_of(lengths: Sequence[int], device: torch.device, longest: int | None = None) -> Tensor:
    """Which tokens are text, (rows, longest) bool, for rows of these lengths."""
    mask = torch.arange(longest or max(lengths))[None] < torch.tensor(lengths)[:, None]
    return mask.to(device, non_blocking=True)


def padded_texts(rows: Sequence[Mapping[str, Tensor]], mask: str) -> dict[str, Tensor]:
    """Encoded prompts, and the negative ones if there are any, padded to the longest, with their masks.

    `mask`: the name of the mask among the arguments of the pipeline's call.
    """
    found: dict[str, Tensor] = {}
    for start in ("", "negative_"):
        if (name := f"{start}prompt_embeds") in rows[0]:
            texts = [row[name][0] for row in rows]
            found[name] = pad_sequence(texts, batch_first=True)
            found[f"{start}{mask}"] = mask_of([len(text) for text in texts], texts[0].device)
    return found


def positions(*sizes: int, device: torch.device) -> Tensor:
    """The points of a grid, for rotary embeddings, (points, len(sizes)) int64; the last runs fastest."""
    return torch.cartesian_prod(*(torch.arange(size, device=device) for size in sizes))


# What Qwen-Image shares with other models: its VAE, which sees images as videos of one frame, and the message
# in which its text encoder reads a prompt. The transformer does not see the message's beginning.

MESSAGE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
    "<|im_start|>assistant\n"
)
BEGINNING = 34  # tokens
READ = 512  # tokens at most, without the beginning


def in_message(tokenizers: Mapping[str, Any], prompts: Sequence[str]) -> dict[str, Tensor]:
    """Token ids of prompts in Qwen-Image's message, (prompts, longest) int64.

    `lengths`, (prompts,) int64, is without the message's beginning. Raises ConfigError for a prompt that is
    too long.
    """
    tokenizer = tokenizers["text_encoder"]
    rows = [torch.tensor(tokenizer(MESSAGE.format(prompt)).input_ids) for prompt in prompts]
    for prompt, row in zip(prompts, rows, strict=True):
        check_length(prompt, len(row), BEGINNING + READ)
    found = padded_rows(rows, "text_encoder")
    return found | {"lengths": found["lengths"] - BEGINNING}


def in_message_states(
    model: nn.Module, ids: Mapping[str, Tensor], chosen: Callable[[Sequence[Tensor]], Tensor]
) -> dict[str, Tensor]:
    """What is `chosen` of a language model's hidden states, without the message's beginning.

    Prompts are encoded one by one and without padding, so that none depends on another.
    """
    rows = []
    for tokens, length in zip(ids["text_encoder"], ids["lengths"].tolist(), strict=True):
        own = tokens[None, : BEGINNING + length]
        states = model(input_ids=own, output_hidden_states=True, use_cache=False).hidden_states
        rows.append(chosen(states)[0, BEGINNING:])
    return padded_rows(rows)


def frame_shrinking(base: Pretrained) -> int:
    """How many px of each side are one latent of Qwen-Image's VAE."""
    return 2 ** len(base.setting("vae", "temperal_downsample", list))


def frame_space(base: Pretrained, size: Size) -> LatentSpace:
    """The space of Qwen-Image's VAE, which has a mean and a standard deviation per channel."""
    sides = latent_sides(base, size, frame_shrinking(base), PATCH)
    mean, std = (base.setting("vae", f"latents_{name}", list) for name in ("mean", "std"))
    shape = (base.setting("vae", "z_dim", int), *sides)
    return LatentSpace(shape, tuple(1 / value for value in std), tuple(map(float, mean)))


def check_frames(base: Pretrained, **needed: int) -> None:
    """Raise ConfigError unless Qwen-Image's VAE and the settings `needed` fit the transformer."""
    channels = base.setting("vae", "z_dim", int)
    for name, least in (("latents_mean", -math.inf), ("latents_std", 0)):
        found = base.setting("vae", name, list)
        fine = all(type(value) in (int, float) and least < value < math.inf for value in found)
        if not fine or len(found) != channels:
            raise ConfigError(
                f"base model {base.name}: {name} of its vae is {str(found)[:60]}; use {channels} numbers"
                f"{' above 0' if least == 0 else ''}, one per channel"
            )
    check_inputs(base, {"in_channels": PATCH**2 * channels, **needed})


def encode_frames(vae: nn.Module | None, images: Tensor) -> dict[str, Tensor]:
    """The moments of images as frames, (B, C, h, w) fp32 each, unscaled."""
    return {name: moment.squeeze(2) for name, moment in encode_moments(vae, images.unsqueeze(2)).items()}


def decode_frames(vae: Any, latents: Tensor) -> Tensor:
    return vae.decode(latents.unsqueeze(2), return_dict=False)[0].squeeze(2)


FRAMES: dict[str, Any] = COMMON | {
    "text_encoders": {"text_encoder": "tokenizer"}, "trained_text": (), "tokenize": in_message,
    "space": frame_space, "encode_images": encode_frames, "decode": decode_frames, "generated": unpacked_x0,
    "grids": partial(patch_grids, patch=PATCH, shrinks=frame_shrinking),
}  # fmt: skip
