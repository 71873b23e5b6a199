"""Which GPU holds which model: the memory of training, predicted from the published architectures.

    python -m benchmarks.cards

Predicts with `dbtrain doctor`'s function what the example configs take, without validation images: LoRA of
rank 16, one photo and one class image per pass, bf16 with gradient checkpointing. Nothing is trained, and
no GPU is needed. Before training, encoding the prompts takes the memory of a text encoder.
"""

from __future__ import annotations

import argparse
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
CARDS = (12, 16, 24, 80)  # GB, as they are sold
LEFT = 0.98  # of which a program gets
SETTINGS: dict[str, dict[str, Any]] = {  # from the best picture to the least memory
    "bf16": {}, "int8": {"base_linears": "int8"}, "512 px": {"side": 512},
    "int8, 512 px": {"base_linears": "int8", "side": 512},
}  # fmt: skip


def configured(path: Path, side: int, **train: Any) -> Config:
    """An example config's settings on this base."""
    return Config.model_validate(
        {
            "model": {"path": str(path)}, "run_dir": "run", "data": {"shards": "shards"},
            "prepare": {"photos": "photos", "instance_prompt": "a photo of sks dog",
                        "class_prompt": "a photo of a dog", "resolution": side},
            "adapter": {"rank": 16},
            "train": {"global_batch": 1, "gradient_checkpointing": "blocks", **train},
        }
    )  # fmt: skip


def predicted(path: Path, base: Base, side: int) -> dict[str, float]:
    """GiB by setting; the sides of models that are made for 512 px are not cut."""
    found = {}
    for label, changes in SETTINGS.items():
        settings = {"side": side, **changes}
        if settings["side"] <= side and (label == "bf16" or changes.get("side") != side):
            cfg = configured(path, settings.pop("side"), **settings)
            found[label] = memory.predict(cfg, base, "cuda").needed / GIB
    return found


def run(args: argparse.Namespace, work: Path) -> Result:
    names = ["sd15"] if args.smoke else args.models or list(published())
    rows = []
    with console.bar(len(names), "models", "model") as bar:
        for name in names:
            path = bases.outline(name, work)
            base = Base.find(Model(path=str(path)))
            needs = predicted(path, base, bases.side_of(name))
            weights = sum(weight.numel() for weight in base.skeleton(base.family.denoiser).parameters())
            counts: dict[str, Any] = {"billion weights": round(weights / 1e9, 2)}
            counts |= {f"{label}, GiB": round(size, 1) for label, size in needs.items()}
            for card in CARDS:
                fitting = (label for label, size in needs.items() if size <= card * LEFT)
                counts[f"{card} GB"] = next(fitting, "-")
            rows.append(Row(label=name, counts=counts))
            bar.update()
    return common.result(args, "cards", "predicted", rows, "Predicted, not measured.")


def parser() -> argparse.ArgumentParser:
    words = common.parser(__doc__)
    words.add_argument(
        "--models", nargs="*", metavar="NAME", help="of the published architectures (default: all)"
    )
    return words


if __name__ == "__main__":
    common.main(run, parser())
