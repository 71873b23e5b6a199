"""The DreamBooth paper's scores for any base: subject fidelity, prompt fidelity, prior preservation.

Ruiz et al. 2022, arXiv:2208.12242, section 4. DINO and CLIP-I compare images of the subject with its photos:
the mean cosine over all pairs, in DINO's or CLIP's embedding. CLIP-T is the mean cosine of an image and its
prompt without the rare token, "a dog in the snow" for "a sks dog in the snow", as in published evaluations,
because CLIP does not know the token. Prior preservation (PRES) is the DINO score of images of the class: the
lower, the less the class became the subject. Diversity is 1 - DINO's cosine between images of one prompt.
The paper uses LPIPS for it, which needs another model, so its figures are not comparable.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dbtrain.runtime import files
from dbtrain.runtime.errors import ConfigError


@dataclass(frozen=True)
class Scores:
    """Mean cosines. `_base`: the base model with the same prompts; `_real`: the photos among themselves."""

    dino_base: float  # the start of training
    dino: float
    dino_real: float | None  # the ceiling; None if there is only one photo
    clip_i_base: float
    clip_i: float
    clip_i_real: float | None
    clip_t_base: float
    clip_t: float
    preservation_base: float  # the floor
    preservation: float
    diversity_base: float
    diversity: float

    @classmethod
    def load(cls, path: Path) -> Scores:
        """The scores in a `scores.json`. Raises ConfigError if it has others, or cannot be read."""
        values = files.read_json(path)
        try:
            return cls.of(values)
        except ValueError as error:
            raise ConfigError(f"{path} has no scores of DINO and CLIP: {error}") from error

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Scores:
        """The scores among other values. Raises ValueError if one is missing or not a number."""
        found = {field.name: values.get(field.name) for field in fields(cls)}
        optional = {name for name in found if name.endswith("_real")}
        missing = [name for name, value in found.items()
                   if not isinstance(value, float) and not (value is None and name in optional)]  # fmt: skip
        if missing:
            raise ValueError(f"no {', '.join(missing)}")
        return cls(**found)  # type: ignore[arg-type]


# (name, label) of each row of the table
TABLE = (
    ("dino_base", "DINO, base"),
    ("dino", "DINO, adapter: subject fidelity"),
    ("dino_real", "DINO, photos among themselves"),
    ("clip_i_base", "CLIP-I, base"),
    ("clip_i", "CLIP-I, adapter: subject fidelity"),
    ("clip_i_real", "CLIP-I, photos among themselves"),
    ("clip_t_base", "CLIP-T, base"),
    ("clip_t", "CLIP-T, adapter: prompt fidelity"),
    ("preservation_base", "PRES, base"),
    ("preservation", "PRES, adapter: class turned into subject (low is good)"),
    ("diversity_base", "diversity per prompt, base"),
    ("diversity", "diversity per prompt, adapter"),
)


def shown(scores: Scores) -> list[tuple[str, str]]:
    """(label, value) of each row of the table."""
    values = asdict(scores)
    return [(text, "-" if values[name] is None else f"{values[name]:.3f}") for name, text in TABLE]


def table(rows: Sequence[tuple[str, str]], others: Sequence[tuple[str, str]] | None = None) -> str:
    """(label, value) rows as text, with a column for this run and one for another."""
    columns = [dict(rows), *([dict(others)] if others else [])]
    width = max(map(len, columns[0]))
    heads = ["this run", "expected"][: len(columns)]
    lines = [" " * width + "".join(f"{head:>10}" for head in heads)]
    lines += [f"{text:{width}}" + "".join(f"{column[text]:>10}" for column in columns) for text in columns[0]]
    return "\n".join(lines)


def between(some: Tensor, others: Tensor) -> float:
    """Mean cosine over all pairs of unit vectors from two groups, (n, D) and (m, D)."""
    return (some.double() @ others.double().T).mean().item()


def among(vectors: Tensor) -> float | None:
    """Mean cosine over all pairs of different unit vectors of a group, (n, D); None if there is no pair."""
    count = len(vectors)
    if count < 2:
        return None
    cosines = vectors.double() @ vectors.double().T
    return cosines[~torch.eye(count, dtype=torch.bool)].mean().item()


def frechet(some: Tensor, others: Tensor) -> float:
    """Fréchet distance of the normal distributions of two groups of features, (n, D) and (m, D), at least 0.

    It is biased by the number of images: compare only distances of groups of the same sizes. The trace of
    the root of the covariances' product is the nuclear norm of the groups' cross product, so that there may
    be fewer images than features. Heusel et al. 2017, arXiv:1706.08500.
    """
    means = [group.double().mean(0) for group in (some, others)]
    one, two = (
        (group.double() - mean) / (len(group) - 1) ** 0.5
        for group, mean in zip((some, others), means, strict=True)
    )
    spread = one.square().sum() + two.square().sum() - 2 * torch.linalg.svdvals(one @ two.T).sum()
    return ((means[0] - means[1]).square().sum() + spread).clamp(min=0).item()


@dataclass(frozen=True)
class Seen:
    """One encoder's embeddings of the photos and of all generated images."""

    photos: Tensor  # (photos, D)
    subject: Tensor  # (prompts, images, D)
    subject_base: Tensor
    of_class: Tensor  # (class_images, D)
    of_class_base: Tensor


def scored(dino: Seen, clip: Seen, texts: Tensor) -> Scores:
    """The scores from the embeddings. `texts`: CLIP's embeddings of the prompts, (prompts, D)."""

    def diversity(images: Tensor) -> float:  # (prompts, images, D)
        return 1 - sum(among(of_prompt) or 0.0 for of_prompt in images) / len(images)

    def prompt_fidelity(images: Tensor) -> float:  # (prompts, images, D)
        return (images.double() * texts.double()[:, None]).sum(-1).mean().item()

    return Scores(
        dino_base=between(dino.subject_base.flatten(0, 1), dino.photos),
        dino=between(dino.subject.flatten(0, 1), dino.photos),
        dino_real=among(dino.photos),
        clip_i_base=between(clip.subject_base.flatten(0, 1), clip.photos),
        clip_i=between(clip.subject.flatten(0, 1), clip.photos),
        clip_i_real=among(clip.photos),
        clip_t_base=prompt_fidelity(clip.subject_base),
        clip_t=prompt_fidelity(clip.subject),
        preservation_base=between(dino.of_class_base, dino.photos),
        preservation=between(dino.of_class, dino.photos),
        diversity_base=diversity(dino.subject_base),
        diversity=diversity(dino.subject),
    )
