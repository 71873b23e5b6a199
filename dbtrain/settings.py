"""Every section of the config: its keys, their kinds and defaults, and what they mean."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from dbtrain.section import (
    Count,
    Names,
    Natural,
    NonNegative,
    Positive,
    PositiveShare,
    Section,
    Seed,
    Share,
    Steps,
    Targets,
    Text,
    listed,
    no_number,
)


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
    vae_precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="precision of the VAE; fp16 overflows and is not offered"
    )
    sampling: Sampling = Field(default=Sampling(), description="how class images are generated")

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


class AdapterSettings(Section):
    """An adapter on one kind of component; every kind of adapter has some of the options."""

    kind: Literal["lora", "loha", "lokr"] = Field("lora", description="adapter kind")
    rank: Count = Field(16, description="rank of the update")
    alpha: Positive | None = Field(
        None, description="strength: the update is scaled by alpha / rank (null: alpha = rank)"
    )
    targets: Targets = Field(
        "attention",
        description="modules to adapt: `attention`, `minimal`, `all`, a list of names, or a regular "
        "expression for the whole name",
    )
    dropout: Share = Field(0.0, description="LoRA: dropout before the adapter")
    init: Literal["gaussian", "kaiming", "orthogonal"] = Field(
        "gaussian", description="LoRA: start of the down projection"
    )
    rslora: bool = Field(False, description="LoRA: scale by alpha / sqrt(rank)")
    dora: bool = Field(False, description="LoRA: train the weights' magnitudes as well (DoRA)")
    bias: Literal["none", "all", "lora_only"] = Field(
        "none", description="LoRA: biases of the base to train as well; kept by the format peft only"
    )
    rank_dropout: Share = Field(0.0, description="LoHa, LoKr: dropout of the update's rows")
    module_dropout: Share = Field(0.0, description="LoHa, LoKr: how often a whole layer's update is left out")
    effective_conv2d: bool = Field(False, description="LoHa, LoKr: decompose 3x3 convolutions by CP")
    decompose_both: bool = Field(False, description="LoKr: decompose the left factor too")
    decompose_factor: int = Field(-1, description="LoKr: size of the left factor (-1: near the square root)")

    @model_validator(mode="after")
    def _options_of_the_kind(self) -> AdapterSettings:
        strange = [
            name
            for name, field in AdapterSettings.model_fields.items()
            if name not in (*COMMON_OPTIONS, *OPTIONS[self.kind]) and getattr(self, name) != field.default
        ]
        if strange:
            raise ValueError(
                f"{', '.join(strange)} is no option of kind {self.kind}, "
                f"which has {', '.join(OPTIONS[self.kind])}"
            )
        if not self.targets:
            raise ValueError("targets is empty; use 'attention'")
        return self


COMMON_OPTIONS = ("kind", "rank", "alpha", "targets", "text_encoder")
_LYCORIS = ("rank_dropout", "module_dropout", "effective_conv2d")
OPTIONS = {
    "lora": ("dropout", "init", "rslora", "dora", "bias"),
    "loha": _LYCORIS,
    "lokr": (*_LYCORIS, "decompose_both", "decompose_factor"),
}


class Adapter(AdapterSettings):
    text_encoder: AdapterSettings | None = Field(
        None, description="train the text encoders too, with an adapter of its own; null: they stay frozen"
    )


class Loss(Section):
    prior_weight: NonNegative = Field(1.0, description="weight of the class images' loss")
    min_snr_gamma: Positive | None = Field(
        None, description="min-SNR-gamma loss weighting, usually 5 (null: off)"
    )
    noise_offset: NonNegative = Field(
        0.0, description="strength of a noise that is constant over each channel"
    )


class Optim(Section):
    lr: Positive = Field(1e-4, description="peak learning rate")
    text_encoder_lr: Positive | None = Field(
        None, description="peak learning rate of the text encoders' adapters (null: lr)"
    )
    lora_plus_ratio: Positive = Field(
        1.0, description="LoRA+: learning rate of the up projections, as a multiple of lr"
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="learning rate after the warm-up; linear and cosine end at 0"
    )
    warmup_steps: Natural = Field(0, description="steps of linear warm-up")
    weight_decay: NonNegative = Field(1e-2, description="AdamW's decoupled weight decay")
    clip: Positive = Field(1.0, description="largest norm of the gradient")


class Train(Section):
    steps: Count = Field(500, description="optimizer steps")
    global_batch: Count = Field(
        4, description="instance images in a step, over all ranks; as many class images ride along"
    )
    micro_batch: Count = Field(
        1, description="instance images in one forward pass of one rank; the rest is accumulated"
    )
    precision: Literal["fp32", "bf16", "fp16", "pure-bf16"] = Field(
        "bf16",
        description="precision of the frozen base and of autocast (`pure-bf16`: without autocast, faster); "
        "adapters stay fp32",
    )
    compile: Annotated[Literal[False, True, "regional"], BeforeValidator(no_number)] = Field(
        False, description="torch.compile the denoiser; `regional`: its repeated blocks only, sooner ready"
    )
    cuda_graph: bool = Field(
        False, description="record the whole step as a CUDA graph: small batches no longer wait for the CPU"
    )
    channels_last: bool = Field(False, description="keep the denoiser's convolutions in NHWC")
    attention: Literal["auto", "cudnn", "flash", "efficient", "math"] = Field(
        "auto", description="attention kernels to prefer on GPUs; `auto` goes by the GPU's generation"
    )
    gradient_checkpointing: Literal["none", "transformer", "blocks"] = Field(
        "none",
        description="activations to compute again in the backward pass, to save memory: none, those of the "
        "denoiser's transformer blocks, or of all its blocks (slower, for less)",
    )
    activation_memory: PositiveShare | None = Field(
        None,
        description="with compile: activations to keep, as a share of what it would keep; the rest is "
        "computed again (null: all)",
    )
    base_linears: Literal["full", "int8", "fp8"] = Field(
        "full",
        description="the denoiser's frozen linear layers: in the base's precision, or in 8 bits, half the "
        "memory; int8 is the more exact",
    )
    checkpoint_every: Count = Field(100, description="steps between checkpoints")
    keep: Count = Field(3, description="checkpoints kept; older ones are removed")
    log_every: Count = Field(10, description="steps between log lines")
    wandb: str | None = Field(None, description="Weights & Biases project to log to (null: off)")

    @model_validator(mode="after")
    def _budget_of_a_compiled_graph(self) -> Train:
        if self.activation_memory and not self.compile:
            raise ValueError(
                f"activation_memory is {self.activation_memory}, which needs compile: true; without it, "
                "use gradient_checkpointing"
            )
        return self

    @model_validator(mode="after")
    def _whole_micro_batches(self) -> Train:
        if self.global_batch % self.micro_batch:
            raise ValueError(
                f"global_batch is {self.global_batch}, which micro_batch {self.micro_batch} "
                "does not divide; use a multiple of it"
            )
        return self


class Faults(Section):
    timeout_s: Positive = Field(
        600.0, description="how long ranks that train wait for one that does not answer, s"
    )
    stop_before_s: NonNegative = Field(
        120.0, description="save and stop this long before the SLURM job's time is over, s"
    )
    nonfinite: Literal["stop", "skip"] = Field(
        "stop",
        description="what to do at a step whose loss or gradient is NaN or infinite: stop, or leave it out",
    )
    skips: Natural = Field(10, description="most steps that `nonfinite: skip` leaves out")
    retries: Natural = Field(4, description="how often reading a shard is tried again, with growing pauses")


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
