"""How to use what a run exported: the words for prompts, and which file is for which program."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dbtrain.config import Config, subject_words
from dbtrain.models.locate import EMBEDDED, embedded
from dbtrain.report.run import Run
from dbtrain.runtime.errors import ConfigError
from dbtrain.runtime.run_folder import RunFolder

DIFFUSERS = "pytorch_lora_weights.safetensors"  # the name that Diffusers looks for
PEFT = "adapter_config.json"  # in a PEFT folder
DIFF = "-diff.safetensors"  # how a file with the change of whole weights ends
SUBJECT = "a photo of the subject"  # where no prompt is known
PLACE = "in the snow"  # for the example: a prompt that no photo shows
LEARNED = (
    "The word that was learned is a file of its own; README.md beside the adapter has the lines to load it."
)
DORA = "Only LyCORIS applies DoRA as it was trained; here the images will differ."


@dataclass(frozen=True)
class Words:
    """What to write in prompts. `token` and `kind` are empty where the config does not tell them."""

    token: str
    kind: str
    trigger: str  # "sks dog"
    example: str  # "a photo of sks dog in the snow"
    of_class: str  # "a photo of a dog", which should still give others of the class


@dataclass(frozen=True)
class Program:
    """A program that loads the adapter. `source` is None if its file has not been exported."""

    name: str
    source: Path | None
    place: str  # where the file goes; empty: it stays where it is
    how: str
    code: str  # to write in the program; empty: nothing
    note: str = ""


def words(cfg: Config) -> Words | None:
    """The words for the subject of a config; None if the config does not tell what the photos show."""
    if cfg.prepare is None:
        return None
    prompt = cfg.prepare.instance_prompt
    try:
        found = subject_words.of(cfg.prepare, cfg.subject)
    except ConfigError:  # unusual prompts: the whole prompt is the trigger
        return Words("", "", prompt, f"{prompt} {PLACE}", cfg.prepare.class_prompt or "")
    trigger = f"{found.token} {found.kind}"
    return Words(found.token, found.kind, trigger, f"{prompt} {PLACE}", found.class_prompt)


def programs(run: Run) -> list[Program]:
    """The programs that load the run's files, or could if one more is exported; none before any export."""
    if not any(_exported(run.names)):
        return []
    return [*_python(run), *(_interfaces(run) if run.cfg.model.path != EMBEDDED else [])]


def commands(run: Run) -> dict[str, str]:
    """Shell commands by what they do: export for other programs, images from the command line."""
    formats = list(_exported(run.names))
    if not formats:
        return {}
    there = RunFolder(run.cfg.run_dir)
    config, adapter = (shlex.quote(str(path)) for path in (there.config, there.path))
    said = words(run.cfg)
    prompt = shlex.quote(said.example if said else SUBJECT)
    found = {}
    if any(program.source is None for program in programs(run)):
        more = ",".join([*formats, _single_format(run.names)])
        names = " and ".join(program.name for program in programs(run) if program.source is None)
        found[f"A file for {names}"] = f'dbtrain export {config} "export.formats=[{more}]"'
    found["Images from the command line"] = (
        f"dbtrain sample {config} --prompt {prompt} --adapter none --adapter {adapter}"
    )
    return found


def _exported(names: RunFolder) -> Iterator[str]:
    """The formats in the export folder."""
    if (names.export / DIFFUSERS).is_file():
        yield "diffusers"
    if any(names.export.glob(f"*/{PEFT}")):
        yield "peft"
    if _single(names):
        yield _single_format(names)
    if _single(names, diff=True):
        yield "diff"


def _single_format(names: RunFolder) -> str:
    """The format of one file for programs with a window: by the component that was trained."""
    folders = (names.export, *names.checkpoints()[-1:])
    return "comfyui" if any((folder / "transformer").is_dir() for folder in folders) else "kohya"


def _single(names: RunFolder, diff: bool = False) -> Path | None:
    """The export in that format, or the one with the change of whole weights."""
    found = sorted(names.export.glob("*.safetensors"))
    mine = (path for path in found if path.name != DIFFUSERS and path.name[0] != ".")
    return next((path for path in mine if path.name.endswith(DIFF) == diff), None)


def _learned(names: RunFolder) -> Path | None:
    """The file of a learned word."""
    return next(names.export.glob("embeddings/*.safetensors"), None)


def _python(run: Run) -> Iterator[Program]:
    export = run.names.export
    base = str(embedded()) if run.cfg.model.path == EMBEDDED else run.cfg.model.path
    said = words(run.cfg)
    prompt = said.example if said else SUBJECT
    note = LEARNED if _learned(run.names) else ""
    head = f"from diffusers import DiffusionPipeline\n\npipe = DiffusionPipeline.from_pretrained({base!r})\n"
    if (export / DIFFUSERS).is_file():
        yield Program(
            "Diffusers", export / DIFFUSERS, "", "load_lora_weights",
            f"{head}pipe.load_lora_weights({str(export)!r}, weight_name={DIFFUSERS!r})\n"
            f"pipe({prompt!r}).images[0].save('image.png')", note,
        )  # fmt: skip
    folders = sorted(path.parent for path in export.glob(f"*/{PEFT}"))
    if folders:
        loads = "".join(
            f"pipe.{folder.name} = PeftModel.from_pretrained(pipe.{folder.name}, {str(folder)!r})\n"
            for folder in folders
        )
        yield Program(
            "Diffusers with PEFT", export, "", "PeftModel.from_pretrained",
            f"from peft import PeftModel\n{head}{loads}pipe({prompt!r}).images[0].save('image.png')", note,
        )  # fmt: skip


def _interfaces(run: Run) -> Iterator[Program]:
    name, path, said = run.folder.name, _single(run.names), words(run.cfg)
    prompt = said.example if said else SUBJECT
    note = DORA if run.cfg.adapter.dora else ""
    if note and (whole := _single(run.names, diff=True)):
        path, note = whole, ""
    word = _learned(run.names)
    learned = (
        f" Copy {word} to ComfyUI/models/embeddings too, and write embedding:{word.stem}." if word else ""
    )
    yield Program(
        "ComfyUI", path, f"ComfyUI/models/loras/{name}.safetensors",
        "a “Load LoRA” node behind the checkpoint, strength 1", "", (note + learned).strip(),
    )  # fmt: skip
    if _single_format(run.names) == "comfyui":
        return
    yield Program(
        "A1111, Forge", path, f"models/Lora/{name}.safetensors",
        "in the prompt, with the strength after the name", f"{prompt} <lora:{name}:1>", note,
    )  # fmt: skip
