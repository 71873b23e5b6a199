"""From PEFT's keys to the file that every Diffusers user loads, and a card that says how."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import yaml
from diffusers.utils import convert_state_dict_to_diffusers
from safetensors import SafetensorError

from dbtrain import checkpoint, dist, families, files, log
from dbtrain.adapters import AdapterState
from dbtrain.config import Config
from dbtrain.errors import ConfigError
from dbtrain.families.base import Family
from dbtrain.pretrained import EMBEDDED, Pretrained

FILE = "pytorch_lora_weights.safetensors"  # the name that `load_lora_weights(folder)` looks for


def export(cfg: Config, step: int | None = None, out: Path | None = None) -> Path:
    """Export a checkpoint (the newest, or that of `step`) into `out`; the path of the file.

    `out` is the run's `export/` by default. Needs the checkpoint and the base's model_index.json
    only: no base weights are loaded.
    """
    dist.init()
    run_dir = files.expand(cfg.run_dir)
    base = Pretrained.find(cfg.model)
    with dist.agreed():
        path = _checkpoint(run_dir, step) if dist.is_main() else None
    path = Path(dist.from_main(str(path)))
    with dist.agreed():
        family = families.detect(base, cfg.model)
        state = checkpoint.read_state(path)
        components = [entry.parent.name for entry in path.glob(f"*/{checkpoint.ADAPTER_CONFIG}")]
        states = {name: checkpoint.read_adapter(path / name) for name in components}
    return save(cfg, base, family, states, state["step"], out or run_dir / "export")


def save(
    cfg: Config,
    base: Pretrained,
    family: Family,
    states: Mapping[str, AdapterState],
    step: int,
    folder: Path,
) -> Path:
    """Write an export folder on rank 0: the adapter with its metadata, and the model card."""
    with dist.agreed():
        if dist.is_main():
            write_adapter(folder / FILE, family, states)
            files.write_atomically(folder / "README.md", _card(cfg, base, family, states, step))
            log.say(f"exported step {step} to {folder / FILE}")
    return folder / FILE


def write_adapter(path: Path, family: Family, states: Mapping[str, AdapterState]) -> None:
    """Write the adapters of a pipeline's components as one LoRA file, through Diffusers' own mixin.

    The metadata carries alpha: without it a loader assumes alpha = rank, another strength.
    """
    layers: dict[str, Any] = {}
    for component, state in states.items():
        layers[f"{component}_lora_layers"] = diffusers_keys(state.tensors)
        layers[f"{component}_lora_adapter_metadata"] = state.config
    part = path.parent.with_name(f".{path.parent.name}.tmp")
    try:
        getattr(diffusers, family.pipeline).save_lora_weights(part, weight_name=path.name, **layers)
        files.write_atomically(path, _ordered((part / path.name).read_bytes()))
    except SafetensorError as error:  # its writer reports a full disk this way
        raise ConfigError(f"cannot write {part / path.name}: {error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _ordered(data: bytes) -> bytes:
    """A safetensors file with its header sorted: the library writes metadata in a random order."""
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + length]), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def diffusers_keys(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """A component's adapter under the names that Diffusers' loaders read.

    Diffusers' converter renames attention layers only, and its UNet loader looks at the first key
    to tell the form of all: half of a mixed file would silently not load. So an adapter with other
    layers keeps PEFT's names throughout, which loaders read as well.

    CLIP's layers stand under `text_model.`, as every loader and older file has them; transformers
    5.6 dropped that level from CLIPTextModel (huggingface/diffusers#13984).
    """
    peft_keys = {
        f"text_model.{name}" if name.startswith("encoder.layers.") else name: tensor
        for name, tensor in sorted(tensors.items())
    }
    converted = convert_state_dict_to_diffusers(peft_keys)
    return peft_keys if any(".lora_A." in name for name in converted) else converted


def is_done(cfg: Config) -> bool:
    """Whether the run has trained to `train.steps` and exported the result."""
    marker = files.expand(cfg.run_dir) / "DONE"
    exported = files.expand(cfg.run_dir) / "export" / FILE
    return (
        marker.is_file()
        and exported.is_file()
        and marker.read_bytes() == _done(cfg.train.steps, exported).encode()
    )


def mark_done(cfg: Config) -> None:
    """Leave the file DONE in the run folder: what batch scripts wait for."""
    with dist.agreed():
        if dist.is_main():
            exported = files.expand(cfg.run_dir) / "export" / FILE
            files.write_atomically(files.expand(cfg.run_dir) / "DONE", _done(cfg.train.steps, exported))


def _done(steps: int, exported: Path) -> str:
    return f"step {steps}\nexport {files.sha256_of(exported)}\n"


def _checkpoint(run_dir: Path, step: int | None) -> Path:
    found = {int(path.name[5:]): path for path in checkpoint.folders(run_dir)}
    if not found:
        raise ConfigError(f"{run_dir} has no checkpoint to export; run: dbtrain train")
    if step is None:
        newest = checkpoint.latest(run_dir)
        if newest is None:
            raise ConfigError(f"every checkpoint in {run_dir} is damaged; run: dbtrain train")
        return newest[0]
    if step not in found:
        raise ConfigError(f"{run_dir} has no checkpoint of step {step}, only of {sorted(found)}")
    return found[step]


def _card(
    cfg: Config, base: Pretrained, family: Family, states: Mapping[str, AdapterState], step: int
) -> str:
    """The model card: what this file is, what it was trained on, how to load it."""
    prompt = cfg.prepare.instance_prompt if cfg.prepare else "a photo of the subject"
    path = str(base.folder) if cfg.model.path in EMBEDDED else cfg.model.path
    adapter = next(iter(states.values())).config
    facts = {
        "base_model": path,
        "library_name": "diffusers",
        "tags": ["text-to-image", "diffusers", "lora", "dreambooth", "dbtrain"],
        "instance_prompt": prompt,
    }
    prior = cfg.prepare.class_prompt if cfg.prepare else None
    return f"""---
{yaml.safe_dump(facts, sort_keys=False, allow_unicode=True)}---

# {files.expand(cfg.run_dir).name}

A LoRA (rank {adapter["r"]}, alpha {adapter["lora_alpha"]}) for `{path}`, trained by DreamBooth with dbtrain.

| | |
|---|---|
| prompt of the subject | {prompt} |
| prior preservation | {prior or "none"} |
| steps | {step} of {cfg.train.global_batch} images |
| learning rate | {cfg.optim.lr:g}, {cfg.optim.schedule} |
| precision | {cfg.train.precision} |

```python
from diffusers import {family.pipeline}

pipe = {family.pipeline}.from_pretrained({_quoted(path)})
pipe.load_lora_weights(".", weight_name="{FILE}")
image = pipe({_quoted(prompt)}).images[0]
```

The file carries its alpha, so it loads at the strength it was trained at.
"""


def _quoted(text: str) -> str:
    """A Python string literal."""
    return json.dumps(text, ensure_ascii=False)
