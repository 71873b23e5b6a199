"""Send metrics and images to TensorBoard and W&B."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from dbtrain.config import Config
from dbtrain.runtime import console, files
from dbtrain.runtime.errors import ConfigError, reason
from dbtrain.runtime.hashing import content_key
from dbtrain.runtime.run_folder import RunFolder


class Tracker(Protocol):
    """Receives a run's metrics and images."""

    def write(self, step: int, metrics: dict[str, float]) -> None: ...
    def show(self, step: int, name: str, image: Path) -> None: ...
    def close(self) -> None: ...


class _TensorBoard:
    def __init__(self, folder: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder
        with files.naming(folder):
            self.writer = SummaryWriter(str(folder), purge_step=start + 1)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        with files.naming(self.folder):
            for name, value in metrics.items():
                self.writer.add_scalar(name, value, step)

    def show(self, step: int, name: str, image: Path) -> None:
        with files.naming(self.folder), Image.open(image) as sheet:
            self.writer.add_image(name, np.asarray(sheet.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        with files.naming(self.folder):
            self.writer.close()


class _WandB:
    def __init__(self, folder: Path, project: str, config: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError("train.wandb needs W&B: pip install 'dbtrain[wandb]'") from error
        self.image = wandb.Image
        try:
            self.run = wandb.init(
                project=project, name=folder.name, id=content_key(str(folder.resolve()))[:16], resume="allow",
                dir=str(folder), config=config,
            )  # fmt: skip
        except wandb.Error as error:  # no API key, or no network
            raise ConfigError(
                f"train.wandb is '{project}', but W&B does not start: {reason(error)}; run wandb login, or "
                "set the environment variable WANDB_MODE=offline"
            ) from error

    def write(self, step: int, metrics: dict[str, float]) -> None:
        self.run.log(metrics, step=step)

    def show(self, step: int, name: str, image: Path) -> None:
        self.run.log({name: self.image(str(image))}, step=step)

    def close(self) -> None:
        self.run.finish()


def of(run: RunFolder, cfg: Config, start: int) -> list[Tracker]:
    """The trackers of a run that starts or resumes at step `start`."""
    found: list[Tracker] = []
    try:
        found.append(_TensorBoard(run.tensorboard, start))
    except ImportError:
        console.say(
            "TensorBoard is not installed, so there is no log for it; pip install 'dbtrain[tensorboard]'"
        )
    if cfg.train.wandb:
        found.append(_WandB(run.path, cfg.train.wandb, cfg.model_dump(mode="json")))
    return found
