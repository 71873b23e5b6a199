"""Build the `Job` that the loop runs: model, optimizer, data, metrics, and validation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor, nn

from dbtrain.adapters import inject as adapters
from dbtrain.adapters import tokens
from dbtrain.adapters.formats import registry as formats
from dbtrain.config import Config
from dbtrain.data import prompt_table
from dbtrain.data.dataloader import LatentStream
from dbtrain.data.shards import Manifest
from dbtrain.models import block_swap, kernels, quantization
from dbtrain.models.base import Base
from dbtrain.models.precision import PRECISIONS
from dbtrain.prepare import plan, subjects
from dbtrain.runtime import console, dist, files, preemption
from dbtrain.runtime.errors import ConfigError, Preempted
from dbtrain.runtime.memory import trim
from dbtrain.runtime.run_folder import RunFolder
from dbtrain.train import (
    checkpoint,
    cuda_graph,
    due,
    memory,
    parallel,
    segments,
    start_adapter,
    training_adapter,
    validation,
)
from dbtrain.train.adapted import Adapted
from dbtrain.train.checkpoint import Progress
from dbtrain.train.dreambooth import DreamBooth
from dbtrain.train.inputs import Inputs
from dbtrain.train.metrics import Metrics
from dbtrain.train.step import Compute, compute_step
from dbtrain.train.validation import Validator


class Stop:
    """The reason to stop after a step. Ranks agree on it one step late, so that none of them waits."""

    def __init__(self, until: int | None) -> None:
        self.votes, self.until = dist.Vote(), until

    def reason(self, step: int) -> str:
        """The reason, or "" to continue; the same on every rank."""
        vote = self.votes.cast(preemption.stop_requested())
        return preemption.REASONS[vote] or ("as requested" if step == self.until else "")


@dataclass
class Job:
    """A run that is ready to train from step `start`."""

    cfg: Config
    run: RunFolder
    model: DreamBooth
    progress: Progress
    stream: LatentStream
    metrics: Metrics
    validation: Validator
    compute: Compute
    start: int

    @contextmanager
    def open(self, until: int | None = None) -> Iterator[tuple[nn.Module, Stop]]:
        """Yield the module to call, wrapped in DDP, and the stop signal; close everything at the end."""
        train, device = self.cfg.train, dist.device()
        with (
            closing(self.stream), self.metrics,
            kernels.attention(train.attention, device), cuda_graph.on_side_stream(train.cuda_graph),
        ):  # fmt: skip
            if train.compile:
                _compile(self)
            with dist.training(self.cfg.faults.timeout_s):
                ddp, stop = parallel.wrap(self.model), Stop(until)
                self._validate(self.start)
                yield ddp, stop

    def steps(self) -> Iterator[int]:
        """The steps that are left; the validation after one of them can make it the last."""
        for step in range(self.start, self.cfg.train.steps):
            if self.validation.stopped:
                return
            yield step

    def is_save_step(self, step: int) -> bool:
        """Whether to save after `step` steps: what is validated has to be there if it turns out the best."""
        train = self.cfg.train
        chosen_from = train.stop == "best" and self.validation.is_due(step)
        return step == train.steps or step % train.checkpoint_every == 0 or chosen_from

    def save(self, step: int) -> None:
        """Write the checkpoint of `step`, after its log lines, so that a kill cannot lose them."""
        self.metrics.report()
        with self.metrics.interrupted("checkpoint"):
            best = self.validation.contenders()
            checkpoint.save(
                self.run, step, self.progress, self.validation.fingerprint, self.cfg.train.keep, best
            )

    def validate(self, step: int, saved: bool) -> None:
        """Validate if it is due. If that is interrupted, save first, unless `step` is saved already."""
        if not self.validation.is_due(step):
            return
        try:
            self._validate(step)
        except (Preempted, ConfigError):  # on all ranks; a resumed run repeats the validation
            if not saved:
                self.save(step)
            raise

    def _validate(self, step: int) -> None:
        """Validate what is exported: the adapter, or its moving average."""
        with self.progress.averaged(self.cfg.export.ema):
            self.validation.run(step, self.metrics)


def swap_blocks(cfg: Config, base: Base, model: DreamBooth) -> None:
    """Move the frozen weights of `train.swap_blocks` blocks to host memory. For `auto`, ranks may differ."""
    count, device = cfg.train.swap_blocks, dist.device()
    if count == "auto":
        has = memory.memory_of(device)
        count = memory.predict(cfg, base, "cuda", dist.world()).blocks_to_swap(has) if has < inf else 0
    moved = block_swap.swap(model.denoiser, count, device)
    if cfg.train.swap_blocks:
        console.say(f"swapping {count} blocks, whose weights take {moved / 2**30:.2f} GiB of host memory")


def kept_blocks(cfg: Config, base: Base, ranks: parallel.DeviceMesh | None) -> int:
    """How many blocks each rank holds whole if they share the denoiser: as many as all GPUs have room for."""
    has = memory.memory_of(dist.device())
    if cfg.train.shard == "none" or dist.world() == 1 or has == inf:
        return 0
    with dist.agreed():
        together = ranks.size() if ranks else 1
        found = memory.predict(cfg, base, "cuda", dist.world(), together, has)
    kept = min(dist.gather_json(found.kept))
    console.say(f"each rank holds {kept} of {len(found.weights.blocks)} blocks whole")
    return kept


def setup(cfg: Config, inputs: Inputs) -> Job:
    """Build the model, load the newest checkpoint, and start prefetching, on every rank.

    Raises ConfigError for anything a user can fix.
    """
    ranks = parallel.mesh(cfg.train.shard, cfg.faults.timeout_s)
    kept = kept_blocks(cfg, inputs.base, ranks)
    (encoded,) = validation.encode([cfg], inputs)
    with dist.agreed():
        table = read_table(cfg, inputs)
        training = training_adapter.read(inputs.base, cfg.model)
        model = DreamBooth.build(inputs.base, inputs.manifest, table, cfg, training, ranks, kept)
        if cfg.train.cuda_graph and model.follows_the_host:
            raise ConfigError(
                "train.cuda_graph is true, but the prompts differ in length, or are too many for the GPU's "
                "memory: a recorded step would repeat the first one's; set it to false"
            )
    validator = Validator.of(cfg, inputs, model, encoded)
    with dist.agreed():
        swap_blocks(cfg, inputs.base, model)
    model.to(dist.device())
    trim()  # what the weights took in RAM
    return start(cfg, inputs, model, model, validator)


def read_table(cfg: Config, inputs: Inputs) -> dict[str, Tensor]:
    """The shards' prompt table, with the ids of learned words. Raises ConfigError if it is not right."""
    prompts = inputs.manifest.prompts
    table = prompt_table.read(inputs.storage, prompts)
    plan.check_prompts(cfg.data.shards, inputs.base, table)
    return table | tokens.read_again(inputs.base, cfg.learned_words, cfg.adapter.token, prompts.texts)


def start(
    cfg: Config, inputs: Inputs, model: DreamBooth, adapter: Adapted, validator: Validator,
    device: torch.device | None = None, among_others: bool = False,
) -> Job:  # fmt: skip
    """Continue a run from its newest checkpoint: state, data and records.

    `adapter`: what it trains of `model`. `device`: where the stream's batches are. `among_others`: as for
    `Metrics`. Raises ConfigError for anything a user can fix.
    """
    run, manifest, device = RunFolder(cfg.run_dir), inputs.manifest, device or dist.device()
    with dist.agreed():
        for name in cfg.export.formats:  # fail now, not after the last step
            formats.check(name, inputs.base.family, states := adapter.states())
            if caveat := formats.caveat(name, states, cfg.export.formats):
                console.say(f"warning: {caveat}")
        is_new = dist.is_main() and checkpoint.latest(run) is None
    if dist.from_main(is_new) and cfg.adapter.start:
        with dist.agreed():
            start_adapter.start_from(inputs.base, cfg, adapter)
    progress = Progress.begin(adapter, cfg)
    step = checkpoint.load_latest(run, progress, inputs.fingerprint, cfg)
    checkpoint.check_ranks(adapter)

    # The data, from the next step on, and the records, without the steps that are repeated.
    stream = stream_of(cfg, inputs, step, device)
    with dist.agreed():
        metrics = Metrics(run, cfg, step, list(stream.role_weights), stream.source, among_others)
        if dist.is_main():
            due.forget_after(cfg, inputs.fingerprint, inputs.scoring, step)
            files.write_atomically(run.config, segments.header(progress.segments, cfg) + cfg.dump())
            run.done.unlink(missing_ok=True)
    compute: Compute = compute_step
    if cfg.train.cuda_graph:
        compute = cuda_graph.recorded(compute_step, dist.world() > 1)
    job = Job(cfg, run, model, progress, stream, metrics, validator, compute, step)
    console.say(_describe(job, manifest))
    if inputs.scoring:
        console.say(f"stops at the best {inputs.scoring.said}")
    return job


def stream_of(cfg: Config, inputs: Inputs, step: int, device: torch.device) -> LatentStream:
    """The data of this rank after `step` steps, in batches on `device`."""
    manifest = inputs.manifest
    weights = cfg.loss.role_weights("class" in manifest.roles, manifest.has_masks)
    return LatentStream(
        inputs.storage, manifest, inputs.share, weights, seed=cfg.seed, start=step,
        weights=subjects.weights(cfg), prompt_dropout=cfg.data.prompt_dropout,
        noise_offset=cfg.loss.noise_offset, cache_gib=cfg.data.cache_gib, device=device,
        resident_gib=cfg.data.resident_gib if device.type == "cuda" else 0.0,
        extra=inputs.base.family.row,
        stored=inputs.base.family.stored,
        class_prompts=manifest.class_prompts() if cfg.loss.prior == "prediction" else None,
        preserved=cfg.loss.asks_the_base, background=cfg.loss.mask.background,
    )  # fmt: skip


def _compile(job: Job) -> None:
    """Compile the denoiser; on each node one rank compiles first, and the others use its cache."""
    model, train, device = job.model, job.cfg.train, dist.device()
    several = len(job.stream.manifest.sizes) > 1  # each is trained often enough to be worth code of its own
    kernels.compile_module(
        model.denoiser, train.compile, activation_memory=train.activation_memory,
        dynamic=False if several else None,
    )  # fmt: skip
    if dist.world() == 1 or train.shard != "none":  # ranks that share weights compile together
        return
    with dist.leaders_first(), model.working_copies.in_place():
        with PRECISIONS[train.precision].forward(device):
            loss = model(job.stream.peek()).sum()
        loss.backward()
    job.progress.optimizer.zero_grad()


def _describe(job: Job, manifest: Manifest) -> str:
    """The log line that says what is trained, on which data and devices."""
    cfg, adapter, role_weights = job.cfg, job.progress.model, job.stream.role_weights
    images = ("instance",) if cfg.loss.prior == "prediction" else role_weights
    rows = ", ".join(f"{sum(manifest.rows(role))} {role} images" for role in images)
    rows += ", also with the class prompt" if len(images) < len(role_weights) else ""
    sizes = []
    for name, module in adapter.trained.items():
        trained = sum(p.numel() for p in adapters.trainable(module).values())
        sizes.append(f"{trained:,} of {quantization.parameters(module):,} parameters of {name}")
    if adapter.learned:
        sizes.append(f"{', '.join(map(repr, adapter.learned))} of {', '.join(adapter.words)}")
    where = f"{dist.world()} ranks on {dist.device().type}" if dist.world() > 1 else dist.device().type
    if (together := parallel.holders(job.model)) > 1:
        where += f", frozen weights sharded over {together} ranks"
    resuming = f"resuming from step {job.start}; " if job.start else ""
    return (
        f"{resuming}{rows}; training {', '.join(sizes)} in {cfg.train.precision}, "
        f"batches of {cfg.train.global_batch} on {where}"
    )
