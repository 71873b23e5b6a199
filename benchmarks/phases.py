"""Photos to adapter in one process, as `dbtrain run` does it, and the seconds of each phase.

    python -m benchmarks.phases ASK.json OUT.json

A process of its own, started by `benchmarks/end_to_end.py`, so that imports and start-up count.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

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


def main(ask: Path, out: Path) -> None:
    given = json.loads(ask.read_text())
    clock = Clock(given["started"])
    from dbtrain.config import Config
    from dbtrain.prepare import class_images
    from dbtrain.prepare.prepare import prepare
    from dbtrain.runtime import console
    from dbtrain.train.loop import train
    from dbtrain.train.metrics import Metrics

    console.start()
    cfg = Config.load(given["config"], given["overrides"])
    clock.end("imports")
    ensure, step = class_images.ensure, Metrics.step

    def ensured(*args: Any, **kwargs: Any) -> Any:
        clock.end("encode")  # what prepare does before it
        found = ensure(*args, **kwargs)
        clock.end("class images")
        return found

    def stepped(log: Metrics, done: int, *args: Any, **kwargs: Any) -> None:
        step(log, done, *args, **kwargs)
        if done == 1:
            clock.end("train start")
        if done == cfg.train.steps:
            clock.end("steps")

    with mock.patch.object(class_images, "ensure", ensured), mock.patch.object(Metrics, "step", stepped):
        prepare(cfg)
        clock.end("encode")
        train(cfg)
    clock.end("export")
    out.write_text(json.dumps(clock.spent))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
