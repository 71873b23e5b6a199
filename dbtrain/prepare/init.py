"""A first config for a folder of photos: a base's example config, about these photos."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

import dbtrain
from dbtrain.config.loading import read_yaml
from dbtrain.config.template import filled
from dbtrain.data import photo_files
from dbtrain.runtime import files
from dbtrain.runtime.errors import ConfigError

EXAMPLES = {  # by base: a file of configs/
    "sd15": "sd15.yaml", "sd21": "sd21.yaml", "sdxl": "sdxl.yaml", "deepfloyd": "deepfloyd.yaml",
    "deepfloyd-2": "deepfloyd-2.yaml", "tiny": "quickstart.yaml",
}  # fmt: skip
LAUNCH = ("*.sbatch", "slurm.sh", "torchrun*.sh")  # the scripts that work without a checkout
NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
WORD = re.compile(r"[^\W\d_]([\w' -]*\w)?")
USUAL = 5  # photos that the examples' steps are meant for


def init(name: str, photos: Path, base: str, word: str | None = None) -> Iterator[str]:
    """Write configs/NAME.yaml, and the launch scripts that ./launch lacks; yields lines for the user.

    `word` says what the photos show; it defaults to the folder's name. Raises ConfigError for a name, base,
    word or folder of photos that cannot be used, and if the config exists.
    """
    config = Path("configs") / f"{name}.yaml"
    if not NAME.fullmatch(name):
        raise ConfigError(f"NAME is '{name}', but it names files; use letters, digits, '.', '-' and '_'")
    if base not in EXAMPLES:
        raise ConfigError(f"--base is '{base}'; choose from {', '.join(EXAMPLES)}")
    if config.exists():
        raise ConfigError(f"{config} exists and is not overwritten; choose another NAME, or remove the file")
    sides = short_sides(photos)
    what = photos.resolve().name if word is None else word
    if not WORD.fullmatch(what):
        given = f"--word is '{what}'" if word is not None else f"the name of the folder is '{what}'"
        raise ConfigError(f"{given}; say in plain words what the photos show, e.g. --word dog")

    # The example's settings, but for those that depend on the photos.
    example = shipped("configs") / EXAMPLES[base]
    usual = read_yaml(example)
    steps, resolution = steps_for(len(sides), usual["train"]["steps"]), usual["prepare"]["resolution"]
    text = filled(
        with_word(example.read_text(encoding="utf-8"), what),
        {"run_dir": f"runs/{name}", "prepare.photos": str(photos), "data.shards": f"shards/{name}",
         "train.steps": steps},
    )  # fmt: skip
    command = shlex.join(["dbtrain", "init", name, str(photos), "--base", base, "--word", what])
    found = seen(sides, resolution)
    head = [f"Written by: {command}", *found]
    scripts = copy_scripts(Path("launch"))
    files.write_atomically(config, "".join(f"# {line}\n" for line in head) + text)

    yield from found
    yield f"wrote {config}: 'a photo of sks {what}', {steps} steps at {resolution} px"
    if word is None:
        yield f"'{what}' is the folder's name; --word gives another word for what the photos show"
    if scripts:
        yield f"copied {len(scripts)} scripts for several GPUs and SLURM to launch/"
    yield "next:"
    yield f"  dbtrain doctor {config}"
    yield f"  dbtrain run {config}"
    yield f"  bash launch/torchrun.sh run {config}  # on all GPUs of this machine"


def shipped(name: str) -> Path:
    """A folder that comes with dbtrain: inside the package once it is installed, beside it in a checkout."""
    package = Path(dbtrain.__file__).parent
    return package / name if (package / name).is_dir() else package.parent / name


def short_sides(folder: Path) -> dict[Path, int]:
    """The short side of each photo in a folder, px. Raises ConfigError if there are none, or broken ones."""
    if not folder.is_dir():
        raise ConfigError(f"PHOTOS is '{folder}', which is not a folder")
    if not str(folder).isprintable():
        raise ConfigError(f"PHOTOS is {str(folder)!r}, which YAML cannot hold; rename the folder")
    sides: dict[Path, int] = {}
    problems: list[str] = []
    for path in sorted(path for path in folder.iterdir() if photo_files.is_photo(path) and path.is_file()):
        try:
            sides[path] = min(photo_files.size(path))
        except ConfigError as problem:
            problems += problem.problems
    if problems:
        raise ConfigError(*problems)
    if not sides:
        raise ConfigError(
            f"PHOTOS is '{folder}', which holds no photos; put some there ({', '.join(photo_files.SUFFIXES)})"
        )
    return sides


def seen(sides: dict[Path, int], resolution: int) -> list[str]:
    """What is said of the photos: how many there are, and which are smaller than the resolution."""
    folder, shortest, longest = next(iter(sides)).parent, min(sides.values()), max(sides.values())
    span = f"{shortest} px" if shortest == longest else f"{shortest} to {longest} px"
    small = [path.name for path, side in sides.items() if side < resolution]
    lines = [f"{_count(len(sides), 'photo')} in {folder}, short side {span}"]
    if small:
        lines.append(
            f"{_count(len(small), 'photo')} smaller than {resolution} px, to be enlarged: {_some(small)}"
        )
    return lines


def steps_for(photos: int, usual: int) -> int:
    """Training steps, in hundreds: `usual` for 3 to 5 photos, half of it for fewer, up to twice for more."""
    scale = 0.5 if photos < 3 else min(max(photos / USUAL, 1), 2)
    return max(1, round(usual * scale / 100)) * 100


def with_word(text: str, word: str) -> str:
    """An example config with `word` for what its own photos show, in prompts and comments."""
    own = yaml.safe_load(text)["prepare"]["instance_prompt"].split()[-1]
    article = "an " if word[0].lower() in "aeiou" else "a "
    return re.sub(rf"\b(a )?{own}\b", lambda match: (article if match[1] else "") + word, text)


def copy_scripts(folder: Path) -> list[Path]:
    """Copy the launch scripts that a folder lacks; returns the copies."""
    sources = sorted(path for pattern in LAUNCH for path in shipped("launch").glob(pattern))
    lacking = [(source, folder / source.name) for source in sources if not (folder / source.name).exists()]
    for source, copy in lacking:
        files.write_atomically(copy, source.read_bytes())
    return [copy for _, copy in lacking]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _some(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
