"""The learning rate as a function of the step, and moments that are kept by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dbtrain.config import Optim
from dbtrain.runtime.errors import ConfigError
from dbtrain.train import optim


def rates(steps: int, **settings: object) -> list[float]:
    cfg = Optim(lr=1.0, **settings)  # type: ignore[arg-type]
    return [optim.lr_at(step, cfg, steps) for step in range(steps)]


def test_schedules() -> None:
    assert rates(4) == [1, 1, 1, 1]
    assert rates(4, schedule="linear") == [1, 0.75, 0.5, 0.25]
    assert rates(4, schedule="cosine") == pytest.approx([1, 0.853553, 0.5, 0.146447], abs=1e-6)
    assert rates(4, warmup_steps=2) == [0.5, 1, 1, 1]
    assert rates(6, warmup_steps=2, schedule="linear") == [0.5, 1, 1, 0.75, 0.5, 0.25]
    assert rates(2, warmup_steps=2, schedule="cosine") == [0.5, 1]


def trained(steps: int) -> tuple[dict[str, nn.Parameter], torch.optim.AdamW]:
    parameters = {name: nn.Parameter(torch.ones(3)) for name in ("a", "b")}
    optimizer = optim.build(parameters, Optim())
    for step in range(steps):
        for parameter in parameters.values():
            parameter.grad = torch.arange(3.0) + step
        optimizer.step()
    return parameters, optimizer


def test_moments_survive_by_name_and_go_on_exactly() -> None:
    whole, _ = trained(4)
    parameters, optimizer = trained(2)
    saved = optim.state(optimizer, parameters)
    assert set(saved) == {f"{m}.{n}" for m in optim.MOMENTS for n in ("a", "b")}
    fresh = optim.build(parameters, Optim())
    optim.load_state(fresh, parameters, saved)
    for step in (2, 3):
        for parameter in parameters.values():
            parameter.grad = torch.arange(3.0) + step
        fresh.step()
    assert all(torch.equal(whole[name], parameters[name]) for name in whole)


def test_another_adapter_s_moments_are_refused() -> None:
    parameters, optimizer = trained(1)
    saved = optim.state(optimizer, parameters)
    with pytest.raises(ConfigError, match="other parameters"):
        optim.load_state(optimizer, {"c": parameters["a"]}, saved)
