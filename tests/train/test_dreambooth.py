"""The loss against the reference semantics, and a step that never reads a tensor back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor

from dbtrain.data import prompt_table
from dbtrain.data.shards import Manifest
from dbtrain.models.base import Base
from dbtrain.models.precision import PRECISIONS
from dbtrain.train import dreambooth, memory, optim
from dbtrain.train.checkpoint import Progress
from dbtrain.train.step import train_step, update
from tests import bases
from tests.conftest import Make, at, slow
from tests.networks import build, first_batch, stream


def test_min_snr_weighs_each_row_by_its_own_timestep_with_prior_preservation(
    make: Make, prepared: Path
) -> None:
    """Diffusers' scripts compute weights for the whole batch and apply them to its first half."""
    plain, weighted = (
        build(make(train__micro_batch=4, loss__min_snr_gamma=gamma), prepared) for gamma in (None, 5.0)
    )
    batches = stream(make(train__micro_batch=4), prepared)
    batch = next(batches)
    batches.close()
    t = (batch.u * 1000).long()
    scheduler = DDPMScheduler.from_pretrained(bases.sd(), subfolder="scheduler")
    snr = scheduler.alphas_cumprod[t] / (1 - scheduler.alphas_cumprod[t])
    with torch.no_grad():
        torch.testing.assert_close(weighted(batch), plain(batch) * (5.0 / snr).clamp(max=1))
    assert len(t) == 8 and len(set(t.tolist())) > 4, "instance and class rows have timesteps of their own"


@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_the_weighted_loss_is_the_reference_s(make: Make, prepared: Path, weight: float) -> None:
    """diffusers' train_dreambooth_lora.py: mse(instance half) + prior_loss_weight * mse(class half)."""
    cfg = make(train__micro_batch=4, loss__prior_weight=weight)
    model, batches = build(cfg, prepared), stream(cfg, prepared)
    for adapter in model.trainable().values():
        torch.nn.init.normal_(adapter, std=0.05, generator=torch.Generator().manual_seed(1))
    batch = next(batches)
    batches.close()
    with torch.no_grad():
        ours = (batch.weight * model(batch)).sum()

        scheduler = DDPMScheduler.from_pretrained(bases.sd(), subfolder="scheduler")
        latents = (batch.stored["mean"] + batch.stored["std"] * batch.posterior) * 0.18215
        t = (batch.u * 1000).long()
        noisy = scheduler.add_noise(latents, batch.noise, t)
        table = prompt_table.read(at(prepared), Manifest.read(at(prepared)).prompts)[
            "condition.prompt_embeds"
        ]
        prediction = model.denoiser(noisy, t, table[batch.prompt]).sample
        instance, prior = prediction.chunk(2)
        noise, prior_noise = batch.noise.chunk(2)
        mse = torch.nn.functional.mse_loss
        theirs = mse(instance, noise) + weight * mse(prior, prior_noise)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_the_huber_loss_of_a_row_follows_its_noise_level(make: Make, prepared: Path) -> None:
    square, huber = (build(make(train__micro_batch=4, loss__huber=c), prepared) for c in (None, 0.1))
    batches = stream(make(train__micro_batch=4), prepared)
    batch = next(batches)
    batches.close()
    with torch.no_grad():
        ratio = huber(batch) / square(batch)
    order = batch.u.argsort()  # the threshold falls with the noise, so more of the error is beyond it
    assert (ratio < 1).all() and ratio[order[-1]] < 0.5 < ratio[order[0]]


@pytest.mark.parametrize("trained", [{"text_encoder": {"rank": 2}}, {"token": {}}], ids=str)
def test_a_large_prompt_table_stays_on_the_host_also_for_trained_encoders(
    make: Make, prepared: Path, monkeypatch: pytest.MonkeyPatch, trained: dict[str, Any]
) -> None:
    settings = {f"adapter__{key}": value for key, value in trained.items()}
    cfg = make(data__shards=str(prepared), **settings)
    small = build(cfg, prepared)
    monkeypatch.setattr(dreambooth, "RESIDENT", 0)
    large = build(cfg, prepared)
    assert small.prompt_names and not small.on_host and large.on_host and not large.prompt_names
    batch = first_batch(cfg, small.family)
    with torch.no_grad():
        torch.testing.assert_close(large(batch), small(batch))


@pytest.mark.slow
@pytest.mark.parametrize("text", [None, {"rank": 2}], ids=["frozen", "trained"])
def test_a_table_on_the_host_is_predicted_to_take_none_of_the_device(
    make: Make, monkeypatch: pytest.MonkeyPatch, text: dict[str, Any] | None
) -> None:
    cfg = make(prepare__captions=True, adapter__text_encoder=text)
    base = Base.find(cfg.model)
    here = memory.predict(cfg, base, "cuda")
    monkeypatch.setattr(dreambooth, "RESIDENT", 0)
    there = memory.predict(cfg, base, "cuda")
    width = 32 * (8 if text else 64 * 4)  # bytes of a prompt: its tokens' ids, or their embeddings
    assert here.base - there.base == pytest.approx(1000 * width, abs=512)
    assert (there.adapter, there.moments) == (here.adapter, here.moments)


def test_micro_batches_sum_to_the_loss_and_gradient_of_the_whole(make: Make, prepared: Path) -> None:
    results = []
    for micro_batch in (4, 2, 1):
        cfg = make(train__micro_batch=micro_batch, loss__prior_weight=0.7, optim__clip=1e9)
        model, batches = build(cfg, prepared), stream(cfg, prepared)
        outcome = train_step(model, Progress.begin(model, cfg), batches, 0, cfg)
        batches.close()
        results.append(torch.cat([outcome.losses, outcome.grad_norm[None]]))
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(results[2], results[0])


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "pure-bf16"])
@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_a_dropped_layer_has_a_gradient_of_0(make: Make, prepared: Path, kind: str, precision: str) -> None:
    """Of its parameters DDP would otherwise wait for one, and the optimizer would not let them decay."""
    cfg = make(adapter__kind=kind, adapter__module_dropout=0.9999, train__precision=precision)
    model, batches = build(cfg, prepared), stream(cfg, prepared)
    plain = build(make(adapter__kind=kind, train__precision=precision), prepared)
    batch = next(batches)
    batches.close()
    torch.manual_seed(0)
    with model.working_copies.in_place(), PRECISIONS[precision].forward(torch.device("cpu")):
        loss = model(batch)
        loss.sum().backward()
    with plain.working_copies.in_place(), PRECISIONS[precision].forward(torch.device("cpu")):
        assert torch.equal(loss, plain(batch)), "an update that is 0 at the start"
    assert all(p.grad is not None and not p.grad.any() for p in model.trainable().values())


@contextmanager
def no_host_reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every way to read a tensor's value into Python fails inside the block."""

    def guard(name: str):  # type: ignore[no-untyped-def]
        def read(self, *args, **kwargs):  # type: ignore[no-untyped-def]
            raise AssertionError(f"the step reads a tensor back: Tensor.{name}")

        return read

    names = ("item", "cpu", "numpy", "tolist", "__bool__", "__float__", "__int__", "__index__", "nonzero")
    with monkeypatch.context() as patch:
        for name in names:
            patch.setattr(Tensor, name, guard(name))
        yield


@pytest.mark.parametrize("nonfinite", ["stop", "skip"])
@pytest.mark.parametrize("precision", ["fp32", *map(slow, ("bf16", "fp16", "pure-bf16"))])
def test_a_step_reads_no_tensor_back_to_the_host(
    make: Make, prepared: Path, monkeypatch: pytest.MonkeyPatch, precision: str, nonfinite: str
) -> None:
    cfg = make(
        train__precision=precision, train__micro_batch=2, loss__min_snr_gamma=5.0, adapter__dropout=0.1,
        faults__nonfinite=nonfinite,
    )  # fmt: skip
    model, rows = build(cfg, prepared), stream(cfg, prepared)
    progress = Progress.begin(model, cfg)
    ready = [next(rows) for _ in range(4)]  # the thread reads rows, which is not the step's doing
    rows.close()
    fake = iter(ready)

    class Ready:
        share, device = rows.share, rows.device
        batches = rows.batches
        __next__ = staticmethod(lambda: next(fake))

    for step in range(2):
        with no_host_reads(monkeypatch):
            outcome = train_step(model, progress, Ready(), step, cfg)  # type: ignore[arg-type]
        assert outcome.losses.isfinite().all() and outcome.grad_norm.isfinite()
        assert outcome.bad.isinf().all() and progress.skipped == 0


def test_an_infinite_gradient_is_a_fault_once_the_loss_scale_is_1(make: Make, prepared: Path) -> None:
    cfg = make(train__precision="fp16", faults__nonfinite="skip")
    model = build(cfg, prepared)
    progress, weights = Progress.begin(model, cfg), list(model.trainable().values())

    def norm(gradient: float) -> Tensor:
        progress.scaler.scale(torch.ones(()))
        for weight in weights:
            weight.grad = torch.full_like(weight, gradient)
        return update(progress, cfg)

    norms = torch.stack([norm(torch.nan) for _ in range(200)])  # halved as often, a scale would be 0
    assert (norms[:16] == 0).all() and norms[16:].isnan().all() and progress.scaler.get_scale() == 1
    assert norm(1.0) > 0 and all(weight.isfinite().all() for weight in weights)


def test_the_guard_catches_a_read(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError, match="item"), no_host_reads(monkeypatch):
        torch.ones(()).item()
    with pytest.raises(AssertionError, match="__bool__"), no_host_reads(monkeypatch):
        bool(torch.ones(()) > 0)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "pure-bf16"])
def test_adapters_moments_and_tables_are_fp32_in_every_precision(
    make: Make, prepared: Path, precision: str
) -> None:
    cfg = make(train__precision=precision)
    model, batches = build(cfg, prepared), stream(cfg, prepared)
    progress = Progress.begin(model, cfg)
    before = {name: p.detach().clone() for name, p in model.trainable().items()}
    train_step(model, progress, batches, 0, cfg)
    batches.close()
    base = PRECISIONS[precision].dtype
    assert model.denoiser.conv_in.weight.dtype == base  # type: ignore[union-attr]
    assert model.objective.alphas_cumprod.dtype == torch.float32
    assert {p.dtype for p in model.trainable().values()} == {torch.float32}
    assert {t.dtype for t in optim.state(progress.optimizer, model.trainable()).values()} == {torch.float32}
    moved = [name for name, p in model.trainable().items() if not torch.equal(p, before[name])]
    assert {name.split(".lora_")[1] for name in moved} == {"A.default.weight", "B.default.weight"}
    assert all(not p.requires_grad for name, p in model.denoiser.named_parameters() if "lora" not in name)


def test_the_adapter_starts_the_same_in_every_precision(make: Make, prepared: Path) -> None:
    starts = [build(make(train__precision=p), prepared).trainable() for p in ("fp32", "bf16")]
    assert all(torch.equal(starts[0][name], starts[1][name]) for name in starts[0])
    other = build(make(seed=1), prepared).trainable()
    assert not all(torch.equal(starts[0][name], other[name]) for name in other)


def test_v_prediction_comes_from_the_base_s_scheduler(make: Make, prepared: Path, tmp_path: Path) -> None:
    import shutil

    folder = shutil.copytree(bases.sd(), tmp_path / "v")
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace('"epsilon"', '"v_prediction"'))
    cfg = make(model__path=str(folder), train__micro_batch=4)
    model, batches = build(cfg, prepared), stream(cfg, prepared)
    assert model.objective.prediction == "v_prediction"
    batch = next(batches)
    batches.close()
    scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", dtype=torch.float32)
    with torch.no_grad():
        latents = (batch.stored["mean"] + batch.stored["std"] * batch.posterior) * 0.18215
        t = (batch.u * 1000).long()
        table = prompt_table.read(at(prepared), Manifest.read(at(prepared)).prompts)[
            "condition.prompt_embeds"
        ]
        prediction = unet(scheduler.add_noise(latents, batch.noise, t), t, table[batch.prompt]).sample
        want = (prediction - scheduler.get_velocity(latents, batch.noise, t)).square().mean((1, 2, 3))
        torch.testing.assert_close(model(batch), want, rtol=1e-5, atol=1e-6)
