"""The base model, the photos, and the shards made of them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from dbtrain.config.base import Count, Natural, NonNegative, Positive, Section, Steps, Text


class Model(Section):
    path: Text = Field(
        "tiny",
        description="base model: a Diffusers folder, a Hub id, a whole SD or SDXL model in one "
        "`.safetensors` file, or `tiny` (comes with dbtrain)",
    )
    family: str = Field("auto", description="model family; `auto` reads it from the base's model_index.json")
    config: Text | None = Field(
        None,
        description="for a single file: Diffusers folder or Hub id with its configs (null: told from the "
        "file, and taken from the Hub)",
    )
    revision: str | None = Field(None, description="branch, tag or commit of a Hub id")
    variant: str | None = Field(None, description="weight variant, e.g. `fp16` for `*.fp16.safetensors`")
    low_res: Literal["image", "itself"] = Field(
        "image",
        description="IF stage II: what it enlarges in training; `itself`: the noisy image once more, "
        "as Diffusers' script has it",
    )


class Sampling(Section):
    steps: Steps = Field(25, description="DPM-Solver++ steps for each class image")
    guidance: NonNegative = Field(7.5, description="classifier-free guidance scale")
    batch: Count = Field(8, description="class images generated at once on each rank")
    precision: Literal["fp32", "bf16"] = Field(
        "bf16", description="precision in which class images are generated"
    )
    compile: Literal[False, True, "auto"] = Field(
        False,
        description="torch.compile the denoiser for them; `auto`: on GPUs, for sets of 1,000 images or more",
    )


class Prepare(Section):
    photos: Text = Field(description="folder with the photos of the subject (jpg, jpeg, png, webp, bmp)")
    instance_prompt: Text = Field(description="prompt of every photo, e.g. `a photo of sks dog`")
    captions: bool = Field(False, description="take each photo's prompt from the .txt file beside it instead")
    class_prompt: Text | None = Field(
        None, description="prompt of the class images; null: no prior preservation"
    )
    class_images: Count = Field(200, description="class images to train with")
    class_dir: Text | None = Field(
        None,
        description="your own class images; missing ones are generated into a subfolder "
        "(null: all are, in ~/.cache/dbtrain; on several nodes, give a shared folder)",
    )
    class_pictures: bool = Field(
        False,
        description="decode generated class images and keep them as PNG, to be looked at, then encode "
        "those (false: their latents are kept, which saves both; models of pixels always have pictures)",
    )
    resolution: Count = Field(512, description="side of the square crops, px")
    crop: Literal["center", "random"] = Field(
        "center", description="where a photo is cropped after its short side is resized"
    )
    variants: Count = Field(1, description="stored random crops of each photo")
    flip: bool = Field(False, description="store each crop mirrored as well")
    held_out: Natural = Field(
        0, description="photos kept back from training, to measure the loss on (see `validation`)"
    )
    class_held_out: Natural = Field(0, description="class images kept back, likewise")
    vae_precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="precision of the VAE; fp16 overflows and is not offered"
    )
    sampling: Sampling = Field(default=Sampling(), description="how class images are generated")

    @model_validator(mode="after")
    def _class_images_to_hold_out(self) -> Prepare:
        if self.class_held_out and not self.class_prompt:
            raise ValueError(
                f"class_held_out is {self.class_held_out}, but there is no class_prompt, and no class images"
            )
        return self

    @model_validator(mode="after")
    def _one_centre(self) -> Prepare:
        if self.crop == "center" and self.variants > 1:
            raise ValueError(
                f"variants is {self.variants}, but crop is 'center', of which there is one; use crop: random"
            )
        return self


class Data(Section):
    shards: Text = Field(description="folder of the prepared shards")
    cache_gib: Positive = Field(
        1.0, description="memory for decoded shards on each rank, GiB; less reads them more often"
    )
    resident_gib: NonNegative = Field(
        1.0, description="GPU memory for the rows of a rank, GiB: if all fit, they are sent there once"
    )
