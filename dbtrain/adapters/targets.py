"""The modules that an adapter is on: a preset, suffixes of their names, or a regular expression.

In a suffix, `*` stands for one part of a name, such as the number of a block.

Works on names alone, which come from a loaded component or from the headers of its weight files.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from dbtrain.config.adapter import PRESETS, AdapterSettings
from dbtrain.runtime.errors import ConfigError

T = TypeVar("T")
NAME = r"[\w.]+"  # what is a module's name, or the end of one, rather than a regular expression
LAYERS = (nn.Linear, nn.Conv2d)  # supported by every kind of adapter
SECTIONS = {"denoiser": "adapter", "text_encoder": "adapter.text_encoder"}  # config section by part


@dataclass(frozen=True)
class Modules:
    """The modules of a component, by name."""

    kind: str  # the component's class
    names: tuple[str, ...]
    layers: frozenset[str]  # those that an adapter can be on
    whole: bool = True  # False: `names` excludes some modules of the component

    @classmethod
    def of(cls, module: nn.Module, without: Sequence[str] = ()) -> Modules:
        """All modules except those in `without` and their submodules."""
        names = tuple(
            name
            for name, _ in module.named_modules()
            if not any(name == prefix or name.startswith(f"{prefix}.") for prefix in without)
        )
        layers = {name for name, layer in module.named_modules() if isinstance(layer, LAYERS)}
        return cls(type(module).__name__, names, frozenset(layers.intersection(names)), not without)

    @classmethod
    def of_layers(cls, kind: str, layers: Iterable[str]) -> Modules:
        """The modules, from the names of the layers."""
        found = frozenset(layers)
        names = {".".join(parts[:count]) for name in found if (parts := name.split(".")) for count in
                 range(1, len(parts) + 1)}  # fmt: skip
        return cls(kind, tuple(sorted(names)), found)


def select(
    modules: Modules,
    wanted: str | Sequence[str],
    part: str,
    presets: Mapping[str, Sequence[str]] | None = None,
) -> list[str]:
    """PEFT's `target_modules`: suffixes of module names, or full names.

    `wanted`: `targets` in the config. `part`: "denoiser" or "text_encoder". `presets`: the family's own.
    Raises ConfigError if a target matches no module.
    """
    presets, section = presets or PRESETS[part], SECTIONS[part]
    if isinstance(wanted, str) and wanted in presets:
        found = _ending(modules.names, presets[wanted])
        if not found:
            raise ConfigError(f"{section}.targets is '{wanted}', which matches no module of {modules.kind}")
        hit = {name for hits in found.values() for name in hits}
        # Full names if a suffix also matches an excluded module or one that cannot have an adapter.
        plain = hit <= modules.layers and modules.whole and not any("*" in want for want in found)
        return list(found) if plain else sorted(hit & modules.layers)
    if isinstance(wanted, str) and not re.fullmatch(NAME, wanted):
        return _matching(modules, wanted, section)
    listed = (wanted,) if isinstance(wanted, str) else wanted
    found = _ending(modules.names, listed)
    if unmatched := [want for want in listed if want not in found]:
        usual = _ending(modules.names, presets["attention"])
        raise ConfigError(
            f"{section}.targets: no module of {modules.kind} is called {', '.join(map(repr, unmatched))}; "
            f"use one of {', '.join(map(repr, presets))}, or names such as {', '.join(map(repr, usual))}"
        )
    plain = modules.whole and not any("*" in want for want in found)
    return list(found) if plain else sorted({name for hits in found.values() for name in hits})


def selected(modules: Modules, chosen: Sequence[str]) -> list[str]:
    """The layers that PEFT adapts for the result of `select`."""
    hit = {name for hits in _ending(modules.names, chosen).values() for name in hits}
    return sorted(hit & modules.layers)


def ranks(modules: Modules, chosen: Sequence[str], cfg: AdapterSettings, part: str) -> dict[str, int]:
    """The rank of every layer that PEFT adapts for the result of `select`.

    Raises ConfigError for a pattern in `cfg.ranks` that fits none of them.
    """
    every = selected(modules, chosen)
    return dict.fromkeys(every, cfg.rank) | by_pattern(every, cfg.ranks, f"{SECTIONS[part]}.ranks")


def by_pattern(names: Iterable[str], values: Mapping[str, T], setting: str, before: str = "") -> dict[str, T]:
    """Module -> the value of the first pattern that fits; without those that none fits.

    A pattern is the end of a name, as in `targets`, or a regular expression that matches the full name; that
    may begin with what `before`, another one, matches. `setting`: the key of `values`, for messages.
    Raises ConfigError for a pattern that fits no module.
    """
    names, found = sorted(names), dict[str, T]()
    for pattern, value in values.items():
        if re.fullmatch(NAME, pattern):
            hits = _ending(names, [pattern]).get(pattern, [])
        else:
            try:
                hits = [name for name in names if re.fullmatch(f"(?:{before})?(?:{pattern})", name)]
            except re.error as error:
                raise ConfigError(
                    f"{setting}: '{pattern}' is not a valid regular expression: {error}"
                ) from error
        if not hits:
            near = difflib.get_close_matches(pattern, names, n=1, cutoff=0.0)
            raise ConfigError(
                f"{setting}: '{pattern}' fits no module with an adapter; did you mean {near[0]!r}?"
                if near
                else f"{setting}: '{pattern}' fits no module, as there is none with an adapter"
            )
        found = dict.fromkeys(hits, value) | found
    return found


def _ending(names: Sequence[str], wanted: Sequence[str]) -> dict[str, list[str]]:
    """Suffix -> the names that end with it, for each wanted suffix that matches."""
    patterns = {want: re.escape(want).replace(r"\*", r"[^.]+") for want in wanted}
    found = {
        want: [name for name in names if re.search(rf"(?:^|\.){pattern}$", name)]
        for want, pattern in patterns.items()
    }
    return {want: hits for want, hits in found.items() if hits}


def _matching(modules: Modules, pattern: str, section: str) -> list[str]:
    """The layers whose full name matches a regular expression."""
    try:
        found = sorted(name for name in modules.layers if re.fullmatch(pattern, name))
    except re.error as error:
        raise ConfigError(
            f"{section}.targets is '{pattern}', which is not a valid regular expression: {error}"
        ) from error
    if not found:
        raise ConfigError(
            f"{section}.targets: '{pattern}' matches the full name of no linear or convolution layer of "
            f"{modules.kind}; a name is, for example, {min(modules.layers, default='')!r}"
        )
    return found
