"""dbtrain's step beside the one of Diffusers' script: same draws, same losses, and the time of each.

    python -m benchmarks.vs_diffusers --model sd15 --precision bf16

The reference is the loop of Diffusers' examples/dreambooth/train_dreambooth_lora.py with prior preservation
and precomputed prompt embeddings: the same calls of Diffusers, PEFT and torch in the same order, without
Accelerate and without reading pictures, which is in its favour. Both train the same adapter from the same
start, on the latents, noise and timesteps of dbtrain's own batches, so that every loss has its counterpart.
They take turns, a window of steps each.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from benchmarks import bases, common, trainer
from benchmarks.common import Measure, Result, Row
from dbtrain.config import Config
from dbtrain.models.base import Base
from dbtrain.models.precision import PRECISIONS
from dbtrain.runtime import console, dist

TARGETS = ["to_k", "to_q", "to_v", "to_out.0", "add_k_proj", "add_v_proj"]


class Reference:
    """What the script holds when its loop begins."""

    def __init__(self, cfg: Config, start: Mapping[str, Tensor]) -> None:
        base, self.dtype = Base.find(cfg.model), PRECISIONS[str(cfg.train.precision)].dtype
        self.device, self.prior_weight, self.clip = dist.device(), cfg.loss.prior_weight, cfg.optim.clip
        self.vae = base.load("vae", self.dtype).to(self.device)
        self.unet = base.load("unet", self.dtype).to(self.device).requires_grad_(False)
        self.unet.add_adapter(
            LoraConfig(r=cfg.adapter.rank, lora_alpha=cfg.adapter.rank, target_modules=TARGETS)
        )
        cast_training_params(self.unet)
        self.weights = {name: p for name, p in self.unet.named_parameters() if p.requires_grad}
        if self.weights.keys() != start.keys():
            raise SystemExit("error: dbtrain and the script adapt different layers of this base")
        with torch.no_grad():
            for name, parameter in self.weights.items():
                parameter.copy_(start[name])
        self.optimizer = torch.optim.AdamW(self.weights.values(), lr=cfg.optim.lr, weight_decay=1e-2)
        self.schedule = get_scheduler("constant", self.optimizer)
        self.scheduler = base.load("scheduler")
        self.unet.train()

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """What the script does with its pictures in every step; this loop is given the latents."""
        return self.vae.encode(pixels).latent_dist.sample() * self.vae.config.scaling_factor

    def step(self, x0: Tensor, noise: Tensor, t: Tensor, embeds: Tensor) -> float:
        """One optimizer step; the loss, which the script reads back every time for its progress bar."""
        x_t = self.scheduler.add_noise(x0, noise, t)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            predicted = self.unet(x_t, t, embeds, return_dict=False)[0]
        prediction = self.scheduler.config.prediction_type
        target = noise if prediction == "epsilon" else self.scheduler.get_velocity(x0, noise, t)
        (instance, prior), (goal, prior_goal) = predicted.chunk(2), target.chunk(2)
        loss = mse_loss(instance.float(), goal.float())
        loss = loss + self.prior_weight * mse_loss(prior.float(), prior_goal.float())
        loss.backward()
        nn.utils.clip_grad_norm_(self.weights.values(), self.clip)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        return loss.detach().item()


def configured(args: argparse.Namespace, work: Path) -> Config:
    """The task of both, with its base and shards made."""
    model = bases.model(args.model, work, weights=True)
    place = work / f"vs-{args.model}"
    bases.write_shards(place, args.model, Base.find(model), 32, ("instance", "class"))
    return Config(
        run_dir=str(work / "run"), model=model, data={"shards": str(place)}, adapter={"rank": args.rank},
        train={"global_batch": args.batch, "micro_batch": args.batch, "precision": args.precision},
    )  # fmt: skip


def run(args: argparse.Namespace, work: Path) -> Result:
    if args.smoke:
        args.model, args.windows, args.window = "tiny", 1, 2
    cfg, clock, side = configured(args, work), common.clock(args.device), bases.side_of(args.model)
    spent: dict[str, list[float]] = {"dbtrain": [], "reference": [], "encoding": []}
    losses: list[tuple[float, float]] = []  # (dbtrain's, the reference's) of each step
    weights = torch.tensor([1.0, cfg.loss.prior_weight], device=dist.device())
    with trainer.steps(cfg) as ours, console.bar(args.windows + 1, "vs Diffusers", "window") as bar:
        mine = {name.removeprefix("unet."): p for name, p in ours.model.trainable().items()}
        start = {name: p.detach().clone() for name, p in mine.items()}
        theirs = Reference(cfg, start)
        pixels = torch.rand(2 * args.batch, 3, side, side, device=dist.device(), dtype=theirs.dtype) * 2 - 1
        batches: list[Any] = []
        ours.model.register_forward_pre_hook(lambda _, given: batches.append(given[0]))
        for first in range(0, (args.windows + 1) * args.window, args.window):
            batches.clear()
            times = [clock()]
            outcomes = [ours.take(first + number) for number in range(args.window)]
            times.append(clock())
            given = [_given(ours.model, batch, theirs.dtype) for batch in batches]
            times.append(clock())
            found = [theirs.step(*inputs) for inputs in given]
            times.append(clock())
            for _ in given:
                theirs.encode(pixels)
            times.append(clock())
            own = [(outcome.losses * weights).sum().item() for outcome in outcomes]
            losses += zip(own, found, strict=True)
            if first:  # the first window warms up
                for name, number in (("dbtrain", 0), ("reference", 2), ("encoding", 3)):
                    spent[name].append(1000 * (times[number + 1] - times[number]) / args.window)
            bar.update()
        learnt = [{name: p.detach() - start[name] for name, p in each.items()}
                  for each in (mine, theirs.weights)]  # fmt: skip
    means = [sum(column) / len(losses) for column in zip(*losses, strict=True)]
    same = {
        "steps": len(losses), "mean loss, dbtrain": means[0], "mean loss, reference": means[1],
        "losses, largest relative gap": f"{max(abs(a / b - 1) for a, b in losses):.1e}",
        "what the adapters learnt, relative gap": f"{_gap(*learnt):.1e}",
    }  # fmt: skip
    kind = "wall" if args.device == "cuda" else "CPU"
    return common.result(
        args, "vs_diffusers", f"step-{args.model}-{args.precision}-{args.device}",
        [*_rows(spent), Row(label="same work", counts=same)],
        f"{args.batch}+{args.batch} images at {side} px, rank {args.rank}; {kind} time a step over windows "
        f"of {args.window} steps in turns. The script encodes its pictures anew in every step, dbtrain once "
        "before training.",
    )  # fmt: skip


@torch.no_grad()
def _given(model: Any, batch: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the reference is given of a batch: latents, noise, timesteps and prompt embeddings."""
    x0, embeds = model.x0(batch), model.condition(batch)["prompt_embeds"]
    return x0.to(dtype), batch.noise.to(dtype), model.objective.timesteps(batch.u), embeds.to(dtype)


def _gap(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """Norm of the difference over the norm of the reference's."""
    a, b = (torch.cat([each[name].flatten().double() for name in theirs]) for each in (ours, theirs))
    return float((a - b).norm() / b.norm())


def _rows(spent: Mapping[str, list[float]]) -> list[Row]:
    whole = [sum(parts) for parts in zip(spent["reference"], spent["encoding"], strict=True)]
    times = {
        "dbtrain": spent["dbtrain"], "reference, latents given": spent["reference"],
        "reference, encoding its pictures": whole,
    }  # fmt: skip
    return [
        Row(label=label, measures={
            "step": Measure.of("ms", ms),
            "over dbtrain's": Measure.of("x", [a / b for a, b in zip(ms, spent["dbtrain"], strict=True)]),
        }) for label, ms in times.items()
    ]  # fmt: skip


def parser() -> argparse.ArgumentParser:
    words = common.parser(__doc__)
    words.add_argument("--model", choices=("tiny", "sd15"), default="tiny")
    words.add_argument("--batch", type=int, default=2, help="instance images of a step; as many class images")
    words.add_argument("--rank", type=int, default=4)
    words.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    words.add_argument("--windows", type=int, default=5, help="timed windows of each")
    words.add_argument("--window", type=int, default=10, help="steps of a window")
    return words


if __name__ == "__main__":
    common.main(run, parser())
