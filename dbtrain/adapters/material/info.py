"""What an adapter file holds, without the base that it is for."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from dbtrain.adapters.formats import peft_folder
from dbtrain.adapters.formats.common import by_module, strength
from dbtrain.adapters.material.adapter_file import AdapterFile
from dbtrain.adapters.material.delta import delta_of
from dbtrain.adapters.state import MAGNITUDE, AdapterState
from dbtrain.runtime import files

KINDS = {"LORA": "LoRA", "LOHA": "LoHa", "LOKR": "LoKr"}
# What the entries of headers say about the base, best first.
BASES = ("modelspec.architecture", "ss_base_model_version", "ss_sd_model_name", "base_model_name_or_path")
# (a layer's name, how many inputs it has) -> the models that have it, where the header does not say.
CROSS = r".*(down|mid|up|input|middle|output)_block.*attn2[._]to_k"
HAVE = (
    (CROSS, 768, "Stable Diffusion 1"), (CROSS, 1024, "Stable Diffusion 2"), (CROSS, 2048, "SDXL"),
    (r".*(double_blocks|single_transformer_blocks).*", None, "FLUX or Chroma"),
    (r".*joint_blocks.*", None, "Stable Diffusion 3"),
)  # fmt: skip
SHOWN = ("ss_", "modelspec.", "sshs_")  # how the entries begin that a table shows
WIDTH = 100  # characters of a value in a table


def info(source: AdapterFile) -> dict[str, Any]:
    """What a file holds, as values for JSON."""
    header = dict(source.header)
    if source.form == "peft":
        for state in source.states.values():
            if name := state.config.get(BASES[-1]):
                header[BASES[-1]] = str(name)
    paths = [source.path] if source.path.is_file() else sorted(source.path.rglob(peft_folder.WEIGHTS))
    said = next((header[key] for key in BASES if header.get(key)), None)
    return {
        "path": str(source.path), "format": source.form, "bytes": sum(path.stat().st_size for path in paths),
        "dtypes": _dtypes(paths), "base": said or _base_by_layers(source),
        "parts": {name: _part(state) for name, state in source.states.items()},
        "words": list(source.words), "header": dict(sorted(header.items())),
    }  # fmt: skip


def _dtypes(paths: list[Path]) -> list[str]:
    """The dtypes of the tensors, the most frequent first."""
    found: Counter[str] = Counter()
    for path in paths:
        with safe_open(path, "pt") as file:
            found.update(file.get_slice(name).get_dtype() for name in file.keys())  # noqa: SIM118
    return [name for name, _ in found.most_common()]


def _base_by_layers(source: AdapterFile) -> str | None:
    """The models that have a layer of the adapter."""
    for state in source.states.values():
        for module, layer in by_module(state).items():
            for pattern, inputs, models in HAVE:
                if re.fullmatch(pattern, module) and inputs in (None, delta_of(layer, 1.0).down.shape[1]):
                    return f"{models}, by its layers"
    return None


def _part(state: AdapterState) -> dict[str, Any]:
    layers = by_module(state)
    sizes = {module: strength(state.config, module) for module in layers}
    ranks = Counter(rank for rank, _ in sizes.values())
    alphas = Counter(_rounded(rank * scale) for rank, scale in sizes.values())
    dora = any(MAGNITUDE in layer for layer in layers.values())
    norms = [delta_of(layer, sizes[module][1]).norm for module, layer in layers.items()]
    return {
        "kind": "DoRA" if dora else KINDS[state.config["peft_type"]],
        "layers": len(layers), "parameters": sum(tensor.numel() for tensor in state.tensors.values()),
        "rank": ranks.most_common(1)[0][0], "alpha": alphas.most_common(1)[0][0],
        "ranks": _exceptions({module: rank for module, (rank, _) in sizes.items()}),
        "alphas": _exceptions({module: _rounded(rank * scale) for module, (rank, scale) in sizes.items()}),
        # Of a DoRA, that of the product of its factors: the rest depends on the base.
        "norm": math.hypot(*norms),
    }  # fmt: skip


def _rounded(value: float) -> float:
    """A float without the error of one division; an int where it is whole."""
    value = float(f"{value:.6g}")
    return int(value) if value.is_integer() else value


def _exceptions(values: Mapping[str, float]) -> dict[str, float]:
    """The layers that do not have the most frequent value."""
    usual = Counter(values.values()).most_common(1)[0][0]
    return {module: value for module, value in values.items() if value != usual}


def table(about: Mapping[str, Any]) -> Iterator[str]:
    """What `info` found, in lines for people."""
    size = files.size_text(about["bytes"])
    yield f"{about['path']}: {about['format']}, {size}, {', '.join(about['dtypes'])}"
    yield f"base: {about['base'] or 'the file does not say'}"
    for name, part in about["parts"].items():
        yield (
            f"{name}: {part['kind']} of rank {part['rank']}, alpha {part['alpha']:g}, {part['layers']} "
            f"layers, {part['parameters']:,} parameters, norm of the update {part['norm']:.4g}"
        )
        for what in ("ranks", "alphas"):
            yield from (
                f"  {what.removesuffix('s')} {value:g}: {names}" for value, names in _grouped(part[what])
            )
    if about["words"]:
        yield f"learned words: {', '.join(about['words'])}"
    for key, value in about["header"].items():
        if key.startswith(SHOWN):
            yield f"{key}: {value if len(value) <= WIDTH else value[: WIDTH - 1] + '…'}"


def _grouped(exceptions: Mapping[str, float]) -> Iterator[tuple[float, str]]:
    """(value, the layers that have it) of exceptions, of many layers only the first."""
    for value in sorted(set(exceptions.values())):
        names = sorted(module for module, its in exceptions.items() if its == value)
        yield value, names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def as_json(values: Any) -> str:
    return json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False)
