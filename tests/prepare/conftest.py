"""What tests of `prepare` count."""

from __future__ import annotations

from pathlib import Path

import pytest

from dbtrain.prepare import encode
from dbtrain.prepare import prepare as verb


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the images that go through the VAE."""
    names: list[str] = []
    original = encode.image_encoder

    def counting(*args):  # type: ignore[no-untyped-def]
        inner = original(*args)
        return lambda path, meta, size: names.append(Path(path).name) or inner(path, meta, size)

    monkeypatch.setattr(verb.encode, "image_encoder", counting)
    return names
