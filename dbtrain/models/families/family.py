"""What a model family is, and the functions that families share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dbtrain.models.objectives import DDPM
from dbtrain.models.pretrained import Pretrained
from dbtrain.runtime.console import say
from dbtrain.runtime.errors import ConfigError

if TYPE_CHECKING:
    from dbtrain.data.batch import Batch


Sees = Callable[[Tensor, Tensor, Tensor, "Batch", DDPM | None], dict[str, Tensor]]
"""(x0, x_t, t (rows,), batch, noising) -> what the denoiser sees besides, (rows, ...) each."""


@dataclass(frozen=True)
class Family:
    """All that differs between model families: facts, then a few functions.

    A family is a row, not a class: `train`, `prepare` and `export` ask it and never branch on it.
    """

    name: str  # "sd"
    pipeline: str  # Diffusers class: "StableDiffusionPipeline"
    denoiser: str  # component that learns: "unet"
    text_encoders: Mapping[str, str]  # text encoder -> its tokenizer
    tokenize: Callable[[Mapping[str, Any], Sequence[str]], dict[str, Tensor]]
    """(tokenizers, prompts) -> token ids of each text encoder, (prompts, L) int64."""
    embed: Callable[[Mapping[str, nn.Module], Mapping[str, Tensor]], dict[str, Tensor]]
    """(text encoders, ids) -> condition: tensors, (prompts, ...) each."""
    space: Callable[[Pretrained, int], LatentSpace]
    """(base, side in px) -> what the denoiser works on. Raises ConfigError if the side does not divide."""
    encode_images: Callable[[nn.Module | None, Tensor], dict[str, Tensor]]
    """(vae, images (B, 3, H, W) in [-1, 1]) -> what a shard stores, (B, C, H, W) each."""
    sample_posterior: Callable[[Mapping[str, Tensor], Tensor], Tensor]
    """(stored, posterior normals (rows, C, H, W)) -> x0 before its scale, (rows, C, H, W) fp32."""
    check: Callable[[Pretrained], None]
    """Raises ConfigError if the components of a base do not fit together; reads configs only."""
    denoise: Callable[[nn.Module, Tensor, Tensor, Mapping[str, Tensor]], Tensor]
    """(denoiser, x_t, t (rows,), condition) -> prediction, shaped like x_t."""
    objective: Callable[[Mapping[str, Any], float | None], DDPM] = DDPM.of
    """(the scheduler's config, gamma of min-SNR or None) -> what the denoiser learns."""
    vae: str | None = "vae"  # None: the denoiser works on pixels
    row: Callable[[Mapping[str, Any], int], dict[str, Tensor]] = lambda meta, side: {}
    """(a stored row's description, side in px) -> what it adds to the condition, one tensor each."""
    noising: str | None = None  # scheduler that roughens the image which an upscaler enlarges
    sees: Mapping[str, Sees] = field(default_factory=dict)  # what an upscaler is given, by model.low_res
    enlarges: int = 1  # output side per side of the image that an upscaler is given
    lora_loads: tuple[str, ...] | None = None  # components whose LoRA the pipeline loads; None: all
    lora_mixin: str = "StableDiffusionLoraLoaderMixin"  # the base of the pipeline's class that writes LoRA
    kohya: Mapping[str, str] = field(default_factory=dict)  # component -> its prefix in kohya's files
    sampler: Mapping[str, Any] = field(default_factory=dict)  # settings put over the base's scheduler
    idle: Callable[[str, nn.Module], tuple[str, ...]] = lambda name, encoder: ()
    """(name, text encoder) -> its modules that `embed` makes no use of: no gradient reaches them."""

    @property
    def adaptable(self) -> tuple[str, ...]:
        """The components that an adapter may be on."""
        return (self.denoiser, *self.text_encoders)

    @property
    def parts(self) -> tuple[str, ...]:
        """The components of a base that its pictures depend on."""
        optional = [part for part in (self.vae, self.noising) if part]
        return (self.denoiser, "scheduler", *optional, *self.text_encoders, *self.text_encoders.values())


@dataclass(frozen=True)
class LatentSpace:
    """What the denoiser works on: (stored latent - shift) * scale."""

    shape: tuple[int, ...]  # (C, H, W)
    scale: tuple[float, ...] = (1.0,)  # one, or one a channel
    shift: tuple[float, ...] = (0.0,)

    def unscaled(self, x0: Tensor) -> Tensor:
        """The latent that the VAE has for what the denoiser works on, (..., C, H, W) both."""
        scale, shift = (torch.tensor(values)[:, None, None] for values in (self.scale, self.shift))
        return x0 / scale + shift


def vae_space(base: Pretrained, side: int) -> LatentSpace:
    """The latents of a base's VAE for square images of `side` px."""
    cell = 2 ** (len(base.setting("vae", "block_out_channels", list)) - 1)
    if side % cell:
        near = max(1, round(side / cell)) * cell
        raise ConfigError(f"prepare.resolution is {side}, which the VAE of {base.name} cannot "
                          f"divide; use a multiple of {cell}, e.g. {near}")  # fmt: skip
    channels, scale = (
        base.setting("vae", "latent_channels", int), base.setting("vae", "scaling_factor", (int, float))
    )  # fmt: skip
    config = base.config("vae")
    shape = (channels, side // cell, side // cell)
    if config.get("latents_mean") and config.get("latents_std"):
        mean, std = config["latents_mean"], config["latents_std"]
        return LatentSpace(shape, tuple(scale / value for value in std), tuple(map(float, mean)))
    return LatentSpace(shape, (float(scale),), (float(config.get("shift_factor") or 0),))


def pixel_space(base: Pretrained, side: int) -> LatentSpace:
    """Square RGB images of `side` px, in [-1, 1]."""
    return LatentSpace((3, side, side))


def matching(base: Pretrained, pairs: Sequence[tuple[str, str, str, str]]) -> None:
    """Raise ConfigError unless each (component, setting) equals its (component, setting)."""
    for one, name, other, its_name in pairs:
        here, there = base.setting(one, name, int), base.setting(other, its_name, int)
        if here != there:
            raise ConfigError(
                f"base model {base.name} does not fit together: {name} of its {one} is {here}, "
                f"but {its_name} of its {other} is {there}"
            )


def padded(tokenizer: Any, prompts: Sequence[str], length: int) -> Any:
    """Token ids and masks, (prompts, length) int64, as a tokenizer gives them; says what it cuts."""
    for prompt, ids in zip(prompts, tokenizer(list(prompts)).input_ids, strict=True):
        if len(ids) > length:
            say(f"prompt '{prompt}' has {len(ids)} tokens; the model reads the first {length}")
    return tokenizer(
        list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    )


def tokenize_clip(tokenizer: Any, prompts: Sequence[str]) -> Tensor:
    """CLIP token ids, (prompts, L) int64, padded to the tokenizer's length."""
    return padded(tokenizer, prompts, tokenizer.model_max_length).input_ids


def encode_moments(vae: nn.Module | None, images: Tensor) -> dict[str, Tensor]:
    """Mean and standard deviation of the VAE's posterior, (B, C, h, w) fp32 each, unscaled.

    Kept instead of a sample: drawing anew each time a row is trained on loses no randomness.
    Kingma & Welling 2013, "Auto-Encoding Variational Bayes", arXiv:1312.6114.
    """
    assert vae is not None
    parameter = next(vae.parameters())
    posterior = vae.encode(images.to(parameter.device, parameter.dtype)).latent_dist  # type: ignore[operator]
    logvar = posterior.logvar.float()  # clamped to [-30, 20] by Diffusers
    return {"mean": posterior.mean.float(), "std": torch.exp(0.5 * logvar)}


def sampled_moments(x0: Tensor, space: LatentSpace) -> dict[str, Tensor]:
    """What a shard stores of a latent that a sampler gave, (C, h, w): itself, unscaled, without a spread."""
    return {"mean": space.unscaled(x0), "std": torch.zeros_like(x0)}


def sample_moments(stored: Mapping[str, Tensor], posterior: Tensor) -> Tensor:
    """A sample of the VAE's posterior, unscaled, (rows, C, h, w)."""
    return stored["mean"] + stored["std"] * posterior
