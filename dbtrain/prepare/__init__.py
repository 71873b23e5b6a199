"""Turn photos and class images into shards."""

from dbtrain.runtime.imports import make_callable

make_callable(__name__, "prepare")
