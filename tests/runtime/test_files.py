"""Paths of users, as every command reads them."""

from __future__ import annotations

from pathlib import Path

import pytest

from dbtrain.data.storage import Storage
from dbtrain.runtime import files
from dbtrain.runtime.errors import ConfigError
from dbtrain.runtime.run_folder import RunFolder


def test_variables_and_homes_are_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRATCH", "/mnt/my data")
    monkeypatch.setenv("HOME", "/home/me")
    assert files.expand("$SCRATCH/a") == files.expand("${SCRATCH}/a") == Path("/mnt/my data/a")
    assert files.expand("~/$5 photos") == Path("/home/me/$5 photos")
    assert RunFolder("$HOME/run").config == Path("/home/me/run/config.yaml")
    assert Storage("${SCRATCH}/shards").folder == Path("/mnt/my data/shards")
    assert Storage("s3://bucket/$SCRATCH").where("a.tar") == "s3://bucket//mnt/my data/a.tar"


def test_a_variable_that_is_not_set_is_named() -> None:
    for text in ("$NOWHERE/a", "a/${NOWHERE}"):
        with pytest.raises(ConfigError, match="environment variable NOWHERE is not set"):
            files.expand(text)
