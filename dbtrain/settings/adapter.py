"""What is trained: adapters of each kind."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from dbtrain.section import Count, Positive, Section, Share, Targets


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
