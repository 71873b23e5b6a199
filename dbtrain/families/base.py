"""What a model family is, and the functions that families share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dbtrain.log import say
from dbtrain.pretrained import Pretrained


@dataclass(frozen=True)
class Family:
    """All that differs between model families: facts, then a few functions.

    A family is a row, not a class: `train`, `prepare` and `export` ask it and never branch on it.
    """

    name: str  # "sd"
    pipeline: str  # Diffusers class: "StableDiffusionPipeline"
    denoiser: str  # component that learns: "unet"
    text_encoders: Mapping[str, str]  # text encoder -> its tokenizer
    targets: tuple[str, ...]  # module names that an adapter attaches to by default
    tokenize: Callable[[Mapping[str, Any], Sequence[str]], dict[str, Tensor]]
    """(tokenizers, prompts) -> token ids of each text encoder, (prompts, L) int64."""
    embed: Callable[[Mapping[str, nn.Module], Mapping[str, Tensor]], dict[str, Tensor]]
    """(text encoders, ids) -> condition: tensors, (prompts, ...) each."""
    encode_images: Callable[[nn.Module, Tensor], dict[str, Tensor]]
    """(vae, images (B, 3, H, W) in [-1, 1]) -> what a shard stores, (B, ...) fp32 each."""
    draw: Callable[[Mapping[str, Tensor], Tensor, LatentScale], Tensor]
    """(stored, posterior normals (rows, C, H, W), scale) -> x0, (rows, C, H, W)."""
    check: Callable[[Pretrained], None]
    """Raises ConfigError if the components of a base do not fit together; reads configs only."""
    denoise: Callable[[nn.Module, Tensor, Tensor, Mapping[str, Tensor]], Tensor]
    """(denoiser, x_t, t (rows,), condition) -> prediction, shaped like x_t."""

    @property
    def parts(self) -> tuple[str, ...]:
        """The components of a base that its pictures depend on."""
        return (self.denoiser, "vae", "scheduler", *self.text_encoders, *self.text_encoders.values())


@dataclass(frozen=True)
class LatentScale:
    """From what the VAE puts out to what the denoiser sees: (latent - shift) * scale."""

    scale: float
    shift: float

    @classmethod
    def of(cls, base: Pretrained) -> LatentScale:
        shift = base.config("vae").get("shift_factor")
        return cls(base.setting("vae", "scaling_factor", (int, float)), shift or 0.0)


def pixels_per_latent(base: Pretrained) -> int:
    """Side of the square of pixels behind one latent cell; image sides must divide by it."""
    return 2 ** (len(base.setting("vae", "block_out_channels", list)) - 1)


def tokenize_clip(tokenizer: Any, prompts: Sequence[str]) -> Tensor:
    """CLIP token ids, (prompts, L) int64, padded to the tokenizer's length; says what it cuts."""
    longest = tokenizer.model_max_length
    for prompt, ids in zip(prompts, tokenizer(list(prompts)).input_ids, strict=True):
        if len(ids) > longest:
            say(f"prompt '{prompt}' has {len(ids)} tokens; the model reads the first {longest}")
    padded = tokenizer(
        list(prompts), padding="max_length", max_length=longest, truncation=True, return_tensors="pt"
    )
    return padded.input_ids


def encode_moments(vae: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Mean and standard deviation of the VAE's posterior, (B, C, h, w) fp32 each, unscaled.

    Kept instead of a sample: drawing anew each time a row is trained on loses no randomness.
    Kingma & Welling 2013, "Auto-Encoding Variational Bayes", arXiv:1312.6114.
    """
    parameter = next(vae.parameters())
    posterior = vae.encode(images.to(parameter.device, parameter.dtype)).latent_dist  # type: ignore[operator]
    logvar = posterior.logvar.float()  # clamped to [-30, 20] by Diffusers
    return {"mean": posterior.mean.float(), "std": torch.exp(0.5 * logvar)}


def draw_latents(stored: Mapping[str, Tensor], posterior: Tensor, scale: LatentScale) -> Tensor:
    """A sample of the VAE's posterior, scaled for the denoiser, (rows, C, h, w)."""
    latents = stored["mean"] + stored["std"] * posterior
    return (latents - scale.shift) * scale.scale
