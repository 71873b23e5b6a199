"""The subjects of a fleet: one config has what they share, a list has what differs."""

from __future__ import annotations

import csv
import io
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dbtrain.config import Config, loading
from dbtrain.config.config import kinds
from dbtrain.config.inputs import Caption
from dbtrain.data.photo_files import folders, listing, no_photos, subfolders
from dbtrain.evaluate.dreambench import TEXTS, Dataset
from dbtrain.runtime import files
from dbtrain.runtime.errors import ConfigError, os_problem
from dbtrain.runtime.run_folder import LONGEST

ALIASES = {
    "name": "subject.name", "photos": "prepare.photos", "token": "subject.token",
    "class": "subject.class_word", "class_word": "subject.class_word", "prompt": "prepare.instance_prompt",
    "class_prompt": "prepare.class_prompt", "steps": "train.steps", "rank": "adapter.rank", "lr": "optim.lr",
    "start": "adapter.start",
}  # fmt: skip
# The settings that may differ. They change neither the shapes nor the forward pass of a batch that subjects
# share, and none of their folders: those are named by the subject.
MAY_DIFFER = (
    "seed", "subject.name", "subject.token", "subject.class_word",
    "prepare.photos", "prepare.subfolders", "prepare.repeats", "prepare.weights",
    "prepare.instance_prompt", "prepare.captions", "prepare.caption",
    *(f"prepare.caption.{name}" for name in Caption.model_fields),
    "prepare.class_prompt", "prepare.class_dir", "prepare.crop", "prepare.variants", "prepare.flip",
    "adapter.rank", "adapter.alpha", "adapter.text_encoder.rank", "adapter.text_encoder.alpha",
    "adapter.start",
    "optim.lr", "optim.text_encoder_lr", "optim.token_lr", "optim.schedule", "optim.warmup_steps",
    "train.steps", "validation.prompts", "sample.prompts", "evaluation.prompts", "hub.repo",
)  # fmt: skip
PATHS = ("prepare.photos", "prepare.class_dir", "adapter.start")  # are relative to the list's folder
# What a config may lack because each subject has its own.
STAND_IN = {
    "subject": {"token": "sks", "class_word": "subject"},
    "prepare": {"photos": "a-subject/photos", "instance_prompt": "a photo of {}"},
    "data": {"shards": "a-subject/shards"},
}
PARTS = (
    ("prepare.class_prompt", "class images"),
    ("adapter.text_encoder", "adapters on the text encoders"),
)  # that all subjects of a fleet have, or none
NAME = re.compile(r"\w[\w.-]*")
TABLES = (".csv", ".tsv")


@dataclass(frozen=True)
class Entry:
    """A subject of a fleet: its config, or the problem that keeps it from training."""

    name: str  # of its folder, unique; `entry 3` for one without a name that can be used
    cfg: Config | None
    problem: str | None


def read(config: Path, subjects: Path, overrides: Sequence[str] = (), settled_s: float = 0.0) -> list[Entry]:
    """The subjects in a list, each with the config that `config`, with overrides applied, makes of it.

    `subjects` is a YAML or CSV file, a folder of photo folders, or the text file of the DreamBooth dataset.
    What an entry sets counts more than an override. Subjects whose photos changed less than `settled_s`
    seconds ago, as while they are copied, are left out. Reads no photo, and keeps nothing: call it again to
    find subjects that were added.

    Raises ConfigError if `config` or the list as a whole cannot be used.
    """
    shared = _Shared.read(config, overrides)
    entries: dict[str, Entry] = {}
    for number, given in enumerate(_given(subjects, shared), 1):
        name, cfg, problem = f"entry {number}", None, None
        try:
            own, wrong = _own(given, subjects if subjects.is_dir() else subjects.parent)
            photos = shared.photos(own)
            below = shared.below(own)
            if settled_s and photos and _changed(photos, below, settled_s):
                continue
            name = _name(own, photos, entries)
            if wrong:
                raise ConfigError(*wrong)
            cfg = shared.with_own(name, own)
            assert photos  # else the config has a problem
            _check_photos(photos, below)
        except ConfigError as error:
            problem = "; also, ".join(error.problems)
        except OSError as error:
            problem = os_problem(error)
        entries[name] = Entry(name, cfg, None) if problem is None else Entry(name, None, problem)
    return list(entries.values())


def shared(config: Path, overrides: Sequence[str] = ()) -> Config:
    """The config of a fleet, with a stand-in for what each subject has of its own; `run_dir` is the fleet's.

    Raises ConfigError if it cannot be used.
    """
    return _Shared.read(config, overrides).cfg


@dataclass(frozen=True)
class _Shared:
    """The config of a fleet."""

    values: Mapping[str, Any]  # as they are written: prompts have no words yet
    cfg: Config  # completed by STAND_IN

    @classmethod
    def read(cls, path: Path, overrides: Sequence[str]) -> _Shared:
        values = loading.read_yaml(path, kinds())
        if problems := [
            problem for item in overrides if (problem := loading.override(values, item, kinds()))
        ]:
            raise ConfigError(*problems)
        if values.get("subjects"):
            raise ConfigError(
                f"{path} has `subjects`, which one adapter learns together; a fleet trains an adapter for "
                "each subject in its list: remove them"
            )
        complete = loading.plain(STAND_IN)
        loading.merge(complete, {key: value for key, value in values.items() if value is not None}, kinds())
        return cls(values, Config.from_dict(complete))

    @property
    def outputs(self) -> list[Path]:
        """Folders that may have images, but are no subjects."""
        assert self.cfg.prepare
        class_dir = self.cfg.prepare.class_dir
        return [files.expand(folder).resolve() for folder in (self.cfg.run_dir, class_dir) if folder]

    def photos(self, own: Mapping[str, Any]) -> Path | None:
        """The folder with a subject's photos, if it has one."""
        photos = own.get("prepare.photos") or (self.values.get("prepare") or {}).get("photos")
        return files.expand(photos) if photos else None

    def below(self, own: Mapping[str, Any]) -> bool:
        """Whether the photos of a subject are in folders below its own, too."""
        assert self.cfg.prepare
        return own.get("prepare.subfolders", self.cfg.prepare.subfolders) is True

    def with_own(self, name: str, own: Mapping[str, Any]) -> Config:
        """The config of a subject. Raises ConfigError if its own settings do not go with the others."""
        run_dir = Path(self.cfg.run_dir) / name
        repo = {"hub.repo": f"{self.cfg.hub.repo}-{name}"} if self.cfg.hub.repo else {}
        folders = {"subject.name": name, "run_dir": str(run_dir), "data.shards": str(run_dir / "shards")}
        values = loading.plain(self.values)
        for key, value in (repo | dict(own) | folders).items():
            if problem := loading.put(values, key, value, kinds()):
                raise ConfigError(problem)
        cfg = Config.from_dict(values)
        if problems := [*self._other_parts(cfg), *_words_nowhere(cfg, own)]:
            raise ConfigError(*problems)
        return cfg

    def _other_parts(self, cfg: Config) -> Iterator[str]:
        """Problems with a subject that has other parts than the rest, and so cannot share their batches."""
        here, there = ((one.prepare and one.prepare.has_class_images, one.adapter.text_encoder)
                       for one in (cfg, self.cfg))  # fmt: skip
        for (key, what), mine, theirs in zip(PARTS, here, there, strict=True):
            if bool(mine) != bool(theirs):
                yield f"{key}: the subjects of a fleet have {what} either all or none; set it in the config"


def _words_nowhere(cfg: Config, own: Mapping[str, Any]) -> Iterator[str]:
    """Problems with words of a subject that its prompts do not have, as they lack `{}`."""
    assert cfg.prepare
    prompts = f"{cfg.prepare.instance_prompt} {cfg.prepare.class_prompt or ''}"
    for key in ("subject.token", "subject.class_word"):
        if (word := own.get(key)) and word not in prompts and not cfg.prepare.captions:
            yield (
                f"{key} is '{word}', but prepare.instance_prompt is '{cfg.prepare.instance_prompt}'; put "
                "{} into it in the config, which stands for the words of each subject"
            )


def _given(subjects: Path, shared: _Shared) -> Sequence[Any]:
    """The entries of a list, as they are written."""
    if subjects.is_dir():
        found = _in_folder(subjects, shared.below({}))
        return [one for one in found if (subjects / one["photos"]).resolve() not in shared.outputs]
    if subjects.name == TEXTS:
        dataset = Dataset.read(subjects.parent)
        return [{"name": name, "photos": name, "class": kind} for name, kind in dataset.subjects]
    if subjects.suffix.lower() in TABLES:
        return _in_table(subjects)
    entries = loading.read_entries(subjects, kinds() | {key: kinds()[name] for key, name in ALIASES.items()})
    if isinstance(entries, list):
        return entries
    named = {name: {} if given is None else given for name, given in entries.items()}
    return [{"name": name} | given if isinstance(given, dict) else given for name, given in named.items()]


def _in_folder(folder: Path, below: bool) -> list[dict[str, Any]]:
    """An entry for each folder of photos in a folder. The DreamBooth dataset's text has their classes.

    `below`: their photos may be in folders of theirs.
    """
    found = list(subfolders(folder, below))
    if not found and listing(folder).photos:
        raise ConfigError(
            f"SUBJECTS is '{folder}', which has photos itself, but each of its folders would be a subject; "
            "use the folder that it is in"
        )
    subjects = Dataset.read(folder).subjects if (folder / TEXTS).is_file() else ()
    words = {name: {"class": kind} for name, kind in subjects}
    return [{"photos": inner.name} | words.get(inner.name, {}) for inner in found]


def _in_table(path: Path) -> list[dict[str, Any]]:
    """An entry for each row of a CSV file that has cells. An empty cell sets nothing."""
    try:
        text = re.sub(r"\A\s*\n", "", loading.text_of(path, "list"))
        first, _, rest = text.partition("\n")
        separator = max(",;\t", key=first.count)
        if told := re.fullmatch(r"sep=(.)\s*", first):  # as Excel has it
            separator, text = told[1], rest
        table = csv.DictReader(
            io.StringIO(text, newline=""), delimiter=separator, restkey="a cell without a column", strict=True
        )
        columns = [
            name.strip() or f"column {number}" for number, name in enumerate(table.fieldnames or (), 1)
        ]
        table.fieldnames = columns
        rows = list(table)
    except OSError as error:
        raise ConfigError(f"cannot read list {path}: {error.strerror}") from error
    except (csv.Error, ValueError) as error:
        raise ConfigError(f"{path} is not a valid CSV file: {error}") from error
    if twice := next((name for name in columns if columns.count(name) > 1), None):
        raise ConfigError(f"{path} has more than one column '{twice}'; remove one")
    named = ({name: text for name, text in row.items() if "".join(text or "").strip()} for row in rows)
    return [{name: _cell(name, text) for name, text in row.items()} for row in named if row]


def _cell(name: str, text: Any) -> Any:
    """What the text of a cell means; text that means nothing stays, and its setting refuses it."""
    with suppress(yaml.YAMLError, ValueError, RecursionError, AttributeError):
        return loading.value_of(ALIASES.get(name, name), text.strip(), kinds())
    return text


def _own(given: Any, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """The settings of an entry by dotted key, with its folders in `folder`, and problems with other keys."""
    if not isinstance(given, dict):
        raise ConfigError(f"it is {given!r}, not settings; write them as `key: value`, e.g. photos: dog")
    own: dict[str, Any] = {}
    problems = []
    for written, value in _flat(given):
        key = ALIASES.get(written, written)
        if key in own:
            problems.append(f"{key} is given twice; remove one")
        elif key in MAY_DIFFER:
            own[key] = str(folder / files.expand(value)) if key in PATHS and value else value
        elif key in kinds():
            problems.append(f"{key} is '{value}', but all subjects of a fleet share it; set it in the config")
        else:
            problems.append(f"unknown key '{written}'{loading.did_you_mean(written, [*ALIASES, *kinds()])}")
    return own, problems


def _flat(values: Mapping[str, Any], section: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of nested settings."""
    for name, value in values.items():
        if isinstance(value, dict) and (key := f"{section}{name}") not in MAY_DIFFER:
            yield from _flat(value, f"{key}.")
        else:
            yield f"{section}{name}", value


def _name(own: Mapping[str, Any], photos: Path | None, taken: Mapping[str, Entry]) -> str:
    """The name of a subject: its own, or that of its photos' folder. Raises ConfigError if it has none."""
    given = own.get("subject.name")
    name = re.sub(r"[^\w.-]+", "_", photos.name if photos else "") if given is None else str(given)
    if not NAME.fullmatch(name):
        raise ConfigError(f"name is '{name}', but it names a folder; use letters, digits, '.', '-' and '_'")
    if len(os.fsencode(name)) > LONGEST:
        raise ConfigError(f"name is '{name}', of {len(os.fsencode(name))} bytes; use at most {LONGEST}")
    if name in taken:
        raise ConfigError(f"the name '{name}' is that of an entry before it; give each its own")
    return name


def _check_photos(folder: Path, below: bool) -> None:
    """Raise ConfigError if a folder has no photos."""
    if not folder.is_dir():
        raise ConfigError(f"prepare.photos: '{folder}' is not a directory")
    if not listing(folder, below).photos:
        raise ConfigError(f"prepare.photos: {no_photos(folder)}")


def _changed(folder: Path, below: bool, seconds: float) -> bool:
    """Whether something in a folder changed in the last `seconds`. Programs that copy keep the mtime only."""
    try:
        every = folders(folder) if below else [folder]
        latest = max(path.lstat().st_ctime for one in every for path in (one.resolve(), *one.iterdir()))
    except FileNotFoundError:  # there is no such folder, or a file has just got its final name
        return folder.is_dir()
    return time.time() - latest < seconds
