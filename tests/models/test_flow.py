"""Flow-matching families against the stock pipelines: a step, the loss, its gradient, samples, refusals."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from dbtrain.adapters import inject
from dbtrain.config import AdapterSettings, Config, Model
from dbtrain.config.adapter import Adapter
from dbtrain.config.training import Loss, Timesteps
from dbtrain.data import prompt_table
from dbtrain.data.batch import Batch
from dbtrain.data.shards import Manifest
from dbtrain.data.sizes import Size
from dbtrain.models import sampler
from dbtrain.models.base import Base
from dbtrain.models.blocks import blocks
from dbtrain.models.families import registry as families
from dbtrain.models.flow_matching import FlowMatching, own_shift
from dbtrain.models.pretrained import Pretrained
from dbtrain.prepare import plan
from dbtrain.prepare.prepare import prepare
from dbtrain.runtime.errors import ConfigError, Preempted
from dbtrain.sample.pipeline import AdapterPipeline
from dbtrain.train import dreambooth, memory
from tests import bases, eyes
from tests.conftest import Make, at, dbtrain, draw_photo, thinned, train
from tests.networks import awake, build, first_batch

FLOW = [name for name in bases.OF_FAMILY if families.get(name).objective is FlowMatching]
# How users of a pipeline ask for guidance w, as its documentation has it.
GUIDANCE = {
    "flux2-klein": lambda w: {"guidance_scale": w},
    "flux2-dev": lambda w: {"guidance_scale": w},
    "qwen-image": lambda w: {"true_cfg_scale": w, "negative_prompt": " "},
    "z-image": lambda w: {"guidance_scale": w - 1},  # of prediction + g (prediction - unconditional)
    "flux1": lambda w: {"guidance_scale": w},
    "sd3": lambda w: {"guidance_scale": w},
    "chroma": lambda w: {"guidance_scale": w},
    "krea2": lambda w: {"guidance_scale": w - 1},
}
# What tells a base that was distilled to few steps: files and settings in them.
UNGUIDED = {"transformer/config.json": {"guidance_embeds": False}}
DISTILLED: dict[str, dict[str, dict[str, Any]]] = {
    "flux2-klein": {"model_index.json": {"is_distilled": True}},
    "flux1": {**UNGUIDED, "scheduler/scheduler_config.json": {"use_dynamic_shifting": False}},
    "krea2": {"model_index.json": {"is_distilled": True}},
}
# What a stock pipeline gets wrong, put right in place.
MENDED: dict[str, Callable[[Any], None]] = {"chroma": lambda pipe: cut_to_their_masks(pipe)}
PLAIN = {"distribution": "uniform", "shift": 1.0}  # a noise level is its `u`
SIDE = 64


def found(name: str) -> Base:
    return Base.find(Model(path=str(bases.OF_FAMILY[name]())))


def cut_to_their_masks(pipe: Any) -> None:
    """Chroma's prompts have a mask of floats, which attention adds, so that it masks nothing."""
    encode = pipe._get_t5_prompt_embeds

    def cut(*given: Any, **options: Any) -> tuple[Tensor, Tensor]:
        text, mask = encode(*given, **options)
        kept = mask[0].bool()
        return text[:, kept], mask[:, kept].bool()

    pipe._get_t5_prompt_embeds = cut


def stock(base: Base) -> Any:
    """The pipeline as its users load it, but for its faults."""
    absent = dict.fromkeys(name for name, entry in base.index.items() if entry == [None, None])
    kind = getattr(diffusers, base.family.pipeline)
    pipe = kind.from_pretrained(base.folder, dtype=torch.float32, **absent)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    MENDED.get(base.family.name, lambda pipe: None)(pipe)
    return pipe


def starting_from(x: Tensor, pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the pipeline start from `x`, (rows, C, h, w), which it packs itself."""
    module = sys.modules[type(pipe).__module__]
    monkeypatch.setattr(module, "randn_tensor", lambda shape, **options: x.reshape(shape))


def run(
    pipe: Any, base: Base, rows: list[dict[str, Tensor]], guidance: float = 1.0, **arguments: Any
) -> Tensor:
    """x0 by the pipeline's own call, without its `no_grad`."""
    call: Any = type(pipe).__call__
    given = base.family.arguments(rows, guidance) if rows else {}
    made = call.__wrapped__(pipe, **given, output_type="latent", height=SIDE, width=SIDE, **arguments).images
    return base.family.generated(made, base.family.space(base, Size.square(SIDE)))


@pytest.mark.parametrize("name", thinned(FLOW, 4))
def test_our_steps_are_the_pipeline_s(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches sign, scale of the noise level, packing, positions, masks and normalization at once."""
    base = found(name)
    family, pipe = base.family, stock(base)
    prompts = ["a photo of sks mug", "a dog"]
    x = torch.randn(
        2, *family.space(base, Size.square(SIDE)).shape, generator=torch.Generator().manual_seed(0)
    )
    starting_from(x, pipe, monkeypatch)
    rows = [family.encode_prompt(pipe, prompt, False) for prompt in prompts]
    with torch.no_grad():
        theirs = run(pipe, base, rows, num_inference_steps=3)
        ids = family.tokenize({n: getattr(pipe, t) for n, t in family.text_encoders.items()}, prompts)
        condition = family.embed({n: getattr(pipe, n) for n in family.text_encoders}, ids)
        ours, sigmas = x, pipe.scheduler.sigmas.tolist()
        for now, then in pairwise(sigmas):
            t = torch.full((2,), now)
            ours = ours + (then - now) * family.denoise(getattr(pipe, family.denoiser), ours, t, condition)
    assert 0.1 < sigmas[1] < sigmas[0] <= 1 and sigmas[-1] == 0
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.fixture
def prepared(make: Make, tmp_path: Path) -> Iterator[Any]:
    def configured(name: str, **changes: Any) -> Config:
        settings = {
            "model__path": str(bases.OF_FAMILY[name]()), "prepare__resolution": SIDE,
            "prepare__class_prompt": None, "train__steps": 2, "train__precision": "fp32",
            "loss__timesteps": PLAIN, "adapter__targets": "all", "adapter__rank": 2,
            "data__shards": str(tmp_path / name), "run_dir": str(tmp_path / "run"),
        }  # fmt: skip
        cfg = make(**settings | changes)
        prepare(cfg)
        return cfg

    yield configured


@pytest.mark.parametrize("name", thinned(FLOW, 4))
def test_the_loss_and_its_gradient_are_the_pipeline_s(
    prepared: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = prepared(name)
    base, folder = found(name), Path(cfg.data.shards)
    family, model = base.family, awake(build(cfg, folder))
    batch = first_batch(cfg, family, ("instance",))
    batch = Batch(**{**vars(batch), "u": torch.full_like(batch.u, 0.6)})
    ours = model(batch).mean()
    ours.backward()
    grads = {name: parameter.grad for name, parameter in model.trainable().items()}

    # The same adapter on the stock pipeline, and its scheduler's own noising and step.
    pipe = stock(base)
    transformer = getattr(pipe, family.denoiser)
    inject.attach(
        transformer, cfg.adapter, "denoiser", 0, family.idle(family.denoiser, transformer), family.presets
    )
    inject.restore(transformer, inject.collect(model.denoiser).tensors)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config({"num_train_timesteps": 1000, "shift": 1.0})
    pipe.scheduler.set_timesteps(sigmas=[0.6])
    x0 = model.x0(batch)
    x_t = pipe.scheduler.scale_noise(x0, pipe.scheduler.timesteps.expand(len(x0)), batch.noise)
    starting_from(x_t, pipe, monkeypatch)
    table = prompt_table.read(at(folder), Manifest.read(at(folder)).prompts)
    rows = [as_encoded(pipe, table, int(prompt)) for prompt in batch.prompt]
    landed = run(pipe, base, rows, num_inference_steps=1, sigmas=[0.6])
    velocity = (x_t - landed) / 0.6
    theirs = (velocity - (batch.noise - x0)).square().mean()
    theirs.backward()
    assert pipe.scheduler.sigmas[0] == pytest.approx(0.6)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    mine = {f"{family.denoiser}.{name}": p for name, p in inject.trainable(transformer).items()}
    assert mine.keys() == grads.keys()
    for label, parameter in mine.items():
        assert grads[label] is not None and grads[label].abs().max() > 0, f"{label} gets no gradient"
        largest = parameter.grad.abs().max()
        assert (grads[label] - parameter.grad).abs().max() <= 1e-4 * largest, label
    off = torch.cat([(grads[label] - parameter.grad).flatten() for label, parameter in mine.items()])
    whole = torch.cat([parameter.grad.flatten() for parameter in mine.values()])
    assert off.norm() <= 1e-5 * whole.norm()


@pytest.mark.parametrize("name", thinned(FLOW, 4))
def test_a_row_s_loss_does_not_depend_on_its_batch(prepared: Any, tmp_path: Path, name: str) -> None:
    """Neither on its prompt being shorter than another's: so any number of ranks gives the same."""
    (tmp_path / "class").mkdir()
    draw_photo(tmp_path / "class" / "a.png", 0)
    draw_photo(tmp_path / "class" / "b.png", 1)
    cfg = prepared(
        name, prepare__class_prompt="a photo of a dog, with many more words than the other prompt has",
        prepare__class_dir=str(tmp_path / "class"), prepare__class_images=2,
    )  # fmt: skip
    model = awake(build(cfg, Path(cfg.data.shards)))
    assert model.follows_the_host == ("lengths" in model.on_host)
    batch = first_batch(cfg, model.family)
    assert batch.prompts == (0, 0, 1, 1)
    with torch.no_grad():
        together = model(batch)
        alone = torch.cat([model(row_of(batch, number)) for number in range(4)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=0)
    with torch.no_grad():
        # The same where the base is asked what it predicts for the class rows.
        model = build(cfg, Path(cfg.data.shards))
        new = model(replace(batch, preserved=2))
        together = awake(model)(replace(batch, preserved=2))
        alone_too = [model(replace(row_of(batch, number), preserved=int(number > 1))) for number in range(4)]
    torch.testing.assert_close(together, torch.cat(alone_too), rtol=1e-5, atol=0)
    assert new[2:].max() < 1e-9 < together[2:].min()


@pytest.mark.parametrize("name", thinned(FLOW, 4))
def test_a_resumed_run_is_the_same_to_the_bit(prepared: Any, tmp_path: Path, name: str) -> None:
    straight = train(prepared(name, export__formats=["diffusers", "comfyui"]))
    cfg = prepared(name, export__formats=["diffusers", "comfyui"], run_dir=str(tmp_path / "again" / "run"))
    with pytest.raises(Preempted):
        train(cfg, until=1)
    train(cfg)
    files = sorted(path.relative_to(straight) for path in straight.glob("export/*.safetensors"))
    assert len(files) == 2
    for file in files:
        assert (straight / file).read_bytes() == (tmp_path / "again" / "run" / file).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("name", FLOW)
def test_every_verb_knows_it(make: Make, tmp_path: Path, name: str) -> None:
    """Class images, shards, training, validation, exports, samples, scores, a report, a clean doctor."""
    make(
        model__path=str(bases.OF_FAMILY[name]()), prepare__resolution=SIDE, prepare__class_images=2,
        prepare__sampling__steps=2, prepare__held_out=1, train__steps=2, train__precision="bf16",
        validation__prompts=["a photo of sks dog"], validation__images=1, validation__every=2,
        sample__prompts=["a photo of sks dog"], sample__images=1, sample__steps=2,
        export__formats=["diffusers", "comfyui"], evaluation__dino=str(eyes.dino()),
        evaluation__clip=str(eyes.clip()), evaluation__images=2, evaluation__class_images=2,
        evaluation__prompts=["a {} in the snow"],
    )  # fmt: skip
    for verb in ("run", "evaluate", "report", "doctor"):
        what = tmp_path / ("run" if verb == "report" else "c.yaml")
        done = dbtrain(verb, what)
        assert done.returncode == 0, (verb, done.stdout[-2000:], done.stderr[-2000:])
    assert "no errors" in done.stdout
    run = tmp_path / "run"
    made = [*run.glob("validation/*/sheet.png"), *run.glob("samples/*/sheet.png"), run / "report.html"]
    assert len(made) == 4 and json.loads((run / "scores" / "scores.json").read_text())


@pytest.mark.parametrize("name", thinned(FLOW, 4))
def test_a_large_prompt_table_stays_on_the_host(
    prepared: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = prepared(name)
    model = build(cfg, Path(cfg.data.shards))
    batch = first_batch(cfg, model.family, ("instance",))
    assert not model.follows_the_host, "all prompts are of one length"
    monkeypatch.setattr(dreambooth, "RESIDENT", 0)
    large = build(cfg, Path(cfg.data.shards))
    assert large.follows_the_host and not large.prompt_names
    assert not any(name.startswith("prompts_") for name, _ in large.named_buffers())
    with torch.no_grad():
        assert torch.equal(model(batch), large(batch))


def row_of(batch: Batch, number: int) -> Batch:
    """A batch of one of the rows."""

    def cut(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: cut(tensor) for key, tensor in value.items()}
        return value[number : number + 1] if isinstance(value, (Tensor, tuple)) else value

    return Batch(**{key: cut(value) for key, value in vars(batch).items()})


def as_encoded(pipe: Any, table: dict[str, Tensor], prompt: int) -> dict[str, Tensor]:
    """A row of the prompt table as the pipeline's `encode_prompt` gives it: its own tokens alone."""
    row = {
        key.removeprefix("condition."): values[prompt : prompt + 1]
        for key, values in table.items()
        if key.startswith("condition.")
    }
    length = row.pop("lengths", None)
    found = {name: values[:, : length and int(length)].float() for name, values in row.items()}
    if "prompt_embeds_mask" in inspect.signature(pipe.__call__).parameters:
        found["prompt_embeds_mask"] = torch.ones(found["prompt_embeds"].shape[:2], dtype=torch.bool)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", thinned(FLOW, 8))
def test_samples_are_the_stock_pipeline_s(name: str) -> None:
    base = found(name)
    for guidance in (1.0, 3.0):
        generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
        pipe = sampler.build(base, torch.float32, torch.device("cpu"))
        rows = 2 * sampler.encode(pipe, base.family, ["a dog"], guidance)
        ours = sampler.generate_encoded(pipe, base.family, rows, generators, 2, guidance, Size.square(SIDE))
        generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
        plain = stock(base)
        plain.vae.enable_slicing()  # decodes one image at a time, as ours
        theirs = plain(
            prompt="a dog", num_images_per_prompt=2, generator=generators, num_inference_steps=2, height=SIDE,
            width=SIDE, **GUIDANCE[name](guidance),
        ).images  # fmt: skip
        for mine, other in zip(ours, theirs, strict=True):
            assert mine.tobytes() == other.tobytes()
        # Decoded by us from latents, as validation does.
        space = base.family.space(base, Size.square(SIDE))
        generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
        latents = sampler.without_vae(base, Size.square(SIDE), torch.float32)
        encoded = sampler.encode(latents, base.family, ["a dog"], guidance) * 2
        made = sampler.generate_encoded(
            latents, base.family, encoded, generators, 2, guidance, Size.square(SIDE), space=space
        )
        assert made[0].shape == space.shape
        for latent, other in zip(made, theirs, strict=True):
            picture = sampler.decode(base.load("vae"), base.family, latent, space)
            near = torch.tensor(list(picture.tobytes())) - torch.tensor(list(other.tobytes()))
            assert near.abs().max() <= 1


@pytest.mark.parametrize("name", FLOW)
def test_a_prompt_is_encoded_the_same_beside_a_longer_one(name: str) -> None:
    base = found(name)
    family = base.family
    tokenizers = {encoder: base.load(words) for encoder, words in family.text_encoders.items()}
    encoders = {encoder: base.load(encoder) for encoder in family.text_encoders}
    x = torch.randn(1, *family.space(base, Size.square(SIDE)).shape)
    t, transformer = torch.full((1,), 0.4), base.load(family.denoiser)
    seen = []
    with torch.no_grad():
        for prompts in (["a dog"], ["a dog", "a photo of sks mug on a dog, a user and a system of mugs"]):
            table = family.embed(encoders, family.tokenize(tokenizers, prompts))
            rows = {key: values[:1] for key, values in table.items()}
            seen.append(family.denoise(transformer, x, t, rows))
    assert (seen[0] - seen[1]).abs().max() <= 1e-5 * seen[0].abs().max()


@pytest.mark.parametrize("name", FLOW)
def test_every_preset_adapts_every_block(name: str) -> None:
    base = found(name)
    family = base.family
    assert family.presets.keys() == {"attention", "diffusers", "minimal", "all"}
    for preset in family.presets:
        transformer = base.load(family.denoiser)
        inject.attach(transformer, AdapterSettings(targets=preset, rank=2), "denoiser", 0, (), family.presets)
        for number, block in enumerate(blocks(transformer)):
            attends = any("attn" in name or "attention" in name for name, _ in block.named_modules())
            adapted = bool(inject.trainable(block))
            assert adapted or not attends, f"{preset} leaves out block {number}, a {type(block).__name__}"


def test_a_prompt_that_is_too_long_is_refused() -> None:
    for name in FLOW:
        base = found(name)
        tokenizers = {encoder: base.load(words) for encoder, words in base.family.text_encoders.items()}
        with pytest.raises(
            ConfigError, match=r"^prompt 'dog dog .*…' has \d+ tokens .* reads \d+; shorten it"
        ):
            base.family.tokenize(tokenizers, ["dog " * 5000])


REFUSED = {
    "another scheduler": (
        {}, {"scheduler": ["diffusers", "DDPMScheduler"]}, "made for another training objective"
    ),
    "no encoder": ({}, {"text_encoder": [None, None]}, "component 'text_encoder' is None.None; use a base"),
    "another family": ({"model__family": "sd"}, {}, "family is 'sd', but base model .* of the family"),
    "an adapter of its text encoder": (
        {"adapter__text_encoder": {"rank": 2}}, {}, "adapter.text_encoder: the text encoders of .* too large"
    ),
    "min-SNR": ({"loss__min_snr_gamma": 5.0}, {}, "loss.min_snr_gamma is 5.0, which has no meaning for flow"),
    "noise offset": ({"loss__noise_offset": 0.1}, {}, "loss.noise_offset is 0.1, which has no meaning"),
    "a side that its patches do not divide": ({"prepare__resolution": 72}, {}, "a multiple of 16, e.g. 64"),
}  # fmt: skip


def changed(name: str, tmp_path: Path, files: dict[str, dict[str, Any]]) -> Path:
    """A copy of a family's base with other settings in some of its files."""
    folder = shutil.copytree(bases.OF_FAMILY[name](), tmp_path / "base")
    for file, settings in files.items():
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


@pytest.mark.parametrize(
    ("name", "case"),
    thinned([(name, case) for name in FLOW for case in REFUSED
             if not (case == "an adapter of its text encoder" and families.get(name).adaptable_text)], 5),
)  # fmt: skip
def test_what_it_cannot_train_is_refused_in_one_line(
    make: Make, tmp_path: Path, name: str, case: str
) -> None:
    changes, index, message = REFUSED[case]
    folder = changed(name, tmp_path, {"model_index.json": index})
    cfg = make(
        model__path=str(folder), **{"prepare__resolution": SIDE, "prepare__class_prompt": None} | changes
    )
    with pytest.raises(ConfigError, match=message) as caught:
        base = Base.find(cfg.model)
        base.check_trains(cfg.adapter)
        prepare(cfg)
        base.family.objective.of(base.config("scheduler"), cfg.loss, 16)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", DISTILLED)
def test_a_distilled_base_is_for_drawing(make: Make, tmp_path: Path, name: str) -> None:
    folder = changed(name, tmp_path, DISTILLED[name])
    cfg = make(model__path=str(folder), prepare__resolution=SIDE)
    with pytest.raises(ConfigError, match=r"was distilled .*; train on (FLUX\.|krea/)[^\n]*, and load"):
        prepare(cfg)
    AdapterPipeline.load(cfg.model).generate("a dog", 0, steps=1, guidance=1.0, side=SIDE)


def test_a_flux1_without_embedded_guidance_is_guided_by_the_empty_prompt(tmp_path: Path) -> None:
    """Such as OpenFLUX.1. It is trained like any other."""
    base = Base.find(Model(path=str(changed("flux1", tmp_path, UNGUIDED))))
    base.check_trains(Adapter())
    assert base.family.header(base)["modelspec.architecture"] == "flux-1-dev/lora"
    pipe, plain, made = sampler.build(base, torch.float32, torch.device("cpu")), stock(base), {}
    for guidance in (1.0, 3.0):
        rows = sampler.encode(pipe, base.family, ["a dog"], guidance)
        (made[guidance],) = sampler.generate_encoded(
            pipe, base.family, rows, [torch.Generator().manual_seed(3)], 2, guidance, Size.square(SIDE)
        )
        theirs = plain(
            prompt="a dog", negative_prompt="", true_cfg_scale=guidance, num_inference_steps=2, height=SIDE,
            width=SIDE, generator=torch.Generator().manual_seed(3),
        ).images[0]  # fmt: skip
        assert made[guidance].tobytes() == theirs.tobytes()
    assert made[1.0].tobytes() != made[3.0].tobytes()


def test_schnell_reads_prompts_in_as_many_tokens_as_it_was_trained_with(tmp_path: Path) -> None:
    base = Base.find(Model(path=str(changed("flux1", tmp_path, DISTILLED["flux1"]))))
    assert base.family.header(base)["modelspec.architecture"] == "flux-1-schnell/lora"
    pipe = sampler.build(base, torch.float32, torch.device("cpu"))
    family, parts = base.family, base.family.text_encoders
    ids = family.tokenize({name: getattr(pipe, words) for name, words in parts.items()}, ["a dog"])
    table = family.embed({name: getattr(pipe, name) for name in parts}, ids)
    drawn = family.encode_prompt(pipe, "a dog", True)
    assert table["prompt_embeds"].shape[1:] == family.conditions(base)["prompt_embeds"] == (256, bases.WIDTH)
    assert all(torch.allclose(table[name], drawn[name]) for name in drawn)


LENGTHS = {
    "none": lambda table: table.pop("condition.lengths"),
    "too long": lambda table: table["condition.lengths"].add_(1),
    "empty": lambda table: table["condition.lengths"].zero_(),
    "fractions": lambda table: table.update({"condition.lengths": table["condition.lengths"].float()}),
    "two": lambda table: table.update({"condition.lengths": table["condition.lengths"].repeat(1, 2)}),
}


@pytest.mark.parametrize("harm", LENGTHS)
def test_lengths_that_a_table_does_not_have_are_refused(harm: str) -> None:
    for name in FLOW:
        base = found(name)
        if "lengths" in (shapes := base.family.conditions(base)):
            table = {f"condition.{key}": torch.ones(1, *[size or 7 for size in shape])
                     for key, shape in shapes.items()}  # fmt: skip
            table |= {f"ids.{encoder}": torch.ones(1, 7).long() for encoder in base.family.text_encoders}
            table["condition.lengths"] = torch.tensor([7])
            plan.check_prompts("shards", base, table)
            LENGTHS[harm](table)
            with pytest.raises(ConfigError, match=r"lengths .*; rerun: dbtrain prepare"):
                plan.check_prompts("shards", base, table)


UNFIT: list[tuple[str, str, dict[str, Any], str]] = [  # family, component, settings, message
    ("qwen-image", "transformer", {"joint_attention_dim": 48}, "joint_attention_dim .* is 48, but .* 32$"),
    ("qwen-image", "transformer", {"in_channels": 16}, "in_channels .* is 16, but .* give 64"),
    ("qwen-image", "vae", {"latents_std": [0.0] * 16}, r"latents_std of its vae is \[0.* 16 numbers above 0"),
    ("qwen-image", "vae", {"latents_mean": [1.0]}, r"latents_mean of its vae is \[1.0\]; use 16 numbers"),
    ("krea2", "transformer", {"text_hidden_dim": 48}, "text_hidden_dim .* is 48, but .* give 32"),
    ("krea2", "transformer", {"num_text_layers": 3}, "num_text_layers .* is 3, but .* give 12"),
    ("krea2", "", {"patch_size": 4}, "patch_size in model_index.json is 4; dbtrain trains Krea 2 with 2"),
    ("krea2", "", {"text_encoder_select_layers": [1, 2]}, r"select_layers .* is \[1, 2\]; dbtrain trains"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "component", "settings", "message"), UNFIT)
def test_a_base_that_does_not_fit_together_is_refused(
    tmp_path: Path, name: str, component: str, settings: dict[str, Any], message: str
) -> None:
    folder = shutil.copytree(bases.OF_FAMILY[name](), tmp_path / "base")
    path = folder / component / "config.json" if component else folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    with pytest.raises(ConfigError, match=message) as caught:
        Base.find(Model(path=str(folder)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["qwen-image", "krea2", "flux2-klein", "flux2-dev"])
def test_text_encoders_come_without_what_prompts_do_not_pass(name: str) -> None:
    base = found(name)
    family, whole = base.family, Pretrained.load(base, "text_encoder")
    slim = base.load("text_encoder")
    assert family.unread and all(list(whole.get_submodule(part).parameters()) for part in family.unread)
    assert not any(list(slim.get_submodule(part).parameters()) for part in family.unread)
    ids = family.tokenize({"text_encoder": base.load("tokenizer")}, ["a dog"])
    with torch.no_grad():
        seen = [family.embed({"text_encoder": encoder}, ids)["prompt_embeds"] for encoder in (whole, slim)]
    assert torch.equal(*seen)


def test_krea_2_s_norms_stay_in_fp32() -> None:
    """As in the pipeline, whose class says so; a whole module cast to bf16 would lose them."""
    base = found("krea2")
    theirs = diffusers.Krea2Transformer2DModel.from_pretrained(
        base.folder, subfolder="transformer", dtype=torch.bfloat16
    )
    assert {p.dtype for p in theirs.parameters()} == {torch.float32, torch.bfloat16}
    wanted = {name: parameter.dtype for name, parameter in theirs.named_parameters()}
    skeleton = memory._Skeleton(base.name, base.folder, base.variant, base.family)
    for loaded in (
        base.load("transformer", torch.bfloat16),
        sampler.build(base, torch.bfloat16, torch.device("cpu")).transformer,
        skeleton.load("transformer", torch.bfloat16),
    ):
        assert {name: parameter.dtype for name, parameter in loaded.named_parameters()} == wanted


# The objective itself.


def levels(**settings: Any) -> Tensor:
    u = torch.linspace(0, 1, 20_001)[:-1]
    return FlowMatching(settings.pop("shift", 1.0), Timesteps(**settings)).timesteps(u)


def test_noise_levels_have_the_papers_densities() -> None:
    assert levels(distribution="uniform").mean() == pytest.approx(0.5, abs=1e-4)
    normal = torch.logit(levels(mean=0.3, std=1.5).double())
    assert normal.mean() == pytest.approx(0.3, abs=1e-3) and normal.std() == pytest.approx(1.5, abs=5e-3)
    # Density of the mode distribution: 1 / |f'(u)| of SD 3's f(u) = 1 - u - s (cos^2(pi u / 2) - 1 + u).
    u = torch.rand(2000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    theirs = 1 - u - 1.29 * (torch.cos(torch.pi / 2 * u).square() - 1 + u)
    ours = FlowMatching(1.0, Timesteps(distribution="mode")).timesteps(1 - u)
    torch.testing.assert_close(ours, theirs.float(), atol=1e-6, rtol=0)
    for settings in ({"distribution": "uniform"}, {"mean": -1.0}, {"distribution": "mode"}, {"shift": 3.0}):
        found = levels(**settings)
        assert found.dtype == torch.float32 and found.min() > 0 and found.max() < 1
        assert (found.diff() >= 0).all(), "they rise with u, so that held-out fractions are quantiles"


@pytest.mark.parametrize("tokens", [256, 1024, 4096])
def test_the_shift_is_the_scheduler_s(tokens: int) -> None:
    still = FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert own_shift(still.config, tokens) == 3.0
    moving = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9)
    flux = diffusers.pipelines.flux.pipeline_flux
    mu = flux.calculate_shift(tokens, 256, 4096, 0.5, 0.9)
    moving.set_timesteps(sigmas=[0.7, 0.2], mu=mu)
    shifted = FlowMatching.of(moving.config, Loss(timesteps=Timesteps(distribution="uniform")), tokens)
    torch.testing.assert_close(shifted.timesteps(torch.tensor([0.7, 0.2])), moving.sigmas[:2])
    assert FlowMatching.of(moving.config, Loss(timesteps=Timesteps(shift=2.0)), tokens).shift == 2.0


def test_weightings_are_those_of_diffusers() -> None:
    from diffusers.training_utils import compute_loss_weighting_for_sd3

    t = torch.tensor([0.1, 0.5, 0.9])
    for weighting in ("none", "sigma_sqrt", "cosmap"):
        theirs = compute_loss_weighting_for_sd3(weighting, sigmas=t)
        torch.testing.assert_close(FlowMatching(weighting=weighting).weight(t), theirs)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "DDPMScheduler"}, "scheduler is DDPMScheduler, made for another"),
        ({"invert_sigmas": True}, "with invert_sigmas = True, made for another"),
        ({"shift": -1}, re.escape("has shift = -1")),
        ({"max_shift": "big"}, "use positive numbers"),
    ],
)
def test_another_process_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FlowMatching.of(config)


# What is special to one family.


def test_sd_3_without_its_t5_is_what_the_pipeline_makes_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    base = Base.find(Model(path=str(bases.sd3(with_t5=False))))
    family, pipe = base.family, stock(base)
    assert "text_encoder_3" not in family.text_encoders
    x = torch.randn(
        1, *family.space(base, Size.square(SIDE)).shape, generator=torch.Generator().manual_seed(0)
    )
    starting_from(x, pipe, monkeypatch)
    with torch.no_grad():
        theirs = run(pipe, base, [], prompt="a dog", num_inference_steps=3, guidance_scale=3.0)
        alone = sampler.encode_alone(base, ["a dog"], 3.0, torch.float32)
        ours = run(sampler.build(base, torch.float32, torch.device("cpu")), base, alone, 3.0,
                   num_inference_steps=3)  # fmt: skip
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_sd_3_refuses_a_side_beyond_its_positions() -> None:
    base = found("sd3")
    with pytest.raises(ConfigError, match=r"resolution is 256; use at most 128, where .* has positions"):
        base.family.space(base, Size.square(256))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_what_chroma_s_pipeline_means_to_mask_is_masked_by_bools_alone(dtype: torch.dtype) -> None:
    """It gives its transformer floats. If they are ever masks too, `MENDED` and this test can go."""
    base = found("chroma")
    transformer, given = base.load("transformer"), {"img_ids": torch.zeros(4, 3), "return_dict": False}
    text, mask = torch.randn(1, 9, 64), (torch.arange(9 + 4) < 3) | (torch.arange(9 + 4) >= 9)
    given |= {"hidden_states": torch.randn(1, 4, 64), "timestep": torch.full((1,), 0.5)}
    with torch.no_grad():
        cut = transformer(encoder_hidden_states=text[:, :3], txt_ids=torch.zeros(3, 3), **given)[0]
        masked = transformer(
            encoder_hidden_states=text,
            txt_ids=torch.zeros(9, 3),
            attention_mask=mask[None].to(dtype),
            **given,
        )[0]
    near = bool((cut - masked).abs().max() <= 1e-5 * cut.abs().max())
    assert near == (dtype == torch.bool)


def test_chroma_s_passes_can_be_more_than_its_lengths_of_prompts() -> None:
    """Ranks that share weights need as many; those that are too many add nothing, but have gradients."""
    base = found("chroma")
    transformer, passed = base.load("transformer"), []
    transformer.register_forward_hook(lambda *_: passed.append(1))
    x = torch.randn(3, *base.family.space(base, Size.square(SIDE)).shape, requires_grad=True)
    texts = {"prompt_embeds": torch.randn(3, 9, 64), "lengths": torch.tensor([7, 9, 7])}
    results = []
    for passes, given in ((2, {}), (4, {"passes": torch.tensor(4)})):
        passed.clear()
        made = base.family.denoise(transformer, x, torch.full((3,), 0.4), texts | given)
        results.append((made, *torch.autograd.grad(made.square().sum(), x)))
        assert len(passed) == passes
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
