"""The DreamBooth paper's scores, for any base: is it the very subject, and does the prompt still count?

Ruiz et al. 2022, arXiv:2208.12242, section 4. Pictures of the subject are compared with its photos in
DINO's embedding (DINO) and CLIP's (CLIP-I): mean cosine over all pairs. CLIP-T is the mean cosine of
a picture and its prompt without the unique token: "a dog in the snow" for "a sks dog in the snow", as
published evaluations do it, because CLIP cannot know the token. Prior preservation (PRES) is the
DINO score of pictures of the class: the lower, the less the class became the subject. Diversity is
1 - DINO's cosine between pictures of one prompt; the paper takes LPIPS, which needs one more model, so
that this figure cannot be held against theirs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dbtrain.runtime.errors import ConfigError


@dataclass(frozen=True)
class Scores:
    """Means of cosines; `_base`: the bare base with the same prompts, `_real`: photos among themselves."""

    dino_base: float  # where training starts
    dino: float
    dino_real: float | None  # the ceiling; None of a single photo
    clip_i_base: float
    clip_i: float
    clip_i_real: float | None
    clip_t_base: float
    clip_t: float
    preservation_base: float  # DINO of the class's pictures: the floor
    preservation: float
    diversity_base: float
    diversity: float

    @classmethod
    def load(cls, path: Path) -> Scores:
        """The scores in a `scores.json`. Raises ConfigError if it holds none of these."""
        try:
            return cls.of(json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{path} holds no scores of DINO and CLIP: {error}") from error

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Scores:
        """The scores among other values. Raises ValueError if one is missing, or is no number."""
        found = {field.name: values.get(field.name) for field in fields(cls)}
        optional = {name for name in found if name.endswith("_real")}
        odd = [name for name, value in found.items()
               if not isinstance(value, float) and (value is not None or name not in optional)]  # fmt: skip
        if odd:
            raise ValueError(f"no {', '.join(odd)}")
        return cls(**found)  # type: ignore[arg-type]


# name, what it says: the scores as a table shows them
TABLE = (
    ("dino_base", "DINO, base"),
    ("dino", "DINO, adapter: is it the subject"),
    ("dino_real", "DINO, photos among themselves"),
    ("clip_i_base", "CLIP-I, base"),
    ("clip_i", "CLIP-I, adapter: is it the subject"),
    ("clip_i_real", "CLIP-I, photos among themselves"),
    ("clip_t_base", "CLIP-T, base"),
    ("clip_t", "CLIP-T, adapter: does the prompt count"),
    ("preservation_base", "PRES, base"),
    ("preservation", "PRES, adapter: did the class become it (low is good)"),
    ("diversity_base", "diversity of a prompt, base"),
    ("diversity", "diversity of a prompt, adapter"),
)


def shown(scores: Scores) -> list[tuple[str, str]]:
    """(what it says, value) of every row of the table."""
    values = asdict(scores)
    return [(text, "-" if values[name] is None else f"{values[name]:.3f}") for name, text in TABLE]


def table(scores: Scores, beside: Scores | None = None) -> str:
    """The scores as text, one line each, next to those of another run."""
    return side_by_side(shown(scores), shown(beside) if beside else None)


def side_by_side(rows: Sequence[tuple[str, str]], others: Sequence[tuple[str, str]] | None = None) -> str:
    """Lines of text with a column for this run, and one for another."""
    columns = [dict(rows), *([dict(others)] if others else [])]
    width = max(map(len, columns[0]))
    heads = ["this run", "expected"][: len(columns)]
    lines = [" " * width + "".join(f"{head:>10}" for head in heads)]
    lines += [f"{text:{width}}" + "".join(f"{column[text]:>10}" for column in columns) for text in columns[0]]
    return "\n".join(lines)


def between(some: Tensor, others: Tensor) -> float:
    """Mean cosine over all pairs of unit vectors, one from each of two groups, (n, D) and (m, D)."""
    return (some.double() @ others.double().T).mean().item()


def among(vectors: Tensor) -> float | None:
    """Mean cosine over all pairs of different ones of a group, (n, D); None if there is no pair."""
    count = len(vectors)
    if count < 2:
        return None
    cosines = vectors.double() @ vectors.double().T
    return (cosines[~torch.eye(count, dtype=torch.bool)].mean()).item()


@dataclass(frozen=True)
class Seen:
    """Embeddings of one kind of everything that was drawn, and of the photos."""

    photos: Tensor  # (photos, D)
    subject: Tensor  # (prompts, images, D)
    subject_base: Tensor
    of_class: Tensor  # (class_images, D)
    of_class_base: Tensor


def scored(dino: Seen, clip: Seen, texts: Tensor) -> Scores:
    """The scores of embeddings; `texts` are CLIP's of the prompts, (prompts, D)."""

    def varied(drawn: Tensor) -> float:
        return 1 - sum(among(of_prompt) or 0.0 for of_prompt in drawn) / len(drawn)

    def told(drawn: Tensor) -> float:  # (prompts, images, D)
        return (drawn.double() * texts.double()[:, None]).sum(-1).mean().item()

    return Scores(
        dino_base=between(dino.subject_base.flatten(0, 1), dino.photos),
        dino=between(dino.subject.flatten(0, 1), dino.photos),
        dino_real=among(dino.photos),
        clip_i_base=between(clip.subject_base.flatten(0, 1), clip.photos),
        clip_i=between(clip.subject.flatten(0, 1), clip.photos),
        clip_i_real=among(clip.photos),
        clip_t_base=told(clip.subject_base),
        clip_t=told(clip.subject),
        preservation_base=between(dino.of_class_base, dino.photos),
        preservation=between(dino.of_class, dino.photos),
        diversity_base=varied(dino.subject_base),
        diversity=varied(dino.subject),
    )
