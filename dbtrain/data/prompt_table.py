"""The prompt table: token ids and embeddings of every prompt that images are trained with."""

from __future__ import annotations

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from dbtrain.data.shards import CURE, Prompts, checked
from dbtrain.data.storage import Storage
from dbtrain.runtime.errors import ConfigError, reason


def read(storage: Storage, prompts: Prompts) -> dict[str, Tensor]:
    """The prompt table: `condition.<name>` and `ids.<text encoder>`, one row per prompt.

    Raises ConfigError if it is missing, damaged, or has another number of prompts.
    """
    data = checked(storage, "prompt table", prompts.file, prompts.sha256)
    where = f"prompt table {storage.where(prompts.file)}"
    try:
        table = safetensors.torch.load(data)
    except SafetensorError as error:
        raise ConfigError(f"{where} cannot be read: {reason(error)}; {CURE}") from error
    for name, tensor in table.items():
        if not tensor.dim() or len(tensor) != len(prompts.texts):
            raise ConfigError(
                f"{where}: {name} is of {tuple(tensor.shape)}, not of {len(prompts.texts)} prompts; {CURE}"
            )
    return table
