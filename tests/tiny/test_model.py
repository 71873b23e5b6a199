"""The embedded base as it is shipped: small, ordinary, and it draws what it is asked for."""

from __future__ import annotations

import pytest

from benchmarks.tiny import measure
from dbtrain import tiny
from dbtrain.config import Model
from dbtrain.sample.pipeline import AdapterPipeline
from dbtrain.tiny import world
from dbtrain.tiny.judge import Judge
from dbtrain.tiny.paint import KINDS


@pytest.mark.slow
def test_it_draws_what_it_is_asked_for() -> None:
    """A short form of `python -m benchmarks.tiny.measure`, with seeds of its own."""
    base = AdapterPipeline.load(Model(path="tiny"))
    asked = [(kind, place) for kind in KINDS for place in world.PLACES][::2]
    texts = [f"a photo of a {kind} {world.PLACE_WORDS[place]}" for kind, place in asked]
    pictures = []
    for first in range(0, len(texts), 16):
        some = texts[first : first + 16]
        seeds = range(50_000 + first, 50_000 + first + len(some))
        pictures += base.generate(some, seeds, measure.STEPS, measure.GUIDANCE)
    read = Judge.load().read(pictures)
    kinds = sum(kind == found for (kind, _), found in zip(asked, read.kinds, strict=True))
    places = sum(place == found for (_, place), found in zip(asked, read.places, strict=True))
    assert kinds >= 0.9 * len(asked) - 2, "give or take two of 24"
    assert places >= 0.85 * len(asked) - 2


def test_its_page_says_what_was_measured() -> None:
    page = (tiny.path() / "README.md").read_text()
    for row in ("| class |", "| place |", "PSNR", "python -m benchmarks.tiny.measure"):
        assert row in page
