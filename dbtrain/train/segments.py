"""The settings of a run that may change when it is resumed: one segment of steps for each change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from dbtrain.config import Config

Segments = list[dict[str, Any]]  # "from": the step after which its "settings" count


def settings(cfg: Config) -> dict[str, Any]:
    """The settings that shape the weights, but are not in the fingerprint, by config key."""
    found = {f"optim.{key}": value for key, value in cfg.optim.model_dump(mode="json").items()}
    if cfg.optim.schedule != "constant":
        found["train.steps"] = cfg.train.steps  # where the schedule ends
    return found | {"train.precision": cfg.train.precision, "train.base_linears": cfg.train.base_linears}


def continued(segments: Segments, step: int, cfg: Config) -> Segments:
    """The segments of a run that goes on from `step` with the settings of `cfg`."""
    now = settings(cfg)
    before = [segment for segment in segments if segment["from"] < step]
    if before and before[-1]["settings"] == now:
        return before
    return [*before, {"from": step, "settings": now}]


def changes(segments: Segments, cfg: Config) -> list[str]:
    """`key=value` for each setting of `cfg` that differs from those of the last steps."""
    was = segments[-1]["settings"] if segments else settings(cfg)
    return [f"{key}={value}" for key, value in settings(cfg).items() if was.get(key, value) != value]


def told(segments: Sequence[Mapping[str, Any]], key: str, default: Any) -> str:
    """The value of a setting, and of each change the steps for which it counted."""
    values: list[tuple[int, Any]] = []
    for segment in segments:
        value = segment["settings"].get(key, default)
        if not values or values[-1][1] != value:
            values.append((segment["from"], value))
    if len(values) < 2:
        return _text(values[0][1] if values else default)
    ends = [f"{_text(value)} to step {end}" for (_, value), (end, _) in pairwise(values)]
    return f"{', '.join(ends)}, then {_text(values[-1][1])}"


def header(segments: Segments, cfg: Config) -> str:
    """Comment lines for a resolved config, about settings that were different for earlier steps."""
    keys = settings(cfg) if len(segments) > 1 else {}
    every = {key: told(segments, key, value) for key, value in keys.items()}
    return "".join(f"# {key}: {text}\n" for key, text in every.items() if ", then " in text)


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
