"""The settings of a run that may change when it is resumed: one segment of steps for each change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from dbtrain.config import Config

Segments = list[dict[str, Any]]  # "from": the step after which its "settings" count


def settings(cfg: Config) -> dict[str, Any]:
    """The settings that shape the weights, but are not in the fingerprint, by config key."""
    unused = set() if cfg.adapter.token else {"token_lr"}
    optim = cfg.optim.model_dump(mode="json", exclude=unused)
    found: dict[str, Any] = {f"optim.{key}": value for key, value in optim.items()}
    if cfg.optim.schedule != "constant":
        found["train.steps"] = cfg.train.steps  # where the schedule ends
    others = ("precision", "base_linears", "ema")
    return found | {f"train.{key}": getattr(cfg.train, key) for key in others}


def continued(segments: Segments, step: int, cfg: Config) -> Segments:
    """The segments of a run that goes on from `step` with the settings of `cfg`."""
    now = settings(cfg)
    before = [segment for segment in segments if segment["from"] < step]
    if before and now | before[-1]["settings"] == now:  # an older run lacks some
        return before
    return [*before, {"from": step, "settings": now}]


def changes(segments: Segments, cfg: Config) -> list[str]:
    """`key=value` for each setting of `cfg` that differs from those of the last steps."""
    was = segments[-1]["settings"] if segments else settings(cfg)
    return [f"{key}={value}" for key, value in settings(cfg).items() if was.get(key, value) != value]


def told(segments: Sequence[Mapping[str, Any]], key: str, default: Any) -> str:
    """The value of a setting, and of each change the steps for which it counted."""
    values = _values(segments, key, default)
    ends = [f"{_text(value)} to step {end}" for (_, value), (end, _) in pairwise(values)]
    return ", then ".join([*ends, _text(values[-1][1])])


def header(segments: Segments, cfg: Config) -> str:
    """Comment lines for a resolved config, about settings that were different for earlier steps."""
    return "".join(
        f"# {key}: {told(segments, key, value)}\n"
        for key, value in settings(cfg).items()
        if len(_values(segments, key, value)) > 1
    )


def _values(segments: Sequence[Mapping[str, Any]], key: str, default: Any) -> list[tuple[int, Any]]:
    """(step after which it counts, value) of a setting, without repeats; never empty."""
    every = [(segment["from"], segment["settings"].get(key, default)) for segment in segments]
    every = every or [(0, default)]
    return every[:1] + [pair for before, pair in pairwise(every) if pair[1] != before[1]]


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
