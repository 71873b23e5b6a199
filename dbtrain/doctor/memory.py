"""How much memory training takes, before it starts: one step of the real loop on tensors without content.

The model is made from the base's config files alone, and `train_step` itself runs on it under torch's
FakeTensorMode: each operator says which tensors it would make, and computes none. What lives at once is
counted, so that checkpointing, precisions, adapters and families need no formulas of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dbtrain.config import Config
from dbtrain.data.batch import Batch
from dbtrain.data.dataloader import LatentStream
from dbtrain.data.order import RankSlice
from dbtrain.data.shards import HELD_OUT, Manifest
from dbtrain.data.storage import Storage
from dbtrain.doctor.memory_counter import MemoryCounter, like_cuda
from dbtrain.models.base import Base
from dbtrain.models.families.family import Family, LatentSpace
from dbtrain.models.precision import PRECISIONS
from dbtrain.runtime import dist
from dbtrain.runtime.errors import ConfigError
from dbtrain.train import optim
from dbtrain.train.checkpoint import Progress
from dbtrain.train.dreambooth import DreamBooth
from dbtrain.train.step import train_step

GIB = 2**30
BLOCK = {"cuda": 512, "cpu": 64}  # a tensor takes a multiple of this, bytes
# What a GPU needs besides tensors, estimated: its context and the libraries' workspaces, GiB, and the
# share of memory that lies idle between tensors.
CONTEXT_GIB, IDLE = 0.6, 0.04


@dataclass(frozen=True)
class Prediction:
    """Bytes on one rank's device at the fullest moment of a step."""

    base: int  # frozen weights, and what else the model holds: prompt table, noise schedule
    adapter: int
    moments: int
    activations: int  # and what operators make and drop again
    gradients: int  # those that live throughout: of the micro-batch before, or in DDP's buckets
    drawing: int = 0  # of pictures for validation, between two steps: in place of the activations

    @property
    def peak(self) -> int:
        """Of all tensors: what `torch.cuda.max_memory_allocated` tells of a run."""
        resident = self.base + self.adapter + self.moments + self.gradients
        return resident + max(self.activations, self.drawing)

    @property
    def needed(self) -> int:
        """The peak, and an estimate of what a GPU needs besides tensors."""
        return int(self.peak * (1 + IDLE) + CONTEXT_GIB * GIB)


def predict(cfg: Config, base: Base, device: str, ranks: int = 1) -> Prediction:
    """The memory that training as `cfg` says takes on each of `ranks` devices: `cuda` or `cpu`.

    Reads the base's config files and tokenizers, no weights. A compiled run is predicted as if it were
    not; it keeps less. Raises ConfigError where training would.
    """
    family = base.family
    hollow = _Hollow(base.name, base.folder, base.variant, family)
    shapes = _Shapes.of(cfg, base)
    accumulated = cfg.train.global_batch > cfg.train.micro_batch * ranks
    share = RankSlice(cfg.train.micro_batch, cfg.train.micro_batch)
    table, stored = _content(hollow, shapes)
    model = DreamBooth.build(hollow, shapes.manifest(), table, cfg)
    vae = hollow.load(family.vae) if family.vae else None
    math = like_cuda() if device == "cuda" else nullcontext()
    with FakeTensorMode(), math, MemoryCounter(BLOCK[device]) as counter:
        _filled(model)
        adapter = counter.of(model.trainable().values())
        base_bytes = counter.live - adapter
        progress = _with_moments(model, cfg)
        held = counter.peak = counter.live
        train_step(model, progress, cast(LatentStream, _Rows(shapes, family, stored, share)), 0, cfg)
        activations = counter.peak - held
        drawing = _drawing(counter, model, vae, shapes, family, stored, cfg) if cfg.validation.prompts else 0
    kept = adapter if accumulated or ranks > 1 or cfg.train.cuda_graph else 0
    return Prediction(base_bytes, adapter, held - base_bytes - adapter, activations, kept, drawing)


def _drawing(
    counter: MemoryCounter,
    model: DreamBooth,
    vae: Any,
    shapes: _Shapes,
    family: Family,
    stored: Mapping[str, Tensor],
    cfg: Config,
) -> int:
    """What a look at the run takes besides what lives throughout: the denoiser with guidance, or the VAE."""
    rows = min(cfg.sample.batch, cfg.validation.images) * (2 if cfg.sample.guidance > 1 else 1)
    alone = replace(shapes, roles=1)
    before = counter.peak = counter.live
    with torch.no_grad(), model.working_copies.in_place():
        with PRECISIONS[cfg.train.precision].forward(torch.device("cpu")):
            model(next(_Rows(alone, family, stored, RankSlice(rows, rows))))
        if vae:
            _filled(vae).decode(torch.empty(1, *shapes.space.shape), return_dict=False)
    return counter.peak - before


def cheaper(cfg: Config) -> Iterator[tuple[dict[str, Any], Config]]:
    """Settings under `train` that take less memory, and the config with them: the cheapest in speed first."""
    train = cfg.train
    smaller = [n for n in range(train.micro_batch - 1, 0, -1) if train.global_batch % n == 0]
    modes = ("none", "transformer", "blocks")
    stronger = modes[modes.index(train.gradient_checkpointing) + 1 :]
    changes: dict[str, Any] = {}
    for name, values in (
        ("micro_batch", smaller), ("gradient_checkpointing", stronger),
        ("base_linears", ["int8"] if train.base_linears == "full" else []),
    ):  # fmt: skip
        for value in values:
            changes = changes | {name: value}
            yield changes, cfg.model_copy(update={"train": train.model_copy(update=changes)})


def _content(base: Base, shapes: _Shapes) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A prompt table and one stored image, as `prepare` would make them: tensors without content."""
    tokenizers = {encoder: base.load(name) for encoder, name in base.family.text_encoders.items()}
    ids = base.family.tokenize(tokenizers, [""] * shapes.prompts)
    encoders = {name: base.load(name) for name in base.family.text_encoders}
    vae = base.load(base.family.vae) if base.family.vae else None
    with FakeTensorMode() as fake, torch.no_grad():
        stored = base.family.encode_images(vae and _filled(vae), torch.empty(1, 3, shapes.side, shapes.side))
        given = {name: fake.from_tensor(tensor) for name, tensor in ids.items()}
        condition = base.family.embed({name: _filled(part) for name, part in encoders.items()}, given)
    table = {f"condition.{name}": tensor for name, tensor in condition.items()}
    table |= {f"ids.{name}": tensor for name, tensor in ids.items()}
    return _empty(table), _empty(stored)


def _empty(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in tensors.items()}


class _Hollow(Base):
    """A base whose components come without their weights."""

    def load(self, component: str, dtype: torch.dtype = torch.float32) -> Any:
        if not issubclass(self._class(component), nn.Module):
            return super().load(component)
        return self.skeleton(component).to(dtype).requires_grad_(False).eval()


def _filled(module: Any) -> Any:
    """The module with each tensor, wherever it was, replaced by one that the modes in force made."""
    made: dict[int, Tensor] = {}

    def like(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:  # T5 has one weight under two names
            new = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
            made[id(tensor)] = (
                nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
            )
        return made[id(tensor)]

    keep = []  # ids are only unique among the living
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    keep.append(tensor)
                    tensors[name] = like(tensor)
    return module


@dataclass(frozen=True)
class _Shapes:
    """The shapes of what is trained on."""

    side: int  # px
    space: LatentSpace
    roles: int  # instance images, and class images
    prompts: int

    @classmethod
    def of(cls, cfg: Config, base: Base) -> _Shapes:
        """As `prepare` says, or as the shards are. Raises ConfigError if there is neither."""
        if cfg.prepare is None:
            manifest = Manifest.read(Storage(cfg.data.shards, cfg.faults.retries))
            side = manifest.request["resolution"]
            roles = len(manifest.roles.keys() & HELD_OUT.keys())
            prompts = len(manifest.prompts.texts)
        else:
            side, roles = cfg.prepare.resolution, 2 if cfg.prepare.class_prompt else 1
            prompts = roles if not cfg.prepare.captions else 1000  # more than rows: each row is encoded
        roles = roles if cfg.loss.prior_weight else 1
        return cls(side, base.family.space(base, side), roles, prompts)

    def manifest(self) -> Manifest:
        """What the model is told of the shards."""
        space = self.space
        told: Any = {"latent_shape": space.shape, "latent_scale": space.scale, "latent_shift": space.shift}
        return Manifest.model_construct(**told)


class _Rows:
    """A stream of micro-batches without content."""

    device = torch.device("cpu")

    def __init__(
        self, shapes: _Shapes, family: Family, stored: Mapping[str, Tensor], share: RankSlice
    ) -> None:
        self.shapes, self.family, self.stored, self.share = shapes, family, stored, share

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        rows, side = self.share.micro_batch * self.shapes.roles, self.shapes.side
        shape = (rows, *self.shapes.space.shape)
        extra = self.family.row({"original_size": (side, side), "crop": (0, 0)}, side)

        def like(values: Mapping[str, Tensor], skip: int) -> dict[str, Tensor]:
            return {n: torch.empty(rows, *t.shape[skip:], dtype=t.dtype) for n, t in values.items()}

        return Batch(
            stored=like(self.stored, 1), posterior=torch.empty(shape), noise=torch.empty(shape),
            u=torch.empty(rows), prompt=torch.empty(rows, dtype=torch.int64), weight=torch.empty(rows),
            level=torch.empty(rows), position=torch.empty(rows, dtype=torch.float64),
            extra=like(extra, 0), first=0, seen=0,
        )  # fmt: skip


def _with_moments(model: DreamBooth, cfg: Config) -> Progress:
    """What the second step begins with, and all that follow."""
    scaler = torch.amp.GradScaler("cpu", enabled=PRECISIONS[cfg.train.precision].scaled)
    optimizer = optim.build(model.trainable(), cfg.optim)
    for parameter in model.trainable().values():
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return Progress(model, optimizer, scaler, torch.zeros((), dtype=torch.int64))


def report(cfg: Config, gib: float | None = None, ranks: int = 1) -> Iterator[str]:
    """What training takes on each of `ranks` devices, line by line, and what would fit if that does not.

    `gib`: memory of the GPU to train on, if it is not this machine's. Without either, for the CPU.
    Raises ConfigError at its end, with what would fit, if it does not.
    """
    base = Base.find(cfg.model)
    device = "cuda" if gib or torch.cuda.is_available() else "cpu"
    found = predict(cfg, base, device, ranks)
    yield f"of training on a {'GPU' if device == 'cuda' else 'CPU (--gib SIZE: on a GPU)'}, GiB"
    yield from _table(found, device)
    if cfg.train.compile:
        yield "train.compile is on: it keeps fewer activations than these, which are eager training's"
    if device == "cpu":
        return
    has = gib * GIB if gib else torch.cuda.get_device_properties(dist.device()).total_memory
    if found.needed <= has:
        yield f"fits into {has / GIB:.1f} GiB"
        return
    problem = f"training needs {found.needed / GIB:.2f} GiB, and so does not fit into {has / GIB:.1f} GiB"
    yield f"does not fit into {has / GIB:.1f} GiB; trying what takes less"
    without = ""
    if found.drawing > found.activations:  # then nothing under `train` helps
        without = "validation.prompts=[] "
        cfg = cfg.model_copy(update={"validation": cfg.validation.model_copy(update={"prompts": ()})})
        needed = replace(found, drawing=0).needed
        yield f"  {without}: {needed / GIB:.2f}{', fits' if needed <= has else ''}"
        if needed <= has:
            raise ConfigError(f"{problem}; use {without.strip()}: then no pictures are drawn")
    for changes, other in cheaper(cfg):
        words = without + " ".join(f"train.{name}={value}" for name, value in changes.items())
        try:
            needed = predict(other, base, device, ranks).needed
        except ConfigError as error:  # a denoiser without transformer blocks
            yield f"  {words}: {error}"
            continue
        yield f"  {words}: {needed / GIB:.2f}{', fits' if needed <= has else ''}"
        if needed <= has:
            raise ConfigError(f"{problem}; use {words}")
    raise ConfigError(
        f"{problem}, nor does any of these; a smaller adapter.rank or prepare.resolution may, or a larger GPU"
    )


def _table(found: Prediction, device: str) -> Iterator[str]:
    rows = [
        ("base", found.base), ("adapter", found.adapter), ("optimizer", found.moments),
        ("activations", found.activations), ("accumulated gradients", found.gradients),
        *([("or, for validation, pictures", found.drawing)] if found.drawing else []), ("peak", found.peak),
    ]  # fmt: skip
    if device == "cuda":
        rows.append(("with context, workspaces and gaps (estimated)", found.needed))
    yield from (f"  {name:46} {size / GIB:8.3f}" for name, size in rows)
