"""Pictures from a base model: one sampler, one seed an image, for class images and samples alike."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dbtrain.families.base import Family
from dbtrain.importing import importing
from dbtrain.pretrained import DTYPES, Pretrained

SAMPLER = "DPM-Solver++ 2M"  # Lu et al. 2022, arXiv:2211.01095
# Arguments of a pipeline's call, in the order in which its `encode_prompt` gives them (SD the first two).
ENCODED = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")


def build(
    base: Pretrained, family: Family, precision: str, device: torch.device, without: Collection[str] = ()
) -> Any:
    """The base's Diffusers pipeline on `device`, without a safety checker, quiet.

    `without`: components that are not loaded.
    """
    with importing():  # here, as most calls of `prepare` draw nothing
        import diffusers

    parts = {part: None if part in without else base.load(part, DTYPES[precision]) for part in family.parts}
    with importing():
        kind = getattr(diffusers, family.pipeline)
    # Components that are handed over are not loaded again; the rest of a base is optional.
    pipe = kind.from_pretrained(base.folder, **dict.fromkeys(kind._optional_components) | parts)
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(
        pipe.scheduler.config, algorithm_type="dpmsolver++", solver_order=2, **family.sampler
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def draw(
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


def encode_once(pipe: Any, family: Family, prompt: str, guidance: float) -> dict[str, Tensor]:
    """What a latent pipeline's call takes in place of `prompt`, (1, ...) each; frees its text encoders."""
    with torch.no_grad():
        found = pipe.encode_prompt(
            prompt=prompt, device=pipe.device, num_images_per_prompt=1,
            do_classifier_free_guidance=guidance > 1,
        )  # fmt: skip
    for name in family.text_encoders:
        setattr(pipe, name, None)
    return {name: tensor for name, tensor in zip(ENCODED, found, strict=False) if tensor is not None}


def draw_latents(
    pipe: Any,
    encoded: Mapping[str, Tensor],
    generators: Sequence[torch.Generator],
    steps: int,
    guidance: float,
    side: int,
) -> list[Tensor]:
    """x0 of one picture a generator, (C, h, w) each, as the denoiser has it; all of one prompt.

    Like `draw`, but nothing is decoded: the pipeline needs no VAE.
    """
    rows = {name: tensor.expand(len(generators), *tensor.shape[1:]) for name, tensor in encoded.items()}
    with torch.no_grad():
        found = pipe(
            **rows, generator=list(generators), num_inference_steps=steps, guidance_scale=guidance,
            height=side, width=side, output_type="latent",
        ).images  # fmt: skip
    return list(found)
