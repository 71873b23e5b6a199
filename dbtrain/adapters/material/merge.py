"""Weighted sums of adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from dbtrain.adapters.material.adapter_file import AdapterFile, Place
from dbtrain.adapters.material.delta import Delta, total
from dbtrain.adapters.material.fit import Fits, Limit
from dbtrain.runtime.errors import ConfigError

Rules = dict[int, Callable[[], Delta]]  # number of an adapter -> what computes its change of a layer


def merged(parts: Sequence[tuple[AdapterFile, float]], limit: Limit) -> tuple[dict[Place, Delta], Fits]:
    """The weighted sum of adapters, whose layers have the names of the first one's file."""
    found: dict[Place, Delta] = {}
    fits: Fits = {}
    weights = [weight for _, weight in parts]
    for place, rules in aligned([source for source, _ in parts]).items():
        found[place], fits[place] = limit.fit(summed(rules, weights))
    return found, fits


def together(sources: Sequence[AdapterFile]) -> AdapterFile:
    """The first adapter as a pattern for the sum of all: it knows how the names of each one's parts begin."""
    prefixes = {part: prefix for source in reversed(sources) for part, prefix in source.prefixes.items()}
    return replace(sources[0], prefixes=prefixes)


def summed(rules: Rules, weights: Sequence[float]) -> Delta:
    """The weighted sum of the changes of a layer; `weights` are all adapters'."""
    return total([(weights[number], rule()) for number, rule in rules.items()])


def aligned(sources: Sequence[AdapterFile]) -> dict[Place, Rules]:
    """Each layer of any of the adapters, as the first that has it calls it -> what computes its changes.

    Raises ConfigError if names of layers of different formats do not go together without the base.
    """
    names: dict[Place, Place] = {}
    found: dict[Place, Rules] = {}
    for number, source in enumerate(sources):
        mine = {_plain(place): place for place in source.layers}
        if number and not source.base:
            strangers, shared = mine.keys() - names.keys(), mine.keys() & names.keys()
            if source.form == sources[0].form:  # then a part that shares no layer has other names
                apart = {part for part, _ in names} - {part for part, _ in shared}
                strangers = {plain for plain in strangers if plain[0] in apart}
            if strangers:
                raise ConfigError(
                    f"{source.path} has the layer {mine[min(strangers)][1]}, which {sources[0].path} "
                    "does not have, or not by this name; add --base, the model of both"
                )
        for plain, place in mine.items():
            found.setdefault(names.setdefault(plain, place), {})[number] = source.layers[place]
    return found


def _plain(place: Place) -> Place:
    """A layer's name as all formats write it that have Diffusers' names."""
    component, module = place
    plain = module.replace(".", "_")
    return component, plain.removeprefix("text_model_") if component.startswith("text_encoder") else plain
