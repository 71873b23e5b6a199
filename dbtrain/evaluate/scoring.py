"""Score the validation images of a run while it trains, with the models of `evaluate`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from dbtrain.config import Config, subject_words
from dbtrain.data import photos as images
from dbtrain.evaluate import encoders
from dbtrain.evaluate.choice import CLASSIFIER, DINO_AND_CLIP, HELD_OUT, Rule, uses_classifier
from dbtrain.evaluate.encoders import View
from dbtrain.evaluate.scores import between
from dbtrain.runtime import hashing
from dbtrain.runtime.errors import ConfigError
from dbtrain.runtime.hashing import content_key
from dbtrain.tiny import judge, world

Scores = dict[str, float]


@dataclass(frozen=True)
class Scoring:
    """How validations are scored, and the rule that chooses among them."""

    rule: Rule
    said: str  # what is scored, in words
    prompts: Sequence[int] = ()  # the validation prompts that count, by number; none for held-out losses
    key: str = ""  # a hash of everything that the scores depend on, except the images
    score: Callable[[Sequence[Sequence[Path]]], Scores] = lambda _: {}  # image files, by prompt


def of(cfg: Config, holds_out: bool) -> Scoring:
    """The best scoring that is possible: of images of the subject, or else the held-out loss of its photos.

    `holds_out`: whether there are held-out photos. Downloads nothing. Raises ConfigError if neither is
    possible.
    """
    try:
        return _of_images(cfg)
    except ConfigError as problem:
        (why, *_) = problem.problems
        if holds_out:
            return Scoring(HELD_OUT, f"the loss on held-out photos ({why})")
        raise ConfigError(
            f"train.stop is best, but there is nothing to choose by: {why}; or set prepare.held_out=1, to go "
            "by the loss on a photo that is not trained on"
        ) from None


def _of_images(cfg: Config) -> Scoring:
    """Scoring of the validation images that show the subject, or the mean over several subjects.

    Raises ConfigError if it is not possible.
    """
    parts = [_of_subject(one, cfg.validation.prompts) for one in cfg.each_subject()]
    prompts = sorted({number for part in parts for number in part.prompts})

    def score(paths: Sequence[Sequence[Path]]) -> Scores:
        files = dict(zip(prompts, paths, strict=True))
        found = [part.score([files[number] for number in part.prompts]) for part in parts]
        names = dict.fromkeys(name for each in found for name in each)
        return {name: fmean(each[name] for each in found if name in each) for name in names}

    rule = max((part.rule for part in parts), key=lambda rule: bool(rule.prompt))
    scored = " and ".join(filter(None, (rule.subject, rule.prompt)))
    count = len(prompts) * cfg.validation.images
    said = f"{scored} of {count} validation image{'s' * (count > 1)}"
    return Scoring(rule, said, prompts, content_key([part.key for part in parts]), score)


def _of_subject(cfg: Config, prompts: Sequence[str]) -> Scoring:
    """Scoring of the images that show the subject of `cfg`."""
    about = subject_words.of(cfg.prepare, cfg.subject)
    named = {number: about.put(prompt)[1] for number, prompt in enumerate(prompts) if about.names(prompt)}
    if not named:
        raise ConfigError(f"no prompt of validation.prompts names the subject, with '{about.token}'")
    assert cfg.prepare
    photos = images.there(cfg.prepare, (".txt",))
    if not photos:
        raise ConfigError("prepare.photos: there are no photos of the subject here")
    make = _by_classifier if uses_classifier(cfg) else _by_dino_and_clip
    scoring = make(cfg, photos, list(named.values()))
    content = [scoring.key, [hashing.sha256_of(path) for path in photos], sorted(named.items())]
    return replace(scoring, prompts=list(named), key=content_key(content))


def _by_classifier(cfg: Config, photos: Sequence[Path], prompts: Sequence[str]) -> Scoring:
    """By the embedded base's classifier; its `place` is the share of images where their prompt says."""
    words = world.PLACE_WORDS
    places = [next((place for place in words if words[place] in prompt), "") for prompt in prompts]
    placed = cfg.validation.images * sum(map(bool, places))

    def score(paths: Sequence[Sequence[Path]]) -> Scores:
        by = judge.Judge.load()
        pictures = [[images.load(path) for path in each] for each in paths]
        every = [picture for each in pictures for picture in each]
        found = {"likeness": by.likeness(every, [images.load(path) for path in photos]).mean().item()}
        if placed:
            right = [by.read(each).places.count(place) for each, place in zip(pictures, places, strict=True)]
            found["place"] = sum(right) / placed
        return found

    rule = CLASSIFIER.over(placed) if placed else Rule(CLASSIFIER.subject)
    return Scoring(rule, "", key=hashing.cached_sha256_of(judge.WEIGHTS), score=score)


def _by_dino_and_clip(cfg: Config, photos: Sequence[Path], prompts: Sequence[str]) -> Scoring:
    """By DINO and CLIP, which are on this process's device only while they score."""
    dino, clip = encoders.of(cfg.evaluation, download=False)
    size = cfg.evaluation.batch
    known: dict[str, Tensor] = {}  # what does not change during a run

    def embed(paths: Sequence[Path], view: View, network: Callable[[Tensor], Tensor]) -> Tensor:
        batches = [paths[k : k + size] for k in range(0, len(paths), size)]
        return torch.cat([encoders.embed(batch, images.load, view, network) for batch in batches])

    def score(paths: Sequence[Sequence[Path]]) -> Scores:
        see, (look, read) = encoders.dino_images(dino), encoders.clip_images_and_texts(clip)
        if not known:
            known["dino"], known["clip"] = embed(photos, dino.view, see), embed(photos, clip.view, look)
            known["texts"] = torch.no_grad()(read)(prompts).cpu().double()
        files = [path for each in paths for path in each]
        by_dino, by_clip = embed(files, dino.view, see), embed(files, clip.view, look)
        told = known["texts"].repeat_interleave(cfg.validation.images, 0)
        return {
            "dino": between(by_dino, known["dino"]), "clip_i": between(by_clip, known["clip"]),
            "clip_t": (by_clip.double() * told).sum(-1).mean().item(),
        }  # fmt: skip

    return Scoring(DINO_AND_CLIP, "", key=content_key([dino.key(), clip.key()]), score=score)
