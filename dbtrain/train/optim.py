"""AdamW for the adapter, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dbtrain.adapters.tokens import DIRECTION
from dbtrain.config import Optim
from dbtrain.runtime.errors import ConfigError

MOMENTS = ("exp_avg", "exp_avg_sq", "step")

# Multiplier of the peak learning rate, by the completed fraction of the decay.
SCHEDULES = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}


def build(parameters: Mapping[str, nn.Parameter], cfg: Optim, capturable: bool = False) -> torch.optim.AdamW:
    """Return a fused AdamW with one group per learning rate. Fused fp16 scaling needs no host read.

    `capturable` allows the step in a CUDA graph: learning rates are tensors, so that a replay sees changes.
    Loshchilov & Hutter 2017, "Decoupled Weight Decay Regularization", arXiv:1711.05101. LoRA+: Hayou
    et al. 2024, arXiv:2402.12354.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        decay = 0.0 if name.endswith(DIRECTION) else cfg.weight_decay  # a length has nothing to decay
        groups.setdefault((_factor(name, cfg), decay), []).append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": group, "factor": factor, "weight_decay": decay}
         for (factor, decay), group in groups.items()],
        lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True, capturable=capturable,
    )  # fmt: skip
    if capturable:
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(cfg.lr, device=group["params"][0].device)
    return optimizer


def _factor(name: str, cfg: Optim) -> float:
    """A parameter's learning rate as a multiple of `cfg.lr`."""
    if name.endswith(DIRECTION):
        return cfg.token_lr / cfg.lr
    factor = 1.0
    if name.startswith("text_encoder") and cfg.text_encoder_lr:
        factor = cfg.text_encoder_lr / cfg.lr
    return factor * (cfg.lora_plus_ratio if ".lora_B." in name else 1.0)


def lr_at(step: int, cfg: Optim, steps: int) -> float:
    """Learning rate of optimizer step `step`, counted from 0, of `steps`.

    It rises linearly from lr / warmup_steps to lr, then follows the schedule.
    """
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    done = (step - cfg.warmup_steps) / max(1, steps - cfg.warmup_steps)
    return cfg.lr * SCHEDULES[cfg.schedule](min(1.0, done))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group to its multiple of `lr`."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr * group["factor"])
        else:
            group["lr"] = lr * group["factor"]


def state(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Adam's moments as `<moment>.<parameter>`, on the CPU.

    They are stored by name, not by index, so that the order of the parameters does not matter.
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
    """Restore what `state` returned. Raises ConfigError if it belongs to another adapter.

    A parameter without a gradient so far, as in a layer that `module_dropout` dropped, has no moments yet.
    """
    names = {key.partition(".")[2] for key in saved}
    wanted = {f"{moment}.{name}" for name in names & parameters.keys() for moment in MOMENTS}
    if wanted != saved.keys():
        raise ConfigError(
            f"the checkpoint's optimizer has other parameters, e.g. {sorted(wanted ^ saved.keys())[0]}"
        )
    for name in names:
        parameter = parameters[name]
        optimizer.state[parameter] = {
            moment: saved[f"{moment}.{name}"].to(parameter.device) for moment in MOMENTS
        }
