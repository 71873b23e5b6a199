"""Which step of a run is best: the rule of `evaluate --checkpoints` and of `train.stop: best`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dbtrain.config import Config
from dbtrain.models.locate import EMBEDDED

Rows = Sequence[Mapping[str, Any]]  # "step" and scores of each checkpoint or validation, in order of steps
WORTH = 0.1  # of what training has gained so far: a smaller improvement does not prolong it


@dataclass(frozen=True)
class Rule:
    """The scores that compare steps: the best subject fidelity among those with good prompt fidelity.

    Good means within `slack` of the best. Of equal steps, the earlier one wins.
    """

    subject: str
    prompt: str = ""  # without one, all are good
    slack: float = 0.0
    sign: int = 1  # -1: the lowest `subject` is the best

    def over(self, images: int) -> Rule:
        """The rule where prompt fidelity is a share of so few images: one of them may differ."""
        return replace(self, slack=max(self.slack, 1 / images))

    def value(self, row: Mapping[str, Any]) -> float:
        return self.sign * row[self.subject]

    def good(self, rows: Rows) -> Rows:
        """The rows among which subject fidelity decides."""
        if not self.prompt:
            return rows
        most = max(row[self.prompt] for row in rows)
        return [row for row in rows if row[self.prompt] >= most - self.slack]

    def choose(self, rows: Rows) -> tuple[Mapping[str, Any], str]:
        """(the best row, the reason)."""
        good = self.good(rows)
        best = max(good, key=self.value)
        why = f"with the {'highest' if self.sign > 0 else 'lowest'} {self.subject} ({best[self.subject]:.3f})"
        if not self.prompt:
            return best, f"{why} of {len(rows)}"
        most = max(row[self.prompt] for row in rows)
        return best, (
            f"{why} of the {len(good)} whose {self.prompt} is within {self.slack:g} of the best ({most:.3f})"
        )

    def contenders(self, rows: Rows) -> set[int]:
        """The steps that can still be the best, whatever follows.

        Prompt fidelity that rises can rule out the best of today, so it is not the only one.
        """
        found: list[Mapping[str, Any]] = []
        for row in sorted(self.good(rows), key=lambda row: (-self.value(row), row["step"])):
            if not found or (self.prompt and row[self.prompt] > max(one[self.prompt] for one in found)):
                found.append(row)
        return {row["step"] for row in found}

    def stale(self, rows: Rows, start: float) -> int:
        """How many rows follow the first that is as good as the best, but for what is not worth training on.

        `start` is the `value` before training, from which gains are counted.
        """
        best, good = self.choose(rows)[0], self.good(rows)
        enough = self.value(best) - WORTH * abs(self.value(best) - start)
        first = next(row for row in good if self.value(row) >= enough)
        return sum(row["step"] > first["step"] for row in rows)


DINO_AND_CLIP = Rule("dino", "clip_t", 0.01)
CLASSIFIER = Rule("likeness", "place", 0.1)
HELD_OUT = Rule("held_out_instance", sign=-1)


def uses_classifier(cfg: Config) -> bool:
    """Whether the embedded base's classifier scores: it does, unless the config names a DINO."""
    return cfg.model.path == EMBEDDED and cfg.evaluation.dino is None
