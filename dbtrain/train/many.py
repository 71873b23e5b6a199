"""The training loop of many runs at once. What each becomes does not depend on the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

from dbtrain.config import Config
from dbtrain.runtime import console, preemption
from dbtrain.runtime.errors import ConfigError, Preempted, fixable
from dbtrain.runtime.run_folder import RunFolder
from dbtrain.train.inputs import Inputs
from dbtrain.train.slots import Slots

Take = Callable[[bool], tuple[Config, Inputs] | None]
Ended = Callable[[Config, ConfigError | None], None]


def train(slots: Slots, take: Take, ended: Ended, on_step: Callable[[], None]) -> None:
    """Train runs until `take` has no more, as many at once as there are slots.

    `take(idle)`: the next run, or None if there is none now; `idle`: there is no other to train meanwhile.
    `ended(cfg, problem)` is told of each run that is complete, or cannot go on. `on_step()` is called after
    each step of all.
    Raises Preempted, after saving every run, if there is a reason to stop.
    """
    with slots.open():
        try:
            _fill(slots, take, ended)
            # One optimizer step of every run, on its own micro-batches.
            while (outcomes := slots.step()) is not None:
                for slot, outcome in outcomes.items():
                    with _attempt(slots, slot, ended):
                        slots.record(slot, outcome)
                # Save and validate those for which it is due. Those that are complete make room.
                _settle(slots, [slot for slot in outcomes if slot in slots.seats], ended)
                on_step()
                preemption.check()
                _fill(slots, take, ended)
        except Preempted as stop:
            slots.part()
            for slot in list(slots.seats):
                with _attempt(slots, slot, ended):
                    slots.save(slot)
            raise Preempted(f"{stop} ({len(slots.seats)} runs saved)") from stop


def _fill(slots: Slots, take: Take, ended: Ended) -> None:
    """Put the next runs into empty slots, and validate them if that is due."""
    while True:
        entered = []
        while (slot := slots.free()) is not None and (run := take(slots.idle)):
            with _named(run[0]):
                try:
                    with fixable():
                        slots.enter(slot, *run)
                    entered.append(slot)
                except ConfigError as problem:
                    ended(run[0], problem)
        if not entered:
            return
        _settle(slots, entered, ended)


def _settle(slots: Slots, some: Sequence[int], ended: Ended) -> None:
    """Save and validate the runs in some slots if that is due; those that are complete leave."""
    due = []
    for slot in some:
        with _attempt(slots, slot, ended):
            if slots.shares_images(slot):
                due.append(slot)
    try:
        slots.generate_ahead(due)
    except (ConfigError, OSError) as problem:  # `settle` finds out whose it is
        console.warn(f"{problem}; generating the images of each run by itself")
    for slot in slots.seats.keys() & set(some):
        with _attempt(slots, slot, ended):
            slots.settle(slot)
            if slots.seats[slot].ended:
                ended(slots.seats[slot].job.cfg, None)
                slots.leave(slot)


@contextmanager
def _attempt(slots: Slots, slot: int, ended: Ended) -> Iterator[None]:
    """In the block, a problem ends the run in this slot, and no other."""
    cfg = slots.seats[slot].job.cfg
    with _named(cfg):
        try:
            with fixable():
                try:
                    yield
                except (ConfigError, OSError) as problem:
                    if slot in slots.seats:
                        slots.leave(slot, problem)
                    raise
        except ConfigError as problem:
            ended(cfg, problem)


def _named(cfg: Config) -> AbstractContextManager[None]:
    return console.about(RunFolder(cfg.run_dir).path.name)
