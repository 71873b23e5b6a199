"""The objective against Diffusers' scheduler and the reference formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler

from dbtrain.config.training import Loss, Timesteps
from dbtrain.models.ddpm import DDPM
from dbtrain.models.flow_matching import FlowMatching
from dbtrain.models.objectives import losses
from dbtrain.runtime.errors import ConfigError

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def objective(prediction: str = "epsilon", gamma: float | None = None, **config: object) -> DDPM:
    return DDPM.of(SD | {"prediction_type": prediction} | config, Loss(min_snr_gamma=gamma))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_corrupt_and_target_are_the_diffusers_scheduler_s(prediction: str) -> None:
    ours, theirs = objective(prediction), DDPMScheduler(**SD, prediction_type=prediction)
    x0, noise = torch.randn(2, 1000, 4, 3, 3, generator=torch.Generator().manual_seed(0)).unbind()
    t = torch.arange(1000)
    torch.testing.assert_close(ours.corrupt(x0, noise, t), theirs.add_noise(x0, noise, t))
    want = {"epsilon": noise, "sample": x0, "v_prediction": theirs.get_velocity(x0, noise, t)}[prediction]
    torch.testing.assert_close(ours.target(x0, noise, t), want)
    least = t[ours.alphas_cumprod > 0.05]  # later on, rounding is divided by little
    clean = ours.clean(ours.corrupt(x0, noise, t), want, t)
    torch.testing.assert_close(clean[least], x0[least], rtol=1e-4, atol=1e-4)


def test_timesteps_cover_the_schedule_evenly() -> None:
    t = objective().timesteps(torch.linspace(0, 1, 10_001)[:-1])
    assert (t.min(), t.max()) == (0, 999)
    assert set(torch.bincount(t).tolist()) <= {9, 10, 11}
    assert objective().timesteps(torch.tensor([1 - 2**-24])) == 999


def test_timesteps_can_have_the_distributions_of_flow_matching() -> None:
    u = torch.linspace(0, 1, 10_001)[:-1]
    settings = Timesteps(distribution="logit_normal", mean=1.0)
    t = DDPM.of(SD, Loss(timesteps=settings)).timesteps(u)
    assert t.dtype == torch.int64 and 0 <= t.min() <= t.max() < 1000 and (t.diff() >= 0).all()
    assert torch.equal(t, (FlowMatching(settings=settings).timesteps(u).double() * 1000).long())
    for other in (Loss(timesteps=Timesteps(shift=3.0)), Loss(weighting="cosmap")):
        with pytest.raises(ConfigError, match="are for flow-matching models, which this base is not"):
            DDPM.of(SD, other)


def test_without_min_snr_all_weigh_the_same() -> None:
    assert objective().weight(torch.arange(1000)).unique().tolist() == [1.0]


@pytest.mark.parametrize(
    ("prediction", "weight"),
    [
        ("epsilon", lambda snr: torch.minimum(snr, torch.tensor(5.0)) / snr),
        ("v_prediction", lambda snr: torch.minimum(snr, torch.tensor(5.0)) / (snr + 1)),
        ("sample", lambda snr: torch.minimum(snr, torch.tensor(5.0))),
    ],
)
def test_min_snr_weights_are_the_paper_s(prediction: str, weight) -> None:  # type: ignore[no-untyped-def]
    ours = objective(prediction, 5.0)
    t = torch.arange(1000)
    snr = ours.alphas_cumprod / (1 - ours.alphas_cumprod)
    torch.testing.assert_close(ours.weight(t), weight(snr))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_zero_terminal_snr_gives_finite_weights(prediction: str) -> None:
    ours = objective(prediction, 5.0, rescale_betas_zero_snr=True)
    assert ours.alphas_cumprod[-1] < 1e-6
    t = torch.arange(1000)
    assert ours.weight(t).isfinite().all()
    noise = torch.randn(1000, 1, 1, 1)
    assert ours.corrupt(ours.clean(noise, noise.flip(0), t), noise, t).isfinite().all()


def test_another_prediction_is_refused() -> None:
    with pytest.raises(ConfigError, match="predicts 'flow'"):
        objective("flow")


def test_tables_stay_fp32() -> None:
    assert objective().to("cpu").alphas_cumprod.dtype == torch.float32


@pytest.mark.parametrize("c", [0.1, 1.0])
def test_the_huber_loss_is_kohya_s_with_its_schedule_by_snr(c: float) -> None:
    """`conditional_loss` and `get_huber_threshold_if_needed` of sd-scripts' library/train_util.py."""
    ddpm, t = objective(), torch.tensor([0, 200, 999])
    error = 3 * torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    sigmas = ((1.0 - ddpm.alphas_cumprod[t]) / ddpm.alphas_cumprod[t]) ** 0.5
    huber_c = ((1 - c) / (1 + sigmas) ** 2 + c).view(-1, 1, 1, 1)
    want = (2 * huber_c * (torch.sqrt(error**2 + huber_c**2) - huber_c)).mean((1, 2, 3))
    torch.testing.assert_close(losses(error, ddpm.signal(t), c), want)
    torch.testing.assert_close(losses(error, ddpm.signal(t), None), error.square().mean((1, 2, 3)))
    assert FlowMatching().signal(torch.tensor([0.25])) == 0.75


def test_a_small_error_keeps_its_loss_and_gradient() -> None:
    """kohya's difference of nearly equal roots is 0 for errors below about 1e-4."""
    error = torch.full((1, 1, 1, 1), 1e-5, requires_grad=True)
    loss = losses(error, torch.ones(1), 0.1)
    loss.sum().backward()
    assert loss.item() == pytest.approx(1e-10, rel=1e-4)
    assert error.grad.item() == pytest.approx(2e-5, rel=1e-4)  # type: ignore[union-attr]


@pytest.mark.parametrize("distribution", ["auto", "logit_normal", "mode"])
@pytest.mark.parametrize(("low", "high"), [(0.2, 0.5), (0.9, 1.0), (0.0, 0.1)])
def test_a_range_of_noise_levels_keeps_the_shape_of_the_distribution(
    distribution: Any, low: float, high: float
) -> None:
    u = torch.linspace(0, 1, 20_001)[:-1]
    whole, part = (
        Timesteps(distribution=distribution),
        Timesteps(distribution=distribution, low=low, high=high),
    )
    ddpm = [DDPM.of(SD, Loss(timesteps=one)).timesteps(u) for one in (whole, part)]
    assert ddpm[1].min() >= 1000 * low and ddpm[1].max() < 1000 * high and (ddpm[1].diff() >= 0).all()
    flow = [FlowMatching(3.0, one).timesteps(u) for one in (whole, part)]
    assert flow[1].min() > low - 1e-6 and flow[1].max() < high + 1e-6 and (flow[1].diff() >= 0).all()
    for every, within in (flow, [t / 1000 for t in ddpm]):
        kept = every[(every >= low) & (every < high)]
        assert (kept.quantile(0.5) - within.quantile(0.5)).abs() < 5e-3


def test_a_range_without_levels_is_refused() -> None:
    with pytest.raises(ValueError, match=r"low is 0.5 and high is 0.5; use a low that is less"):
        Timesteps(low=0.5, high=0.5)


@pytest.mark.parametrize("settings", [{"mean": 1.0}, {"std": 2.0}])
def test_settings_of_another_distribution_are_refused(settings: Any) -> None:
    """`auto` has a mean and a standard deviation for flow matching alone."""
    with pytest.raises(ConfigError, match=r"noise levels are uniform; set loss.timesteps.distribution"):
        DDPM.of(SD, Loss(timesteps=Timesteps(**settings)))
    other: Any
    for other in ("uniform", "mode"):
        with pytest.raises(ValueError, match=r"does not have; set distribution to logit_normal, or remove"):
            Timesteps(distribution=other, **settings)
    Timesteps(distribution="mode", mode_scale=0.5)
    for other in ("auto", "uniform", "logit_normal"):
        with pytest.raises(ValueError, match=r"mode_scale is 0.5, which .*; set distribution to mode"):
            Timesteps(distribution=other, mode_scale=0.5)
