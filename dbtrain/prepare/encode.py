"""Images and prompts, encoded once: rows of shards, and the prompt table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from dbtrain.data import photos, shards
from dbtrain.data.photos import Crop
from dbtrain.models.base import Base
from dbtrain.models.families.family import sampled_moments
from dbtrain.models.pretrained import DTYPES
from dbtrain.prepare import class_images
from dbtrain.runtime import dist, files, hashing
from dbtrain.runtime.errors import ConfigError
from dbtrain.runtime.hashing import content_key


def image_encoder(base: Base, precision: str, side: int) -> Callable[[str, dict[str, Any]], shards.Row]:
    """A function from (image path, row description) to the encoded row; loads the VAE when first used.

    One image at a time: a row's latents depend on its pixels only, not on its neighbours in a batch.
    A class image that was kept as a latent needs no VAE.
    """
    vae: list[nn.Module] = []
    space = base.family.space(base, side)

    @torch.no_grad()
    def encode(path: str, meta: dict[str, Any]) -> shards.Row:
        if Path(path).suffix == class_images.SUFFIX:
            return shards.Row(sampled_moments(class_images.load_latent(Path(path), space.shape), space), meta)
        photo = photos.load(Path(path))
        top, left = meta["crop"]
        pixels = photos.pixels(photo, Crop(top, left, meta["flip"]), side)
        if base.family.vae and not vae:
            vae.append(base.load(base.family.vae, DTYPES[precision]).to(dist.device()))
        stored = base.family.encode_images(vae[0] if vae else None, pixels[None])
        tensors = {name: tensor[0].cpu().contiguous() for name, tensor in stored.items()}
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise ConfigError(
                f"the VAE of {base.name} gave NaN or infinite latents for {path} in {precision}; "
                "use prepare.vae_precision: fp32"
            )
        return shards.Row(tensors, meta)

    return encode


@torch.no_grad()
def prompt_table(base: Base, texts: list[str], folder: Path, old: shards.Prompts | None) -> shards.Prompts:
    """Write the table of these prompts into `folder`, unless it is the one that `old` vouches for.

    Holds `condition.<name>`, (prompts, ...) fp32, and `ids.<text encoder>`, (prompts, L) int64.
    """
    parts = [*base.family.text_encoders, *base.family.text_encoders.values()]
    key = content_key([texts, [base.key(part) for part in parts]])
    path = folder / f"prompts-{key[:12]}.safetensors"
    kept = old and old.file == path.name and path.exists() and hashing.sha256_of(path) == old.sha256
    if not kept:
        tokenizers = {encoder: base.load(name) for encoder, name in base.family.text_encoders.items()}
        encoders = {name: base.load(name).to(dist.device()) for name in base.family.text_encoders}
        ids = base.family.tokenize(tokenizers, texts)
        moved = {name: tensor.to(dist.device()) for name, tensor in ids.items()}
        condition = base.family.embed(encoders, moved)
        table = {f"condition.{name}": tensor for name, tensor in condition.items()}
        table |= {f"ids.{name}": tensor for name, tensor in ids.items()}
        table = {name: tensor.cpu().contiguous() for name, tensor in table.items()}
        files.write_atomically(path, safetensors.torch.save(table))
    return shards.Prompts(file=path.name, sha256=hashing.sha256_of(path), texts=tuple(texts))
