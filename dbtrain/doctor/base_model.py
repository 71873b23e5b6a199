"""The base model: checks of file names, sizes and headers. No weights are read."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open

from dbtrain.adapters import targets, tokens
from dbtrain.config import Model
from dbtrain.config.adapter import AdapterSettings
from dbtrain.doctor.case import Case, Finding, error, findings_of, ok, problems_of, warning
from dbtrain.models.base import Base
from dbtrain.models.locate import EMBEDDED
from dbtrain.models.pretrained import Pretrained
from dbtrain.prepare import images
from dbtrain.runtime import files
from dbtrain.runtime.errors import ConfigError, reason
from dbtrain.runtime.run_folder import RunFolder
from dbtrain.train import training_adapter

TOY_SIDE = 64  # px of the images that the embedded base was trained on
# Words of the names of models that were distilled to a few steps.
FEW_STEPS = re.compile(r"(?i)(?<!de-)(?<![a-z])(turbo|lightning|schnell|distill(ed)?|lcm)(?![a-z])")


def model(case: Case) -> Iterator[Finding]:
    """The folder, its family, and each component in use."""
    path = case.cfg.model.path
    # The folder and its index.
    try:
        here = Pretrained.here(case.cfg.model)
        if here is None:
            yield from _absent(path)
            return
        base = Base.of(here, case.cfg.model)
    except ConfigError as problem:
        yield from findings_of(problem, "use a complete Diffusers folder, a Hub id, or tiny")
        return
    # Weights, vocabularies, and whether the resolution fits.
    found = [line for name in base.family.models for line in _weights(base, name)]
    few_steps = case.cfg.model.training_adapter
    found += problems_of(lambda: base.check_trains(case.cfg.adapter, few_steps), "use another base")
    found += _training_adapter(base, case.cfg.model)
    if case.cfg.adapter.start and not RunFolder(case.cfg.run_dir).checkpoints():
        from dbtrain.train import start_adapter  # loads PEFT

        cure = "use an adapter of this base, on the layers of this one"
        found += problems_of(lambda: start_adapter.check(base, case.cfg), cure)
    for name in base.family.text_encoders.values():
        cure = f"copy the vocabulary of {name} into that folder"
        found += problems_of(lambda name=name: base.check_vocabulary(name), cure)  # type: ignore[misc]
    if case.cfg.prepare:
        prepare, side = case.cfg.prepare, case.cfg.prepare.side
        found += problems_of(lambda: images.check_sizes(base, prepare), "use another prepare.resolution")
        if path == EMBEDDED and side != TOY_SIDE:
            text = f"model.path is {path}, a toy that knows drawings of {TOY_SIDE} px"
            found.append(warning(f"{text}; prepare.resolution is {side}", "use a real base model, e.g. "
                                 "model.path=stable-diffusion-v1-5/stable-diffusion-v1-5"))  # fmt: skip
    yield from found
    case.base = base
    total = sum(file.stat().st_size for name in base.family.models for file in base.weight_files(name))
    if not any(line.level == "error" for line in found):
        yield ok(f"{path}: {base.family.name}, {files.size_text(total)} of weights in {base.folder}")


def _training_adapter(base: Base, cfg: Model) -> Iterator[Finding]:
    """Problems with the training adapter, and a base that seems to need one."""
    if cfg.training_adapter is None:
        if base.family.distilled(base) is None and (word := FEW_STEPS.search(Path(cfg.path).name)):
            yield warning(
                f"model.path is {cfg.path}: by its name ('{word[0]}') it was distilled to a few steps, which "
                "training would undo",
                "train on the model that it was made from, or set model.training_adapter",
            )
    elif training_adapter.is_on_hub(cfg.training_adapter) and not training_adapter.is_here(cfg):
        yield warning(
            f"model.training_adapter: '{cfg.training_adapter}' is not in the Hub's cache, so the job would "
            "download it first (not tried here)",
            "run before the job: dbtrain fetch CONFIG",
        )
    else:
        yield from problems_of(lambda: training_adapter.read(base, cfg), "use an adapter of this base")


def _absent(path: str) -> Iterator[Finding]:
    """A base that is not here yet."""
    if files.expand(path).is_file():
        yield warning(
            f"{path} is a single file: the first run converts it to a Diffusers folder in {files.cache()}",
            "nothing to do; or run `dbtrain prepare` once before the job",
        )
    elif _offline():
        yield error(
            f"model.path: '{path}' is not a directory, not in the Hub's cache, and HF_HUB_OFFLINE is set",
            "on a machine with network access, unset HF_HUB_OFFLINE and run: dbtrain fetch CONFIG",
        )
    else:
        yield warning(
            f"model.path: '{path}' is not in the Hub's cache, so the job would download it first "
            "(not tried here)",
            "run before the job: dbtrain fetch CONFIG",
        )


def _offline() -> bool:
    from huggingface_hub.constants import is_offline_mode

    return is_offline_mode()


def _weights(base: Pretrained, component: str) -> Iterator[Finding]:
    """Problems with a component's weight files."""
    folder, fetch = base.folder / component, base.cure
    if lack := base.lack(component):
        yield error(*lack)
    # Files that an index of sharded weights names.
    named = sorted({name for index in _indices(base, component) for name in _named(index)})
    if missing := [name for name in named if not (folder / name).is_file()]:
        yield error(f"{folder} is missing {len(missing)} of {len(named)} files, e.g. {missing[0]}", fetch)
    # Headers, and the file lengths that follow from them.
    for path in base.weight_files(component):
        try:
            with safe_open(path, framework="np"):
                pass
        except (SafetensorError, OSError) as problem:
            yield error(f"{path} is damaged or truncated: {reason(problem)}", fetch)


def _indices(base: Pretrained, component: str) -> list[Path]:
    """Indices of sharded weights in the component's variant, e.g. `model.safetensors.index.fp16.json`."""
    variant = base.own_variant(component)
    end = f".index.{variant}.json" if variant else ".index.json"
    found = (base.folder / component).glob("*.safetensors.index*.json")
    return [path for path in found if path.name.endswith(end)]


def _named(index: Path) -> set[str]:
    """The files that an index of sharded weights names."""
    try:
        return set(json.loads(index.read_text())["weight_map"].values())
    except (ValueError, LookupError, AttributeError, TypeError):
        raise ConfigError(
            f"{index} is not an index of sharded weights; copy the model's folder again"
        ) from None


def adapter(case: Case) -> Iterator[Finding]:
    """The layers that the adapter is on, from the names and shapes in the weight headers."""
    parts = [part for part in _parts(case) if case.base.weight_files(part[0])]
    for component, cfg, part, presets in parts:
        modules, _ = _layers(case.base, component)
        found = problems_of(lambda: targets.select(modules, cfg.targets, part, presets), "use attention")  # noqa: B023
        if not found:
            chosen = targets.select(modules, cfg.targets, part, presets)
            found = problems_of(lambda: targets.ranks(modules, chosen, cfg, part), "use another name")  # noqa: B023
        yield from found
    if word := case.cfg.adapter.token:
        yield from problems_of(
            lambda: tokens.readers(case.base, case.cfg.learned_words, word),
            "use another word, e.g. <sks>",
        )
    total = adapter_bytes(case) // 4
    names = " and ".join(f"{cfg.kind} of rank {cfg.rank} on {component}" for component, cfg, *_ in parts)
    yield ok(f"{names}: about {total:,} parameters" if total else "unknown without weights")


def _parts(case: Case) -> list[tuple[str, AdapterSettings, str, Mapping[str, Sequence[str]] | None]]:
    """(component, settings, key in PRESETS, presets of its own) for each adapter."""
    family, text = case.base.family, case.cfg.adapter.text_encoder
    encoders = [(name, text, "text_encoder", None) for name in family.adaptable_text if text]
    return [(family.denoiser, case.cfg.adapter, "denoiser", family.presets), *encoders]


def adapter_bytes(case: Case) -> int:
    """Approximate size of the adapter in fp32, bytes; 0 if its targets select nothing."""
    return sum(
        4 * rank * (shape[0] + math.prod(shape[1:])) * (2 if kind == "loha" else 1)
        for kind, rank, shape in _chosen(case)
    )


def diff_bytes(case: Case) -> int:
    """Size of the layers that the adapter is on, in fp32, bytes."""
    return sum(4 * math.prod(shape) for *_, shape in _chosen(case))


def _chosen(case: Case) -> Iterator[tuple[str, int, list[int]]]:
    """(kind, rank, shape of the weight) of every layer that gets an adapter."""
    for component, cfg, part, presets in _parts(case):
        modules, shapes = _layers(case.base, component)
        try:
            chosen = targets.select(modules, cfg.targets, part, presets)
            ranks = targets.ranks(modules, chosen, cfg, part)
        except ConfigError:  # `adapter` reports it
            continue
        yield from ((cfg.kind, rank, shapes[name]) for name, rank in ranks.items())


def _layers(base: Base, component: str) -> tuple[targets.Modules, dict[str, list[int]]]:
    """The linear and convolution layers of a component, and the shape of each one's weight by name."""
    found: dict[str, list[int]] = {}
    for path in base.weight_files(component):
        with safe_open(path, framework="np") as file:
            names: list[str] = list(file.keys())
            for name in names:
                shape = file.get_slice(name).get_shape()
                if name.endswith(".weight") and len(shape) in (2, 4):
                    found[name.removesuffix(".weight")] = shape
    return targets.Modules.of_layers(str(base.index[component][1]), found), found


def hub(case: Case) -> Iterator[Finding]:
    """Whether the result can be pushed, if it is to be."""
    from dbtrain.export import hub as verb

    repo = case.cfg.hub.repo
    found = problems_of(lambda: verb.check(case.cfg), "run: hf auth login")
    yield from found
    if not found:
        token = "HF_TOKEN" if os.environ.get("HF_TOKEN") else "hf auth login"
        yield ok(f"{repo}: found a token ({token}), not tested" if repo else "hub.repo is null: no push")
