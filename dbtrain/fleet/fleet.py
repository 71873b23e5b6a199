"""fleet: train an adapter for each subject of a list, with the base loaded once.

The shards of all are prepared in one pass. Each rank then trains its own subjects, as many at once as it has
slots, so that a step needs no communication. Every subject has a run folder of its own.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from math import ceil, inf
from pathlib import Path

from dbtrain.config import Config
from dbtrain.evaluate import evaluate
from dbtrain.export import export, hub
from dbtrain.fleet import listing, status
from dbtrain.fleet.listing import Entry
from dbtrain.models.base import Base
from dbtrain.prepare import prepare
from dbtrain.runtime import console, dist, files, lock, preemption
from dbtrain.runtime.errors import ConfigError, Preempted
from dbtrain.runtime.fleet_status import Status, Subject
from dbtrain.runtime.hashing import content_key
from dbtrain.runtime.lock import Lock
from dbtrain.runtime.run_folder import SCORES, RunFolder
from dbtrain.sample.sample import Kept
from dbtrain.train import many, memory, slots
from dbtrain.train.inputs import Inputs

LOOK_S = 5.0  # between two looks at the list, and at where each subject stands
SETTLED_S = 5.0  # a folder whose photos changed later than this is still being filled
MOST = 8  # slots on a CPU, where more at once gain little


@dataclass(frozen=True)
class Request:
    """What a user asks of a fleet."""

    config: Path
    subjects: Path
    overrides: Sequence[str] = ()
    slots: int | None = None  # of each rank; None: as many as its memory has room for
    watch: bool = False  # wait for new subjects at the end
    evaluate: bool = False  # score each adapter at the end

    def read(self, settled_s: float = 0.0) -> list[Entry]:
        return listing.read(self.config, self.subjects, self.overrides, settled_s)

    def shared(self) -> Config:
        return listing.shared(self.config, self.overrides)


def fleet(request: Request) -> Path:
    """Prepare, train and export every subject that is not done; return the fleet's folder.

    Raises ConfigError that names the subjects that failed, once all others are done. Raises Preempted, with
    everything saved, if there is a reason to stop.
    """
    dist.init()
    with dist.agreed():
        shared, entries = request.shared(), request.read()
        slots.check(shared)
        if not entries:
            raise ConfigError(f"SUBJECTS is '{request.subjects}', in which there are no subjects")
    dist.assert_same(content_key([entry.name for entry in entries]), "the list of subjects")
    stopped, folder = "", files.expand(shared.run_dir)
    with lock.held(folder, "run_dir"):
        work = Work(request, folder, entries)
        work.prepare()
        try:
            with dist.alone():
                work.train()
                if request.evaluate:
                    work.evaluate()
        except Preempted as stop:
            stopped = str(stop)
        dist.gather_json(None)  # what every rank wrote is there
        with dist.agreed():
            found = work.write_status() if dist.is_main() else None
            if stopped:
                raise Preempted(stopped)
            for line in status.table(found) if found else ():
                console.say(line)
            left = [one for one in found.subjects if one.state != "done"] if found else []
            if found and left:
                raise ConfigError(
                    f"{len(left)} of {len(found.subjects)} subjects are not done; the others are",
                    *(f"{one.name}: {one.problem or 'in use by another run'}" for one in left),
                )
    return folder


class Work:
    """The subjects of a fleet, as one rank sees them."""

    def __init__(self, request: Request, folder: Path, entries: Sequence[Entry]) -> None:
        self.request, self.folder = request, folder
        self.rank, self.world = dist.rank(), dist.world()
        self.entries = {entry.name: entry for entry in entries}
        self.early = set(self.entries)  # those that are prepared together
        self.bad: set[str] = set()  # those of them that cannot be trained
        self.done: set[str] = set()  # those that need no training, whoever trained them
        self.elsewhere: set[str] = set()  # those that other processes train
        self.held: dict[str, Lock] = {}  # of those that this rank trains
        self.base: Base | None = None
        self.slots = 0
        self.looked, self.news = time.monotonic(), True
        self.status = status.read(folder)

    def prepare(self) -> None:
        """Make the shards of all subjects, in one pass over all ranks. Ranks agree on what is left to do."""
        if dist.is_main():
            for name in self.entries:
                RunFolder(self.folder / name).failed.unlink(missing_ok=True)  # it may have been mended
        cfgs = [entry.cfg for entry in self.entries.values() if entry.cfg]
        found = dict(zip(map(_name, cfgs), prepare.prepare_all(cfgs), strict=True))
        for name, entry in self.entries.items():
            if problem := entry.problem or found.get(name):
                self.bad.add(name)
                if dist.is_main():
                    self._fail(name, ConfigError(problem))
        if not cfgs:
            return
        hub.check(cfgs[0])
        self.base = Base.find(cfgs[0].model)
        self.slots = min(dist.gather_json(self._slots(cfgs[0], self.base)))
        # Each rank finds out which of its own are trained already.
        with dist.alone():
            for name, entry in list(self.entries.items())[self.rank :: self.world]:
                with self._failing(name):
                    cfg = None if name in self.bad else entry.cfg
                    if cfg and Inputs.find(cfg, self.base).trained_to(cfg):
                        export.finish(cfg)
                        self.done.add(name)
        for done, bad in dist.gather_json([list(self.done), list(self.bad)]):
            self.done.update(done)
            self.bad.update(bad)

    def train(self) -> None:
        """Train and export until no subject is left. Raises Preempted, with everything saved."""
        cfgs = [one.cfg for name, one in self.entries.items() if one.cfg and name not in self.bad]
        if not cfgs or not (self.request.watch or any(map(self._is_open, self.entries))):
            return
        runs = [(cfg, Inputs.find(cfg, self.base)) for cfg in cfgs]  # all: they shape the slots
        console.say(f"{len(runs)} subjects, {self.slots} at once on each of {self.world} ranks")
        model = slots.Slots(self.slots, *zip(*runs, strict=True))
        with closing(status.Bar(self._status(), self.world)) as self.bar:
            try:
                many.train(model, self._take, self._ended, self._look)
            finally:
                while self.held:
                    self.held.popitem()[1].release()
            self.bar.show(self._status())

    def evaluate(self) -> None:
        """Score this rank's share of the adapters that have no scores yet."""
        cfgs = [entry.cfg for entry in self.entries.values() if entry.cfg]
        kept, drawn = Kept(), []
        for cfg in cfgs[self.rank :: self.world]:
            run = RunFolder(cfg.run_dir)
            if run.done.exists() and not (run.scores / SCORES).exists():
                with console.about(_name(cfg)), self._failing(_name(cfg)):
                    drawn.append((cfg, evaluate.draw(cfg, kept)))
        del kept  # scoring needs its memory
        for cfg, images in drawn:
            with console.about(_name(cfg)), self._failing(_name(cfg)):
                for line in evaluate.score(cfg, images):
                    console.say(line)

    def _slots(self, cfg: Config, base: Base) -> int:
        """How many subjects this rank trains at once: the same as before, if the fleet has begun."""
        known = self.status.slots
        if known and self.request.slots not in (None, known):
            console.warn(f"--slots was {known}: from here on, results differ by the order of sums")
        if chosen := self.request.slots or known:
            return chosen
        has, most = memory.memory_of(dist.device()), MOST
        if has < inf:
            one = memory.predict(cfg, base, "cuda")
            own = one.adapter + one.moments + one.activations + one.gradients
            most = int((has * (1 - memory.SPARE) - one.needed + own) // own)
        return max(1, min(most, ceil(len(self.entries) / self.world)))

    # What the training loop asks and tells.

    def _take(self, idle: bool) -> tuple[Config, Inputs] | None:
        """The next subject that is not done, held for this rank; None if there is none.

        `idle`: this rank has nothing else to do, and may wait for new ones.
        """
        while True:
            for name, entry in self._in_turn() if self.news else ():
                with console.about(name), self._failing(name):
                    if entry.cfg and (inputs := self._hold(name, entry.cfg)):
                        return entry.cfg, inputs
            self.news = False
            if not (idle and self.request.watch):
                return None
            preemption.check()
            time.sleep(1.0)
            self._look()

    def _in_turn(self) -> Iterator[tuple[str, Entry]]:
        """The subjects that are left: first those of this rank, then what others have not begun."""
        every = list(self.entries.items())
        mine = every[self.rank :: self.world]
        yield from (one for one in mine if self._is_open(one[0]))
        names = {name for name, _ in mine}
        others = (one for one in every if one[0] not in names and self._is_open(one[0]))
        yield from (one for one in others if not lock.holder(self.folder / one[0]))

    def _is_open(self, name: str) -> bool:
        """Whether a subject is to be trained, and nobody is known to have it."""
        gone = name in self.bad or name in self.done or name in self.elsewhere or name in self.held
        return not gone and not RunFolder(self.folder / name).failed.exists()

    def _hold(self, name: str, cfg: Config) -> Inputs | None:
        """Hold a subject for this rank; None if it turns out to be done, or another process has it."""
        if not (mine := Lock.take(RunFolder(cfg.run_dir).path)):
            self.elsewhere.add(name)
            return None
        self.held[name] = mine
        if name not in self.early and (problem := prepare.prepare_all([cfg])[0]):
            raise ConfigError(problem)
        inputs = Inputs.find(cfg, self.base)
        if not inputs.trained_to(cfg):
            return inputs
        self._ended(cfg, None)
        return None

    def _ended(self, cfg: Config, problem: ConfigError | None) -> None:
        """Export a subject that is trained, or note its problem, and let it go."""
        if problem:
            self._fail(_name(cfg), problem)
        else:
            export.finish(cfg, held=True)
            hub.push(cfg)
            self.done.add(_name(cfg))
        self._release(_name(cfg))

    @contextmanager
    def _failing(self, name: str) -> Iterator[None]:
        """In the block, a problem is that of one subject."""
        try:
            yield
        except ConfigError as problem:
            self._fail(name, problem)
            self._release(name)

    def _fail(self, name: str, problem: ConfigError) -> None:
        self.bad.add(name)
        text = "; ".join(problem.problems)
        with console.about(name):
            console.warn(f"failed: {text}")
        files.write_atomically(RunFolder(self.folder / name).failed, text + "\n")

    def _release(self, name: str) -> None:
        if mine := self.held.pop(name, None):
            mine.release()

    def _look(self) -> None:
        """From time to time, look for new subjects, and write where each stands."""
        if time.monotonic() < self.looked + LOOK_S:
            return
        self.looked, self.news = time.monotonic(), True
        try:
            found = self.request.read(SETTLED_S)
        except ConfigError as problem:  # the list is being edited
            console.warn(str(problem))
            return
        for entry in found:
            if entry.name not in self.entries:
                self.entries[entry.name] = entry
                if entry.problem:
                    self._fail(entry.name, ConfigError(entry.problem))
        if self.rank == 0:
            self.bar.show(self.write_status())

    def write_status(self) -> Status:
        """Write where each subject stands, and return it."""
        self.status = self._status()
        self.status.write(self.folder)
        return self.status

    def _status(self) -> Status:
        """Where each subject stands."""
        known = {one.name: one for one in self.status.subjects}
        subjects = []
        for name, entry in self.entries.items():
            steps = entry.cfg.train.steps if entry.cfg else 0
            one = known.get(name) or Subject(name, name, steps)
            subjects.append(one.changed(steps=steps, **status.found(self.folder / name)))
        return Status(self.slots, tuple(subjects))


def _name(cfg: Config) -> str:
    return RunFolder(cfg.run_dir).path.name
