"""Settings for memory: what each combination of them takes, and how long a step is estimated to take."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from dbtrain.config import Config
from dbtrain.models import activation_checkpointing, block_swap
from dbtrain.models.base import Base
from dbtrain.runtime.errors import ConfigError
from dbtrain.train.memory import Prediction, predict, ranks_together, weights_of
from dbtrain.train.placement import Weights

# A model of time, for comparisons: of products, FLOP/s; of copies of weights from the host or other GPUs
# meanwhile, bytes/s; and of the memory, bytes/s, where decoding a weight for a product moves DECODING bytes.
RATE, LINK, MEMORY = 1e14, 2e10, 8e11
DECODING = {"int8": 7.0, "fp8": 7.0, "nf4": 10.5}
PER_NODE = 8  # GPUs, if not known


@dataclass(frozen=True)
class Plan:
    """A combination of settings under `train`."""

    settings: dict[str, Any]
    takes: Prediction
    step_s: float  # estimated

    def changes(self, cfg: Config) -> list[str]:
        """The settings that differ from those of `cfg`; how many blocks are swapped is left to `auto`."""
        wanted = self.settings | ({"swap_blocks": "auto"} if self.settings["swap_blocks"] else {})
        return [
            f"train.{name}={value}" for name, value in wanted.items() if value != getattr(cfg.train, name)
        ]

    @property
    def host(self) -> int:
        """Host memory for weights, bytes: of all while they are loaded, or of a block if they are sharded."""
        weights = self.takes.weights
        return max(weights.blocks, default=0) if self.takes.gathered else weights.size


def plans(cfg: Config, base: Base, has: float, ranks: int, micro_batches: Sequence[int]) -> list[Plan]:
    """A plan for each combination that makes sense on `ranks` GPUs of `has` bytes, the fastest first.

    Each has the first of `micro_batches` that fits, or else the last, and swaps as many blocks as it has to.
    """
    storages = dict.fromkeys(("full", "int8", "nf4", cfg.train.base_linears))
    stored = {name: weights for name in storages if (weights := _weights(cfg, base, name))}
    shards = [shard for shard, least in (("none", 0), ("node", PER_NODE), ("all", 1)) if ranks > least]
    found: list[Plan] = []
    for mode in activation_checkpointing.modes(base.skeleton(base.family.denoiser)):
        steps = _steps(cfg, base, mode, ranks, micro_batches)
        for storage, shard, swaps in product(stored, shards, (False, True)):
            settings = {
                "gradient_checkpointing": mode, "base_linears": storage, "shard": shard,
                "swap_blocks": len(stored[storage].blocks) if swaps else 0,
            }  # fmt: skip
            if _allowed(cfg, settings):
                together = ranks_together(shard, ranks, PER_NODE)
                found += _fitting(steps, settings, stored[storage], has, together)
    factor = cfg.train.global_batch / ranks
    found = [replace(plan, step_s=plan.step_s * factor / plan.settings["micro_batch"]) for plan in found]
    return sorted(found, key=lambda plan: (float(f"{plan.step_s:.3g}"), plan.takes.needed))


def _weights(cfg: Config, base: Base, storage: str) -> Weights | None:
    """None if no layer of this base can be stored so."""
    try:
        return weights_of(cfg, base, storage)
    except ConfigError:
        return None


def _allowed(cfg: Config, settings: dict[str, Any]) -> bool:
    """Whether these settings go with each other and with the rest of `cfg`."""
    try:
        cfg.override(*(f"train.{name}={value}" for name, value in settings.items()))
    except ConfigError:
        return False
    return True


def _steps(
    cfg: Config, base: Base, mode: str, ranks: int, micro_batches: Sequence[int]
) -> dict[int, Prediction]:
    """Predictions by micro-batch, with full weights on the device; those between two lie on a line."""
    plain = (
        f"train.gradient_checkpointing={mode}", "train.base_linears=full", "train.swap_blocks=0",
        "train.shard=none",
    )  # fmt: skip
    most, least = micro_batches[0], micro_batches[-1]
    found = {
        rows: predict(cfg.override(*plain, f"train.micro_batch={rows}"), base, "cuda", ranks)
        for rows in {most, least}
    }
    for rows in micro_batches[1:-1]:
        share = (rows - least) / (most - least)
        a, b = found[least], found[most]
        found[rows] = replace(
            a, activations=a.activations + int(share * (b.activations - a.activations)),
            flops=a.flops + int(share * (b.flops - a.flops)),
        )  # fmt: skip
    return found


def _fitting(
    steps: dict[int, Prediction], settings: dict[str, Any], weights: Weights, has: float, together: int
) -> Iterator[Plan]:
    """The plan with the largest micro-batch that fits, or with the smallest.

    None if nothing has to be swapped or sharded for that: it would be that of another combination.
    """
    for rows, step in sorted(steps.items(), reverse=True):
        takes = step.stored(weights)
        recomputed = settings["gradient_checkpointing"] != "none"
        takes = takes.sharded(together, takes.blocks_to_keep(has, together, recomputed), recomputed)
        if together > 1 and takes.kept == len(weights.blocks):
            return
        count = 0
        if settings["swap_blocks"]:
            count = takes.blocks_to_swap(has)
            takes = takes.swapped(count)
            if count <= block_swap.BUFFERS:
                return
        if takes.needed <= has or rows == min(steps):
            chosen = {"micro_batch": rows} | settings | {"swap_blocks": count}
            yield Plan(chosen, takes, _seconds(takes, settings, together))
            return


def _seconds(takes: Prediction, settings: dict[str, Any], together: int) -> float:
    """A micro-batch, s. Copies of weights run beside the products."""
    products = 2 if settings["gradient_checkpointing"] == "none" else 3  # of each weight
    decoding = products * takes.weights.quantized * DECODING.get(settings["base_linears"], 0) / MEMORY
    copied = 2 * takes.in_host_memory + takes.weights.received(together, takes.kept)
    return max(takes.flops / RATE + decoding, copied / LINK)
