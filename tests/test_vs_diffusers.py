"""dbtrain's steps are those of Diffusers' script: every loss and what the adapter learns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import common, vs_diffusers
from benchmarks.common import Result
from dbtrain.runtime import console


@pytest.mark.parametrize(
    ("precision", "loss", "learnt"),
    [("fp32", 1e-5, 1e-3), pytest.param("bf16", 0.02, 0.5, marks=pytest.mark.slow)],
)
def test_every_loss_is_the_references(
    precision: str, loss: float, learnt: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "start", lambda: None)
    monkeypatch.setattr("sys.argv", ["x", "--out", str(tmp_path), "--smoke", "--precision", precision])
    common.main(vs_diffusers.run, vs_diffusers.parser())
    (file,) = tmp_path.glob(f"vs_diffusers-step-tiny-{precision}-*.json")
    rows = {row.label: row for row in Result.read(file).rows}
    same = rows["same work"].counts
    assert same["steps"] == 4
    assert float(str(same["losses, largest relative gap"])) < loss
    assert float(str(same["what the adapters learnt, relative gap"])) < learnt
    assert rows["dbtrain"].measures["over dbtrain's"].median == 1
    steps = {label: row.measures["step"].median for label, row in rows.items() if row.measures}
    assert steps["reference, encoding its pictures"] > steps["reference, latents given"] > 0


def test_the_gap_is_that_of_one_long_vector() -> None:
    a = {"x": torch.tensor([3.0, 0.0]), "y": torch.tensor([4.0])}
    assert vs_diffusers._gap(a, a) == 0
    assert vs_diffusers._gap({name: 2 * tensor for name, tensor in a.items()}, a) == pytest.approx(1)
    assert vs_diffusers._gap(a, {"x": torch.zeros(2), "y": torch.tensor([5.0])}) == pytest.approx(10**0.5 / 5)
