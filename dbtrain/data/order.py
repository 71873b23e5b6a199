"""Which image a position trains on: pure functions of (seed, role, position), no state, no torch.

Every row that is ever trained on has a *position*: its place in the endless global sequence of
instance (or class) rows. Step s uses positions s * global_batch ... (s + 1) * global_batch - 1.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import NamedTuple

from dbtrain.runtime.errors import ConfigError
from dbtrain.runtime.hashing import shuffled

WINDOW = 1024  # rows shuffled together: whole small sets, and what a shuffle buffer would hold of large ones
UNEVEN = 32  # columns may differ by 1/32 of their rows: no image is seen 3% more often than another


class RowLocation(NamedTuple):
    """Where a row is stored, and in which pass over its column it is read."""

    epoch: int
    shard: int
    row: int


@dataclass(frozen=True)
class RankSlice:
    """The slots of every global batch that one rank carries: whole micro-batches, side by side."""

    global_batch: int
    micro_batch: int
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if self.global_batch % (self.world * self.micro_batch):
            raise ConfigError(
                f"train.global_batch is {self.global_batch}, which {self.world} ranks x "
                f"train.micro_batch {self.micro_batch} cannot share; "
                f"use a multiple of {self.world * self.micro_batch}"
            )

    @property
    def micro_batches(self) -> int:
        """Forward passes of this rank in one step."""
        return self.global_batch // (self.world * self.micro_batch)

    def positions(self, step: int, micro: int) -> range:
        """Positions of one micro-batch of this rank."""
        slot = (self.rank * self.micro_batches + micro) * self.micro_batch
        first = step * self.global_batch + slot
        return range(first, first + self.micro_batch)


@dataclass(frozen=True)
class Order:
    """Position -> place, for the rows of one role ("instance" or "class").

    The shards are dealt to *columns*; a column owns some slots of every global batch, so that a
    rank reads the shards of its own columns only. A column passes over its rows epoch by epoch,
    each row once an epoch: shards in a new order each time, rows shuffled within windows of
    whole shards, so that a window is all that must be in memory.
    """

    shard_rows: tuple[int, ...]
    global_batch: int
    seed: int
    role: str

    @cached_property
    def columns(self) -> int:
        """Largest divisor of the global batch that leaves the columns (nearly) equally long."""
        for count in range(min(self.global_batch, len(self.shard_rows)), 1, -1):
            rows = [sum(self.shard_rows[column::count]) for column in range(count)]
            even = max(rows) - min(rows) <= min(rows) // UNEVEN
            if self.global_batch % count == 0 and even:
                return count
        return 1

    def shards_of(self, share: RankSlice) -> list[int]:
        """The shards that a rank reads: those of the columns that own its slots."""
        slots = self.global_batch // self.columns
        mine = {
            share_slot // slots
            for micro in range(share.micro_batches)
            for share_slot in share.positions(0, micro)
        }
        return [shard for shard in range(len(self.shard_rows)) if shard % self.columns in mine]

    def locate(self, position: int) -> RowLocation:
        """The place of one position. Every rank that asks gets the same answer."""
        slots = self.global_batch // self.columns
        step, slot = divmod(position, self.global_batch)
        column = slot // slots
        shards = range(column, len(self.shard_rows), self.columns)
        rows = sum(self.shard_rows[column :: self.columns])
        epoch, index = divmod(step * slots + slot % slots, rows)
        windows, starts = _windows(self, shards, epoch)
        window = bisect_right(starts, index) - 1
        return RowLocation(epoch, *_shuffled_window(self, windows[window], epoch)[index - starts[window]])


@lru_cache(maxsize=1024)  # more than the columns of a large batch, each of which comes back every step
def _windows(order: Order, shards: range, epoch: int) -> tuple[list[tuple[int, ...]], list[int]]:
    """This epoch's windows, as shard numbers, and the index of the first row of each."""
    turns = shuffled(len(shards), order.seed, order.role, "shards", shards.start, epoch)
    each = max(1, WINDOW // max(order.shard_rows[shard] for shard in shards))
    mixed = [shards[turn] for turn in turns]
    windows = [tuple(mixed[i : i + each]) for i in range(0, len(mixed), each)]
    rows = [sum(order.shard_rows[shard] for shard in window) for window in windows]
    return windows, [0, *accumulate(rows)][:-1]


@lru_cache(maxsize=1024)
def _shuffled_window(order: Order, window: tuple[int, ...], epoch: int) -> list[tuple[int, int]]:
    rows = [(shard, row) for shard in window for row in range(order.shard_rows[shard])]
    turns = shuffled(len(rows), order.seed, order.role, "rows", window[0], epoch)
    return [rows[turn] for turn in turns]
