"""What is made of it: validations, files, pictures, scores."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from dbtrain.config.base import Count, Names, NonNegative, Section, Seed, Steps, Text, listed


class Validation(Section):
    """Pictures and losses while a run trains, in its precision; `sample` says how else they are drawn."""

    every: Count = Field(
        100, description="steps between validations; there is one before the first step as well"
    )
    prompts: Names = Field((), description="what to draw at each of them (none: no pictures)")
    images: Count = Field(2, description="pictures for each prompt")
    timesteps: Count = Field(8, description="timesteps at which the loss of what was kept back is measured")


class Export(Section):
    formats: tuple[Literal["diffusers", "peft", "kohya"], ...] = Field(
        (), description="files to write: `diffusers`, `peft`, `kohya`; none: diffusers, or peft for what "
        "that cannot hold"
    )  # fmt: skip

    _listed = field_validator("formats", mode="before")(listed)


class Hub(Section):
    repo: Text | None = Field(
        None, description="repository to push the export to, `name` or `owner/name` (null: do not push)"
    )
    private: bool = Field(True, description="make a new repository private")
    license: Text | None = Field(None, description="licence that the model card names, e.g. `openrail++`")


class Sample(Section):
    prompts: Names = Field((), description="what to draw: by `run` at its end, by `sample` by default")
    images: Count = Field(4, description="images for each prompt")
    seed: Seed = Field(0, description="seed of the first image; the next ones count up")
    steps: Steps = Field(25, description="DPM-Solver++ steps")
    guidance: NonNegative = Field(7.5, description="classifier-free guidance scale")
    batch: Count = Field(4, description="images drawn at once on each rank")
    precision: Literal["fp32", "bf16", "fp16"] = Field("bf16", description="precision of the base")
    low_res: Names = Field((), description="IF stage II: small pictures to enlarge, in turn for each image")


class Evaluation(Section):
    """What `evaluate` looks at, and with which models; `sample` says how the pictures are drawn."""

    dino: Text | None = Field(
        None,
        description="ViT whose CLS embedding tells subjects apart: a folder or a Hub id, `NAME` or "
        "`NAME@REVISION` (null: DINO ViT-S/16; for `tiny`, the classifier that comes with it)",
    )
    clip: Text | None = Field(
        None, description="CLIP that compares pictures with texts, likewise (null: OpenAI's ViT-B/32)"
    )
    prompts: Names = Field(
        (), description="what to draw, with `{}` for the subject, e.g. `a {} in a bucket`, or with its "
        "token in it (none: ten contexts of dbtrain's)"
    )  # fmt: skip
    images: Annotated[int, Field(ge=2)] = Field(4, description="pictures for each prompt")
    class_images: Annotated[int, Field(ge=2)] = Field(
        24, description="pictures of the class, without and with the adapter"
    )
    seed: Seed = Field(1000, description="seed of the first image; the next ones count up")
    batch: Count = Field(32, description="pictures embedded at once on each rank")
    token: Text | None = Field(
        None, description="word that names the subject (null: what the instance prompt has and the class "
        "prompt lacks)"
    )  # fmt: skip
    class_word: Text | None = Field(
        None, description="what the subject is, e.g. `dog` (null: what follows the token)"
    )
