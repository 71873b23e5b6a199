"""4-bit weights as bitsandbytes writes them, from the format's description."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dbtrain.models.quantization import NF4

CONFIG = {
    "_load_in_4bit": True, "_load_in_8bit": False, "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_quant_storage": "uint8", "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
    "llm_int8_skip_modules": None, "load_in_4bit": True, "load_in_8bit": False,
    "quant_method": "bitsandbytes",
}  # fmt: skip


def packed(name: str, weight: Tensor, double: bool) -> tuple[dict[str, Tensor], Tensor]:
    """(the tensors of a file, by name; what they stand for, in fp32)."""
    flat, values = weight.float().flatten(), torch.tensor(NF4)
    blocks = nn.functional.pad(flat, (0, -len(flat) % 64)).view(-1, 64)
    scales = blocks.abs().amax(1)
    codes = (blocks[:, :, None] / scales[:, None, None] - values).abs().argmin(2)
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16"}
    state |= {"shape": list(weight.shape)}
    tensors = {".absmax": scales, ".quant_map": values}
    if double:
        mean, steps = scales.mean(), torch.linspace(-1, 1, 256)
        groups = nn.functional.pad(scales - mean, (0, -len(scales) % 256)).view(-1, 256)
        largest = groups.abs().amax(1)
        nested = (groups[:, :, None] / largest[:, None, None] - steps).abs().argmin(2)
        scales = ((steps[nested] * largest[:, None]).flatten() + mean)[: len(scales)]
        tensors[".absmax"] = nested.flatten()[: len(scales)].to(torch.uint8)
        tensors |= {".nested_absmax": largest, ".nested_quant_map": steps}
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": mean.item()}
    first, second = codes.flatten()[: len(flat) + len(flat) % 2].view(-1, 2).to(torch.uint8).unbind(1)
    text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    tensors |= {"": (first << 4 | second)[:, None], ".quant_state.bitsandbytes__nf4": text}
    decoded = (values[codes] * scales[:, None]).flatten()[: len(flat)].view(weight.shape)
    return {name + end: tensor.contiguous() for end, tensor in tensors.items()}, decoded


def pack(folder: Path, double: bool = True, linears: str = "", small: bool = False) -> dict[str, Tensor]:
    """Pack the matrices of a component whose names contain `linears`; return all its weights, decoded.

    `small`: with rows that are nearly zero, whose scales may be negative when they have been rounded twice.
    """
    (file,) = folder.glob("*.safetensors")
    stored, decoded = {}, {}
    for name, tensor in load_file(file).items():
        stored[name], decoded[name] = tensor, tensor
        if tensor.dim() == 2 and min(tensor.shape) >= 64 and linears in name:
            del stored[name]
            if small:
                tensor[1::3] *= 1e-3
            tensors, decoded[name] = packed(name, tensor, double)
            stored |= tensors
    file.unlink()
    save_file(stored, file, {"format": "pt"})
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": CONFIG}))
    return decoded
