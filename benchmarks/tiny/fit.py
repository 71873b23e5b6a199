"""What it takes to train the models that come with dbtrain: drawn pictures, and a resumable loop."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from tqdm import tqdm

from dbtrain.config import Optim
from dbtrain.runtime import files
from dbtrain.tiny.paint import Scene, render
from dbtrain.train import optim

SAVE_S = 120.0  # seconds between checkpoints


def drawn(path: Path, scenes: Sequence[Scene]) -> np.ndarray:
    """The scenes as pictures, (scenes, SIDE, SIDE, 3) uint8: drawn once by all cores, kept in `path`."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        chunks = [scenes[first : first + 256] for first in range(0, len(scenes), 256)]
        with ProcessPoolExecutor(os.cpu_count()) as pool:
            parts = list(tqdm(pool.map(_drawn, chunks), path.stem, len(chunks), unit="chunk"))
        part = path.with_name(f".{path.name}")
        np.save(part, np.concatenate(parts))
        part.replace(path)
    return np.load(path, mmap_mode="r")


def spent(folder: Path) -> tuple[int, float]:
    """Steps of a stage so far, and seconds that they took."""
    with safetensors.safe_open(folder.with_suffix(".safetensors"), "pt") as file:
        return int(file.metadata()["step"]), float(file.metadata()["seconds"])


def _drawn(scenes: Sequence[Scene]) -> np.ndarray:
    return np.stack([np.asarray(render(scene)) for scene in scenes])


class Stage:
    """One resumable fit: parameters, their moving average and Adam's moments, saved as it goes on.

    What a step does depends on its number only: a stage that was stopped ends like one that was not.
    """

    def __init__(
        self, folder: Path, module: nn.Module, steps: int, warmup: int, lr: float, decay: float
    ) -> None:
        self.path = folder
        self.steps = steps
        self.decay = decay
        self.module = module
        self.parameters = dict(module.named_parameters())
        self.settings = Optim(
            lr=lr, schedule="cosine", warmup_steps=min(warmup, steps // 10), weight_decay=0.01
        )
        self.optimizer = optim.build(self.parameters, self.settings)
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.seconds = 0.0  # spent on the steps so far
        self.start = self._load()

    def fit(self, loss_of: Callable[[int], Tensor]) -> None:
        """Run the steps that are left; then the module holds the moving average."""
        saved = begun = time.monotonic()
        bar = tqdm(total=self.steps, initial=self.start, desc=self.path.name, unit="step", mininterval=5)
        for step in range(self.start, self.steps):
            optim.set_lr(self.optimizer, optim.lr_at(step, self.settings, self.steps))
            loss = loss_of(step)
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
            self.optimizer.step()
            with torch.no_grad():
                decay = min(self.decay, (step + 1) / (step + 10))
                torch._foreach_lerp_(list(self.average.values()), list(self.parameters.values()), 1 - decay)
            bar.update()
            if step % 100 == 99:
                bar.set_postfix(loss=f"{loss.item():.4f}")
            if (now := time.monotonic()) - saved > SAVE_S or step + 1 == self.steps:
                self.seconds, begun = self.seconds + now - begun, now
                self._save(step + 1)
                saved = now
        bar.close()
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self.average[name])

    def _save(self, step: int) -> None:
        tensors: dict[str, Tensor] = {f"parameter.{name}": p for name, p in self.parameters.items()}
        tensors |= {f"average.{name}": p for name, p in self.average.items()}
        tensors |= optim.state(self.optimizer, self.parameters)
        data = safetensors.torch.save(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            {"step": str(step), "seconds": str(self.seconds)},
        )
        files.write_atomically(self.path.with_suffix(".safetensors"), data)

    def _load(self) -> int:
        path = self.path.with_suffix(".safetensors")
        if not path.exists():
            return 0
        step, self.seconds = spent(self.path)
        with safetensors.safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors.pop(f"parameter.{name}"))
                self.average[name].copy_(tensors.pop(f"average.{name}"))
        optim.load_state(self.optimizer, self.parameters, tensors)
        return step
