"""What is trained: adapters of each kind."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from dbtrain.config.base import Count, Positive, Section, Share, Targets


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


# Names by preset, as suffixes of a module's name. A name that a component lacks is passed over.
_DENOISER = ("to_q", "to_k", "to_v", "to_out.0")
_CLIP, _T5 = ("q_proj", "k_proj", "v_proj", "out_proj"), ("q", "k", "v", "o")
PRESETS = {
    "denoiser": {
        "attention": (*_DENOISER, "add_k_proj", "add_v_proj"),
        "minimal": ("to_q", "to_v"),
        "all": (*_DENOISER, "proj", "proj_in", "proj_out", "conv", "conv1", "conv2", "conv_shortcut",
                "time_emb_proj", "ff.net.2"),
    },
    "text_encoder": {
        "attention": (*_CLIP, *_T5),
        "minimal": ("q_proj", "v_proj", "q", "v"),
        "all": (*_CLIP, *_T5, "fc1", "fc2", "wi", "wi_0", "wi_1", "wo"),
    },
}  # fmt: skip


def alpha_of(cfg: AdapterSettings) -> Any:
    """The alpha that is meant; 8.0 as 8, as most readers write it."""
    alpha = cfg.alpha or cfg.rank
    return int(alpha) if alpha == int(alpha) else alpha
