"""Learned words in files, beside an adapter's or in one.

| file | for | tensors, (vectors, D) each |
|---|---|---|
| `embeddings/<word>.safetensors` | Diffusers, ComfyUI, A1111 | `<word>`; of two encoders `clip_l`, `clip_g` |
| kohya's adapter file | A1111, Forge | `bundle_emb.<word>.string_to_param.*`, or `.clip_l`, `.clip_g` |
| a checkpoint's `tokens.safetensors` | resuming | `<text encoder>.direction`, `.norm` |
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.functional import normalize

from dbtrain.adapters.formats import limits, peft_folder
from dbtrain.adapters.formats.common import CONFIGS
from dbtrain.adapters.tokens import OLD_END, Rows, Word, Words
from dbtrain.config.subject_words import LEARNABLE
from dbtrain.models.base import Base
from dbtrain.models.families.family import Family
from dbtrain.runtime import console, files, hashing
from dbtrain.runtime.errors import ConfigError, reason

FOLDER, CHECKPOINT = "embeddings", "tokens.safetensors"
BUNDLE, WHOLE = "bundle_emb.", "string_to_param.*"
CLIPS = ("clip_l", "clip_g")  # of a family with two text encoders
WORDS = "words"  # key in a checkpoint's header
ADAPTERS = "adapters"  # key in a word's header: the sha256 of each file of its adapter


def write(folder: Path, family: Family, words: Words, adapters: Sequence[Path] = ()) -> None:
    """Write a file for each word into the folder of an export.

    `adapters`: the files, or PEFT's folders, of the adapter whose words they are. Without, they are anyone's.
    """
    for word in words:
        path = folder / FOLDER / f"{word.text}.safetensors"
        named, hashes = _named(family, word, word.text), set().union(*map(_hashes, adapters))
        if hashes and path.is_file():
            header, there = _opened(path, "")
            if there.keys() == named.keys() and all(torch.equal(there[name], named[name]) for name in named):
                hashes |= set(header.get(ADAPTERS, "").split())
            elif owner := _owner(path, header, adapters):
                console.warn(f"{path} was the word of {owner}, which loses it; export into separate folders")
        header = {"format": "pt"} | ({ADAPTERS: " ".join(sorted(hashes))} if hashes else {})
        data = safetensors.torch.save(named, header)
        files.write_atomically(path, files.sorted_header(data, {CONFIGS: "{}"}))


def _hashes(adapter: Path) -> set[str]:
    """The sha256 of the file of an adapter, or of those in PEFT's folder."""
    paths = [adapter, adapter / peft_folder.WEIGHTS, *adapter.glob(f"*/{peft_folder.WEIGHTS}")]
    return {hashing.sha256_of(path) for path in paths if path.is_file()}


def _owner(path: Path, header: Mapping[str, str], but: Sequence[Path] = ()) -> Path | None:
    """An adapter that a word's file in an export's folder is for, `but` not one of these; None without."""
    hashes = header.get(ADAPTERS, "").split()
    there = set(path.parent.parent.glob("*.safetensors") if hashes else ()) - {*but}
    return next((adapter for adapter in there if not _hashes(adapter).isdisjoint(hashes)), None)


def bundled(family: Family, words: Words) -> dict[str, Tensor]:
    """The words as further tensors of an adapter's file."""
    return {
        f"{BUNDLE}{word.text}.{name}": rows
        for word in words
        for name, rows in _named(family, word, WHOLE).items()
    }


def checkpoint(texts: Sequence[str], rows: Mapping[str, Rows]) -> bytes:
    """A checkpoint's file of the words that are being learned, whose `rows` are `tokens.trained`'s."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _parts(rows).items()}
    return safetensors.torch.save(tensors, {WORDS: " ".join(texts)})


def restore(path: Path, rows: Mapping[str, Rows]) -> None:
    """Load a checkpoint's file into `rows`. Raises ConfigError if it is for others."""
    saved = safetensors.torch.load_file(path)
    mine = _parts(rows)
    if {name: t.shape for name, t in saved.items()} != {name: t.shape for name, t in mine.items()}:
        raise ConfigError(f"{path} is not of the words that are learned: it has {', '.join(sorted(saved))}")
    with torch.no_grad():
        for name, tensor in mine.items():
            tensor.copy_(saved[name])


def _parts(rows: Mapping[str, Rows]) -> dict[str, Tensor]:
    parts = {name: {"direction": one.direction, "norm": one.norm} for name, one in rows.items()}
    return {f"{name}.{part}": tensor for name, found in parts.items() for part, tensor in found.items()}


def _named(family: Family, word: Word, alone: str) -> dict[str, Tensor]:
    """The embeddings by name: `alone` where the family has one text encoder to learn words."""
    names = (alone,) if len(family.adaptable_text) == 1 else CLIPS
    pairs = zip(names, family.adaptable_text, strict=True)
    return {name: word.rows[encoder] for name, encoder in pairs if encoder in word.rows}


def old_ends(base: Base) -> dict[str, str]:
    """The CLIPs that Diffusers must be told where prompts end, and their tokenizers. See `tokens.OLD_END`."""
    inner = {name: f"{name}.text_model" if base.index[name][1].endswith("WithProjection") else name
             for name in base.family.adaptable_text}  # fmt: skip
    pooled = any("pooled" in name for name in base.family.conditions(base))
    return {inner[name]: base.family.text_encoders[name] for name in base.family.adaptable_text
            if pooled and base.config(name).get("eos_token_id") == OLD_END}  # fmt: skip


def without(names: Iterable[str]) -> list[str]:
    """The names of tensors in a file that belong to no word; all of them if that leaves nothing."""
    every = list(names)
    return [name for name in every if not name.startswith(BUNDLE)] or every


def beside(adapter: Path) -> list[Path]:
    """The files of words beside an adapter, or in its folder."""
    folder = adapter if adapter.is_dir() and not (adapter / peft_folder.CONFIG).is_file() else adapter.parent
    return [path for path in (folder / CHECKPOINT, *sorted(folder.glob(f"{FOLDER}/*.safetensors")))
            if path.is_file()]  # fmt: skip


def read(adapter: Path, family: Family, skeleton: Callable[[str], Any]) -> Words:
    """The words of an adapter in any format: those in its file, or else its own beside it.

    `skeleton`: see `registry.read`. Raises ConfigError for words that do not fit the base's text encoders.
    """
    width = cache(lambda name: skeleton(name).get_input_embeddings().weight.shape[1])
    own = [adapter] if adapter.is_file() else []
    for paths, start in ((own, BUNDLE), (beside(adapter), "")):
        words: list[Word] = []
        for path in paths:
            try:
                header, tensors = _opened(path, start)
                if not start and not _belongs(header, tensors, path.stem, adapter, family, width):
                    if ADAPTERS in header and not _owner(path, header):
                        console.warn(f"the word in {path} is left out: {adapter} is not the file it is for")
                    continue
                found = _words(header, tensors, "" if start else path.stem, family)
                for word in found:
                    _check(word, width)
            except ConfigError as problem:
                raise ConfigError(f"the learned word in {path}: {problem}") from problem
            words += found
        if words:
            return words
    return []


def _opened(path: Path, start: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The header of a file, and its tensors whose names begin with `start`, without it."""
    limits.check_file(path)
    try:
        with safe_open(path, "pt") as file:
            names = [name for name in file.keys() if name.startswith(start)]  # noqa: SIM118
            tensors = {name.removeprefix(start): file.get_tensor(name).float() for name in names}
            return file.metadata() or {}, tensors
    except (SafetensorError, OSError, ValueError) as error:
        raise ConfigError(f"not a safetensors file: {reason(error)}") from error


def _belongs(
    header: Mapping[str, str], tensors: Mapping[str, Tensor], text: str, adapter: Path, family: Family,
    width: Callable[[str], int],
) -> bool:  # fmt: skip
    """Whether a file beside an adapter has words of it: it says so, or says nothing, and fits the base."""
    if WORDS in header:
        return True
    if ADAPTERS in header:
        return not _hashes(adapter).isdisjoint(header[ADAPTERS].split())
    encoders = {name: _encoder(name, text, family) for name in tensors}
    return bool(LEARNABLE.fullmatch(text)) and all(
        encoder and tensors[name].dim() and tensors[name].shape[-1] == width(encoder)
        for name, encoder in encoders.items()
    )


def _encoder(part: str, text: str, family: Family) -> str | None:
    """The text encoder that a tensor of the word `text` is for."""
    found: Sequence[str] = family.adaptable_text if part in (WHOLE, text) else ()
    if part in CLIPS:
        found = family.adaptable_text[CLIPS.index(part) :][:1]
    return found[0] if len(found) == 1 else None


def _words(
    header: Mapping[str, str], tensors: Mapping[str, Tensor], alone: str, family: Family
) -> list[Word]:
    """The words in a file: several, or the one that it is called by."""
    if WORDS in header:
        return _of_checkpoint(header[WORDS].split(), tensors)
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        text, _, part = (alone, "", name) if alone else name.partition(".")
        if not LEARNABLE.fullmatch(text):
            raise ConfigError(f"'{text}' is not one word without '.' and '/'")
        encoder = _encoder(part, text, family)
        if encoder is None or not tensor.dim():
            raise ConfigError(f"its tensor {name} is for no text encoder of {family.name} models")
        found.setdefault(text, {})[encoder] = tensor.reshape(-1, tensor.shape[-1])
    return [Word(text, rows) for text, rows in found.items()]


def _of_checkpoint(texts: Sequence[str], tensors: Mapping[str, Tensor]) -> list[Word]:
    parts = {
        part: {name.removesuffix(part): one for name, one in tensors.items() if name.endswith(part)}
        for part in (".direction", ".norm")
    }
    if parts[".direction"].keys() != parts[".norm"].keys():
        raise ConfigError("its tensors are not those of a checkpoint")
    rows = {name: normalize(one) * parts[".norm"][name] for name, one in parts[".direction"].items()}
    each = {name: one.reshape(len(texts), -1, one.shape[-1]) for name, one in rows.items()}
    return [Word(text, {name: one[k].clone() for name, one in each.items()}) for k, text in enumerate(texts)]


def _check(word: Word, width: Callable[[str], int]) -> None:
    """Raise ConfigError unless a word's embeddings are finite, and as wide as those of the text encoders."""
    for name, rows in word.rows.items():
        if rows.shape[1] != width(name) or not rows.isfinite().all():
            wrong = f"have {rows.shape[1]} values" if rows.isfinite().all() else "are NaN or infinite"
            raise ConfigError(f"its embeddings {wrong}; those of the base's {name} have {width(name)}")
