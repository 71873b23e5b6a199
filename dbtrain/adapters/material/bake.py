"""A base with adapters merged into its weights, as a Diffusers folder of its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from dbtrain.adapters.material.adapter_file import AdapterFile, shapes_of
from dbtrain.adapters.material.delta import Delta
from dbtrain.adapters.material.extract import weight_names
from dbtrain.adapters.material.merge import aligned, summed
from dbtrain.models.base import Base
from dbtrain.models.weight_files import WeightFiles
from dbtrain.runtime import files
from dbtrain.runtime.errors import ConfigError

BAKED = "baked.json"  # in every baked folder: the names of its base and adapters
PICKLES = (".bin", ".ckpt", ".pt", ".msgpack", ".h5")
Changes = Mapping[str, Callable[[], Delta]]  # by layer
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def bake(out: Path, base: Base, parts: Sequence[tuple[AdapterFile, float]]) -> tuple[int, int]:
    """Write the base with a weighted sum of adapters merged in; return how many layers changed, and bytes.

    Files are copied, and the changed weights overwritten in the copies, one at a time: each keeps its dtype,
    and nothing else changes. The folder gets its name once it is complete. Raises ConfigError if it would
    replace anything but an earlier result, if an adapter does not fit the base, or if the base's weights are
    quantized.
    """
    _check_free(out, base.folder, [source.path for source, _ in parts])
    rules = aligned([source for source, _ in parts])
    weights = [weight for _, weight in parts]
    changes = {place: partial(summed, which, weights) for place, which in rules.items()}
    components = sorted({component for component, _ in changes})
    if packed := [name for name in components if base.packed(name)]:
        raise ConfigError(f"the {packed[0]} of {base.name} has 4-bit weights; use the model in bf16 or fp16")

    def fill(folder: Path) -> None:
        shutil.copy(base.folder / "model_index.json", folder)
        about = {"base": Path(base.name).name, "adapters": [[one.path.name, weight] for one, weight in parts]}
        files.write(folder / BAKED, json.dumps(about) + "\n")
        for name in base.index:
            if (base.folder / name).is_dir():
                kept = base.weights(name).paths if name in components else []
                shutil.copytree(
                    base.folder / name, folder / name, ignore=partial(_left_out, kept),
                    copy_function=shutil.copyfile,
                )  # fmt: skip
        for component in components:
            mine = {module: rule for (where, module), rule in changes.items() if where == component}
            _patch(base.weights(component), folder / component, mine, shapes_of(base, component))

    files.write_folder_atomically(out.resolve(), fill)
    return len(changes), sum(path.stat().st_size for path in out.rglob("*") if path.is_file())


def _check_free(out: Path, base: Path, adapters: Sequence[Path]) -> None:
    """Raise ConfigError if a folder at `out` would replace anything but an empty or baked one."""
    where = out.resolve()
    for path in (base, *adapters):
        if path.resolve().is_relative_to(where):
            raise ConfigError(f"OUT is '{out}', which holds {path}; give another folder")
    if where.is_relative_to(base.resolve()):
        raise ConfigError(f"OUT is '{out}', a folder in the base; give another one")
    if where.exists() and not (where / BAKED).is_file() and (where.is_file() or any(where.iterdir())):
        raise ConfigError(f"OUT is '{out}', which bake did not write; give another folder, or remove it")


def _left_out(kept: Sequence[Path], folder: str, names: Sequence[str]) -> list[str]:
    """The files in a component's folder that are not copied: pickles, and variants of changed weights."""
    chosen = {path.name for path in kept}
    others = [name for name in names if chosen and name.endswith(".safetensors") and name not in chosen]
    return [*others, *(name for name in names if name.endswith(PICKLES))]


def _patch(was: WeightFiles, folder: Path, changes: Changes, modules: Iterable[str]) -> None:
    """Add changes to the weights of the layers in copies of files."""
    names, left = weight_names(was, modules), set(changes)
    for path in was.paths:
        with open(folder / path.name, "r+b") as file:
            start = 8 + (length := int.from_bytes(file.read(8), "little"))
            header = json.loads(file.read(length))
            for name, entry in header.items():
                module = names.get(name)
                if module is None or module not in changes:
                    continue
                if entry["dtype"] not in DTYPES:
                    raise ConfigError(f"{path} has {name} in {entry['dtype']}; use the model in bf16 or fp16")
                weight = was.read(name)
                changed = (weight.double() + changes[module]().whole.reshape(weight.shape)).to(weight.dtype)
                if not changed.isfinite().all():
                    raise ConfigError(
                        f"{module} would not be finite in {entry['dtype']}; use smaller weights"
                    )
                file.seek(start + entry["data_offsets"][0])
                file.write(changed.contiguous().view(torch.uint8).numpy().tobytes())
                left.discard(module)
    if left:
        raise ConfigError(f"the files of the base have no weight of {min(left)}")
