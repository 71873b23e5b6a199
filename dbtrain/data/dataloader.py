"""From shards to batches: a thread reads the rows of this rank's positions ahead of training.

The random numbers of a row are sampled here, on the CPU, from (seed, role, position). So what a step
trains on does not depend on the number of ranks, micro-batches, restarts or the device.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from dbtrain.data import sequence, shards
from dbtrain.data.batch import Batch
from dbtrain.data.order import RankSlice
from dbtrain.data.sizes import Size
from dbtrain.data.storage import Storage
from dbtrain.runtime import rng

AHEAD = 4  # micro-batches read ahead


class ShardCache:
    """An LRU cache of decoded shards, of at most `limit` bytes, that threads can share."""

    def __init__(
        self, storage: Storage, limit: float, manifest: shards.Manifest, stored: Collection[str]
    ) -> None:
        """`stored`: the names of each row's tensors."""
        self.storage, self.manifest, self.stored = storage, manifest, stored
        self.limit = limit
        self.shards: OrderedDict[str, list[shards.Row]] = OrderedDict()
        self.reads: Counter[str] = Counter()
        self.busy = threading.Lock()

    def rows(self, shard: shards.Shard) -> list[shards.Row]:
        with self.busy:
            if shard.file not in self.shards:
                rows = shards.read(self.storage, shard, self.manifest, self.stored)
                if self.manifest.has_masks:
                    rows = [row.with_mask() for row in rows]
                self.shards[shard.file] = rows
                self.reads[shard.file] += 1
                while len(self.shards) > 1 and self._nbytes() > self.limit:
                    self.shards.popitem(last=False)
            self.shards.move_to_end(shard.file)
            return self.shards[shard.file]

    def _nbytes(self) -> int:
        return sum(row.nbytes for rows in self.shards.values() for row in rows)


class Resident:
    """All rows of a rank on its device, copied there once and gathered by index: a table for each shape."""

    def __init__(self, mine: list[shards.Shard], manifest: shards.Manifest) -> None:
        self.mine: dict[tuple[int, ...], list[shards.Shard]] = {}
        for shard in mine:
            self.mine.setdefault(manifest.shape(manifest.size(shard)), []).append(shard)
        self.starts: dict[str, int] = {}
        for group in self.mine.values():
            starts = accumulate((len(shard.keys) for shard in group), initial=0)
            self.starts |= {shard.file: start for shard, start in zip(group, starts, strict=False)}
        self.tables: dict[tuple[int, ...], dict[str, Tensor]] = {}

    def fill(self, cache: ShardCache, device: torch.device) -> None:
        """Read all rows and copy them to `device`."""
        for shape, group in self.mine.items():
            rows = [row.tensors for shard in group for row in cache.rows(shard)]
            self.tables[shape] = {
                name: torch.stack([row[name] for row in rows]).to(device) for name in rows[0]
            }

    def index(self, locations: list[tuple[shards.Shard, int]]) -> dict[str, Tensor]:
        """The argument of `gather` for these (shard, row)."""
        return {"index": torch.tensor([self.starts[shard.file] + row for shard, row in locations])}

    def gather(self, batch: Batch) -> Batch:
        """The batch with the rows that it has the index of."""
        tables, index = self.tables[tuple(batch.noise.shape[1:])], batch.stored["index"]
        return replace(batch, stored={name: table[index] for name, table in tables.items()})


class LatentStream:
    """The endless sequence of this rank's micro-batches, from step `start` on.

    `role_weights`: the roles to train on and the weight of each role's mean loss. `weights`: how often
    each of several subjects, or of their classes, is trained on, by role. `extra`: (a row's description,
    its size) -> further conditions. `stored`: the names of each row's tensors. `class_prompts`: class rows
    are instance rows with these prompts, the index of one for each subject, in an order of their own; every
    second step, they are redrawn. `preserved`: the base's predictions for class rows are their targets.
    `background`: of instance rows, see `Batch`. `prompt_dropout`: the share of rows that get the empty
    prompt, which the shards then have. `next` raises ConfigError if a shard is missing or damaged.
    """

    def __init__(
        self,
        storage: Storage,
        manifest: shards.Manifest,
        share: RankSlice,
        role_weights: dict[str, float],
        *,
        seed: int,
        weights: Mapping[str, Sequence[float]] | None = None,
        start: int = 0,
        noise_offset: float = 0.0,
        prompt_dropout: float = 0.0,
        cache_gib: float = 1.0,
        device: torch.device | None = None,
        resident_gib: float = 0.0,
        extra: Callable[[dict[str, Any], Size], dict[str, Tensor]] | None = None,
        stored: Collection[str] = (),
        class_prompts: Sequence[int] | None = None,
        preserved: bool = False,
        background: float = 1.0,
    ) -> None:
        self.background = {"instance": background}
        self.class_prompts, self.preserved = class_prompts, preserved
        self.images = {role: "instance" if class_prompts else role for role in role_weights}
        self.manifest = manifest
        self.share = share
        self.role_weights = role_weights
        self.seed = seed
        self.start = start
        self.noise_offset = noise_offset
        self.prompt_dropout = prompt_dropout
        self.device = device or torch.device("cpu")
        self.extra = extra or (lambda meta, size: {})
        self.orders = sequence.orders(manifest, self.images, weights or {}, share.global_batch, seed)
        # The roles of each batch: those whose images have the same sizes.
        self.together = [[role] for role in role_weights]
        if not sequence.apart(manifest, self.images):
            self.together = [list(role_weights)]
        self.cache = ShardCache(storage, cache_gib * 2**30, manifest, stored)
        mine = {
            shard.file: shard
            for role, order in self.orders.items()
            for shard in (manifest.roles[self.images[role]][number] for number in order.shards_of(share))
        }
        size = sum(shard.bytes for shard in mine.values())
        self.resident = Resident(list(mine.values()), manifest) if size <= resident_gib * 2**30 else None
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
        return self.resident.gather(batch) if self.resident else batch

    def peek(self) -> Batch:
        """The next micro-batch, without consuming it."""
        self.peeked = next(self)
        return self.peeked

    def source(self, role: str, position: int) -> str:
        """The image from which the row at a position was made. Reads its shard."""
        shard, row = self._locate(role, position)
        return self.cache.rows(shard)[row].meta["source"]

    def close(self) -> None:
        """Stop the reading thread."""
        self.closed.set()
        while self.thread.is_alive():
            with contextlib.suppress(queue.Empty):
                self.ahead.get(timeout=0.05)  # unblocks a thread that waits to put a batch

    @property
    def batches(self) -> int:
        """How many batches a step has on this rank."""
        return self.share.micro_batches * len(self.together)

    def micro_batch(self, step: int, number: int) -> Batch:
        """A micro-batch of a step: a pure function of the shards and the seed."""
        micro, part = divmod(number, len(self.together))
        roles = self.together[part]
        positions = [(role, position) for role in roles for position in self.share.positions(step, micro)]
        locations = [self._locate(role, position) for role, position in positions]
        rows = [self.cache.rows(shard)[row] for shard, row in locations]
        size = self.manifest.size(locations[0][0])  # of all
        shape = self.manifest.shape(size)
        redraws = bool(self.class_prompts) and step % 2 == 1
        return Batch.collate(
            rows,
            [self._draw(role, position, shape, redraws) for role, position in positions],
            [self.extra(row.meta, size) for row in rows],
            stored=self.resident.index(locations) if self.resident else None,
            weights=[
                self.role_weights[role] / self.share.global_batch * self._factor(role, *place)
                for (role, _), place in zip(positions, locations, strict=True)
            ],
            background=[self.background.get(role, 1.0) for role, _ in positions],
            positions=[position for _, position in positions],
            prompts=[
                self._prompt(*place, shard, row)
                for place, (shard, _), row in zip(positions, locations, rows, strict=True)
            ],
            preserved=sum(role == "class" for role, _ in positions) if self.preserved else 0,
            redraws=redraws,
            first_role=list(self.role_weights).index(roles[0]),
            seen=sum(
                rng.seed_of(role, position, row.meta["key"]) >> 23  # 40 bits; a sum of 2^23 rows has 63
                for (role, position), row in zip(positions, rows, strict=True)
            ),
        )

    def _draw(self, role: str, position: int, shape: tuple[int, ...], redraws: bool) -> rng.RowNoise:
        """The random numbers of the row at a position.

        Photos that preserve the class get the upper half of the noise levels, or the lower half if the base
        redraws them.
        """
        draw = rng.sample_noise(self.seed, role, position, shape, self.noise_offset)
        if self.class_prompts and role == "class":
            return draw._replace(u=(draw.u + (not redraws)) / 2)
        return draw

    def _prompt(self, role: str, position: int, shard: shards.Shard, row: shards.Row) -> int:
        """The prompt of the row at a position: one of its own, its subject's class's, or the empty one."""
        share = self.prompt_dropout
        if share and rng.seed_of(self.seed, "prompt dropout", role, position) < share * 2**63:
            return self.manifest.prompts.texts.index(shards.EMPTY)
        if self.class_prompts and role == "class":
            return self.class_prompts[shard.part]
        several = row.meta.get("prompts") or [row.meta["prompt"]]
        return several[rng.seed_of(self.seed, "caption", role, position) % len(several)]

    def _factor(self, role: str, shard: shards.Shard, row: int) -> float:
        """The factor of a row's loss. Rows of the class count alike, also if they are the photos."""
        return shard.emphasis(row).weight if role == "instance" else 1.0

    def _locate(self, role: str, position: int) -> tuple[shards.Shard, int]:
        location = self.orders[role].locate(position)
        return self.manifest.roles[self.images[role]][location.shard], location.row

    def _read_ahead(self) -> None:
        step = self.start
        if self.device.type == "cuda":  # threads start on GPU 0, and pinning would open a context there
            torch.cuda.set_device(self.device)
        try:
            if self.resident:
                self.resident.fill(self.cache, self.device)
            while not self.closed.is_set():
                for number in range(self.batches):
                    batch = self.micro_batch(step, number)
                    self.ahead.put(batch.pinned() if self.device.type == "cuda" else batch)
                    if self.closed.is_set():
                        return
                step += 1
        except BaseException as error:  # the training thread raises it
            self.ahead.put(error)
