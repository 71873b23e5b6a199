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


def network() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    down = nn.Parameter(torch.randn(4, 5, generator=generator))
    return {"unet.a.lora_A.weight": down, "unet.a.lora_B.weight": nn.Parameter(torch.zeros(5, 4))}


def fit(
    optimizer: torch.optim.Optimizer,
    parameters: dict[str, nn.Parameter],
    steps: range,
    bad: int | None = None,
) -> dict[str, torch.Tensor]:
    """Some steps of a small problem; the gradient of step `bad` is NaN, and the step skipped."""
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, 32, 5, generator=generator)
    for step in steps:
        down, up = parameters.values()
        optimizer.zero_grad()
        (x @ down.T @ up.T - y).square().mean().backward()
        if bad is not None:
            down.grad *= torch.nan if step == bad else 1  # type: ignore[operator]
            optimizer.found_inf = torch.tensor(float(step == bad))  # type: ignore[attr-defined]
        optimizer.step()
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", ["adamw", "prodigy"])
def test_what_an_optimizer_keeps_survives_by_name_and_goes_on_exactly(name: str) -> None:
    cfg, parameters, other = Optim(name=name), network(), network()  # type: ignore[arg-type]
    whole = fit(optim.build(other, cfg), other, range(40))
    optimizer = optim.build(parameters, cfg)
    fit(optimizer, parameters, range(25))
    saved = optim.state(optimizer, parameters)
    assert {key.partition(".")[0] for key in saved} >= set(optim.MOMENTS[type(optimizer)])
    fresh = optim.build(parameters, cfg)
    optim.load_state(fresh, parameters, dict(reversed(saved.items())))
    assert equal(fit(fresh, parameters, range(25, 40)), whole)


def test_another_adapter_s_moments_are_refused() -> None:
    parameters = network()
    optimizer = optim.build(parameters, Optim())
    fit(optimizer, parameters, range(1))
    saved = optim.state(optimizer, parameters)
    with pytest.raises(ConfigError, match="other parameters"):
        optim.load_state(optimizer, {"c": parameters["unet.a.lora_A.weight"]}, saved)


def test_prodigy_is_its_authors() -> None:
    """Ours reads nothing on the host, can be recorded, and knows groups; else it is theirs."""
    from prodigyopt import Prodigy as Theirs

    parameters, others = network(), network()
    optimizer = optim.build(parameters, Optim(name="prodigy", weight_decay=0.01))
    theirs = Theirs(
        others.values(), weight_decay=0.01, use_bias_correction=True, safeguard_warmup=True, d0=1e-5
    )
    mine, other = fit(optimizer, parameters, range(60)), fit(theirs, others, range(60))
    assert theirs.param_groups[0]["d"] > 1e-4  # it has grown from 1e-5
    assert optimizer.shared["d"].item() == pytest.approx(theirs.param_groups[0]["d"], rel=1e-5)  # type: ignore[attr-defined]
    for name in mine:
        torch.testing.assert_close(mine[name], other[name], rtol=1e-5, atol=1e-6)


def test_a_factor_under_prodigy_is_another_unit_of_the_parameters() -> None:
    """A group of factor 4 goes as the parameters divided by 4 would, times 4, by the same found rate."""
    from dbtrain.train.prodigy import Prodigy

    ones, fours = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).unbind()
    plain, scaled = nn.Parameter(fours.clone() / 4), nn.Parameter(fours.clone())
    rest = [nn.Parameter(ones.clone()) for _ in range(2)]
    units = Prodigy([{"params": [rest[0], plain]}], 1.0, 0.0)
    factor = Prodigy([{"params": [rest[1]]}, {"params": [scaled], "factor": 4.0, "lr": 4.0}], 1.0, 0.0)
    for _ in range(60):
        for optimizer, value, one in ((units, plain * 4, rest[0]), (factor, scaled, rest[1])):
            optimizer.zero_grad()
            ((value - 1).square().sum() + (one + 2).square().sum()).backward()
            optimizer.step()
    assert units.shared["d"] > 1e-4
    torch.testing.assert_close(factor.shared["d"], units.shared["d"], rtol=1e-5, atol=0)
    torch.testing.assert_close(scaled, plain * 4)


@pytest.mark.parametrize("name", ["adamw", "prodigy"])
def test_a_step_that_is_skipped_changes_nothing(name: str) -> None:
    cfg, parameters, others = Optim(name=name), network(), network()  # type: ignore[arg-type]
    skipping = optim.build(parameters, cfg)
    with_bad = fit(skipping, parameters, range(31), bad=20)
    assert equal(with_bad, fit(optim.build(others, cfg), others, range(30), bad=99))


def test_a_rate_of_another_optimizer_is_refused_for_prodigy() -> None:
    assert Optim(name="prodigy").lr == Optim(name="prodigy").token_lr == 1.0 and Optim().lr == 1e-4
    assert Optim(name="prodigy", lr=0.5, text_encoder_lr=0.1).text_encoder_lr == 0.1
    told = r"lr is 0\.0001 and token_lr is 0\.001, but for prodigy .*; set optim\.lr=1 optim\.token_lr=1"
    with pytest.raises(ValueError, match=told):
        Optim(name="prodigy", lr=1e-4, token_lr=1e-3)
