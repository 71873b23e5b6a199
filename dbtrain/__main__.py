"""The command line: one function per command, its arguments, and their help."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import dbtrain
from dbtrain.adapters.material import verbs
from dbtrain.runtime import exit_codes, files, preemption, start
from dbtrain.runtime.errors import ConfigError
from dbtrain.runtime.imports import importing

if TYPE_CHECKING:
    from dbtrain.config import Config

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help=dbtrain.__doc__,
    epilog="Example: torchrun --nproc-per-node 4 -m dbtrain run configs/dog.yaml train.steps=800",
)
app.add_typer(verbs.app, name="adapter")
ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file that describes the subject")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="SECTION.KEY=VALUE", help="settings that override the file's, e.g. optim.lr=2e-4"),
]

# Commands import what they need when they run: help needs no pydantic, config errors need no torch.


def _load(
    verb: str, config: Path, overrides: list[str] | None, read: Callable[..., Config] | None = None
) -> Config:
    """Load and check the config, with `read` if given, then start signal handling and terminal output."""
    from dbtrain.config import Config

    cfg = (read or Config.load)(config, overrides or ())
    start.say(verb, f"{config}, run folder {cfg.run_dir}")
    preemption.listen(cfg.run_dir, cfg.faults.stop_before_s)
    with importing(at_start=True):
        from dbtrain.runtime import console, dist, slurm

    slurm.adopt()
    console.start()
    if dist.is_main():
        preemption.unmark()
    return cfg


def _print(lines: Iterable[str]) -> list[str]:
    """Print lines as they come; return all of them."""
    return [line for line in lines if not print(line, flush=True)]


@app.command()
def init(
    name: Annotated[str, typer.Argument(metavar="NAME", help="name of the config, the run, and the shards")],
    photos: Annotated[Path, typer.Argument(metavar="PHOTOS", help="folder of photos of the subject")],
    base: Annotated[str, typer.Option(help="base model, by its file in configs/, e.g. sdxl, flux2-klein")],
    word: Annotated[str | None, typer.Option(help="what the photos show (default: the folder)")] = None,
) -> None:
    """Write a config for a folder of photos and copy the launch scripts."""
    from dbtrain.prepare import init as verb

    _print(verb.init(name, photos, base, word))


@app.command()
def fetch(
    config: ConfigPath,
    overrides: Overrides = None,
    scoring: Annotated[bool, typer.Option("--scoring", help="the models that `evaluate` uses too")] = False,
) -> None:
    """Download the base model into the Hub's cache, as for a cluster whose nodes have no network."""
    cfg = _load("fetch", config, overrides)
    with importing(at_start=True):
        from dbtrain.evaluate import encoders
        from dbtrain.models.base import Base
        from dbtrain.train import training_adapter

    print(f"{cfg.model.path}: {Base.find(cfg.model).folder}")
    if path := training_adapter.fetch(cfg.model):
        print(f"{cfg.model.training_adapter}: {path}")
    for encoder in encoders.of(cfg.evaluation) if scoring else ():
        print(f"{encoder.name}: {encoder.folder}")


@app.command()
def prepare(config: ConfigPath, overrides: Overrides = None) -> None:
    """Encode photos and class images into shards of VAE latents and a prompt table."""
    cfg = _load("prepare", config, overrides)
    with importing(at_start=True):
        from dbtrain.prepare import duration
        from dbtrain.prepare import prepare as verb

    duration.announce(cfg, "prepare")
    verb.prepare(cfg)


@app.command()
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    until: Annotated[int | None, typer.Option(help="stop at this step as if preempted")] = None,
) -> None:
    """Train an adapter on the shards, from the newest checkpoint if there is one."""
    cfg = _load("train", config, overrides)
    with importing(at_start=True):
        from dbtrain.export import export, hub
        from dbtrain.prepare import duration
        from dbtrain.train import loop, summary

    hub.check(cfg)
    duration.announce(cfg, "train")
    loop.train(cfg, until)
    export.finish(cfg)
    hub.push(cfg)
    summary.summary(cfg)


@app.command()
def export(
    config: ConfigPath,
    overrides: Overrides = None,
    step: Annotated[int | None, typer.Option(help="checkpoint to export (default: best or newest)")] = None,
    out: Annotated[Path | None, typer.Option(help="output folder (default: the run's export/)")] = None,
    adapter: Annotated[Path | None, typer.Option(help="adapter to convert instead of a checkpoint")] = None,
) -> None:
    """Export a checkpoint, or convert an adapter, for Diffusers, PEFT, A1111, or ComfyUI."""
    cfg = _load("export", config, overrides)
    with importing(at_start=True):
        from dbtrain.export import export as verb
        from dbtrain.export import hub

    path = verb.export(cfg, step, out, adapter)
    hub.push(cfg, path if path.is_dir() else path.parent, adapter)


@app.command()
def run(config: ConfigPath, overrides: Overrides = None) -> None:
    """Prepare, train, export, sample, and push to the Hub; finished stages are skipped."""
    cfg = _load("run", config, overrides)
    with importing(at_start=True):
        from dbtrain.export import export, hub
        from dbtrain.prepare import duration, prepare
        from dbtrain.sample import sample
        from dbtrain.train import inputs, loop, summary

    hub.check(cfg)
    inputs.check_settings(cfg)
    duration.announce(cfg, *duration.JOB)
    prepare.prepare(cfg)
    loop.train(cfg)
    export.finish(cfg)
    export.show(cfg, sample.sample_run(cfg))
    hub.push(cfg)
    summary.summary(cfg)


@app.command()
def fleet(
    config: ConfigPath,
    subjects: Annotated[Path, typer.Argument(metavar="SUBJECTS", help="YAML or CSV list, or a folder")],
    overrides: Overrides = None,
    slots: Annotated[int | None, typer.Option(min=1, help="subjects at once on each GPU")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="wait for subjects that come later")] = False,
    evaluate: Annotated[bool, typer.Option("--evaluate", help="score each adapter at the end")] = False,
) -> None:
    """Train an adapter for each of many subjects, many at once on one base."""
    from dbtrain.fleet import listing

    _load("fleet", config, overrides, listing.shared)
    with importing(at_start=True):
        from dbtrain.fleet import fleet as verb
        from dbtrain.fleet.work import Request

    verb.fleet(Request(config, subjects, overrides or (), slots, watch, evaluate))


@app.command()
def sample(
    config: ConfigPath,
    overrides: Overrides = None,
    prompt: Annotated[list[str] | None, typer.Option(help="for sample.prompts; may be repeated")] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH[:SCALE]",
            help="run folder or adapter file; repeat it for one row each, join with + to mix, "
            "'none' for the base model alone (default: none, then the config's run)",
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="seed of the first image")] = None,
    images: Annotated[int | None, typer.Option(help="images per prompt")] = None,
    out: Annotated[Path | None, typer.Option(help="output folder (default: in the run's samples/)")] = None,
) -> None:
    """Generate images with one or more adapters, and a contact sheet."""
    extra = [f"sample.seed={seed}"] if seed is not None else []
    extra += [f"sample.images={images}"] if images is not None else []
    cfg = _load("sample", config, [*(overrides or ()), *extra])
    with importing(at_start=True):
        from dbtrain.sample import sample as verb

    mixes = [verb.Mix.parse(text) for text in adapter or ()]
    prompts = cfg.filled(prompt or cfg.sample.prompts)
    verb.sample(cfg, prompts, mixes or verb.without_and_with(cfg.run_dir), out)


@app.command()
def evaluate(
    config: ConfigPath,
    overrides: Overrides = None,
    beside: Annotated[Path | None, typer.Option(help="scores.json of another run to show too")] = None,
    checkpoints: Annotated[bool, typer.Option("--checkpoints", help="score every checkpoint")] = False,
) -> None:
    """Score how well a run learned its subject and what it forgot, with a contact sheet."""
    if beside and checkpoints:
        raise ConfigError("--beside compares the scores of one adapter; drop it, or drop --checkpoints")
    cfg = _load("evaluate", config, overrides)
    with importing(at_start=True):
        from dbtrain.evaluate import evaluate as verb

    _print(verb.checkpoints(cfg) if checkpoints else verb.evaluate(cfg, beside))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="run folders, finished or not")],
    out: Annotated[Path | None, typer.Option(help="HTML file (default: in the first folder)")] = None,
    crops: Annotated[int, typer.Option(min=0, help="most stored crops to show; 0 loads no VAE")] = 64,
    serve: Annotated[bool, typer.Option("--serve", help="show it in a browser, up to date")] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="with --serve; 0 takes any")] = 6017,
) -> None:
    """Write one HTML page about one or more runs: curves, images, scores, data, settings."""
    start.say("report", ", ".join(map(str, runs)))
    with importing(at_start=True):
        from dbtrain.report import live, report
        from dbtrain.runtime import console

    console.start()
    for place in live.serve(runs, port) if serve else [report.report(runs, out, crops)]:
        print(f"report: {place}", flush=True)


@app.command()
def doctor(
    config: ConfigPath,
    overrides: Overrides = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="processes (default: one per local GPU)")] = None,
    memory: Annotated[bool, typer.Option("--memory", help="predict the peak memory of training")] = False,
    gib: Annotated[float | None, typer.Option(help="compare it with a GPU of this many GiB")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="try two steps in a temporary folder")] = False,
    exact: Annotated[bool, typer.Option("--exact", help="compare whole and interrupted training")] = False,
) -> None:
    """Find everything that would make a run of this config fail, before it is queued."""
    if exact:
        cfg = _load("doctor", config, overrides)
        with importing(at_start=True):
            from dbtrain.doctor import reproducibility

        _print(reproducibility.table(cfg))
        return
    ranks_here = os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if ranks_here != "1" and not start.is_main():
        return  # one process reports
    from dbtrain.doctor import doctor as verb

    lines = _print(verb.table(verb.check(config, overrides or (), ranks, gib, memory, dry_run)))
    if any(line.startswith("error ") for line in lines):
        raise typer.Exit(2)


@app.command()
def config(
    config: ConfigPath,
    overrides: Overrides = None,
    key: Annotated[str | None, typer.Option(help="print only this setting, e.g. run_dir")] = None,
) -> None:
    """Print the resolved config, with overrides and defaults."""
    from dbtrain.config import Config

    cfg = Config.load(config, overrides or ())
    if key is None:
        print(cfg.dump(), end="")
        return
    print(files.expand(cfg.run_dir) if key == "run_dir" else cfg.get(key))  # scripts look into it


@app.callback(invoke_without_command=True)
def main(version: Annotated[bool, typer.Option("--version", help="print the version")] = False) -> None:
    if version:
        print(dbtrain.__version__)
        raise typer.Exit


def entry() -> None:
    """Run a command and exit with its code."""
    exit_codes.end(lambda: app(standalone_mode=True))


if __name__ == "__main__":
    entry()
