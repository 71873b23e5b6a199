"""Write a first config for a folder of photos, from the example config of its base model."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import dbtrain
from dbtrain.config.loading import read_yaml
from dbtrain.config.template import filled
from dbtrain.data import photo_files, sizes
from dbtrain.data.sizes import Size
from dbtrain.runtime import files
from dbtrain.runtime.errors import ConfigError, printable

LAUNCH = ("*.sbatch", "slurm.sh", "torchrun*.sh")  # the scripts that need no checkout
NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
WORD = re.compile(r"[^\W\d_]([\w' -]*\w)?")
TYPICAL = 5  # number of photos that the examples' steps are meant for


def examples() -> dict[str, Path]:
    """The example config of each base, by the name of the base."""
    found = sorted(shipped("configs").glob("*.yaml"))
    return {path.stem.replace("quickstart", "tiny"): path for path in found}


def init(name: str, photos: Path, base: str, word: str | None = None) -> Iterator[str]:
    """Write configs/NAME.yaml and the launch scripts that ./launch lacks; yield lines for the user.

    `word` says what the photos show and defaults to the name of the folder. Raises ConfigError if the
    name, base, word, or folder cannot be used, or if the config exists.
    """
    config = Path("configs") / f"{name}.yaml"
    if not NAME.fullmatch(name):
        raise ConfigError(
            f"NAME is '{name}', but it becomes a file name; use letters, digits, '.', '-' and '_'"
        )
    if base not in examples():
        raise ConfigError(f"--base is '{base}'; choose from {', '.join(examples())}")
    if config.exists():
        raise ConfigError(f"{config} already exists; choose another NAME, or delete the file")
    found = sizes_of(photos)
    sides = {path: min(size) for path, size in found.items()}
    what = photos.resolve().name if word is None else word
    if not WORD.fullmatch(what):
        given = f"--word is '{what}'" if word is not None else f"the folder is called '{what}'"
        raise ConfigError(f"{given}; use plain words for what the photos show, e.g. --word dog")

    # Start from the example and replace the settings that depend on the photos.
    example = examples()[base]
    settings = read_yaml(example)
    steps, resolution = steps_for(len(sides), settings["train"]["steps"]), settings["prepare"]["resolution"]
    text = filled(
        example.read_text(encoding="utf-8"),
        {
            "subject.name": name,
            "subject.class_word": what,
            "prepare.photos": str(photos),
            "train.steps": steps,
        },
    )
    cut = sum(sizes.kept(*size, Size.square(resolution)) < sizes.KEPT for size in found.values())
    if cut:  # else the setting would change nothing
        line = f"buckets: true # {_count(cut, 'photo')} cut by squares"
        text = re.sub(r"^( *)resolution: .*$", rf"\g<0>\n\1{line}", text, count=1, flags=re.M)
    if what[0].lower() in "aeiou":
        text = text.replace("a {class}", "an {class}")
    command = shlex.join(["dbtrain", "init", name, str(photos), "--base", base, "--word", what])
    summary = describe(sides, resolution)
    header = [f"Written by: {command}", *summary]
    scripts = copy_scripts(Path("launch"))
    files.write_atomically(config, "".join(f"# {line}\n" for line in header) + text)

    yield from summary
    yield f"wrote {config}: 'a photo of sks {what}', {steps} steps at {resolution} px"
    if word is None:
        yield f"'{what}' is the name of the folder; use --word if the photos show something else"
    if scripts:
        yield f"copied {len(scripts)} scripts for multiple GPUs and SLURM to launch/"
    yield "next:"
    yield f"  dbtrain doctor {config}"
    yield f"  dbtrain run {config}"
    yield f"  bash launch/torchrun.sh run {config}  # on all GPUs of this machine"


def shipped(name: str) -> Path:
    """A folder that ships with dbtrain: inside the installed package, or beside it in a checkout."""
    package = Path(dbtrain.__file__).parent
    return package / name if (package / name).is_dir() else package.parent / name


def sizes_of(folder: Path) -> dict[Path, tuple[int, int]]:
    """(height, width) of each photo, px. Raises ConfigError if there are none, or unreadable ones."""
    if not folder.is_dir():
        raise ConfigError(f"PHOTOS is '{folder}', which is not a directory")
    if not str(folder).isprintable():
        raise ConfigError(f"PHOTOS is {str(folder)!r}, which YAML cannot hold; rename the folder")
    found: dict[Path, tuple[int, int]] = {}
    problems: list[str] = []
    for path in photo_files.listing(folder).photos:
        try:
            found[path] = photo_files.size(path)
        except ConfigError as problem:
            problems += problem.problems
    if problems:
        raise ConfigError(*problems)
    if not found:
        raise ConfigError(f"PHOTOS: {photo_files.no_photos(folder)}")
    return found


def describe(sides: dict[Path, int], resolution: int) -> list[str]:
    """Lines that say how many photos there are and which are smaller than the resolution."""
    folder, shortest, longest = next(iter(sides)).parent, min(sides.values()), max(sides.values())
    span = f"{shortest} px" if shortest == longest else f"{shortest} to {longest} px"
    small = [path.name for path, side in sides.items() if side < resolution]
    lines = [f"{_count(len(sides), 'photo')} in {folder}, short side {span}"]
    if small:
        names = printable(", ".join(small[:5])) + (f" and {len(small) - 5} more" if len(small) > 5 else "")
        lines.append(f"{_count(len(small), 'photo')} smaller than {resolution} px, to be enlarged: {names}")
    return lines


def steps_for(photos: int, steps: int) -> int:
    """Training steps, in hundreds: `steps` for 3 to 5 photos, half for fewer, up to twice for more."""
    scale = 0.5 if photos < 3 else min(max(photos / TYPICAL, 1), 2)
    return max(1, round(steps * scale / 100)) * 100


def copy_scripts(folder: Path) -> list[Path]:
    """Copy the launch scripts that a folder lacks; return the copies."""
    sources = sorted(path for pattern in LAUNCH for path in shipped("launch").glob(pattern))
    missing = [source for source in sources if not (folder / source.name).exists()]
    for source in missing:
        files.write_atomically(folder / source.name, source.read_bytes())
    return [folder / source.name for source in missing]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"
