"""Run by torchrun: real steps under DDP, compiled with a backend that counts; rank 0 prints JSON.

torchrun --nproc-per-node 2 tests/multi/counted.py CONFIG
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch._dynamo import utils as dynamo
from torch._dynamo.backends.debugging import aot_eager

from dbtrain.config import Config
from dbtrain.data import shards
from dbtrain.data.dataloader import LatentStream
from dbtrain.data.order import RankSlice
from dbtrain.data.storage import Storage
from dbtrain.models import kernels
from dbtrain.models.base import Base
from dbtrain.runtime import dist
from dbtrain.train import parallel
from dbtrain.train.checkpoint import Progress
from dbtrain.train.dreambooth import DreamBooth
from dbtrain.train.step import train_step

WARM_UP, STEPS = 2, 3


def main() -> None:
    cfg = Config.load(sys.argv[1])
    dist.init()
    place = Storage(cfg.data.shards)
    manifest = shards.Manifest.read(place)
    table = shards.read_prompts(place, manifest.prompts)
    model = DreamBooth.build(Base.find(cfg.model), manifest, table, cfg)
    compiled: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        compiled.append(len(graph.graph.nodes))
        return aot_eager(graph, inputs)

    kernels.compile_module(model.denoiser, True, backend)
    share = RankSlice(cfg.train.global_batch, cfg.train.micro_batch, dist.rank(), dist.world())
    stream = LatentStream(place, manifest, share, {"instance": 1.0, "class": 1.0}, seed=0)
    progress = Progress.begin(model, cfg)
    ddp = parallel.wrap(model)
    graphs = []
    for step in range(WARM_UP):
        train_step(ddp, progress, stream, step, cfg)
        graphs.append(len(compiled))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for step in range(WARM_UP, WARM_UP + STEPS):
            train_step(ddp, progress, stream, step, cfg)
    graphs.append(len(compiled))
    stream.close()
    named = {event.key: event.count for event in profile.key_averages()}
    if dist.is_main():
        print(json.dumps({
            "all_reduces": sum(count for name, count in named.items() if name == "gloo:all_reduce"),
            "other_collectives": sorted(
                name for name in named if name.startswith("gloo:") and name != "gloo:all_reduce"
            ),
            "gradient_bytes": sum(p.numel() * 4 for p in model.trainable().values()),
            "graph_breaks": sum(dynamo.counters["graph_break"].values()),
            "graphs": graphs,
        }))  # fmt: skip
    dist.finish(0)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    main()
