"""Whether shards are what a config's `prepare` makes with its base."""

from __future__ import annotations

from dbtrain.config import Config
from dbtrain.data import shards
from dbtrain.data.shards import Manifest
from dbtrain.models.families import registry as families
from dbtrain.models.pretrained import Pretrained
from dbtrain.prepare import plan
from dbtrain.runtime.errors import ConfigError


def check(cfg: Config, base: Pretrained, manifest: Manifest) -> None:
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
        asked = plan.request(cfg.prepare, families.get(family))
        made = plan.ONCE | manifest.request
        odd = [key for key in asked if asked[key] != made.get(key)]
        if odd:
            changes = ", ".join(f"prepare.{key} {made.get(key)!r}, now {asked[key]!r}" for key in odd)
            raise ConfigError(f"{cfg.data.shards} was made with {changes}; {shards.CURE}")
