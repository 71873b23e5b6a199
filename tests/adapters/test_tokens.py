"""Learned words: trained along with an adapter, exported beside it, and read alike by everyone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.loaders import TextualInversionLoaderMixin
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from dbtrain.adapters import inject, tokens
from dbtrain.adapters.formats import registry as formats
from dbtrain.config import Config, Model
from dbtrain.config.adapter import Token
from dbtrain.export.export import export
from dbtrain.models.base import Base
from dbtrain.models.families import registry as families
from dbtrain.prepare.prepare import prepare
from dbtrain.runtime.errors import ConfigError
from dbtrain.sample.pipeline import AdapterPipeline
from tests import bases
from tests.conftest import Make, train

WORD = {"subject": {"token": "sks", "class_word": "dog"}, "optim__token_lr": 0.3, "optim__lr": 1e-2}
PROMPTS = ["a photo of sks dog on the beach", "a photo of a dog"]


def configured(make: Make, base: str, vectors: int = 1, **changes: Any) -> Config:
    """A small run that learns a word."""
    folder = bases.ALL[base]()
    side = bases.SIDES[Base.find(Model(path=str(folder))).family.name]
    settings = {
        "model__path": str(folder), "prepare__resolution": side, "prepare__class_prompt": None,
        "train__steps": 2, "train__micro_batch": 2, "train__global_batch": 2, "adapter__rank": 2,
        "adapter__token": {"vectors": vectors}, **WORD,
    }  # fmt: skip
    return make(**settings | changes)


def pixels(image: Any) -> Tensor:
    return torch.from_numpy(image) if not isinstance(image, Tensor) else image


def test_probe(make: Make, tmp_path: Path) -> None:
    cfg = configured(make, "sd", 2, adapter__text_encoder={"rank": 2}, export__formats=["diffusers", "kohya"])
    prepare(cfg)
    run = train(cfg)
    for p in sorted(run.rglob("*")):
        print(p)
    print((run / "export" / "README.md").read_text())
    print({k: v.shape for k, v in load_file(run / "export" / "run.safetensors").items() if "bundle" in k})
    pipe = AdapterPipeline.load(cfg.model)
    pipe.add("mine", run)
    pipe.use("mine")
    print(pipe.pipe.tokenizer("a photo of sks dog").input_ids[:12])
