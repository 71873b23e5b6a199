"""The oldest versions that pyproject.toml allows are ones that work."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, get_origin

import pytest
from packaging.version import Version

from dbtrain.config import config
from dbtrain.runtime.errors import ConfigError
from tests.conftest import ROOT

# Package -> its first version that works, and what the one before does.
FLOORS = {
    "pydantic": ("2.11", "the oldest that was tried on Python 3.10"),
    "transformers": ("5.6", "up to 5.5.4 CLIP's weights are below `text_model.`, so `tiny` is incomplete"),
    "diffusers": ("0.41", "tried with transformers 5.6.0"),
}


@pytest.mark.parametrize("package", FLOORS)
def test_the_floor_is_a_version_that_works(package: str) -> None:
    floor, why = FLOORS[package]
    (declared,) = re.findall(rf'"{package}>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert Version(declared) >= Version(floor), why


def test_settings_are_listed_where_a_generic_is_called_a_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """On Python 3.10 `isinstance(tuple[str, ...], type)` is true, and `issubclass` then fails."""
    real: Callable[..., bool] = isinstance

    def as_in_3_10(value: Any, kind: Any) -> bool:
        return (kind is type and get_origin(value) is not None) or real(value, kind)

    monkeypatch.setattr(config, "isinstance", as_in_3_10, raising=False)
    with pytest.raises(ConfigError, match=r"did you mean 'train\.steps'"):
        config.Config.from_dict({"run_dir": "r", "data": {"shards": "s"}, "train": {"step": 4}})
