"""One YAML describes one subject: frozen, strict, typed sections, and errors a user can act on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, model_validator

from dbtrain.config import loading
from dbtrain.config.adapter import Adapter
from dbtrain.config.base import Section, Seed, Text
from dbtrain.config.inputs import Data, Model, Prepare
from dbtrain.config.outputs import Evaluation, Export, Hub, Sample, Validation
from dbtrain.config.training import Faults, Loss, Optim, Train
from dbtrain.runtime.errors import ConfigError


class Config(Section):
    run_dir: Text = Field(description="folder of the run: checkpoints, logs, export, samples")
    seed: Seed = Field(0, description="root of all randomness of the run")
    model: Model = Field(default=Model(), description="the base model")
    prepare: Prepare | None = Field(None, description="how photos become shards")
    data: Data = Field(description="the shards")
    adapter: Adapter = Field(default=Adapter(), description="what is trained")
    loss: Loss = Field(default=Loss(), description="what is minimised")
    optim: Optim = Field(default=Optim(), description="how it is minimised")
    train: Train = Field(default=Train(), description="the training loop")
    faults: Faults = Field(default=Faults(), description="what to do when something fails")
    validation: Validation = Field(default=Validation(), description="pictures and losses while it trains")
    export: Export = Field(default=Export(), description="files of the result")
    hub: Hub = Field(default=Hub(), description="where the result is published")
    sample: Sample = Field(default=Sample(), description="pictures drawn with the result")
    evaluation: Evaluation = Field(default=Evaluation(), description="how the result is judged")

    @model_validator(mode="after")
    def _warmup_ends(self) -> Config:
        if self.optim.warmup_steps > self.train.steps:
            raise ValueError(
                f"optim.warmup_steps is {self.optim.warmup_steps}, more than train.steps ({self.train.steps})"
            )
        return self

    @model_validator(mode="after")
    def _no_masks_in_a_graph(self) -> Config:
        every = [part for part in (self.adapter, self.adapter.text_encoder) if part]
        if self.train.cuda_graph and any(p.dropout or p.rank_dropout or p.module_dropout for p in every):
            raise ValueError(
                "train.cuda_graph is true, but a recorded step cannot draw an adapter's dropout anew; "
                "turn one of them off"
            )
        return self

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Config:
        """The config in a YAML file, with `section.key=value` overrides put over it.

        Raises ConfigError that lists every problem at once.
        """
        values = loading.read_yaml(Path(path))
        problems = [problem for item in overrides if (problem := loading.override(values, item))]
        try:
            config = cls.model_validate(values)
        except ValidationError as error:
            problems += loading.problems(error, [name for name, _ in fields()])
        if problems:
            raise ConfigError(*problems)
        return config

    def dump(self) -> str:
        """The resolved config as YAML: every key, every value."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def fields(section: type[Section] = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, pydantic field) of every setting, in order."""
    for name, field in section.model_fields.items():
        inner = [
            kind
            for kind in (field.annotation, *getattr(field.annotation, "__args__", ()))
            if isinstance(kind, type) and issubclass(kind, Section)
        ]
        if inner:
            yield from fields(inner[0], f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field
