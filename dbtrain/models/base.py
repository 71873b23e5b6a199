"""A base model together with its family: what everything that loads, encodes or generates is given."""

from __future__ import annotations

from dataclasses import dataclass

from dbtrain.config import Model
from dbtrain.models.families import registry as families
from dbtrain.models.families.family import Family
from dbtrain.models.pretrained import Pretrained
from dbtrain.runtime import dist


@dataclass(frozen=True)
class Base(Pretrained):
    """A Diffusers model folder of a known family."""

    family: Family

    @classmethod
    def of(cls, pretrained: Pretrained, cfg: Model) -> Base:
        """The folder with its family. Raises ConfigError if no family fits, or its parts do not."""
        family = families.detect(pretrained, cfg)
        return cls(pretrained.name, pretrained.folder, pretrained.variant, family)

    @classmethod
    def find(cls, cfg: Model) -> Base:
        """The base of a config, downloaded first if it is a Hub id; on every rank.

        Raises ConfigError if there is no such model.
        """
        pretrained = Pretrained.find(cfg)
        with dist.agreed():
            return cls.of(pretrained, cfg)
