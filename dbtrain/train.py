"""The loop: shards in, an adapter out, the same whatever the number of ranks and interruptions."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from dbtrain import adapters, checkpoint, dist, export, families, files, formats, log, optim, prepare, rng
from dbtrain.config import Config
from dbtrain.data import shards
from dbtrain.data.order import Share
from dbtrain.data.shards import Manifest
from dbtrain.data.stream import LatentStream
from dbtrain.errors import ConfigError
from dbtrain.families.base import Family
from dbtrain.keys import content_key
from dbtrain.network import DreamBooth
from dbtrain.pretrained import DTYPES, Pretrained


def train(cfg: Config) -> Path:
    """Fit one adapter for `cfg.train.steps` optimizer steps and export it; returns the run folder.

    Run again, it goes on from the newest checkpoint, or does nothing if it is done. Raises
    ConfigError for what a user can fix, on every rank.
    """
    dist.init()
    dist.assert_same(content_key(cfg.model_dump(mode="json")), "the config")
    run_dir, folder = files.expand(cfg.run_dir), files.expand(cfg.data.shards)
    base = Pretrained.find(cfg.model)
    with dist.agreed():
        share = Share(cfg.train.global_batch, cfg.train.micro_batch, dist.rank(), dist.world())
        manifest = Manifest.read(folder)
        family = families.detect(base, cfg.model)
        if dist.is_main():
            manifest.check_files(folder)
            _check_made_for(cfg, base, manifest)
        who = checkpoint.identity(cfg, base, family, manifest) if dist.is_main() else None
    who = dist.from_main(who)
    if _finished(cfg, family, who):
        return run_dir

    with dist.agreed():
        table = shards.read_prompts(folder, manifest.prompts)
        model = DreamBooth.build(base, family, manifest, table, cfg).to(dist.device())
        for name in cfg.export.formats:  # now, not after the last step
            formats.check(name, family, model.states())
        if dist.is_main():
            files.write_atomically(run_dir / "config.yaml", cfg.dump())
            (run_dir / "DONE").unlink(missing_ok=True)
    optimizer = optim.build(model.trainable(), cfg.optim)
    scaler = torch.amp.GradScaler(dist.device().type, enabled=cfg.train.precision == "fp16")
    start = checkpoint.load_latest(run_dir, model, optimizer, scaler, who)
    _check_adapter_is_shared(model)

    if cfg.train.compile:
        model.compile_denoiser()
    ddp = dist.wrap(model)
    role_weights = _role_weights(cfg, manifest)
    stream = LatentStream(
        folder, manifest, share, role_weights, seed=cfg.seed, start=start,
        noise_offset=cfg.loss.noise_offset, cache_gib=cfg.data.cache_gib, device=dist.device(),
        extra=lambda meta: family.row(meta, manifest.request["resolution"]),
    )  # fmt: skip
    with dist.agreed():
        run_log = log.RunLog(run_dir, cfg, start, class_rows="class" in role_weights)
    log.say(_greeting(cfg, model, manifest, role_weights, start))
    try:
        for step in range(start, cfg.train.steps):
            lr = optim.lr_at(step, cfg.optim, cfg.train.steps)
            optim.set_lr(optimizer, lr)
            waited = stream.wait_s
            losses, grad_norm = train_step(ddp, optimizer, scaler, stream, step, cfg)
            done = step + 1
            run_log.step(done, losses, grad_norm, lr, stream.wait_s - waited)
            if done == cfg.train.steps or done % cfg.train.checkpoint_every == 0:
                run_log.check_finite()
                with run_log.untimed():
                    checkpoint.save(run_dir, done, model, optimizer, scaler, who, cfg.train.keep)
        export.save(cfg, base, family, model.states(), cfg.train.steps, run_dir / "export")
        export.mark_done(cfg)
    except ConfigError as problem:
        run_log.note(f"stopped: {problem}")
        raise
    finally:
        stream.close()
        run_log.close()
    return run_dir


def train_step(
    ddp: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    stream: LatentStream,
    step: int,
    cfg: Config,
) -> tuple[Tensor, Tensor]:
    """One optimizer step; nothing in it reads a tensor back to the host.

    Gives this rank's shares of the mean instance and class loss, (2,), which sum to the means over
    ranks, and the norm of the gradient before clipping, (): both on the device.
    """
    share, device = stream.share, stream.device
    dtype = DTYPES[cfg.train.precision]
    losses = torch.zeros(2, device=device)
    optimizer.zero_grad()

    for micro in range(share.micro_batches):
        batch = next(stream)
        if adapters.drops(cfg.adapter):
            rng.seed_dropout(cfg.seed, "dropout", step, share.positions(step, micro).start)
        with dist.accumulating(ddp, last=micro == share.micro_batches - 1):
            with torch.amp.autocast(device.type, dtype, enabled=dtype != torch.float32):
                per_image = ddp(batch)  # (rows,): instance rows, then class rows
            # The weights make a sum over all rows of all ranks; DDP gives the mean over ranks.
            loss = (batch.weight * per_image).sum() * share.world
            scaler.scale(loss).backward()
        by_role = per_image.detach().view(-1, share.micro_batch).sum(1) / share.global_batch
        losses[: len(by_role)] += by_role

    scaler.unscale_(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    grad_norm = nn.utils.clip_grad_norm_(parameters, cfg.optim.clip)
    scaler.step(optimizer)
    scaler.update()
    return losses, grad_norm


def _role_weights(cfg: Config, manifest: Manifest) -> dict[str, float]:
    """Weight of each role's mean loss; class images of weight 0 are not drawn at all."""
    weights = {"instance": 1.0, "class": cfg.loss.prior_weight}
    return {role: weights[role] for role in ("instance", "class") if role in manifest.roles and weights[role]}


def _check_made_for(cfg: Config, base: Pretrained, manifest: Manifest) -> None:
    """Raise ConfigError unless the shards are what this config's `prepare` makes with its base."""
    parts = [part for part, key in manifest.components.items() if base.key(part) != key]
    if parts:
        raise ConfigError(
            f"{cfg.data.shards} was made for base model '{manifest.base}', but model.path is "
            f"'{cfg.model.path}', whose {' and '.join(parts)} differ; {shards.CURE}"
        )
    if (family := families.detect(base, cfg.model).name) != manifest.family:
        raise ConfigError(
            f"{cfg.data.shards} was made for family '{manifest.family}', not '{family}'; {shards.CURE}"
        )
    if cfg.prepare:
        asked, made = prepare.request(cfg.prepare), manifest.request
        odd = [key for key in asked if asked[key] != made.get(key)]
        if odd:
            changes = ", ".join(f"prepare.{key} {made.get(key)!r}, now {asked[key]!r}" for key in odd)
            raise ConfigError(f"{cfg.data.shards} was made with {changes}; {shards.CURE}")


def _finished(cfg: Config, family: Family, who: dict) -> bool:
    """Whether there is nothing left to train; exports the last checkpoint if only that is missing.

    Raises ConfigError if the newest checkpoint is another run's, or past `train.steps`.
    """
    with dist.agreed():
        found = checkpoint.latest(files.expand(cfg.run_dir)) if dist.is_main() else None
        if found:
            path, state = found
            checkpoint.check_identity(path, state["identity"], who)
            if state["step"] > cfg.train.steps:
                raise ConfigError(
                    f"{path} is past train.steps ({cfg.train.steps}); "
                    "use more steps or another run_dir, or export an earlier checkpoint"
                )
    finished = dist.from_main(found is not None and found[1]["step"] == cfg.train.steps)
    if finished:
        log.say(f"{cfg.run_dir} is trained to step {cfg.train.steps} already: nothing to do")
        if not dist.from_main(export.is_done(cfg)):
            export.export(cfg)
            export.mark_done(cfg)
    return finished


def _check_adapter_is_shared(model: DreamBooth) -> None:
    """Every rank must start from the same weights: DDP only ever adds the same gradient to them."""
    total = [p.detach().double().sum().item() for p in model.trainable().values()]
    dist.assert_same(content_key([float(value).hex() for value in total]), "the adapter's start")


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
