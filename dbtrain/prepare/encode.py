"""Images and prompts, encoded once: rows of shards, and the prompt table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from dbtrain.data import photos, shards
from dbtrain.data.photos import Crop
from dbtrain.models import sampler
from dbtrain.models.families.family import Family, sampled_moments
from dbtrain.models.precision import PRECISIONS
from dbtrain.models.pretrained import DTYPES, Pretrained
from dbtrain.prepare import latents
from dbtrain.runtime import dist, files, hashing
from dbtrain.runtime.errors import ConfigError
from dbtrain.runtime.hashing import content_key


def image_encoder(
    base: Pretrained, family: Family, precision: str, side: int
) -> Callable[[str, dict[str, Any]], shards.Row]:
    """A function from (image path, row description) to the encoded row; loads the VAE when first used.

    One image at a time: a row's latents depend on its pixels only, not on its neighbours in a batch.
    A class image that was kept as a latent needs no VAE.
    """
    vae: list[nn.Module] = []
    space = family.space(base, side)

    @torch.no_grad()
    def encode(path: str, meta: dict[str, Any]) -> shards.Row:
        if Path(path).suffix == latents.SUFFIX:
            return shards.Row(sampled_moments(latents.load(Path(path), space.shape), space), meta)
        photo = photos.load(Path(path))
        top, left = meta["crop"]
        pixels = photos.pixels(photo, Crop(top, left, meta["flip"]), side)
        if family.vae and not vae:
            vae.append(base.load(family.vae, DTYPES[precision]).to(dist.device()))
        stored = family.encode_images(vae[0] if vae else None, pixels[None])
        tensors = {name: tensor[0].cpu().contiguous() for name, tensor in stored.items()}
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise ConfigError(
                f"the VAE of {base.name} gave NaN or infinite latents for {path} in {precision}; "
                "use prepare.vae_precision: fp32"
            )
        return shards.Row(tensors, meta)

    return encode


@torch.no_grad()
def prompt_table(
    base: Pretrained, family: Family, texts: list[str], folder: Path, old: shards.Prompts | None
) -> shards.Prompts:
    """Write the table of these prompts into `folder`, unless it is the one that `old` vouches for.

    Holds `condition.<name>`, (prompts, ...) fp32, and `ids.<text encoder>`, (prompts, L) int64.
    """
    parts = [*family.text_encoders, *family.text_encoders.values()]
    key = content_key([texts, [base.key(part) for part in parts]])
    path = folder / f"prompts-{key[:12]}.safetensors"
    kept = old and old.file == path.name and path.exists() and hashing.sha256_of(path) == old.sha256
    if not kept:
        tokenizers = {encoder: base.load(name) for encoder, name in family.text_encoders.items()}
        encoders = {name: base.load(name).to(dist.device()) for name in family.text_encoders}
        ids = family.tokenize(tokenizers, texts)
        moved = {name: tensor.to(dist.device()) for name, tensor in ids.items()}
        condition = family.embed(encoders, moved)
        table = {f"condition.{name}": tensor for name, tensor in condition.items()}
        table |= {f"ids.{name}": tensor for name, tensor in ids.items()}
        table = {name: tensor.cpu().contiguous() for name, tensor in table.items()}
        files.write_atomically(path, safetensors.torch.save(table))
    return shards.Prompts(file=path.name, sha256=hashing.sha256_of(path), texts=tuple(texts))


def prompts_to_draw(
    folder: Path,
    base: Pretrained,
    family: Family,
    components: Mapping[str, str],
    prompts: Sequence[str],
    guidance: float,
    precision: str,
) -> list[dict[str, Tensor]]:
    """What a pipeline of the base takes in place of each prompt, by frozen text encoders; on the CPU.

    Rank 0 encodes them, with nothing else on its device, and keeps them in `folder` for all other ranks
    and starts. `components`: keys of the base's parts.
    """
    parts = [components[name] for name in (*family.text_encoders, *family.text_encoders.values())]
    key = content_key([parts, list(prompts), guidance > 1, precision])
    path = folder / f"prompts-{key[:12]}.safetensors"
    with dist.agreed():
        if dist.is_main() and not path.is_file():
            tokenizers = {encoder: base.load(name) for encoder, name in family.text_encoders.items()}
            family.tokenize(tokenizers, prompts)  # says which are too long
            others = {family.denoiser: None} | ({family.vae: None} if family.vae else {})
            pipe = sampler.build(base, family, PRECISIONS[precision].dtype, dist.device(), others)
            made = {
                f"{number}.{name}": tensor.cpu().contiguous()
                for number, one in enumerate(sampler.encode(pipe, prompts, guidance))
                for name, tensor in one.items()
            }
            files.write_atomically(path, safetensors.torch.save(made))
    with dist.agreed():
        found = safetensors.torch.load_file(path)
    encoded: list[dict[str, Tensor]] = [{} for _ in prompts]
    for name, tensor in found.items():
        number, _, argument = name.partition(".")
        encoded[int(number)][argument] = tensor
    return encoded
