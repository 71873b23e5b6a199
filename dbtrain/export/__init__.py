"""Adapter files, their model card, and the Hub."""

from dbtrain.runtime.imports import make_callable

make_callable(__name__, "export")
