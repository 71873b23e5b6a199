"""Predict the memory that training takes, from one real training step on fake tensors.

The model is built from the base's config files alone. `compute_step` runs on it under torch's FakeTensorMode,
where an operator creates its output tensors without data. Counting the live tensors covers checkpointing,
precisions, adapters and families without a formula for any of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dbtrain.config import Config
from dbtrain.data.batch import Batch
from dbtrain.data.shards import Manifest, Row
from dbtrain.data.sizes import Size
from dbtrain.data.storage import Storage
from dbtrain.models import block_swap, loading
from dbtrain.models.base import Base
from dbtrain.models.families.space import LatentSpace
from dbtrain.models.memory_counter import MemoryCounter, like_cuda, materialized, needed, of_a_cpu, tensors
from dbtrain.models.precision import PRECISIONS
from dbtrain.prepare import encode
from dbtrain.runtime.rng import RowNoise
from dbtrain.train import optim
from dbtrain.train.checkpoint import Progress
from dbtrain.train.dreambooth import DreamBooth
from dbtrain.train.ema import Ema
from dbtrain.train.placement import Weights
from dbtrain.train.step import compute_step

SPARE = 0.1  # of a GPU's memory, left free where blocks stay whole only because there is room


@dataclass(frozen=True)
class Prediction:
    """Bytes on one rank's device at the peak of a step."""

    base: int  # frozen weights, prompt table, noise schedule
    adapter: int
    moments: int
    activations: int  # with temporary tensors of operators
    gradients: int  # that stay alive: of earlier micro-batches, or in DDP's buckets
    validation: int = 0  # generating its images, between steps and so in place of the activations
    gathered: int = 0  # frozen weights of other ranks, while they are here
    kept: int = 0  # blocks that each rank holds whole, if it shares others
    in_host_memory: int = 0  # frozen weights of swapped blocks; not on the device
    weights: Weights = field(default_factory=Weights)  # the denoiser's, wherever they are
    flops: int = 0  # of a micro-batch

    @property
    def peak(self) -> int:
        """Peak of all tensors, as `torch.cuda.max_memory_allocated` measures it."""
        resident = self.base + self.adapter + self.moments + self.gradients + self.gathered
        return resident + max(self.activations, self.validation)

    @property
    def needed(self) -> int:
        """The peak, plus an estimate of what a GPU needs besides tensors."""
        return needed(self.peak)

    def blocks_to_swap(self, has: float) -> int:
        """How many blocks have to be swapped to fit into a GPU of `has` bytes; all if that is not enough."""
        return block_swap.count_that_saves(self.weights.blocks, tensors(self.needed - has))

    def blocks_to_keep(self, has: float, ranks: int, recomputed: bool = True) -> int:
        """How many blocks each of `ranks` can hold whole in `has` bytes of GPU, if they share the others."""
        counts = range(len(self.weights.blocks), 0, -1)
        return next((n for n in counts if self.sharded(ranks, n, recomputed).needed <= has * (1 - SPARE)), 0)

    # The same with its frozen weights elsewhere, if all of them are on the device.

    def stored(self, weights: Weights) -> Prediction:
        """With these weights of the denoiser, quantized or not; no less than that takes."""
        return replace(
            self, base=self.base - self.weights.size + weights.size, weights=weights,
            activations=self.activations + weights.decoded,
        )  # fmt: skip

    def swapped(self, count: int) -> Prediction:
        """With `count` blocks swapped, if blocks are recomputed."""
        sizes = self.weights.blocks
        saved, moved = block_swap.saved_bytes(sizes, count), sum(block_swap.spread(sizes, count))
        return replace(self, base=self.base - saved, in_host_memory=moved)

    def sharded(self, ranks: int, kept: int = 0, recomputed: bool = True) -> Prediction:
        """With all but `kept` blocks sharded over `ranks`. `recomputed`: with gradient checkpointing."""
        if ranks == 1:
            return self
        base = self.base - self.weights.saved(ranks, kept)
        return replace(self, base=base, gathered=self.weights.gathered(ranks, kept, recomputed), kept=kept)


def ranks_together(shard: str, ranks: int, per_node: int) -> int:
    """How many of `ranks`, `per_node` of them on each node, hold the denoiser together. See train.shard."""
    return {"none": 1, "node": min(per_node, ranks), "all": ranks}[shard]


def predict(
    cfg: Config, base: Base, device: str, ranks: int = 1, per_node: int = 8, has: float = 0.0
) -> Prediction:
    """The memory that training with `cfg` takes on each of `ranks` devices; `device` is `cuda` or `cpu`.

    Of a denoiser that is shared, as many blocks stay whole as go into a GPU of `has` bytes, if that is given.
    Reads the base's config files and tokenizers, no weights. Predicts eager training; a compiled run keeps
    less. `train.swap_blocks: auto` counts as 0, see `blocks_to_swap`.
    Raises ConfigError where training would.
    """
    # The model without weights, and the shapes of its data.
    skeleton = _Skeleton(base.name, base.folder, base.variant, base.family)
    shapes = _Shapes.of(cfg, skeleton)
    table, stored = _prepared(skeleton, shapes)
    model = DreamBooth.build(skeleton, shapes.manifest(), table, cfg)
    vae = skeleton.load(base.family.vae) if base.family.vae else None
    # One step, counted in parts.
    kernels = like_cuda() if device == "cuda" else nullcontext()
    # Allocators round a tensor up to a multiple of 512 or 64 bytes.
    counter = MemoryCounter(512) if device == "cuda" else MemoryCounter(64, of_a_cpu)
    with FakeTensorMode(), kernels, counter:
        materialized(model)
        adapter = counter.of(model.trainable().values())
        weights = Weights.of(model.denoiser)
        swapped = 0 if cfg.train.swap_blocks == "auto" else cfg.train.swap_blocks
        in_host_memory = block_swap.swap(model.denoiser, swapped, torch.device("cpu"))
        # Prompts on the host take none of the device.
        model.on_host = {name: torch.empty(t.shape, dtype=t.dtype) for name, t in model.on_host.items()}
        base_bytes = counter.live - adapter - in_host_memory - counter.of(model.on_host.values())
        without_moments = counter.live
        progress = _with_moments(model, cfg)
        before = counter.peak = counter.live
        batch = partial(_batch, base, shapes, stored)
        size = cfg.train.micro_batch
        preserved = size * (shapes.roles - 1) if cfg.loss.asks_the_base else 0
        kinds = (False, True) if cfg.loss.prior == "prediction" else (False,)  # of steps: in turns
        for redraws in kinds:
            compute_step(model, progress, [batch(size * shapes.roles, preserved, redraws)], cfg)
        activations, flops = counter.peak - before, counter.flops // len(kinds)
        validation = _validation(counter, model, vae, batch, cfg) if cfg.validation.prompts else 0
    accumulated = cfg.train.global_batch > cfg.train.micro_batch * ranks
    gradients = adapter if accumulated or ranks > 1 or cfg.train.cuda_graph else 0
    found = Prediction(
        base_bytes, adapter, before - without_moments, activations, gradients, validation,
        in_host_memory=in_host_memory, weights=weights, flops=flops,
    )  # fmt: skip
    together = ranks_together(cfg.train.shard, ranks, per_node)
    recomputed = cfg.train.gradient_checkpointing != "none"
    return found.sharded(together, found.blocks_to_keep(has, together, recomputed), recomputed)


def weights_of(cfg: Config, base: Base, storage: str) -> Weights:
    """The denoiser's weights when `train.base_linears` is `storage`. Raises ConfigError as training would."""
    return Weights.of(base.denoiser(storage, PRECISIONS[cfg.train.precision].dtype))


def memory_of(device: torch.device) -> float:
    """Bytes of a GPU's memory; infinite for a CPU, which is not asked."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else math.inf


def _validation(
    counter: MemoryCounter, model: DreamBooth, vae: Any, batch: Callable[[int], Batch], cfg: Config
) -> int:
    """Bytes that validation adds to the resident tensors: the denoiser with guidance, or the VAE."""
    rows = min(cfg.sample.batch, cfg.validation.images) * (2 if cfg.sample.guidance > 1 else 1)
    before = counter.peak = counter.live
    with torch.no_grad(), model.working_copies.in_place():
        with PRECISIONS[cfg.train.precision].forward(torch.device("cpu")):
            model(batch(rows))
        if vae:
            model.family.decode(materialized(vae), torch.empty_like(batch(1).noise))
    return counter.peak - before


def _prepared(base: Base, shapes: _Shapes) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(prompt table, one stored image) as `prepare` makes them, on the meta device.

    The table has no `lengths`: all prompts count as long as the longest.
    """
    family = base.family
    tokenizers = {encoder: base.load(name) for encoder, name in family.text_encoders.items()}
    ids = family.tokenize(tokenizers, shapes.texts)
    table = encode.blank_conditions(base, shapes.prompts, encode.longest(ids))
    table |= {
        f"ids.{name}": torch.empty(shapes.prompts, *tensor.shape[1:], dtype=tensor.dtype, device="meta")
        for name, tensor in ids.items()
    }
    vae = base.load(family.vae) if family.vae else None
    with FakeTensorMode(), torch.no_grad():
        stored = family.encode_images(vae and materialized(vae), torch.empty(1, 3, *shapes.size))
    return table, {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in stored.items()
    }


class _Skeleton(Base):
    """A base that loads its components without weights."""

    def load(self, component: str, dtype: torch.dtype = torch.float32) -> Any:
        if not issubclass(self._class(component), nn.Module):
            return super().load(component)
        return self.skeleton(component, dtype)

    def fill(self, *args: Any, **options: Any) -> loading.Plain:
        return []

    def tensor(self, component: str, name: str) -> Tensor:
        """Ones in place of a statistic: only its shape matters."""
        return torch.ones(self.skeleton(component).get_buffer(name).shape)


@dataclass(frozen=True)
class _Shapes:
    """The shapes of the training data."""

    size: Size  # the largest
    space: LatentSpace
    roles: int  # 1: instance images; 2: class images too
    prompts: int
    texts: tuple[str, ...]  # some of them

    @classmethod
    def of(cls, cfg: Config, base: Base) -> _Shapes:
        """What `prepare` describes, or else what the shards have. Raises ConfigError if there is neither."""
        if cfg.prepare is None:
            manifest = Manifest.read(Storage(cfg.data.shards, cfg.faults.retries))
            sizes, images = manifest.sizes, "class" in manifest.roles
            texts = manifest.prompts.texts
            prompts = len(texts)
        else:
            sizes, images = [Size.square(cfg.prepare.side)], cfg.prepare.has_class_images
            if isinstance(cfg.prepare.buckets, tuple):
                sizes = [Size.parse(text) for text in cfg.prepare.buckets]
            each = [one.prepare for one in cfg.each_subject() if one.prepare]
            both = (text for one in each for text in (one.instance_prompt, one.class_prompt) if text)
            texts = tuple(dict.fromkeys(both))
            # With captions, more prompts than a batch has rows, so that each row is encoded.
            prompts = 1000 if cfg.prepare.captions else len(texts) + bool(cfg.data.prompt_dropout)
        roles = len(cfg.loss.role_weights(images))
        size = max(sizes, key=lambda size: size.area)
        return cls(size, base.family.space(base, size), roles, prompts, texts)

    def manifest(self) -> Manifest:
        """A manifest with what the model needs to know about the shards."""
        space = self.space
        values: Any = {
            "latent_shape": space.shape, "latent_scale": space.scale, "latent_shift": space.shift,
            "roles": {},
        }  # fmt: skip
        return Manifest.model_construct(**values)


def _batch(
    base: Base,
    shapes: _Shapes,
    stored: Mapping[str, Tensor],
    rows: int,
    preserved: int = 0,
    redraws: bool = False,
) -> Batch:
    """A micro-batch of fake tensors. `preserved` and `redraws`: see `Batch`."""
    shape, size = shapes.space.shape, shapes.size
    image = {name: torch.empty(tensor.shape[1:], dtype=tensor.dtype) for name, tensor in stored.items()}
    noise = RowNoise(torch.empty(()), torch.empty(shape), torch.empty(shape), torch.empty(()))
    extra = base.family.row({"original_size": size, "crop": (0, 0)}, size)
    row = Row(image, {"prompt": 0})
    return Batch.collate([row] * rows, [noise] * rows, [extra] * rows, preserved=preserved, redraws=redraws)


def _with_moments(model: DreamBooth, cfg: Config) -> Progress:
    """The state that every step but the first starts with: the optimizer has its moments."""
    scaler = torch.amp.GradScaler("cpu", enabled=PRECISIONS[cfg.train.precision].scaled)
    optimizer = optim.build(model.trainable(), cfg.optim)
    for parameter in model.trainable().values():
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    ema = Ema(optim.leaves(optimizer), cfg.train.ema) if cfg.train.ema else None
    return Progress(model, optimizer, scaler, torch.zeros((), dtype=torch.int64), ema)
