"""A run's fingerprint: the settings and content that must not change when it is resumed."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from dbtrain.config import Config, fields
from dbtrain.config.adapter import alpha_of
from dbtrain.data.shards import Manifest
from dbtrain.models.base import Base
from dbtrain.runtime.errors import ConfigError
from dbtrain.runtime.hashing import content_key
from dbtrain.runtime.run_folder import RunFolder, read_state
from dbtrain.train import training_adapter

# Settings that shape the shards. Their content would tell, but not in words that a person changed.
PREPARE = (
    "instance_prompt", "captions", "caption", "class_prompt", "class_images", "resolution", "buckets",
    "class_buckets", "crop", "mask", "mask_model", "variants", "flip", "augment", "held_out",
    "class_held_out", "vae_precision", "subfolders", "repeats", "weights",
)  # fmt: skip
# Settings of other sections, recorded where they differ from the defaults.
OPTIONAL = ("data.prompt_dropout", "optim.name")
# What it means if one of these, of `loss` or of `prepare`, or `ranks`, is not recorded.
DEFAULTS = {
    name: field.get_default()
    for name, field in fields()
    if (name.startswith((*OPTIONAL, "loss.", "prepare.")) or name.endswith(".ranks"))
    and not field.is_required()
}
# Settings of `loss` that older runs lack. They are recorded where they differ from the defaults.
LATER = {"timesteps", "weighting", "prior", "huber", "mask"}


def of(cfg: Config, base: Base, manifest: Manifest) -> dict[str, Any]:
    """Return the fingerprint of a run, by config key.

    Models and shards are represented by hashes. Steps, learning rate, micro-batch, precision, memory
    settings, and ranks can change: the data and noise of a step do not depend on them.
    """
    trained = base.family.adaptable_text if cfg.adapter.text_encoder or cfg.adapter.token else ()
    training = training_adapter.content(cfg.model)
    begun = start_content(cfg)
    base_content = [base.key(part) for part in (base.family.denoiser, "scheduler", *trained)]
    return {
        **of_settings(cfg, manifest.request),
        "model.path": f"content {content_key(base_content)[:12]}",
        "data.shards": _shards_content(manifest),
        **({"model.training_adapter": f"content {training[:12]}"} if training else {}),
        **({"adapter.start": begun} if begun else {}),
        **({"model.low_res": cfg.model.low_res} if base.family.sees else {}),
    }


def start_content(cfg: Config) -> str | None:
    """What stands for the file that a run began from, by its content; None without `adapter.start`.

    Where the file is gone, it is what the newest undamaged checkpoint has recorded, from which the run goes
    on. Raises ConfigError if there is neither.
    """
    if cfg.adapter.start is None:
        return None
    from dbtrain.adapters.formats import registry as formats  # loads PEFT, which most calls need not

    try:
        return f"content {formats.content_of(formats.find(cfg.adapter.start))[:12]}"
    except ConfigError as problem:
        for path in reversed(RunFolder(cfg.run_dir).checkpoints()):
            with suppress(ConfigError):  # damaged: training sets it aside
                if recorded := read_state(path)["identity"].get("adapter.start"):
                    return str(recorded)
        raise ConfigError(f"adapter.start: {problem}") from problem


def of_settings(cfg: Config, prepare: Mapping[str, Any]) -> dict[str, Any]:
    """The part of the fingerprint that needs neither base nor shards. `prepare`: settings of the shards."""
    later = cfg.loss.model_dump(mode="json", include=LATER, exclude_defaults=True)
    parts = {"adapter": cfg.adapter, "adapter.text_encoder": cfg.adapter.text_encoder}
    settings = {
        f"{part}.{key}": value
        for part, one in parts.items()
        if one
        for key, value in (one.model_dump(mode="json") | {"alpha": alpha_of(one)}).items()
        if key not in ("text_encoder", "token", "start") and (key, value) != ("ranks", {})
    }
    if cfg.adapter.token:
        settings |= {f"adapter.token.{key}": value for key, value in cfg.adapter.token.model_dump().items()}
        settings["adapter.token"] = ", ".join(cfg.learned_words)
    return {
        "seed": cfg.seed,
        **settings,
        **{f"loss.{key}": value for key, value in cfg.loss.model_dump(mode="json", exclude=LATER).items()},
        **{f"loss.{key}": value for key, value in later.items()},
        **({"loss.prior's photos": "redrawn"} if cfg.loss.prior == "prediction" else {}),
        **{key: value for key in OPTIONAL if (value := cfg.get(key)) != DEFAULTS[key]},
        "train.global_batch": cfg.train.global_batch,
        **({"subjects.weight": [one.weight for one in cfg.subjects]} if cfg.subjects else {}),
        **{f"prepare.{key}": prepare[key] for key in PREPARE if key in prepare},
    }


def _shards_content(manifest: Manifest) -> str:
    rows = ", ".join(f"{sum(manifest.rows(role))} {role} images" for role in manifest.roles)
    content = content_key(manifest.model_dump(mode="json", exclude={"base", "request", "sources"}))
    return f"{rows}, content {content[:12]}"


def check_unchanged(path: Path, was: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise ConfigError that names every setting in which two fingerprints differ."""
    was, now = _complete(was), _complete(now)
    changed = sorted(name for name in was.keys() | now.keys() if was.get(name) != now.get(name))
    if changed:
        changes = "; ".join(f"{name} was {was.get(name)!r}, is now {now.get(name)!r}" for name in changed)
        raise ConfigError(f"{path} cannot be continued: {changes}; restore them, or change run_dir")


def _complete(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """A fingerprint with the defaults that it leaves out, and sections of `loss` setting by setting."""
    sections = [f"loss.{key}" for key in LATER if isinstance(recorded.get(f"loss.{key}"), dict)]
    parts = {f"{name}.{key}": value for name in sections for key, value in recorded[name].items()}
    return DEFAULTS | {name: value for name, value in recorded.items() if name not in sections} | parts


def check_continues(path: Path, state: Mapping[str, Any], now: Mapping[str, Any], steps: int) -> None:
    """Raise ConfigError unless a run with fingerprint `now` and `steps` can resume from a checkpoint."""
    check_unchanged(path, state["identity"], now)
    if state["step"] > steps:
        raise ConfigError(
            f"{path} is past train.steps ({steps}); "
            "increase train.steps, change run_dir, or export an earlier checkpoint"
        )


def check_settings(cfg: Config) -> None:
    """Raise ConfigError if the run in `cfg.run_dir` cannot be continued with these settings.

    `run` calls it before it prepares anything; base and shards are compared once they are there.
    """
    paths = RunFolder(cfg.run_dir).checkpoints()
    if not paths:
        return
    try:
        was = read_state(paths[-1])["identity"]
    except ConfigError:
        return  # damaged: training sets it aside
    now = of_settings(cfg, cfg.prepare.recorded() if cfg.prepare else {})
    known = now.keys() & was.keys() | {key for key in now.keys() ^ was.keys() if key in OPTIONAL}
    pair = ({key: one[key] for key in known & one.keys()} for one in (was, now))
    check_unchanged(paths[-1], *pair)
