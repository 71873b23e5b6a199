"""The best step: chosen by the rule, never lost, and improvements that are not worth waiting for."""

from __future__ import annotations

import random
from typing import Any

import pytest

from dbtrain.evaluate.choice import CLASSIFIER, DINO_AND_CLIP, HELD_OUT, Rule

Row = dict[str, Any]


def rows(rule: Rule, *values: tuple[float, float]) -> list[Row]:
    return [{"step": 10 * (n + 1), rule.subject: a, rule.prompt: b} for n, (a, b) in enumerate(values)]


def test_the_best_is_the_most_similar_of_those_that_follow_prompts() -> None:
    found = rows(DINO_AND_CLIP, (0.3, 0.32), (0.5, 0.315), (0.5, 0.312), (0.9, 0.305))
    best, why = DINO_AND_CLIP.choose(found)
    assert best["step"] == 20, "of equals, the earlier one"
    assert why == "with the highest dino (0.500) of the 3 whose clip_t is within 0.01 of the best (0.320)"
    best, why = HELD_OUT.choose([{"step": n, "held_out_instance": loss} for n, loss in ((1, 0.3), (2, 0.2))])
    assert best["step"] == 2 and why == "with the lowest held_out_instance (0.200) of 2"


def test_of_few_images_one_may_be_wrong() -> None:
    found = rows(CLASSIFIER, (0.5, 1.0), (0.6, 0.75))
    assert CLASSIFIER.choose(found)[0]["step"] == 10
    assert CLASSIFIER.over(4).choose(found)[0]["step"] == 20


@pytest.mark.parametrize("rule", [DINO_AND_CLIP, HELD_OUT, Rule("likeness", "place", 0.25)])
def test_whatever_follows_the_best_is_one_that_was_kept(rule: Rule) -> None:
    """Of all later steps too: what is deleted once is never chosen."""
    rng = random.Random(0)
    for _ in range(300):
        found = rows(rule, *((rng.randrange(5) / 4, rng.randrange(5) * rule.slack / 2) for _ in range(8)))
        kept: set[int] = set()
        for n in range(1, len(found) + 1):
            kept = {step for step in kept | {found[n - 1]["step"]} if step in rule.contenders(found[:n])}
            assert rule.choose(found[:n])[0]["step"] in kept


def test_small_improvements_do_not_count_and_large_ones_do() -> None:
    def stale(*likeness: float) -> int:
        return CLASSIFIER.stale(rows(CLASSIFIER, *((value, 1.0) for value in likeness)), start=0.0)

    assert stale(0.5) == 0
    assert stale(0.5, 0.6, 0.7) == 0
    assert stale(0.7, 0.5, 0.6) == 2
    assert stale(0.7, 0.71, 0.72, 0.73) == 3  # each within a tenth of the gain, 0.73
    assert stale(0.7, 0.71, 0.8) == 0


def test_losses_gain_downward() -> None:
    def stale(*losses: float) -> int:
        found = [{"step": n + 1, "held_out_instance": loss} for n, loss in enumerate(losses)]
        return HELD_OUT.stale(found, start=HELD_OUT.value({"held_out_instance": 0.3}))

    assert stale(0.25, 0.2) == 0
    assert stale(0.2, 0.21, 0.25) == 2
    assert stale(0.35, 0.4) == 1, "training that only harms"
