"""Shards to batches: the rows of this rank's positions, read ahead by a thread.

All that is random about a row is drawn here, on the CPU, from (seed, role, position): what a step
trains on does not depend on ranks, micro-batches, restarts or devices.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from dbtrain.data import shards
from dbtrain.data.batch import Batch
from dbtrain.data.order import Order, RankSlice
from dbtrain.data.storage import Storage
from dbtrain.runtime import rng

AHEAD = 4  # micro-batches read ahead


class ShardCache:
    """Decoded shards, the least recently used forgotten beyond `limit` bytes."""

    def __init__(self, storage: Storage, limit: float) -> None:
        self.storage = storage
        self.limit = limit
        self.kept: OrderedDict[str, list[shards.Row]] = OrderedDict()
        self.reads: Counter[str] = Counter()

    def rows(self, shard: shards.Shard) -> list[shards.Row]:
        if shard.file not in self.kept:
            self.kept[shard.file] = shards.read(self.storage, shard)
            self.reads[shard.file] += 1
            while len(self.kept) > 1 and self._nbytes() > self.limit:
                self.kept.popitem(last=False)
        self.kept.move_to_end(shard.file)
        return self.kept[shard.file]

    def _nbytes(self) -> int:
        return sum(row.nbytes for rows in self.kept.values() for row in rows)


class Resident:
    """All rows of a rank on its device: sent there once, and gathered by number."""

    def __init__(self, mine: list[shards.Shard]) -> None:
        self.mine = mine
        starts = accumulate((len(shard.keys) for shard in mine), initial=0)
        self.starts = {shard.file: start for shard, start in zip(mine, starts, strict=False)}
        self.tables: dict[str, Tensor] = {}

    def fill(self, cache: ShardCache, device: torch.device) -> None:
        """Read all rows, once."""
        rows = [row.tensors for shard in self.mine for row in cache.rows(shard)]
        self.tables = {name: torch.stack([row[name] for row in rows]).to(device) for name in rows[0]}

    def numbers(self, locations: list[tuple[str, int]]) -> dict[str, Tensor]:
        """What `gather` takes, for rows by (shard file, row)."""
        return {"number": torch.tensor([self.starts[file] + row for file, row in locations])}

    def gather(self, numbers: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: table[numbers["number"]] for name, table in self.tables.items()}


class LatentStream:
    """The endless sequence of this rank's micro-batches, from step `start` on.

    `role_weights`: the roles to draw from and the weight of each role's mean loss. `extra`: what a
    row's description adds to its condition. Raises
    ConfigError out of `next` when a shard is missing or harmed.
    """

    def __init__(
        self,
        storage: Storage,
        manifest: shards.Manifest,
        share: RankSlice,
        role_weights: dict[str, float],
        *,
        seed: int,
        start: int = 0,
        noise_offset: float = 0.0,
        cache_gib: float = 1.0,
        device: torch.device | None = None,
        resident_gib: float = 0.0,
        extra: Callable[[dict[str, Any]], dict[str, Tensor]] | None = None,
    ) -> None:
        self.manifest = manifest
        self.share = share
        self.role_weights = role_weights
        self.seed = seed
        self.start = start
        self.noise_offset = noise_offset
        self.device = device or torch.device("cpu")
        self.extra = extra or (lambda meta: {})
        self.orders = {
            role: Order(manifest.rows(role), share.global_batch, seed, role) for role in role_weights
        }
        self.cache = ShardCache(storage, cache_gib * 2**30)
        mine = [
            manifest.roles[role][shard]
            for role, order in self.orders.items()
            for shard in order.shards_of(share)
        ]
        self.resident = Resident(mine) if sum(s.bytes for s in mine) <= resident_gib * 2**30 else None
        self.ahead: queue.Queue[Batch | BaseException] = queue.Queue(AHEAD)
        self.peeked: Batch | None = None
        self.closed = threading.Event()
        self.thread = threading.Thread(target=self._read_ahead, name="latent stream", daemon=True)
        self.thread.start()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self.peeked:
            batch, self.peeked = self.peeked, None
            return batch
        item = self.ahead.get()
        if isinstance(item, BaseException):
            raise item
        batch = item.to(self.device)
        return replace(batch, stored=self.resident.gather(batch.stored)) if self.resident else batch

    def peek(self) -> Batch:
        """The next micro-batch, which stays the next one."""
        self.peeked = next(self)
        return self.peeked

    def source(self, role: str, position: int) -> str:
        """The picture that the row at a position was made of; reads its shard."""
        at = self.orders[role].locate(position)
        return self.cache.rows(self.manifest.roles[role][at.shard])[at.row].meta["source"]

    def close(self) -> None:
        """End the reading thread."""
        self.closed.set()
        while self.thread.is_alive():
            with contextlib.suppress(queue.Empty):
                self.ahead.get(timeout=0.05)  # make room for a thread that waits to put

    def micro_batch(self, step: int, micro: int) -> Batch:
        """The micro-batch of (step, micro): a pure function of the shards and the seed."""
        positions = [
            (role, position) for role in self.role_weights for position in self.share.positions(step, micro)
        ]
        locations = [self.orders[role].locate(position) for role, position in positions]
        rows = [
            self.cache.rows(self.manifest.roles[role][location.shard])[location.row]
            for (role, _), location in zip(positions, locations, strict=True)
        ]
        draws = [
            rng.sample_noise(self.seed, role, position, self.manifest.latent_shape, self.noise_offset)
            for role, position in positions
        ]
        stored = None
        if self.resident:
            stored = self.resident.numbers([
                (self.manifest.roles[role][location.shard].file, location.row)
                for (role, _), location in zip(positions, locations, strict=True)
            ])  # fmt: skip
        return Batch.collate(
            rows,
            draws,
            [self.extra(row.meta) for row in rows],
            stored=stored,
            weights=[self.role_weights[role] / self.share.global_batch for role, _ in positions],
            positions=[position for _, position in positions],
            seen=sum(
                rng.seed_of(role, position, row.meta["key"]) >> 23  # 40 bits: sums of 2^23 rows fit in 63
                for (role, position), row in zip(positions, rows, strict=True)
            ),
        )

    def _read_ahead(self) -> None:
        step = self.start
        if self.device.type == "cuda":  # a new thread is on GPU 0, and pinning would open a context there
            torch.cuda.set_device(self.device)
        try:
            if self.resident:
                self.resident.fill(self.cache, self.device)
            while not self.closed.is_set():
                for micro in range(self.share.micro_batches):
                    batch = self.micro_batch(step, micro)
                    self.ahead.put(batch.pinned() if self.device.type == "cuda" else batch)
                    if self.closed.is_set():
                        return
                step += 1
        except BaseException as error:  # handed to the thread that trains, which raises it
            self.ahead.put(error)
