"""The training loop and what it is made of."""

from dbtrain.runtime.imports import make_callable

make_callable(__name__, "loop")
