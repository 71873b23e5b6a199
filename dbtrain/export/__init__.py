"""Export adapter files with a model card, and push them to the Hub."""

from dbtrain.runtime.imports import make_callable

make_callable(__name__, "export")
