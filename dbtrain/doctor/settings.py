"""Settings that are valid, and yet not what one means."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from dbtrain.config import Config, fields
from dbtrain.doctor.case import Case, Found, ok, warning

# Words that tell nothing of a subject.
FILLERS = set("a an the of in on with my this one photo picture image photograph close up closeup".split())
# What the field trains adapters with: Diffusers' scripts 1e-4 to 5e-4, kohya's and LoHa's up to 1e-3; twice
# and a tenth of these are no slips yet.
RATES = {"lr": (1e-5, 2e-3), "text_encoder_lr": (1e-6, 1e-3)}


def loaded(case: Case) -> Iterator[Found]:
    """The config itself."""
    changed = len(_given(case.cfg))
    yield ok(f"valid; {changed} settings are not the default; run_dir {case.cfg.run_dir}")


def _given(cfg: Config) -> list[str]:
    """Settings that differ from the default."""
    odd = []
    for name, setting in fields():
        value: Any = cfg
        for part in name.split("."):
            value = getattr(value, part, None)
        if setting.is_required() or value != setting.get_default():
            odd.append(name)
    return odd


def prompts(case: Case) -> Iterator[Found]:
    """Whether the subject has a word of its own, and shares one with its class."""
    cfg = case.cfg.prepare
    if cfg is None:
        yield ok("no prepare section: trains on shards that are there")
        return
    mine, other = words(cfg.instance_prompt), words(cfg.class_prompt or "")
    if cfg.class_prompt and not cfg.captions:
        if mine == other:
            yield warning(
                f"prepare.instance_prompt and class_prompt say the same, '{cfg.instance_prompt}': nothing "
                "tells the subject from its class",
                "put a rare word before the class word of the instance prompt, e.g. 'a photo of sks dog'",
            )
        elif not mine - other:
            yield warning(
                f"prepare.instance_prompt '{cfg.instance_prompt}' has no word that class_prompt "
                f"'{cfg.class_prompt}' lacks",
                "put a rare word before its class word, e.g. 'a photo of sks dog'",
            )
        if not mine & other:
            yield warning(
                f"prepare.class_prompt '{cfg.class_prompt}' names no class that instance_prompt "
                f"'{cfg.instance_prompt}' names",
                "use the same class word in both, e.g. 'a photo of sks dog' and 'a photo of a dog'",
            )
    if cfg.class_prompt and not case.cfg.loss.prior_weight:
        yield warning(
            f"loss.prior_weight is 0: {cfg.class_images} class images are made, and never trained on",
            "leave prepare.class_prompt out, or set loss.prior_weight to 1",
        )
    yield ok(f"'{cfg.instance_prompt}'" + (f", class '{cfg.class_prompt}'" if cfg.class_prompt else ""))


def words(prompt: str) -> set[str]:
    """The words of a prompt that tell something."""
    return set(re.findall(r"\w+", prompt.casefold())) - FILLERS


def rates(case: Case) -> Iterator[Found]:
    """Learning rates of another order than adapters are trained with."""
    used = {"lr": case.cfg.optim.lr}
    if case.cfg.adapter.text_encoder and case.cfg.optim.text_encoder_lr:
        used["text_encoder_lr"] = case.cfg.optim.text_encoder_lr
    for name, value in used.items():
        low, high = RATES[name]
        if not low <= value <= high:
            yield warning(
                f"optim.{name} is {value:g}; adapters are trained with {low:g} to {high:g}",
                f"use optim.{name}={min(high, max(low, 1e-4)):g}, unless you know better",
            )
    yield ok(", ".join(f"{name} {value:g}" for name, value in used.items()))
