"""The header of an adapter's file, by which programs list, sort and describe it.

The names are those of sd-scripts (`ss_`, `sshs_`) and of Stability AI's model specification (`modelspec.`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import safetensors.torch
from torch import Tensor

from dbtrain.adapters.formats.common import alpha_in
from dbtrain.runtime import files


def network(config: Mapping[str, Any]) -> dict[str, str]:
    """The entries about an adapter's kind and size. `config` is PEFT's."""
    found = {"ss_network_dim": str(config["r"]), "ss_network_alpha": str(alpha_in(config))}
    kind = config["peft_type"].lower()
    if kind == "lora":
        return found | {"ss_network_module": "networks.lora"}
    factor = {"factor": config["decompose_factor"]} if "decompose_factor" in config else {}
    args = json.dumps({"algo": kind, **factor})
    return found | {"ss_network_module": "lycoris.kohya", "ss_network_args": args}


def serialized(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> bytes:
    """A safetensors file with a hash of its weights, by which programs know it again.

    The hash is of all bytes behind the header.
    """
    data = safetensors.torch.save(dict(sorted(tensors.items())), dict(header))
    start = 8 + int.from_bytes(data[:8], "little")
    digest = hashlib.sha256(memoryview(data)[start:]).hexdigest()
    return files.sorted_header(data, {"sshs_model_hash": digest, "modelspec.hash_sha256": f"0x{digest}"})
