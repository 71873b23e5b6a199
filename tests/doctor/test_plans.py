"""Settings for memory: the table has what goes together, and the fastest plan that fits is named."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from dbtrain.config import Config
from dbtrain.doctor import forecast, plans
from dbtrain.doctor.plans import Plan
from dbtrain.models.base import Base
from dbtrain.runtime.errors import ConfigError
from dbtrain.runtime.memory import GIB
from dbtrain.train.memory import Prediction, ranks_together
from dbtrain.train.placement import Weights
from tests import bases
from tests.conftest import Make

PARTS = {"full": 80, "int8": 40, "nf4": 20}  # GiB of a denoiser, in ten equal blocks
PER_ROW = {"none": 8, "transformer": 4, "blocks": 2}  # GiB of activations

Ask = Callable[..., list[Plan]]


def weights_of(cfg: Config, base: Base, storage: str) -> Weights:
    size = PARTS[storage] * GIB
    rows = ((8, size // 80),)
    return Weights(size, (size // 10,) * 10, (rows,) * 10, quantized=10**10 * (storage != "full"))


def predict(cfg: Config, base: Base, device: str, ranks: int = 1, has: float = 0.0) -> Prediction:
    train = cfg.train
    weights = weights_of(cfg, base, train.base_linears)
    activations = PER_ROW[train.gradient_checkpointing] * train.micro_batch * GIB
    flops = (2 + (train.gradient_checkpointing != "none")) * train.micro_batch * 10**14
    images = 9 * GIB if cfg.validation.prompts else 0
    found = Prediction(weights.size, 0, 0, activations, 0, images, weights=weights, flops=flops)
    together = ranks_together(train.shard, ranks, 8)
    return found.sharded(together, found.blocks_to_keep(has, together))


@pytest.fixture
def ask(make: Make, monkeypatch: pytest.MonkeyPatch) -> Ask:
    """Plans for a base of round numbers."""
    monkeypatch.setattr(plans, "predict", predict)
    monkeypatch.setattr(plans, "weights_of", weights_of)
    monkeypatch.setattr(forecast, "predict", predict)

    def asked(
        has: float, ranks: int = 1, micro_batches: tuple[int, ...] = (1,), **settings: Any
    ) -> list[Plan]:
        cfg = make(**{"model__path": str(bases.flux1()), "train__global_batch": 16, **settings})
        return plans.plans(cfg, Base.find(cfg.model), has * GIB, ranks, micro_batches)

    return asked


def told(cfg: Config, gib: float, ranks: int = 1) -> str:
    """What a config that does not fit is told to use."""
    with pytest.raises(ConfigError) as error:
        list(forecast.report(cfg, gib, ranks))
    return str(error.value).partition("; use ")[2] or str(error.value)


def combinations(found: list[Plan]) -> list[tuple[Any, ...]]:
    """(gradient checkpointing, linears, shard, swapped blocks) of each."""
    return [tuple(plan.settings.values())[1:] for plan in found]


def test_every_combination_is_there_and_the_fastest_first(ask: Ask) -> None:
    assert combinations(ask(1000)) == [
        ("none", "full", "none", 0), ("none", "int8", "none", 0), ("none", "nf4", "none", 0),
        ("blocks", "full", "none", 0), ("blocks", "int8", "none", 0), ("blocks", "nf4", "none", 0),
    ]  # fmt: skip
    swapped = {("blocks", "full", "none", 9), ("blocks", "int8", "none", 6)}
    assert swapped < set(combinations(ask(30))), (
        "as many blocks as have to, and only where blocks are recomputed"
    )
    assert {shard for _, _, shard, _ in combinations(ask(30, ranks=4))} == {"none", "all"}
    assert {shard for _, _, shard, _ in combinations(ask(30, ranks=16))} == {"none", "node", "all"}


def test_short_steps_are_in_order_too(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "RATE", plans.RATE * 1e6)
    monkeypatch.setattr(plans, "MEMORY", plans.MEMORY * 1e6)
    times = [plan.step_s for plan in ask(1000)]
    assert times == sorted(times) and times[-1] < 1e-4


def test_what_does_not_go_together_is_left_out(ask: Ask) -> None:
    assert {swapped for *_, swapped in combinations(ask(30, train__compile=True))} == {0}
    assert {shard for _, _, shard, _ in combinations(ask(30, ranks=4, adapter__dora=True))} == {"none"}
    dynamic = ask(1000, train__base_linears="full")
    assert "int8-dynamic" not in {plan.settings["base_linears"] for plan in dynamic}, "it rounds activations"


def test_the_largest_micro_batch_that_fits_is_taken(ask: Ask) -> None:
    found = ask(110, micro_batches=(4, 2, 1), train__micro_batch=4)
    chosen = {
        plan.settings["gradient_checkpointing"]: plan
        for plan in found
        if plan.settings["base_linears"] == "full"
    }
    assert {mode: plan.settings["micro_batch"] for mode, plan in chosen.items()} == {"none": 2, "blocks": 4}
    assert chosen["none"].takes.activations == 16 * GIB, "on the line between one row and four"


def test_time_counts_products_decoding_and_what_copies_do_not_hide(ask: Ask) -> None:
    by = {tuple(plan.settings.values()): plan.step_s for plan in ask(30, train__global_batch=1)}
    assert by[1, "none", "full", "none", 0] == 2.0
    assert by[1, "blocks", "full", "none", 0] == 3.0
    assert by[1, "blocks", "int8", "none", 0] == 3.0 + 3 * 10**10 * 7 / 8e11
    assert by[1, "blocks", "full", "none", 9] == pytest.approx(2 * 72 * GIB / 2e10), (
        "longer than the products"
    )


@pytest.mark.parametrize(
    ("gib", "ranks", "changes"),
    [
        (151, 1, "train.micro_batch=8"),
        (125, 1, "train.micro_batch=4"),
        (70, 1, "train.micro_batch=2 train.base_linears=int8"),  # nf4 with 4 rows is faster by 1%
        (27, 1, "train.micro_batch=4 train.gradient_checkpointing=blocks train.swap_blocks=auto"),
        (36.5, 4, "train.micro_batch=2 train.base_linears=int8 train.shard=all"),
    ],
)
def test_the_fastest_that_fits_is_named(make: Make, ask: Ask, gib: float, ranks: int, changes: str) -> None:
    """Of equally fast ones, that with the most precise weights."""
    cfg = make(model__path=str(bases.flux1()), train__micro_batch=16, train__global_batch=16)
    assert told(cfg, gib, ranks) == changes


def test_blocks_for_which_there_is_room_stay_whole(make: Make, ask: Ask) -> None:
    """Each of the 8 GiB takes 6 more than its quarter; 18 are taken by two gathered ones and activations."""
    shared = {"train__shard": "all", "train__gradient_checkpointing": "blocks", "train__global_batch": 4}
    cfg = make(model__path=str(bases.flux1()), **shared)
    assert "each GPU holds 2 of 10 blocks whole" in list(forecast.report(cfg, 60, ranks=4))
    plan = next(plan for plan in ask(60, ranks=4, **shared) if not plan.changes(cfg))
    assert plan.takes == predict(cfg, Base.find(cfg.model), "cuda", 4, 60 * GIB)
    assert plan.takes.peak == (20 + 2 * 6 + 18) * GIB
    assert plan.step_s == pytest.approx(2 * 8 * 8 * GIB * 3 / 4 / 2e10), "to receive the other eight twice"
    assert {shard for _, _, shard, _ in combinations(ask(1000, ranks=4))} == {"none"}


def test_images_are_given_up_last(make: Make, ask: Ask) -> None:
    cfg = make(model__path=str(bases.flux1()), validation__prompts=["a photo of sks dog"])
    assert told(cfg, 31).startswith("train.")
    assert told(cfg, 12).startswith("validation.prompts=[] train.")
    assert told(cfg, 2) == "a smaller adapter.rank or prepare.resolution, or a larger GPU"


def test_a_faster_plan_is_named_where_the_present_one_fits(make: Make, ask: Ask) -> None:
    cfg = make(model__path=str(bases.flux1()), train__gradient_checkpointing="blocks")
    assert list(forecast.report(cfg, 200))[-1] == "faster, and fits too: train.gradient_checkpointing=none"
    cfg = make(model__path=str(bases.flux1()))
    lines = list(forecast.report(cfg, 200))
    assert "fits into 200.0 GiB" in lines and not lines[-1].startswith("faster")


def test_auto_swaps_what_is_missing(make: Make, ask: Ask) -> None:
    cfg = make(
        model__path=str(bases.flux1()), train__swap_blocks="auto", train__gradient_checkpointing="blocks"
    )
    lines = list(forecast.report(cfg, 35.0))
    assert "train.swap_blocks=auto swaps 9 of 10 blocks" in lines and "fits into 35.0 GiB" in lines
    assert "  page-locked host memory of each process               72.000" in lines


def test_images_before_and_after_training_are_foreseen(make: Make) -> None:
    cfg = make(
        model__path=str(bases.flux1()), prepare__class_prompt="a dog", sample__prompts=["a dog"],
        prepare__sampling__batch=64,
    )  # fmt: skip
    base, room = Base.find(cfg.model), r"takes (0\.\d\d) GiB"
    ample, tight = (list(forecast.generating(cfg, base, has * GIB)) for has in (24, 0.6))
    assert [line.partition(" takes")[0] for line in ample] == [
        "generating class images",
        "generating samples",
    ]
    assert all(re.search(f"{room}$", line) for line in ample)
    assert re.search(f"{room} with 3 of 3 blocks swapped, which is .*; use a smaller prepare.sampl", tight[0])
