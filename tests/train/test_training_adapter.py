"""An adapter that is part of the base in training only: as on a merged base, and nowhere else."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from dbtrain.adapters import inject
from dbtrain.adapters.formats import registry as formats
from dbtrain.config import AdapterSettings, Config, Model
from dbtrain.config.adapter import Adapter
from dbtrain.models.base import Base
from dbtrain.models.precision import PRECISIONS
from dbtrain.models.quantization import QuantizedLinear
from dbtrain.prepare.prepare import prepare
from dbtrain.runtime.errors import ConfigError, Preempted
from dbtrain.train import inputs, loop, training_adapter
from tests import bases
from tests.conftest import Make, slow, thinned, train
from tests.networks import build

ONE_IMAGE = {"validation__prompts": ["a dog"], "validation__every": 1, "validation__images": 1}


def found(name: str) -> Base:
    return Base.find(Model(path=str(bases.OF_FAMILY[name]())))


def written(
    base: Base, folder: Path, form: str = "peft", component: str | None = None, **settings: Any
) -> Path:
    """An adapter of random weights on a component, the denoiser unless another is named."""
    component, family = component or base.family.denoiser, base.family
    module = base.load(component)
    part = "denoiser" if component == family.denoiser else "text_encoder"
    chosen = AdapterSettings(**{"rank": 2, "targets": "all", **settings})
    presets = family.presets if part == "denoiser" else None
    inject.attach(module, chosen, part, 0, family.idle(component, module), presets)
    for parameter in inject.trainable(module).values():
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    path = formats.write(form, folder, family, {component: inject.collect(module)}, base.module_names)
    return path if path.is_file() else folder / component


def merged_by_hand(base: Base, adapter: Path, folder: Path) -> Path:
    """The base with an adapter merged by PEFT's own call, in fp32.

    Stored as fp64, so that loading converts it into new tensors, as it does an fp16 base: products with
    tensors that lie at another place in memory may differ in the last bit.
    """
    name = base.family.denoiser
    shutil.copytree(base.folder, folder)
    shutil.rmtree(folder / name)
    module = PeftModel.from_pretrained(base.load(name), str(adapter)).merge_and_unload()
    module.double().save_pretrained(folder / name)
    return folder


def adapter_of(cfg: Config) -> dict[str, Tensor]:
    path = formats.find(cfg.run_dir)
    return load_file(path if path.is_file() else next(path.glob("*/*.safetensors")))


@pytest.mark.parametrize(
    ("name", "kind"),
    thinned(
        [
            *((name, "lora") for name in bases.OF_FAMILY if name != "deepfloyd-2"),
            ("sd", "lokr"),
            ("sd", "loha"),
        ],
        6,
    ),
)
def test_training_with_it_is_training_on_a_base_that_has_it(
    make: Make, tmp_path: Path, name: str, kind: str
) -> None:
    base = found(name)
    adapter = written(base, tmp_path / "adapter", kind=kind)
    hand = merged_by_hand(base, adapter, tmp_path / "merged")
    pictures = ONE_IMAGE | {"sample__steps": 1} if name == "sd" else {}
    results = []
    for model in ({"path": str(hand)}, {"path": str(base.folder), "training_adapter": str(adapter)}):
        cfg = make(
            model=model, prepare__class_prompt=None, prepare__resolution=bases.SIDES[name], train__steps=2,
            run_dir=str(tmp_path / f"run-{len(results)}"), optim__lr=1e-2, train__global_batch=2, **pictures,
        )  # fmt: skip
        prepare(cfg)
        run = loop.train(cfg)
        (weights,) = run.glob("checkpoints/step-000002/*/*.safetensors")
        losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        results.append((load_file(weights), losses))
    (theirs, their_losses), (ours, our_losses) = results
    assert our_losses == their_losses
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items())


@pytest.mark.parametrize("name", ["sd", "z-image"])
@pytest.mark.parametrize("linears", ["full", *map(slow, ("int8", "fp8"))])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_is_left_out_exactly_and_put_back_exactly(
    make: Make, tmp_path: Path, name: str, linears: str, precision: str
) -> None:
    base = found(name)
    adapter = written(base, tmp_path / "adapter")
    settings = partial(
        make, model__path=str(base.folder), data__shards=str(tmp_path / "shards"), **ONE_IMAGE,
        prepare__class_prompt=None, train__base_linears=linears, train__precision=precision,
    )  # fmt: skip
    prepare(settings())
    plain = weights(build(settings(), tmp_path / "shards").denoiser)
    cfg = settings(model__training_adapter=str(adapter))
    model = build(cfg, tmp_path / "shards", training_adapter.read(base, cfg.model))
    merged = weights(model.denoiser)
    assert merged.keys() == plain.keys()
    changed = {key for key, tensor in merged.items() if not torch.equal(tensor, plain[key])}
    assert len(changed) > 20
    if linears == "full":  # rounded once, from the sum in fp32
        dtype = PRECISIONS[precision].dtype
        summed = PeftModel.from_pretrained(base.load(base.family.denoiser, dtype).float(), str(adapter))
        wanted = {name: p.to(dtype) for name, p in summed.merge_and_unload().named_parameters()}
        ours = {inject.unwrapped(key): tensor for key, tensor in merged.items()}
        assert all(torch.equal(ours[key], tensor) for key, tensor in wanted.items())
    else:
        assert any(isinstance(live, QuantizedLinear) for live, _ in model.left_out.layers)
    for _ in range(2):
        with pytest.raises(InterruptedError), model.left_out.in_place():
            inside = weights(model.denoiser)
            raise InterruptedError
        assert all(torch.equal(inside[key], tensor) for key, tensor in plain.items())
        after = weights(model.denoiser)
        assert all(torch.equal(after[key], tensor) for key, tensor in merged.items())


def weights(module: torch.nn.Module) -> dict[str, Tensor]:
    named = [*module.named_parameters(), *module.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in named}


@pytest.fixture
def helped(make: Make, tmp_path: Path, prepared: Path) -> Any:
    """Configs of the small base with a training adapter."""
    adapter = written(found("sd"), tmp_path / "adapter", "diffusers")
    return partial(make, data__shards=str(prepared), model__training_adapter=str(adapter))


@pytest.mark.slow
def test_pictures_and_exports_are_without_it(helped: Any, make: Make, tmp_path: Path, prepared: Path) -> None:
    with_it = helped(run_dir=str(tmp_path / "with"), **ONE_IMAGE, train__steps=2, optim__lr=0.1)
    without = make(run_dir=str(tmp_path / "without"), data__shards=str(prepared), **ONE_IMAGE, train__steps=1)
    train(with_it)
    train(without)
    # Before the first step: the base's own picture.
    first = [tmp_path / run / "validation" / "step-000000" / "00-seed0.png" for run in ("with", "without")]
    assert Image.open(first[0]).tobytes() == Image.open(first[1]).tobytes()
    # After the last: what the stock pipeline makes of the plain base and the export.
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(bases.sd(), dtype=torch.float32)
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(
        pipe.scheduler.config, algorithm_type="dpmsolver++", solver_order=2
    )
    pipe.load_lora_weights(tmp_path / "with" / "export")
    generator = torch.Generator().manual_seed(0)
    wanted = pipe("a dog", num_inference_steps=2, generator=generator, height=64, width=64).images[0]
    last = Image.open(tmp_path / "with" / "validation" / "step-000002" / "00-seed0.png")
    near = [abs(a - b) for a, b in zip(wanted.tobytes(), last.convert("RGB").tobytes(), strict=True)]
    assert max(near) <= 1
    assert last.tobytes() != Image.open(first[0]).tobytes()
    ranks = {len(tensor) for key, tensor in adapter_of(with_it).items() if ".down." in key}
    assert ranks == {4}, "the training adapter's rank is 2"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd", "z-image"])
def test_a_resumed_run_is_the_straight_one(make: Make, tmp_path: Path, name: str) -> None:
    base = found(name)
    settings = partial(
        make, model__path=str(base.folder), model__training_adapter=str(written(base, tmp_path / "adapter")),
        prepare__resolution=bases.SIDES[name], prepare__class_images=2, train__global_batch=2,
        train__steps=3, **ONE_IMAGE, sample__steps=1,
    )  # fmt: skip
    straight, stopped = (settings(run_dir=str(tmp_path / run)) for run in ("straight", "stopped"))
    prepare(straight)
    loop.train(straight)
    with pytest.raises(Preempted, match="as requested"):
        loop.train(stopped, until=1)
    loop.train(stopped)
    theirs, ours = (
        load_file(next(Path(cfg.run_dir).glob("checkpoints/step-000003/*/*.safetensors")))
        for cfg in (straight, stopped)
    )
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items())


def test_a_run_continues_with_the_same_content_alone(helped: Any, tmp_path: Path) -> None:
    loop.train(helped(train__steps=1))
    moved = shutil.copy(
        tmp_path / "adapter" / "pytorch_lora_weights.safetensors", tmp_path / "it.safetensors"
    )
    loop.train(helped(train__steps=2, model__training_adapter=str(moved)))
    other = written(found("sd"), tmp_path / "other", "diffusers", rank=3)
    for path in (str(other), None):
        with pytest.raises(ConfigError, match=r"model\.training_adapter was 'content \w{12}', is now"):
            loop.train(helped(train__steps=3, model__training_adapter=path))


def test_an_adapter_that_is_not_one_of_the_base_is_refused(
    helped: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sd = found("sd")
    save_file({"x": torch.zeros(1)}, tmp_path / "no-adapter.safetensors")
    (tmp_path / "old.bin").write_bytes(b"\x80\x04")
    (tmp_path / "empty").mkdir()
    broken = load_file(tmp_path / "adapter" / "pytorch_lora_weights.safetensors")
    broken[min(broken)][0, 0] = torch.nan
    save_file(broken, tmp_path / "nan.safetensors")
    cases = {
        str(tmp_path / "nowhere.safetensors"): "is neither a file nor a run folder",
        "nowhere.safetensors": "is neither a file nor a run folder",
        "adapters/nowhere.safetensors": "is neither a file nor a run folder",
        "nobody/nothing": "'nobody/nothing' is neither a local file or folder nor an adapter that could be",
        str(tmp_path / "empty"): "is neither a file nor a run folder",
        str(tmp_path / "no-adapter.safetensors"): "its tensor x matches no format",
        str(tmp_path / "old.bin"): "is a pickle",
        str(tmp_path / "nan.safetensors"): r"its tensor \S+ has NaN",
        str(written(found("z-image"), tmp_path / "z")): "no module|matches no module|does not have",
        str(written(sd, tmp_path / "text", component="text_encoder")): "changes text_encoder; use one that",
        str(written(sd, tmp_path / "bias", bias="all")): r"changes \S+\.bias; use one that",
    }
    for name, message in cases.items():
        cfg = helped(model__training_adapter=name)
        with pytest.raises(ConfigError, match=f"^model.training_adapter: .*({message})") as caught:
            loop.train(cfg)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"^model.training_adapter: .* is neither a file nor"):
        inputs.check_settings(helped(model__training_adapter=str(tmp_path / "nowhere")))
    with pytest.raises(ConfigError, match=r"adapter\.dora is true, but DoRA's magnitudes"):
        helped(adapter__dora=True)


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("ostris/some_adapter", ("ostris/some_adapter", None, ["*.safetensors", "adapter_config.json"])),
        ("ostris/two@v2", ("ostris/two", "v2", ["*.safetensors", "adapter_config.json"])),
        ("ostris/two/b/v2.safetensors", ("ostris/two", None, ["b/v2.safetensors"])),
        ("ostris/two/v1.safetensors@main", ("ostris/two", "main", ["v1.safetensors"])),
    ],
)
def test_a_hub_id_is_downloaded_once_and_then_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, asked: tuple[Any, ...]
) -> None:
    calls = []

    def snapshot(repository: str, **options: Any) -> str:
        calls.append(
            (repository, options["revision"], options["allow_patterns"], options["local_files_only"])
        )
        file = options["allow_patterns"][0].replace("*", "it")
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    cfg = Model(path="tiny", training_adapter=name)
    path = training_adapter.fetch(cfg)
    assert path and path.is_file() and path == training_adapter.here(cfg)
    assert calls == [(*asked, False), (*asked, True), (*asked, True)]


def test_a_distilled_base_trains_with_one(tmp_path: Path) -> None:
    folder = shutil.copytree(bases.flux2_klein(), tmp_path / "base")
    index = json.loads((folder / "model_index.json").read_text()) | {"is_distilled": True}
    (folder / "model_index.json").write_text(json.dumps(index))
    base = Base.find(Model(path=str(folder)))
    with pytest.raises(ConfigError, match=r"or set model\.training_adapter$"):
        base.check_trains(Adapter())
    base.check_trains(Adapter(), "someone/adapter")
