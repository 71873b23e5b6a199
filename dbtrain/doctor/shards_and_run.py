"""Shards and checkpoints of earlier runs, and whether the ranks can share a batch."""

from __future__ import annotations

from collections.abc import Iterator

from dbtrain.data import sequence
from dbtrain.data import shards as stored
from dbtrain.data.order import RankSlice
from dbtrain.data.storage import Storage
from dbtrain.doctor.case import Case, Finding, error, findings_of, ok, problems_of, warning
from dbtrain.doctor.gpu import ranks_of
from dbtrain.evaluate import scoring
from dbtrain.prepare import plan, subjects
from dbtrain.runtime import files, lock
from dbtrain.runtime.errors import ConfigError
from dbtrain.runtime.run_folder import RunFolder, read_state
from dbtrain.train import fingerprint

REMAKE = f"{stored.CURE} (`dbtrain run` does it automatically)"
MOST_RANKS = 64  # to suggest


def shards(case: Case) -> Iterator[Finding]:
    """Whether the shards are complete and were made for this config."""
    cfg = case.cfg
    storage = Storage(cfg.data.shards, retries=0)
    case.manifest = None
    if storage.folder is None:
        yield ok(f"{cfg.data.shards} is not on this machine, so it was not read")
        if cfg.prepare:
            yield warning("prepare can only write to a local folder, so `dbtrain run` would fail",
                          "use `dbtrain train`, or prepare locally and copy the shards there")  # fmt: skip
        return
    if cfg.prepare and not storage.has(stored.MANIFEST):
        yield ok(f"none in {storage.folder} yet: prepare creates them")
        return
    if busy := lock.holder(storage.folder):
        yield from _busy("data.shards", *busy)
    manifest = case.manifest = stored.Manifest.read(storage)
    found = problems_of(lambda: manifest.check_files(storage), REMAKE)
    found += problems_of(lambda: plan.check(cfg, case.base, manifest), REMAKE)
    yield from (error(one.what, REMAKE) for one in found)
    if not found:
        counts = ", ".join(f"{sum(manifest.rows(role))} {role} rows" for role in manifest.roles)
        yield ok(f"{counts} in {len(manifest.shards)} shards, complete and made for this config")


def batch(case: Case) -> Iterator[Finding]:
    """Whether the ranks can share a batch, and how much data each of them reads."""
    train = case.cfg.train
    ranks = ranks_of(case)
    try:
        share = RankSlice(train.global_batch, train.micro_batch, 0, ranks)
    except ConfigError as problem:
        for one in findings_of(problem):
            yield error(one.what, _fitting(train.global_batch, train.micro_batch, ranks))
        return
    yield ok(f"{train.global_batch} images over {ranks} rank{'s' * (ranks > 1)}: {share.micro_batches} x "
             f"{train.micro_batch} on each")  # fmt: skip
    if ranks > 1 and case.knows("manifest") and case.manifest:
        yield from _reading(case, share)


def _fitting(images: int, micro: int, ranks: int) -> str:
    """A hint with the nearest batch sizes and numbers of ranks that fit."""
    step = ranks * micro
    batches = [value for value in (images // step * step, images // step * step + step) if value]
    counts = [count for count in range(1, MOST_RANKS) if images % (count * micro) == 0]
    near = sorted(sorted(counts, key=lambda count: abs(count - ranks))[:2])
    ranks_fit = " or ".join(map(str, near)) + " rank" + "s" * (near != [1])
    return f"use train.global_batch={' or '.join(map(str, batches))}, or {ranks_fit}"


def _reading(case: Case, share: RankSlice) -> Iterator[Finding]:
    """More ranks than shards read the same shards, which is slow only if these do not stay in memory."""
    cfg, manifest = case.cfg, case.manifest
    assert manifest is not None
    roles = [(role, manifest.rows(role)) for role in stored.HELD_OUT if role in manifest.roles]
    fewest = min(len(rows) for _, rows in roles)
    if fewest >= share.world:
        return
    total, weights = sum(shard.bytes for shard in manifest.shards), subjects.weights(cfg)
    orders = sequence.orders(
        manifest, {role: role for role, _ in roles}, weights, share.global_batch, cfg.seed
    )
    mine = sum(
        manifest.roles[role][number].bytes
        for role, order in orders.items()
        for number in order.shards_of(share)
    )
    part, whole = files.size_text(mine), files.size_text(total)
    text = f"{share.world} ranks, but {fewest} shards: rank 0 reads {part} of {whole}"
    if mine > cfg.data.cache_gib * 2**30:
        yield warning(
            f"{text}, every epoch", f"raise data.cache_gib above {mine / 2**30:.1f}, or use fewer ranks"
        )
    else:
        yield Finding("", f"{text}, once, as it stays in memory (data.cache_gib)")


def stopping(case: Case) -> Iterator[Finding]:
    """What a run that stops at its best goes by, and whether it can stop before its last step."""
    cfg, train = case.cfg, case.cfg.train
    if train.stop != "best":
        return
    holds_out = bool(cfg.prepare and cfg.prepare.held_out)
    if case.knows("manifest") and case.manifest:
        holds_out = stored.HELD_OUT["instance"] in case.manifest.roles
    chosen_by = scoring.of(cfg, holds_out).said
    least = (train.patience + 1) * cfg.validation.every
    if least >= train.steps:
        yield warning(
            f"train.stop is best, but that takes until step {least} at least ({train.patience} validations "
            f"without improvement, {cfg.validation.every} steps apart), and train.steps is {train.steps}",
            "use a smaller validation.every or train.patience, or more train.steps",
        )
    if cfg.optim.schedule != "constant":
        yield warning(
            f"train.stop is best, but optim.schedule is {cfg.optim.schedule}, which is slow only near "
            f"train.steps ({train.steps})", "use optim.schedule=constant",
        )  # fmt: skip
    yield ok(f"at the best {chosen_by}; at step {train.steps} at the latest")


def run_folder(case: Case) -> Iterator[Finding]:
    """Whether the run folder is free, and whether its newest checkpoint belongs to this run."""
    run = RunFolder(case.cfg.run_dir)
    folder = run.path
    if folder.exists() and not folder.is_dir():
        yield error(f"run_dir: '{case.cfg.run_dir}' is not a directory", "use another run_dir")
        return
    if busy := lock.holder(folder):
        yield from _busy("run_dir", *busy)
    for path in reversed(run.checkpoints()):
        try:
            state = read_state(path)
        except ConfigError as problem:
            yield from findings_of(
                problem, "nothing to do: the run moves it aside and uses the one before", "warning"
            )
            continue
        if case.manifest is None:
            yield warning(f"{path} exists, but the shards do not: unknown whether the run can resume",
                          "run `dbtrain prepare`, then doctor again")  # fmt: skip
            return
        ours = fingerprint.of(case.cfg, case.base, case.manifest)
        fingerprint.check_continues(path, state, ours, case.cfg.train.steps)
        stopped = case.cfg.train.stop == "best" and (run.read_best() or {}).get("stopped")
        more = "train.patience" if stopped else "train.steps"
        if stopped or state["step"] == case.cfg.train.steps:
            yield warning(f"{path}: already trained to step {state['step']}, nothing left to train",
                          f"use another run_dir, or raise {more}")  # fmt: skip
        else:
            yield ok(f"{folder}: resumes from step {state['step']}")
        return
    if run.done.exists():
        yield warning(f"{folder} has DONE of an earlier run, but no checkpoint", "use another run_dir")
    yield ok(f"{folder}: {'no checkpoint yet' if folder.exists() else 'does not exist yet'}")


def _busy(what: str, owner: str, sure: bool) -> Iterator[Finding]:
    cure = "wait for it to end, or use another folder"
    if sure:
        yield error(f"{what} is in use by {owner}", cure)
    else:
        yield warning(f"{what} is in use by {owner}, if it is still running", cure)
