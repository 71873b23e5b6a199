"""Networks of the small bases with the batches that they train on, and a count of what a step launches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dbtrain.adapters import tokens
from dbtrain.adapters.state import AdapterState
from dbtrain.config import Config
from dbtrain.data import prompt_table
from dbtrain.data.batch import Batch
from dbtrain.data.dataloader import LatentStream
from dbtrain.data.order import RankSlice
from dbtrain.data.shards import Manifest
from dbtrain.models.base import Base
from dbtrain.models.families import registry as families
from dbtrain.models.families.family import Family
from dbtrain.train.dreambooth import DreamBooth
from tests.conftest import at


def build(cfg: Config, folder: Path, training: AdapterState | None = None) -> DreamBooth:
    manifest = Manifest.read(at(folder))
    base = Base.find(cfg.model)
    table = prompt_table.read(at(folder), manifest.prompts)
    table |= tokens.read_again(base, cfg.learned_words, cfg.adapter.token, manifest.prompts.texts)
    return DreamBooth.build(base, manifest, table, cfg, training)


def stream(cfg: Config, folder: Path, **options: Any) -> LatentStream:
    manifest, weights = Manifest.read(at(folder)), {"instance": 1.0, "class": cfg.loss.prior_weight}
    options.setdefault("share", RankSlice(cfg.train.global_batch, cfg.train.micro_batch))
    options["class_prompts"] = manifest.class_prompts() if cfg.loss.prior == "prediction" else None
    options["preserved"] = cfg.loss.asks_the_base
    return LatentStream(
        at(folder), manifest, role_weights=weights, seed=cfg.seed,
        extra=families.get(manifest.family).row, **options,
    )  # fmt: skip


def awake(model: DreamBooth) -> DreamBooth:
    """With weights that matter: B is 0 at the start, and so is A's gradient."""
    for parameter in model.trainable().values():
        torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(1))
    return model


def first_batch(cfg: Config, family: Family, roles: Sequence[str] = ("instance", "class")) -> Batch:
    folder = Path(cfg.data.shards)
    manifest = Manifest.read(at(folder))
    stream = LatentStream(
        at(folder), manifest, RankSlice(2, 2), dict.fromkeys(roles, 1.0), seed=5,
        stored=family.stored,
        extra=family.row,
    )  # fmt: skip
    batch = next(stream)
    stream.close()
    return batch


FREE = (
    "view", "t", "transpose", "_unsafe_view", "detach", "expand", "permute", "split", "unsqueeze", "slice",
    "alias", "split_with_sizes", "select", "as_strided", "lift_fresh",
)  # fmt: skip  # views: they launch nothing


class Dispatched(TorchDispatchMode):
    """Counts operators that launch a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = op.overloadpacket.__name__
        if op.namespace == "aten" and name not in FREE:
            self.count[name] += 1
        return op(*args, **kwargs or {})

    @property
    def total(self) -> int:
        return sum(self.count.values())
