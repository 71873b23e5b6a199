"""Imports of big libraries, without garbage collection: they make a million objects and no garbage."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


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
