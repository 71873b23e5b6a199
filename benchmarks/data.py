"""Shards to batches: reading and verifying, samples a second of one core, bytes read by each of many ranks.

    python -m benchmarks.data

Seconds are CPU seconds of one thread. *Read amplification* is what a rank reads in one pass over the data
over its share of all bytes: 1 is no byte too much. The data wait is that of real training runs of `tiny`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean

from benchmarks import bases, common, job
from benchmarks.common import Measure, Result, Row
from dbtrain.data import shards
from dbtrain.data.dataloader import LatentStream
from dbtrain.data.order import RankSlice
from dbtrain.data.storage import Storage
from dbtrain.models.base import Base
from dbtrain.runtime import console

ROWS, MANY = 256, 1024  # images of the shards that are timed, and of those that ranks share
RANKS = (1, 2, 8, 32, 64, 128)
BATCHES = 64  # micro-batches that are timed


def run(args: argparse.Namespace, work: Path) -> Result:
    timed, ranks = ROWS, RANKS
    if args.smoke:
        timed, ranks, args.repeats = 32, RANKS[:2], 1
    large, small = _shards("sd15", work, timed), _shards("tiny", work, timed if args.smoke else MANY)
    rows = []
    with console.bar(3 * args.repeats + len(ranks), "data", "part") as bar:
        for name, place in (("64 x 64 latents, as of 512 px", large), ("16 x 16 latents, as of tiny", small)):
            manifest, read, batch = shards.Manifest.read(place), [], []
            for _ in range(args.repeats):
                read.append(_cpu_s(partial(_read_all, place, manifest)))
                batch.append(_batches(place, manifest, BATCHES))
                bar.update()
            rows.append(_speed(name, manifest, read, batch, BATCHES))
        for world in ranks:
            rows.append(_amplification(world, small))
            bar.update()
        spec = job.Spec("tiny", str(work), 4, windows=1, window=2 if args.smoke else 20, inline=args.smoke)
        job.make(spec)
        (reports,) = job.rounds([spec], args.repeats, bar)
    if problem := reports[-1].problem:
        raise SystemExit(f"error: {problem}")
    waits = [100 * window["wait_s"] / window["wall_s"] for report in reports for window in report.windows]
    rows.append(Row(label="training tiny, batch 4", measures={"data wait": Measure.of("%", waits)}))
    return common.result(args, "data", "cpu", rows)


def _shards(model: str, work: Path, rows: int) -> Storage:
    with bases.without_weights():
        base = Base.find(bases.model(model, work))
    return Storage(str(bases.write_shards(work / f"data-{model}", model, base, rows, ("instance",))))


def _read_all(place: Storage, manifest: shards.Manifest) -> None:
    for shard in manifest.roles["instance"]:
        shards.read(place, shard)


def _cpu_s(work: Callable[[], object]) -> float:
    before = time.thread_time()
    work()
    return time.thread_time() - before


def _stream(place: Storage, share: RankSlice) -> LatentStream:
    return LatentStream(place, shards.Manifest.read(place), share, {"instance": 1.0}, seed=0)


def _batches(place: Storage, manifest: shards.Manifest, count: int) -> float:
    """CPU seconds of the main thread for `count` micro-batches of 4, of shards that are in memory."""
    stream = _stream(place, RankSlice(4, 4))
    stream.close()  # its thread reads ahead, and would take part
    for shard in manifest.roles["instance"]:
        stream.cache.rows(shard)
    return _cpu_s(lambda: [stream.micro_batch(step, 0) for step in range(count)])


def _speed(name: str, manifest: shards.Manifest, read: list[float], batch: list[float], batches: int) -> Row:
    every = manifest.roles["instance"]
    mib = sum(shard.bytes for shard in every) / 2**20
    return Row(
        label=name,
        measures={
            "read and verify": Measure.of("shards per CPU s", [len(every) / s for s in read]),
            "read and verify, MiB": Measure.of("MiB per CPU s", [mib / s for s in read]),
            "micro-batches": Measure.of("samples per CPU s", [4 * batches / s for s in batch]),
        },
        counts={"shards": len(every), "MiB of a shard": mib / len(every)},
    )  # fmt: skip


def _amplification(world: int, place: Storage) -> Row:
    """One pass over all rows, each of `world` ranks with its own stream, one after another."""
    manifest = shards.Manifest.read(place)
    every = {shard.file: shard.bytes for shard in manifest.roles["instance"]}
    rows = sum(manifest.rows("instance"))
    share = sum(every.values()) / world
    ratios = []
    for rank in range(world):
        stream = _stream(place, RankSlice(world, 1, rank, world))
        for _ in range(rows // world):
            next(stream)
        stream.close()
        ratios.append(sum(every[file] * times for file, times in stream.cache.reads.items()) / share)
    counts: dict[str, float | int | str | None] = {
        "amplification, mean": mean(ratios),
        "amplification, most": max(ratios),
    }
    words = f"{world} rank{'s' if world > 1 else ''}, {len(every)} shards"
    return Row(label=words, config={"ranks": world}, counts=counts)


if __name__ == "__main__":
    common.main(run, common.parser(__doc__))
