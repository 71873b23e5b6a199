"""Photos and class images to shards."""

from dbtrain.runtime.imports import make_callable

make_callable(__name__, "prepare")
