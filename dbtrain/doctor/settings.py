"""Settings that are valid, but probably not intended."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from dbtrain.config import Config, Prepare, Subject, fields
from dbtrain.doctor.case import Case, Finding, listed, ok, warning

# Words that say nothing about a subject.
FILLERS = set("a an the of in on with my this one photo picture image photograph close up closeup".split())
# Usual learning rates of adapters, with some margin, and where to start: Diffusers' scripts use 1e-4 to 5e-4,
# kohya's up to 1e-3. A word's is for unit vectors: 1e-3 turns CLIP's as far as 5e-4 does in Diffusers.
RATES = {"lr": (1e-5, 1e-4, 2e-3), "text_encoder_lr": (1e-6, 1e-4, 1e-3), "token_lr": (1e-4, 1e-3, 2e-2)}
# The same as factors of the rate that Prodigy finds.
FACTORS = {"lr": (0.3, 1.0, 3.0), "text_encoder_lr": (0.01, 1.0, 3.0), "token_lr": (0.01, 1.0, 20.0)}


def loaded(case: Case) -> Finding:
    """A summary of the valid config."""
    changed = 0
    for name, setting in fields():
        value: Any = case.cfg
        for part in name.split("."):
            value = getattr(value, part, None)
        changed += setting.is_required() or value != setting.get_default()
    return ok(f"valid; {changed} settings differ from the defaults; run_dir {case.cfg.run_dir}")


def prompts(case: Case) -> Iterator[Finding]:
    """Whether the subject has a word of its own, and shares the class word with the class prompt."""
    cfg = case.cfg.prepare
    if cfg is None:
        yield ok("no prepare section: trains on existing shards")
        return
    mine, other = words(cfg.instance_prompt), words(cfg.class_prompt or "")
    if cfg.class_prompt and not cfg.captions:
        if mine == other:
            yield warning(
                f"prepare.instance_prompt '{cfg.instance_prompt}' has the same words as class_prompt: "
                "nothing distinguishes the subject from its class",
                "put a rare word before the class word of the instance prompt, e.g. 'a photo of sks dog'",
            )
        elif not mine - other:
            yield warning(
                f"prepare.instance_prompt '{cfg.instance_prompt}' has no word that is not in class_prompt "
                f"'{cfg.class_prompt}'",
                "put a rare word before its class word, e.g. 'a photo of sks dog'",
            )
        if not mine & other:
            yield warning(
                f"prepare.class_prompt '{cfg.class_prompt}' shares no class word with instance_prompt "
                f"'{cfg.instance_prompt}'",
                "use the same class word in both, e.g. 'a photo of sks dog' and 'a photo of a dog'",
            )
    yield from _about_the_subject(case.cfg, cfg)
    if cfg.has_class_images and not case.cfg.loss.prior_weight:
        yield warning(
            f"loss.prior_weight is 0: {cfg.class_images} class images are generated but never trained on",
            "set loss.prior=none, or loss.prior_weight=1",
        )
    if case.cfg.loss.asks_the_base and not case.cfg.loss.prior_weight:
        yield warning(
            f"loss.prior is {case.cfg.loss.prior}, but loss.prior_weight is 0: nothing preserves the class",
            "set loss.prior=none, or loss.prior_weight=1",
        )
    yield ok(f"'{cfg.instance_prompt}'" + (f", class '{cfg.class_prompt}'" if cfg.class_prompt else ""))


def _about_the_subject(cfg: Config, prepare: Prepare) -> Iterator[Finding]:
    """Whether other prompts are about the subject of the instance prompt, not one of an earlier config."""
    prompt, token = prepare.instance_prompt, token_of(cfg.subject, prepare)
    kind = words(cfg.subject.class_word or "") or words(prompt) - token
    cure = "use {} in prompts, which stands for subject.token and subject.class_word"
    if not token <= words(prompt):
        yield warning(
            f"subject.token is '{cfg.subject.token}', but prepare.instance_prompt is '{prompt}'", cure
        )
    for name, prompts in (("validation", cfg.validation.prompts), ("sample", cfg.sample.prompts)):
        strange = [repr(one) for one in prompts if not words(one) & (token | kind)]
        if strange:
            yield warning(f"{name}.prompts: {listed(strange)} has no word of '{prompt}'", cure)
        elif prompts and token and not any(words(one) & token for one in prompts):
            yield warning(
                f"{name}.prompts: none has '{' '.join(sorted(token))}', so none shows the subject", cure
            )


def token_of(subject: Subject, prepare: Prepare) -> set[str]:
    """The words for the subject alone.

    Those of the config, or that the class prompt lacks, or, without a class prompt, the first one.
    """
    mine = words(prepare.instance_prompt)
    if subject.token:
        return words(subject.token)
    if prepare.class_prompt:
        return mine - words(prepare.class_prompt)
    spoken = re.findall(r"\w+", prepare.instance_prompt.casefold())
    return set([word for word in spoken if word in mine][:1])


def words(prompt: str) -> set[str]:
    """The words of a prompt that say something about the subject."""
    return set(re.findall(r"\w+", prompt.casefold())) - FILLERS


def rates(case: Case) -> Iterator[Finding]:
    """Whether the learning rates are of the order usual for adapters."""
    used = {"lr": case.cfg.optim.lr}
    if case.cfg.adapter.text_encoder and case.cfg.optim.text_encoder_lr:
        used["text_encoder_lr"] = case.cfg.optim.text_encoder_lr
    if case.cfg.adapter.token:
        used["token_lr"] = case.cfg.optim.token_lr
    found = case.cfg.optim.name == "prodigy"
    usual, what = (FACTORS, "factors of Prodigy's rate") if found else (RATES, "adapters")
    for name, value in used.items():
        low, start, high = usual[name]
        if not low <= value <= high:
            yield warning(
                f"optim.{name} is {value:g}; usual for {what} are {low:g} to {high:g}",
                f"use optim.{name}={start:g}",
            )
    yield ok(", ".join(f"{name} {value:g}" for name, value in used.items()))
