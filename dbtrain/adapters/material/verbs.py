"""The commands of `dbtrain adapter`, their arguments, and their help."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dbtrain.runtime import start
from dbtrain.runtime.errors import ConfigError
from dbtrain.runtime.imports import importing

if TYPE_CHECKING:
    from dbtrain.adapters.material.adapter_file import AdapterFile
    from dbtrain.adapters.material.fit import Fits, Limit

app = typer.Typer(
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Look into adapter files of any format and trainer; add, resize, compare, extract and bake them.",
)
OutFile = Annotated[
    Path, typer.Argument(metavar="OUT", help=".safetensors file, or for PEFT's format a folder")
]
File = Annotated[str, typer.Argument(metavar="FILE", help="adapter file, PEFT folder, or run folder")]
Files = Annotated[
    list[str], typer.Argument(metavar="FILE[:WEIGHT]...", help="adapters; a weight is 1 by default")
]
BaseOption = Annotated[
    str | None,
    typer.Option(
        "--base", metavar="MODEL", help="the model that the adapters are for: folder, file or Hub id"
    ),
]
Rank = Annotated[int | None, typer.Option(min=1, help="rank of each layer, or with --energy the largest")]
Energy = Annotated[
    float | None, typer.Option(help="share of each layer's squared norm to keep, e.g. 0.99: a rank per layer")
]
Format = Annotated[
    str | None,
    typer.Option("--format", help="diffusers, peft, kohya or comfyui (default: as the first file)"),
]
Dtype = Annotated[str, typer.Option(help="of the weights: fp32, fp16 or bf16")]
Json = Annotated[bool, typer.Option("--json", help="print all of it as JSON")]


@app.command()
def info(file: File, json: Json = False) -> None:
    """Say what a file holds: format, kind, parts, ranks, alphas, norms, base, and its header's entries."""
    _begin("info", file)
    from dbtrain.adapters.material import info as verb
    from dbtrain.adapters.material.adapter_file import AdapterFile

    found = verb.info(AdapterFile.read(file))
    _print(verb.as_json(found) if json else "\n".join(verb.table(found)))


@app.command()
def merge(
    out: OutFile,
    adapters: Files,
    rank: Rank = None,
    energy: Energy = None,
    base: BaseOption = None,
    form: Format = None,
    dtype: Dtype = "fp32",
    json: Json = False,
) -> None:
    """Write the weighted sum of adapters of any formats and kinds as a LoRA, with all ranks or fewer."""
    _begin("merge", f"{', '.join(adapters)} into {out}")
    _write_sum(out, adapters, _limit(rank, energy, dtype, form), base, form, dtype, json)


@app.command()
def resize(
    out: OutFile,
    file: File,
    rank: Rank = None,
    energy: Energy = None,
    base: BaseOption = None,
    form: Format = None,
    dtype: Dtype = "fp32",
    json: Json = False,
) -> None:
    """Write an adapter as a LoRA of another rank, by SVD, with the error of each layer."""
    if rank is None and energy is None:
        raise ConfigError("resize needs a size; add --rank, e.g. --rank 16, or --energy, e.g. --energy 0.99")
    _begin("resize", f"{file} into {out}")
    _write_sum(out, [file], _limit(rank, energy, dtype, form), base, form, dtype, json)


@app.command()
def extract(
    out: OutFile,
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="the tuned model: folder, file or Hub id")],
    base: Annotated[str, typer.Argument(metavar="BASE", help="the model that it was tuned from")],
    rank: Rank = None,
    energy: Energy = None,
    form: Format = None,
    dtype: Dtype = "fp32",
    json: Json = False,
) -> None:
    """Write the difference of two models as a LoRA."""
    if rank is None and energy is None:
        raise ConfigError("extract needs a size; add --rank, e.g. --rank 32, or --energy, e.g. --energy 0.99")
    _begin("extract", f"{tuned} without {base} into {out}")
    limit = _limit(rank, energy, dtype, form)
    from dbtrain.adapters.material import extract as verb
    from dbtrain.adapters.material.adapter_file import find_base
    from dbtrain.adapters.material.output import write

    was = find_base(base)
    changes, fits, others = verb.extracted(find_base(tuned), was, limit)
    write(out, changes, was, form, dtype)
    _report(out, fits, json, {"left_out": others})
    if others and not json:
        _print(f"left out: {len(others)} tensors that no LoRA holds, e.g. {others[0]}")


@app.command()
def diff(one: File, other: File, base: BaseOption = None, json: Json = False) -> None:
    """Say how far apart two adapters are, in each part, whatever their formats, kinds and ranks."""
    _begin("diff", f"{one} and {other}")
    from dbtrain.adapters.material import compare as verb
    from dbtrain.adapters.material import info
    from dbtrain.adapters.material.adapter_file import AdapterFile, find_base

    model = find_base(base) if base else None
    found = verb.difference(AdapterFile.read(one, model), AdapterFile.read(other, model))
    _print(info.as_json(verb.as_json(*found)) if json else "\n".join(verb.table(*found)))


@app.command()
def bake(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="folder to write")],
    base: Annotated[str, typer.Argument(metavar="BASE", help="model: Diffusers folder, file or Hub id")],
    adapters: Files,
) -> None:
    """Write a base with adapters merged into its weights, as a Diffusers folder."""
    _begin("bake", f"{', '.join(adapters)} into {out}")
    from dbtrain.adapters.material import bake as verb
    from dbtrain.runtime import files

    parts, model = _sources(adapters, base)
    layers, size = verb.bake(out, model, parts)
    _print(f"{out}: {base} with {layers} layers changed, {files.size_text(size)}")


def _begin(verb: str, what: str) -> None:
    """Say what begins, and start terminal output."""
    start.say(f"adapter {verb}", what)
    with importing(at_start=True):
        from dbtrain.adapters.material import adapter_file  # noqa: F401  # most of what all of them import
        from dbtrain.runtime import console

    console.start()


def _print(text: str) -> None:
    from dbtrain.runtime.errors import printable

    for line in text.splitlines():
        print(printable(line))


def _limit(rank: int | None, energy: float | None, dtype: str, form: str | None) -> Limit:
    """The limit of the rank that is asked for. Raises ConfigError for values that no option takes."""
    from dbtrain.adapters.material.fit import Limit
    from dbtrain.adapters.material.output import DTYPES, FORMS

    for name, value, known in (("--dtype", dtype, DTYPES), ("--format", form, FORMS)):
        if value is not None and value not in known:
            raise ConfigError(f"{name} is '{value}'; use one of {', '.join(known)}")
    if energy is not None and not 0 < energy <= 1:
        raise ConfigError(f"--energy is {energy:g}, not a share; use a number up to 1, e.g. 0.99")
    return Limit(rank, energy)


def _sources(adapters: list[str], base: str | None) -> tuple[list[tuple[AdapterFile, float]], Any]:
    """The adapters with their weights, and the base if there is one."""
    from dbtrain.adapters.material.adapter_file import AdapterFile, find_base, weighted
    from dbtrain.runtime import console

    model = find_base(base) if base else None
    parts = [(AdapterFile.read(path, model), weight) for path, weight in map(weighted, adapters)]
    for source, _ in parts:
        if source.words:
            console.say(f"{source.path}: its learned words ({', '.join(source.words)}) are left out")
    return parts, model


def _write_sum(
    out: Path, adapters: list[str], limit: Limit, base: str | None, form: str | None, dtype: str, json: bool
) -> None:
    """Write the weighted sum of adapters, of which one is a sum too, and say how well it fits."""
    from dbtrain.adapters.material import merge
    from dbtrain.adapters.material.output import write

    parts, _ = _sources(adapters, base)
    changes, fits = merge.merged(parts, limit)
    said = ", ".join(f"{source.path.name}:{weight:g}" for source, weight in parts)
    about = {"modelspec.merged_from": said} if len(parts) > 1 else {}
    write(out, changes, merge.together([source for source, _ in parts]), form, dtype, about)
    _report(out, fits, json)


def _report(out: Path, fits: Fits, json: bool, more: dict[str, Any] | None = None) -> None:
    from dbtrain.adapters.material import fit, info

    if json:
        _print(info.as_json({"out": str(out), "layers": fit.as_json(fits), **(more or {})}))
        return
    _print("\n".join([f"{out}:", *fit.table(fits)]))
