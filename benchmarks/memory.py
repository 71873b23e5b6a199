"""Is the predicted memory what training takes? Predicted beside measured peaks, setting by setting.

    python -m benchmarks.memory --model sdxl
    torchrun --nproc-per-node 2 -m benchmarks.memory --model flux1-small --work DIR  # sharded

Predicts with `dbtrain doctor`'s function, then trains two real steps and measures the second: on a GPU by
`torch.cuda.max_memory_allocated`, on a CPU by what torch's profiler sees its allocator give and take back,
besides what the model and its moments hold. `sd15` and `sdxl` have their real architecture and random
weights, and want a GPU; without one, `--predict` prints what a GPU would need.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks import bases, common, trainer
from benchmarks.common import Result, Row
from dbtrain.config import Config
from dbtrain.models.base import Base
from dbtrain.runtime import console, dist
from dbtrain.tiny import world
from dbtrain.train import memory, parallel

BOUND = 0.10  # how far a prediction may be off
BLOCKS, EIGHT = "train.gradient_checkpointing=blocks", "train.base_linears=int8"
MODES = {
    "bf16": [],
    "bf16, transformer": ["train.gradient_checkpointing=transformer"],
    "bf16, blocks": [BLOCKS],
    "bf16, blocks, int8": [BLOCKS, EIGHT],
    "fp32": ["train.precision=fp32"],
    "fp32, blocks": ["train.precision=fp32", BLOCKS],
    "fp32, int8": ["train.precision=fp32", EIGHT],
    "fp16": ["train.precision=fp16"],
    "bf16, 4 rows": ["train.micro_batch=4", "train.global_batch=4"],
    "bf16, accumulated": ["train.global_batch=3"],
    "bf16, text encoders": ["adapter.text_encoder.rank=8"],
    "bf16, LoHa on all": ["adapter.kind=loha", "adapter.targets=all"],
    "bf16, DoRA": ["adapter.dora=true"],
    "bf16, blocks, nf4": [BLOCKS, "train.base_linears=nf4"],
    "bf16, blocks, swapped": [BLOCKS, "train.swap_blocks=9"],
    "bf16, blocks, int8, swapped": [BLOCKS, EIGHT, "train.swap_blocks=6"],
}
RANKS = {
    "bf16, blocks": [BLOCKS],
    "bf16, sharded": ["train.shard=all"],
    "bf16, blocks, sharded": [BLOCKS, "train.shard=all"],
    "bf16, blocks, int8, sharded": [BLOCKS, EIGHT, "train.shard=all"],
}


def configured(model: str, path: Path, work: Path, side: int, changes: Iterable[str]) -> Config:
    """A job on this base: LoRA of rank 8, one row, no class images."""
    file = work / f"memory-{dist.rank()}.yaml"
    file.write_text(
        f"run_dir: {work / 'run'}\nmodel: {{path: {'tiny' if model == 'tiny' else path}}}\n"
        f"prepare: {{photos: {work / 'photos'}, instance_prompt: a photo of sks mug, resolution: {side}}}\n"
        f"data: {{shards: {work / f'shards-{model}-{side}'}}}\nadapter: {{rank: 8}}\n"
        f"train: {{global_batch: {dist.world()}}}\n"
    )
    return Config.load(file, list(changes))


def measured(cfg: Config) -> int:
    """Bytes at the fullest moment of a step, of tensors on this process's device."""
    with trainer.steps(cfg) as steps:
        steps.take(0)
        steps.progress.optimizer.zero_grad()
        parallel.reshard(steps.model)
        gc.collect()
        if dist.device().type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            steps.take(1)
            return torch.cuda.max_memory_allocated()
        held = _held(steps)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
            steps.take(1)
    return held + _highest(trace)


def _held(steps: trainer.Steps) -> int:
    """Bytes of the model and of the optimizer's moments."""
    moments = [v for state in steps.progress.optimizer.state.values() for v in state.values()]
    plain = [v for module in steps.model.modules() for v in vars(module).values() if isinstance(v, Tensor)]
    tensors: list[Tensor] = [*steps.model.parameters(), *steps.model.buffers(), *plain, *moments]
    storages = [parallel.local(tensor)[0].untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _highest(trace: Any) -> int:
    """The largest sum of what the CPU's allocator gave and took back, in order."""
    events = trace.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    live = highest = 0
    for _, change in sorted(changes, key=lambda change: change[0]):
        live += change
        highest = max(highest, live)
    return highest


def run(args: argparse.Namespace, work: Path) -> Result:
    model = "tiny" if args.smoke else args.model
    side = 64 if args.smoke else {"tiny": 256}.get(args.model) or bases.side_of(args.model)
    dist.init()
    ranks = dist.world()
    modes, smoke, where = MODES, "fp32, int8", ""
    if ranks > 1:
        modes, smoke, where = RANKS, "bf16, blocks, int8, sharded", f"-{ranks}-ranks"
    names = [smoke] if args.smoke else args.modes or list(modes)
    device = "cuda" if args.predict else args.device
    rows, worst = [], 0.0
    with bases.without_weights():
        with dist.leaders_first():
            path = bases.outline(model, work)
        cfg = configured(model, path, work, side, [])
        base = Base.find(cfg.model)
        if model == "tiny":
            world.main(Path(cfg.prepare.photos), "mug")  # type: ignore[union-attr]
            trainer.prepare(cfg)
        else:
            with dist.leaders_first():
                bases.write_shards(Path(cfg.data.shards), model, base, 8, ("instance",))
        with console.bar(len(names), "memory", "mode") as bar:
            for name in names:
                cfg = configured(model, path, work, side, modes[name])
                found = memory.predict(cfg, base, device, ranks)
                counts: dict[str, Any] = {
                    f"{part}, MiB": round(size / 2**20, 2)
                    for part, size in vars(found).items()
                    if part not in ("weights", "flops")
                } | {"predicted, MiB": round(found.peak / 2**20, 1)}  # fmt: skip
                if not args.predict:
                    real = measured(cfg)
                    off = found.peak / real - 1
                    worst = max(worst, abs(off))
                    counts |= {"measured, MiB": round(real / 2**20, 1), "off": f"{100 * off:+.1f}%"}
                rows.append(Row(label=name, config={"settings": modes[name]}, counts=counts))
                bar.update()
    notes = [] if args.predict else [f"The worst prediction is {100 * worst:.1f}% off."]
    console.say(" ".join(notes))
    return common.result(args, "memory", f"{model}-{side}-{device}{where}", rows, *notes)


def parser() -> argparse.ArgumentParser:
    words = common.parser(__doc__, "model")
    words.add_argument("--modes", nargs="*", metavar="NAME", help="some of the settings (default: all)")
    words.add_argument("--predict", action="store_true", help="predictions for a GPU only; trains nothing")
    return words


if __name__ == "__main__":
    common.main(run, parser())
