"""Every kind and option: resumed runs, samples of a run, of a checkpoint and of an export, conversions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dbtrain.adapters import inject
from dbtrain.adapters.formats import peft_folder
from dbtrain.adapters.formats import registry as formats
from dbtrain.config import Config
from dbtrain.data.sizes import Size
from dbtrain.models.base import Base
from dbtrain.prepare.prepare import prepare
from dbtrain.runtime.errors import Preempted
from dbtrain.runtime.run_folder import RunFolder
from dbtrain.sample.pipeline import AdapterPipeline
from tests import bases
from tests.conftest import Make, slow, train
from tests.networks import build

OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {}, "ranks": {"ranks": {".*(to_q|q_proj)": 2, ".*0.*": 6}}, "dora": {"dora": True},
    "dora-rslora-dropout": {"dora": True, "rslora": True, "dropout": 0.2}, "biases": {"bias": "all"},
    "own-biases": {"bias": "lora_only"}, "kaiming": {"init": "kaiming"}, "orthogonal": {"init": "orthogonal"},
    "loha": {"kind": "loha"}, "loha-cp": {"kind": "loha", "effective_conv2d": True},
    "loha-dropout": {"kind": "loha", "rank_dropout": 0.2, "module_dropout": 0.2},
    "lokr": {"kind": "lokr"}, "lokr-cp": {"kind": "lokr", "effective_conv2d": True, "rank": 2},
    "lokr-dropout": {"kind": "lokr", "rank_dropout": 0.2, "module_dropout": 0.2},
    "lokr-factor": {"kind": "lokr", "decompose_factor": 4},
    "lokr-both": {"kind": "lokr", "decompose_both": True, "rank": 2, "effective_conv2d": True},
    "lokr-whole": {"kind": "lokr", "rank": 64},
}  # fmt: skip
# Base -> a layer of every type: attention, feed-forward, convolutions; and some of those that are joined.
UNET = r"mid_block\..*(to_q|to_out\.0|proj_in|ff\.net\.2|conv1|time_emb_proj|to_k)"
LAYERS = {
    "sd": UNET, "sdxl": UNET, "if-1": UNET,
    "flux2-klein": r".*transformer_blocks\.0\..*(to_[qk]|add_._proj|to_out(\.0)?|linear_in|to_qkv_mlp_proj)",
}  # fmt: skip
# What has tensors of its own, whose names and layers are a family's; the other options are numbers and masks.
# Each is there for SD and for one more UNet.
OTHERS = {
    "sdxl": ("dora", "biases", "lokr-both"), "if-1": ("lora", "own-biases", "loha-cp"),
    "flux2-klein": ("ranks", "dora", "loha", "lokr", "lokr-whole"),
}  # fmt: skip
QUICK = [("sd", "ranks"), ("sd", "lokr-both"), ("if-1", "own-biases"), ("flux2-klein", "dora")]
EVERY = [(family, option) for family, options in ({"sd": OPTIONS} | OTHERS).items() for option in options]
ROWS = [row if row in QUICK else slow(*row) for row in EVERY]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of every family, made by the first test that needs them."""
    return tmp_path_factory.mktemp("shards")


def configured(make: Make, family: str, option: str, run: Path, shards: Path) -> Config:
    layers = "attention" if option == "orthogonal" else LAYERS[family]
    settings = {"rank": 4, "alpha": 6, "targets": layers} | OPTIONS[option]
    if family in ("sd", "sdxl"):
        settings["text_encoder"] = settings | {"targets": "attention"}
    side = bases.SIDES["deepfloyd" if family == "if-1" else family]
    return make(
        model={"path": str(bases.ALL[family]())}, adapter=settings, run_dir=str(run),
        data__shards=str(shards), prepare__resolution=side, prepare__class_prompt=None, train__steps=2,
        train__checkpoint_every=1, train__global_batch=2, optim__lr=1e-2,
    )  # fmt: skip


def predicted(base: Base, components: Mapping[str, Any]) -> dict[str, Tensor]:
    """What every component makes of the same inputs."""
    family, side = base.family, bases.SIDES[base.family.name]
    torch.manual_seed(0)
    x = torch.randn(1, *family.space(base, Size.square(side)).shape)
    condition = {
        name: torch.randn(1, *(8 if size is None else size for size in shape))
        for name, shape in family.conditions(base).items()
    }
    row = family.row({"original_size": (side, side), "crop": (0, 0)}, Size.square(side))
    condition |= {name: tensor[None] for name, tensor in row.items()}
    t = family.objective.of(base.config("scheduler")).timesteps(torch.tensor([0.4]))
    with torch.no_grad():
        found = {family.denoiser: family.denoise(components[family.denoiser].eval(), x, t, condition)}
        for name, encoder in components.items():
            if name != family.denoiser:
                states = encoder.eval()(torch.arange(8)[None], output_hidden_states=True).hidden_states
                found[name] = states[-2]
    return found


@pytest.mark.parametrize(("family", "option"), ROWS)
def test_every_kind_resumes_samples_and_converts(
    make: Make, tmp_path: Path, shards: Path, family: str, option: str
) -> None:
    cfg = configured(make, family, option, tmp_path / "run", shards / family)
    if not (shards / family).exists():
        prepare(cfg)
    run = RunFolder(train(cfg))
    last, base = run.checkpoints()[-1], Base.find(cfg.model)

    # Straight = resumed, to the bit.
    again = configured(make, family, option, tmp_path / "again", shards / family)
    with pytest.raises(Preempted):
        train(again, until=1)
    resumed = RunFolder(train(again))
    for path in last.rglob("*.safetensors"):
        assert path.read_bytes() == (resumed.checkpoint(2) / path.relative_to(last)).read_bytes(), path
    for path in run.export.rglob("*.safetensors"):
        assert path.read_bytes() == (resumed.export / path.relative_to(run.export)).read_bytes(), path

    # The trained module is what the run, its checkpoint, its export and every conversion of it give.
    model = build(cfg, shards / family)
    for name, module in model.trained.items():
        inject.restore(module, peft_folder.read(last / name).tensors)
    trained = predicted(base, model.trained)
    pipe = AdapterPipeline(base, "fp32")
    bare = predicted(base, pipe.components)
    assert all(not torch.equal(bare[name], trained[name]) for name in trained)
    states = formats.read(last, base.family, base.skeleton)
    sources = [run.path, last, run.export]
    for form, able in formats.FORMATS.items():
        if able.readable and not able.lacks(base.family, states):
            sources.append(formats.write(form, tmp_path / form, base.family, states, base.module_names))
    for source in sources:
        pipe.add("it", source)
        pipe.use({"it": 1.0})
        for name, tensor in predicted(base, pipe.components).items():
            close = {"atol": 1e-5, "rtol": 1e-4}
            torch.testing.assert_close(
                tensor, trained.get(name, bare[name]), **close, msg=str((source, name))
            )
        pipe.remove("it")
