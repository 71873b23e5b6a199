"""The names in a run folder, and of what leaves it."""

from __future__ import annotations

import pytest

from dbtrain.runtime.run_folder import name_of


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("runs/dog", "dog"),
        ("runs/dog/export", "dog"),
        ("runs/dog/export/pytorch_lora_weights.safetensors", "dog"),
        ("runs/dog/export/kohya.safetensors", "dog"),
        ("runs/dog/export/unet/adapter_model.safetensors", "unet"),
        ("runs/dog/checkpoints/step-000500", "step-000500"),
        ("loras/cat.safetensors", "cat"),
        ("runs/x/..", "runs"),
        ("runs/kohya", "kohya"),
        ("runs/v1.5", "v1.5"),
        ("runs/Hündin", "Hündin"),
        ("runs/.dog", "dog"),  # a hidden file would not be listed
        ("runs/a b<c>:1", "a_b_c_1"),  # A1111's prompts have <lora:NAME:1>
        ("runs/\udce9", "_"),  # a byte that is no UTF-8
        ("runs/" + "ü" * 200, "ü" * 100),
        ("runs/pytorch_lora_weights", "adapter"),  # Diffusers' file
    ],
)
def test_an_adapter_has_the_name_of_its_run_or_file(place: str, name: str) -> None:
    assert name_of(place) == name
