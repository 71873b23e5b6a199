"""Imports: of big libraries, without garbage collection; and of a package that is its main function too."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any


@contextmanager
def importing(at_start: bool = False) -> Iterator[None]:
    """For a block of imports: no garbage collection in it, which would take a sixth of its CPU time.

    `at_start`: nor of what is there at its end, ever, so that no later collection walks half a second
    over it. Not where models are loaded: their memory would not come back.
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if at_start:
            gc.freeze()
        if was:
            gc.enable()


def make_callable(package: str, module: str) -> None:
    """Let a package be called as the function of its name in one of its modules, imported on the first call.

    So that `from dbtrain import train` gives what can be called, also once `dbtrain.train` was imported as
    a package, which Python then binds to the same name.
    """

    class Callable(ModuleType):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            function = getattr(import_module(f"{package}.{module}"), package.rpartition(".")[2])
            return function(*args, **kwargs)

    sys.modules[package].__class__ = Callable
