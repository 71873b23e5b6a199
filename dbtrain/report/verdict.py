"""What the scores of a run say in words: does it look like the subject, follow prompts, keep the class?"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from dbtrain.report.run import Run
from dbtrain.runtime.run_folder import RunFolder

Scores = Mapping[str, float]
GOOD, FAIR, POOR = "good", "fair", "poor"


@dataclass(frozen=True)
class Measure:
    """One question, and how its answers read.

    `good`, `fair`: the least shares for these levels. `says` completes "It ..." for good, fair and poor.
    `cures`: what to try if the answer is not good.
    """

    question: str
    good: float
    fair: float
    says: tuple[str, str, str]
    cure: str


LIKENESS = Measure(
    "Looks like the subject", 0.6, 0.35,
    ("has learned the subject", "has partly learned the subject", "has hardly learned the subject"),
    "For more likeness: more steps (train.steps), adapter.targets=all, or photos that differ less.",
)  # fmt: skip
PROMPT = Measure(
    "Follows the prompt", 0.85, 0.6,
    ("follows prompts", "follows most prompts", "ignores many prompts"),
    "For prompts that are followed: an earlier checkpoint, a lower strength, or more varied photos.",
)  # fmt: skip
CLASS = Measure(
    "Keeps the class", 0.9, 0.7,
    ("keeps the class", "has begun to change the class", "has turned much of the class into the subject"),
    "To keep the class: prior preservation (loss.prior), a higher loss.prior_weight, fewer steps.",
)  # fmt: skip
QUALITY = Measure(
    "Keeps the class's quality", 0.67, 0.5,
    ("leaves its images as good as they were", "has changed how its images look",
     "has spoiled its images"),
    "For better images of the class: class images at prepare.sampling.guidance=1, a lower optim.lr, fewer "
    "steps.",
)  # fmt: skip


@dataclass(frozen=True)
class Rating:
    """The answer to a measure's question: a share from 0 to 1, and what it is a share of."""

    measure: Measure
    share: float
    meaning: str

    @property
    def level(self) -> str:
        return GOOD if self.share >= self.measure.good else FAIR if self.share >= self.measure.fair else POOR

    @property
    def percent(self) -> str:
        return f"{100 * self.share:.0f}%"

    @property
    def said(self) -> str:
        return self.measure.says[(GOOD, FAIR, POOR).index(self.level)]


@dataclass(frozen=True)
class Verdict:
    """A sentence, the ratings behind it, what to try, and the command that is due, if any."""

    sentence: str
    ratings: list[Rating]
    cures: list[str]
    command: str = ""


def _between(value: float, low: float, high: float) -> float:
    """How far `value` is on the way from `low` to `high`, from 0 to 1; 1 if there is no way to go."""
    return min(1.0, max(0.0, (value - low) / (high - low))) if high > low else 1.0


# (measure, scores that it needs, share from these scores, what it is a share of)
ANSWERS: tuple[tuple[Measure, tuple[str, ...], Callable[..., float], str], ...] = (
    (LIKENESS, ("likeness", "likeness_base", "likeness_real"), _between,
     "of the way from the base model to real photos"),
    (LIKENESS, ("dino", "dino_base", "dino_real"), _between,
     "of the way from the base model to the photos, by DINO"),
    (PROMPT, ("place",), lambda place: place, "of the images show the place that the prompt names"),
    (PROMPT, ("clip_t", "clip_t_base"), lambda ours, base: _between(ours, 0.8 * base, base),
     "by CLIP-T: 100% is as well as the base model, 0% is a fifth less"),
    (CLASS, ("drift",), lambda drift: 1 - drift, "of the images of the class still show others of it"),
    (CLASS, ("preservation", "preservation_base", "dino_real"), lambda *three: 1 - _between(*three),
     "of the distance between class and subject is left, by DINO"),
    (QUALITY, ("class_distance", "class_distance_base"), lambda ours, base: min(1.0, base / ours),
     "100% is as near to the base's images of the class as another seed of the base, 67% half as far again"),
)  # fmt: skip


def ratings(scores: Scores) -> list[Rating]:
    """The answers that these scores allow, at most one for each measure."""
    found: dict[str, Rating] = {}
    for measure, names, share, meaning in ANSWERS:
        if all(name in scores for name in names):
            found[measure.question] = Rating(measure, share(*(scores[name] for name in names)), meaning)
    return list(found.values())


def questions(rated: Iterable[Sequence[Rating]]) -> list[str]:
    """The questions that the ratings of any run answer, in order."""
    return list(dict.fromkeys(rating.measure.question for ratings in rated for rating in ratings))


def verdict(run: Run) -> Verdict:
    """What to say about a run first: its scores in words, or what to run to get them."""
    rated = ratings(run.scores)
    config = shlex.quote(str(RunFolder(run.cfg.run_dir).config))
    if not run.names.done.is_file():
        return Verdict("Not finished yet. The command resumes it.", rated, [], f"dbtrain run {config}")
    if not rated:
        judge = "Not scored yet, so judge by the pictures. The command scores it."
        return Verdict(judge, [], [], f"dbtrain evaluate {config}")
    *first, last = (rating.said for rating in rated)
    sentence = f"It {', '.join(first)} and {last}." if first else f"It {last}."
    cures = [rating.measure.cure for rating in rated if rating.level != GOOD]
    for row in run.checkpoint_scores:
        if row.get("suggested") and row.get("exported") is False:
            step = row["step"]
            cures.append(f"The checkpoint of step {step} scored best: dbtrain export {config} --step {step}")
    return Verdict(sentence, rated, cures)
