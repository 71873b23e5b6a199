"""Run by torchrun: real steps under DDP, maybe compiled with a backend that counts; prints JSON.

torchrun --nproc-per-node 2 tests/multi/counted.py CONFIG [KEY=VALUE ...] [kept=BLOCKS]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._dynamo import utils as dynamo
from torch._dynamo.backends.debugging import aot_eager

from dbtrain.config import Config
from dbtrain.data import prompt_table, shards
from dbtrain.data.dataloader import LatentStream
from dbtrain.data.order import RankSlice
from dbtrain.data.storage import Storage
from dbtrain.models import kernels
from dbtrain.models.base import Base
from dbtrain.models.blocks import blocks
from dbtrain.runtime import dist
from dbtrain.train import parallel
from dbtrain.train.checkpoint import Progress
from dbtrain.train.dreambooth import DreamBooth
from dbtrain.train.step import train_step

WARM_UP, STEPS = 2, 3


def main() -> None:
    path, *words = sys.argv[1:]
    cfg = Config.load(path, [word for word in words if not word.startswith("kept=")])
    kept = next((int(word[5:]) for word in words if word.startswith("kept=")), 0)
    dist.init()
    place = Storage(cfg.data.shards)
    manifest = shards.Manifest.read(place)
    table = prompt_table.read(place, manifest.prompts)
    ranks = parallel.mesh(cfg.train.shard, cfg.faults.timeout_s)
    model = DreamBooth.build(Base.find(cfg.model), manifest, table, cfg, ranks=ranks, kept=kept)
    compiled: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        compiled.append(len(graph.graph.nodes))
        return aot_eager(graph, inputs)

    if cfg.train.compile:
        kernels.compile_module(model.denoiser, True, backend)
    share = RankSlice(cfg.train.global_batch, cfg.train.micro_batch, dist.rank(), dist.world())
    stream = LatentStream(place, manifest, share, {"instance": 1.0, "class": 1.0}, seed=0)
    backward: set[nn.Module] = set()  # blocks that have a backward pass

    def passed(block: nn.Module, _: Any, output: Any) -> None:
        if any(tensor.requires_grad for tensor in (output if isinstance(output, tuple) else (output,))):
            backward.add(block)

    watched = [block for block in blocks(model.denoiser) if parallel.is_sharded(block)]
    hooks = [block.register_forward_hook(passed) for block in watched]
    progress = Progress.begin(model, cfg)
    ddp = parallel.wrap(model)
    graphs = []
    for step in range(WARM_UP):
        train_step(ddp, progress, stream, step, cfg)
        graphs.append(len(compiled))
    for hook in hooks:
        hook.remove()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for step in range(WARM_UP, WARM_UP + STEPS):
            train_step(ddp, progress, stream, step, cfg)
    graphs.append(len(compiled))
    stream.close()
    named = {event.key: event.count for event in profile.key_averages()}
    if dist.is_main():
        print(json.dumps({
            "all_reduces": sum(count for name, count in named.items() if name == "gloo:all_reduce"),
            "other_collectives": {
                name: count for name, count in named.items()
                if name.startswith("gloo:") and name != "gloo:all_reduce"
            },
            "blocks": [len(hooks), len(backward)],
            "host_reads": sum(
                event.name == "aten::_local_scalar_dense" and not reads_its_own_steps(event)
                for event in profile.events()
            ),
            "gradient_bytes": sum(p.numel() * 4 for p in model.trainable().values()),
            "graph_breaks": sum(dynamo.counters["graph_break"].values()),
            "graphs": graphs,
        }))  # fmt: skip
    dist.finish(0)


def reads_its_own_steps(event: Any) -> bool:
    """Whether this is within AdamW's kernel for CPUs, which reads its step counts; that for GPUs does not."""
    while event and event.name != "aten::_fused_adamw_":
        event = event.cpu_parent
    return event is not None


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    main()
