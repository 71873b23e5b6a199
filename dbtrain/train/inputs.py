"""What a run is made of, found and checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dbtrain.config import Config
from dbtrain.data.order import RankSlice
from dbtrain.data.shards import HELD_OUT, Manifest
from dbtrain.data.storage import Storage
from dbtrain.evaluate import scoring
from dbtrain.evaluate.scoring import Scoring
from dbtrain.models.base import Base
from dbtrain.prepare import plan
from dbtrain.runtime import dist
from dbtrain.runtime.errors import ConfigError
from dbtrain.runtime.run_folder import RunFolder
from dbtrain.train import best, checkpoint, cuda_graph, due, fingerprint, segments, training_adapter


@dataclass(frozen=True)
class Inputs:
    """The base and the shards of a run, checked before anything is loaded; the same on every rank."""

    base: Base
    storage: Storage
    manifest: Manifest
    share: RankSlice
    fingerprint: Mapping[str, Any]
    scoring: Scoring | None  # on rank 0, of a run that stops at its best

    @classmethod
    def find(cls, cfg: Config, base: Base | None = None) -> Inputs:
        """Find them; `base` is that of `cfg` if it is known.

        Raises ConfigError if the shards are missing, or made for another base or settings.
        """
        storage = Storage(cfg.data.shards, cfg.faults.retries)
        base = base or Base.find(cfg.model)
        training_adapter.fetch(cfg.model)
        with dist.agreed():
            base.check_trains(cfg.adapter, cfg.model.training_adapter)
            share = RankSlice(cfg.train.global_batch, cfg.train.micro_batch, dist.rank(), dist.world())
            manifest = Manifest.read(storage)
            cuda_graph.check(cfg.train.cuda_graph, dist.device())
            found = scores = None
            if dist.is_main():
                manifest.check_files(storage)
                plan.check(cfg, base, manifest)
                found = fingerprint.of(cfg, base, manifest)
                if cfg.train.stop == "best":
                    scores = scoring.of(cfg, HELD_OUT["instance"] in manifest.roles)
        return cls(base, storage, manifest, share, dist.from_main(found), scores)

    def trained_to(self, cfg: Config) -> int:
        """The last step, if all steps and validations are done, else 0.

        Raises ConfigError if the newest checkpoint belongs to another run or is past `train.steps`, or if
        settings have changed that only steps can apply.
        """
        end = 0
        with dist.agreed():
            found = checkpoint.latest(RunFolder(cfg.run_dir)) if dist.is_main() else None
            if found:
                fingerprint.check_continues(*found, self.fingerprint, cfg.train.steps)
                step, about = found[1]["step"], (self.fingerprint, self.scoring)
                ends = best.decide(cfg, *about, step) or step == cfg.train.steps
                end = step if ends and not due.missing(cfg, self.manifest, *about, step) else 0
            late = segments.changes(found[1].get("segments", []), cfg) if end and found else []
            if late:
                more = "train.steps" if end == cfg.train.steps else "train.patience"
                raise ConfigError(
                    f"{cfg.run_dir} is already trained to step {end}, too far for "
                    f"{' '.join(late)}; increase {more} to continue with that, or change run_dir"
                )
        return dist.from_main(end)


def check_settings(cfg: Config) -> None:
    """Raise ConfigError for settings that cannot train, before anything is downloaded or encoded for them.

    That is a batch that the ranks cannot share, or a run that other settings began.
    """
    dist.init()
    training_adapter.fetch(cfg.model)
    with dist.agreed():
        RankSlice(cfg.train.global_batch, cfg.train.micro_batch, dist.rank(), dist.world())
        if dist.is_main():
            fingerprint.check_settings(cfg)
            fingerprint.start_content(cfg)
