"""fleet: train an adapter for each subject of a list, with the base loaded once.

The shards of all are prepared in one pass. Each rank then trains its own subjects, as many at once as it has
slots, so that a step needs no communication. Every subject has a run folder of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from dbtrain.config import Config
from dbtrain.evaluate import evaluate
from dbtrain.export import hub
from dbtrain.fleet import status
from dbtrain.fleet.listing import Entry
from dbtrain.fleet.work import SETTLED_S, Request, Work
from dbtrain.runtime import console, dist, files, lock, preemption
from dbtrain.runtime.errors import ConfigError, Preempted
from dbtrain.runtime.hashing import content_key
from dbtrain.runtime.run_folder import RunFolder
from dbtrain.sample.sample import Kept
from dbtrain.train import slots
from dbtrain.train.lockstep import Lockstep


def fleet(request: Request) -> Path:
    """Prepare, train and export every subject that is not done; return the fleet's folder.

    Raises ConfigError that names the subjects that failed, once all others are done. Raises Preempted, with
    everything saved, if there is a reason to stop.
    """
    dist.init()
    with dist.agreed():
        shared, entries = request.shared(), request.read()
        slots.check(shared)
        for entry in entries:
            if entry.cfg:
                hub.check(entry.cfg)
        if not entries and not request.watch:
            raise ConfigError(f"SUBJECTS is '{request.subjects}', in which there are no subjects")
        if request.evaluate and request.watch:
            raise ConfigError(
                "--evaluate scores at the end, to which --watch never comes; leave one of them out"
            )
        if request.evaluate and dist.local_rank() == 0:
            evaluate.check(shared)
    if request.watch:
        entries = _awaited(request, entries)
    dist.assert_same(content_key([entry.name for entry in entries]), "the list of subjects")
    folder = files.expand(shared.run_dir)
    with lock.held(folder, "run_dir"):
        work = Work(request, folder, entries, Lockstep.of(shared, request.watch))
        work.prepare()
        stopped = _apart(work.train)
        if request.evaluate and not stopped:
            every = work.write_status().subjects if dist.is_main() else ()
            done = dist.from_main([one.name for one in every if one.state == "done"])
            stopped = _apart(partial(_score, work, done[work.rank :: work.world]))
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


def _awaited(request: Request, entries: list[Entry]) -> list[Entry]:
    """The subjects that all ranks see, once one of them can be trained: until then, wait for it."""
    told: set[str] = set()
    waits = f"no subject in '{request.subjects}' can be trained yet; waiting for one"
    while True:
        seen = dist.gather_json({entry.name: entry.problem for entry in entries})
        names = set(seen[0]).intersection(*seen[1:])
        if any(all(one[name] is None for one in seen) for name in names):
            return [entry for entry in entries if entry.name in names]
        wrong = {f"{name}: {problem}" for name, problem in seen[0].items() if problem}
        for line in sorted(wrong - told):
            console.say(line)
        if waits:
            console.say(waits)
        told, waits = told | wrong, ""
        with dist.agreed():
            time.sleep(1.0)
            preemption.check()
            entries = request.read(SETTLED_S)


def _apart(work: Callable[[], None]) -> str:
    """Let each rank work for itself. Returns why one of them was stopped, on every rank; "" if none was."""
    stopped = ""
    try:
        with dist.alone():
            work()
    except Preempted as stop:
        stopped = str(stop)
    dist.barrier()
    return next(filter(None, dist.gather_json(stopped)), "")


def _score(work: Work, names: Sequence[str]) -> None:
    """Score the adapters of these subjects, on a base that is loaded once."""
    kept, drawn = Kept(), []
    for name in names:
        with console.about(name), work.failing(name):
            entry = work.entries.get(name)  # None: another rank has seen it first
            cfg = entry.cfg if entry else None
            cfg = cfg or Config.load(RunFolder(work.folder / name).config)
            drawn.append((name, cfg, evaluate.draw(cfg, kept)))
    kept.free()  # scoring needs its memory
    for name, cfg, images in drawn:
        with console.about(name), work.failing(name):
            for line in evaluate.score(cfg, images):
                console.say(line)
