"""What one rank of a fleet does: prepare, and train and export subjects until none is left."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from math import ceil, inf
from pathlib import Path

from dbtrain.config import Config
from dbtrain.export import export, hub
from dbtrain.fleet import listing, status
from dbtrain.fleet.listing import Entry
from dbtrain.models.base import Base
from dbtrain.prepare import prepare
from dbtrain.runtime import console, dist, files, lock, preemption
from dbtrain.runtime.errors import ConfigError, fixable, os_problem
from dbtrain.runtime.fleet_status import Status, Subject
from dbtrain.runtime.lock import Lock
from dbtrain.runtime.run_folder import RunFolder
from dbtrain.train import many, memory, slots
from dbtrain.train.inputs import Inputs
from dbtrain.train.lockstep import Lockstep

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
    watch: bool = False  # wait for subjects that come later
    evaluate: bool = False  # score each adapter at the end

    def read(self, settled_s: float = 0.0) -> list[Entry]:
        return listing.read(self.config, self.subjects, self.overrides, settled_s)

    def shared(self) -> Config:
        return listing.shared(self.config, self.overrides)


class Work:
    """The subjects of a fleet, as one rank sees them."""

    def __init__(
        self, request: Request, folder: Path, entries: Sequence[Entry], lockstep: Lockstep | None = None
    ) -> None:
        """`lockstep`: with the ranks that hold the denoiser together."""
        self.request, self.folder, self.lockstep = request, folder, lockstep
        self.rank, self.world = dist.rank(), dist.world()
        self.entries = {entry.name: entry for entry in entries}
        self.early = set(self.entries)  # those that are prepared together
        self.bad: dict[str, str] = {}  # the problems of those that cannot be trained
        self.done: set[str] = set()  # those that need no training, whoever trained them
        self.elsewhere: set[str] = set()  # those that other processes train
        self.held: dict[str, Lock] = {}  # of those that this rank trains
        self.base: Base | None = None
        self.slots = 0
        self.open = False  # whether there is anything to train, for some rank
        self.looked, self.news = time.monotonic(), True
        self.status = status.read(folder)

    def prepare(self) -> None:
        """Make the shards of all subjects, in one pass over all ranks. Ranks agree on what is left to do."""
        for name in self.entries if dist.is_main() else ():
            with self.failing(name):
                if (note := RunFolder(self.folder / name).failed).is_file():
                    note.unlink()  # it may have been mended
        cfgs = [entry.cfg for entry in self.entries.values() if entry.cfg]
        found = dict(zip(map(_name, cfgs), prepare.prepare_all(cfgs), strict=True))
        for name, entry in self.entries.items():
            if problem := entry.problem or found.get(name):
                self.bad[name] = problem
                if dist.is_main():
                    self._fail(name, problem)
        if not cfgs:
            return
        self.base = Base.find(cfgs[0].model)
        self.slots = min(dist.gather_json(self._slots(max(cfgs, key=_rank), self.base)))
        # Each rank finds out which of its own are trained already.
        with dist.alone():
            for name, entry in list(self.entries.items())[self.rank :: self.world]:
                with self.failing(name):
                    own = None if name in self.bad else entry.cfg
                    if own and Inputs.find(own, self.base).trained_to(own):
                        export.finish(own)
                        _push(own)
                        self.done.add(name)
        for done, bad in dist.gather_json([list(self.done), self.bad]):
            self.done.update(done)
            self.bad.update(bad)
        self.open = any(dist.gather_json(self.request.watch or any(map(self._is_open, self.entries))))

    def train(self) -> None:
        """Train and export until no subject is left. Raises Preempted, with everything saved."""
        cfgs = [one.cfg for name, one in self.entries.items() if one.cfg and name not in self.bad]
        if not cfgs or not self.open:
            return
        inputs = [Inputs.find(cfg, self.base) for cfg in cfgs]  # all: they shape the slots
        console.say(f"{len(cfgs)} subjects, {self.slots} at once on each of {self.world} ranks")
        model = slots.Slots(self.slots, cfgs, inputs, self.lockstep)
        with closing(status.Bar(self._status(), self.world)) as self.bar:
            try:
                many.train(model, self._take, self._ended, self._look)
            finally:
                while self.held:
                    self.held.popitem()[1].release()
            self.bar.show(self._status())
        del model
        gc.collect()  # layers and slots refer to each other, and what comes needs the memory

    def _slots(self, cfg: Config, base: Base) -> int:
        """How many subjects this rank trains at once: as many as before, while one is half trained."""
        begun = any(
            one.state == "training" or (one.step and one.state != "done") for one in self.status.subjects
        )
        known = self.status.slots if begun else 0
        if known and self.request.slots not in (None, known):
            console.warn(f"--slots was {known}: from here on, results differ by the order of sums")
        if self.request.slots:
            return self.request.slots
        if known:
            console.say(f"{known} at once, as subjects that are half trained began; --slots changes it")
            return known
        has, most = memory.memory_of(dist.device()), MOST
        if has < inf:
            one = memory.predict(cfg, base, "cuda")
            together = memory.ranks_together(cfg.train.shard, self.world, dist.local_world())
            one = one.sharded(together, recomputed=cfg.train.gradient_checkpointing != "none")
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
                with console.about(name), self.failing(name):
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
        export.finish(cfg, held=True)
        self.done.add(name)
        self._release(name)
        return None

    def _ended(self, cfg: Config, problem: ConfigError | None) -> None:
        """Export a subject that is trained, or note its problem, and let it go."""
        if problem:
            self._fail(_name(cfg), *problem.problems)
        else:
            export.finish(cfg, held=True)
            _push(cfg)
            self.done.add(_name(cfg))
        self._release(_name(cfg))

    @contextmanager
    def failing(self, name: str) -> Iterator[None]:
        """In the block, a problem is that of one subject."""
        try:
            with fixable():
                yield
        except ConfigError as error:
            self._fail(name, *error.problems)
            self._release(name)

    def _fail(self, name: str, *problems: str) -> None:
        self.bad[name] = text = "; ".join(problems)
        with console.about(name):
            console.warn(f"failed: {text}")
        try:
            files.write_atomically(RunFolder(self.folder / name).failed, text + "\n")
        except OSError as error:  # which may be what failed
            console.warn(os_problem(error))

    def _release(self, name: str) -> None:
        if mine := self.held.pop(name, None):
            mine.release()

    def _look(self) -> None:
        """From time to time, look for subjects that are new or mended, and write where each stands."""
        if time.monotonic() < self.looked + LOOK_S:
            return
        self.looked, self.news = time.monotonic(), True
        try:
            found = self.request.read(SETTLED_S)
        except (ConfigError, OSError) as problem:  # the list is being edited
            console.warn(str(problem))
            return
        for entry in found:
            known = self.entries.get(entry.name)
            if known and (known.cfg or known.problem == entry.problem):
                continue
            if known:
                self._forget(known)
            self.entries[entry.name] = entry
            if entry.problem:
                self._fail(entry.name, entry.problem)
        # One that had a problem is gone from the list, has another name now, or its photos are being copied.
        for name in self.entries.keys() - {entry.name for entry in found}:
            if not self.entries[name].cfg:
                self._forget(self.entries.pop(name))
        if self.rank == 0:
            try:
                self.bar.show(self.write_status())
            except OSError as error:
                console.warn(os_problem(error))

    def _forget(self, entry: Entry) -> None:
        """Forget the problem of a subject that the list has otherwise now, unless it got another since."""
        note = RunFolder(self.folder / entry.name).failed
        self.bad.pop(entry.name, None)
        self.early.discard(entry.name)
        with self.failing(entry.name), suppress(FileNotFoundError):  # another rank was faster
            if note.read_text() == f"{entry.problem}\n":
                note.unlink()

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
            now = status.found(self.folder / name)
            if name in self.bad:  # its folder may not tell
                now |= {"state": "failed", "problem": self.bad[name]}
            subjects.append(one.changed(steps=steps, **now))
        return Status(self.slots, tuple(subjects))


def _push(cfg: Config) -> None:
    """Push a subject's export to the Hub, unless it was pushed as it is now."""
    run = RunFolder(cfg.run_dir)
    what = f"repo {cfg.hub.repo}\n{run.done.read_text()}"
    if cfg.hub.repo and not (run.pushed.is_file() and run.pushed.read_text() == what):
        hub.push(cfg)
        files.write_atomically(run.pushed, what)


def _name(cfg: Config) -> str:
    return RunFolder(cfg.run_dir).path.name


def _rank(cfg: Config) -> int:
    return max(cfg.adapter.rank, *cfg.adapter.ranks.values(), 0)
