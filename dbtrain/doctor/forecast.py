"""What `doctor` says about the memory that training takes, and settings that take less."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from dbtrain.config import Config
from dbtrain.models.base import Base
from dbtrain.runtime import dist
from dbtrain.runtime.errors import ConfigError
from dbtrain.train.memory import GIB, Prediction, memory_of, predict


def report(cfg: Config, gib: float | None = None, ranks: int = 1) -> Iterator[str]:
    """Lines about the memory that training takes on each of `ranks` devices, and settings that would fit.

    `gib`: memory of the GPU to train on, if it is not in this machine. Without any GPU, the lines are about
    the CPU. If training does not fit, raises ConfigError after the last line, with settings that would.
    """
    # The prediction.
    base = Base.find(cfg.model)
    device = "cuda" if gib or torch.cuda.is_available() else "cpu"
    found = predict(cfg, base, device, ranks)
    has = gib * GIB if gib else memory_of(dist.device())
    swapped = found.blocks_to_swap(has) if cfg.train.swap_blocks == "auto" else 0
    if swapped:
        cfg = cfg.model_copy(update={"train": cfg.train.model_copy(update={"swap_blocks": swapped})})
        found = predict(cfg, base, device, ranks)
    yield f"for training on a {'GPU' if device == 'cuda' else 'CPU (--gib SIZE: on a GPU)'}, GiB"
    yield from _table(found, device)
    if swapped:
        yield f"train.swap_blocks=auto swaps {swapped} of {len(found.blocks)} blocks"
    if cfg.train.compile:
        yield "train.compile is on: it keeps fewer activations than eager training, which this predicts"
    if device == "cpu":
        return
    if found.needed <= has:
        yield f"fits into {has / GIB:.1f} GiB"
        return
    problem = f"training needs {found.needed / GIB:.2f} GiB, which does not fit into {has / GIB:.1f} GiB"
    yield f"does not fit into {has / GIB:.1f} GiB; trying settings that take less"
    # Without validation images, if they set the peak: then nothing under `train` helps.
    without = ""
    if found.validation > found.activations:
        without = "validation.prompts=[] "
        cfg = cfg.model_copy(update={"validation": cfg.validation.model_copy(update={"prompts": ()})})
        needed = replace(found, validation=0).needed
        yield f"  {without}: {needed / GIB:.2f}{', fits' if needed <= has else ''}"
        if needed <= has:
            raise ConfigError(f"{problem}; use {without.strip()} (no validation images)")
    # Smaller settings under `train`, one after the other.
    for changes, other in cheaper(cfg):
        words = without + " ".join(f"train.{name}={value}" for name, value in changes.items())
        try:
            needed = predict(other, base, device, ranks).needed
        except ConfigError as error:  # a denoiser without transformer blocks
            yield f"  {words}: {error}"
            continue
        yield f"  {words}: {needed / GIB:.2f}{', fits' if needed <= has else ''}"
        if needed <= has:
            raise ConfigError(f"{problem}; use {words}")
    raise ConfigError(
        f"{problem}, and neither do these settings; use a smaller adapter.rank or prepare.resolution, or a "
        "larger GPU"
    )


def cheaper(cfg: Config) -> Iterator[tuple[dict[str, Any], Config]]:
    """(changes under `train`, config with them) that save memory, those that cost the least speed first."""
    train = cfg.train
    smaller = [n for n in range(train.micro_batch - 1, 0, -1) if train.global_batch % n == 0]
    modes = ("none", "transformer", "blocks")
    stronger = modes[modes.index(train.gradient_checkpointing) + 1 :]
    changes: dict[str, Any] = {}
    for name, values in (
        ("micro_batch", smaller), ("gradient_checkpointing", stronger),
        ("base_linears", ["int8"] if train.base_linears == "full" else []),
    ):  # fmt: skip
        for value in values:
            changes = changes | {name: value}
            yield changes, cfg.model_copy(update={"train": train.model_copy(update=changes)})


def _table(found: Prediction, device: str) -> Iterator[str]:
    rows = [
        ("base", found.base), ("adapter", found.adapter), ("optimizer", found.moments),
        ("activations", found.activations), ("accumulated gradients", found.gradients),
        *([("in host memory, a rank", found.in_host_memory)] if found.in_host_memory else []),
        *([("or, instead, validation images", found.validation)] if found.validation else []),
        ("peak", found.peak),
    ]  # fmt: skip
    if device == "cuda":
        rows.append(("with context, workspaces, fragmentation (estimated)", found.needed))
    yield from (f"  {name:46} {size / GIB:8.3f}" for name, size in rows)
