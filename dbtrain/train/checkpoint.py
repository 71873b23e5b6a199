"""Checkpoints: the adapter, its average, the optimizer's moments, and the step, written atomically.

Data order, randomness, and learning rate are functions of the step, so a run resumes exactly.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from dbtrain.adapters import inject as adapters
from dbtrain.adapters.formats import peft_folder, word_file
from dbtrain.config import Config
from dbtrain.models.precision import PRECISIONS
from dbtrain.runtime import console, dist, files, hashing
from dbtrain.runtime.errors import ConfigError, reason
from dbtrain.runtime.run_folder import EMA, OPTIMIZER, STATE, RunFolder, read_state, step_of
from dbtrain.train import optim
from dbtrain.train.adapted import Adapted
from dbtrain.train.ema import Ema
from dbtrain.train.fingerprint import check_unchanged
from dbtrain.train.segments import Segments, continued


@dataclass
class Progress:
    """Everything that training changes: a checkpoint stores it with the step."""

    model: Adapted
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    skipped: torch.Tensor  # () int64, on the device: steps skipped because of a NaN or infinity
    ema: Ema | None = None
    segments: Segments = field(default_factory=list)  # settings of the steps so far, and of the next ones

    @classmethod
    def begin(cls, model: Adapted, cfg: Config) -> Progress:
        """The progress of a run before its first step."""
        device = dist.device()
        optimizer = optim.build(model.trainable(), cfg.optim, cfg.train.cuda_graph, model.row)
        return cls(
            model, optimizer,
            torch.amp.GradScaler(device.type, enabled=PRECISIONS[cfg.train.precision].scaled),
            torch.zeros((), dtype=torch.int64, device=device),
            Ema(optim.leaves(optimizer), cfg.train.ema) if cfg.train.ema else None, continued([], 0, cfg),
        )  # fmt: skip

    def averaged(self, wanted: bool = True) -> AbstractContextManager[None]:
        """In the block, the adapter is its moving average if that is `wanted` and there is one."""
        return self.ema.in_place() if self.ema and wanted else nullcontext()


def save(
    run: RunFolder, step: int, progress: Progress, fingerprint: Mapping[str, Any], keep: int,
    best: Collection[int] = (),
) -> None:  # fmt: skip
    """Write the checkpoint of `step` on rank 0, then delete all but the newest `keep` and those of `best`.

    Raises ConfigError if the ranks' adapters differ, which would otherwise go unnoticed.
    """
    check_ranks(progress.model)
    with dist.agreed():
        if dist.is_main():
            path = run.checkpoint(step)
            files.write_folder_atomically(path, lambda part: _write(part, step, progress, fingerprint))
            for old in run.checkpoints()[:-keep]:
                if step_of(old) not in best:
                    _delete(old)


def _delete(checkpoint: Path) -> None:
    """Delete a checkpoint. If that fails, as for files that NFS keeps, the next save tries again."""
    try:
        shutil.rmtree(checkpoint)
    except OSError as error:
        console.warn(f"{checkpoint} cannot be deleted: {reason(error)}; the next save tries again")


def check_ranks(model: Adapted) -> None:
    """Raise ConfigError unless all ranks hold the same adapter: DDP synchronizes gradients, not weights."""
    if dist.world() > 1:
        weights = hashlib.sha256()
        for parameter in model.trainable().values():
            weights.update(parameter.detach().cpu().contiguous().numpy().tobytes())
        dist.assert_same(weights.hexdigest(), "the adapter")


def _write(part: Path, step: int, progress: Progress, fingerprint: Mapping[str, Any]) -> None:
    _write_adapters(part, step, progress.model)
    if progress.ema:
        with progress.averaged():
            _write_adapters(part / EMA, step, progress.model)
    moments = optim.state(progress.optimizer, progress.model.trainable())
    files.write(part / OPTIMIZER, safetensors.torch.save(moments))
    written = {str(path.relative_to(part)): hashing.sha256_of(path) for path in part.rglob("*.*")}
    state = {
        "step": step, "skipped": progress.skipped.item(), "scaler": progress.scaler.state_dict(),
        "identity": fingerprint, "segments": progress.segments, "files": written,
    }  # fmt: skip
    files.write(part / STATE, json.dumps(state, indent=1) + "\n")


def _write_adapters(folder: Path, step: int, model: Adapted) -> None:
    """Write the adapter and the learned word. Raises ConfigError unless they are finite."""
    if not all(parameter.isfinite().all() for parameter in model.trainable().values()):
        raise ConfigError(
            f"the adapter became NaN or infinite by step {step}; the last good checkpoint is kept; "
            "lower optim.lr"
        )
    folder.mkdir(exist_ok=True)
    for component, adapter in model.states().items():
        (folder / component).mkdir()
        for name, content in peft_folder.contents(adapter).items():
            files.write(folder / component / name, content)
    if words := model.words:
        files.write(folder / word_file.CHECKPOINT, word_file.checkpoint(model.learned, words))


def _read_adapters(folder: Path, model: Adapted) -> None:
    for component, module in model.trained.items():
        adapters.restore(module, peft_folder.read(folder / component).tensors)
    if words := model.words:
        word_file.restore(folder / word_file.CHECKPOINT, words)


def latest(run: RunFolder) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest undamaged checkpoint and its state.

    Damaged ones are reported and renamed, so that they do not count among those to keep.
    """
    for path in reversed(run.checkpoints()):
        try:
            return path, read_state(path)
        except ConfigError as problem:
            aside = path.with_name(f"{path.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            console.say(f"{problem}; set aside as {aside.name}, trying the previous one")
    return None


def load_latest(run: RunFolder, progress: Progress, fingerprint: Mapping[str, Any], cfg: Config) -> int:
    """Load the newest undamaged checkpoint, which rank 0 chooses, into `progress`.

    Returns its step, or 0 if there is none. Raises ConfigError that names each setting that differs from
    the checkpoint's run.
    """
    with dist.agreed():
        found = latest(run) if dist.is_main() else None
    step = dist.from_main(found and found[1]["step"])
    if step is None:
        return 0
    path = run.checkpoint(step)
    with dist.agreed():
        state = read_state(path)
        check_unchanged(path, state["identity"], fingerprint)
        _read_adapters(path, progress.model)
        if progress.ema and (path / EMA).is_dir():
            with progress.averaged():
                _read_adapters(path / EMA, progress.model)
        elif progress.ema:  # a run that begins to average here
            progress.ema.begin()
        saved = safetensors.torch.load_file(path / OPTIMIZER)
        optim.load_state(progress.optimizer, progress.model.trainable(), saved)
        progress.skipped.fill_(state.get("skipped", 0))  # absent in older checkpoints, as are the segments
        progress.segments = continued(state.get("segments", []), step, cfg)
        if state["scaler"]:
            progress.scaler.load_state_dict(state["scaler"])
    return state["step"]
