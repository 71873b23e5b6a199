"""Pictures from a base model: one sampler, one seed an image, for class images and samples alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import diffusers
import torch
from PIL import Image

from dbtrain.errors import ConfigError, reason
from dbtrain.families.base import Family
from dbtrain.pretrained import DTYPES, Pretrained, hush

SAMPLER = "DPM-Solver++ 2M"  # Lu et al. 2022, arXiv:2211.01095


def build(base: Pretrained, family: Family, precision: str, device: torch.device) -> Any:
    """The base's Diffusers pipeline on `device`, without a safety checker, quiet."""
    hush()
    try:
        pipe = getattr(diffusers, family.pipeline).from_pretrained(
            base.folder, variant=base.variant, dtype=DTYPES[precision], use_safetensors=True,
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"cannot load base model {base.name}: {reason(error)}") from error
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(
        pipe.scheduler.config, algorithm_type="dpmsolver++", solver_order=2
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
) -> list[Image.Image]:
    """One picture a prompt, `side` px square (None: the base's own size).

    Each starts from its own CPU generator, so that it depends on neither the batch nor the device.
    """
    with torch.no_grad():
        return pipe(
            list(prompts), generator=list(generators), num_inference_steps=steps,
            guidance_scale=guidance, height=side, width=side,
        ).images  # fmt: skip
