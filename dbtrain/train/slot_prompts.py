"""The prompt table of a model with slots: a part of equal size for each slot, zero where its run has less."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from dbtrain.runtime.errors import ConfigError
from dbtrain.train.dreambooth import DreamBooth


def length(table: Mapping[str, Tensor]) -> int:
    """How many prompts a table has."""
    return len(next(iter(table.values())))


def blank(tables: Sequence[Mapping[str, Tensor]], count: int) -> dict[str, Tensor]:
    """A table of `count` prompts that the text encoders can read, with room for each of `tables`."""
    found = {}
    for name, first in tables[0].items():
        shape = [max(sizes) for sizes in zip(*(table[name].shape[1:] for table in tables), strict=True)]
        found[name] = first.new_zeros(count, *shape)
        _write(found[name], first[:1].expand(count, *first.shape[1:]))
    return found


def write(model: DreamBooth, slot: int, room: int, table: Mapping[str, Tensor]) -> None:
    """Put the prompt table of a run into its slot's part of the model's, which has `room` prompts.

    Raises ConfigError if it does not fit.
    """
    if (count := length(table)) > room:
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


def _write(there: Tensor, values: Tensor) -> None:
    """Write `values` into the beginning of each dimension; zeros into the rest."""
    there.zero_()
    there[tuple(map(slice, values.shape))] = values.to(there.device, there.dtype)
