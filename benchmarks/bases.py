"""Bases of real architecture with random weights, and shards of random latents, made on the spot.

`folder` makes a whole Diffusers pipeline folder (SD-1.5: 2 GB, SDXL: 7 GB), `outline` one without weights
whose components `Random` makes straight on the device, for what only times the step.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import safetensors.torch
import torch
from torch import Tensor, nn

from benchmarks.architectures import published, tokenizer
from dbtrain import tiny
from dbtrain.config import Model
from dbtrain.data import shards
from dbtrain.data.sizes import Size
from dbtrain.models.base import Base
from dbtrain.models.families.family import Family
from dbtrain.models.locate import hush
from dbtrain.models.safety import library
from dbtrain.models.weight_files import WeightFiles
from dbtrain.runtime import console, dist, files, rng

SHARD_ROWS = 16


def side_of(model: str) -> int:
    """The side of a model's images, px."""
    return 64 if model == "tiny" else published()[model].side


def model(name: str, work: Path, weights: bool = False) -> Model:
    """The config's model: the embedded base, a folder with random weights, or one without weights."""
    if name == "tiny":
        return Model(path="tiny")
    return Model(path=str((folder if weights else outline)(name, work)), variant=None)


def outline(model: str, work: Path) -> Path:
    """The model's folder without weights: index, configs, tokenizers and scheduler."""
    return _made(model, work, weights=False)


def folder(model: str, work: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """The model's folder with random weights as `dtype` safetensors; `tiny` is the embedded base."""
    return _made(model, work, weights=True, dtype=dtype)


def _made(model: str, work: Path, weights: bool, dtype: torch.dtype = torch.bfloat16) -> Path:
    if model == "tiny":
        return tiny.path()
    place = work / "bases" / (f"{model}-{str(dtype).removeprefix('torch.')}" if weights else model)
    if not place.exists():
        files.write_folder_atomically(place, lambda part: _fill(model, part, weights, dtype))
    return place


def _fill(model: str, place: Path, weights: bool, dtype: torch.dtype) -> None:
    hush()
    kind = published()[model]
    classes, makers, encoders = kind.classes(), kind.makers(), kind.the_family.text_encoders
    index: dict[str, Any] = {
        "_class_name": kind.the_family.pipeline, "_diffusers_version": "0.38.0", **kind.index,
        **{name: [library(name), found] for name, found in classes.items()},
    }  # fmt: skip
    with console.bar(len(makers), f"random {model}", "component") as bar:
        for name, make in makers.items():
            if weights:
                part: Any = randomized(make, name, dtype)
                part.save_pretrained(place / name)
                del part
            else:
                with torch.device("meta"):
                    part = make()
                (place / name).mkdir()
                part.config.architectures = None
                _save_config(part, place / name)
            bar.update()
    for encoder in makers.keys() & encoders.keys():
        words = encoders[encoder]
        tokenizer(classes[words], kind.tokens).save_pretrained(place / words)
    name, settings = kind.scheduler
    getattr(diffusers, name)(**settings).save_pretrained(place / "scheduler")
    files.write(place / "model_index.json", json.dumps(index, indent=1) + "\n")


def _save_config(part: Any, place: Path) -> None:
    if isinstance(part.config, dict):  # a Diffusers model
        part.save_config(place)
    else:
        part.config.save_pretrained(place)


def randomized(make: Callable[[], Any], name: str, dtype: torch.dtype) -> nn.Module:
    """A module with weights drawn straight on this rank's device, in `dtype`: small normals, norms at 1.

    Drawn in their own dtype and place, as fp32 SDXL on a CPU first would take minutes.
    """
    with torch.device("meta"):
        module: nn.Module = make()
    module = module.to(dtype).to_empty(device=dist.device())
    draw = torch.Generator(dist.device()).manual_seed(rng.seed_of("benchmark base", name))
    with torch.no_grad():
        for label, value in module.named_parameters():
            _fill_weight(label, value, draw)
        for label, buffer in module.named_buffers():
            assert label.endswith("position_ids"), f"a buffer that to_empty() left without content: {label}"
            buffer.copy_(torch.arange(buffer.shape[-1], device=buffer.device).expand_as(buffer))
    return module.requires_grad_(False).eval()


def _fill_weight(label: str, value: Tensor, draw: torch.Generator) -> None:
    if value.ndim > 1:
        value.normal_(0.0, value[0].numel() ** -0.5, generator=draw)
    else:
        value.fill_(float("norm" in label and label.endswith("weight")))


class Drawn(WeightFiles):
    """A component's weights in bf16, drawn when they are read, on this rank's device."""

    def __init__(self, component: str, module: nn.Module) -> None:
        self.component, self.tensors = component, module.state_dict()

    @property
    def names(self) -> Collection[str]:
        return self.tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        value = torch.empty(self.shape(name), dtype=torch.bfloat16, device=dist.device())
        draw = torch.Generator(value.device).manual_seed(rng.seed_of("benchmark base", self.component, name))
        _fill_weight(name, value, draw)
        return value if rows is None else value[rows]


class Random(Base):
    """A base whose weights are drawn when they are asked for, on the device: only its configs are read."""

    @classmethod
    def of_base(cls, base: Base) -> Random:
        return cls(base.name, base.folder, base.variant, base.family)

    def load(self, component: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
        kind = self._class(component)
        if issubclass(kind, nn.Module) and not kind.__module__.startswith("diffusers"):
            return randomized(lambda: self.skeleton(component), component, dtype)
        return super().load(component, dtype, **options)

    def weights(self, component: str) -> WeightFiles:
        return Drawn(component, self.skeleton(component))

    def tensor(self, component: str, name: str) -> Tensor:
        """Ones, in place of a statistic in the weights."""
        return torch.ones(self.skeleton(component).get_buffer(name).shape)


@contextmanager
def without_weights() -> Iterator[None]:
    """In the block, bases are `Random` wherever their folder holds no weights."""
    find = Base.find

    def found(cfg: Model) -> Base:
        base = find(cfg)
        return (
            base
            if any(base.folder.glob("*/*.safetensors"))
            else Random(base.name, base.folder, None, base.family)
        )

    with mock.patch.object(Base, "find", found):
        yield


def write_shards(place: Path, model: str, base: Base, rows: int, roles: tuple[str, ...]) -> Path:
    """Shards of random latents and prompt embeddings, of the shapes that `prepare` would give."""
    if (place / shards.MANIFEST).exists():
        return place
    place.mkdir(parents=True, exist_ok=True)
    family = base.family
    space = family.space(base, Size.square(side_of(model)))
    tokens = base.config("text_encoder").get("max_position_embeddings", 77)
    if model != "tiny":
        tokens = published()[model].tokens
    draw = torch.Generator().manual_seed(0)
    made = {role: tuple(_shard(place, role, n, min(SHARD_ROWS, rows - n), space.shape, side_of(model),
                        family.stored, draw)
                        for n in range(0, rows, SHARD_ROWS)) for role in roles}  # fmt: skip
    data = safetensors.torch.save(_prompts(base, family, draw, tokens))
    (place / "prompts-000000000000.safetensors").write_bytes(data)
    prompts = shards.Prompts(
        file="prompts-000000000000.safetensors", sha256=hashlib.sha256(data).hexdigest(),
        texts=("a photo of sks mug", "a photo of a mug"),
    )  # fmt: skip
    manifest = shards.Manifest(
        version=shards.VERSION, family=family.name, base=base.name, components={},
        request={"resolution": side_of(model), "class_prompt": "a photo of a mug"},
        latent_shape=space.shape, latent_scale=space.scale, latent_shift=space.shift, prompts=prompts,
        roles=made,
    )  # fmt: skip
    files.write_atomically(place / shards.MANIFEST, manifest.text())
    return place


def _shard(
    place: Path,
    role: str,
    first: int,
    rows: int,
    shape: tuple[int, ...],
    side: int,
    stored: tuple[str, ...],
    draw: torch.Generator,
) -> shards.Shard:
    metas = [
        {"source": f"{role}{first + n}.png", "original_size": [side, side], "crop": [0, 0], "flip": False,
         "prompt": int(role == "class"), "key": f"{role}{first + n:08d}"} for n in range(rows)
    ]  # fmt: skip
    sampled = {"mean": torch.randn, "std": torch.rand}
    tensors = [{name: sampled[name](shape, generator=draw) for name in stored} for _ in metas]
    data = shards.pack([shards.Row(t, m) for t, m in zip(tensors, metas, strict=True)])
    file = f"{role}-{first // SHARD_ROWS:05d}-000000000000.tar"
    (place / file).write_bytes(data)
    keys = tuple(str(meta["key"]) for meta in metas)
    return shards.Shard(file=file, bytes=len(data), sha256=hashlib.sha256(data).hexdigest(), keys=keys)


def _prompts(base: Base, family: Family, draw: torch.Generator, tokens: int) -> dict[str, Tensor]:
    """A table of two prompts, with what the family's `embed` would give."""
    shapes = family.conditions(base)
    table = {
        f"condition.{name}": torch.randn(2, *(size or tokens for size in shape), generator=draw).to(
            family.text_dtype
        )
        for name, shape in shapes.items()
    }
    if "lengths" in shapes:
        table["condition.lengths"] = torch.full((2,), tokens)
    ids = {f"ids.{encoder}": torch.zeros(2, tokens, dtype=torch.int64) for encoder in family.text_encoders}
    return table | ids
