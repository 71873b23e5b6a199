"""fleet: train an adapter for each subject of a list, with the base loaded once.

The shards of all are prepared in one pass. Each rank then trains its own subjects, as many at once as it has
slots, so that a step needs no communication. Every subject has a run folder of its own.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil, inf
from pathlib import Path

from dbtrain.config import Config
from dbtrain.evaluate import evaluate
from dbtrain.export import export
from dbtrain.fleet import listing, status
from dbtrain.fleet.listing import Entry
from dbtrain.models.base import Base
from dbtrain.prepare import prepare
from dbtrain.runtime import console, dist, files, lock, preemption
from dbtrain.runtime.errors import ConfigError, Preempted
from dbtrain.runtime.fleet_status import NAME, Status, Subject
from dbtrain.runtime.hashing import content_key
from dbtrain.runtime.lock import Lock
from dbtrain.runtime.run_folder import SCORES, RunFolder
from dbtrain.train import many, memory
from dbtrain.train.inputs import Inputs
from dbtrain.train.slots import Slots

LOOK_S = 5.0  # between two looks at the list, and at where each subject stands
SETTLED_S = 5.0  # a folder whose photos changed later than this is still being filled
MOST = 8  # slots on a CPU: more at once gain little there


@dataclass(frozen=True)
class Order:
    """What a fleet was told to do."""

    config: Path
    subjects: Path
    overrides: Sequence[str]
    slots: int | None = None  # of each rank; None: as many as its memory has room for
    watch: bool = False  # wait for new subjects at the end
    evaluate: bool = False  # score each adapter at the end

    def read(self, settled_s: float = 0.0) -> list[Entry]:
        return listing.read(self.config, self.subjects, self.overrides, settled_s)

    @property
    def folder(self) -> Path:
        return files.expand(listing.shared(self.config, self.overrides).run_dir)


def fleet(order: Order) -> Path:
    """Prepare, train and export every subject that is not done; return the fleet's folder.

    Raises ConfigError that names the subjects that failed, once all others are done. Raises Preempted, with
    everything saved, if there is a reason to stop.
    """
    dist.init()
    folder, stopped = order.folder, ""
    with lock.held(folder, "run_dir"):
        with dist.agreed():
            entries = order.read()
            if not entries:
                raise ConfigError(f"SUBJECTS is '{order.subjects}', in which there are no subjects")
        dist.assert_same(content_key([entry.name for entry in entries]), "the list of subjects")
        work = Work(order, folder, entries, dist.rank(), dist.world())
        work.prepare()
        try:
            with dist.alone():
                work.run()
                if order.evaluate:
                    work.evaluate()
        except Preempted as stop:
            stopped = str(stop)
        with dist.agreed():
            found = work.write_status() if dist.is_main() else None
            if stopped:
                raise Preempted(stopped)
            for line in status.table(found) if found else ():
                console.say(line)
            if found and (failed := [one for one in found.subjects if one.state == "failed"]):
                raise ConfigError(
                    f"{len(failed)} of {len(found.subjects)} subjects failed; the others are done",
                    *(f"{one.name}: {one.problem}" for one in failed),
                )
    return folder


class Work:
    """The subjects of a fleet, from the view of one rank."""

    def __init__(self, order: Order, folder: Path, entries: Sequence[Entry], rank: int, world: int) -> None:
        self.order, self.folder, self.rank, self.world = order, folder, rank, world
        self.entries = {entry.name: entry for entry in entries}
        self.prepared = {entry.name for entry in entries}
        self.reopened: set[str] = set()  # those that are to be trained, even if they were done before
        self.held: dict[str, Lock] = {}  # of the subjects that this rank trains, by name
        self.looked = time.monotonic()
        self.status = Status(0, ())
        self.base: Base | None = None

    def prepare(self) -> None:
        """Make the shards of all subjects, in one pass over all ranks."""
        if self.rank == 0:
            for name in self.entries:
                RunFolder(self.folder / name).failed.unlink(missing_ok=True)  # it may have been mended
        cfgs = [entry.cfg for entry in self.entries.values() if entry.cfg]
        problems = dict(zip(map(_name, cfgs), prepare.prepare_all(cfgs), strict=True))
        for name, entry in self.entries.items():
            if self.rank == 0 and (problem := entry.problem or problems.get(name)):
                self._fail(name, ConfigError(problem))
        dist.gather_json(None)  # all that rank 0 wrote is there

    def run(self) -> None:
        """Train and export until no subject is left. Raises Preempted, with everything saved."""
        runs: list[tuple[Config, Inputs]] = []  # all, as the layout of the slots depends on them
        for entry in self.entries.values():
            with self._failing(entry.name):
                if entry.cfg and not RunFolder(entry.cfg.run_dir).failed.exists():
                    base = runs[0][1].base if runs else None
                    runs.append((entry.cfg, inputs := Inputs.find(entry.cfg, base)))
                    if not inputs.trained_to(entry.cfg):
                        self.reopened.add(entry.name)
        if not any(self._is_open(name) for name in self.entries):
            return
        cfgs, every = zip(*runs, strict=True)
        self.base = every[0].base
        count = self._slots(cfgs[0], self.base)
        self.status = Status(count, ())
        console.say(f"{len(runs)} subjects, {count} at once on each of {self.world} ranks")
        try:
            many.train(Slots(count, cfgs, every), self._take, self._ended, self._look)
        finally:
            for mine in self.held.values():
                mine.release()
            self.held.clear()

    def evaluate(self) -> None:
        """Score this rank's share of the adapters that have no scores yet."""
        cfgs = [entry.cfg for entry in self.entries.values() if entry.cfg]
        for cfg in cfgs[self.rank :: self.world]:
            run = RunFolder(cfg.run_dir)
            if run.done.exists() and not (run.scores / SCORES).exists():
                with console.about(_name(cfg)), self._failing(_name(cfg)):
                    for line in evaluate.evaluate(cfg):
                        console.say(line)

    def _slots(self, cfg: Config, base: Base) -> int:
        """How many subjects this rank trains at once: the same as before, if the fleet has begun."""
        known = Status.read(self.folder).slots if (self.folder / NAME).is_file() else 0
        if known and self.order.slots not in (None, known):
            console.warn(f"slots are {self.order.slots}, were {known}: results differ by the order of sums")
        if chosen := self.order.slots or known:
            return chosen
        has, most = memory.memory_of(dist.device()), MOST
        if has < inf:
            one = memory.predict(cfg, base, "cuda")
            own = one.adapter + one.moments + one.activations + one.gradients
            most = max(1, int((has * (1 - memory.SPARE) - one.needed + own) // own))
        return max(1, min(most, ceil(len(self.entries) / self.world)))

    def _take(self, idle: bool) -> tuple[Config, Inputs] | None:
        """The next subject that is not done, held for this rank; None if there is none.

        `idle`: this rank has nothing else to do, and may wait for new ones.
        """
        while True:
            for entry in self._in_turn():
                name, cfg = entry.name, entry.cfg
                if cfg is None or not self._is_open(name):
                    continue
                path = RunFolder(cfg.run_dir).path
                if lock.holder(path) or not (mine := Lock.take(path)):
                    continue  # another rank has it
                self.held[name] = mine
                with console.about(name), self._failing(name):
                    if name not in self.prepared:
                        self.prepared.add(name)
                        if problem := prepare.prepare_all([cfg])[0]:
                            raise ConfigError(problem)
                    inputs = Inputs.find(cfg, self.base)
                    if not inputs.trained_to(cfg):
                        return cfg, inputs
                    self._ended(cfg, None)
            if not (idle and self.order.watch):
                return None
            preemption.check()
            time.sleep(1.0)
            self._look()

    def _in_turn(self) -> list[Entry]:
        """The subjects of this rank first, then those of others, which may be behind."""
        every = list(self.entries.values())
        return sorted(every, key=lambda entry: every.index(entry) % self.world != self.rank)

    def _is_open(self, name: str) -> bool:
        """Whether a subject is neither done, nor failed, nor trained by this rank."""
        run = RunFolder(self.folder / name)
        done = run.done.exists() and name not in self.reopened
        return not (name in self.held or run.failed.exists() or done)

    def _ended(self, cfg: Config, problem: ConfigError | None) -> None:
        """Export a subject that is trained, or note its problem; another rank may have it then."""
        if problem:
            self._fail(_name(cfg), problem)
        else:
            export.finish(cfg, held=True)
        self.reopened.discard(_name(cfg))
        if mine := self.held.pop(_name(cfg), None):
            mine.release()

    @contextmanager
    def _failing(self, name: str) -> Iterator[None]:
        """In the block, a problem is that of one subject."""
        try:
            yield
        except ConfigError as problem:
            self._fail(name, problem)
            if mine := self.held.pop(name, None):
                mine.release()

    def _fail(self, name: str, problem: ConfigError) -> None:
        text = "; ".join(problem.problems)
        console.warn(f"{name} failed: {text}")
        files.write_atomically(RunFolder(self.folder / name).failed, text + "\n")

    def _look(self) -> None:
        """From time to time, look for new subjects, and write where each stands."""
        if time.monotonic() < self.looked + LOOK_S:
            return
        self.looked = time.monotonic()
        try:
            found = self.order.read(SETTLED_S)
        except ConfigError as problem:  # the list is being edited
            console.warn(str(problem))
            return
        for entry in found:
            if entry.name not in self.entries:
                self.entries[entry.name] = entry
                if entry.problem:
                    self._fail(entry.name, ConfigError(entry.problem))
        if self.rank == 0:
            self.write_status()

    def write_status(self) -> Status:
        """Write where each subject stands."""
        before = self.status.subjects
        if not before and (self.folder / NAME).is_file():
            before = Status.read(self.folder).subjects
        known = {one.name: one for one in before}
        subjects = []
        for name, entry in self.entries.items():
            one = known.get(name) or Subject(name, name, entry.cfg.train.steps if entry.cfg else 0)
            subjects.append(one.changed(**status.found(self.folder / name)))
        self.status = Status(self.status.slots, tuple(subjects))
        self.status.write(self.folder)
        return self.status


def _name(cfg: Config) -> str:
    return RunFolder(cfg.run_dir).path.name
