"""Inputs: the base model, the photos, and the shards made from them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from dbtrain.config.base import (
    Count,
    Natural,
    NonNegative,
    Patterns,
    Positive,
    Repeats,
    Section,
    Share,
    Side,
    SizeText,
    Steps,
    Text,
    listed,
)


class Model(Section):
    path: Text = Field(
        description="base model: a Diffusers folder, a Hub id, a checkpoint in one `.safetensors` file (SD, "
        "SDXL, SD 3, FLUX.1, Chroma, Z-Image, or the transformer alone of any family that has one), or "
        "`tiny`, a toy model that comes with dbtrain",
    )
    family: str = Field(
        "auto",
        description="model family, e.g. `sdxl`; `auto`: from the base's model_index.json",
    )
    config: Text | None = Field(
        None,
        description="for a single-file checkpoint: Diffusers folder or Hub id with matching configs (null: "
        "detected from the file and downloaded from the Hub; SD 2 needs one); for a file of a transformer "
        "alone: a folder on this machine that has the rest",
    )
    revision: str | None = Field(None, description="branch, tag or commit of the Hub repository")
    variant: str | None = Field(
        None,
        description="weight variant, e.g. `fp16` for `*.fp16.safetensors`; plain files are used where a "
        "component has none",
    )
    training_adapter: Text | None = Field(
        None,
        description="LoRA that is part of the base in training only, for a base that was distilled to a few "
        "steps: a file, a folder or a Hub id (`owner/name` or `owner/name/file.safetensors`)",
    )
    low_res: Literal["image", "itself"] = Field(
        "image",
        description="IF stage II: the low-resolution input in training. `image`: the downscaled photo; "
        "`itself`: the noisy image again, as in the Diffusers script",
    )


class Sampling(Section):
    steps: Steps = Field(25, description="sampling steps per class image")
    guidance: NonNegative = Field(7.5, description="classifier-free guidance scale")
    batch: Count = Field(8, description="class images per batch on each rank")
    precision: Literal["fp32", "bf16"] = Field("bf16", description="precision for generating class images")
    compile: Literal[False, True, "auto"] = Field(
        False,
        description="torch.compile the denoiser for class images; `auto`: on GPUs, for 1,000 images or more",
    )


class Augment(Section):
    """How much the stored variants of a photo differ from it, each by an amount within these limits."""

    rotate: Annotated[float, Field(ge=0, le=45)] = Field(
        0.0, description="rotation, degrees either way; the crop is smaller, so that no border shows"
    )
    hue: Annotated[float, Field(ge=0, le=180)] = Field(0.0, description="hue, degrees either way")
    brightness: Share = Field(0.0, description="brightness: 0.1 is a factor of 0.9 to 1.1")
    contrast: Share = Field(0.0, description="contrast, likewise")
    saturation: Share = Field(0.0, description="saturation, likewise")

    @model_validator(mode="after")
    def _some(self) -> Augment:
        if not any(self.model_dump().values()):
            raise ValueError("augment changes nothing; set one of its limits, or augment to null")
        return self


class Caption(Section):
    """How the prompts of a photo are made from its captions."""

    prefix: str = Field("", description="text before each caption, e.g. `a photo of {},`")
    suffix: str = Field("", description="text after it")
    shuffle: bool = Field(False, description="put its tags, which commas separate, in other orders")
    keep_tags: Natural = Field(0, description="first tags of a caption that are neither moved nor left out")
    tag_dropout: Share = Field(0.0, description="share of the tags that are left out")
    variants: Annotated[int, Field(ge=1, le=1000)] | None = Field(
        None,
        description="prompts per photo, as many of each caption, if there is anything to draw: orders, tags "
        "to leave out, or `{one|another}` in a caption (null: 8)",
    )


class Prepare(Section):
    photos: Text = Field(
        description="folder with photos of the subject (JPEG, PNG, HEIC, AVIF and others); or a table "
        "(`.csv`, `.jsonl`, `.parquet`), WebDataset tars (`photos-{000..009}.tar`), or `hub:OWNER/NAME`"
    )
    subfolders: bool = Field(
        False,
        description="also read the photos in all folders below; those in a folder called `10_dog` are seen "
        "10 times as often",
    )
    repeats: Patterns[Repeats] = Field(
        default={},
        description="how often photos are seen relative to the others, by a pattern of their path in "
        '`photos`, or a folder there, e.g. `{close: 3, "*.png": 2}`; the last that matches wins, also over '
        "the number of a folder",
    )
    weights: Patterns[Positive] = Field(
        default={}, description="factors of the loss of photos (1), by the same patterns"
    )
    instance_prompt: Text = Field(description="prompt for every photo, e.g. `a photo of sks dog`")
    captions: Literal[False, True, "lines", "auto"] = Field(
        False,
        description="read each photo's prompt from the .txt file of the same name; `lines`: each of its "
        "lines is a caption, of which every row of training draws one (or each text of a .json file); "
        "`auto`: `captioner` writes the files that are missing",
    )
    captioner: Text | None = Field(
        None,
        description="image-to-text model of transformers for `captions: auto`, a folder or Hub id (null: "
        "Salesforce/blip-image-captioning-large)",
    )
    caption: Caption | None = Field(
        None, description="make several prompts of each caption (null: captions are prompts as they are)"
    )
    class_prompt: Text | None = Field(
        None, description="prompt of the class, for prior preservation (null: none)"
    )
    class_images: Annotated[int, Field(ge=0, le=10**6)] = Field(
        200, description="number of class images (0 unless `loss.prior` is `images`)"
    )
    class_dir: Text | None = Field(
        None,
        description="folder with your own class images; missing ones are generated into a subfolder (null: "
        "all are generated, in ~/.cache/dbtrain; on several nodes, give a folder that all of them share)",
    )
    class_pictures: bool = Field(
        False,
        description="keep generated class images as PNG files, to look at (false: keep their latents, which "
        "skips decoding and encoding; pixel-space models always keep images)",
    )
    resolution: Side | Annotated[tuple[Side, ...], BeforeValidator(listed), Field(min_length=1)] = Field(
        512,
        description="side length of the square crops, px; with several, e.g. `[512, 768]`, each photo is "
        "stored at all that do not enlarge it, and images are generated at the largest",
    )
    buckets: bool | Annotated[tuple[SizeText, ...], BeforeValidator(listed), Field(min_length=1)] = Field(
        False,
        description="keep the shapes of photos instead of cropping squares: true: sizes of about the area of "
        "`resolution`, which keep at least 95% of each photo; or a list of sizes, width x height, e.g. "
        "`[768x512, 512x768]`. Batches have one size each",
    )
    class_buckets: bool = Field(
        True,
        description="whether class images have the sizes of the photos (false: they are squares, which takes "
        "a forward pass of their own)",
    )
    crop: Literal["center", "random"] = Field(
        "center", description="crop position, after the photo is resized to cover its size"
    )
    variants: Count = Field(
        1, description="variants stored per photo: random crops, or changed as `augment` says, or both"
    )
    augment: Augment | None = Field(
        None, description="turn and recolor the variants of each photo (null: do not)"
    )
    flip: bool = Field(False, description="also store a mirrored copy of each crop")
    mask: Literal[False, True, "auto"] = Field(
        False,
        description="train mostly on the subject, see `loss.mask`: true: its mask is `dog.mask.png` beside "
        "`dog.jpg`, white on black, or the photo's own transparency; `auto`: where there is neither, "
        "`mask_model` finds the subject's class word",
    )
    mask_model: Text | None = Field(
        None,
        description="CLIPSeg model for `mask: auto`, a folder or Hub id (null: CIDAS/clipseg-rd64-refined)",
    )
    held_out: Natural = Field(
        0, description="photos excluded from training and used to measure the held-out loss"
    )
    class_held_out: Natural = Field(
        0, description="class images excluded from training and used to measure the held-out loss"
    )
    vae_precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="precision of the VAE; fp16 would overflow and is not available"
    )
    memory_gib: Positive | None = Field(
        None,
        description="memory for the weights of text encoders, GiB; those that need more are read layer by "
        "layer, with the same result (null: 80% of what is free on the device, or in RAM without a GPU)",
    )
    sampling: Sampling = Field(default=Sampling(), description="how class images are generated")

    @property
    def resolutions(self) -> tuple[int, ...]:
        """The side lengths, px, the smallest first."""
        return (self.resolution,) if isinstance(self.resolution, int) else tuple(sorted(set(self.resolution)))

    @property
    def side(self) -> int:
        """The side length of generated images, px."""
        return self.resolutions[-1]

    @property
    def has_class_images(self) -> bool:
        return self.class_prompt is not None and self.class_images > 0

    def recorded(self) -> dict[str, Any]:
        """The settings that shape the shards, JSON-able. Captions count by their text, whoever wrote them."""
        left_out: Any = {"memory_gib": True, "captioner": True, "sampling": {"batch", "compile"}}
        settings = self.model_dump(mode="json", exclude=left_out)
        return settings | ({"captions": True} if self.captions == "auto" else {})

    @model_validator(mode="after")
    def _class_images_to_hold_out(self) -> Prepare:
        if self.class_held_out and not self.has_class_images:
            raise ValueError(
                f"class_held_out is {self.class_held_out}, but there are no class images; "
                "set class_prompt too, and loss.prior to images"
            )
        return self

    @model_validator(mode="after")
    def _captions_to_change(self) -> Prepare:
        if self.caption and not self.captions:
            raise ValueError(
                "caption says how to change captions, but captions is false; set captions to true, lines or "
                "auto"
            )
        return self

    @model_validator(mode="after")
    def _one_centre(self) -> Prepare:
        if self.crop == "center" and self.augment is None and self.variants > 1:
            raise ValueError(
                f"variants is {self.variants}, but crop is 'center', which gives one crop per photo; "
                "use crop: random, or augment"
            )
        return self

    @model_validator(mode="after")
    def _one_list_of_sizes(self) -> Prepare:
        if isinstance(self.buckets, tuple) and len(self.resolutions) > 1:
            raise ValueError(
                f"resolution is {list(self.resolutions)}, but buckets lists all sizes; set resolution to one "
                "number, the side of generated images"
            )
        return self


class Data(Section):
    shards: Text = Field(description="folder (or URL, for reading) of the shards")
    cache_gib: Positive = Field(
        1.0, description="RAM for decoded shards on each rank, GiB; shards that do not fit are read again"
    )
    prompt_dropout: Share = Field(
        0.0,
        description="share of the rows that are trained with the empty prompt, for classifier-free guidance; "
        "above 0, `prepare` encodes it too",
    )
    resident_gib: NonNegative = Field(
        1.0, description="GPU memory for training data, GiB; data that fits is copied to the GPU once"
    )
