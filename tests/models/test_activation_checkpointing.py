"""Gradient checkpointing: what is computed twice, and that nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dbtrain.config import Model
from dbtrain.models import kernels
from dbtrain.models.activation_checkpointing import checkpoint_activations
from dbtrain.models.base import Base
from dbtrain.runtime.errors import ConfigError
from dbtrain.train.checkpoint import Progress
from dbtrain.train.step import train_step
from tests import bases
from tests.conftest import Make, slow
from tests.networks import build, stream

MODES = ("none", "transformer", "blocks")
ADAPTERS: list[dict[str, Any]] = [
    {},
    slow({"adapter__targets": "mid_block.*to_q"}),  # the first blocks' inputs need no gradient
    slow({"adapter__dropout": 0.2}),
    slow({"train__base_linears": "int8"}),
    slow({"train__precision": "bf16"}),
    slow({"adapter__kind": "loha"}),
]


@pytest.mark.parametrize("settings", ADAPTERS, ids=str)
def test_gradients_are_the_same_and_more_is_computed_in_each_mode(
    make: Make, prepared: Path, settings: dict[str, Any]
) -> None:
    grads, flops = [], []
    for mode in MODES:
        cfg = make(
            model__path=str(bases.sd(size="slim")),
            train__gradient_checkpointing=mode,
            optim__clip=1e9,
            **settings,
        )
        model, batches = build(cfg, prepared), stream(cfg, prepared)
        for parameter in model.trainable().values():  # B is 0 at the start, and so is A's gradient
            torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(1))
        with FlopCounterMode(display=False) as counter:
            train_step(model, Progress.begin(model, cfg), batches, 0, cfg)
        batches.close()
        grads.append({name: p.grad for name, p in model.trainable().items()})
        flops.append(counter.get_total_flops())
    for other in grads[1:]:
        assert all(torch.equal(grad, other[name]) for name, grad in grads[0].items())  # type: ignore[arg-type]
    assert flops[0] < flops[1] < flops[2], "a mode that changes nothing, or the wrong modules"


def test_text_encoders_recompute_too(make: Make, prepared: Path) -> None:
    for mode in MODES:
        cfg = make(train__gradient_checkpointing=mode, adapter__text_encoder={"rank": 2})
        model = build(cfg, prepared)
        assert model.text_encoders["text_encoder"].is_gradient_checkpointing is (mode != "none")


def test_a_denoiser_without_transformer_blocks_says_so() -> None:
    unet = Base.find(Model(path=str(bases.if_1()))).load("unet")
    with pytest.raises(ConfigError, match="no transformer blocks; use blocks"):
        checkpoint_activations(unet, [], "transformer")
    checkpoint_activations(unet, [], "blocks")
    assert unet.is_gradient_checkpointing


@pytest.mark.parametrize("old", [True, False])
def test_the_old_switch_is_told_the_choices(make: Make, old: bool) -> None:
    with pytest.raises(
        ConfigError, match=r"train.gradient_checkpointing is .*choose from 'none', 'transformer' or 'blocks'"
    ):
        make(train__gradient_checkpointing=old)


def test_a_budget_for_activations_needs_compile(make: Make) -> None:
    with pytest.raises(ConfigError, match=r"activation_memory is 0.5, but compile is false"):
        make(train__activation_memory=0.5)
    for wrong in (0.0, 1.5):
        with pytest.raises(ConfigError, match=r"train.activation_memory"):
            make(train__compile=True, train__activation_memory=wrong)
    assert make(train__compile=True, train__activation_memory=0.5).train.activation_memory == 0.5


@pytest.mark.parametrize("part", ["adapter", "adapter.text_encoder"])
@pytest.mark.parametrize("kind", ["dropout", "rank_dropout", "module_dropout"])
def test_a_budget_for_activations_takes_no_dropout(make: Make, part: str, kind: str) -> None:
    """Recomputed operators would draw other masks: wrong gradients, without a word."""
    compiled = make(train__compile=True)
    drops = [f"{part}.kind={'lora' if kind == 'dropout' else 'loha'}", f"{part}.{kind}=0.1"]
    with pytest.raises(ConfigError, match=r"activation_memory is 0.5, but .* dropout masks; set .* to null"):
        compiled.override("train.activation_memory=0.5", *drops)
    assert compiled.override("train.activation_memory=1.0", *drops).train.activation_memory == 1
    assert compiled.override("train.activation_memory=0.5").train.activation_memory == 0.5


@pytest.mark.slow
def test_a_compiled_denoiser_keeps_no_more_than_its_budget(make: Make, prepared: Path) -> None:
    """Bytes kept for the backward pass, with inductor's own partitioner but no code generation."""
    kept, losses, norms = [], [], []
    for budget in (None, 0.3):
        torch._dynamo.reset()
        cfg = make(
            model__path=str(bases.sd(size="slim")), train__compile=True, train__activation_memory=budget,
            train__micro_batch=4,
        )  # fmt: skip
        model, batches = build(cfg, prepared), stream(cfg, prepared)
        kernels.compile_module(model.denoiser, True, "aot_eager_decomp_partition", budget)
        weights = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
        saved: dict[int, int] = {}

        def keep(tensor: torch.Tensor, saved: dict[int, int] = saved) -> torch.Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            outcome = train_step(model, Progress.begin(model, cfg), batches, 0, cfg)
        batches.close()
        kept.append(sum(size for place, size in saved.items() if place not in weights))
        losses.append(outcome.losses)
        norms.append(outcome.grad_norm)
    assert kept[1] < 0.6 * kept[0], kept
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(norms[1], norms[0], rtol=1e-4, atol=0)
