"""How it is trained."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from dbtrain.config.base import Count, Natural, NonNegative, Positive, PositiveShare, Section, no_number


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
