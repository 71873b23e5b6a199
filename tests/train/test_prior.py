"""Prior preservation by prediction: class rows whose target is what the base alone predicts for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from benchmarks import trainer
from dbtrain.adapters import inject, tokens
from dbtrain.config import Model
from dbtrain.data.batch import Batch
from dbtrain.data.order import RankSlice
from dbtrain.data.shards import Manifest
from dbtrain.models import kernels
from dbtrain.models.base import Base
from dbtrain.models.precision import PRECISIONS
from dbtrain.prepare.prepare import prepare
from dbtrain.runtime.errors import ConfigError, Preempted
from dbtrain.train import fingerprint, memory
from dbtrain.train.checkpoint import Progress
from dbtrain.train.dreambooth import DreamBooth
from dbtrain.train.step import train_step
from tests import bases
from tests.conftest import Make, at, slow, train
from tests.networks import awake, build, stream
from tests.runs import EXPORT

PREDICTED = {"loss__prior": "prediction", "train__micro_batch": 2}


def first(cfg: Any, prepared: Path) -> Batch:
    batches = stream(cfg, prepared)
    batch = next(batches)
    batches.close()
    return batch


def asked(model: DreamBooth, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """What the denoiser gets for a batch, but for text encoders that are trained."""
    t = model.objective.timesteps(batch.u)
    x_t = model.objective.corrupt(model.x0(batch), batch.noise, t)
    return x_t, t, model.rows(batch) | batch.extra


KINDS: list[dict[str, Any]] = [
    {"dropout": 0.3, "targets": "all"},
    {"dora": True},
    {"bias": "all", "targets": "all"},
    {"kind": "loha", "module_dropout": 0.2},
    {"kind": "lokr", "targets": "all"},
]


@pytest.mark.parametrize("settings", KINDS, ids=lambda settings: " ".join(settings))
def test_switched_off_it_is_the_base_to_the_bit_and_back_it_is_itself(
    make: Make, prepared: Path, settings: dict[str, Any]
) -> None:
    for precision in ("fp32", "bf16"):
        changes = {f"adapter__{name}": value for name, value in settings.items()}
        cfg = make(train__precision=precision, **PREDICTED, **changes)
        model = awake(build(cfg, prepared))
        batch = first(cfg, prepared)
        x_t, t, condition = asked(model, batch)
        dtype = PRECISIONS[precision].dtype
        unet = Base.find(cfg.model).load("unet", dtype).train()
        inject.silence_dropout(unet)
        model.eval()
        with PRECISIONS[precision].forward(torch.device("cpu")), torch.no_grad():
            with model.working_copies.in_place():
                before = model.family.denoise(model.denoiser, x_t.to(dtype), t, condition)
                found = model.base_prediction(replace(batch, preserved=len(t)), x_t, t, batch.extra)
                after = model.family.denoise(model.denoiser, x_t.to(dtype), t, condition)
            wanted = model.family.denoise(unet, x_t.to(dtype), t, condition)
        assert torch.equal(found, wanted.float()) and torch.equal(before, after)
        assert not torch.equal(found, before.float())


def test_class_rows_are_photos_with_the_class_prompt_and_draws_of_their_own(
    make: Make, prepared: Path
) -> None:
    cfg = make(**PREDICTED)
    batches = stream(cfg, prepared)
    sources, seen = {"instance": set(), "class": set()}, set()
    for number in range(6):
        batch = next(batches)
        assert batch.prompts == (0, 0, 1, 1) and batch.preserved == 2
        assert not torch.equal(batch.noise[:2], batch.noise[2:])
        for role, every in sources.items():
            every |= {batches.source(role, 2 * number + slot) for slot in range(2)}
        seen.add(tuple(batches.source(role, 2 * number) for role in sources))
    batches.close()
    assert sources["class"] == sources["instance"], "the photos"
    assert any(one != other for one, other in seen), "in an order of their own"


def test_rows_do_not_depend_on_the_number_of_ranks(make: Make, prepared: Path) -> None:
    cfg = make(**PREDICTED)
    seen = []
    for world in (1, 2):
        every = [stream(cfg, prepared, share=RankSlice(4, 2, rank, world)) for rank in range(world)]
        seen.append([sum(next(one).seen for one in every for _ in range(2 // world)) for _ in range(5)])
        for one in every:
            one.close()
    assert seen[0] == seen[1]


def test_distillation_asks_for_class_images(make: Make, prepared: Path) -> None:
    """Its rows are those of class images; their targets are the base's predictions for them."""
    of_images, distilled = (
        first(make(loss__prior=prior, train__micro_batch=2), prepared) for prior in ("images", "distillation")
    )
    assert (of_images.preserved, distilled.preserved, distilled.prompts) == (0, 2, (0, 0, 1, 1))
    assert of_images.seen == distilled.seen
    for name, rows in of_images.stored.items():
        assert torch.equal(rows, distilled.stored[name])
    model = build(make(loss__prior="distillation", train__micro_batch=2), prepared)
    losses = model(distilled)
    assert losses[2:].max() < 1e-9 < losses[:2].min(), "a new adapter changes nothing"


TRAINED: dict[str, dict[str, Any]] = {
    "frozen": {},
    "trained": {"adapter__text_encoder": {"kind": "lora", "rank": 2}},
    "a word": {"adapter__token": {}},
}


@pytest.mark.parametrize("text", TRAINED)
def test_the_loss_is_the_distance_from_the_base_s_own_prediction(
    make: Make, prepared: Path, text: str
) -> None:
    cfg = make(**PREDICTED, **TRAINED[text], loss__min_snr_gamma=5.0)
    model, batch = build(cfg, prepared), first(cfg, prepared)
    assert model(batch)[2:].max() < 1e-9, "a new adapter changes nothing"
    awake(model)
    losses = model(batch)
    losses[2:].sum().backward()
    moved = {name for name, p in model.trainable().items() if p.grad is not None and p.grad.abs().max() > 0}
    assert moved == {name for name in model.trainable() if not name.endswith(tokens.DIRECTION)}
    with torch.no_grad():
        x_t, t, condition = asked(model, batch)
        plain = Base.find(cfg.model).load("unet", torch.float32)
        of_base = model.family.denoise(plain, x_t, t, condition)
        ours = model.family.denoise(model.denoiser, x_t, t, model.condition(batch))
        error = (ours - torch.cat([batch.noise[:2], of_base[2:]])).square().mean((1, 2, 3))
        torch.testing.assert_close(losses, model.objective.weight(t) * error)
        torch.testing.assert_close(model(replace(batch, preserved=0))[:2], losses[:2])


@pytest.mark.parametrize("name", ["sd", "sd-v", "flux1"])
def test_every_other_step_the_base_redraws_the_photos(make: Make, name: str) -> None:
    """By one sampling step, from a noise level higher by half of all levels."""
    cfg = make(model__path=str(bases.ALL[name]()), **PREDICTED)
    folder = prepare(cfg)
    batches = stream(cfg, folder)
    plain, batch = (batches.micro_batch(step, 0) for step in (2, 3))
    batches.close()
    assert (plain.redraws, batch.redraws) == (False, True)
    assert batch.redrawn.tolist() == [False, False, True, True] and not plain.redrawn.any()
    assert plain.u[2:].min() >= 0.5 > batch.u[2:].max()

    model = awake(build(cfg, folder))
    plain_base = Base.find(cfg.model).load(model.family.denoiser, torch.float32)
    t, higher = (model.objective.timesteps(batch.u + more) for more in (0, 0.5))
    condition = model.rows(batch)
    with torch.no_grad():
        x0, given = model.x0(batch), model.condition(batch)
        before = model.objective.corrupt(x0, batch.noise, higher)
        predicted = model.family.denoise(plain_base, before, higher, condition)
        if name == "flux1":
            image = before - higher.view(-1, 1, 1, 1) * predicted
        else:
            ddim = DDIMScheduler.from_pretrained(str(cfg.model.path), subfolder="scheduler")
            ddim.set_timesteps(1000)
            image = torch.cat([
                ddim.step(predicted[k : k + 1], int(higher[k]), before[k : k + 1]).pred_original_sample
                for k in range(len(higher))
            ])  # fmt: skip
        x_t = model.objective.corrupt(torch.cat([x0[:2], image[2:]]), batch.noise, t)
        of_base = model.family.denoise(plain_base, x_t, t, condition)
        target = torch.cat([model.objective.target(x0, batch.noise, t)[:2], of_base[2:]])
        error = (model.family.denoise(model.denoiser, x_t, t, given) - target).square().mean((1, 2, 3))
        losses = model(batch)
    torch.testing.assert_close(losses, model.objective.weight(t) * error, rtol=1e-4, atol=0)
    assert (losses - model(replace(batch, redraws=False)))[2:].abs().min() > 0.01 * losses[2:].max()


MODES: list[Any] = [
    ({"train__gradient_checkpointing": "blocks"}, None),
    ({"train__gradient_checkpointing": "blocks", "train__swap_blocks": 5, "adapter__bias": "all"}, None),
    ({"train__base_linears": "int8", "adapter__dora": True}, "train__base_linears"),
    ({"train__precision": "bf16", "adapter__bias": "all"}, "train__precision"),
    slow({"train__swap_blocks": 6, "train__gradient_checkpointing": "transformer"}, None),
]


@pytest.mark.parametrize(("settings", "rounds"), MODES)
def test_a_mode_gives_the_plain_losses(
    make: Make, prepared: Path, settings: dict[str, Any], rounds: str | None
) -> None:
    results = []
    for more in ({}, settings):
        plain = {key: value for key, value in settings.items() if key.startswith("adapter")}
        with trainer.steps(make(data__shards=str(prepared), **PREDICTED, **plain | more)) as job:
            awake(job.model)
            results.append(torch.stack([job.take(number).losses for number in range(2)]))
    torch.testing.assert_close(*results, rtol=2e-2 if rounds else 0, atol=0)


@pytest.mark.slow
def test_compiled_it_takes_one_graph_more_and_no_other(make: Make, prepared: Path) -> None:
    torch._dynamo.reset()
    graphs: list[int] = []

    def counting(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        graphs.append(len(inputs))
        return graph.forward

    cfg = make(**PREDICTED, adapter__bias="all", model__path=str(bases.sd(size="slim")))
    plain, model = (awake(build(cfg, prepared)) for _ in range(2))
    kernels.compile_module(model.denoiser, True, counting)
    counts, losses = [], []
    for one in (plain, model):
        batches, progress = stream(cfg, prepared), Progress.begin(one, cfg)
        for step in range(3):
            losses.append(train_step(one, progress, batches, step, cfg).losses)
            counts.append(len(graphs))
        batches.close()
    torch.testing.assert_close(torch.stack(losses[:3]), torch.stack(losses[3:]), rtol=1e-5, atol=0)
    assert counts == [0, 0, 0, 2, 2, 2]


def test_a_run_without_class_images_resumes_to_the_bit(make: Make, tmp_path: Path) -> None:
    make = partial(make, prepare__class_dir=str(tmp_path / "none"))
    cfg = make(**PREDICTED)
    prepare(cfg)
    manifest = Manifest.read(at(tmp_path / "shards"))
    assert manifest.roles.keys() == {"instance"} and not (tmp_path / "none").exists()
    assert manifest.prompts.texts == ("a photo of sks dog", "a photo of a dog")
    straight = train(cfg)
    other = make(**PREDICTED, run_dir=str(tmp_path / "again"))
    with pytest.raises(Preempted):
        train(other, until=2)
    assert (train(other) / EXPORT).read_bytes() == (straight / EXPORT).read_bytes()
    lines = (straight / "metrics.jsonl").read_text()
    assert lines.count('"loss_prior"') == 4

    with pytest.raises(ConfigError, match=r"loss.prior was 'prediction', is now 'none'"):
        train(make(loss__prior="none"))
    with pytest.raises(ConfigError, match=r"was made with prepare.class_images None, now 8"):
        train(make(run_dir=str(tmp_path / "third")))


def test_shards_with_class_images_can_be_trained_by_prediction_and_without(
    make: Make, prepared: Path, tmp_path: Path
) -> None:
    for prior, roles in (("prediction", 2), ("distillation", 2), ("none", 1)):
        cfg = make(
            data__shards=str(prepared), loss__prior=prior, run_dir=str(tmp_path / prior), train__steps=1
        )
        train(cfg)
        assert ("loss_prior" in (tmp_path / prior / "metrics.jsonl").read_text()) == (roles == 2)


def test_runs_and_shards_without_it_are_as_they_were(make: Make, prepared: Path) -> None:
    later = {"loss.prior", "loss.huber", "loss.timesteps"}
    assert not later & fingerprint.of_settings(make(), Manifest.read(at(prepared)).request).keys()
    changed = make(loss__prior="prediction", loss__huber=0.1, loss__timesteps={"low": 0.2})
    assert later | {"loss.prior's photos"} <= fingerprint.of_settings(changed, {}).keys()


@pytest.mark.parametrize(("changes", "words"), [
    ({"loss__prior": "prediction", "prepare__class_prompt": None}, "set prepare.class_prompt"),
    ({"prepare__class_images": 0}, "prepare.class_images is 0, but loss.prior is images"),
    ({"loss__prior": "distillation", "prepare__class_images": 0}, "but loss.prior is distillation"),
    ({"loss__prior": "prediction", "prepare__class_held_out": 2}, "there are no class images"),
])  # fmt: skip
def test_settings_that_preserve_nothing_are_refused(make: Make, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make(**changes)


def test_shards_without_a_class_prompt_are_refused(make: Make, tmp_path: Path) -> None:
    prepare(make(prepare__class_prompt=None))
    values = make(loss__prior="prediction").model_dump(mode="json") | {"prepare": None}
    with pytest.raises(ConfigError, match=r"the shards lack the class prompt None; set prepare.class_prompt"):
        train(type(make()).from_dict(values))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd", "flux1"])
def test_the_step_takes_at_most_1_4_of_the_operations(make: Make, name: str) -> None:
    cfg = make(model__path=str(getattr(bases, name)()), train__micro_batch=2)
    base = Base.find(cfg.model)
    images, prediction = (
        memory.predict(cfg.override(f"loss.prior={prior}"), base, "cuda")
        for prior in ("images", "prediction")
    )
    assert 1.15 < prediction.flops / images.flops < 1.4
    assert prediction.activations < 1.02 * images.activations, "the base's pass is over before the other"


@pytest.mark.parametrize("name", ["sdxl", "if-1", "if-2", "flux1", slow("sd3")])
def test_families_with_text_encoders_and_upscalers_ask_their_base(make: Make, name: str) -> None:
    folder = bases.ALL[name]()
    family = Base.find(Model(path=str(folder))).family
    cfg = make(
        model__path=str(folder), prepare__resolution=bases.SIDES[family.name],
        adapter__text_encoder={"kind": "lora", "rank": 2}, **PREDICTED,
    )  # fmt: skip
    folder = prepare(cfg)
    model, batches = build(cfg, folder), stream(cfg, folder)
    both = [batches.micro_batch(step, 0) for step in (0, 1)]  # the second's photos are redrawn
    batches.close()
    with torch.no_grad():
        new = [model(batch) for batch in both]
        awake(model)
        for batch, before in zip(both, new, strict=True):
            assert before[2:].max() < 1e-4 * before[:2].min(), "but for the rounding of the prompt table"
            assert model(batch)[2:].min() > 10 * before[2:].max()
