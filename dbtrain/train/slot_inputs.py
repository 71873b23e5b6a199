"""What a model with slots reads: prompts, an equal part for each slot, and batches for empty ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing

import torch
from torch import Tensor

from dbtrain.config import Config
from dbtrain.data.batch import Batch
from dbtrain.runtime.errors import ConfigError, fixable
from dbtrain.train.dreambooth import DreamBooth
from dbtrain.train.inputs import Inputs
from dbtrain.train.setup import stream_of


def prompts(table: Mapping[str, Tensor]) -> int:
    """How many prompts a table has."""
    return len(next(iter(table.values())))


def blank_table(tables: Sequence[Mapping[str, Tensor]], count: int) -> dict[str, Tensor]:
    """A table of `count` prompts that the text encoders can read, with room for each of `tables`."""
    found = {}
    for name, first in tables[0].items():
        shape = [max(sizes) for sizes in zip(*(table[name].shape[1:] for table in tables), strict=True)]
        found[name] = first.new_zeros(count, *shape)
        _write(found[name], first[:1].expand(count, *first.shape[1:]))
    return found


def write_prompts(model: DreamBooth, slot: int, room: int, table: Mapping[str, Tensor]) -> None:
    """Put the prompt table of a run into its slot's part of the model's, which has `room` prompts.

    Raises ConfigError if it does not fit.
    """
    if (count := prompts(table)) > room:
        raise ConfigError(
            f"the shards have {count} prompts, but a slot has room for {room}; start the fleet again"
        )
    named = {name.partition(".")[2]: tensor for name, tensor in table.items()}
    buffers = {name: model.get_buffer(f"prompts_{name}") for name in model.prompt_names}
    for name, whole in (model.on_host | buffers).items():
        if any(here > there for here, there in zip(named[name].shape[1:], whole.shape[1:], strict=True)):
            raise ConfigError("the prompts are longer than slots have room for; start the fleet again")
        first = slot * room
        _write(whole[first : first + count], named[name])


def blank_batch(cfgs: Sequence[Config], inputs: Sequence[Inputs]) -> Batch:
    """A batch like those of the runs, all zero. Raises ConfigError if no run has data that can be read."""
    problems: list[str] = []
    for cfg, its in zip(cfgs, inputs, strict=True):
        try:
            with fixable(), closing(stream_of(cfg, its, 0, torch.device("cpu"))) as stream:
                return next(stream).blank()
        except ConfigError as problem:
            problems += problem.problems
    raise ConfigError(*problems)


def _write(there: Tensor, values: Tensor) -> None:
    """Write `values` into the beginning of each dimension; zeros into the rest."""
    there.zero_()
    there[tuple(map(slice, values.shape))] = values.to(there.device, there.dtype)
