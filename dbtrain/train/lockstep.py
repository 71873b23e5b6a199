"""Keeps ranks in step that train runs of their own in slots, but hold the denoiser together."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dbtrain.config import Config
from dbtrain.runtime import dist, preemption
from dbtrain.runtime.errors import Preempted
from dbtrain.train import parallel
from dbtrain.train.dreambooth import DreamBooth

# What a rank is about to do, the most urgent last; more than STOP: for a reason of `preemption.REASONS`.
IDLE, STEP, PASS, STOP = range(4)
LOOK_S = 1.0  # between two looks for new runs, when there is nothing to do


class Lockstep:
    """Ranks that hold the denoiser together gather its weights for each pass, so each takes all of them.

    Before a pass they tell one another what they are about to do, and all do what is most urgent: a pass
    without gradients that one of them needs, as for validation, or else a training step. Ranks that have no
    use for it take part with rows that nothing is done with.
    """

    def __init__(self, mesh: parallel.DeviceMesh, group: parallel.ProcessGroup, endless: bool) -> None:
        """`mesh`: the ranks. `group`: the same, for what they tell one another. `endless`: see `of`."""
        self.mesh, self.group, self.endless = mesh, group, endless
        self.steps = 0
        self.stepping = self.accompanying = self.stopping = False

    @classmethod
    def of(cls, cfg: Config, endless: bool) -> Lockstep | None:
        """The lockstep that `train.shard` asks for; None if each rank has all weights.

        `endless`: ranks that have nothing to do wait for new runs. Call this on every rank.
        """
        mesh = parallel.mesh(cfg.train.shard, cfg.faults.timeout_s)
        group = dist.sharing(cfg.train.shard, dist.PATIENCE.total_seconds())
        return cls(mesh, group, endless) if mesh and group else None

    def watch(self, model: DreamBooth, accompany: Callable[[], None]) -> None:
        """Announce each pass of the denoiser outside of steps. `accompany`: makes one, without gradients."""
        self.accompany, model.most = accompany, self.most

        def announce(*_: object) -> None:
            if not (self.stepping or self.accompanying):
                self._agree(PASS)

        model.denoiser.register_forward_pre_hook(announce, prepend=True)

    def meet(self, training: bool) -> bool:
        """Keep other ranks company until all are about to step; whether there is a run to train on any.

        `training`: whether there is one here. Raises Preempted if another rank stops.
        """
        while (most := self._agree(STEP if training else IDLE)) == PASS:
            self.accompanying = True
            try:
                self.accompany()
            finally:
                self.accompanying = False
        if most == IDLE and self.endless:
            time.sleep(LOOK_S)
        return most == STEP

    @contextmanager
    def step(self) -> Iterator[None]:
        """The block is a step, which all ranks make together."""
        self.steps += 1
        dist.at(self.steps)
        self.stepping = True
        try:
            yield
        finally:
            self.stepping = False

    def most(self, number: int) -> int:
        """The largest number of any rank, in a step; else the number itself."""
        return parallel.largest(number, self.group) if self.stepping else number

    def stop(self) -> None:
        """Stop the other ranks, unless one of them has stopped this one."""
        if not self.stopping:
            parallel.largest(STOP + preemption.stop_requested(), self.group)

    def _agree(self, kind: int) -> int:
        if (most := parallel.largest(kind, self.group)) >= STOP:
            self.stopping = True
            raise Preempted(preemption.REASONS[most - STOP] or "another rank has stopped")
        return most
