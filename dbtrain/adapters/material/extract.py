"""An adapter from two models: what the layers of one add to those of the other."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from dbtrain.adapters.formats.names import nested
from dbtrain.adapters.material.adapter_file import Place, shapes_of
from dbtrain.adapters.material.delta import Delta
from dbtrain.adapters.material.fit import Fit, Fits, Limit
from dbtrain.models.base import Base
from dbtrain.models.weight_files import WeightFiles
from dbtrain.runtime import rng
from dbtrain.runtime.errors import ConfigError

POSITIONS = "embeddings.position_ids"  # 0, 1, 2, ... in older files of CLIPs
SMALL = 1024  # rows or columns of a change whose SVD is computed whole
SPARE, PASSES = 16, 4  # ranks and iterations of a randomized SVD beyond those that are kept


def extracted(tuned: Base, base: Base, limit: Limit) -> tuple[dict[Place, Delta], Fits, list[str]]:
    """What a tuned model's layers have changed, and the other tensors that differ, which no LoRA holds.

    One layer at a time is in memory. Raises ConfigError if the models do not have the same layers.
    """
    found: dict[Place, Delta] = {}
    fits: Fits = {}
    others: list[str] = []
    for component in base.family.adaptable:
        now, was = tuned.weights(component), base.weights(component)
        shapes = shapes_of(base, component)
        its, theirs = weight_names(was, shapes), {_plain(name): name for name in now.names}
        for name in sorted(name for name in was.names if not name.endswith(POSITIONS)):
            module, other = its.get(name), theirs.get(_plain(name), "")
            if not other or now.shape(other) != was.shape(name):
                raise ConfigError(
                    f"{tuned.name} does not have {name} {was.shape(name)} in its {component}, as "
                    f"{base.name} has; give two models of the same architecture"
                )
            change = _change(now.read(other), was.read(name))
            if change is None:
                continue
            if not change.isfinite().all():
                raise ConfigError(f"{component}.{name} of {tuned.name} or {base.name} is not finite")
            if module is None:
                others.append(f"{component}.{name}")
            else:
                found[component, module], fits[component, module] = fitted(change, limit, module)
    if not found:
        raise ConfigError(f"no layer of {tuned.name} differs from {base.name}")
    return found, fits, others


def weight_names(files: WeightFiles, modules: Iterable[str]) -> dict[str, str]:
    """Name of a weight in the files -> its layer. Files have an older name of CLIP's layers too."""
    named = {f"{spelled}.weight": module for module in modules for spelled in (module, nested(module))}
    return {name: named[name] for name in files.names if name in named}


def _plain(name: str) -> str:
    """A tensor's name in files of any version of transformers, of which older ones nest CLIP's."""
    return name.removeprefix("text_model.")


def _change(after: Tensor, before: Tensor) -> Tensor | None:
    """The difference of two weights, fp32; None if there is none."""
    if not after.is_floating_point() or torch.equal(after, before.to(after.dtype)):
        return None
    return after.float() - before.float()


def fitted(change: Tensor, limit: Limit, module: str) -> tuple[Delta, Fit]:
    """A change within a limit. Of a large one, only about as many ranks as are kept are computed."""
    flat = change.flatten(1)
    if limit.rank is None or limit.energy is not None or min(flat.shape) <= max(SMALL, limit.rank + SPARE):
        return limit.fit(Delta.of(change))
    with rng.seeded(0, "extract", module):
        u, s, v = torch.svd_lowrank(flat, min(limit.rank + SPARE, *flat.shape), PASSES)
    u, root, v = u[:, : limit.rank], s[: limit.rank].sqrt(), v[:, : limit.rank]
    up, down = u * root, (v * root).T
    delta = Delta(up.double(), down.double(), tuple(change.shape[1:]))
    return delta, Fit(limit.rank, flat.norm().item(), (flat - up @ down).norm().item())
