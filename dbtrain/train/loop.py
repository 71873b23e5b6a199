"""The loop: shards in, an adapter out, the same whatever the number of ranks and interruptions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import torch
from torch import nn

from dbtrain.adapters import inject as adapters
from dbtrain.adapters.formats import registry as formats
from dbtrain.config import Config
from dbtrain.data import shards
from dbtrain.data.dataloader import Batch, LatentStream
from dbtrain.data.order import Share
from dbtrain.data.shards import Manifest
from dbtrain.data.storage import Storage
from dbtrain.export import export
from dbtrain.models import kernels
from dbtrain.models.families import registry as families
from dbtrain.models.families.family import Family
from dbtrain.models.precision import PRECISIONS
from dbtrain.models.pretrained import Pretrained
from dbtrain.prepare import made_for
from dbtrain.runtime import console, dist, files, lock, preemption, rng
from dbtrain.runtime.errors import ConfigError, Preempted
from dbtrain.runtime.hashing import content_key
from dbtrain.runtime.run_folder import RunFolder
from dbtrain.train import checkpoint, fingerprint, metrics, optim
from dbtrain.train import validation as validate
from dbtrain.train.checkpoint import Progress
from dbtrain.train.dreambooth import DreamBooth
from dbtrain.train.metrics import Outcome
from dbtrain.train.validation import Validation

Compute = Callable[[nn.Module, Progress, Sequence[Batch], Config], Outcome]


def train(cfg: Config, until: int | None = None) -> Path:
    """Fit one adapter for `cfg.train.steps` optimizer steps and export it; returns the run folder.

    Run again, it goes on from the newest checkpoint, or does nothing if it is done. Raises ConfigError
    for what a user can fix, and Preempted (with a checkpoint) if it is to stop early: on every rank, at
    the same step. `until`: a step to stop at, as if preempted there.
    """
    dist.init()
    dist.assert_same(content_key(cfg.model_dump(mode="json")), "the config")
    with lock.held(files.expand(cfg.run_dir), "run_dir"):
        return _train(cfg, until)


def _train(cfg: Config, until: int | None) -> Path:
    run, place = RunFolder(cfg.run_dir), Storage(cfg.data.shards, cfg.faults.retries)
    base = Pretrained.find(cfg.model)
    with dist.agreed():
        share = Share(cfg.train.global_batch, cfg.train.micro_batch, dist.rank(), dist.world())
        manifest = Manifest.read(place)
        family = families.detect(base, cfg.model)
        kernels.check_graph(cfg.train.cuda_graph, dist.device())
        if dist.is_main():
            manifest.check_files(place)
            made_for.check(cfg, base, manifest)
        who = fingerprint.identity(cfg, base, family, manifest) if dist.is_main() else None
    who = dist.from_main(who)
    if _finished(cfg, family, manifest, who):
        return run.path

    with dist.agreed():
        table = shards.read_prompts(place, manifest.prompts)
        model = DreamBooth.build(base, family, manifest, table, cfg)
        for name in cfg.export.formats:  # now, not after the last step
            formats.check(name, family, model.states())
        if dist.is_main():
            files.write_atomically(run.config, cfg.dump())
            run.done.unlink(missing_ok=True)
    validation = Validation.build(cfg, base, family, model, manifest, who)
    progress = Progress.begin(model.to(dist.device()), cfg)
    start = checkpoint.load_latest(run, progress, who)
    checkpoint.check_ranks(model)

    role_weights = _role_weights(cfg, manifest)
    resident_gib = cfg.data.resident_gib if dist.device().type == "cuda" else 0.0
    stream = LatentStream(
        place, manifest, share, role_weights, seed=cfg.seed, start=start,
        noise_offset=cfg.loss.noise_offset, cache_gib=cfg.data.cache_gib, device=dist.device(),
        resident_gib=resident_gib,
        extra=lambda meta: family.row(meta, manifest.request["resolution"]),
    )  # fmt: skip
    with dist.agreed():
        meters = metrics.RunLog(run, cfg, start, list(role_weights), stream.source)
        if dist.is_main():
            validate.forget_after(cfg, who, start)
    console.say(_greeting(cfg, model, manifest, role_weights, start))
    with (
        closing(stream), meters,
        kernels.attention(cfg.train.attention, dist.device()), kernels.on_side_stream(cfg.train.cuda_graph),
    ):  # fmt: skip
        if cfg.train.compile:
            _compile(progress, stream, cfg)
        with dist.training(cfg.faults.timeout_s):
            _take_steps(progress, stream, meters, validation, range(start, cfg.train.steps), cfg, until)
        export.save(cfg, base, family, model.states(), cfg.train.steps, run.export)
        export.mark_done(cfg)
    return run.path


def _take_steps(
    progress: Progress,
    stream: LatentStream,
    meters: metrics.RunLog,
    validation: Validation,
    steps: range,
    cfg: Config,
    until: int | None,
) -> None:
    """All steps that are left, with their checkpoints. Raises Preempted if it is to stop before the last."""
    ddp, votes = dist.wrap(progress.model), dist.Vote()
    compute = kernels.Recorded(compute_step, dist.world() > 1) if cfg.train.cuda_graph else compute_step

    def save(done: int) -> None:
        meters.report()  # so that no line is lost by a kill after the save
        with meters.untimed():
            checkpoint.save(RunFolder(cfg.run_dir), done, progress, validation.who, cfg.train.keep)

    validation.look(steps.start, meters)
    for step in steps:
        dist.at(step + 1)
        waited = stream.wait_s
        outcome = train_step(ddp, progress, stream, step, cfg, compute)
        done = step + 1
        lr = optim.lr_at(step, cfg.optim, cfg.train.steps)
        meters.step(done, outcome, progress.skipped, lr, stream.wait_s - waited)
        stop = votes.cast(preemption.wish())
        last = done == cfg.train.steps
        if saved := last or stop or done == until or done % cfg.train.checkpoint_every == 0:
            save(done)
        if (stop or done == until) and not last:
            raise Preempted(f"{preemption.REASONS[stop] or 'as asked'}, at step {done}, which is saved")
        if validate.is_due(cfg, validation.manifest, done):
            try:
                validation.look(done, meters)
            except (Preempted, ConfigError):  # on all ranks; it is made up for when the run goes on
                if not saved:
                    save(done)
                raise


def _compile(progress: Progress, stream: LatentStream, cfg: Config) -> None:
    """Compile the denoiser; of several ranks on a node one does it, the others find it in the cache."""
    model, device = progress.model, dist.device()
    kernels.compile_module(model.denoiser, cfg.train.compile, activation_memory=cfg.train.activation_memory)
    if dist.world() == 1:
        return
    with dist.leaders_first(), model.working_copies.in_place():
        with PRECISIONS[cfg.train.precision].forward(device):
            loss = model(stream.peek()).sum()
        loss.backward()
    progress.optimizer.zero_grad()


def train_step(
    ddp: nn.Module,
    progress: Progress,
    stream: LatentStream,
    step: int,
    cfg: Config,
    compute: Compute | None = None,
) -> Outcome:
    """Optimizer step number `step`, counted from 0, on the stream's next micro-batches."""
    optim.set_lr(progress.optimizer, optim.lr_at(step, cfg.optim, cfg.train.steps))
    batches = [next(stream) for _ in range(stream.share.micro_batches)]
    return (compute or compute_step)(ddp, progress, batches, cfg)


def compute_step(ddp: nn.Module, progress: Progress, batches: Sequence[Batch], cfg: Config) -> Outcome:
    """The step's work on the device; nothing in it reads a tensor back to the host."""
    model, optimizer, scaler = progress.model, progress.optimizer, progress.scaler
    precision, device = PRECISIONS[cfg.train.precision], batches[0].weight.device
    losses = torch.zeros(2, device=device)
    tenths = torch.arange(metrics.TENTHS, device=device)
    spread = torch.zeros(2, 2, metrics.TENTHS, device=device)
    bad = torch.full((2,), torch.inf, dtype=torch.float64, device=device)
    optimizer.zero_grad(set_to_none=not cfg.train.cuda_graph)

    with model.working_copies.in_place():
        for number, batch in enumerate(batches):
            if adapters.drops(cfg.adapter):
                step = batch.first // cfg.train.global_batch
                rng.seed_dropout(cfg.seed, "dropout", step, batch.first)
            with dist.accumulating(ddp, last=number == len(batches) - 1):
                with precision.forward(device):
                    per_image = ddp(batch)  # (rows,): instance rows, then class rows
                # The weights make a sum over all rows of all ranks; DDP gives the mean over ranks.
                loss = (batch.weight * per_image).sum() * dist.world()
                scaler.scale(loss).backward()
            by_role = per_image.detach().view(-1, cfg.train.micro_batch)  # (roles, micro_batch)
            roles = len(by_role)
            losses[:roles] += by_role.sum(1) / cfg.train.global_batch
            own = (batch.u * metrics.TENTHS).long().view_as(by_role)[..., None] == tenths
            spread[:roles, 0] += own.sum(1)
            spread[:roles, 1] += torch.where(own, by_role[..., None], 0).sum(1)
            first = torch.where(by_role.isfinite(), torch.inf, batch.position.view_as(by_role)).amin(1)
            bad[:roles] = torch.minimum(bad[:roles], first)

    scaler.unscale_(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    grad_norm = nn.utils.clip_grad_norm_(parameters, cfg.optim.clip)
    if cfg.faults.nonfinite == "skip" and not scaler.is_enabled():
        leave_out = ~grad_norm.isfinite()
        optimizer.found_inf = leave_out.float()  # type: ignore[attr-defined]  # as the scaler tells AdamW
        progress.skipped += leave_out
    scaler.step(optimizer)
    scaler.update()
    return Outcome(losses, grad_norm, bad, spread, sum(batch.seen for batch in batches))


def _role_weights(cfg: Config, manifest: Manifest) -> dict[str, float]:
    """Weight of each role's mean loss; class images of weight 0 are not drawn at all."""
    weights = {"instance": 1.0, "class": cfg.loss.prior_weight}
    return {role: weights[role] for role in ("instance", "class") if role in manifest.roles and weights[role]}


def _finished(cfg: Config, family: Family, manifest: Manifest, who: dict) -> bool:
    """Whether there is nothing left to do; exports the last checkpoint if only that is missing.

    Raises ConfigError if the newest checkpoint is another run's, or past `train.steps`.
    """
    with dist.agreed():
        found = checkpoint.latest(RunFolder(cfg.run_dir)) if dist.is_main() else None
        if found:
            path, state = found
            fingerprint.check_continues(path, state, who, cfg.train.steps)
        trained = found is not None and found[1]["step"] == cfg.train.steps
        finished = trained and not validate.lacking(cfg, manifest, who, cfg.train.steps)
    finished = dist.from_main(finished)
    if finished:
        console.say(f"{cfg.run_dir} is trained to step {cfg.train.steps} already: nothing to do")
        if not dist.from_main(export.is_done(cfg)):
            export.export(cfg)
            export.mark_done(cfg)
    return finished


def _greeting(
    cfg: Config, model: DreamBooth, manifest: Manifest, role_weights: dict[str, float], start: int
) -> str:
    rows = ", ".join(f"{sum(manifest.rows(role))} {role} images" for role in role_weights)
    sizes = []
    for name, module in model.trained.items():
        trained = sum(p.numel() for p in adapters.trainable(module).values())
        sizes.append(f"{trained:,} of {sum(p.numel() for p in module.parameters()):,} parameters of {name}")
    where = f"{dist.world()} ranks on {dist.device().type}" if dist.world() > 1 else dist.device().type
    go_on = f"going on from step {start}; " if start else ""
    return (
        f"{go_on}{rows}; training {', '.join(sizes)} in {cfg.train.precision}, "
        f"batches of {cfg.train.global_batch} on {where}"
    )
