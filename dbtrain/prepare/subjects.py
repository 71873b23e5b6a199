"""The subjects of a config, and their classes: whose images the shards have, and in what proportion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from dbtrain.config import Config, Prepare
from dbtrain.config.subjects import Subject
from dbtrain.data import emphasis, photos
from dbtrain.data.sources import Source
from dbtrain.prepare import own_images
from dbtrain.runtime.errors import ConfigError


@dataclass(frozen=True)
class Part:
    """The images of one subject, or of one class."""

    prepare: Prepare  # with its photos and prompts
    weight: float  # how often it is trained on
    words: Subject = field(default_factory=Subject)


def parts(cfg: Config) -> dict[str, list[Part]]:
    """The subjects of a config, and their classes, under the roles of their images.

    Subjects with the same class prompt share its images.
    """
    weights = [one.weight for one in cfg.subjects] or [1.0]
    subjects = [
        Part(one.prepare, weight, one.subject)
        for one, weight in zip(cfg.each_subject(), weights, strict=True)
        if one.prepare
    ]
    classes: dict[str, Part] = {}
    for one in subjects:
        if (prompt := one.prepare.class_prompt) and one.prepare.has_class_images:
            so_far = classes.get(prompt, replace(one, weight=0.0))
            classes[prompt] = replace(so_far, weight=so_far.weight + one.weight)
    return {"instance": subjects, "class": list(classes.values())}


def sources(cfg: Config) -> list[Source]:
    """The sources of photos that are no folders."""
    every = [Source.of(part.prepare.photos) for part in parts(cfg)["instance"]]
    return [source for source in every if source]


def photos_of(cfg: Config) -> list[list[Path]]:
    """The photos of each subject of a config."""
    if cfg.prepare is None:
        raise ConfigError("there is no prepare section; set prepare.photos and prepare.instance_prompt")
    every = parts(cfg)["instance"]
    found = [photos.of_subject(part.prepare) for part in every]
    pairs = zip(every, found, strict=True)
    emphasis.check(
        cfg.prepare, [n for part, paths in pairs for n in photos.named(part.prepare, paths).values()]
    )
    return found


def weights(cfg: Config) -> dict[str, tuple[float, ...]]:
    """How often each of several subjects, and each of their classes, is trained on, by role."""
    found = {role: tuple(part.weight for part in several) for role, several in parts(cfg).items() if several}
    if cfg.loss.prior == "prediction":  # for each subject's photos
        return dict.fromkeys(("instance", "class"), found.get("instance", (1.0,)))
    return found


def check_class_images(cfg: Config) -> None:
    """Raise ConfigError if the user's own class images would be those of several classes."""
    check_classes([part.prepare for part in parts(cfg)["class"]])


def check_classes(settings: Sequence[Prepare]) -> None:
    """The same for classes that may be of several configs, with one folder."""
    prompts = list(dict.fromkeys(f"'{one.class_prompt}'" for one in settings))
    if len(prompts) > 1 and own_images.find_own(settings[0]):
        raise ConfigError(
            f"prepare.class_dir is '{settings[0].class_dir}', whose images would be of "
            f"{' and '.join(prompts)}; use an empty folder, into which class images are generated"
        )
