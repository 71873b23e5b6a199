"""Learned words in files, beside an adapter's or in one.

| file | for | tensors, (vectors, D) each |
|---|---|---|
| `embeddings/<word>.safetensors` | Diffusers, ComfyUI, A1111 | `<word>`; of two encoders `clip_l`, `clip_g` |
| kohya's adapter file | A1111, Forge | `bundle_emb.<word>.string_to_param.*`, or `.clip_l`, `.clip_g` |
| a checkpoint's `tokens.safetensors` | resuming | `<text encoder>.direction`, `.norm` |
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.functional import normalize

from dbtrain.adapters.formats import limits, peft_folder
from dbtrain.adapters.tokens import OLD_END, Rows, Word, Words
from dbtrain.config.subject_words import LEARNABLE
from dbtrain.models.base import Base
from dbtrain.models.families.family import Family
from dbtrain.runtime import files
from dbtrain.runtime.errors import ConfigError, reason

FOLDER, CHECKPOINT = "embeddings", "tokens.safetensors"
BUNDLE, WHOLE = "bundle_emb.", "string_to_param.*"
CLIPS = ("clip_l", "clip_g")  # of a family with two text encoders
WORDS = "words"  # key in a checkpoint's header


def write(folder: Path, family: Family, words: Words) -> None:
    """Write a file for each word into the folder of an export."""
    for word in words:
        data = safetensors.torch.save(_named(family, word, word.text), {"format": "pt"})
        files.write_atomically(folder / FOLDER / f"{word.text}.safetensors", files.sorted_header(data))


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
    """The words of an adapter in any format: those in its file, or else beside it.

    `skeleton`: see `registry.read`. Raises ConfigError for words that do not fit the base's text encoders.
    """
    own = [adapter] if adapter.is_file() else []
    widths: dict[str, int] = {}
    for paths, start in ((own, BUNDLE), (beside(adapter), "")):
        words: list[Word] = []
        for path in paths:
            try:
                words += _words(path, start, family)
                for name in {name for word in words for name in word.rows} - widths.keys():
                    widths[name] = skeleton(name).get_input_embeddings().weight.shape[1]
                for word in words:
                    _check(word, widths)
            except ConfigError as problem:
                raise ConfigError(f"the learned word in {path}: {problem}") from problem
        if words:
            return words
    return []


def _words(path: Path, start: str, family: Family) -> list[Word]:
    """The words in a file, from the tensors whose names begin with `start`."""
    limits.check_file(path)
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            names = [name for name in file.keys() if name.startswith(start)]  # noqa: SIM118
            tensors = {name.removeprefix(start): file.get_tensor(name).float() for name in names}
    except (SafetensorError, OSError, ValueError) as error:
        raise ConfigError(f"not a safetensors file: {reason(error)}") from error
    if WORDS in header:
        return _of_checkpoint(header[WORDS].split(), tensors)
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        text, _, part = name.partition(".") if start else (path.stem, "", name)
        if part in CLIPS:
            encoder = family.adaptable_text[CLIPS.index(part) :][:1]
        else:
            encoder = family.adaptable_text if part in (WHOLE, text) else ()
        if not LEARNABLE.fullmatch(text):
            raise ConfigError(f"'{text}' is not one word without '.' and '/'")
        if len(encoder) != 1 or not tensor.dim():
            raise ConfigError(f"its tensor {name} is for no text encoder of {family.name} models")
        found.setdefault(text, {})[encoder[0]] = tensor.reshape(-1, tensor.shape[-1])
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


def _check(word: Word, widths: Mapping[str, int]) -> None:
    """Raise ConfigError unless a word's embeddings are finite, and as wide as those of the text encoders."""
    for name, rows in word.rows.items():
        if rows.shape[1] != widths[name] or not rows.isfinite().all():
            wrong = f"have {rows.shape[1]} values" if rows.isfinite().all() else "are NaN or infinite"
            raise ConfigError(f"its embeddings {wrong}; those of the base's {name} have {widths[name]}")
