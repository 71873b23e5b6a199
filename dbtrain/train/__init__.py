"""The training loop and its parts."""

from dbtrain.runtime.imports import make_callable

make_callable(__name__, "loop")
