"""Training: loss, optimizer, loop, faults."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from dbtrain.config.base import (
    Count,
    Natural,
    NonNegative,
    Patterns,
    Positive,
    PositiveShare,
    Section,
    no_number,
)


class Timesteps(Section):
    """The distribution of the noise levels that images are trained at."""

    distribution: Literal["auto", "uniform", "logit_normal", "mode"] = Field(
        "auto",
        description="distribution of the noise level; `auto`: logit_normal for flow matching, uniform for "
        "the rest",
    )
    mean: float = Field(
        0.0, description="logit_normal: mean of the logit; above 0 trains more on noisy images"
    )
    std: Positive = Field(1.0, description="logit_normal: standard deviation of the logit")
    mode_scale: float = Field(
        1.29, ge=-1, le=1.75, description="mode: how far the noise levels crowd in the middle (0: uniform)"
    )
    shift: Positive | None = Field(
        None,
        description="flow matching: shift of the noise levels towards noise, sigma -> s sigma / (1 + (s - 1) "
        "sigma) (null: the base's own, for this resolution; 1: none)",
    )
    low: float = Field(
        0.0, ge=0, lt=1, description="lowest noise level to train at, as a fraction of the timesteps"
    )
    high: float = Field(
        1.0, gt=0, le=1, description="highest noise level; 0.5 leaves out the noisier half of the timesteps"
    )

    @model_validator(mode="after")
    def _some_levels(self) -> Timesteps:
        if self.low >= self.high:
            raise ValueError(f"low is {self.low} and high is {self.high}; use a low that is less than high")
        return self

    @model_validator(mode="after")
    def _of_the_distribution(self) -> Timesteps:
        normal = ("auto", "logit_normal")
        for name, kinds in (("mean", normal), ("std", normal), ("mode_scale", ("mode",))):
            value = getattr(self, name)
            if self.distribution not in kinds and value != type(self).model_fields[name].default:
                raise ValueError(
                    f"{name} is {value:g}, which distribution {self.distribution} does not have; set "
                    f"distribution to {kinds[-1]}, or remove {name}"
                )
        return self


class Mask(Section):
    """How masked photos are trained on. Class images have no mask."""

    weight: Positive = Field(1.0, description="weight of the loss of photos with a mask")
    background: Annotated[float, Field(ge=0, le=1)] = Field(
        0.1,
        description="weight of what is outside the mask, relative to the subject; the loss is a weighted "
        "mean, so that a small subject does not learn more slowly",
    )


class Loss(Section):
    prior: Literal["images", "prediction", "distillation", "none"] = Field(
        "images",
        description="what preserves the class: `images` of it; the base's own `prediction` for the photos "
        "with `prepare.class_prompt`, which needs no class images; or `distillation`, its prediction for the "
        "class images",
    )
    prior_weight: NonNegative = Field(1.0, description="weight of the loss that preserves the class")
    min_snr_gamma: Positive | None = Field(
        None, description="min-SNR-gamma loss weighting, usually 5 (null: off)"
    )
    huber: PositiveShare | None = Field(
        None,
        description="pseudo-Huber loss, with this threshold at pure noise (usually 0.1) that rises to 1 "
        "without noise; protects against outliers in the photos (null: squared error)",
    )
    noise_offset: NonNegative = Field(
        0.0,
        description="strength of an extra noise that is constant over each channel; not for flow matching",
    )
    timesteps: Timesteps = Field(default=Timesteps(), description="which noise levels images are trained at")
    weighting: Literal["none", "sigma_sqrt", "cosmap"] = Field(
        "none", description="flow matching: loss weight by noise level, as in Diffusers' scripts"
    )

    mask: Mask = Field(default=Mask(), description="where photos have masks (`prepare.mask`)")

    @property
    def asks_the_base(self) -> bool:
        """Whether what the base predicts for a class row is its target."""
        return self.prior in ("prediction", "distillation")

    def role_weights(self, class_images: bool, masked: bool = False) -> dict[str, float]:
        """The roles to train on, and the weight of each role's mean loss.

        `class_images`: whether there are any. Those of weight 0 are not loaded at all. `masked`: whether the
        photos have masks.
        """
        there = {"prediction": True, "none": False}.get(self.prior, class_images)
        return {"instance": self.mask.weight if masked else 1.0} | (
            {"class": self.prior_weight} if there and self.prior_weight else {}
        )


LEAST_FACTOR = 0.01  # of the rate that an optimizer finds; what is below is a rate meant for another


class Optim(Section):
    name: Literal["adamw", "prodigy"] = Field(
        "adamw", description="optimizer; `prodigy` finds the learning rate, so that none has to be chosen"
    )
    lr: Positive = Field(
        1e-4, description="peak learning rate; for `prodigy` a factor of the rate that it finds, by default 1"
    )
    text_encoder_lr: Positive | None = Field(
        None, description="peak learning rate of the text encoder adapters (null: `optim.lr`)"
    )
    token_lr: Positive = Field(
        1e-3,
        description="`adapter.token`: peak learning rate of the embeddings, as unit vectors: their length "
        "stays; for `prodigy` a factor, by default 1",
    )
    lora_plus_ratio: Positive = Field(
        1.0, description="LoRA+: learning rate of the up projections as a multiple of `optim.lr`"
    )
    lrs: Patterns[Positive] = Field(
        {},
        description="factors of the learning rate of some modules, e.g. `{up_blocks.*: 0.5}`, named as in "
        "`adapter.ranks`; the component may come first: `{text_encoder_2.*: 0.1}`",
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant",
        description="learning rate after warm-up; `linear` and `cosine` decay to 0 at `train.steps`",
    )
    warmup_steps: Natural = Field(0, description="steps of linear learning rate warm-up")
    weight_decay: NonNegative = Field(1e-2, description="decoupled weight decay")
    clip: Positive = Field(1.0, description="gradient norm above which gradients are clipped")

    @model_validator(mode="before")
    @classmethod
    def _factor_of_a_found_rate(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("name") == "prodigy":
            return {"lr": 1.0, "token_lr": 1.0} | values
        return values

    @model_validator(mode="after")
    def _no_rate_for_prodigy(self) -> Optim:
        values = {name: getattr(self, name) for name in ("lr", "text_encoder_lr", "token_lr")}
        small = [name for name, value in values.items() if value and value < LEAST_FACTOR]
        if self.name == "prodigy" and small:
            raise ValueError(
                f"{' and '.join(f'{name} is {values[name]:g}' for name in small)}, but for prodigy that is a "
                f"factor of the rate that it finds; set {' '.join(f'optim.{name}=1' for name in small)}"
            )
        return self


class Train(Section):
    steps: Count = Field(500, description="optimizer steps")
    global_batch: Count = Field(
        4, description="instance images per step over all ranks; as many class images are added"
    )
    micro_batch: Count = Field(
        1, description="instance images per forward pass of one rank; gradients are accumulated over the rest"
    )
    precision: Literal["fp32", "bf16", "fp16", "pure-bf16"] = Field(
        "bf16",
        description="precision of the frozen base model and of autocast (`pure-bf16`: no autocast, faster); "
        "adapter weights stay fp32",
    )
    compile: Annotated[Literal[False, True, "regional"], BeforeValidator(no_number)] = Field(
        False,
        description="torch.compile the denoiser; `regional`: only its repeated blocks, which compiles faster",
    )
    cuda_graph: bool = Field(
        False, description="replay the whole step as a CUDA graph, which removes launch overhead"
    )
    channels_last: bool = Field(False, description="run the denoiser's convolutions in NHWC")
    attention: Literal["auto", "cudnn", "flash", "efficient", "math"] = Field(
        "auto", description="attention kernel on GPUs; `auto` chooses by GPU generation"
    )
    gradient_checkpointing: Literal["none", "transformer", "blocks"] = Field(
        "none",
        description="parts of the denoiser whose activations are recomputed in the backward pass, which "
        "saves memory but is slower: its transformer blocks, or all its blocks",
    )
    activation_memory: PositiveShare | None = Field(
        None,
        description="with `compile`: fraction of the activations to keep; the rest is recomputed (null: all)",
    )
    base_linears: Literal["full", "int8", "fp8", "nf4", "int8-dynamic"] = Field(
        "full",
        description="storage of the denoiser's frozen linear layers: `full` precision, 8 bits (`int8` is "
        "more accurate than `fp8`), or 4 (`nf4`); `int8-dynamic` is `int8` that also rounds activations and "
        "gradients to 8 bits, to multiply faster",
    )
    swap_blocks: Natural | Literal["auto"] = Field(
        0,
        description="blocks of the denoiser whose frozen weights stay in RAM and are copied to the GPU when "
        "they are needed: 3 or more, as two are on the GPU at any time; `auto`: as many as it takes to fit "
        "(0: none); changes no result",
    )
    shard: Literal["none", "node", "all"] = Field(
        "none",
        description="GPUs that hold the denoiser's frozen weights together, a part each: `all`, those of a "
        "`node`, or `none`: each holds them whole, which is faster if they fit; changes no result",
    )
    ema: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None,
        description="decay of a moving average of the adapter's weights, e.g. 0.99, which checkpoints keep "
        "and `export.ema` exports (null: none)",
    )
    stop: Literal["steps", "best"] = Field(
        "steps",
        description="when to stop: after `steps`; or, for `best`, when no validation has been better for "
        "`patience` of them, at `steps` at the latest. The best checkpoint is kept and exported",
    )
    patience: Count = Field(3, description="with `stop: best`: validations without improvement to wait for")
    checkpoint_every: Count = Field(100, description="steps between checkpoints")
    keep: Count = Field(3, description="number of checkpoints to keep; older ones are deleted")
    log_every: Count = Field(10, description="steps between log lines")
    wandb: str | None = Field(None, description="Weights & Biases project (null: off)")

    @model_validator(mode="after")
    def _budget_of_a_compiled_graph(self) -> Train:
        if self.activation_memory and not self.compile:
            raise ValueError(
                f"activation_memory is {self.activation_memory}, but compile is false; set compile to true, "
                "or use gradient_checkpointing instead"
            )
        return self

    @model_validator(mode="after")
    def _weights_that_are_elsewhere(self) -> Train:
        if self.swap_blocks in (1, 2):
            raise ValueError(
                f"swap_blocks is {self.swap_blocks}, but two blocks are on the device at any time; use 3 or "
                "more, or 0"
            )
        # Hooks around each block fetch its weights: they would break up a compiled graph of all blocks, and
        # allocate as no CUDA graph can replay. FSDP cannot view weights in NHWC as rows, and block swap
        # copies whole weights.
        common: dict[str, tuple[object, ...]] = {"compile": (False, "regional"), "cuda_graph": (False,)}
        for setting, off, fitting in (
            ("shard", "none", common | {"channels_last": (False,)}),
            ("swap_blocks", 0,
             {"gradient_checkpointing": ("transformer", "blocks"), **common, "shard": ("none",)}),
        ):  # fmt: skip
            if (used := getattr(self, setting)) == off:
                continue
            for name, allowed in fitting.items():
                if (value := getattr(self, name)) not in allowed:
                    raise ValueError(
                        f"{setting} is {used}, but {name} is {str(value).lower()}; set {name} to "
                        f"{str(allowed[-1]).lower()}, or {setting} to {off}"
                    )
        return self

    @model_validator(mode="after")
    def _whole_micro_batches(self) -> Train:
        if self.global_batch % self.micro_batch:
            raise ValueError(
                f"global_batch is {self.global_batch}, which is not divisible by micro_batch "
                f"({self.micro_batch}); use a multiple of it"
            )
        return self


class Faults(Section):
    timeout_s: Positive = Field(
        600.0, le=10**7, description="how long to wait for a rank that does not respond, s"
    )
    stop_before_s: NonNegative = Field(
        120.0, le=10**7, description="how long before the end of the SLURM time limit to save and stop, s"
    )
    nonfinite: Literal["stop", "skip"] = Field(
        "stop",
        description="when the loss or gradient is NaN or infinite: stop the run, or skip the step",
    )
    skips: Natural = Field(
        10, description="with `nonfinite: skip`: steps that may be skipped before the run stops"
    )
    retries: Natural = Field(4, description="retries for reading a shard, with growing pauses")
