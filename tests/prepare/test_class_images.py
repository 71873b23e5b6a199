"""Class images: what is kept of them is what the sampler gave, and nothing is done for them twice."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import CLIPTextModel

from dbtrain.config import Config
from dbtrain.data import prompt_table, shards
from dbtrain.data.shards import Manifest
from dbtrain.data.sizes import Size
from dbtrain.models.base import Base
from dbtrain.models.block_swap import Ring
from dbtrain.models.families import registry as families
from dbtrain.models.families.space import LatentSpace
from dbtrain.models.pretrained import Pretrained
from dbtrain.prepare import class_images
from dbtrain.prepare.plan import request
from dbtrain.prepare.prepare import prepare
from dbtrain.runtime.errors import ConfigError
from dbtrain.train.dreambooth import DreamBooth
from tests import bases
from tests.conftest import Make, at, slow, train
from tests.networks import first_batch

LATENT_BASES: dict[str, Callable[[], Path | str]] = {
    "tiny": lambda: "tiny",
    "sd": bases.sd,
    "sdxl": bases.sdxl,
}


@pytest.fixture
def drawn(make: Make, tmp_path: Path) -> Callable[..., tuple[Config, list[Path]]]:
    """Class images of a base of its own, in this test's folder: config and paths."""

    def draw(base: Path | str, **changes: Any) -> tuple[Config, list[Path]]:
        settings = {
            "model__path": str(base), "prepare__class_dir": str(tmp_path / "class"),
            "prepare__class_images": 4, "prepare__sampling__batch": 2,
        }  # fmt: skip
        cfg = make(**settings | changes)
        return cfg, ensure(cfg)

    return draw


def ensure(cfg: Config) -> list[Path]:
    assert cfg.prepare
    base = Base.find(cfg.model)
    return [path for path, _ in class_images.ensure(base, cfg.prepare, cfg.train)]


def class_rows(folder: Path) -> list[shards.Row]:
    manifest = Manifest.read(at(folder))
    return [row for shard in manifest.roles["class"] for row in shards.read(at(folder), shard)]


@pytest.mark.parametrize("base", LATENT_BASES)
def test_a_latent_is_what_the_picture_was_decoded_from(drawn: Any, base: str) -> None:
    """Without a VAE at its side and with the prompt encoded once, the pipeline draws the same."""
    cfg, kept = drawn(LATENT_BASES[base]())
    _, pictures = drawn(LATENT_BASES[base](), prepare__class_pictures=True)
    model = Base.find(cfg.model)
    vae, space = model.load("vae"), model.family.space(model, Size.square(64))
    for latent, picture in zip(kept, pictures, strict=True):
        assert latent.parent != picture.parent
        with torch.no_grad():
            decoded = vae.decode(space.unscaled(class_images.load_latent(latent, space.shape))[None]).sample[
                0
            ]
        values = ((decoded / 2 + 0.5).clamp(0, 1) * 255).permute(1, 2, 0).numpy()
        assert np.abs(values - np.asarray(Image.open(picture), dtype=np.float32)).max() < 0.6


@pytest.mark.parametrize("guidance", [1.0, 7.5])
@pytest.mark.parametrize(("base", "clips"), [("sd", {1.0: 1, 7.5: 2}), ("sdxl", {1.0: 2, 7.5: 2})])
def test_the_prompt_is_encoded_once(
    drawn: Any, monkeypatch: pytest.MonkeyPatch, base: str, clips: dict[float, int], guidance: float
) -> None:
    """SD encodes the empty prompt as well; SDXL has two encoders, and zeros for the empty prompt."""
    calls = []
    original = CLIPTextModel.forward  # SDXL's second encoder has one inside

    def counted(*args: Any, **more: Any) -> Any:
        calls.append(1)
        return original(*args, **more)

    monkeypatch.setattr(CLIPTextModel, "forward", counted)
    drawn(LATENT_BASES[base](), prepare__sampling__guidance=guidance)
    assert len(calls) == clips[guidance]
    drawn(LATENT_BASES[base](), prepare__sampling__guidance=guidance, prepare__class_pictures=True)
    assert len(calls) == 2 * clips[guidance], "for pictures too"


def test_no_vae_is_loaded_for_them(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(make(prepare__class_prompt=None))
    loaded = []
    original = Pretrained.fill

    def noting(base: Pretrained, component: str, *more: Any) -> Any:
        loaded.append(component)
        return original(base, component, *more)

    monkeypatch.setattr(Pretrained, "fill", noting)
    mine = {"prepare__class_dir": str(tmp_path / "mine")}
    prepare(make(**mine))
    assert "unet" in loaded and "vae" not in loaded
    prepare(make(**mine, prepare__class_pictures=True))
    assert loaded.count("vae") == 2, "one decodes, one encodes"


def test_swapped_blocks_generate_the_same(drawn: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, (kept, *_) = drawn(bases.sd())
    image = kept.read_bytes()
    shutil.rmtree(kept.parent)
    rings, original = [], Ring.__init__

    def noting(ring: Ring, blocks: Any, device: torch.device) -> None:
        rings.append(len(blocks))
        original(ring, blocks, device)

    monkeypatch.setattr(Ring, "__init__", noting)
    _, (again, *_) = drawn(bases.sd(), train__swap_blocks=5, train__gradient_checkpointing="blocks")
    assert rings == [5] and again == kept and again.read_bytes() == image


def test_a_quantized_base_has_class_images_of_its_own(drawn: Any) -> None:
    """They are what the base that is trained generates, so that training preserves that."""
    cfg, (full, *_) = drawn(bases.sd())
    _, (coded, *_) = drawn(bases.sd(), train__base_linears="int8")
    assert coded.parent != full.parent
    x0, rounded = (class_images.load_latent(path, (4, 8, 8)) for path in (full, coded))
    assert 0 < (x0 - rounded).norm() < 0.1 * x0.norm()
    assert cfg.prepare
    base = Base.find(cfg.model)
    assert coded.exists() and class_images.there(base, cfg.prepare, "int8") == cfg.prepare.class_images


def stretched(base: Path, folder: Path) -> Path:
    """A base whose VAE has a mean and a deviation for each channel."""
    config = shutil.copytree(base, folder) / "vae" / "config.json"
    spread = {"latents_mean": [0.5, -1.0, 2.0, 0.0], "latents_std": [0.7, 1.3, 0.2, 4.0]}
    config.write_text(json.dumps(json.loads(config.read_text()) | spread))
    return folder


@pytest.mark.parametrize(("base", "spread"), [("sd", False), ("sd", True), ("sdxl", True)])
def test_training_sees_the_sampler_s_latent(drawn: Any, tmp_path: Path, base: str, spread: bool) -> None:
    folder = LATENT_BASES[base]()
    cfg, kept = drawn(
        stretched(folder, tmp_path / "model") if spread else folder, train__global_batch=2,
        train__micro_batch=2,
    )  # fmt: skip
    files = {path.name: load_file(path)["x0"] for path in kept}
    out = prepare(cfg)
    manifest, model = Manifest.read(at(out)), Base.find(cfg.model)
    family = model.family
    table = prompt_table.read(at(out), manifest.prompts)
    network = DreamBooth.build(model, manifest, table, cfg)
    seen = network.x0(first_batch(cfg, family))[2:]  # the class images follow the instance images
    assert len(seen) == 2
    for x0 in seen:
        near = min((x0 - file).abs().max().item() for file in files.values())
        assert near <= 4e-6 * max(1.0, x0.abs().max().item())
    for row in class_rows(out):
        assert not row.tensors["std"].any()
        assert row.meta["original_size"] == [64, 64] and row.meta["crop"] == [0, 0]
        if base == "sdxl":
            assert family.row(row.meta, Size.square(64))["time_ids"].tolist() == [64, 64, 0, 0, 64, 64]


def test_rows_of_another_vae_s_scale_are_made_anew_of_the_same_latents(drawn: Any, tmp_path: Path) -> None:
    cfg, kept = drawn(bases.sd())
    before = class_rows(prepare(cfg))
    other, again = drawn(stretched(bases.sd(), tmp_path / "model"))
    assert again == kept, "no VAE had a part in them"
    after = class_rows(prepare(other))
    assert not {row.meta["key"] for row in before} & {row.meta["key"] for row in after}
    assert class_rows(prepare(other))[0].meta == after[0].meta


@pytest.mark.parametrize("base", ["sd", slow("sdxl")])
def test_a_run_trains_on_them(drawn: Any, base: str) -> None:
    cfg, _ = drawn(LATENT_BASES[base](), train__steps=3)
    prepare(cfg)
    lines = [json.loads(line) for line in (train(cfg) / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 3 and all(0 < line["loss_prior"] < 100 for line in lines)


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda good: good[:-5],
    "empty": lambda good: b"",
    "another size": lambda good: save({"x0": torch.zeros(4, 4, 4)}),
    "another tensor": lambda good: save({"x1": torch.zeros(4, 8, 8)}),
    "infinite": lambda good: save({"x0": torch.full((4, 8, 8), torch.inf)}),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_named_and_once_removed_drawn_anew(drawn: Any, damage: str) -> None:
    cfg, kept = drawn(bases.sd())
    good = kept[2].read_bytes()
    kept[2].write_bytes(DAMAGE[damage](good))
    with pytest.raises(ConfigError, match=rf"cannot read class image {kept[2]}: .*; delete it"):
        prepare(cfg)
    kept[2].unlink()
    prepare(cfg)
    assert kept[2].read_bytes() == good


def test_a_latent_that_is_not_finite_is_not_kept(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"NaN or infinite; set prepare\.sampling\.precision to fp32"):
        class_images.save_latent(tmp_path / "00000.safetensors", torch.tensor([[[torch.nan]]]))
    assert not list(tmp_path.iterdir())


def test_bf16_latents_are_kept_in_bf16(drawn: Any) -> None:
    _, kept = drawn(bases.sd(), prepare__sampling__precision="bf16")
    for path in kept:
        assert load_file(path)["x0"].dtype == torch.bfloat16
        assert class_images.load_latent(path, (4, 8, 8)).dtype == torch.float32


def test_unscaled_is_the_inverse_of_the_network_s_scaling() -> None:
    space = LatentSpace((2, 1, 1), (2.0, 0.5), (1.0, -3.0))
    assert torch.equal(space.unscaled(torch.tensor([[[4.0]], [[1.0]]])), torch.tensor([[[3.0]], [[-1.0]]]))


@pytest.mark.parametrize(("base", "asked"), [("sd", [True]), ("if-1", [False, True])])
def test_pictures_have_the_name_they_always_had(drawn: Any, base: str, asked: list[bool]) -> None:
    """So that what is cached stays valid; a model of pixels has pictures whatever is asked for."""
    for pictures in asked:
        cfg, kept = drawn(
            bases.ALL[base](),
            prepare__resolution=16 if base == "if-1" else 64,
            prepare__class_pictures=pictures,
        )
        model = Base.find(cfg.model)
        assert json.loads((kept[0].parent / "about.json").read_text()) == {
            "base": {part: model.key(part) for part in model.family.parts},
            "prompt": "a photo of a dog", "sampler": "DPM-Solver++ 2M", "steps": 2, "guidance": 7.5,
            "side_px": cfg.prepare.resolution, "precision": "fp32",
        }  # fmt: skip
        assert {path.suffix for path in kept} == {".png"}
        assert Manifest.read(at(prepare(cfg))).request["class_pictures"] is True
    assert len(list(kept[0].parent.parent.iterdir())) == 1


def test_shards_are_refused_where_the_other_kind_is_asked_for(drawn: Any) -> None:
    cfg, _ = drawn(bases.sd())
    prepare(cfg)
    pictures, _ = drawn(bases.sd(), prepare__class_pictures=True)
    with pytest.raises(ConfigError, match=r"prepare\.class_pictures False, now True; rerun"):
        train(pictures)
    prepare(pictures)
    with pytest.raises(ConfigError, match=r"prepare\.class_pictures True, now False; rerun"):
        train(cfg)
    assert (train(pictures) / "DONE").exists()


CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("asked", "device", "count", "compiled"),
    [
        (False, GPU, 5000, False), (True, CPU, 1, True), ("auto", CPU, 5000, False),
        ("auto", GPU, 999, False), ("auto", GPU, 1000, True),
    ],
)  # fmt: skip
def test_when_the_denoiser_is_compiled(
    make: Make, asked: Any, device: torch.device, count: int, compiled: bool
) -> None:
    cfg = make(prepare__sampling__compile=asked).prepare
    assert cfg and class_images.compiles(cfg, count, device) is compiled


def test_how_fast_they_are_drawn_is_not_what_shards_were_asked_for(make: Make) -> None:
    plain, fast = (make(prepare__sampling=how) for how in ({}, {"compile": True, "batch": 3}))
    assert request(plain, families.get("sd")) == request(fast, families.get("sd"))


@pytest.mark.slow
def test_a_compiled_denoiser_draws_the_same(drawn: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """Compiled once, for full batches: the last one here is not."""
    quick = partial(class_images.kernels.compile_module, backend="aot_eager")
    monkeypatch.setattr(class_images.kernels, "compile_module", quick)
    settings = {"prepare__class_images": 3, "prepare__sampling__batch": 2}
    _, eager = drawn(bases.sd(), **settings)
    _, compiled = drawn(
        bases.sd(), **settings, prepare__sampling__compile=True, prepare__class_dir=str(tmp_path / "compiled")
    )
    assert [path.relative_to(tmp_path / "compiled") for path in compiled] == [
        path.relative_to(tmp_path / "class") for path in eager
    ]
    for one, other in zip(eager, compiled, strict=True):
        torch.testing.assert_close(load_file(one)["x0"], load_file(other)["x0"], rtol=1e-3, atol=1e-3)
    assert len(list(compiled[0].parent.glob("0*"))) == 3


def test_it_is_compiled_for_one_size_of_batch(drawn: Any, tmp_path: Path, monkeypatch: Any) -> None:
    sizes = []
    original = class_images.sampler.generate_encoded

    def noting(
        pipe: Any, encoded: Any, generators: list[torch.Generator], *how: Any, **more: Any
    ) -> list[Tensor]:
        sizes.append(len(generators))
        return original(pipe, encoded, generators, *how, **more)

    monkeypatch.setattr(class_images.sampler, "generate_encoded", noting)
    monkeypatch.setattr(class_images.kernels, "compile_module", lambda denoiser, how: None)
    for compiled, mine in ((False, "eager"), (True, "compiled")):
        drawn(bases.sd(), prepare__class_images=5, prepare__sampling__compile=compiled,
              prepare__class_dir=str(tmp_path / mine))  # fmt: skip
    assert sizes == [2, 2, 1, 2, 2, 2]
