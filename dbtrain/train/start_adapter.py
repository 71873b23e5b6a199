"""Training goes on from an adapter file: the first step's weights have the function of the file's.

The run's rank and alpha may be others. More ranks are added as in a new adapter, random on the one side and
zero on the other; fewer are the nearest, by SVD.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from dbtrain.adapters import inject
from dbtrain.adapters.formats import registry as formats
from dbtrain.adapters.formats import word_file
from dbtrain.adapters.formats.comfyui_file import SCALED
from dbtrain.adapters.formats.common import States, by_module, strength
from dbtrain.adapters.material.delta import delta_of
from dbtrain.adapters.material.fit import Fit, Fits, Limit, table
from dbtrain.adapters.state import MAGNITUDE, AdapterState
from dbtrain.config import Config
from dbtrain.models.base import Base
from dbtrain.runtime import console
from dbtrain.runtime.errors import ConfigError
from dbtrain.train.adapted import Adapted, attach

SETTING = "adapter.start"
KINDS = {"LORA": "lora", "LOHA": "loha", "LOKR": "lokr"}


def start_from(base: Base, cfg: Config, adapter: Adapted) -> None:
    """Give a new run's adapter the weights of `adapter.start`.

    Raises ConfigError, which says what to set, unless the file's adapter is on the same layers and can be
    had at the run's kind and ranks.
    """
    assert cfg.adapter.start
    tensors, fits = _fitted(base, cfg, adapter.states())
    for name, module in adapter.trained.items():
        inject.restore(module, tensors[name])
    path = formats.find(cfg.adapter.start)
    console.say(f"starting from {path}")
    if any(fit.error for fit in fits.values()):
        for line in table(fits):
            console.say(line)
    if words := word_file.read(path, base.family, base.skeleton):
        console.say(f"warning: the words that {path} learned are not: {', '.join(w.text for w in words)}")


def check(base: Base, cfg: Config) -> Fits:
    """How well the run's adapter can hold that of `adapter.start`. Raises what `start_from` raises."""
    names = base.family.adaptable if cfg.adapter.text_encoder else (base.family.denoiser,)
    modules = {name: base.skeleton(name) for name in names}
    attach(modules, base.family, cfg)
    return _fitted(base, cfg, {name: _blank(module) for name, module in modules.items()})[1]


def _blank(module: nn.Module) -> AdapterState:
    """An adapter of zeros, like that on a module on the meta device."""
    shapes = {name: parameter.shape for name, parameter in inject.parameters(module, inject.NAME).items()}
    return AdapterState(
        {name: torch.zeros(shape) for name, shape in shapes.items()}, inject.config_of(module)
    )


def _fitted(base: Base, cfg: Config, new: States) -> tuple[dict[str, dict[str, Tensor]], Fits]:
    """The tensors of a new adapter, by component, so that it does what the file's does, and how well."""
    assert cfg.adapter.start
    sections = ("adapter.text_encoder", "adapter")
    try:
        given = formats.read(formats.find(cfg.adapter.start), base.family, base.skeleton)
        if base.family.denoiser not in given:
            raise ConfigError(f"it is not on the {base.family.denoiser}; use an adapter that is")
        for name in sorted(given.keys() ^ new.keys()):
            cure = "on the {} too; set" if name in given else "not on the {}; remove"
            raise ConfigError(f"it is {cure.format(name)} adapter.text_encoder")
        tensors: dict[str, dict[str, Tensor]] = {}
        fits: Fits = {}
        for name, state in new.items():
            tensors[name], some = _continued(state, given[name], sections[name == base.family.denoiser])
            fits |= {(name, module): fit for module, fit in some.items()}
    except ConfigError as problem:
        raise ConfigError(f"{SETTING}: '{cfg.adapter.start}': {problem}") from problem
    return tensors, fits


def _continued(
    new: AdapterState, given: AdapterState, section: str
) -> tuple[dict[str, Tensor], dict[str, Fit]]:
    """The tensors of one component's new adapter that do what a file's do, and how well each layer does.

    `section`: of the adapter's settings.
    """
    _check_settings(new, given, section)
    here, there = by_module(new), by_module(given)
    if missing := here.keys() - there.keys():
        raise ConfigError(
            f"it has no layer {min(missing)}, which {section}.targets selects; set {section}.targets="
            f"{_endings(there)}"
        )
    if unknown := there.keys() - here.keys():
        raise ConfigError(
            f"it has the layer {min(unknown)}, which {section}.targets leaves out; set {section}.targets="
            f"{_endings(there)}"
        )
    found: dict[str, Tensor] = {}
    fits: dict[str, Fit] = {}
    for module, layer in here.items():
        scale, its_scale = (strength(one.config, module)[1] for one in (new, given))
        if new.config["peft_type"] == "LORA":
            parts, fits[module] = _lora(layer, there[module], scale, its_scale)
        else:
            parts = _same(module, layer, there[module], its_scale / scale, section)
        found |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
    return found, fits


def _check_settings(new: AdapterState, given: AdapterState, section: str) -> None:
    """Raise ConfigError for a file that a run with these settings cannot go on from."""
    if biases := [name for one in (new, given) for name in one.tensors if name.endswith(".bias")]:
        raise ConfigError(f"trained biases, e.g. {biases[0]}, cannot be continued; set {section}.bias=none")
    kind, its = (KINDS[one.config["peft_type"]] for one in (new, given))
    if kind not in (its, "lora"):
        raise ConfigError(f"it is a {its}, the run's a {kind}; set {section}.kind={its}")
    dora, its_dora = (bool(one.config.get("use_dora")) for one in (new, given))
    if dora != its_dora:
        raise ConfigError(
            f"it is {'a' if its_dora else 'no'} DoRA, unlike the run's adapter; set {section}.dora="
            f"{str(its_dora).lower()}"
        )


def _lora(
    layer: Mapping[str, Tensor], its: Mapping[str, Tensor], scale: float, its_scale: float
) -> tuple[dict[str, Tensor], Fit]:
    """A layer of a LoRA that makes a file's change: its ranks first, then those of the new `layer`."""
    down, up = layer["lora_A.weight"].clone(), torch.zeros_like(layer["lora_B.weight"])
    delta, fit = Limit(len(down)).fit(delta_of(its, its_scale))
    down[: delta.rank] = delta.down.reshape(delta.rank, *down.shape[1:]).float()
    up[:, : delta.rank] = (delta.up / scale).reshape(len(up), delta.rank, *up.shape[2:]).float()
    found = {"lora_A.weight": down, "lora_B.weight": up}
    if MAGNITUDE in its:
        found[MAGNITUDE] = its[MAGNITUDE]
    return found, fit


def _same(
    module: str, layer: Mapping[str, Tensor], its: Mapping[str, Tensor], factor: float, section: str
) -> dict[str, Tensor]:
    """A layer's tensors of a file with tensors of the same shapes, at another scale."""
    shapes, there = ({name: tuple(tensor.shape) for name, tensor in one.items()} for one in (layer, its))
    if shapes != there:
        part = min(shapes.items() ^ there.items())[0]
        raise ConfigError(
            f"{module}.{part} is {there.get(part, 'missing')}, in the run {shapes.get(part, 'missing')}; a "
            f"LoHa or LoKr keeps its shape: set {section}.rank and its other options as they were"
        )
    scaled = next(name for name in SCALED if name in its)
    return {**its, scaled: its[scaled] * factor}


def _endings(modules: Iterable[str]) -> str:
    """Names for `targets` that select the layers: their ends, such as `to_q` and `to_out.0`."""
    found = {re.sub(r".*\.(?=[^.]*[a-z][^.]*(\.\d+)*$)", "", module) for module in modules}
    return f"[{', '.join(sorted(found))}]"
