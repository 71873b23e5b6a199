"""A base model together with its family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dbtrain.config import Model
from dbtrain.config.adapter import Adapter
from dbtrain.models import quantization
from dbtrain.models.families import registry as families
from dbtrain.models.families.family import Family
from dbtrain.models.pretrained import Pretrained
from dbtrain.runtime import dist
from dbtrain.runtime.errors import ConfigError


@dataclass(frozen=True)
class Base(Pretrained):
    """A Diffusers model folder of a known family."""

    family: Family

    @classmethod
    def of(cls, pretrained: Pretrained, cfg: Model) -> Base:
        """Add the family. Raises ConfigError if no family matches or the components do not fit together."""
        family = families.detect(pretrained, cfg)
        return cls(pretrained.name, pretrained.folder, pretrained.variant, family)

    @classmethod
    def find(cls, cfg: Model) -> Base:
        """The base of a config. Downloads a Hub id first. Call this on every rank.

        Raises ConfigError if the model does not exist.
        """
        pretrained = Pretrained.find(cfg)
        with dist.agreed():
            return cls.of(pretrained, cfg)

    def load(self, component: str, dtype: torch.dtype = torch.float32) -> Any:
        """Like `Pretrained.load`, without the modules of a text encoder that prompts do not pass."""
        loaded = super().load(component, dtype)
        self.drop_unread(component, loaded)
        return loaded

    def denoiser(self, linears: str, dtype: torch.dtype) -> nn.Module:
        """The denoiser's `skeleton`, its linear layers stored as `train.base_linears` says.

        Raises ConfigError if none of them can be stored so.
        """
        module = self.skeleton(self.family.denoiser, dtype)
        if linears != "full":
            quantization.quantize(module, self.storage(self.family.denoiser, linears))
        return module

    def drop_unread(self, component: str, module: nn.Module) -> None:
        """Replace the modules of a text encoder that prompts do not pass, as far as it has them."""
        if component in self.family.text_encoders:
            for name in dict(module.named_modules()).keys() & set(self.family.unread):
                module.set_submodule(name, nn.Identity())

    def check_trains(self, adapter: Adapter, training_adapter: str | None = None) -> None:
        """Raise ConfigError unless an adapter with these settings can be trained on this base.

        `training_adapter`: `model.training_adapter`, with which a distilled base can be trained.
        """
        for key in ("text_encoder", "token"):
            if getattr(adapter, key) and not self.family.adaptable_text:
                raise ConfigError(
                    f"adapter.{key}: the text encoders of {self.family.name} models are too large "
                    "to train along; remove it"
                )
        if (instead := self.family.distilled(self)) and not training_adapter:
            raise ConfigError(
                f"base model {self.name} was distilled to generate images in a few steps, which training "
                f"would undo; train on {instead}, and load the adapter into this one, or set "
                "model.training_adapter"
            )
