"""Which modules an adapter is on: by preset, by the ends of their names, or by a regular expression.

Works on names alone, so that it tells the same of a loaded component as of the headers of its weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from dbtrain.config.adapter import PRESETS
from dbtrain.runtime.errors import ConfigError

LAYERS = (nn.Linear, nn.Conv2d)  # what every kind of adapter can adapt
SECTIONS = {"denoiser": "adapter", "text_encoder": "adapter.text_encoder"}  # of the config, by part


@dataclass(frozen=True)
class Modules:
    """The modules of a component, by name."""

    kind: str  # the component's class
    names: tuple[str, ...]
    layers: frozenset[str]  # those that an adapter can be on
    whole: bool = True  # False: some of the component's modules are to be left alone

    @classmethod
    def of(cls, module: nn.Module, without: Sequence[str] = ()) -> Modules:
        """All modules but those in `without`, and those below them."""
        names = tuple(
            name
            for name, _ in module.named_modules()
            if not any(name == prefix or name.startswith(f"{prefix}.") for prefix in without)
        )
        layers = {name for name, layer in module.named_modules() if isinstance(layer, LAYERS)}
        return cls(type(module).__name__, names, frozenset(layers.intersection(names)), not without)

    @classmethod
    def of_layers(cls, kind: str, layers: Iterable[str]) -> Modules:
        """The modules of which only the layers' names are known."""
        found = frozenset(layers)
        names = {".".join(parts[:count]) for name in found if (parts := name.split(".")) for count in
                 range(1, len(parts) + 1)}  # fmt: skip
        return cls(kind, tuple(sorted(names)), found)


def select(modules: Modules, wanted: str | Sequence[str], part: str) -> list[str]:
    """What selects the modules to adapt, as PEFT takes it: ends of names, or full names.

    `wanted` is `targets` of the config, `part` the row of PRESETS: "denoiser" or "text_encoder".
    Raises ConfigError, with near misses, if one selects nothing.
    """
    presets, section = PRESETS[part], SECTIONS[part]
    if isinstance(wanted, str) and wanted in presets:
        found = _ending(modules.names, presets[wanted])
        if not found:
            raise ConfigError(f"{section}.targets is '{wanted}', which names no module of a {modules.kind}")
        hit = {name for hits in found.values() for name in hits}
        # By full name where an end is also that of something else, or of a module to leave alone.
        return list(found) if hit <= modules.layers and modules.whole else sorted(hit & modules.layers)
    if isinstance(wanted, str) and not re.fullmatch(r"[\w.]+", wanted):
        return _matching(modules, wanted, section)
    listed = (wanted,) if isinstance(wanted, str) else wanted
    found = _ending(modules.names, listed)
    if idle := [want for want in listed if want not in found]:
        usual = _ending(modules.names, presets["attention"])
        raise ConfigError(
            f"{section}.targets: no module of a {modules.kind} is called {', '.join(map(repr, idle))}; "
            f"use one of {', '.join(map(repr, presets))}, or names such as {', '.join(map(repr, usual))}"
        )
    return list(found) if modules.whole else sorted({name for hits in found.values() for name in hits})


def selected(modules: Modules, chosen: Sequence[str]) -> list[str]:
    """The layers that PEFT adapts, of what `select` gave."""
    hit = {name for hits in _ending(modules.names, chosen).values() for name in hits}
    return sorted(hit & modules.layers)


def _ending(names: Sequence[str], wanted: Sequence[str]) -> dict[str, list[str]]:
    """The wanted ends that some names have, and those names."""
    found = {want: [name for name in names if f".{name}".endswith(f".{want}")] for want in wanted}
    return {want: hits for want, hits in found.items() if hits}


def _matching(modules: Modules, pattern: str, section: str) -> list[str]:
    """The layers whose whole name a regular expression matches."""
    try:
        found = sorted(name for name in modules.layers if re.fullmatch(pattern, name))
    except re.error as error:
        raise ConfigError(
            f"{section}.targets is '{pattern}', not a valid regular expression: {error}"
        ) from error
    if not found:
        raise ConfigError(
            f"{section}.targets: no linear or convolution layer of a {modules.kind} has a whole name that "
            f"matches '{pattern}'; names look like {min(modules.layers, default='')!r}"
        )
    return found
