"""Images with one or more adapters."""

from dbtrain.runtime.imports import make_callable

make_callable(__name__, "sample")
