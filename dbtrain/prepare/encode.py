"""Encode images into rows of shards, and prompts into the prompt table."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from dbtrain.data import photos, shards
from dbtrain.data.photos import Crop
from dbtrain.models import text_encoders
from dbtrain.models.base import Base
from dbtrain.models.families.family import sampled_moments
from dbtrain.models.pretrained import DTYPES
from dbtrain.prepare import class_images
from dbtrain.runtime import dist, files, hashing
from dbtrain.runtime.errors import ConfigError
from dbtrain.runtime.hashing import content_key


def image_encoder(base: Base, precision: str, side: int) -> Callable[[str, dict[str, Any]], shards.Row]:
    """Return a function from (image path, row description) to the encoded row.

    It encodes one image at a time, so that latents do not depend on the other images of a batch. It loads
    the VAE on first use: a class image that is stored as a latent needs none.
    """
    space = base.family.space(base, side)

    @cache
    def vae() -> nn.Module | None:
        return base.load(base.family.vae, DTYPES[precision]).to(dist.device()) if base.family.vae else None

    @torch.no_grad()
    def encode(path: str, meta: dict[str, Any]) -> shards.Row:
        if Path(path).suffix == class_images.SUFFIX:
            made = sampled_moments(class_images.load_latent(Path(path), space.shape), space)
            return shards.Row({name: made[name] for name in base.family.stored}, meta)
        photo = photos.load(Path(path))
        top, left = meta["crop"]
        pixels = photos.pixels(photo, Crop(top, left, meta["flip"]), side)
        stored = base.family.encode_images(vae(), pixels[None])
        tensors = {name: tensor[0].cpu().contiguous() for name, tensor in stored.items()}
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise ConfigError(
                f"the VAE of {base.name} returned NaN or infinite latents for {path} in {precision}; "
                "set prepare.vae_precision to fp32"
            )
        return shards.Row(tensors, meta)

    return encode


@torch.no_grad()
def prompt_table(
    base: Base, texts: list[str], folder: Path, old: shards.Prompts | None, gib: float | None = None
) -> shards.Prompts:
    """Write the table of these prompts into `folder`, unless `old` describes the same table.

    `gib`: memory for the weights of the text encoders.

    The table holds `condition.<name>`, (prompts, ...) in the family's `text_dtype`, and
    `ids.<text encoder>`, (prompts, L) int64.
    """
    parts = [*base.family.text_encoders, *base.family.text_encoders.values()]
    key = content_key([texts, [base.key(part) for part in parts]])
    path = folder / f"prompts-{key[:12]}.safetensors"
    valid = old and old.file == path.name and path.exists() and hashing.sha256_of(path) == old.sha256
    if not valid:
        tokenizers = {encoder: base.load(name) for encoder, name in base.family.text_encoders.items()}
        ids = base.family.tokenize(tokenizers, texts)
        here = {name: tensor.to(dist.device()) for name, tensor in ids.items()}
        condition = text_encoders.encoded(
            base, base.family.text_dtype, gib, lambda encoders: partial(base.family.embed, encoders, here)
        )
        table = {f"condition.{name}": tensor.cpu().contiguous() for name, tensor in condition.items()}
        table |= {f"ids.{name}": tensor.contiguous() for name, tensor in ids.items()}
        files.write_atomically(path, safetensors.torch.save(table))
    return shards.Prompts(file=path.name, sha256=hashing.sha256_of(path), texts=tuple(texts))
