"""Encode images into rows of shards, and prompts into the prompt table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from dbtrain.data import masks, photos, shards
from dbtrain.data.photos import Crop
from dbtrain.data.sizes import Size
from dbtrain.models import text_encoders
from dbtrain.models.base import Base
from dbtrain.models.families.family import sampled_moments
from dbtrain.models.pretrained import DTYPES
from dbtrain.prepare import class_images
from dbtrain.runtime import dist
from dbtrain.runtime.errors import ConfigError
from dbtrain.runtime.hashing import content_key
from dbtrain.runtime.memory import GIB, size

LARGE = GIB  # bytes of a prompt table of which to warn


def image_encoder(base: Base, precision: str) -> Callable[[str, dict[str, Any], Size], shards.Row]:
    """Return a function from (image path, row description, size) to the encoded row.

    It encodes one image at a time, so that latents do not depend on the other images of a batch. It loads
    the VAE on first use: a class image that is stored as a latent needs none.
    """
    space = cache(partial(base.family.space, base))

    @cache
    def vae() -> nn.Module | None:
        return base.load(base.family.vae, DTYPES[precision]).to(dist.device()) if base.family.vae else None

    @torch.no_grad()
    def encode(path: str, meta: dict[str, Any], size: Size) -> shards.Row:
        if Path(path).suffix == class_images.SUFFIX:
            latent = class_images.load_latent(Path(path), space(size).shape)
            made = sampled_moments(latent, space(size))
            return shards.Row({name: made[name] for name in base.family.stored}, meta)
        photo = photos.load(Path(path))
        pixels = photos.pixels(photo, Crop.of(meta), size)
        stored = base.family.encode_images(vae(), pixels[None])
        tensors = {name: tensor[0].cpu().contiguous() for name, tensor in stored.items()}
        if "mask" in meta:
            cells = Size(*next(iter(tensors.values())).shape[1:])
            mask = photos.cropped(masks.load(Path(path)), Crop.of(meta), size)
            tensors[shards.MASK] = masks.reduced(mask, cells)
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise ConfigError(
                f"the VAE of {base.name} returned NaN or infinite latents for {path} in {precision}; "
                "set prepare.vae_precision to fp32"
            )
        return shards.Row(tensors, meta)

    return encode


def longest(ids: Mapping[str, Tensor]) -> int:
    """How many tokens a table has of each of these prompts: as many as of the longest."""
    return int(ids["lengths"].max()) if "lengths" in ids else next(iter(ids.values())).shape[1]


def blank_conditions(base: Base, prompts: int, tokens: int) -> dict[str, Tensor]:
    """The embeddings of `prompts` prompts of `tokens` tokens, on the meta device, without `lengths`."""
    return {
        f"condition.{name}": torch.empty(
            prompts, *(size or tokens for size in shape), dtype=base.family.text_dtype, device="meta"
        )
        for name, shape in base.family.conditions(base).items()
        if name != "lengths"
    }


def too_large(base: Base, prompts: int, tokens: int) -> str | None:
    """What is wrong with a table of LARGE bytes or more, and what to do."""
    total = sum(tensor.nbytes for tensor in blank_conditions(base, prompts, tokens).values())
    if total < LARGE:
        return None
    return (
        f"the embeddings of {prompts} prompts take {size(total)}, on disk and in the memory of each GPU, "
        f"{size(total / prompts)} a prompt; lower prepare.caption.variants, or use fewer captions"
    )


def table_name(base: Base, texts: Sequence[str]) -> str:
    """The file name of the table of these prompts, which depends on all that the table does."""
    parts = [*base.family.text_encoders, *base.family.text_encoders.values()]
    return f"prompts-{content_key([texts, [base.key(part) for part in parts]])[:12]}.safetensors"


def tokenizer(base: Base) -> Callable[[Sequence[str]], dict[str, Tensor]]:
    """A function from prompts to ids of each text encoder, (prompts, L) int64."""
    tokenizers = {encoder: base.load(name) for encoder, name in base.family.text_encoders.items()}
    return partial(base.family.tokenize, tokenizers)


@torch.no_grad()
def prompt_tables(base: Base, every: Sequence[Mapping[str, Tensor]], gib: float | None) -> list[bytes]:
    """The tables of several lists of prompts, of which `every` has what `tokenizer` makes of each list.

    `gib`: memory for the weights of the text encoders, which are loaded once. Each list is a batch of its
    own: no table depends on the others.

    A table holds `condition.<name>`, (prompts, ...) in the family's `text_dtype`, and
    `ids.<text encoder>`, (prompts, L) int64.
    """
    here = [{name: tensor.to(dist.device()) for name, tensor in ids.items()} for ids in every]

    def use(encoders: Mapping[str, nn.Module]) -> Callable[[], list[dict[str, Tensor]]]:
        held = encoders if len(here) == 1 else dict(encoders)  # else each would be loaded for every list
        return lambda: [base.family.embed(held, ids) for ids in here]

    tables = []
    for ids, condition in zip(
        every, text_encoders.encoded(base, base.family.text_dtype, gib, use), strict=True
    ):
        table = {f"condition.{name}": tensor.cpu().contiguous() for name, tensor in condition.items()}
        table |= {f"ids.{name}": tensor.contiguous() for name, tensor in ids.items()}
        tables.append(safetensors.torch.save(table))
    return tables
