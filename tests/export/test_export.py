"""The exported file in a stock Diffusers pipeline: it loads, at the right strength, and says who it is."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline
from peft.tuners.lora import LoraLayer
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dbtrain import tiny
from dbtrain.adapters import inject as adapters
from dbtrain.adapters.formats.diffusers_file import FILE
from dbtrain.adapters.formats.registry import find, write
from dbtrain.adapters.state import AdapterState
from dbtrain.config import Adapter
from dbtrain.export import hub
from dbtrain.export.export import export, show
from dbtrain.export.model_card import card
from dbtrain.models.base import Base
from dbtrain.models.families import registry as families
from dbtrain.prepare.prepare import prepare
from dbtrain.runtime.errors import ConfigError
from dbtrain.train import summary
from tests import bases
from tests.conftest import Make, train
from tests.runs import tree


@pytest.fixture(autouse=True)
def shards(tmp_path: Path, prepared: Path) -> None:
    shutil.copytree(prepared, tmp_path / "shards")


def stock() -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(bases.sd(), dtype=torch.float32, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(pipe: StableDiffusionPipeline) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    return np.asarray(
        pipe("a photo of sks dog", num_inference_steps=3, generator=generator, output_type="np").images[0]
    )


def layers(module: torch.nn.Module) -> list[LoraLayer]:
    return [layer for layer in module.modules() if isinstance(layer, LoraLayer)]


def test_the_file_loads_in_a_stock_pipeline_changes_the_image_and_has_its_strength(make: Make) -> None:
    run = train(make(optim__lr=1e-2))
    pipe = stock()
    before = picture(pipe)
    pipe.load_lora_weights(run / "export")
    assert np.abs(picture(pipe) - before).max() > 1e-3
    found = layers(pipe.unet)
    assert len(found) == 4 * 2 * 2  # q, k, v, out of self- and cross-attention in 2 transformer blocks
    assert {value for layer in found for value in layer.scaling.values()} == {2.0}  # alpha 8 over rank 4


def test_images_with_the_file_are_the_images_of_the_trained_module(make: Make, tmp_path: Path) -> None:
    """Export -> load -> the very same picture as the module that was trained gives."""
    unet = stock().unet
    adapters.attach(unet, Adapter(rank=4, alpha=8), "denoiser", seed=0)
    for parameter in adapters.trainable(unet).values():
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(2))
    live = stock()
    live.unet = unet.eval()
    write("diffusers", tmp_path / "out", families.get("sd"), {"unet": adapters.collect(unet)})
    loaded = stock()
    bare = picture(loaded)
    loaded.load_lora_weights(tmp_path / "out", weight_name=FILE)
    assert np.array_equal(picture(loaded), picture(live))
    assert not np.array_equal(picture(loaded), bare)


def test_text_encoder_keys_have_the_form_every_loader_knows(tmp_path: Path) -> None:
    """CLIP's layers stand under `text_model.` in the file, with and without that level in the module."""
    pipe = stock()
    cfg = Adapter(rank=4, alpha=8)
    adapters.attach(pipe.unet, cfg, "denoiser", seed=0)
    adapters.attach(pipe.text_encoder, cfg, "text_encoder", seed=0)
    for module in (pipe.unet, pipe.text_encoder):
        for parameter in adapters.trainable(module).values():
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(3))
    states = {name: adapters.collect(getattr(pipe, name)) for name in ("unet", "text_encoder")}
    write("diffusers", tmp_path / "out", families.get("sd"), states)
    names = [n for n in load_file(tmp_path / "out" / FILE) if n.startswith("text_encoder.")]
    assert len(names) == 2 * 4 * 2
    assert all(name.startswith("text_encoder.text_model.encoder.layers.") for name in names)
    loaded = stock()
    loaded.load_lora_weights(tmp_path / "out", weight_name=FILE)
    assert {v for layer in layers(loaded.text_encoder) for v in layer.scaling.values()} == {2.0}
    assert np.array_equal(picture(loaded), picture(pipe))


def test_dora_of_the_text_encoder_loads_in_a_stock_pipeline(tmp_path: Path) -> None:
    """Transformers drops a magnitude whose name does not end with `.weight`, and says nothing."""
    pipe = stock()
    adapters.attach(pipe.unet, Adapter(rank=4, dora=True), "denoiser", seed=0)
    adapters.attach(pipe.text_encoder, Adapter(rank=4, dora=True), "text_encoder", seed=0)
    for module in (pipe.unet, pipe.text_encoder):
        for name, parameter in adapters.trainable(module).items():
            start = 1.0 if "magnitude" in name else 0.0
            torch.nn.init.normal_(parameter, start, 0.1, generator=torch.Generator().manual_seed(3))
    states = {name: adapters.collect(getattr(pipe, name)) for name in ("unet", "text_encoder")}
    write("diffusers", tmp_path / "out", families.get("sd"), states)
    loaded = stock()
    loaded.load_lora_weights(tmp_path / "out", weight_name=FILE, adapter_name="default")
    for component in states:
        found = dict(getattr(loaded, component).named_parameters())
        for name, parameter in adapters.trainable(getattr(pipe, component)).items():
            assert torch.equal(found[name], parameter), name
    assert np.array_equal(picture(loaded), picture(pipe))


@pytest.mark.parametrize("dora", [False, True])
def test_a_kohya_file_says_what_it_is_and_who_gets_dora_wrong(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture, dora: bool
) -> None:
    caplog.set_level("INFO", logger="dbtrain")
    cfg = make(adapter__dora=dora, export__formats=["diffusers", "kohya"], train__steps=1)
    path = train(cfg) / "export" / "run.safetensors"
    said = caplog.text
    assert f"exported step 1 to {path} (kohya, for ComfyUI, A1111, Forge, InvokeAI)" in said
    assert f"exported step 1 to {path.with_name(FILE)} (diffusers, for Diffusers)" in said
    summary.summary(cfg)
    assert re.search(rf"adapter +{path} \(for ComfyUI, A1111, Forge, InvokeAI\)", caplog.text)
    assert re.search(rf"adapter +{path.with_name(FILE)} \(for Diffusers\)", caplog.text)
    assert said.count("for them, add the format diff to export.formats") == (2 if dora else 0)
    assert said.count("only LyCORIS applies DoRA as it was trained") == (2 if dora else 0), "first and last"
    with safe_open(path, "pt") as file:
        header = file.metadata()
    assert header["ss_base_model_version"] == "sd_v1" and header["ss_v2"] == "False"
    assert header["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert (header["ss_output_name"], header["ss_sd_model_name"]) == ("run", bases.sd().name)
    digest = hashlib.sha256((data := path.read_bytes())[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
    assert header["sshs_model_hash"] == digest and header["modelspec.hash_sha256"] == f"0x{digest}"
    assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("4", "8")
    assert (header["ss_resolution"], header["modelspec.resolution"]) == ("(64, 64)", "64x64")
    assert (header["ss_seed"], header["ss_max_train_steps"]) == (str(cfg.seed), "1")
    assert json.loads(header["ss_tag_frequency"]) == {"run": {"a photo of sks dog": 1}}
    converted = export(cfg, adapter=path.parent, out=tmp_path / "converted").parent / path.name
    with safe_open(converted, "pt") as file:
        header = file.metadata()
    assert header["ss_base_model_version"] == "sd_v1"
    assert "ss_output_name" not in header, "a converted file may be anyone's"


def test_a_kohya_file_is_dated_by_its_user_alone(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock would make the exports of equal runs differ."""
    cfg = make(export__formats=["kohya"], train__steps=1)
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    plain = train(cfg) / "export" / "run.safetensors"
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1767225600")
    dated = export(cfg, out=tmp_path / "dated")
    headers = []
    for path in (plain, dated):
        with safe_open(path, "pt") as file:
            headers.append(file.metadata())
    date = {"ss_training_started_at": "1767225600", "modelspec.date": "2026-01-01T00:00:00"}
    assert headers[1] == headers[0] | date
    assert export(cfg, out=tmp_path / "again").read_bytes() == dated.read_bytes()
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "today")
    with pytest.raises(ConfigError, match="SOURCE_DATE_EPOCH is 'today', not seconds since 1970; unset it"):
        export(cfg, out=tmp_path / "wrong")


def test_a_diff_makes_of_stock_weights_what_dora_was_trained_to(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As ComfyUI, Forge, A1111 and InvokeAI load it: each tensor is added to the weight of its name."""
    caplog.set_level("INFO", logger="dbtrain")
    settings = {"targets": r"mid_block.*(to_q|conv1)", "dora": True, "rank": 4}
    text = settings | {"targets": "attention"}
    cfg = make(adapter=settings | {"text_encoder": text}, export__formats=["diffusers", "kohya", "diff"],
               optim__lr=1e-2, train__steps=2)  # fmt: skip
    path = train(cfg) / "export" / "run-diff.safetensors"
    assert "Forge and InvokeAI give other images; for them, use the file of the format diff" in caplog.text
    assert "`run-diff.safetensors` is for" in (path.parent / "README.md").read_text()
    assert hub.uploaded(path.parent, "run") == [
        Path(name) for name in ("README.md", FILE, path.name, "run.safetensors")
    ]
    changed, trained = stock(), stock()
    bare = picture(changed)
    trained.load_lora_weights(path.parent, weight_name=FILE)
    weights = {
        f"{prefix}_{name}".replace(".", "_").replace("te_encoder", "te_text_model_encoder"): parameter
        for prefix, module in (("lora_unet", changed.unet), ("lora_te", changed.text_encoder))
        for name, parameter in module.named_parameters()
    }
    tensors = load_file(path)
    for name, tensor in tensors.items():
        weights[name.replace(".diff", "_weight")].data += tensor
    assert np.abs(picture(changed) - picture(trained)).max() <= 1e-4
    assert np.abs(picture(changed) - bare).max() > 1e-2
    # A converted adapter gives the same; a diff is not read.
    converted = export(cfg, adapter=path.parent, out=tmp_path / "converted").with_name(path.name)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in load_file(converted).items())
    with pytest.raises(ConfigError, match="changes of whole weights"):
        export(cfg, adapter=path, out=tmp_path / "back")
    for name in (FILE, "run.safetensors"):
        (converted.parent / name).unlink()
    with pytest.raises(ConfigError, match="neither a file nor a run folder"):
        find(converted.parent)


def test_two_runs_fit_into_one_folder_and_are_found(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(make(export__formats=["kohya"], train__steps=1))
    export_of, loras = run / "export", tmp_path / "loras"
    content = load_file(export_of / "run.safetensors")
    assert not (export_of / "kohya.safetensors").exists()
    assert "`run.safetensors` is for A1111" in (export_of / "README.md").read_text()
    assert [str(path) for path in hub.uploaded(export_of, "run")] == ["README.md", "run.safetensors"]
    # Each adapter keeps its name, converted or not; where there are several, one has to be chosen.
    cfg = make(export__formats=["kohya"], train__steps=1)
    (tmp_path / "cat").mkdir()
    shutil.copy(export_of / "run.safetensors", tmp_path / "cat" / "anything.safetensors")
    for source in (None, run.rename(tmp_path / "dog"), tmp_path / "cat" / "anything.safetensors"):
        export(cfg.model_copy(update={"run_dir": str(tmp_path / "dog")}), out=loras, adapter=source)
    assert {path.name for path in loras.glob("*.safetensors")} == {"dog.safetensors", "anything.safetensors"}
    with pytest.raises(ConfigError, match="has 2 adapter files; give one of them, e"):
        find(loras)
    # A renamed run, a folder with one file, a run folder as the working directory, and an old export.
    assert find(tmp_path / "dog") == tmp_path / "dog" / "export" / "run.safetensors"
    assert find(tmp_path / "cat").name == "anything.safetensors"
    monkeypatch.chdir(tmp_path / "dog")
    assert find(".").name == "run.safetensors"
    (tmp_path / "dog/export/run.safetensors").rename(tmp_path / "dog/export/kohya.safetensors")
    old = find(tmp_path / "dog")
    assert old.name == "kohya.safetensors"
    assert load_file(old).keys() == content.keys()


def test_an_export_replaces_only_what_one_wrote(make: Make, tmp_path: Path) -> None:
    forms = ["diffusers", "peft", "kohya", "diff"]
    cfg = make(train__steps=1, export__formats=forms)
    run = train(cfg)
    loras = tmp_path / "loras"
    for _ in range(2):
        export(cfg, out=loras)
    before = {path: path.read_bytes() for path in loras.rglob("*") if path.is_file()}
    for name in (
        FILE,
        "run.safetensors",
        "run-diff.safetensors",
        "unet/adapter_model.safetensors",
        "README.md",
    ):
        (loras / name).write_bytes(b"mine")
        with pytest.raises(
            ConfigError, match=f"{name} is there, and no export of this version wrote it; remove"
        ):
            export(cfg, out=loras)
        assert {path: path.read_bytes() for path in before} == before | {loras / name: b"mine"}
        (loras / name).write_bytes(before[loras / name])
    # A converted adapter has the name of its source.
    cases = (
        ("kohya", "run.safetensors", "run.safetensors"),
        ("peft", "unet", "unet/adapter_model.safetensors"),
    )
    for form, source, name in cases:
        with pytest.raises(
            ConfigError, match=f"would replace the adapter itself, .*{name}; give another --out"
        ):
            export(make(export__formats=[form]), out=loras, adapter=loras / source)
    assert {path: path.read_bytes() for path in before} == before
    assert export(make(export__formats=["kohya"]), out=loras, adapter=run).name == "run.safetensors"


def test_a_file_for_another_base_is_not_converted(make: Make, tmp_path: Path) -> None:
    layer = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {"lora_down.weight": torch.ones(4, 320), "lora_up.weight": torch.ones(320, 4)}
    save_file({f"{layer}.{part}": tensor for part, tensor in tensors.items()}, tmp_path / "sd15.safetensors")
    with pytest.raises(ConfigError, match=r"to_q\.lora_A\.weight is \(4, 320\), the base has \(4, 64\)"):
        export(make(), adapter=tmp_path / "sd15.safetensors", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_export_from_a_checkpoint_is_the_export_of_the_live_run(make: Make, tmp_path: Path) -> None:
    cfg = make()
    live = train(cfg) / "export"
    data = {path.name: path.read_bytes() for path in live.iterdir()}
    tensors = load_file(live / FILE)
    shutil.rmtree(live)
    assert export(cfg) == live / FILE
    assert {path.name: path.read_bytes() for path in live.iterdir()} == data
    earlier = load_file(export(cfg, step=2, out=tmp_path / "step2"))
    assert {path.name: path.read_bytes() for path in live.iterdir()} == data
    assert not all(torch.equal(earlier[name], tensors[name]) for name in tensors)


def test_an_export_removes_what_the_run_wrote_of_another_step(make: Make, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"train__steps": 2, "train__checkpoint_every": 1}
    folder = train(make(**settings, export__formats=["diffusers", "peft"])) / "export"
    for name in ("notes.txt", "other.safetensors", "unet/notes.txt"):
        (folder / name).touch()
    mine = {Path(name) for name in ("README.md", "notes.txt", "other.safetensors", "unet/notes.txt")}

    def there(at: Path) -> set[Path]:
        return {path.relative_to(at) for path in at.rglob("*") if path.is_file()}

    cfg = make(**settings, export__formats=["kohya"])
    copy = shutil.copytree(folder, tmp_path / "copy")
    export(cfg, 1, out=copy)
    every = there(folder)
    assert there(copy) == every | {Path("run.safetensors")}, "another folder is the user's"
    export(cfg)
    assert there(folder) == every | {Path("run.safetensors")}, "of the same step"
    assert export(cfg, 1) == find(folder.parent) == folder / "run.safetensors"
    assert there(folder) == mine | {Path("run.safetensors")}
    (folder / "unet/notes.txt").unlink()
    export(make(**settings, export__formats=["peft"]))
    assert not (folder / "run.safetensors").exists() and (folder / "unet/adapter_config.json").is_file()
    export(make(**settings), 1)
    assert there(folder) == mine - {Path("unet/notes.txt")} | {Path(FILE)} and not (folder / "unet").exists()


def test_tensors_are_fp32_and_keys_are_clean(make: Make) -> None:
    tensors = load_file(train(make(train__precision="bf16")) / "export" / FILE)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert all(name.startswith("unet.") for name in tensors)
    assert all(name.endswith((".lora.down.weight", ".lora.up.weight")) for name in tensors)
    assert not any("module." in name or "_orig_mod" in name or "default" in name for name in tensors)


@pytest.mark.parametrize(
    "targets",
    [("to_q",), ("to_q", "ff.net.2"), ("conv1", "to_v", "proj_in"), ("conv1", "time_emb_proj"), ("conv_in",)],
    ids=str,
)
def test_every_layer_of_any_target_loads(tmp_path: Path, targets: tuple[str, ...]) -> None:
    """A file whose keys were of two forms would load by half, and say nothing."""
    unet = stock().unet
    adapters.attach(unet, Adapter(rank=4, alpha=8, targets=targets), "denoiser", seed=0)
    for parameter in adapters.trainable(unet).values():
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(2))
    write("diffusers", tmp_path / "out", families.get("sd"), {"unet": adapters.collect(unet)})
    loaded = stock()
    loaded.load_lora_weights(tmp_path / "out", weight_name=FILE, adapter_name="default")
    want = adapters.trainable(unet)
    got = {name: p for name, p in loaded.unet.named_parameters() if ".lora_" in name}
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert {value for layer in layers(loaded.unet) for value in layer.scaling.values()} == {2.0}


def test_the_card_says_how_to_load_it(make: Make) -> None:
    card = (train(make()) / "export" / "README.md").read_text()
    assert f'from_pretrained("path/to/{bases.sd().name}")' in card
    assert str(bases.sd().parent) not in card
    assert "base_model" not in card, "the Hub takes ids only, no folder of this machine"
    assert "a photo of sks dog" in card
    assert "rank 4, alpha 8" in card
    assert f'weight_name="{FILE}"' in card


@pytest.mark.parametrize(
    ("path", "config", "load"),
    [
        ("tiny", None, 'from_pretrained("path/to/tiny")'),
        ("me/dog", None, 'from_pretrained("me/dog")'),
        ("FOLDER/a.safetensors", None, 'from_single_file("path/to/a.safetensors")'),
        ("FOLDER/a.safetensors", "me/dog", 'from_single_file("path/to/a.safetensors", config="me/dog")'),
        (
            "FOLDER/a.safetensors",
            "FOLDER",
            'from_single_file("path/to/a.safetensors", config="path/to/mine")',
        ),
    ],
)
def test_the_card_loads_the_base_as_a_reader_can(
    make: Make, tmp_path: Path, path: str, config: str | None, load: str
) -> None:
    (folder := tmp_path / "mine").mkdir()
    (folder / "a.safetensors").touch()
    settings = {"path": path, "config": config} if config else {"path": path}
    cfg = make(model={key: value.replace("FOLDER", str(folder)) for key, value in settings.items()})
    state = AdapterState({}, {"peft_type": "LORA", "r": 4, "lora_alpha": 8})
    base = Base("sd", bases.sd(), None, families.get("sd"))
    text = card(cfg, base, {"unet": state}, [], {}, "dog", ["diffusers", "peft"], [])
    assert text.count(f".{load}\n") == 2 and str(tmp_path) not in text
    assert yaml.safe_load(text.split("---\n")[1]).get("base_model") == (path if path == "me/dog" else None)
    for code in text.split("```python\n")[1:]:
        compile(code.split("```")[0], "card", "exec")


def test_the_card_is_valid_yaml_for_any_prompt(make: Make) -> None:
    prompt = """a 'sks' "dog": \\ #1"""
    cfg = make(prepare__instance_prompt=prompt, prepare__class_prompt=None)
    prepare(cfg)
    card = (train(cfg) / "export" / "README.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1])["instance_prompt"] == prompt
    compile(card.split("```python\n")[1].split("```")[0], "card", "exec")


def test_a_contact_sheet_changes_the_card_alone(make: Make, tmp_path: Path) -> None:
    """A diff would take minutes to write again."""
    cfg = make(train__steps=1)
    folder = train(cfg) / "export"
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    Image.new("RGB", (8, 8)).save(tmp_path / "sheet.png")
    show(cfg, tmp_path / "sheet.png")
    after = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert after.keys() - before.keys() == {"samples.png"}
    assert {name for name in before if before[name] != after[name]} == {"README.md"}
    assert "![](samples.png)" in (folder / "README.md").read_text()


def test_a_preview_lies_beside_the_file_that_programs_list(make: Make, tmp_path: Path) -> None:
    folder = train(cfg := make(train__steps=1, export__formats=["kohya"])) / "export"
    for name in ("sheet", "00-00-seed0", "01-00-seed0", "01-01-seed0"):
        Image.new("RGB", (8, 8), "red" if name == "01-00-seed0" else "blue").save(tmp_path / f"{name}.png")
    show(cfg, tmp_path / "sheet.png")
    preview = folder / "run.preview.png"  # the first image with the adapter
    assert preview.read_bytes() == (tmp_path / "01-00-seed0.png").read_bytes()
    assert preview.relative_to(folder) in hub.uploaded(folder, "run")
    validated = folder.parent / "validation" / "step-000001"
    validated.mkdir(parents=True)
    Image.new("RGB", (8, 8), "green").save(validated / "00-seed0.png")
    show(cfg, None)
    assert preview.read_bytes() == (validated / "00-seed0.png").read_bytes()


def test_a_run_that_is_done_is_not_run_again(make: Make, tmp_path: Path) -> None:
    run = train(make())
    stamps = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    train(make())
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == stamps


def test_a_run_killed_before_its_export_is_exported(make: Make) -> None:
    run = train(make())
    (run / "DONE").unlink()
    whole = tree(run / "export")
    shutil.rmtree(run / "export")
    (run / "export").mkdir()
    (run / "export" / f".{FILE}.4711.tmp").write_bytes(b"half")
    train(make())
    assert tree(run / "export") == whole
    assert (run / "DONE").is_file()


def test_the_tiny_base_is_small_and_ordinary() -> None:
    size = sum(path.stat().st_size for path in tiny.path().rglob("*") if path.is_file())
    assert size <= 16 * 2**20
    pipe = StableDiffusionPipeline.from_pretrained(tiny.path(), dtype=torch.float32, safety_checker=None)
    assert type(pipe.vae).__name__ == "AutoencoderKL"
