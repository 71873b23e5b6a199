"""prepare: photos -> class images -> VAE moments and prompt table -> shards.

It first plans what the shards of every config will contain, then encodes only what their folders lack: the
photos of all subjects with one VAE, and their prompts with text encoders that are loaded once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from dbtrain.config import Config, Prepare
from dbtrain.data import shards
from dbtrain.data.sizes import Size, Sized
from dbtrain.data.storage import Storage
from dbtrain.models import captioner
from dbtrain.models.base import Base
from dbtrain.prepare import (
    class_images,
    duration,
    encode,
    images,
    own_images,
    subject_captions,
    subject_masks,
    subjects,
)
from dbtrain.prepare.plan import Planned
from dbtrain.prepare.task import Task, entry_of
from dbtrain.runtime import console, dist, files, lock, pace, preemption
from dbtrain.runtime.errors import ConfigError, os_problem

# What a model makes beside the photos, and how it is loaded.
BESIDE: tuple[tuple[Any, Any], ...] = (
    (subject_masks.ensure, subject_masks.finder),
    (subject_captions.ensure, captioner.describer),
)


def prepare(cfg: Config) -> Path:
    """Create or complete the shards for `cfg` on all ranks; return their folder.

    Does nothing if they are up to date. Raises ConfigError for anything a user can fix.
    """
    (problem,) = prepare_all([cfg])
    if problem:
        raise ConfigError(*problem.split("\n"), shared=True)
    folder = Storage(cfg.data.shards).folder
    assert folder
    return folder


def prepare_all(cfgs: Sequence[Config]) -> list[str | None]:
    """Like `prepare` for each of several configs, in one pass; return the problem of each, or None.

    Loads the parts of a base once. The shards of a config do not depend on the others, and a problem with
    its photos or its folder stops none of them. Raises ConfigError if a base cannot be used.
    """
    dist.init()
    states = _States(len(cfgs))
    # What each config asks for, checked before a base is downloaded or loaded.
    paths = {}
    for number, cfg in enumerate(cfgs):
        for source in subjects.sources(cfg):
            with states.agreeing(number):
                source.ensure()
    with dist.agreed():
        for number, cfg in enumerate(cfgs):
            with states.trying(number):
                paths[number] = subjects.photos_of(cfg)
        for ensure, model in BESIDE if dist.is_main() else ():
            for number in states.well:
                with states.trying(number):
                    for one, mine in zip(cfgs[number].each_subject(), paths[number], strict=True):
                        ensure(one, mine)
            model.cache_clear()  # other models need its memory
    states.agree()
    bases = dict.fromkeys(cfgs[number].model for number in states.well)
    found = {model: Base.find(model) for model in bases}
    tasks = {}
    with dist.agreed():
        for number in states.well:
            with states.trying(number):
                tasks[number] = Task.of(cfgs[number], found[cfgs[number].model], paths[number])
                if len(cfgs) == 1:  # where there are several, none waits for the class images of one alone
                    tasks[number].check_photos()
    states.agree()

    _find_class_images(tasks, states)
    with ExitStack() as locks:
        lacking = _plan(tasks, states, locks)
        _encode(lacking, states)
        _finish(lacking, states)
    if states.well:
        duration.remember(cfgs[states.well[0]], "prepare")
    return ["\n".join(problems) or None for problems in states.problems]


class _States:
    """What went wrong with which of several configs."""

    def __init__(self, count: int) -> None:
        self.problems: list[tuple[str, ...]] = [()] * count

    @property
    def well(self) -> list[int]:
        """The numbers of the configs without a problem."""
        return [number for number, problems in enumerate(self.problems) if not problems]

    @contextmanager
    def trying(self, number: int) -> Iterator[None]:
        """What a user can fix is a problem of this config alone. The block must contain no collective."""
        try:
            with self.agreeing(number):
                yield
        except OSError as error:
            self.problems[number] += (os_problem(error),)

    @contextmanager
    def agreeing(self, number: int) -> Iterator[None]:
        """The same for a block with collectives, which raises a ConfigError on all ranks or none."""
        try:
            yield
        except ConfigError as error:
            self.problems[number] += error.problems

    def agree(self) -> None:
        """Tell all ranks the problems of each."""
        everyone = zip(*dist.gather_json(self.problems), strict=True)
        self.problems = [tuple(dict.fromkeys(line for lines in one for line in lines)) for one in everyone]


def _find_class_images(tasks: dict[int, Task], states: _States) -> None:
    """Add the class images of each task; generate missing ones, each class once."""
    shares: dict[int, dict[Size, float]] = {}
    with dist.agreed():
        for number in states.well:
            with states.trying(number):
                shares[number] = images.of_classes(
                    tasks[number].base, tasks[number].cfg, tasks[number].photos
                )
    states.agree()
    classes = {
        number: [(part.prepare, _class_of(tasks[number], part.prepare, shares[number])) for part in parts]
        for number in states.well
        if (parts := subjects.parts(tasks[number].cfg)["class"])
    }
    makers: dict[Any, class_images.Maker] = {}
    there: dict[Any, list[Sized]] = {}
    failed: dict[Any, tuple[str, ...]] = {}
    folders: dict[Path, Prepare] = {}
    for number, several in classes.items():
        task, every = tasks[number], []
        for settings, key in several:
            with states.agreeing(number):
                own_images.check_folder(settings)
                first = folders.setdefault(own_images.root(settings), settings)
                subjects.check_classes([first, settings])
                if key in failed:
                    raise ConfigError(*failed[key])
                if key not in there:
                    maker = makers.setdefault(key[0], class_images.Maker(
                        task.base, task.cfg.train,
                        [cfg for one in classes.values() for cfg, other in one if other[0] == key[0]],
                    ))  # fmt: skip
                    try:
                        there[key] = class_images.ensure(
                            task.base, settings, task.cfg.train, shares[number], maker
                        )
                    except ConfigError as error:
                        failed[key] = error.problems
                        raise
                every.append(there[key])
        task.classes = every


def _class_of(task: Task, cfg: Prepare, shares: dict[Size, float]) -> tuple[Any, ...]:
    """What the denoiser depends on, and what class images depend on besides: those that are alike are one."""
    train = task.cfg.train
    return (
        (task.cfg.model, train.base_linears, train.swap_blocks),
        (
            cfg.class_prompt,
            cfg.class_images,
            cfg.class_dir,
            cfg.class_pictures,
            cfg.side,
            cfg.sampling,
            tuple(shares.items()),
        ),
    )


def _plan(tasks: dict[int, Task], states: _States, locks: ExitStack) -> dict[int, Task]:
    """Plan each task; publish those that lack nothing, and return the others, whose folders stay locked."""
    lacking, complete = {}, []
    for number in states.well:
        task = tasks[number]
        with states.agreeing(number), ExitStack() as mine:
            mine.enter_context(lock.held(task.folder, "data.shards"))
            if task.plan():
                lacking[number] = task
                locks.push(mine.pop_all())
            else:
                with dist.agreed():
                    if dist.is_main():
                        task.publish()
                complete.append(task)
    if complete and dist.is_main():
        which = f"{complete[0].folder}" if len(complete) == 1 else f"{len(complete)} folders"
        more = f" ({complete[0].counts()})" if len(complete) == 1 else ""
        console.say(f"shards in {which} are up to date{more}: nothing to encode")
    return lacking


def _encode(tasks: dict[int, Task], states: _States) -> None:
    """Encode the missing shards of all tasks, over all ranks."""
    todo = [(number, plan) for number, task in tasks.items() for plan in task.missing]
    written: dict[str, dict[str, Any]] = {}
    with dist.agreed():
        if mine := todo[dist.rank() :: dist.world()]:
            written = _write_shards(tasks, mine, states)
    states.agree()
    for part in dist.gather_json(written):
        for number, entries in part.items():
            tasks[int(number)].entries |= entries


def _write_shards(
    tasks: dict[int, Task], mine: list[tuple[int, Planned]], states: _States
) -> dict[str, dict[str, Any]]:
    """Write this rank's missing shards; return their manifest entries by number of the task and file."""
    written: dict[str, dict[str, Any]] = {}
    encoders: dict[Any, Any] = {}
    of_classes: dict[str, Any] = {}  # tensors of class images, which subjects share, by content key
    encoded = 0
    total = sum(len(plan.metas) for _, plan in mine)
    with console.bar(total, "encode", "image", share=True) as bar:
        for number, task in tasks.items():
            plans = [plan for owner, plan in mine if owner == number]
            keys = {meta["key"] for plan in plans for meta in plan.metas}
            reused = of_classes | (task.reusable_rows(keys) if keys else {})
            how = task.settings.vae_precision
            encoder = encoders.setdefault((task.cfg.model, how), encode.image_encoder(task.base, how))
            for plan in plans:
                with states.trying(number):
                    rows, size = [], task.size_of(plan)
                    for source, meta in zip(plan.sources, plan.metas, strict=True):
                        preemption.check()
                        tensors, before = reused.get(meta["key"]), pace.clock()
                        if tensors is None:
                            tensors = encoder(source, meta, size).tensors
                            if not source.endswith(class_images.SUFFIX):
                                encoded += 1
                                pace.add("encode", pace.clock() - before)
                        rows.append(shards.Row(tensors, meta))
                        bar.update()
                    data = shards.pack(rows, f"{plan.file.removesuffix('.tar')}-")
                    files.write_atomically(task.folder / plan.file, data)
                    written.setdefault(str(number), {})[plan.file] = entry_of(plan, data)
                    if plan.file.startswith("class"):
                        of_classes |= {row.meta["key"]: row.tensors for row in rows}
                if states.problems[number]:  # a full disk, or a photo that cannot be read
                    break
    where = " on rank 0" if dist.world() > 1 else ""
    console.say(f"encoded {encoded} images and reused {total - encoded} in {len(mine)} shards{where}")
    return written


def _finish(tasks: dict[int, Task], states: _States) -> None:
    """Write on rank 0 the prompt tables that are missing, and publish the manifests."""
    with dist.agreed():
        if dist.is_main():
            mine = {number: task for number, task in tasks.items() if not states.problems[number]}
            _write_prompts({number: task for number, task in mine.items() if not task.prompts}, states)
            for number, task in mine.items():
                if not states.problems[number]:
                    with states.trying(number):
                        task.publish()
                        texts = ", ".join(map(repr, task.texts))
                        console.say(f"shards in {task.folder}: {task.counts()}, prompts: {texts}")
    states.agree()


def _write_prompts(tasks: dict[int, Task], states: _States) -> None:
    """Encode the prompts of all tasks of a base with text encoders that are loaded once."""
    groups: dict[Any, dict[tuple[str, ...], list[int]]] = {}
    for number, task in tasks.items():
        group = groups.setdefault((task.cfg.model, task.settings.memory_gib), {})
        group.setdefault(tuple(task.texts), []).append(number)
    for (_, gib), numbers in groups.items():
        base = tasks[next(iter(numbers.values()))[0]].base
        tokenize, ids = encode.tokenizer(base), {}
        for texts, owners in numbers.items():
            for number in owners:
                with states.trying(number):
                    ids[texts] = tokenize(list(texts))
            if texts in ids and (problem := encode.too_large(base, len(texts), encode.longest(ids[texts]))):
                console.warn(problem)
        tables = encode.prompt_tables(base, list(ids.values()), gib) if ids else []
        for texts, table in zip(ids, tables, strict=True):
            for number in numbers[texts]:
                with states.trying(number):
                    tasks[number].write_prompts(table)
