"""Prompts about a subject, and how they are sampled."""

from __future__ import annotations

from dbtrain.config import Config, Evaluation
from dbtrain.config.subject_words import SubjectWords

# Settings that suit subjects of any kind; `{}` is the subject.
CONTEXTS = (
    "a {} in the snow",
    "a {} on a sandy shore",
    "a {} on a kitchen table",
    "a {} between the shelves of a library",
    "a {} in front of a waterfall",
    "a {} on the back seat of a car",
    "a {} at night under street lamps",
    "a {} in a field of lavender",
    "a {} beside a swimming pool",
    "an oil painting of a {}",
)


def prompts(subject: SubjectWords, evaluation: Evaluation) -> list[tuple[str, str]]:
    """(prompt to generate, the same without the token) for every prompt of the evaluation."""
    return [subject.put(prompt) for prompt in evaluation.prompts or CONTEXTS]


def sampling(cfg: Config, images: int, seed: int) -> Config:
    """The config, with `images` samples per prompt from `seed` on."""
    return cfg.model_copy(update={"sample": cfg.sample.model_copy(update={"images": images, "seed": seed})})
