"""The moving average of an adapter: its formula, and that it comes through checkpoints and exports."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dbtrain.evaluate import evaluate
from dbtrain.export import export
from dbtrain.models.base import Base
from dbtrain.runtime.errors import ConfigError
from dbtrain.runtime.run_folder import RunFolder
from dbtrain.train import loop
from dbtrain.train.ema import Ema
from tests.conftest import Make
from tests.runs import EXPORT


def test_it_is_the_weighted_mean_of_the_weights_so_far() -> None:
    parameters = {"a": nn.Parameter(torch.tensor([1.0, 2.0])), "b": nn.Parameter(torch.tensor([[3.0]]))}
    ema, wanted = (
        Ema(parameters.values(), 0.3),
        {name: value.detach().clone() for name, value in parameters.items()},
    )
    for step in range(6):
        for name, parameter in parameters.items():
            parameter.data = parameter.data + step
            decay = min(0.3, (1 + step) / (10 + step))
            wanted[name] = decay * wanted[name] + (1 - decay) * parameter.detach()
        ema.at(step)
        ema.update()
    before = [parameter.detach().clone() for parameter in parameters.values()]
    with ema.in_place():
        for name, parameter in parameters.items():
            torch.testing.assert_close(parameter.detach(), wanted[name])
    assert all(map(torch.equal, before, parameters.values()))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "unet" / "adapter_model.safetensors")


def same(one: Path, other: Path) -> bool:
    return all(torch.equal(tensor, weights(other)[name]) for name, tensor in weights(one).items())


@pytest.mark.slow
def test_a_run_keeps_it_exports_it_and_is_not_changed_by_it(
    make: Make, tmp_path: Path, prepared: Path
) -> None:
    shutil.copytree(prepared, tmp_path / "shards")
    settings = {"train__checkpoint_every": 1, "train__keep": 9}
    plain = RunFolder(loop.train(make(run_dir=str(tmp_path / "plain"), **settings, train__steps=2)))
    settings |= {"train__ema": 0.9}
    whole = RunFolder(loop.train(make(run_dir=str(tmp_path / "whole"), **settings)))
    assert same(plain.checkpoint(2), whole.checkpoint(2))
    # Step 0 keeps a tenth of where it began, step 1 two elevenths, and so on.
    average = {name: tensor.double() for name, tensor in weights(whole.checkpoint(1) / "ema").items()}
    for step in (1, 2, 3):
        decay = (1 + step) / (10 + step)
        for name, tensor in weights(whole.checkpoint(step + 1)).items():
            average[name] = decay * average[name] + (1 - decay) * tensor
    for name, tensor in weights(whole.checkpoint(4) / "ema").items():
        torch.testing.assert_close(tensor, average[name].float())

    # The last weights are exported, or the average; `--checkpoints` knows which it was.
    for ema in (False, True):
        chosen = make(run_dir=str(tmp_path / "whole"), **settings, export__ema=ema)
        export.finish(chosen)
        folder = whole.checkpoint(4) / "ema" if ema else whole.checkpoint(4)
        layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
        exported = load_file(whole.path / EXPORT)
        assert torch.equal(
            exported[f"unet.{layer}.lora.up.weight"],
            weights(folder)[f"base_model.model.{layer}.lora_B.weight"],
        )
        found = evaluate.candidates(chosen, Base.find(chosen.model), whole)
        assert [(one.step, one.exported) for one in found] == [(1, False), (2, False), (3, False), (4, True)]
        assert found[3].adapter == folder

    # A run may begin to average when it is resumed, from its weights there.
    late = make(run_dir=str(tmp_path / "plain"), **settings, train__steps=3)
    loop.train(late)
    decay, before, after = 3 / 12, weights(plain.checkpoint(2)), weights(plain.checkpoint(3))
    for name, tensor in weights(plain.checkpoint(3) / "ema").items():
        torch.testing.assert_close(tensor, decay * before[name] + (1 - decay) * after[name])
    with pytest.raises(ConfigError, match=r"step-000002 has no moving average"):
        export.export(make(run_dir=str(tmp_path / "plain"), **settings, export__ema=True), step=2)
    with pytest.raises(ConfigError, match=r"export\.ema is true, but train\.ema is null"):
        make(export__ema=True)


def test_what_is_exported_is_validated(make: Make, tmp_path: Path) -> None:
    from dbtrain.prepare.prepare import prepare

    settings = {"prepare__held_out": 1, "train__ema": 0.9, "train__steps": 2, "optim__lr": 1e-2}
    prepare(make(**settings))
    found = []
    for ema in (False, True):
        run = RunFolder(loop.train(make(**settings, export__ema=ema, validation__every=2)))
        lines = run.table("validation").read_text().splitlines()
        found.append([json.loads(line)["held_out_instance"] for line in lines if '"step": 2' in line])
    assert len(found[1]) == 1 and found[0] != found[1]  # the second time, only that was done again
