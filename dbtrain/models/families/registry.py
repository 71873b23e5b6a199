"""Model families by name. A new family is one file and one line here."""

from dbtrain.config import Model
from dbtrain.models import locate, safety
from dbtrain.models.families import (
    chroma,
    deepfloyd,
    flux1,
    flux2,
    krea2,
    qwen_image,
    sd,
    sd3,
    sdxl,
    z_image,
)
from dbtrain.models.families.family import Family
from dbtrain.models.pretrained import Pretrained
from dbtrain.runtime.errors import ConfigError

FAMILIES = {
    family.name: family
    for family in (
        sd.FAMILY,
        sdxl.FAMILY,
        deepfloyd.STAGE_1,
        deepfloyd.STAGE_2,
        flux2.KLEIN,
        flux2.DEV,
        qwen_image.FAMILY,
        z_image.FAMILY,
        flux1.FAMILY,
        sd3.FAMILY,
        chroma.FAMILY,
        krea2.FAMILY,
    )
}

for _family in FAMILIES.values():
    safety.allow(_family.allowed)
    locate.allow(_family.pipeline, _family.single_file, _family.denoiser)


def get(name: str) -> Family:
    """The family called `name`. Raises ConfigError if it does not exist."""
    if name not in FAMILIES:
        raise ConfigError(f"model.family is '{name}'; choose from auto, {', '.join(FAMILIES)}")
    return FAMILIES[name]


def detect(base: Pretrained, cfg: Model) -> Family:
    """The family of a base model, by the pipeline class in its model_index.json.

    Raises ConfigError if it matches no family, or if the base's components do not fit together.
    """
    pipeline = base.index.get("_class_name")
    found = next((family for family in FAMILIES.values() if family.pipeline == pipeline), None)
    family = found if cfg.family == "auto" else get(cfg.family)
    if family is None:
        known = ", ".join(family.pipeline for family in FAMILIES.values())
        raise ConfigError(f"base model {base.name} is a {pipeline}; dbtrain trains {known}")
    if found and found is not family:
        raise ConfigError(
            f"model.family is '{cfg.family}', but base model {base.name} is a {pipeline}, of the family "
            f"'{found.name}'; use auto"
        )
    family = family.fitted(family, base)
    for part in family.parts:
        base.check(part, family.allowed[part])
    for part in ("scheduler", *([family.noising] if family.noising else [])):
        family.objective.check({"_class_name": base.index[part][1]} | base.config(part))
    family.check(base)
    return family
