"""Photos to adapter in one process, as `dbtrain run` does it, and the seconds of each phase.

A process of its own, started by `benchmarks/end_to_end.py`, so that imports and start-up count.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from benchmarks import job

PHASES = ("imports", "class images", "encode", "train start", "steps", "export")


class Clock:
    """Wall and CPU seconds since the last look, by phase."""

    def __init__(self, started: float) -> None:
        self.wall, self.cpu = started, 0.0
        self.spent: dict[str, dict[str, float]] = {}

    def end(self, phase: str) -> None:
        """All since the last `end` belonged to this phase."""
        if "torch" in sys.modules and (torch := sys.modules["torch"]).cuda.is_available():
            torch.cuda.synchronize()
        wall, cpu = time.time(), time.process_time()
        before = self.spent.get(phase, {"wall_s": 0.0, "cpu_s": 0.0})
        self.spent[phase] = {"wall_s": before["wall_s"] + wall - self.wall,
                             "cpu_s": before["cpu_s"] + cpu - self.cpu}  # fmt: skip
        self.wall, self.cpu = wall, cpu


def run(given: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """`dbtrain run` of a config: seconds of each phase."""
    clock = Clock(given["started"])
    from benchmarks import trainer
    from dbtrain.config import Config
    from dbtrain.runtime import console

    console.start()
    cfg = Config.load(given["config"], given["overrides"])
    clock.end("imports")

    def kept(done: int) -> None:
        if done == 1:
            clock.end("train start")
        if done == cfg.train.steps:
            clock.end("steps")

    with (
        trainer.making_class_images(lambda: clock.end("encode"), lambda: clock.end("class images")),
        trainer.each_step(lambda done, wait_s: None, kept),
    ):
        trainer.prepare(cfg)
        clock.end("encode")
        trainer.train(cfg)
    clock.end("export")
    return clock.spent


if __name__ == "__main__":
    job.answer(run)
