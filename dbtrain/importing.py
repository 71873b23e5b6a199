"""Imports of big libraries, without Python's search for garbage: they make a million objects and no garbage."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """For a block of imports: no garbage collection in it, nor of what it made, ever.

    Importing torch, Diffusers and PEFT sets off dozens of collections, a sixth of its CPU time, and
    each later one would walk half a second over what was imported.
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was:
            gc.enable()
