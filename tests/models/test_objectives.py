"""The objective against Diffusers' scheduler and the reference formulas."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler

from dbtrain.config.training import Loss, Timesteps
from dbtrain.models.ddpm import DDPM
from dbtrain.models.flow_matching import FlowMatching
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
    assert ours.weight(torch.arange(1000)).isfinite().all()


def test_another_prediction_is_refused() -> None:
    with pytest.raises(ConfigError, match="predicts 'flow'"):
        objective("flow")


def test_tables_stay_fp32() -> None:
    assert objective().to("cpu").alphas_cumprod.dtype == torch.float32
