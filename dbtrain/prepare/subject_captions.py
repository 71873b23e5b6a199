"""Captions that a model writes, about all in a photo but its subject, which has its word instead.

They are text files that a user can edit, and existing ones are never replaced.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from dbtrain.config import Config
from dbtrain.config.subject_words import with_article
from dbtrain.config.subjects import Subject
from dbtrain.data import captions, photos
from dbtrain.data.photo_files import check_names
from dbtrain.models.captioner import MODEL, describer
from dbtrain.runtime import console, files, preemption
from dbtrain.runtime.errors import ConfigError

SEVERAL = "two three four several some many these those both"
DETERMINERS = f"a an the one another this that my your his her its our their {SEVERAL}"
# Words that are no adjectives, where they come right before what the subject is.
OTHERS = (
    "of in on at with by for from to near under over behind beside before and or but is are was were be has "
    "have which who like while photo photograph picture image view"
)
WORD = rf"(?!(?:{'|'.join([*DETERMINERS.split(), *OTHERS.split()])})\b)(?!\w+ing\b)[\w'-]+"


def ensure(cfg: Config, paths: Sequence[Path]) -> None:
    """Write the captions that these photos of a subject lack, on rank 0, if `prepare.captions` is `auto`.

    Raises ConfigError if the model cannot be used, or if the subject has no words.
    """
    prepare = cfg.prepare
    if not prepare or prepare.captions != "auto" or not (missing := captions.without(paths)):
        return
    token, kind = words_of(cfg.subject)
    check_names(missing, captions.file_of)
    describe = describer(prepare.captioner or MODEL)
    text = ""
    with console.bar(len(missing), "caption", "photo") as bar:
        for path in missing:
            preemption.check()
            text = about_subject(describe(photos.load(path), kind), token, kind)
            if not captions.is_there(path):  # still
                files.write_atomically(captions.file_of(path), f"{text}\n")
            bar.update()
    console.say(
        f"wrote {len(missing)} captions beside the photos in {missing[0].parent}, e.g. "
        f"{captions.file_of(missing[-1]).name}: '{text}'; look at them, and edit them as you like"
    )


def words_of(subject: Subject) -> tuple[str, str]:
    """(token, class word). Raises ConfigError if one is missing."""
    if subject.token and subject.class_word:
        return subject.token, subject.class_word
    raise ConfigError(
        "prepare.captions is auto, but nothing says what to call the subject; set subject.token and "
        "subject.class_word"
    )


def about_subject(text: str, token: str, kind: str) -> str:
    """A caption in one line with `token kind` where it first names the subject's class.

    Adjectives right before the class describe the subject, which the token stands for, and are left out:
    "a small brown dog on a bed" -> "a sks dog on a bed". A caption without the class follows the subject.
    """
    text = captions.in_one_line(text).strip(" \"'“”*.")
    text = text if text[1:2].isupper() else text[:1].lower() + text[1:]
    name, plural = re.escape(kind), rf"{re.escape(kind)}e?s"
    if kind.endswith("y"):
        plural += rf"|{re.escape(kind[:-1])}ies"
    adjectives = rf"(?:(?:{WORD}(?:,|,? and)? ){{0,3}}{WORD} )?"
    named = rf"(?:(?P<determiner>{'|'.join(DETERMINERS.split())}) {adjectives}|(?:{WORD} ){{0,4}})"
    found = re.search(rf"(?<![\w'-]){named}(?:{plural}|{name})(?![\w-])", text, re.IGNORECASE)
    subject = f"{token} {kind}"
    if not found:
        return ", ".join(filter(None, [f"a photo of {subject}", text]))
    determiner = (found["determiner"] or "").lower()
    if determiner in ("a", "an", *SEVERAL.split()):
        subject = with_article(subject)
    elif determiner:
        subject = f"{determiner} {subject}"
    return text[: found.start()] + subject + text[found.end() :]
