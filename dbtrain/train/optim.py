"""AdamW over the adapter, and its learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dbtrain.config import Optim
from dbtrain.runtime.errors import ConfigError

MOMENTS = ("exp_avg", "exp_avg_sq", "step")

# Factor on the peak learning rate, from the share of the decay that is done.
SCHEDULES = {
    "constant": lambda share: 1.0,
    "linear": lambda share: 1.0 - share,
    "cosine": lambda share: 0.5 * (1.0 + math.cos(math.pi * share)),
}


def build(parameters: Mapping[str, nn.Parameter], cfg: Optim, capturable: bool = False) -> torch.optim.AdamW:
    """AdamW, one group for each learning rate. Fused: one kernel, and fp16 scaling without a host read.

    Loshchilov & Hutter 2017, "Decoupled Weight Decay Regularization", arXiv:1711.05101. LoRA+: Hayou
    et al. 2024, arXiv:2402.12354. `capturable`: a CUDA graph may hold its step; learning rates are then
    tensors, which later changes reach.
    """
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        groups.setdefault(_factor(name, cfg), []).append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": group, "factor": factor} for factor, group in groups.items()],
        lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True, capturable=capturable,
    )  # fmt: skip
    if capturable:
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(cfg.lr, device=group["params"][0].device)
    return optimizer


def _factor(name: str, cfg: Optim) -> float:
    """A parameter's learning rate as a multiple of `cfg.lr`."""
    factor = 1.0
    if name.startswith("text_encoder") and cfg.text_encoder_lr:
        factor = cfg.text_encoder_lr / cfg.lr
    return factor * (cfg.lora_plus_ratio if ".lora_B." in name else 1.0)


def lr_at(step: int, cfg: Optim, steps: int) -> float:
    """Learning rate of optimizer step `step`, counted from 0, of `steps`.

    Warm-up climbs from lr / warmup_steps to lr; what follows falls to 0 after the last step.
    """
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    share = (step - cfg.warmup_steps) / max(1, steps - cfg.warmup_steps)
    return cfg.lr * SCHEDULES[cfg.schedule](min(1.0, share))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr * group["factor"])
        else:
            group["lr"] = lr * group["factor"]


def state(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Adam's moments by parameter name: `<moment>.<parameter>`, on the CPU.

    By name, not by index, so that no change of order can pair a weight with another's moments.
    """
    return {
        f"{moment}.{name}": optimizer.state[parameter][moment].detach().cpu().contiguous()
        for name, parameter in parameters.items()
        for moment in MOMENTS
        if parameter in optimizer.state
    }


def load_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], saved: Mapping[str, Tensor]
) -> None:
    """Put moments that `state` took back. Raises ConfigError if they are another adapter's."""
    wanted = {f"{moment}.{name}" for name in parameters for moment in MOMENTS}
    if saved and wanted != saved.keys():
        raise ConfigError(
            f"the checkpoint's optimizer has other parameters, e.g. {sorted(wanted ^ saved.keys())[0]}"
        )
    for name, parameter in parameters.items() if saved else ():
        optimizer.state[parameter] = {
            moment: saved[f"{moment}.{name}"].to(parameter.device) for moment in MOMENTS
        }
