"""The optimizer of the adapter, and the learning rate as a function of the step."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from dbtrain.adapters import targets
from dbtrain.adapters.tokens import DIRECTION
from dbtrain.config import Optim
from dbtrain.runtime.errors import ConfigError
from dbtrain.train.prodigy import Prodigy

# What each optimizer keeps of a parameter.
MOMENTS: dict[type, tuple[str, ...]] = {
    torch.optim.AdamW: ("exp_avg", "exp_avg_sq", "step"),
    Prodigy: ("exp_avg", "exp_avg_sq", "s", "p0"),
}
SHARED = "shared"  # stands for a parameter's name in what an optimizer keeps of all together

# Multiplier of the peak learning rate, by the completed fraction of the decay.
SCHEDULES = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}


def build(
    parameters: Mapping[str, nn.Parameter], cfg: Optim, capturable: bool = False,
    row: tuple[Tensor, Tensor] | None = None,
) -> torch.optim.Optimizer:  # fmt: skip
    """Return the optimizer with one group per learning rate. It needs no host read, nor does fp16 scaling.

    `parameters`: by `<component>.<parameter>`. `capturable` allows the step in a CUDA graph: learning rates
    are tensors, so that a replay sees changes. `row`: weights and gradients, (N,), of which all parameters
    are views. Raises ConfigError for a name in `lrs` that matches none.
    Loshchilov & Hutter 2017, "Decoupled Weight Decay Regularization", arXiv:1711.05101. LoRA+: Hayou
    et al. 2024, arXiv:2402.12354.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, factor in _factors(list(parameters), cfg).items():
        decay = 0.0 if name.endswith(DIRECTION) else cfg.weight_decay  # a length has nothing to decay
        groups.setdefault((factor, decay), []).append(parameters[name])
    if row:
        groups = _joined(groups, *row)
    chosen = [
        {"params": group, "factor": factor, "weight_decay": decay}
        for (factor, decay), group in groups.items()
    ]
    optimizer: torch.optim.Optimizer
    if cfg.name == "prodigy":
        optimizer = Prodigy(chosen, cfg.lr, cfg.weight_decay)
    else:
        optimizer = torch.optim.AdamW(
            chosen, lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True, capturable=capturable
        )
    if capturable:
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(cfg.lr, device=group["params"][0].device)
    return optimizer


def leaves(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """The parameters that the optimizer steps."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _joined(
    groups: Mapping[Any, Sequence[nn.Parameter]], weights: Tensor, grads: Tensor
) -> dict[Any, list[nn.Parameter]]:
    """Stretches of a row in the place of the parameters of a group that are neighbours in it."""
    start = weights.storage_offset()
    placed = sorted(
        (p.storage_offset() - start, p.numel(), key) for key, mine in groups.items() for p in mine
    )
    joined: dict[Any, list[nn.Parameter]] = {}
    for key, several in groupby(placed, key=lambda one: one[2]):
        (first, size, _), *more = several
        last, size, _ = more[-1] if more else (first, size, key)
        stretch = nn.Parameter(weights[first : last + size])
        stretch.grad = grads[first : last + size]
        joined.setdefault(key, []).append(stretch)
    return joined


def _factors(names: Sequence[str], cfg: Optim) -> dict[str, float]:
    """Each parameter's learning rate as a multiple of `cfg.lr`."""
    modules = {name: re.split(r"\.(?:lora|hada|lokr)_|\.base_layer\.|\.bias$", name)[0] for name in names}
    chosen = targets.by_pattern(set(modules.values()), cfg.lrs, "optim.lrs", r"[^.]+\.")
    factors = {}
    for name in names:
        if name.endswith(DIRECTION):
            factors[name] = cfg.token_lr / cfg.lr
            continue
        factor = chosen.get(modules[name], 1.0)
        if name.startswith("text_encoder") and cfg.text_encoder_lr:
            factor *= cfg.text_encoder_lr / cfg.lr
        factors[name] = factor * (cfg.lora_plus_ratio if ".lora_B." in name else 1.0)
    return factors


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
    """What the optimizer keeps, as `<moment>.<parameter>` and `<number>.shared`, on the CPU.

    It is stored by name, not by index, so that the order of the parameters does not matter.
    """
    found = {
        f"{moment}.{name}": _of(parameter, stretch, optimizer.state[stretch][moment])
        for name, (parameter, stretch) in _stretches(optimizer, parameters).items()
        for moment in MOMENTS[type(optimizer)]
        if stretch in optimizer.state
    }
    found |= {f"{name}.{SHARED}": number for name, number in _shared(optimizer).items()}
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in found.items()}


def load_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], saved: Mapping[str, Tensor]
) -> None:
    """Restore what `state` returned. Raises ConfigError if it belongs to another adapter.

    A parameter without a gradient so far has no moments yet: older runs have such in dropped layers.
    """
    moments = MOMENTS[type(optimizer)]
    names = {key.partition(".")[2] for key in saved}
    wanted = {f"{moment}.{name}" for name in names & parameters.keys() for moment in moments}
    wanted |= {f"{name}.{SHARED}" for name in _shared(optimizer)}
    if wanted != saved.keys():
        raise ConfigError(
            f"the checkpoint's optimizer has other parameters, e.g. {sorted(wanted ^ saved.keys())[0]}"
        )
    for name, (parameter, stretch) in _stretches(optimizer, parameters).items():
        kept = optimizer.state[stretch] if name in names else {}
        for moment in moments if name in names else ():
            value = saved[f"{moment}.{name}"].to(parameter.device)
            if value.shape != parameter.shape:
                kept[moment] = value
                continue
            if moment not in kept:
                kept[moment] = torch.zeros_like(stretch, dtype=value.dtype)
            _of(parameter, stretch, kept[moment]).copy_(value)
    for name, number in _shared(optimizer).items():
        number.copy_(saved[f"{name}.{SHARED}"])


def _stretches(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """Name -> the parameter, and what the optimizer steps: the same, or a stretch that contains it."""
    every = leaves(optimizer)
    own = set(every)
    return {
        name: (parameter, parameter if parameter in own else next(s for s in every if _at(parameter, s) >= 0))
        for name, parameter in parameters.items()
    }


def _at(parameter: Tensor, stretch: Tensor) -> int:
    """Where a stretch contains a parameter of the same row; -1 if it does not."""
    at = int(parameter.storage_offset() - stretch.storage_offset())
    return at if at < stretch.numel() else -1


def _of(parameter: Tensor, stretch: Tensor, moment: Tensor) -> Tensor:
    """A parameter's part of what the optimizer keeps of a stretch; what is kept of all alike as it is."""
    if parameter is stretch or moment.shape != stretch.shape:
        return moment
    return moment.as_strided(parameter.shape, parameter.stride(), _at(parameter, stretch))


def found_rate(optimizer: torch.optim.Optimizer) -> Tensor | None:
    """The learning rate that the optimizer has found, () on the device; None if it was given one."""
    return _shared(optimizer).get("d")


def _shared(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return optimizer.shared if isinstance(optimizer, Prodigy) else {}
