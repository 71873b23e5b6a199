"""Captions and prompts: whether they can be read, name the subject, and fit into the text encoders."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from dbtrain.config import Config, Prepare
from dbtrain.data import photo_files
from dbtrain.data.captions import is_there, without
from dbtrain.data.photo_files import name_in
from dbtrain.data.sources import folder_of
from dbtrain.doctor import settings
from dbtrain.doctor.case import Case, Finding, findings_of, listed, ok, problems_of, warning
from dbtrain.models import captioner
from dbtrain.models.base import Base
from dbtrain.prepare import encode, subject_captions
from dbtrain.prepare.prompts import of_photo
from dbtrain.runtime import files
from dbtrain.runtime.errors import ConfigError

TOKENS = 77  # that every text encoder reads, unless its config says less
MOST_TOKENS = 512  # of a prompt, as most families read them
FEW = 8  # of the longest prompts, which tell how many tokens all take


def captions(case: Case) -> Iterator[Finding]:
    """Read the caption of every photo."""
    cfg = case.cfg.prepare
    if cfg is None or not cfg.captions:
        yield ok("prepare.captions is false: every photo has prepare.instance_prompt")
        return
    found, folder = _photos(cfg), folder_of(cfg.photos)
    texts: dict[str, list[str]] = {}
    to_write: dict[str, Path] = {}
    for path in found:
        name = name_in(folder, path)
        if cfg.captions == "auto" and not is_there(path):
            to_write[name] = path
            continue
        try:
            texts[name] = of_photo(path, cfg, case.cfg.subject, case.cfg.seed)
        except ConfigError as problem:
            yield from findings_of(problem)
    yield from _to_write(to_write, case.cfg)
    token = settings.token_of(case.cfg.subject, cfg)
    if lacking := without_token(texts, token):
        word = " ".join(sorted(token))
        yield warning(
            f"{len(lacking)} of {len(texts)} captions do not name the subject ('{word}'): {listed(lacking)}",
            f"write '{word}' into each, as in prepare.instance_prompt '{cfg.instance_prompt}'",
        )
    if case.knows("base"):
        yield from too_long({name: max(every, key=len) for name, every in texts.items()}, case.base)
    count = len({text for every in texts.values() for text in every})
    yield ok(f"{len(texts)} of {len(found)} photos have a caption, of which {count} prompts are made")


def _photos(cfg: Prepare) -> list[Path]:
    folder = folder_of(cfg.photos)
    return photo_files.listing(folder, cfg.subfolders).photos if folder.is_dir() else []


def _to_write(photos: Mapping[str, Path], cfg: Config) -> Iterator[Finding]:
    """Which photos, by name, `prepare` will caption, and whether it can. Loads no model."""
    assert cfg.prepare
    if not photos:
        return
    name = cfg.prepare.captioner or captioner.MODEL
    yield from problems_of(lambda: without([*photos.values()]), "")
    yield from problems_of(lambda: subject_captions.words_of(cfg.subject), "")
    if files.expand(name).is_dir():  # else it may not have been downloaded yet
        yield from problems_of(lambda: captioner.find(name, download=False), "use another model")
    yield ok(f"prepare will write captions for {len(photos)} photos, with {name}: {listed([*photos])}")


def table(case: Case) -> Iterator[Finding]:
    """Whether the prompts of all captions take a lot of memory, once they are encoded."""
    cfg = case.cfg
    if not (cfg.prepare and cfg.prepare.captions):
        return
    texts = set()
    for one in cfg.each_subject():
        assert one.prepare
        for path in _photos(one.prepare):
            with suppress(ConfigError):  # named above
                texts.update(of_photo(path, one.prepare, one.subject, one.seed))
    # Tokens are counted only if it may matter: loading the tokenizers takes seconds.
    if encode.too_large(case.base, len(texts), MOST_TOKENS):
        ids = encode.tokenizer(case.base)(sorted(texts, key=len)[-FEW:])
        if problem := encode.too_large(case.base, len(texts), encode.longest(ids)):
            yield from findings_of(ConfigError(problem), level="warning")


def prompts(case: Case) -> Iterator[Finding]:
    """Whether the text encoders read every prompt to its end."""
    cfg, texts = case.cfg, {}
    if cfg.prepare:
        for one in cfg.each_subject():
            assert one.prepare
            of = f" of {one.subject.token}" if cfg.subjects else ""
            texts[f"prepare.instance_prompt{of}"] = one.prepare.instance_prompt
            texts[f"prepare.class_prompt{of}"] = one.prepare.class_prompt or ""
    for section in ("validation", "sample", "evaluation"):
        for number, text in enumerate(getattr(cfg, section).prompts, 1):
            texts[f"{section}.prompts, no. {number}"] = text
    yield from too_long(texts, case.base)
    yield ok("the model reads every prompt to its end")


def without_token(texts: Mapping[str, Sequence[str]], token: set[str]) -> list[str]:
    """Names of the photos one of whose prompts lacks one of the subject's words."""
    return [name for name, every in texts.items() if not all(token <= settings.words(text) for text in every)]


def too_long(texts: dict[str, str], base: Base) -> Iterator[Finding]:
    """What names the texts with more tokens than a text encoder reads: a warning, or an error if `prepare`
    refuses them."""
    sizes = [base.settings(name).get("max_position_embeddings") for name in base.family.text_encoders]
    least = min([TOKENS, *(size for size in sizes if type(size) is int)])
    # A token has a byte or more, and two mark the ends; loading the tokenizers takes seconds.
    long = {name: text for name, text in texts.items() if len(text.encode()) + 2 > least}
    if not long:
        return
    tokenizers = {name: base.load(tokenizer) for name, tokenizer in base.family.text_encoders.items()}
    cut = []
    for label, text in long.items():
        try:
            ids = base.family.tokenize(tokenizers, [text])
        except ConfigError as problem:
            yield from findings_of(problem, "shorten it")
            continue
        counts = {name: len(tokenizers[name](text).input_ids) for name in tokenizers}
        cut += [f"{label} ({count} tokens of {ids[name].shape[1]})" for name, count in counts.items()
                if count > ids[name].shape[1]][:1]  # fmt: skip
    if cut:
        yield warning(f"longer than the model reads, so their ends have no effect: {listed(cut)}",
                      "shorten them; a word takes one or two tokens")  # fmt: skip
