"""Model families by name. A new family is one file and one line here."""

from dbtrain.config import Model
from dbtrain.errors import ConfigError
from dbtrain.families import sd
from dbtrain.families.base import Family
from dbtrain.pretrained import Pretrained

FAMILIES = {family.name: family for family in (sd.FAMILY,)}


def get(name: str) -> Family:
    """The family called `name`. Raises ConfigError if there is none."""
    if name not in FAMILIES:
        raise ConfigError(f"model.family is '{name}'; choose from auto, {', '.join(FAMILIES)}")
    return FAMILIES[name]


def detect(base: Pretrained, cfg: Model) -> Family:
    """The family of a base model, by the pipeline class that its model_index.json names."""
    if cfg.family != "auto":
        return get(cfg.family)
    pipeline = base.index.get("_class_name")
    for family in FAMILIES.values():
        if family.pipeline == pipeline:
            return family
    known = ", ".join(family.pipeline for family in FAMILIES.values())
    raise ConfigError(f"base model {base.name} is a {pipeline}; dbtrain trains {known}")
