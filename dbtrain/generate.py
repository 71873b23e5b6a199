"""Pictures from a base model: one sampler, one seed an image, for class images and samples alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from dbtrain.families.base import Family
from dbtrain.importing import importing
from dbtrain.pretrained import DTYPES, Pretrained

SAMPLER = "DPM-Solver++ 2M"  # Lu et al. 2022, arXiv:2211.01095


def build(base: Pretrained, family: Family, precision: str, device: torch.device) -> Any:
    """The base's Diffusers pipeline on `device`, without a safety checker, quiet."""
    with importing():  # here, as most calls of `prepare` draw nothing
        import diffusers

    parts = {part: base.load(part, DTYPES[precision]) for part in family.parts}
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
