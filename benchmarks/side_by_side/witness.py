"""Is it the same work? The reference's first step, taken again by dbtrain's own `train_step`.

What the step worked on (latents, noise, timesteps, the adapter's start) and its gradients were kept by
the hook. The same put into dbtrain must give the same gradients.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from dbtrain.adapters import inject as adapters
from dbtrain.config import Config
from dbtrain.data import shards
from dbtrain.data.batch import Batch
from dbtrain.data.order import Share
from dbtrain.data.shards import Manifest
from dbtrain.data.storage import Storage
from dbtrain.models.base import Base
from dbtrain.models.pretrained import DTYPES
from dbtrain.runtime import dist
from dbtrain.train.checkpoint import Progress
from dbtrain.train.dreambooth import DreamBooth
from dbtrain.train.step import train_step


class OneBatch:
    """A stream of one batch."""

    def __init__(self, batch: Batch, share: Share) -> None:
        self.device = dist.device()
        self.batch = batch.to(self.device)
        self.share = share

    def __next__(self) -> Batch:
        return self.batch


def agreement(kept: Path, config: Path) -> dict[str, float]:
    """How far dbtrain's first step is from the reference's: gradients and prompt embeddings.

    `kept`: the hook's file. `config`: of a dbtrain run with the same base and prompts, whose shards are
    there. Only for steps of one micro-batch with as many class as instance images.
    """
    found = safetensors.torch.load_file(kept)
    cfg = Config.load(config, ())
    model = _model(cfg)
    mine = adapters.trainable(model.denoiser)
    theirs = {part: _part(found, part) for part in ("weight", "gradient")}
    assert theirs["weight"].keys() == mine.keys(), "the adapters have other parameters"
    with torch.no_grad():
        for name, parameter in mine.items():
            parameter.copy_(theirs["weight"][name])
    batch = _batch(found, model, cfg)
    stream: Any = OneBatch(batch, Share(cfg.train.global_batch, cfg.train.micro_batch, 0, 1))
    train_step(model, Progress.begin(model, cfg), stream, 0, cfg)
    ours = {name: p.grad.cpu() for name, p in mine.items() if p.grad is not None}
    embeds = model.condition(batch.prompt.to(dist.device()))["prompt_embeds"].cpu()
    return compare(ours, theirs["gradient"]) | {
        "prompt embeddings, largest gap": (embeds - found["embeds"].float()).abs().max().item()
    }


def compare(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> dict[str, float]:
    """Cosine of two gradients taken as one vector each, their norms' ratio, and the largest relative gap."""
    names = sorted(theirs)
    a = torch.cat([ours[name].flatten().double() for name in names])
    b = torch.cat([theirs[name].flatten().double() for name in names])
    return {
        "gradient cosine": (a @ b / (a.norm() * b.norm())).item(),
        "gradient norms, ratio": (a.norm() / b.norm()).item(),
        "gradient, relative gap": ((a - b).norm() / b.norm()).item(),
    }


class Floor:
    """CPU time that no trainer saves without other kernels: the denoiser forward and backward, ms.

    With the adapter as both train it, and without any (to the gradient of its input): for a batch of
    dbtrain's own, as large as a micro-batch of both programs.
    """

    def __init__(self, kept: Path, config: Path) -> None:
        self.cfg = Config.load(config, ())
        self.model = _model(self.cfg)
        self.bare = Base.find(self.cfg.model).load("unet", DTYPES[self.cfg.train.precision]).train()
        self.batch = _batch(safetensors.torch.load_file(kept), self.model, self.cfg)

    def measure(self, calls: int) -> tuple[float, float]:
        """(with the adapter, without) in turns: the median of some calls each."""
        taken: tuple[list[float], list[float]] = ([], [])
        for number in range(-2, calls):
            for times, work in zip(taken, (self._adapted, self._bare), strict=True):
                before = time.process_time()
                work()
                if number >= 0:
                    times.append(1000 * (time.process_time() - before))
        return median(taken[0]), median(taken[1])

    def _adapted(self) -> None:
        self._pass(self.model.denoiser, self.batch.noise)

    def _bare(self) -> None:
        self._pass(self.bare, self.batch.noise.clone().requires_grad_())

    def _pass(self, unet: Any, x: Tensor) -> None:
        dtype = DTYPES[self.cfg.train.precision]
        t = self.model.objective.timesteps(self.batch.u)
        with torch.amp.autocast("cpu", dtype, enabled=dtype != torch.float32):
            out = unet(x, t, self.model.condition(self.batch.prompt)["prompt_embeds"], return_dict=False)[0]
        out.float().square().mean().backward()


def _model(cfg: Config) -> DreamBooth:
    base, place = Base.find(cfg.model), Storage(cfg.data.shards)
    family, manifest = base.family, Manifest.read(place)
    table = shards.read_prompts(place, manifest.prompts)
    return DreamBooth.build(base, manifest, table, cfg).to(dist.device())


def _part(found: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{part}."): t for name, t in found.items() if name.startswith(f"{part}.")}


def _batch(found: Mapping[str, Tensor], model: DreamBooth, cfg: Config) -> Batch:
    """The reference's micro-batch, as dbtrain's stream would give it: a posterior without any width."""
    x0, noise = found["x0"].float(), found["noise"].float()
    rows = len(x0)
    stored = x0 / model.get_buffer("latent_scale").cpu() + model.get_buffer("latent_shift").cpu()
    half = torch.arange(rows) >= rows // 2  # class images come second in both
    settings: dict[str, Any] = {
        "stored": {"mean": stored, "std": torch.zeros_like(x0)}, "posterior": torch.zeros_like(x0),
        "noise": noise, "u": (found["t"].float() + 0.5) / 1000, "prompt": half.long(),
        "weight": torch.full((rows,), 1 / cfg.train.global_batch), "level": torch.zeros(rows), "extra": {},
        "position": torch.zeros(rows, dtype=torch.float64), "first": 0, "seen": 0,
    }  # fmt: skip
    return Batch(**settings)
