"""The order of training: which image is at which position, as pure functions of (seed, role, position).

A *position* is a row's index in the endless global sequence of instance (or class) rows. Step s trains on
positions s * global_batch ... (s + 1) * global_batch - 1.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import NamedTuple

from dbtrain.runtime.errors import ConfigError
from dbtrain.runtime.hashing import shuffled

WINDOW = 1024  # rows that are shuffled together, as in a shuffle buffer
CYCLE = 1000  # most turns of several subjects before they repeat
UNEVEN = 32  # columns differ by at most 1/32 of their rows: images are seen about equally often


class RowLocation(NamedTuple):
    """Where a row is stored, and the epoch of its column."""

    epoch: int
    shard: int
    row: int


@dataclass(frozen=True)
class RankSlice:
    """The slots of one rank in every global batch: consecutive whole micro-batches."""

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
        """Micro-batches of this rank in one step."""
        return self.global_batch // (self.world * self.micro_batch)

    def positions(self, step: int, micro: int) -> range:
        """The positions of one micro-batch of this rank."""
        slot = (self.rank * self.micro_batches + micro) * self.micro_batch
        first = step * self.global_batch + slot
        return range(first, first + self.micro_batch)


@dataclass(frozen=True)
class Order:
    """Position -> location, for the rows of one role ("instance" or "class").

    `shard_rows`: how many rows an epoch has of each shard; `repeats`: how often each of a shard's rows is
    among them, () for once. The shards are split into *columns*. A column owns some slots of every global
    batch, so a rank reads only the shards of its own columns. In every epoch a column reads each of its rows
    once, or as often as it repeats: shards in a new order, rows shuffled within windows of whole shards. So
    only one window has to be in memory.
    """

    shard_rows: tuple[int, ...]
    global_batch: int
    seed: int
    role: str
    repeats: tuple[tuple[int, ...], ...] = field(default=(), hash=False)  # hashed in every `locate`: too long

    @cached_property
    def columns(self) -> int:
        """The largest divisor of the global batch that gives columns of about equal length."""
        for count in range(min(self.global_batch, len(self.shard_rows)), 1, -1):
            rows = [sum(self.shard_rows[column::count]) for column in range(count)]
            even = max(rows) - min(rows) <= min(rows) // UNEVEN
            if self.global_batch % count == 0 and even:
                return count
        return 1

    def shards_of(self, share: RankSlice) -> list[int]:
        """The shards that a rank reads."""
        slots = self.global_batch // self.columns
        columns = {
            slot // slots for micro in range(share.micro_batches) for slot in share.positions(0, micro)
        }
        return [shard for shard in range(len(self.shard_rows)) if shard % self.columns in columns]

    def locate(self, position: int) -> RowLocation:
        """The location of a position, the same on every rank."""
        slots = self.global_batch // self.columns
        step, slot = divmod(position, self.global_batch)
        column = slot // slots
        shards = range(column, len(self.shard_rows), self.columns)
        rows = sum(self.shard_rows[column :: self.columns])
        epoch, index = divmod(step * slots + slot % slots, rows)
        windows, starts = _windows(self, shards, epoch)
        window = bisect_right(starts, index) - 1
        return RowLocation(epoch, *_shuffled_window(self, windows[window], epoch)[index - starts[window]])


class Turns:
    """Position -> location, for several orders in turn: of subjects, of their classes, or of sizes.

    They are spread evenly: of any n blocks of positions in a row, each has its share by weight, give or take
    one.
    """

    def __init__(
        self,
        parts: Sequence[Sequence[int]],
        orders: Sequence[Order | Turns],
        weights: Sequence[float],
        block: int = 1,
    ) -> None:
        """`parts`: the shards of each order; `weights`: how often each has a block of `block` positions."""
        self.parts, self.orders, self.block = parts, orders, block
        # A cycle in which each has its turns at the same distances.
        shares = [weight / sum(weights) for weight in weights]
        length = next((n for n in range(1, CYCLE) if all(_is_whole(share * n) for share in shares)), CYCLE)
        self.counts = [max(1, round(share * length)) for share in shares]
        turns = [((2 * turn + 1) / (2 * count), number, turn)
                 for number, count in enumerate(self.counts) for turn in range(count)]  # fmt: skip
        self.cycle = [(number, turn) for _, number, turn in sorted(turns)]

    def shards_of(self, share: RankSlice) -> list[int]:
        """The shards that a rank reads: all of them, unless a turn is a whole step."""
        whole = self.block == share.global_batch
        pairs = list(zip(self.parts, self.orders, strict=True))
        mine = [[part[shard] for shard in order.shards_of(share)] if whole else part for part, order in pairs]
        return sorted(shard for part in mine for shard in part)

    def locate(self, position: int) -> RowLocation:
        """The location of a position, the same on every rank."""
        number_of_block, within = divmod(position, self.block)
        cycles, place = divmod(number_of_block, len(self.cycle))
        number, turn = self.cycle[place]
        found = self.orders[number].locate((cycles * self.counts[number] + turn) * self.block + within)
        return found._replace(shard=self.parts[number][found.shard])


def _is_whole(value: float) -> bool:
    return value >= 0.5 and abs(value - round(value)) < 1e-6


@lru_cache(maxsize=1024)  # more than the columns of a large batch, all of which are used in every step
def _windows(order: Order, shards: range, epoch: int) -> tuple[list[tuple[int, ...]], list[int]]:
    """This epoch's windows, as shard numbers, and the index of the first row of each."""
    permutation = shuffled(len(shards), order.seed, order.role, "shards", shards.start, epoch)
    size = max(1, WINDOW // max(order.shard_rows[shard] for shard in shards))
    windows = [tuple(shards[i] for i in permutation[start : start + size])
               for start in range(0, len(shards), size)]  # fmt: skip
    rows = [sum(order.shard_rows[shard] for shard in window) for window in windows]
    return windows, [0, *accumulate(rows)][:-1]


@lru_cache(maxsize=1024)
def _shuffled_window(order: Order, window: tuple[int, ...], epoch: int) -> list[tuple[int, int]]:
    """The (shard, row) of a window, in the order of this epoch."""
    rows = [
        place
        for shard in window
        for row, count in enumerate((order.repeats and order.repeats[shard]) or [1] * order.shard_rows[shard])
        for place in [(shard, row)] * count
    ]
    return [rows[i] for i in shuffled(len(rows), order.seed, order.role, "rows", window[0], epoch)]
