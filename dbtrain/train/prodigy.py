"""Prodigy, an Adam that finds its learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

Tensors = list[Tensor] | tuple[Tensor, ...]
BETA1, BETA2, BETA3 = 0.9, 0.999, math.sqrt(0.999)
EPS, D0 = 1e-8, 1e-5  # D0: the first learning rate; adapters are trained with no less


class Prodigy(torch.optim.Optimizer):
    """Adam whose learning rate is the distance that the parameters still have to go, as far as it is known.

    `lr` is a factor of that rate, usually 1. A group's `factor` is in its `lr` already: such a group steps as
    if its parameters were measured in units of it. Bias correction and the safeguard for a warm-up are on, as
    in Diffusers' scripts. A step reads nothing on the host, so that a CUDA graph can record it, and does
    nothing where `found_inf` is 1 (GradScaler's protocol).

    Mishchenko & Defazio 2023, "Prodigy: An Expeditiously Adaptive Parameter-Free Learner", arXiv:2306.06101.
    """

    _step_supports_amp_scaling = True

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float, weight_decay: float) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "factor": 1.0})
        device = self.param_groups[0]["params"][0].device
        start = {"d": D0, "numerator": 0.0, "step": 0.0}
        self.shared = {
            name: torch.tensor(value, dtype=torch.float64, device=device) for name, value in start.items()
        }

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        found_inf = getattr(self, "found_inf", None)  # () or None
        d, numerator, step = self.shared["d"], self.shared["numerator"], self.shared["step"]
        counts = torch.ones_like(d) if found_inf is None else (found_inf == 0).to(d)  # () 0: change nothing
        step += counts
        good, nothing = counts > 0, torch.zeros((), device=d.device)
        correction = (1 - BETA2**step).sqrt() / (1 - BETA1**step)
        scaled = d / D0  # the sums are in units of the first rate

        # Moments, and the two sums whose ratio is a lower bound of the distance.
        numerator *= BETA3**counts
        denominator = torch.zeros_like(d)
        steps = []
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            grads = [parameter.grad for parameter in parameters]
            if found_inf is not None:
                grads = [torch.where(good, grad, nothing) for grad in grads]
            exp_avg, exp_avg_sq, s, p0 = self._moments(parameters)
            factor = group["factor"]
            rate = counts * d * group["lr"] * correction / factor
            numerator += scaled * rate * _dot(torch._foreach_sub(p0, parameters), grads)
            grads = list(torch._foreach_mul(grads, d.float()))
            torch._foreach_mul_(exp_avg, (BETA1**counts).float())
            torch._foreach_add_(exp_avg, grads, alpha=1 - BETA1)
            torch._foreach_mul_(exp_avg_sq, (BETA2**counts).float())
            torch._foreach_addcmul_(exp_avg_sq, grads, grads, 1 - BETA2)
            torch._foreach_mul_(grads, scaled.float())
            torch._foreach_mul_(s, (BETA3**counts).float())
            torch._foreach_add_(s, grads)
            denominator += factor * torch.stack(torch._foreach_norm(s, 1)).sum(dtype=d.dtype)
            steps.append((parameters, exp_avg, exp_avg_sq, rate * factor, group["weight_decay"]))

        # The rate never falls.
        d.copy_(torch.where(denominator > 0, torch.maximum(d, numerator / denominator), d))

        for parameters, exp_avg, exp_avg_sq, rate, decay in steps:
            if decay:
                torch._foreach_mul_(parameters, (1 - decay * rate).float())
            below = torch._foreach_sqrt(exp_avg_sq)
            torch._foreach_mul_(below, (1 / d).float())  # as EPS cannot be a tensor without a host read
            torch._foreach_add_(below, EPS)
            change = torch._foreach_div(exp_avg, below)
            torch._foreach_mul_(change, (rate / d).float())
            torch._foreach_sub_(parameters, change)

    def _moments(self, parameters: list[Tensor]) -> tuple[list[Tensor], ...]:
        """exp_avg, exp_avg_sq, s and p0 of the parameters."""
        for parameter in parameters:
            if not self.state[parameter]:
                zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq", "s")}
                self.state[parameter] = zeros | {"p0": parameter.clone()}
        every = [self.state[parameter] for parameter in parameters]
        return tuple([one[name] for one in every] for name in ("exp_avg", "exp_avg_sq", "s", "p0"))


def _dot(ones: Tensors, others: Tensors) -> Tensor:
    """The dot product of two lists of tensors, () fp64."""
    products = torch._foreach_mul(ones, others)
    return torch.cat([product.flatten() for product in products]).sum(dtype=torch.float64)
