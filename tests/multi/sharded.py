"""Run by torchrun: several runs one after the other, in the same processes. Two ranks are a node.

torchrun --nproc-per-node 4 tests/multi/sharded.py PLAN: a file with [[CONFIG, OVERRIDE, ...], ...] in JSON
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from functools import partial
from pathlib import Path

from dbtrain.config import Config
from dbtrain.export import export
from dbtrain.models import kernels, quantization
from dbtrain.runtime import console, dist
from dbtrain.runtime.errors import Preempted
from dbtrain.runtime.memory import GIB
from dbtrain.train import loop, memory, setup

OURS = ("until=", "kept=", "gpus=", "backend=")


def main() -> None:
    rank = int(os.environ["RANK"])
    warnings.filterwarnings("error", "FSDP2")  # a user could not know what to do about it
    os.environ |= {"GROUP_RANK": str(rank // 2), "LOCAL_RANK": str(rank % 2)}
    quantization.WIDTH = 16  # of the small transformers
    compile_module = kernels.compile_module
    dist.init()
    console.start()
    for config, *overrides in json.loads(Path(sys.argv[1]).read_text()):
        given = dict(text.split("=") for text in overrides if text.startswith(OURS))
        backend = given.get("backend", "aot_eager")
        kernels.compile_module = partial(compile_module, backend=backend)  # type: ignore[assignment]
        until = int(given["until"]) if "until" in given else None
        if "gpus" in given:  # GiB of each rank's
            room = float(given["gpus"].split(",")[rank]) * GIB
            memory.memory_of = lambda _, room=room: room
        else:
            kept = int(given.get("kept", 0))
            setup.kept_blocks = lambda *_, kept=kept: kept
        cfg = Config.load(config, [text for text in overrides if text.partition("=")[0] not in given])
        try:
            loop.train(cfg, until)
            export.finish(cfg)
        except Preempted:
            assert until
    dist.finish(0)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    main()
