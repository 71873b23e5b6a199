"""The prompts of a photo: its captions with parts in other orders, left out, or chosen.

They are stored, so that training needs no text encoder, and drawn by (seed, content of the photo), so that
they do not depend on other photos. The draws are spread evenly: each tag is in each place about equally often
among the prompts of one caption, and missing in the share of them that was asked for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dbtrain.config import Prepare
from dbtrain.config.inputs import Caption
from dbtrain.config.subjects import Subject
from dbtrain.data.captions import captions, is_there
from dbtrain.runtime.hashing import digest, sha256_of, shuffled

DRAWN = 8  # prompts per photo
CHOICE = re.compile(r"\{([^{}]*\|[^{}]*)\}")  # the innermost


@dataclass(frozen=True)
class Draw:
    """The random numbers of one of the `count` prompts of a caption."""

    number: int
    count: int
    key: tuple[str | int, ...]

    def uniform(self, *of: str | int) -> float:
        """A number in [0, 1). Those of all prompts lie in intervals of 1 / count, one in each."""
        place = shuffled(self.count, *self.key, *of)[self.number]
        within = int.from_bytes(digest(*self.key, *of, "within", self.number)[:4], "big") / 2**32
        return (place + within) / self.count

    def order(self, length: int) -> list[int]:
        """A permutation. In `length` prompts in a row, everything is in each place once."""
        turn, by = divmod(self.number, length)
        order = shuffled(length, *self.key, "order", turn)
        return order[by:] + order[:by]


def templates(photo: Path, prepare: Prepare, words: Subject) -> tuple[str, ...]:
    """The captions of a photo with what comes before and after them; in `words`, one that depends on it.

    None where `prepare` has yet to write it.
    """
    if prepare.captions == "auto" and not is_there(photo):
        return ()
    found = captions(photo, prepare.captions == "lines")
    if prepare.caption is None:
        return found
    before, after = prepare.caption.prefix.strip(), prepare.caption.suffix.strip()
    return tuple(words.filled(_joined(before, text, after)) for text in found)


def of_photo(photo: Path, prepare: Prepare, words: Subject, seed: int) -> list[str]:
    """The prompts of a photo, of which each row of training draws one. Some may be there twice.

    Raises ConfigError if it has no caption.
    """
    if not prepare.captions:
        return [prepare.instance_prompt]
    texts = captions(photo, prepare.captions == "lines")
    how = prepare.caption
    if how is None:
        return list(texts)
    parts = [words.filled(text.strip()) for text in (how.prefix, how.suffix)]
    texts = tuple(words.filled(text) for text in texts)
    drawn = how.shuffle or how.tag_dropout or any(map(CHOICE.search, [*parts, *texts]))
    count = math.ceil((how.variants or DRAWN) / len(texts)) if drawn else 1
    key = (seed, "captions", sha256_of(photo))
    return [
        _prompt(text, parts, how, Draw(number, count, (*key, which)))
        for number in range(count)
        for which, text in enumerate(texts)
    ]


def _prompt(text: str, parts: Sequence[str], how: Caption, draw: Draw) -> str:
    """One of the prompts of a caption; `parts`: what comes before and after it."""
    before, text, after = (_chosen(one, draw, where) for where, one in enumerate((parts[0], text, parts[1])))
    if how.shuffle or how.tag_dropout:
        tags = [tag for one in text.split(",") if (tag := one.strip())]
        kept, others = tags[: how.keep_tags], tags[how.keep_tags :]
        order = draw.order(len(others)) if how.shuffle and others else range(len(others))
        left = [others[k] for k in order if draw.uniform("left out", k) >= how.tag_dropout]
        text = ", ".join([*kept, *left])
    return _joined(before, text, after)


def _chosen(text: str, draw: Draw, where: int) -> str:
    """A text with one of the words of each `{one|another}`."""
    place = 0
    while found := CHOICE.search(text):
        words = found[1].split("|")
        word = words[int(draw.uniform("choice", where, place) * len(words))].strip()
        text = text[: found.start()] + word + text[found.end() :]
        place += 1
    return " ".join(text.split())


def _joined(*parts: str) -> str:
    """Texts in a row, without a space before a comma."""
    return " ".join(filter(None, parts)).replace(" ,", ",").strip(" ")
