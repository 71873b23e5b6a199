"""Validation images of several runs in slots, in batches that they share."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from dbtrain.adapters.batched import Stack
from dbtrain.runtime import console, preemption
from dbtrain.train.dreambooth import DreamBooth
from dbtrain.train.setup import Job
from dbtrain.train.validation import ImageGenerator, eval_mode


def generate(model: DreamBooth, stack: Stack, jobs: Mapping[int, Job]) -> None:
    """Generate the images of each run, by slot, ahead of its validation, which then only writes them.

    All have the same settings but for prompts.
    """
    with ExitStack() as held:
        for job in jobs.values():
            held.enter_context(job.metrics.interrupted("validation"))
            held.enter_context(job.progress.averaged(job.cfg.export.ema))
        generators = {slot: job.validation.generator for slot, job in jobs.items()}
        _generate(model, stack, {slot: one for slot, one in generators.items() if one})


def _generate(model: DreamBooth, stack: Stack, generators: Mapping[int, ImageGenerator]) -> None:
    """Generate the images of each generator, by slot.

    A batch has as many rows of every slot, also of those without a generator, so that an image does not
    depend on what the others are.
    """
    slots, first = sorted(generators), next(iter(generators.values()))
    jobs = {slot: generators[slot].jobs for slot in slots}
    rows = max(1, first.cfg.sample.batch // stack.slots)  # of a slot
    starts = range(0, max(map(len, jobs.values())), rows)
    (size,) = first.sizes
    made: dict[int, list[Any]] = {slot: [] for slot in slots}
    with eval_mode(model, first.cfg), model.left_out.in_place():
        encoded = {}
        for slot in slots:
            with stack.only(slot):
                encoded[slot] = generators[slot].encode()
        total = len(starts) * rows * stack.slots
        with (
            console.bar(total, "images", "image", leave=False) as bar,
            stack.sampling(model.denoiser, rows),
        ):
            for start in starts:
                preemption.check()
                # Where a slot has no image left, its rows repeat another one, which is not kept.
                texts, seeds = [], []
                for slot in range(stack.slots):
                    source = slot if slot in jobs else slots[0]
                    for number in range(start, start + rows):
                        prompt, seed = jobs[source][min(number, len(jobs[source]) - 1)]
                        texts.append(encoded[source][prompt])
                        seeds.append(seed)
                found = first.latents(texts, size, seeds, bar)
                for slot in slots:
                    left = len(jobs[slot]) - len(made[slot])
                    made[slot] += found[slot * rows : (slot + 1) * rows][:left]
    for slot in slots:
        generators[slot].ahead = made[slot]
