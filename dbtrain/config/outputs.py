"""Outputs: validation, exported files, samples, scores."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from dbtrain.config.base import Count, Names, NonNegative, Section, Seed, Steps, Text, split_or_listed


class Validation(Section):
    """Images and held-out losses during training. Images use the sampler settings of `sample`."""

    every: Count = Field(
        100, description="steps between validations; there is also one before the first step"
    )
    prompts: Names = Field((), description="prompts to generate at each validation (empty: no images)")
    images: Count = Field(2, description="images per prompt")
    timesteps: Count = Field(8, description="number of timesteps at which the held-out loss is measured")


class Export(Section):
    formats: tuple[Literal["diffusers", "peft", "kohya", "comfyui", "diff"], ...] = Field(
        (), description="formats to write: `diffusers`, `peft`, `kohya`, and `diff`, the change of every "
        "layer in full: large, needs the base's weights, and exact for DoRA in ComfyUI and A1111 (empty: "
        "`diffusers`, or `peft` for adapters that `diffusers` cannot store)"
    )  # fmt: skip

    ema: bool = Field(
        False,
        description="export the moving average that `train.ema` keeps instead of the last weights; "
        "validation, samples and scores are then of it too",
    )

    _split = field_validator("formats", mode="before")(split_or_listed)

    @field_validator("formats")
    @classmethod
    def _one_to_load(cls, formats: tuple[str, ...]) -> tuple[str, ...]:
        if set(formats) == {"diff"}:
            raise ValueError(
                "'diff' alone leaves no adapter to sample or convert; list another format too, e.g. peft,diff"
            )
        return formats


class Hub(Section):
    repo: Text | None = Field(
        None, description="repository to push to, `name` or `owner/name` (null: do not push)"
    )
    private: bool = Field(True, description="create new repositories as private")
    license: Text | None = Field(None, description="license to state in the model card, e.g. `openrail++`")


class Sample(Section):
    prompts: Names = Field((), description="prompts to generate after training, and by `sample`")
    images: Count = Field(4, description="images per prompt")
    seed: Seed = Field(0, description="seed of the first image; image i uses seed + i")
    steps: Steps = Field(25, description="sampling steps")
    guidance: NonNegative = Field(7.5, description="classifier-free guidance scale")
    batch: Count = Field(4, description="images per batch on each rank")
    precision: Literal["fp32", "bf16", "fp16"] = Field("bf16", description="precision of the base model")
    low_res: Names = Field((), description="IF stage II: image files to upscale, used in turn")


class Evaluation(Section):
    """What `evaluate` generates, and which models score it. Images use the sampler settings of `sample`."""

    dino: Text | None = Field(
        None,
        description="vision transformer for DINO scores: a folder or a Hub id, `NAME` or `NAME@REVISION` "
        "(null: DINO ViT-S/16; for the base model `tiny`, its own classifier)",
    )
    clip: Text | None = Field(
        None, description="CLIP model for CLIP-I and CLIP-T, in the same form (null: OpenAI ViT-B/32)"
    )
    prompts: Names = Field(
        (), description="prompts to generate, with `{}` for the subject, e.g. `a {} in a bucket` (empty: ten "
        "built-in prompts)"
    )  # fmt: skip
    images: Annotated[int, Field(ge=2, le=10**6)] = Field(4, description="images per prompt")
    class_images: Annotated[int, Field(ge=2, le=10**6)] = Field(
        24, description="images of the class, each generated with and without the adapter"
    )
    seed: Seed = Field(1000, description="seed of the first image; image i uses seed + i")
    batch: Count = Field(32, description="images per batch of DINO and CLIP on each rank")
