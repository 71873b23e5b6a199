"""The captions: whether they can be read, name the subject, and fit into the text encoders."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from dbtrain.data import photo_files
from dbtrain.data.captions import caption
from dbtrain.doctor import settings
from dbtrain.doctor.case import Case, Finding, findings_of, listed, ok, warning
from dbtrain.models.base import Base
from dbtrain.runtime import files
from dbtrain.runtime.errors import ConfigError

SHORT = 30  # bytes; a text of so few fits into any text encoder


def captions(case: Case) -> Iterator[Finding]:
    """Read the caption of every photo."""
    cfg = case.cfg.prepare
    if cfg is None or not cfg.captions:
        yield ok("prepare.captions is false: every photo has prepare.instance_prompt")
        return
    folder = files.expand(cfg.photos)
    found = photo_files.listing(folder).photos if folder.is_dir() else []
    texts: dict[Path, str] = {}
    for path in found:
        try:
            texts[path] = caption(path)
        except ConfigError as problem:
            yield from findings_of(problem)
    token = settings.token_of(case.cfg.subject, cfg)
    if lacking := without_token(texts, token):
        word = " ".join(sorted(token))
        yield warning(
            f"{len(lacking)} of {len(texts)} captions do not name the subject ('{word}'): {listed(lacking)}",
            f"write '{word}' into each, as in prepare.instance_prompt '{cfg.instance_prompt}'",
        )
    if case.knows("base") and (long := too_long(texts, case.base)):
        yield warning(f"longer than the text encoder reads, so their ends are cut off: {listed(long)}",
                      "shorten them")  # fmt: skip
    yield ok(f"{len(texts)} of {len(found)} photos have a caption")


def without_token(texts: dict[Path, str], token: set[str]) -> list[str]:
    """Names of the photos whose caption lacks one of the subject's words."""
    return [path.name for path, text in texts.items() if not token <= settings.words(text)]


def too_long(texts: dict[Path, str], base: Base) -> list[str]:
    """Names of the photos with a caption that has more tokens than a text encoder reads, and how many."""
    long = {path: text for path, text in texts.items() if len(text.encode()) > SHORT}
    if not long:
        return []
    tokenizers = {name: base.load(tokenizer) for name, tokenizer in base.family.text_encoders.items()}
    most = {name: ids.shape[1] for name, ids in base.family.tokenize(tokenizers, [""]).items()}
    counts = {
        path: max((len(tokenizers[name](text).input_ids), limit) for name, limit in most.items())
        for path, text in long.items()
    }
    return [
        f"{path.name} ({count} tokens of {limit})" for path, (count, limit) in counts.items() if count > limit
    ]
