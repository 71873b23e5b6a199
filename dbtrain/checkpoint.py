"""Checkpoints: adapter, moments and an integer; written whole or not at all, resumed exactly.

Data order, randomness and learning rate are functions of the step, so nothing else needs saving.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from dbtrain import adapters, dist, files, log, optim
from dbtrain.config import Config
from dbtrain.data.shards import Manifest
from dbtrain.errors import ConfigError, reason
from dbtrain.families.base import Family
from dbtrain.formats import peft_folder
from dbtrain.keys import content_key
from dbtrain.network import DreamBooth
from dbtrain.precision import PRECISIONS
from dbtrain.pretrained import Pretrained

STATE = "state.json"


@dataclass
class Progress:
    """What changes while training, and so what a checkpoint holds; beside it only the step."""

    model: DreamBooth
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    skipped: torch.Tensor  # () int64, on the device: steps left out, as something was not finite

    @classmethod
    def begin(cls, model: DreamBooth, cfg: Config) -> Progress:
        """Nothing done yet."""
        device = dist.device()
        return cls(
            model, optim.build(model.trainable(), cfg.optim, cfg.train.cuda_graph),
            torch.amp.GradScaler(device.type, enabled=PRECISIONS[cfg.train.precision].scaled),
            torch.zeros((), dtype=torch.int64, device=device),
        )  # fmt: skip


def folders(run_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = (run_dir / "checkpoints").glob("step-*")
    whole = [path for path in found if re.fullmatch(r"step-\d{6,}", path.name) and path.is_dir()]
    return sorted(whole, key=step_of)


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def identity(cfg: Config, base: Pretrained, family: Family, manifest: Manifest) -> dict[str, Any]:
    """What a checkpoint can only be continued with, by the config key a user knows it by.

    Content (models, shards) is named by its hash. Steps, learning rate, micro-batch, precision,
    memory settings and ranks may change: the data and the noise of a step do not depend on them.
    """
    parts = {"adapter": cfg.adapter, "adapter.text_encoder": cfg.adapter.text_encoder}
    trained = family.text_encoders if cfg.adapter.text_encoder else ()
    settings = {
        f"{part}.{key}": value
        for part, one in parts.items()
        if one
        for key, value in (one.model_dump(mode="json") | {"alpha": adapters.alpha_of(one)}).items()
        if key != "text_encoder"
    }
    base_content = [base.key(part) for part in (family.denoiser, "scheduler", *trained)]
    return {
        "seed": cfg.seed,
        "model.path": f"content {content_key(base_content)[:12]}",
        "data.shards": _shards_identity(manifest),
        **({"model.low_res": cfg.model.low_res} if family.sees else {}),
        **settings,
        **{f"loss.{key}": value for key, value in cfg.loss.model_dump(mode="json").items()},
        "train.global_batch": cfg.train.global_batch,
    }


def _shards_identity(manifest: Manifest) -> str:
    rows = ", ".join(f"{sum(manifest.rows(role))} {role} images" for role in manifest.roles)
    content = content_key(manifest.model_dump(mode="json", exclude={"base", "request"}))
    return f"{rows}, content {content[:12]}"


def save(run_dir: Path, step: int, progress: Progress, who: Mapping[str, Any], keep: int) -> None:
    """Write the checkpoint of `step` on rank 0, then remove all but the newest `keep`.

    Raises ConfigError if the ranks' adapters differ, which nothing else would show.
    """
    check_ranks(progress.model)
    with dist.agreed():
        if dist.is_main():
            path = run_dir / "checkpoints" / f"step-{step:06d}"
            files.write_folder_atomically(path, lambda part: _fill(part, step, progress, who))
            for old in folders(run_dir)[:-keep]:
                shutil.rmtree(old)


def check_ranks(model: DreamBooth) -> None:
    """Raise ConfigError unless all ranks hold the same adapter: DDP only ever adds equal gradients to it."""
    if dist.world() > 1:
        weights = hashlib.sha256()
        for parameter in model.trainable().values():
            weights.update(parameter.detach().cpu().contiguous().numpy().tobytes())
        dist.assert_same(weights.hexdigest(), "the adapter")


def _fill(part: Path, step: int, progress: Progress, who: Mapping[str, Any]) -> None:
    for component, adapter in progress.model.states().items():
        if not all(tensor.isfinite().all() for tensor in adapter.tensors.values()):
            raise ConfigError(
                f"the adapter became NaN or infinite by step {step}; the last good checkpoint is kept; "
                "lower optim.lr"
            )
        (part / component).mkdir()
        for name, content in peft_folder.contents(adapter).items():
            files.write(part / component / name, content)
    moments = optim.state(progress.optimizer, progress.model.trainable())
    files.write(part / "optimizer.safetensors", safetensors.torch.save(moments))
    written = {str(path.relative_to(part)): files.sha256_of(path) for path in part.rglob("*.*")}
    state = {
        "step": step, "skipped": progress.skipped.item(), "scaler": progress.scaler.state_dict(),
        "identity": who, "files": written,
    }  # fmt: skip
    files.write(part / STATE, json.dumps(state, indent=1) + "\n")


def latest(run_dir: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that is whole, and its state.

    Says which ones are not, and sets them aside: among the newest, they would push out good ones.
    """
    for path in reversed(folders(run_dir)):
        try:
            return path, read_state(path)
        except ConfigError as problem:
            aside = path.with_name(f"{path.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            log.say(f"{problem}; set aside as {aside.name}, trying the one before it")
    return None


def read_state(path: Path) -> dict[str, Any]:
    """state.json of a checkpoint. Raises ConfigError if one of its files is missing or altered."""
    try:
        state = json.loads((path / STATE).read_bytes())
        odd = [name for name, sha in state["files"].items() if files.sha256_of(path / name) != sha]
        if state["step"] != step_of(path) or not isinstance(state["identity"], dict):
            odd.append(STATE)
    except (ValueError, LookupError, TypeError, AttributeError, FileNotFoundError) as error:
        raise ConfigError(f"checkpoint {path} is damaged: {reason(error)}") from error
    if odd:
        raise ConfigError(f"checkpoint {path} is damaged: {', '.join(odd)} differs from its sha256")
    return state


def load_latest(run_dir: Path, progress: Progress, who: Mapping[str, Any]) -> int:
    """Put the newest whole checkpoint into `progress`; the step it was taken at.

    0 if there is none. Rank 0 chooses. Raises ConfigError that names each setting by which the run
    differs from the one that is to be continued.
    """
    with dist.agreed():
        found = latest(run_dir) if dist.is_main() else None
    name = dist.from_main(found and found[0].name)
    if name is None:
        return 0
    path = run_dir / "checkpoints" / name
    with dist.agreed():
        state = read_state(path)
        check_identity(path, state["identity"], who)
        for component, module in progress.model.trained.items():
            adapters.restore(module, peft_folder.read(path / component).tensors)
        saved = safetensors.torch.load_file(path / "optimizer.safetensors")
        optim.load_state(progress.optimizer, progress.model.trainable(), saved)
        progress.skipped.fill_(state.get("skipped", 0))  # absent in older checkpoints
        if state["scaler"]:
            progress.scaler.load_state_dict(state["scaler"])
    return state["step"]


def check_identity(path: Path, was: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise ConfigError that names every setting in which two identities differ."""
    odd = sorted(name for name in was.keys() | now.keys() if was.get(name) != now.get(name))
    if odd:
        changes = "; ".join(f"{name} was {was.get(name)!r}, is now {now.get(name)!r}" for name in odd)
        raise ConfigError(f"{path} cannot be continued: {changes}; set them back, or give another run_dir")
