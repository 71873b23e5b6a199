"""FLOPs, counted on tensors without content, and the rate at which this device multiplies matrices."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import common
from benchmarks.bases import Random
from dbtrain.adapters import inject as adapters
from dbtrain.config import Adapter
from dbtrain.data.sizes import Size
from dbtrain.models.base import Base
from dbtrain.models.pretrained import DTYPES

SOURCE = (
    "torch.utils.flop_counter.FlopCounterMode, on meta tensors; attention's own recomputation not counted"
)


def of_step(base: Base, side: int, adapter: Adapter, tokens: int = 77) -> tuple[float, float]:
    """FLOPs of one sample's (forward, forward and backward) through the denoiser with its adapter."""
    family = base.family
    base = Random.of_base(base)
    denoiser = base.skeleton(family.denoiser).requires_grad_(False)
    adapters.attach(denoiser, adapter, "denoiser", 0, presets=family.presets)
    x_t, condition = torch.empty(1, *family.space(base, Size.square(side)).shape), dict[str, Tensor]()
    for name, shape in family.conditions(base).items():
        condition[name] = torch.empty(1, *(tokens if size is None else size for size in shape))
    condition |= {
        k: t[None]
        for k, t in family.row({"original_size": (side, side), "crop": (0, 0)}, Size.square(side)).items()
    }
    t = family.objective.of(base.config("scheduler")).timesteps(torch.tensor([0.5])).to("meta")
    condition = {name: tensor.to("meta") for name, tensor in condition.items()}
    if "lengths" in condition:
        condition["lengths"] = torch.tensor([tokens])
    x_t = x_t.to("meta")
    with FlopCounterMode(display=False) as forward:
        prediction = family.denoise(denoiser, x_t, t, condition)
    with FlopCounterMode(display=False) as backward:
        prediction.sum().backward()
    return float(forward.get_total_flops()), float(forward.get_total_flops() + backward.get_total_flops())


def of_picture(base: Base, side: int, steps: int, guided: bool) -> float:
    """FLOPs of drawing one picture: the denoiser's forwards, twice with guidance, and the VAE's decoder."""
    family = base.family
    forward, _ = of_step(base, side, Adapter(rank=1))
    vae = base.skeleton("vae")
    with torch.device("meta"):
        latents = torch.empty(1, *family.space(Random.of_base(base), Size.square(side)).shape)
    with FlopCounterMode(display=False) as decoder, torch.no_grad():
        family.decode(vae, latents)
    return steps * (2 if guided else 1) * forward + float(decoder.get_total_flops())


def matmul_rate(device: str, precision: str) -> float:
    """FLOP/s of large matrix products in this precision, best of five: on a CPU, of its CPU seconds."""
    dtype = DTYPES.get(precision.removeprefix("pure-"), torch.float32)
    side, times = (8192, 20) if device == "cuda" else (512, 8)
    a, b = torch.randn(2, side, side, device=device).to(dtype)
    best = float("inf")
    clock = common.clock(device)
    for _ in range(5):
        before = clock()
        for _ in range(times):
            a @ b
        best = min(best, clock() - before)
    return 2.0 * side**3 * times / best
