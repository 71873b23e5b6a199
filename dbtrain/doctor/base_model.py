"""The base model: what is there of it, from names, sizes and headers; no weights are read."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open

from dbtrain.adapters import targets
from dbtrain.config.adapter import AdapterSettings
from dbtrain.doctor.case import Case, Found, error, ok, refused, ruled, size, warning
from dbtrain.models.base import Base
from dbtrain.models.families.family import Family
from dbtrain.models.pretrained import Pretrained
from dbtrain.runtime import files
from dbtrain.runtime.errors import ConfigError, reason

PICKLES = ("*.bin", "*.ckpt", "*.pt")


def model(case: Case) -> Iterator[Found]:
    """The folder, its family, and each component that is used."""
    path = case.cfg.model.path
    try:
        here = Pretrained.here(case.cfg.model)
        if here is None:
            yield from _absent(path)
            return
        base = Base.of(here, case.cfg.model)
    except ConfigError as problem:
        yield from refused(problem, "give a whole Diffusers folder, a Hub id, or tiny")
        return
    found = [line for name in models_of(base.family) for line in _weights(base, name)]
    for name in base.family.text_encoders.values():
        cure = f"copy the vocabulary of {name} into that folder"
        found += ruled(lambda name=name: base.check_vocabulary(name), cure)  # type: ignore[misc]
    if case.cfg.prepare:
        side = case.cfg.prepare.resolution
        found += ruled(lambda: base.family.space(base, side), "use another prepare.resolution")
    yield from found
    case.base = base
    total = sum(file.stat().st_size for name in models_of(base.family) for file in weight_files(base, name))
    if not any(line.level == "error" for line in found):
        yield ok(f"{path}: {base.family.name}, {size(total)} of weights in {base.folder}")


def models_of(family: Family) -> list[str]:
    """The components that have weights."""
    return [family.denoiser, *([family.vae] if family.vae else []), *family.text_encoders]


def _absent(path: str) -> Iterator[Found]:
    """A base that is still to come."""
    if files.expand(path).is_file():
        yield warning(
            f"{path} is one file: the first start makes a Diffusers folder of it in {files.cache()}",
            "nothing to do; or start `dbtrain prepare` once before the job",
        )
    elif _offline():
        yield error(
            f"model.path is '{path}': no folder here, not in the Hub's cache, and HF_HUB_OFFLINE is set",
            f"on a machine with network, unset HF_HUB_OFFLINE and run: hf download {path}",
        )
    else:
        yield warning(
            f"model.path is '{path}': not in the Hub's cache, so that the job would download it first "
            "(whether it can was not tried)",
            f"run before the job: hf download {path}",
        )


def _offline() -> bool:
    from huggingface_hub.constants import is_offline_mode

    return is_offline_mode()


def weight_files(base: Pretrained, component: str) -> list[Path]:
    """The safetensors files of a component, in the variant asked for."""
    return [path for path in sorted((base.folder / component).glob("*.safetensors"))
            if _variant(path.name.removesuffix(".safetensors")) == base.variant]  # fmt: skip


def _variant(stem: str) -> str | None:
    """The variant in a file's name: `fp16` of `model.fp16-00001-of-00002`; None without one."""
    return stem.partition(".")[2].partition("-")[0] or None


def _weights(base: Pretrained, component: str) -> Iterator[Found]:
    """What is wrong with a component's files of weights."""
    folder = base.folder / component
    there, other = weight_files(base, component), sorted(folder.glob("*.safetensors"))
    own = files.expand(base.name).exists()
    fetch = "copy the folder again, whole" if own else f"get the whole model: hf download {base.name}"
    if not there and other:
        variant = _variant(other[0].name.removesuffix(".safetensors"))
        yield error(
            f"{folder} has no weights of variant {base.variant or 'null'}, but {other[0].name}",
            f"set model.variant: {variant or 'null'}",
        )
    elif not there and (pickles := [path.name for kind in PICKLES for path in folder.glob(kind)]):
        yield error(
            f"{folder} holds its weights as a pickle only ({pickles[0]}), which may run code: not read",
            "get its .safetensors files, or convert it where you trust it, with Diffusers' "
            "save_pretrained(safe_serialization=True)",
        )
    elif not there:
        yield error(f"{folder} holds no weights (*.safetensors)", fetch)
    lacking = sorted({name for index in _indices(base, folder) for name in _named(index)})
    if missing := [name for name in lacking if not (folder / name).is_file()]:
        yield error(f"{folder} lacks {len(missing)} of {len(lacking)} files, e.g. {missing[0]}", fetch)
    for path in there:
        try:
            with safe_open(path, framework="np"):  # reads the header, and checks the file's length by it
                pass
        except (SafetensorError, OSError) as problem:
            yield error(f"{path} is damaged or cut off: {reason(problem)}", fetch)


def _indices(base: Pretrained, folder: Path) -> list[Path]:
    """Indices of sharded weights in the variant asked for: `model.safetensors.index.fp16.json`."""
    end = f".index.{base.variant}.json" if base.variant else ".index.json"
    return [path for path in folder.glob("*.safetensors.index*.json") if path.name.endswith(end)]


def _named(index: Path) -> set[str]:
    """The files that an index of sharded weights names."""
    try:
        return set(json.loads(index.read_text())["weight_map"].values())
    except (ValueError, LookupError, AttributeError, TypeError):
        raise ConfigError(f"{index} is no index of weights; copy the model's folder again") from None


def adapter(case: Case) -> Iterator[Found]:
    """What the adapter is on, from the names and shapes in the headers of the weights."""
    parts = [part for part in _parts(case) if weight_files(case.base, part[0])]
    for component, cfg, part in parts:
        modules = targets.Modules.of_layers(_class_of(case.base, component), _layers(case.base, component))
        yield from ruled(lambda: targets.select(modules, cfg.targets, part), "use attention")  # noqa: B023
    total = adapter_bytes(case) // 4
    names = " and ".join(f"{cfg.kind} of rank {cfg.rank} on {component}" for component, cfg, _ in parts)
    yield ok(f"{names}: about {total:,} parameters" if total else "not known without weights")


def _parts(case: Case) -> list[tuple[str, AdapterSettings, str]]:
    """(component, settings, row of PRESETS) of each adapter."""
    family = case.base.family
    found: list[tuple[str, AdapterSettings, str]] = [(family.denoiser, case.cfg.adapter, "denoiser")]
    if case.cfg.adapter.text_encoder:
        found += [(name, case.cfg.adapter.text_encoder, "text_encoder") for name in family.text_encoders]
    return found


def adapter_bytes(case: Case) -> int:
    """About how large the adapter is, fp32; 0 where its targets select nothing."""
    count = 0
    for component, cfg, part in _parts(case):
        layers = _layers(case.base, component)
        modules = targets.Modules.of_layers(_class_of(case.base, component), layers)
        try:
            chosen = targets.selected(modules, targets.select(modules, cfg.targets, part))
        except ConfigError:  # which `adapter` tells
            continue
        sizes = [layers[name][0] + math.prod(layers[name][1:]) for name in chosen]
        count += cfg.rank * sum(sizes) * (2 if cfg.kind == "loha" else 1)
    return 4 * count


def _class_of(base: Base, component: str) -> str:
    return str(base.index[component][1])


def _layers(base: Base, component: str) -> dict[str, list[int]]:
    """Shape of the weight of each linear and convolution layer of a component, by the layer's name."""
    found: dict[str, list[int]] = {}
    for path in weight_files(base, component):
        with safe_open(path, framework="np") as file:
            names: list[str] = list(file.keys())
            shapes = {name: file.get_slice(name).get_shape() for name in names if name.endswith(".weight")}
        found |= {n.removesuffix(".weight"): shape for n, shape in shapes.items() if len(shape) in (2, 4)}
    return found


def hub(case: Case) -> Iterator[Found]:
    """A token, where the result is to be pushed."""
    from dbtrain.export import hub as verb

    repo = case.cfg.hub.repo
    found = ruled(lambda: verb.check(case.cfg), "run: hf auth login")
    yield from found
    if repo and not found and _offline():
        yield error(f"hub.repo is '{repo}', but HF_HUB_OFFLINE is set: nothing can be pushed",
                    "unset it, or set hub.repo: null and push later with `dbtrain export`")  # fmt: skip
    elif not found:
        token = "HF_TOKEN" if os.environ.get("HF_TOKEN") else "hf auth login"
        yield ok(f"{repo}: there is a token, of {token}; not tried" if repo else "hub.repo is null: no push")
