"""Where the benchmarks meet dbtrain's training code: all that depends on its inside is here."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from torch import nn

from dbtrain.config import Config
from dbtrain.data import prompt_table
from dbtrain.data.dataloader import LatentStream
from dbtrain.data.order import RankSlice
from dbtrain.data.shards import Manifest
from dbtrain.data.storage import Storage
from dbtrain.export import export as exporting
from dbtrain.export.export import export
from dbtrain.models.base import Base
from dbtrain.prepare import class_images
from dbtrain.prepare.prepare import prepare
from dbtrain.runtime import dist
from dbtrain.train import checkpoint, loop, parallel, slots
from dbtrain.train.dreambooth import DreamBooth
from dbtrain.train.loop import train
from dbtrain.train.metrics import Metrics, Outcome
from dbtrain.train.setup import swap_blocks
from dbtrain.train.step import train_step
from dbtrain.train.validation import Validator

__all__ = [
    "Steps",
    "each_step",
    "export",
    "making_class_images",
    "phases",
    "prepare",
    "steps",
    "train",
    "when_loaded",
]


@dataclass
class Steps:
    """A model, its optimizer and its batches: `train`'s steps without the run around them."""

    cfg: Config
    model: DreamBooth
    ddp: nn.Module
    progress: checkpoint.Progress
    stream: LatentStream

    def take(self, step: int) -> Outcome:
        return train_step(self.ddp, self.progress, self.stream, step, self.cfg)


@contextmanager
def steps(cfg: Config) -> Iterator[Steps]:
    """The steps of a config whose shards are there, on this process's device."""
    base, place = Base.find(cfg.model), Storage(cfg.data.shards, 0)
    manifest = Manifest.read(place)
    table = prompt_table.read(place, manifest.prompts)
    family = base.family
    ranks = parallel.mesh(cfg.train.shard, cfg.faults.timeout_s)
    model = DreamBooth.build(base, manifest, table, cfg, None, ranks)
    swap_blocks(cfg, base, model)
    progress = checkpoint.Progress.begin(model.to(dist.device()), cfg)
    share = RankSlice(cfg.train.global_batch, cfg.train.micro_batch, dist.rank(), dist.world())
    weights = cfg.loss.role_weights("class" in manifest.roles)
    stream = LatentStream(
        place, manifest, share, weights, seed=0, device=dist.device(),
        extra=family.row,
        class_prompts=manifest.class_prompts() if cfg.loss.prior == "prediction" else None,
        preserved=cfg.loss.asks_the_base,
    )  # fmt: skip
    with closing(stream), dist.training(cfg.faults.timeout_s):
        yield Steps(cfg, model, parallel.wrap(model), progress, stream)


@contextmanager
def each_step(queued: Callable[[int, float], None], kept: Callable[[int], None]) -> Iterator[None]:
    """In the block, `queued(done, wait_s)` and `kept(done)` are called before and after a step is logged."""
    step = Metrics.step
    signature = inspect.signature(step)

    def watched(log: Metrics, *args: Any, **kwargs: Any) -> None:
        given = signature.bind(log, *args, **kwargs).arguments
        queued(given["done"], given["outcome"].wait_s)
        step(log, *args, **kwargs)
        kept(given["done"])

    with mock.patch.object(Metrics, "step", watched):
        yield


@contextmanager
def when_loaded(loaded: Callable[[], None]) -> Iterator[None]:
    """In the block, `loaded()` is called when a run's model is built, before its first step."""
    with _around(checkpoint.Progress, "begin", loaded, lambda: None):
        yield


@contextmanager
def making_class_images(begin: Callable[[], None], end: Callable[[], None]) -> Iterator[None]:
    """In the block, `begin()` and `end()` are called around the making of class images."""
    with _around(class_images, "ensure", begin, end):
        yield


def phases() -> dict[str, list[tuple[Any, str]]]:
    """The functions that the phases of `dbtrain run` and `dbtrain fleet` consist of: (where, name)."""
    return {
        "fixed": [(slots.Slots, "enter")],
        "training": [(loop, "train_step"), (slots.Slots, "step")],
        "validation": [(Validator, "run")],
        "export": [(exporting, "finish")],
    }


@contextmanager
def _around(owner: Any, name: str, before: Callable[[], None], after: Callable[[], None]) -> Iterator[None]:
    original = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        before()
        found = original(*args, **kwargs)
        after()
        return found

    with mock.patch.object(owner, name, wrapped):
        yield
