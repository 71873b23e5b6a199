"""The full change of every layer under kohya's names, which programs add to the weights.

It is exact where a program computes DoRA in another way. It needs the base's weights, and is as large as
the layers that the adapter is on. The tensors are those of LyCORIS's `full`: `diff` and `diff_b`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from dbtrain.adapters import inject
from dbtrain.adapters.formats.common import CONFIGS, Content
from dbtrain.adapters.formats.header import serialized
from dbtrain.adapters.formats.names import kohya_names
from dbtrain.adapters.state import AdapterState
from dbtrain.runtime import files

FILE = "{name}-diff.safetensors"
PARTS = {"weight": "diff", "bias": "diff_b"}


def write(path: Path, content: Content) -> None:
    assert content.load, "the change of DoRA depends on the base's weights"
    tensors: dict[str, Tensor] = {}
    for component, state in content.states.items():
        layers = changes(content.load(component), state)
        named = kohya_names(content.family, component, layers, content.names)
        tensors |= {f"{named[name]}.{part}": t for name, layer in layers.items() for part, t in layer.items()}
    kind = {"ss_network_module": "lycoris.kohya", "ss_network_args": '{"algo": "full"}'}
    header = {**kind, **content.about, CONFIGS: "{}"}
    files.write_atomically(path, serialized(tensors, header))


def changes(module: nn.Module, state: AdapterState) -> dict[str, dict[str, Tensor]]:
    """Layer -> what an adapter adds to its weight (`diff`) and its bias (`diff_b`), fp32.

    Layers of which only the bias is trained have a weight of zeros too, which A1111 and InvokeAI insist on.
    `module` is the base's, and has the adapter afterwards.
    """
    biases = inject.bias_changes(module, state)
    found: dict[str, dict[str, Tensor]] = {}
    for label, parameter in module.named_parameters():
        if (change := biases.get(parameter)) is not None and change.any():
            name = label.removesuffix(".bias")
            weight = module.get_parameter(f"{name}.weight")
            found[name] = {"diff": torch.zeros_like(weight), "diff_b": change}
    inject.fill(inject.put_on(module.eval(), state, inject.NAME), state)
    for name, layer in module.named_modules():
        if isinstance(layer, BaseTunerLayer):
            for part, change in _merged(layer).items():
                found.setdefault(name, {}).setdefault(part, torch.zeros_like(change)).add_(change)
    return found


def _merged(layer: Any) -> Mapping[str, Tensor]:
    """What merging adds to a layer. In fp64, as the difference of two large numbers is small."""
    base = layer.double().get_base_layer()
    before = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}
    layer.merge(safe_merge=True)
    after = {name: (p.detach() - before[name]).float().contiguous() for name, p in base.named_parameters()}
    layer.float()
    return {PARTS[name]: change for name, change in after.items() if name == "weight" or change.any()}
