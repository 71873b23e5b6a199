"""Adapters compute on copies in the base's precision, and nobody can tell but by the time it takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dbtrain.models.precision import PRECISIONS, WorkingCopies
from dbtrain.train.checkpoint import Progress
from dbtrain.train.step import compute_step, train_step
from tests.conftest import Make
from tests.networks import awake, build, stream


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("kind", [{}, {"adapter__dora": True}], ids=str)
def test_copies_change_no_bit_of_what_autocast_gives(
    make: Make, prepared: Path, precision: str, kind: dict[str, object]
) -> None:
    results = []
    for copied in (True, False):
        cfg = make(train__precision=precision, train__micro_batch=2, optim__clip=1e9, **kind)
        model, batches = awake(build(cfg, prepared)), stream(cfg, prepared)
        if not copied:
            model.working_copies = WorkingCopies(model, [], model.dtype)
        outcome = train_step(model, Progress.begin(model, cfg), batches, 0, cfg)
        batches.close()
        results.append([*outcome[:2], *(p.grad for p in model.trainable().values())])
    for one, other in zip(*results, strict=True):
        assert one.dtype == torch.float32 and torch.equal(one, other)


@pytest.mark.parametrize("precision", ["bf16", "pure-bf16"])
def test_recomputed_activations_see_the_copies_too(make: Make, prepared: Path, precision: str) -> None:
    results = []
    for on in ("blocks", "none"):
        cfg = make(train__precision=precision, train__gradient_checkpointing=on, optim__clip=1e9)
        model, batches = awake(build(cfg, prepared)), stream(cfg, prepared)
        train_step(model, Progress.begin(model, cfg), batches, 0, cfg)
        batches.close()
        results.append([p.grad for p in model.trainable().values()])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_the_originals_are_back_after_the_step_and_after_an_error(make: Make, prepared: Path) -> None:
    cfg = make(train__precision="pure-bf16", adapter__bias="all")
    model, batches = build(cfg, prepared), stream(cfg, prepared)
    before = dict(model.named_parameters())
    with pytest.raises(ZeroDivisionError), model.working_copies.in_place():
        inside = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
        raise ZeroDivisionError
    assert inside == {torch.bfloat16}
    compute_step(model, Progress.begin(model, cfg), [next(batches)], cfg)
    batches.close()
    assert all(parameter is before[name] for name, parameter in model.named_parameters())


def test_fp32_and_dora_have_no_copies(make: Make, prepared: Path) -> None:
    """DoRA's scale is a quotient of nearly equal norms; in bf16 it would be off by more than it learns."""
    for settings in ({}, {"adapter__dora": True, "train__precision": "pure-bf16"}):
        cfg = make(**settings)
        model, batches = build(cfg, prepared), stream(cfg, prepared)
        assert not model.working_copies.places
        assert compute_step(model, Progress.begin(model, cfg), [next(batches)], cfg).grad_norm > 0
        batches.close()


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr"])
@pytest.mark.parametrize("precision", ["bf16", "pure-bf16"])
def test_every_kind_trains(make: Make, prepared: Path, kind: str, precision: str) -> None:
    extra = {"adapter__bias": "all"} if kind == "lora" else {}
    cfg = make(train__precision=precision, adapter__kind=kind, adapter__targets="all", **extra)
    model, batches = awake(build(cfg, prepared)), stream(cfg, prepared)
    compute_step(model, Progress.begin(model, cfg), [next(batches)], cfg)
    batches.close()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.trainable().values())


def test_pure_bf16_computes_nothing_in_fp32_that_is_large(make: Make, prepared: Path) -> None:
    """No autocast: activations of the denoiser are bf16 throughout, also after its norms."""
    cfg = make(train__precision="pure-bf16", adapter__text_encoder={"rank": 2})
    model, batches = awake(build(cfg, prepared)), stream(cfg, prepared)
    seen = set()

    def note(module: torch.nn.Module, _: object, output: object) -> None:
        if isinstance(output, torch.Tensor):
            seen.add((type(module).__name__, output.dtype))

    for module in model.denoiser.modules():
        module.register_forward_hook(note)
    outcome = compute_step(model, Progress.begin(model, cfg), [next(batches)], cfg)
    batches.close()
    assert outcome.grad_norm.isfinite() and outcome.grad_norm > 0
    assert {dtype for _, dtype in seen if _ != "Timesteps"} == {torch.bfloat16}
    assert not PRECISIONS["pure-bf16"].autocast
