"""Learned words: embeddings of their own for a word, which text encoders then read as a new one.

Gal et al. 2022, "An Image is Worth One Word" (textual inversion), arXiv:2208.01618. To train them along with
an adapter is known as pivotal tuning. Tokenizers get the words as from Diffusers' `load_textual_inversion`:
one of three embeddings is the tokens `sks`, `sks_1` and `sks_2`, and the word `sks` in a prompt is all three.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from tokenizers import AddedToken
from torch import Tensor, nn
from torch.nn.functional import normalize

from dbtrain.config.adapter import Token
from dbtrain.runtime.errors import ConfigError

DIRECTION = "words.direction"  # how the names of the trained parameters end
OLD_END = 2  # `eos_token_id` in older configs of CLIP


@dataclass(frozen=True, eq=False)
class Word:
    """A learned word: its embeddings in each text encoder, (vectors, D) fp32 on the CPU."""

    text: str
    rows: Mapping[str, Tensor]

    @property
    def vectors(self) -> int:
        return len(next(iter(self.rows.values())))


Words = Sequence[Word]


class Rows(nn.Module):
    """Embeddings of a fixed length: only their directions, unit vectors at first, are trained.

    An embedding that grew beyond those of other words would drown them.
    """

    norm: Tensor  # (vectors, 1)

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.register_buffer("norm", rows.norm(dim=1, keepdim=True), persistent=False)
        self.direction = nn.Parameter(normalize(rows), requires_grad=False)

    def forward(self) -> Tensor:
        return normalize(self.direction) * self.norm


class WordEmbedding(nn.Module):
    """A text encoder's input embedding, with rows of their own for some tokens, in fp32.

    These tokens may be beyond the end of its table, or (T5's is longer than its vocabulary) within it.
    """

    ids: Tensor  # (vectors,)

    def __init__(self, table: nn.Module, ids: Sequence[int], rows: Tensor) -> None:
        super().__init__()
        self.table = table  # first, as Diffusers takes the first parameter's dtype for the encoder's
        self.words = Rows(rows)
        self.register_buffer("ids", torch.tensor(ids), persistent=False)

    @property
    def weight(self) -> Any:
        return self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Embeddings of token ids, (B, L) -> (B, L, D) in the table's dtype. Nothing is read on the host."""
        chosen = ids[..., None] == self.ids  # (B, L, vectors)
        here = chosen.any(-1)
        known = self.table(ids.masked_fill(here, 0))
        # A sum over one row and zeros, as an index's gradient would be summed in any order on a GPU.
        learned = (chosen[..., None] * self.words()).sum(-2)
        return torch.where(here[..., None], learned.to(known.dtype), known)


def tokens_of(text: str, vectors: int) -> list[str]:
    """The tokens that a word of so many embeddings is."""
    return [text, *(f"{text}_{number}" for number in range(1, vectors))]


def teach(tokenizer: Any, words: Mapping[str, int]) -> list[int]:
    """Make a tokenizer read each of `words` as that many new tokens; return their ids, in order.

    Other than in Diffusers, `desks` does not contain the word `sks`. Raises ConfigError for a token that the
    tokenizer has already.
    """
    tokens = [token for text, vectors in words.items() for token in tokens_of(text, vectors)]
    if known := tokenizer.get_vocab().keys() & set(tokens):
        raise ConfigError(
            f"the base's tokenizer has a token '{min(known)}' already, so that a word of that name cannot be "
            "added; train with another subject.token"
        )
    tokenizer.add_tokens([AddedToken(token, single_word=True) for token in tokens])
    if several := {text: vectors for text, vectors in words.items() if vectors > 1}:
        kind = type(tokenizer)

        def read(self: Any, text: Any = None, *args: Any, **options: Any) -> Any:
            return kind.__call__(self, _expanded(text, several), *args, **options)

        tokenizer.__class__ = type(kind.__name__, (kind,), {"__call__": read, "__module__": kind.__module__})
    return [tokenizer.convert_tokens_to_ids(token) for token in tokens]


def _expanded(text: Any, words: Mapping[str, int]) -> Any:
    """A prompt, or several, with all tokens of each word; those that have them already stay."""
    if not isinstance(text, str):
        return text and [_expanded(one, words) for one in text]
    for word, vectors in words.items():
        tokens = tokens_of(re.escape(word), vectors)
        text = re.sub(rf"(?<!\w){tokens[0]}(?!\w)(?! {tokens[1]})", " ".join(tokens_of(word, vectors)), text)
    return text


def learn(encoder: Any, tokenizer: Any, texts: Sequence[str], cfg: Token) -> None:
    """Give `encoder` trainable embeddings for the words `texts`, which its `tokenizer` learns too.

    They start from the tokens that `cfg.init` is, each the mean of its share of them and as long, or from the
    tokens that the word has been so far. Raises ConfigError as `teach`.
    """
    table = encoder.get_input_embeddings()
    rows = []
    for text in texts:
        now = tokenizer(cfg.init or text, add_special_tokens=False).input_ids
        starts = [number * len(now) // cfg.vectors for number in range(cfg.vectors + 1)]
        for start, end in pairwise(starts):
            share = table.weight.detach()[now[start : max(end, start + 1)]].float()
            rows.append(normalize(share.mean(0), dim=0) * share.norm(dim=1).mean())  # a mean alone is short
    ids = teach(tokenizer, dict.fromkeys(texts, cfg.vectors))
    embedding = WordEmbedding(table, ids, torch.stack(rows))
    embedding.words.direction.requires_grad_(True)
    _put(encoder, tokenizer, embedding)


def joined(adapters: Sequence[Words]) -> list[Word]:
    """The words of adapters that are used together. Raises ConfigError if two have learned the same word."""
    words = [word for mine in adapters for word in mine]
    texts = [word.text for word in words]
    if twice := {text for text in texts if texts.count(text) > 1}:
        raise ConfigError(
            f"two of the adapters have learned the word '{min(twice)}'; use one of them at a time, or "
            "train one with another subject.token"
        )
    return words


def speak(encoder: Any, tokenizer: Any, name: str, words: Words) -> None:
    """Make `encoder`, called `name`, and its `tokenizer` know these words; none: only those of the base.

    Raises ConfigError as `teach`.
    """
    table = encoder.get_input_embeddings()
    if isinstance(table, WordEmbedding):
        table = table.table
        encoder.set_input_embeddings(table)
    if mine := [word for word in words if name in word.rows]:
        rows = torch.cat([word.rows[name] for word in mine]).to(table.weight.device)
        ids = teach(tokenizer, {word.text: len(word.rows[name]) for word in mine})
        _put(encoder, tokenizer, WordEmbedding(table, ids, rows).to(rows.device))


def _put(encoder: Any, tokenizer: Any, embedding: WordEmbedding) -> None:
    """Give `encoder` an embedding with words.

    A CLIP with the `eos_token_id` of older configs, 2, takes its pooled output where the highest token is: at
    a learned word, were it not told where a prompt ends (huggingface/transformers#24773).
    """
    encoder.set_input_embeddings(embedding)
    for module in encoder.modules():
        if getattr(module, "eos_token_id", None) == OLD_END:
            module.eos_token_id = tokenizer.eos_token_id


def trained(encoders: Mapping[str, Any]) -> dict[str, Rows]:
    """The embeddings of the learned word, by text encoder; {} if none is learned."""
    tables = {name: encoder.get_input_embeddings() for name, encoder in encoders.items()}
    return {name: table.words for name, table in tables.items() if isinstance(table, WordEmbedding)}


def readers(base: Any, texts: Sequence[str], cfg: Token | None) -> dict[str, Any]:
    """The tokenizers of the encoders that learn words, by encoder, once they know them; {} without words.

    Raises ConfigError as `teach`.
    """
    if not (texts and cfg):
        return {}
    found = {name: base.load(base.family.text_encoders[name]) for name in base.family.adaptable_text}
    for tokenizer in found.values():
        teach(tokenizer, dict.fromkeys(texts, cfg.vectors))
    return found


def read_again(
    base: Any, texts: Sequence[str], cfg: Token | None, prompts: Sequence[str]
) -> dict[str, Tensor]:
    """The part of the prompt table that changes with learned words: the token ids that their encoders read.

    Raises ConfigError as `teach`, or if no prompt has a word.
    """
    found = readers(base, texts, cfg)
    table = base.family.tokenize(found, prompts) if found else {}
    for name, tokenizer in found.items():
        for text in texts:
            if not (table[name] == tokenizer.convert_tokens_to_ids(text)).any():
                raise ConfigError(
                    f"adapter.token: the tokenizer of {name} finds the word '{text}' in no prompt; write it "
                    "as the token is (DeepFloyd IF: in lower case), and where a long prompt is not yet cut"
                )
    return {f"ids.{name}": tensor for name, tensor in table.items()}
