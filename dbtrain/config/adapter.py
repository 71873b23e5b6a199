"""The adapter: its kind, size and target modules."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from dbtrain.config.base import Patterns, Positive, Rank, Section, Share, Targets, Text


class AdapterSettings(Section):
    """An adapter on the denoiser or on the text encoders. Each kind supports some of the options."""

    kind: Literal["lora", "loha", "lokr"] = Field("lora", description="adapter type")
    rank: Rank = Field(16, description="rank of the weight update")
    alpha: Positive | None = Field(
        None,
        description="the weight update is scaled by alpha / rank (null: alpha = rank, of each layer)",
    )
    targets: Targets = Field(
        "attention",
        description="modules to adapt: a preset (`attention`, `minimal`, `all`, or `diffusers` for what its "
        "scripts adapt), a list of module names, or a regular expression that matches full module names",
    )
    ranks: Patterns[Rank] = Field(
        {},
        description="ranks of some of the modules, e.g. `{mid_block.*: 32, to_v: 8}`: a name as in a list of "
        "`targets`, or a regular expression that matches full module names; the first that fits counts",
    )
    dropout: Share = Field(0.0, description="LoRA: dropout probability on the adapter's input")
    init: Literal["gaussian", "kaiming", "orthogonal"] = Field(
        "gaussian", description="LoRA: initialization of the down projection"
    )
    rslora: bool = Field(False, description="LoRA: scale by alpha / sqrt(rank) instead (rsLoRA)")
    dora: bool = Field(False, description="LoRA: also train the magnitudes of the weights (DoRA)")
    bias: Literal["none", "all", "lora_only"] = Field(
        "none", description="LoRA: biases of the base model to train too; only the `peft` format stores them"
    )
    rank_dropout: Share = Field(0.0, description="LoHa, LoKr: probability of dropping a row of the update")
    module_dropout: Share = Field(
        0.0, description="LoHa, LoKr: probability of dropping a layer's whole update"
    )
    effective_conv2d: bool = Field(False, description="LoHa, LoKr: CP decomposition for convolutions")
    decompose_both: bool = Field(False, description="LoKr: also decompose the left factor")
    decompose_factor: int = Field(
        -1, description="LoKr: size of the left factor (-1: close to the square root)"
    )

    @model_validator(mode="after")
    def _options_of_the_kind(self) -> AdapterSettings:
        strange = [
            name
            for name, field in AdapterSettings.model_fields.items()
            if name not in (*COMMON_OPTIONS, *OPTIONS[self.kind]) and getattr(self, name) != field.default
        ]
        if strange:
            raise ValueError(
                f"{', '.join(strange)}: not available for kind '{self.kind}'; "
                f"its options are {', '.join(OPTIONS[self.kind])}"
            )
        if not self.targets:
            raise ValueError("targets is empty; use 'attention'")
        return self


COMMON_OPTIONS = ("kind", "rank", "ranks", "alpha", "targets", "text_encoder", "token")
_LYCORIS = ("rank_dropout", "module_dropout", "effective_conv2d")
OPTIONS = {
    "lora": ("dropout", "init", "rslora", "dora", "bias"),
    "loha": _LYCORIS,
    "lokr": (*_LYCORIS, "decompose_both", "decompose_factor"),
}


class Token(Section):
    """Learned embeddings for the word of the subject, in place of those that the text encoders have."""

    init: Text | None = Field(
        None, description="words whose embeddings they start from (null: those of `subject.token` itself)"
    )
    vectors: int = Field(1, ge=1, le=32, description="how many embeddings stand for the word")


class Adapter(AdapterSettings):
    start: Text | None = Field(
        None,
        description="adapter to go on training, of any format that is read: a file, PEFT's folder, or a run "
        "folder; its layers must be those of this adapter, its rank and alpha need not",
    )
    text_encoder: AdapterSettings | None = Field(
        None,
        description="adapter for the text encoders (of FLUX.1 and SD 3: the CLIPs); null: they stay frozen",
    )
    token: Token | None = Field(
        None,
        description="`{}`: also learn what the word `subject.token` means to the text encoders (of FLUX.1 "
        "and SD 3: to the CLIPs); null: it keeps its meaning",
    )

    @property
    def every(self) -> list[AdapterSettings]:
        """The settings of the denoiser's adapter, and of the text encoders' if there is one."""
        return [self, self.text_encoder] if self.text_encoder else [self]

    @property
    def drops(self) -> bool:
        """Whether any adapter uses dropout."""
        return any(one.dropout or one.rank_dropout or one.module_dropout for one in self.every)


# Module names of each preset, as suffixes. Names that a component does not have are ignored. Families with
# other denoisers than UNets have their own.
_DENOISER = ("to_q", "to_k", "to_v", "to_out.0")
_CLIP, _T5 = ("q_proj", "k_proj", "v_proj", "out_proj"), ("q", "k", "v", "o")
PRESETS = {
    "denoiser": {
        "attention": (*_DENOISER, "add_k_proj", "add_v_proj"),
        "diffusers": (*_DENOISER, "add_k_proj", "add_v_proj"),
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
    """The effective alpha; an int where it is whole, as other programs write it."""
    alpha = cfg.alpha or cfg.rank
    return int(alpha) if alpha == int(alpha) else alpha
