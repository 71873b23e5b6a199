"""Which GPU trains which model: the memory of training, predicted from the published architectures.

    python -m benchmarks.cards

Predicts with `dbtrain doctor`'s functions: LoRA of rank 16, bf16 with gradient checkpointing, one photo per
pass, no class images, no validation images. What swapping and sharding save is arithmetic on top. Nothing is
trained, and no GPU is needed. Before training, the text encoders run in `prepare`.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import bases, common
from benchmarks.architectures import published
from benchmarks.common import Result, Row
from dbtrain.config import Config, Model
from dbtrain.models.base import Base
from dbtrain.runtime import console
from dbtrain.train import memory

GIB = 2**30
CARDS = (12, 16, 24)  # GB, as they are sold
LEFT = 0.98  # of which a program gets
STORAGES = {"full": "bf16", "int8": "int8", "nf4": "nf4"}
RANKS = 4
NOTE = "Predicted, not measured. Under each card: blocks to swap with bf16 / int8 / nf4."


def configured(path: Path, side: int, **train: Any) -> Config:
    """Settings for this base."""
    return Config.model_validate(
        {
            "model": {"path": str(path)}, "run_dir": "run", "data": {"shards": "shards"},
            "prepare": {"photos": "photos", "instance_prompt": "a photo of sks dog", "resolution": side},
            "adapter": {"rank": 16},
            "train": {"global_batch": 1, "gradient_checkpointing": "blocks", **train},
        }
    )  # fmt: skip


def predicted(path: Path, base: Base, side: int) -> dict[str, Any]:
    """GiB by storage, on one GPU and sharded, and the blocks to swap on each card."""
    cfg = configured(path, side)
    step = memory.predict(cfg, base, "cuda")
    stored = {name: memory.weights_of(cfg, base, name) for name in STORAGES}
    takes = {name: step.stored(weights) for name, weights in stored.items()}
    shared = replace(takes["int8"].sharded(RANKS), gradients=step.adapter)  # DDP's buckets
    found: dict[str, Any] = {"activations, GiB": round(step.activations / GIB, 1)}
    found |= {f"{STORAGES[name]}, GiB": round(one.needed / GIB, 1) for name, one in takes.items()}
    all_swapped = step.swapped(len(step.weights.blocks))
    found |= {
        "bf16, all blocks swapped, GiB": round(all_swapped.needed / GIB, 1),
        f"int8 over {RANKS} GPUs, GiB": round(
            (shared.needed + shared.adapter) / GIB, 1
        ),  # averaged gradients
    }
    for card in CARDS:
        found[f"{card} GB"] = " / ".join(_swaps(one, card * LEFT * GIB) for one in takes.values())
    return found


def _swaps(takes: memory.Prediction, has: float) -> str:
    """How many blocks have to be swapped, "-" if that is not enough."""
    count = takes.blocks_to_swap(has)
    return str(count) if not count or takes.swapped(count).needed <= has else "-"


def run(args: argparse.Namespace, work: Path) -> Result:
    names = ["sd15"] if args.smoke else args.models or [n for n in published() if "small" not in n]
    rows = []
    with console.bar(len(names), "models", "model") as bar:
        for name in names:
            path = bases.outline(name, work)
            base = Base.find(Model(path=str(path)))
            weights = sum(weight.numel() for weight in base.skeleton(base.family.denoiser).parameters())
            counts = {"billion weights": round(weights / 1e9, 2)}
            counts |= predicted(path, base, bases.side_of(name))
            rows.append(Row(label=name, counts=counts))
            bar.update()
    return common.result(args, "cards", "predicted", rows, NOTE)


def parser() -> argparse.ArgumentParser:
    words = common.parser(__doc__)
    words.add_argument(
        "--models", nargs="*", metavar="NAME", help="of the published architectures (default: all)"
    )
    return words


if __name__ == "__main__":
    common.main(run, parser())
