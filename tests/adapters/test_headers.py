"""The headers of files name the base by the names that programs sort them by."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from safetensors import safe_open

from dbtrain.adapters import inject
from dbtrain.adapters.formats import registry as formats
from dbtrain.config import AdapterSettings, Model
from dbtrain.models.base import Base
from tests import bases

# Base -> its name in the model specification (SwarmUI's, musubi-tuner's) and in kohya's trainers.
KNOWN_AS = {
    "sd": ("stable-diffusion-v1", "sd_v1"), "sdxl": ("stable-diffusion-xl-v1-base", "sdxl_base_v1-0"),
    "flux1": ("flux-1-dev", "flux1"), "chroma": ("chroma", "chroma"), "z-image": ("Z-Image", "z_image"),
    "sd3": ("stable-diffusion-v3.5-medium", None), "qwen-image": ("Qwen-Image", "qwen_image"),
    "flux2-klein": ("Flux.2-klein-4b", "flux_2_klein_4b"), "flux2-dev": ("Flux.2-dev", "flux_2_dev"),
}  # fmt: skip


def header_of(folder: Path, name: str, **settings: object) -> tuple[dict[str, str], bytes]:
    """The header of a new adapter's file for a base, and the file."""
    base = Base.find(Model(path=str(bases.ALL[name]())))
    family, module = base.family, base.load(base.family.denoiser)
    chosen = AdapterSettings.model_validate({"rank": 2, "alpha": 6, "targets": "minimal", **settings})
    inject.attach(module, chosen, "denoiser", 0, presets=family.presets)
    states = {family.denoiser: inject.collect(module)}
    form = "kohya" if family.kohya else "comfyui"
    path = formats.write(form, folder, family, states, base.module_names, family.header(base), "it")
    with safe_open(path, "pt") as file:
        return file.metadata(), path.read_bytes()


@pytest.mark.parametrize("name", KNOWN_AS)
def test_a_header_says_which_base_and_network_it_is(tmp_path: Path, name: str) -> None:
    header, data = header_of(tmp_path, name)
    architecture, version = KNOWN_AS[name]
    assert header["modelspec.architecture"] == f"{architecture}/lora"
    assert header.get("ss_base_model_version") == version
    alpha = "6" if name in ("sd", "sdxl") else "2"  # ComfyUI's format has it multiplied in
    network = [header[f"ss_network_{key}"] for key in ("module", "dim", "alpha")]
    assert network == ["networks.lora", "2", alpha]
    digest = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
    assert header["sshs_model_hash"] == digest and header["modelspec.hash_sha256"] == f"0x{digest}"


@pytest.mark.parametrize(("kind", "args"), [("loha", {}), ("lokr", {"factor": -1})])
def test_a_header_names_the_algorithm_of_lycoris(tmp_path: Path, kind: str, args: dict[str, int]) -> None:
    header, _ = header_of(tmp_path, "sd", kind=kind)
    assert header["ss_network_module"] == "lycoris.kohya"
    assert json.loads(header["ss_network_args"]) == {"algo": kind, **args}
