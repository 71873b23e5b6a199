"""The model card: what an exported adapter is, how it was trained, and how to load it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import jinja2
import yaml

from dbtrain.adapters.formats import registry as formats
from dbtrain.adapters.formats import word_file
from dbtrain.adapters.formats.common import States, alpha_in
from dbtrain.adapters.tokens import Words
from dbtrain.config import Config
from dbtrain.models.base import Base
from dbtrain.models.locate import EMBEDDED
from dbtrain.runtime import files
from dbtrain.runtime.run_folder import RunFolder
from dbtrain.train.segments import told

KIND_NAMES = {"lora": "LoRA", "loha": "LoHa", "lokr": "LoKr"}


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(
        Path(__file__).with_name("model_card.md.jinja").read_text(encoding="utf-8")
    )


def _public(model: str) -> str:
    """A Hub id, or how readers elsewhere have to complete the path of a file or folder."""
    path = files.expand(model)
    return f"path/to/{path.absolute().name}" if model == EMBEDDED or path.exists() else model


def card(
    cfg: Config, base: Base, states: States, words: Words, state: Mapping[str, Any], name: str,
    forms: Sequence[str], images: Sequence[str],
) -> str:  # fmt: skip
    """Return the README.md of an export of the adapter `name` in the formats `forms`.

    `state` is the checkpoint's; empty for a converted adapter. `images` are names of files in the folder.
    """
    prompt = cfg.prepare.instance_prompt if cfg.prepare else "a photo of the subject"
    model = _public(cfg.model.path)
    single = files.expand(cfg.model.path).is_file()
    config = f", config={json.dumps(_public(cfg.model.config))}" if single and cfg.model.config else ""
    load = (
        f"from_{'single_file' if single else 'pretrained'}({json.dumps(model, ensure_ascii=False)}{config})"
    )
    kinds = sorted({state.config["peft_type"].lower() for state in states.values()})
    facts: dict[str, Any] = {"library_name": "diffusers", "instance_prompt": prompt}
    if model == cfg.model.path:
        facts["base_model"] = model  # the Hub accepts only its own ids here
    if cfg.hub.license:
        facts["license"] = cfg.hub.license
    facts["tags"] = ["text-to-image", "diffusers", *kinds, "dreambooth", "dbtrain"]
    if images:
        facts["widget"] = [{"text": prompt, "output": {"url": name}} for name in images]
    changes = ", ".join(f"{key}={json.dumps(value)}" for key, value in base.family.sampler.items())
    sampler = f"pipe.scheduler = pipe.scheduler.from_config(pipe.scheduler.config, {changes})\n"
    run = RunFolder(cfg.run_dir)
    best, lines = run.read_best() or {}, run.read_metrics()
    lines = [line for line in lines if line["step"] <= state.get("step", 0)] or lines
    return _template().render(
        cfg=cfg, facts=yaml.safe_dump(facts, sort_keys=False, allow_unicode=True), family=base.family,
        sampler=sampler if changes else "",
        dora=any(state.config.get("use_dora") for state in states.values()),
        name=name, kinds=" and ".join(KIND_NAMES[kind] for kind in kinds),
        told=partial(told, state.get("segments", ())), model=model, load=load, prompt=prompt,
        step=state.get("step"),
        chosen=best["why"] if best and best["step"] == state.get("step") else "",
        files={form: formats.FORMATS[form].file.format(name=name) for form in forms}, images=images,
        quoted=lambda text: json.dumps(text, ensure_ascii=False), last=lines[-1] if lines else {},
        words=[(word.text, word.vectors, f"{word_file.FOLDER}/{word.text}.safetensors") for word in words],
        encoders=dict(zip(base.family.adaptable_text, word_file.CLIPS, strict=False)),
        ends=word_file.old_ends(base) if words else {},
        adapters=[(name, state.config["r"], alpha_in(state.config)) for name, state in states.items()],
    )  # fmt: skip
