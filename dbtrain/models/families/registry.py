"""Model families by name. A new family is one file and one line here."""

from dbtrain.config import Model
from dbtrain.models.families import deepfloyd, sd, sdxl
from dbtrain.models.families.family import Family
from dbtrain.models.pretrained import Pretrained
from dbtrain.runtime.errors import ConfigError

FAMILIES = {family.name: family for family in (sd.FAMILY, sdxl.FAMILY, deepfloyd.STAGE_1, deepfloyd.STAGE_2)}


def get(name: str) -> Family:
    """The family called `name`. Raises ConfigError if there is none."""
    if name not in FAMILIES:
        raise ConfigError(f"model.family is '{name}'; choose from auto, {', '.join(FAMILIES)}")
    return FAMILIES[name]


def detect(base: Pretrained, cfg: Model) -> Family:
    """The family of a base model, by the pipeline class that its model_index.json names.

    Raises ConfigError if there is none, or if the base's components do not fit together.
    """
    pipeline = base.index.get("_class_name")
    fitting = [family for family in FAMILIES.values() if family.pipeline == pipeline]
    if cfg.family != "auto":
        if fitting and fitting != [get(cfg.family)]:
            raise ConfigError(
                f"model.family is '{cfg.family}', but base model {base.name} is a {pipeline}, of the family "
                f"'{fitting[0].name}'; use auto"
            )
        fitting = [get(cfg.family)]
    if not fitting:
        known = ", ".join(family.pipeline for family in FAMILIES.values())
        raise ConfigError(f"base model {base.name} is a {pipeline}; dbtrain trains {known}")
    for part in fitting[0].parts:
        base.config(part)  # names a component that is missing
    fitting[0].check(base)
    return fitting[0]
