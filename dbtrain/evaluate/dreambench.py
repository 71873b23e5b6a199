"""The public DreamBooth dataset: settings for each of its subjects, and the mean of their scores.

    python -m dbtrain.evaluate.dreambench settings DATASET N
    python -m dbtrain.evaluate.dreambench table DATASET [RUNS]

DATASET is the folder `dataset` of github.com/google/dreambooth: a folder of photos for each of 30 subjects,
and a text file with their classes and 25 prompts each for objects and live subjects.
`launch/dreambench.sbatch` trains and scores all of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import typer

from dbtrain.runtime import exit_codes, files
from dbtrain.runtime.errors import ConfigError
from dbtrain.runtime.run_folder import SCORES, RunFolder

TEXTS = "prompts_and_classes.txt"
LIVE = ("cat", "dog")  # classes that use the prompts for live subjects
TOKEN = "sks"
RUNS = Path("runs/dreambench")

# Ruiz et al. 2022, table 1: DreamBooth on Stable Diffusion, and photos of a subject among themselves.
PUBLISHED = {
    "dino": 0.668, "clip_i": 0.803, "clip_t": 0.305, "dino_real": 0.774, "clip_i_real": 0.885
}  # fmt: skip
ROWS = (
    ("dino", "DINO"),
    ("clip_i", "CLIP-I"),
    ("clip_t", "CLIP-T"),
    ("dino_real", "DINO, real images"),
    ("clip_i_real", "CLIP-I, real images"),
    ("dino_base", "DINO, base model"),
    ("clip_t_base", "CLIP-T, base model"),
    ("preservation", "PRES"),
    ("preservation_base", "PRES, base model"),
    ("diversity", "diversity"),
)
# What must be the same in all scores that are averaged.
ALIKE = ("dino_model", "dino_preprocessing", "clip_model", "clip_preprocessing", "images")


@dataclass(frozen=True)
class Dataset:
    folder: Path
    subjects: tuple[tuple[str, str], ...]  # name of the folder, class
    objects: tuple[str, ...]  # prompts, with {} for the subject
    live: tuple[str, ...]

    @classmethod
    def read(cls, folder: Path) -> Dataset:
        """Read the dataset's text file. Raises ConfigError if it is missing or has another format."""
        path = folder / TEXTS
        try:
            head, objects, live = re.split(
                r"^(?:Object|Live Subject) Prompts\s*$", path.read_text(), flags=re.M
            )
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{path} is not the list of subjects and prompts of the DreamBooth dataset; use the folder "
                "'dataset' of github.com/google/dreambooth"
            ) from error
        subjects: list[tuple[str, str]] = re.findall(r"^(\w+),([\w ]+?)\s*$", head, re.M)
        subjects = [pair for pair in subjects if pair != ("subject_name", "class")]
        prompts = [tuple(_prompts(part)) for part in (objects, live)]
        if not (subjects and all(prompts)):
            raise ConfigError(f"{path} has {len(subjects)} subjects, {len(prompts[0])} prompts for objects "
                              f"and {len(prompts[1])} for live subjects; none of them can be 0")  # fmt: skip
        return cls(folder, tuple(subjects), prompts[0], prompts[1])

    def settings(self, number: int, images: int = 4) -> list[str]:
        """Config overrides, as `section.key=value`, for subject `number`, counted from 1."""
        if not 1 <= number <= len(self.subjects):
            raise ConfigError(
                f"there is no subject {number}; {self.folder} has subjects 1 to {len(self.subjects)}"
            )
        name, kind = self.subjects[number - 1]
        prompts = self.live if kind in LIVE else self.objects
        return [
            f"run_dir={RUNS / name}",
            f"data.shards={Path('shards/dreambench') / name}",
            f"prepare.photos={self.folder / name}",
            f"subject.token={TOKEN}",
            f"subject.class_word={kind}",
            "prepare.instance_prompt=a {}",
            "prepare.class_prompt=a {class}",
            'validation.prompts=["a {}", "a {class}"]',
            "sample.prompts=[]",
            f"evaluation.prompts={json.dumps(prompts)}",
            f"evaluation.images={images}",
        ]

    def scores(self, runs: Path) -> dict[str, dict[str, Any]]:
        """The scores.json of each subject that `evaluate` has scored, by name."""
        paths = {name: RunFolder(runs / name).scores / SCORES for name, _ in self.subjects}
        return {name: _scores(path) for name, path in paths.items() if path.is_file()}


def _prompts(text: str) -> Iterator[str]:
    """The prompts in lines like `'a {0} {1} in the snow'.format(unique_token, class_token),`."""
    for prompt in re.findall(r"""^\s*(["'])(.*)\1\.format\(unique_token, class_token\),?\s*$""", text, re.M):
        yield prompt[1].replace("{0} {1}", "{}")


def _scores(path: Path) -> dict[str, Any]:
    """A scores.json. Raises ConfigError if it is not one of DINO and CLIP."""
    values = files.read_json(path)
    if missing := [name for name in ("dino", "clip_i", "clip_t", *ALIKE) if name not in values]:
        raise ConfigError(f"{path} has no {', '.join(missing)}: another judge wrote it")
    return values


def table(found: Sequence[dict[str, Any]], subjects: int) -> str:
    """Mean scores beside the paper's. Raises ConfigError if the subjects were not scored the same way."""
    for name in ALIKE:
        if len(values := sorted({str(one[name]) for one in found})) > 1:
            raise ConfigError(f"subjects were scored with different {name}: {', '.join(values)}")
    lines = [f"{len(found)} of {subjects} subjects", f"{'':20}{'ours':>8}{'paper':>8}"]
    for name, text in ROWS:
        values = [one[name] for one in found if name in one]
        ours = f"{mean(map(float, values)):.3f}" if values else "-"
        paper = f"{PUBLISHED[name]:.3f}" if name in PUBLISHED else ""
        lines.append(f"{text:20}{ours:>8}{paper:>8}".rstrip())
    return "\n".join(lines)


app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
Folder = Annotated[Path, typer.Argument(metavar="DATASET", help="folder `dataset` of google/dreambooth")]


@app.command("settings")
def print_settings(
    dataset: Folder,
    number: Annotated[int, typer.Argument(metavar="N", help="number of the subject, from 1")],
    images: Annotated[int, typer.Option(help="images per prompt")] = 4,
) -> None:
    """Print the config overrides to train and score subject N, one `section.key=value` per line."""
    print(*Dataset.read(dataset).settings(number, images), sep="\n")


@app.command("table")
def print_table(
    dataset: Folder,
    runs: Annotated[Path, typer.Argument(help="folder with the run folder of each subject")] = RUNS,
    when_all: Annotated[
        bool, typer.Option("--when-all", help="print nothing until all subjects are scored")
    ] = False,
) -> None:
    """Print the mean scores over all subjects that are scored, beside the paper's."""
    everything = Dataset.read(dataset)
    found = everything.scores(runs)
    if not found and not when_all:
        raise ConfigError(f"no subject has scores in {runs}; run: dbtrain evaluate")
    if not when_all or len(found) == len(everything.subjects):
        print(table(list(found.values()), len(everything.subjects)))


if __name__ == "__main__":
    exit_codes.end(lambda: app(standalone_mode=True))
