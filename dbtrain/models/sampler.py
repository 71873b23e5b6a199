"""Pictures from a base model: one sampler, one seed an image, for class images and samples alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn

from dbtrain.data import photos
from dbtrain.models.base import Base
from dbtrain.models.families.family import Family, LatentSpace
from dbtrain.models.precision import PRECISIONS
from dbtrain.runtime import dist, files
from dbtrain.runtime.errors import ConfigError
from dbtrain.runtime.hashing import content_key
from dbtrain.runtime.imports import importing

SAMPLER = "DPM-Solver++ 2M"  # Lu et al. 2022, arXiv:2211.01095
# Arguments of a pipeline's call, in the order in which its `encode_prompt` gives them (SD the first two).
ENCODED = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")


def build(
    base: Base,
    dtype: torch.dtype,
    device: torch.device,
    given: Mapping[str, Any] | None = None,
) -> Any:
    """The base's Diffusers pipeline on `device`, without a safety checker, quiet.

    `given`: components that are there already, or None for what the pipeline shall do without.
    """
    given = given or {}
    with importing():  # here, as most calls of `prepare` draw nothing
        import diffusers

    parts = {part: given[part] if part in given else base.load(part, dtype) for part in base.family.parts}
    with importing():
        kind = getattr(diffusers, base.family.pipeline)
    # Components that are handed over are not loaded again; the rest of a base is optional.
    pipe = kind.from_pretrained(base.folder, **dict.fromkeys(kind._optional_components) | parts)
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(
        pipe.scheduler.config, algorithm_type="dpmsolver++", solver_order=2, **base.family.sampler
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def generate(
    pipe: Any,
    prompts: Sequence[str],
    generators: Sequence[torch.Generator],
    steps: int,
    guidance: float,
    side: int | None,
    images: Sequence[Image.Image] = (),
) -> list[Image.Image]:
    """One picture a prompt, `side` px square (None: the base's own size).

    Each starts from its own CPU generator, so that it depends on neither the batch nor the device.
    `images`: what an upscaler enlarges, one a prompt.
    """
    enlarged = {"image": list(images)} if images else {}
    with torch.no_grad():
        return pipe(
            prompt=list(prompts), generator=list(generators), num_inference_steps=steps,
            guidance_scale=guidance, height=side, width=side, **enlarged,
        ).images  # fmt: skip


def encode(pipe: Any, prompts: Sequence[str], guidance: float) -> list[dict[str, Tensor]]:
    """What a pipeline's call takes in place of each of the prompts, (1, ...) each."""
    with torch.no_grad():
        every = [
            pipe.encode_prompt(
                prompt=prompt, device=pipe.device, num_images_per_prompt=1,
                do_classifier_free_guidance=guidance > 1,
            )
            for prompt in prompts
        ]  # fmt: skip
    return [
        {name: tensor for name, tensor in zip(ENCODED, found, strict=False) if tensor is not None}
        for found in every
    ]


def encode_once(
    folder: Path,
    base: Base,
    components: Mapping[str, str],
    prompts: Sequence[str],
    guidance: float,
    precision: str,
) -> list[dict[str, Tensor]]:
    """What a pipeline of the base takes in place of each prompt, by frozen text encoders; on the CPU.

    Rank 0 encodes them, with nothing else on its device, and keeps them in `folder` for all other ranks
    and starts. `components`: keys of the base's parts.
    """
    parts = [components[name] for name in (*base.family.text_encoders, *base.family.text_encoders.values())]
    key = content_key([parts, list(prompts), guidance > 1, precision])
    path = folder / f"prompts-{key[:12]}.safetensors"
    with dist.agreed():
        if dist.is_main() and not path.is_file():
            tokenizers = {encoder: base.load(name) for encoder, name in base.family.text_encoders.items()}
            base.family.tokenize(tokenizers, prompts)  # says which are too long
            others = {base.family.denoiser: None} | ({base.family.vae: None} if base.family.vae else {})
            pipe = build(base, PRECISIONS[precision].dtype, dist.device(), others)
            made = {
                f"{number}.{name}": tensor.cpu().contiguous()
                for number, one in enumerate(encode(pipe, prompts, guidance))
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


def generate_encoded(
    pipe: Any,
    encoded: Sequence[Mapping[str, Tensor]],
    generators: Sequence[torch.Generator],
    steps: int,
    guidance: float,
    side: int | None,
    images: Sequence[Image.Image] = (),
    *,
    latents: bool,
) -> list[Any]:
    """Like `generate`, of prompts that were encoded before, one a picture: needs no text encoder.

    `latents`: x0 as the denoiser has it, (C, h, w) each, instead of pictures: needs no VAE.
    """
    rows = {name: torch.cat([one[name] for one in encoded]).to(pipe.device) for name in encoded[0]}
    more: dict[str, Any] = {"image": list(images)} if images else {}
    if latents:
        more["output_type"] = "latent"
    with torch.no_grad():
        found = pipe(
            **rows, generator=list(generators), num_inference_steps=steps, guidance_scale=guidance,
            height=side, width=side, **more,
        ).images  # fmt: skip
    return list(found)


@torch.no_grad()
def decode(vae: nn.Module, latent: Tensor, space: LatentSpace) -> Image.Image:
    """The picture of one x0, (C, h, w), as a pipeline of the VAE's family decodes it."""
    parameter = next(vae.parameters())
    unscaled = space.unscaled(latent.float().cpu())[None].to(parameter.device, parameter.dtype)
    pixels = vae.decode(unscaled, return_dict=False)[0][0]  # type: ignore[operator]  # (3, H, W) in [-1, 1]
    values = (pixels.float().cpu() / 2 + 0.5).clamp(0, 1).permute(1, 2, 0)
    return Image.fromarray((values * 255).round().to(torch.uint8).numpy())


def small_pictures(names: Sequence[str], family: Family, side: int | None) -> list[Image.Image]:
    """What an upscaler enlarges. Raises ConfigError if it has nothing, or if another base is given some."""
    if (family.enlarges > 1) != bool(names):
        cure = "enlarges pictures: name some" if family.enlarges > 1 else "draws from prompts alone"
        raise ConfigError(f"sample.low_res has {len(names)} pictures; a {family.name} model {cure}")
    size = (side or 256) // family.enlarges
    return [photos.load(files.expand(name)).resize((size, size), Image.Resampling.LANCZOS) for name in names]
