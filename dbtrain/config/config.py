"""The config of one subject: loading it, and every problem in it reported at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, get_origin

import yaml
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from dbtrain.config import folders, loading, subject_words
from dbtrain.config.adapter import Adapter
from dbtrain.config.base import Section, Seed, Text, listed
from dbtrain.config.inputs import Data, Model, Prepare
from dbtrain.config.outputs import Evaluation, Export, Hub, Sample, Validation
from dbtrain.config.subjects import PLACEHOLDER, OneOfSeveral, Subject, describe_first, filled
from dbtrain.config.training import Faults, Loss, Optim, Train
from dbtrain.runtime.errors import ConfigError

PROMPTS = (("prepare", "instance_prompt"), ("prepare", "class_prompt"), ("validation", "prompts"),
           ("sample", "prompts"))  # fmt: skip


class Config(Section):
    run_dir: Text = Field(description="run folder: checkpoints, logs, exported files, samples")
    seed: Seed = Field(0, description="seed of everything random in the run")
    subject: Subject = Field(default=Subject(), description="what the photos show, in words")
    subjects: Annotated[tuple[OneOfSeveral, ...], BeforeValidator(listed)] = Field(
        (), description="the subjects, if one adapter learns several; instead of `subject`'s words and "
        "`prepare.photos`; prompts with `{}` stand for one of each"
    )  # fmt: skip
    model: Model = Field(description="the base model")
    prepare: Prepare | None = Field(None, description="how photos are turned into shards")
    data: Data = Field(description="where the shards are, and how they are read")
    adapter: Adapter = Field(default=Adapter(), description="the adapter that is trained")
    loss: Loss = Field(default=Loss(), description="the training loss")
    optim: Optim = Field(default=Optim(), description="optimizer and learning rate")
    train: Train = Field(
        default=Train(), description="training loop: length, batches, precision, memory, checkpoints"
    )
    faults: Faults = Field(default=Faults(), description="timeouts, preemption and retries")
    validation: Validation = Field(
        default=Validation(), description="images and held-out losses during training"
    )
    export: Export = Field(default=Export(), description="files that are written after training")
    hub: Hub = Field(default=Hub(), description="publishing to the Hugging Face Hub")
    sample: Sample = Field(default=Sample(), description="images generated with the trained adapter")
    evaluation: Evaluation = Field(default=Evaluation(), description="how `evaluate` scores the result")

    @model_validator(mode="before")
    @classmethod
    def _of_the_subject(cls, values: Any) -> Any:
        """Derive from the subject what is not set: the run folder, the shards, and its words in prompts."""
        try:
            subject = Subject.model_validate(values.get("subject", {}))
            several = [OneOfSeveral.model_validate(one) for one in values.get("subjects", ())]
        except (ValidationError, AttributeError, TypeError):
            return values  # told once the sections are read
        derived: dict[str, Any] = {"run_dir": f"runs/{subject.name}"} if subject.name else {}
        derived |= values
        if subject.name and isinstance(data := derived.setdefault("data", {}), dict):
            derived["data"] = {"shards": f"shards/{subject.name}"} | data
        if several:
            describe_first(derived, several)
        words = [one.words for one in several] or [subject]
        for section, key in PROMPTS:
            if isinstance(part := derived.get(section), dict) and key in part:
                derived[section] = part | {key: filled(part[key], words)}
        return derived

    @model_validator(mode="before")
    @classmethod
    def _only_images_that_are_used(cls, values: Any) -> Any:
        """Derive that there are no class images if the loss reads none."""
        try:
            prior, prepare = values["loss"]["prior"], values["prepare"]
        except (LookupError, TypeError):
            return values
        if prior not in ("prediction", "none") or not isinstance(prepare, dict):
            return values
        return values | {"prepare": prepare | {"class_images": 0}}

    @model_validator(mode="after")
    def _words_for_every_prompt(self) -> Config:
        for section, key in PROMPTS:
            value = getattr(getattr(self, section), key, None)
            for prompt in (value,) if isinstance(value, str) else value or ():
                if PLACEHOLDER.search(prompt):
                    raise ValueError(
                        f"{section}.{key}: '{prompt}' needs words for the subject; set subject.token and "
                        "subject.class_word, e.g. to sks and dog"
                    )
        return self

    @model_validator(mode="after")
    def _a_word_for_each_subject(self) -> Config:
        tokens = [one.token for one in self.subjects]
        if twice := next((token for token in tokens if tokens.count(token) > 1), None):
            raise ValueError(f"subjects: '{twice}' is the token of more than one; give each its own")
        if self.subjects and not self.prepare:
            raise ValueError("subjects need a prepare section, which has their prompts; add it")
        subject_words.check_learned(self.learned_words, self.prepare)
        return self

    @model_validator(mode="after")
    def _something_to_preserve(self) -> Config:
        if not (prepare := self.prepare):
            return self
        prior = self.loss.prior
        if self.loss.asks_the_base and not prepare.class_prompt:
            raise ValueError(
                f"loss.prior is {prior}, but there is no prompt to predict for; set prepare.class_prompt"
            )
        if prior in ("images", "distillation") and prepare.class_prompt and not prepare.class_images:
            raise ValueError(
                f"prepare.class_images is 0, but loss.prior is {prior}; set it to 50 or more, or loss.prior "
                "to prediction or none"
            )
        return self

    @model_validator(mode="after")
    def _plain_weights_for_dora(self) -> Config:
        if self.adapter.dora and self.train.shard != "none":
            raise ValueError(
                f"adapter.dora is true, but train.shard is '{self.train.shard}': DoRA starts from the norms "
                "of whole weights; set one of them to its default"
            )
        if self.adapter.dora and self.model.training_adapter:
            raise ValueError(
                "adapter.dora is true, but DoRA's magnitudes would hold those of model.training_adapter too; "
                "set it to false"
            )
        return self

    @model_validator(mode="after")
    def _an_average_to_export(self) -> Config:
        if self.export.ema and self.train.ema is None:
            raise ValueError(
                "export.ema is true, but train.ema is null, so there is no average; set train.ema=0.99, or "
                "export.ema=false"
            )
        return self

    @model_validator(mode="after")
    def _warmup_ends(self) -> Config:
        if self.optim.warmup_steps > self.train.steps:
            raise ValueError(
                f"optim.warmup_steps is {self.optim.warmup_steps}, but train.steps is only "
                f"{self.train.steps}; use fewer warm-up steps"
            )
        return self

    @model_validator(mode="after")
    def _lora_plus_for_lora(self) -> Config:
        ratio = self.optim.lora_plus_ratio
        if ratio != 1 and all(one.kind != "lora" for one in self.adapter.every):
            raise ValueError(
                f"optim.lora_plus_ratio is {ratio:g}, which is for LoRA, but adapter.kind is "
                f"'{self.adapter.kind}'; set optim.lora_plus_ratio=1, or adapter.kind=lora"
            )
        return self

    @model_validator(mode="after")
    def _fresh_masks_for_every_forward(self) -> Config:
        if not self.adapter.drops:
            return self
        kept = self.train.activation_memory
        # https://github.com/pytorch/pytorch/issues/190758
        for wrong, setting, why, instead in (
            (self.train.cuda_graph, "train.cuda_graph is true", "a recorded step would reuse",
             "train.cuda_graph to false"),
            (kept and kept < 1, f"train.activation_memory is {kept}", "what is recomputed would not repeat",
             "train.activation_memory to null"),
        ):  # fmt: skip
            if wrong:
                raise ValueError(
                    f"{setting}, but {why} the adapter's dropout masks; set {instead}, or the dropout to 0"
                )
        return self

    @model_validator(mode="after")
    def _nothing_is_overwritten(self) -> Config:
        inputs: dict[str, str | None] = {}
        if prepare := self.prepare:
            inputs = {"prepare.photos": prepare.photos, "prepare.class_dir": prepare.class_dir}
        inputs |= {f"subjects.{k}.photos": one.photos for k, one in enumerate(self.subjects)}
        if prepare and prepare.subfolders:
            folders.check_apart(prepare.class_dir, inputs)
        if problems := folders.problems(self.run_dir, self.data.shards, inputs):
            raise ValueError("; also, ".join(problems))
        return self

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Config:
        """The config in a YAML file, with `section.key=value` overrides applied.

        Raises a ConfigError that lists every problem.
        """
        return cls.from_dict(loading.read_yaml(Path(path), kinds()), overrides)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
        """The config in nested dicts, whose paths may be `Path`s, with `section.key=value` overrides applied.

        Raises a ConfigError that lists every problem.
        """
        given = loading.plain(values)
        problems = [problem for item in overrides if (problem := loading.override(given, item, kinds()))]
        try:
            config = cls.model_validate(given)
        except ValidationError as error:
            problems += loading.problems(error, [name for name, _ in fields()])
        if problems:
            raise ConfigError(*problems)
        return config

    def override(self, *overrides: str) -> Config:
        """A copy with `section.key=value` overrides applied; prompts and folders keep the words they have.

        Raises a ConfigError that lists every problem.
        """
        return self.from_dict(self.model_dump(mode="json"), overrides)

    @property
    def learned_words(self) -> tuple[str, ...]:
        """The tokens of the subjects whose embeddings are learned, see `adapter.token`."""
        return tuple(one.token or "" for one in self.subjects or [self.subject] if self.adapter.token)

    def each_subject(self) -> list[Config]:
        """This config, or, if it lists several subjects, one for each, with its words, photos and prompts."""
        return [self._about(one) for one in self.subjects] or [self]

    def _about(self, one: OneOfSeveral) -> Config:
        """The config of one subject of several, without prompts that are about others only."""
        mine = {one.token, one.class_word}
        others = {word for other in self.subjects for word in (other.token, other.class_word)} - mine
        changes: dict[str, Any] = {
            "subjects": (),
            "subject": self.subject.model_copy(update={"token": one.token, "class_word": one.class_word}),
        }
        for name in ("validation", "sample"):
            section = getattr(self, name)
            kept = tuple(
                text
                for text in section.prompts
                if any(word in text for word in mine) or not any(word in text for word in others)
            )
            changes[name] = section.model_copy(update={"prompts": kept})
        if self.prepare:
            words = {"photos": one.photos, "instance_prompt": one.prompt, "class_prompt": one.class_prompt}
            changes["prepare"] = self.prepare.model_copy(update=words)
        return self.model_copy(update=changes)

    def filled(self, prompts: Sequence[str]) -> list[str]:
        """Prompts with the words in place of `{}`, `{token}` and `{class}`, for each of several subjects."""
        return filled(prompts, [one.words for one in self.subjects] or [self.subject])

    def get(self, key: str) -> Any:
        """The value of a dotted key, or a whole section. Raises ConfigError if there is none."""
        value: Any = self
        for part in key.split("."):
            if part not in getattr(type(value), "model_fields", {}):
                raise ConfigError(f"--key is '{key}', which is not a setting")
            value = getattr(value, part)
        return value

    def dump(self) -> str:
        """The resolved config as YAML: every key, every value."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def fields(section: type[Section] = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, pydantic field) of every setting, in order of definition."""
    for name, field in section.model_fields.items():
        inner = [
            kind
            for kind in (field.annotation, *getattr(field.annotation, "__args__", ()))
            if get_origin(kind) is None and isinstance(kind, type) and issubclass(kind, Section)
        ]
        if inner:
            yield from fields(inner[0], f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


@cache
def kinds() -> dict[str, loading.Kinds]:
    """The types of every setting, by dotted key."""
    return {name: loading.kinds_of(field.annotation) for name, field in fields()}
