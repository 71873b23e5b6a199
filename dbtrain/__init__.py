"""Photos of a subject in, a small adapter for a text-to-image diffusion model out."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dbtrain.config import Config as Config
    from dbtrain.export.export import export as export
    from dbtrain.prepare.prepare import prepare as prepare
    from dbtrain.runtime.errors import ConfigError as ConfigError
    from dbtrain.sample.pipeline import AdapterPipeline as AdapterPipeline
    from dbtrain.sample.sample import sample as sample
    from dbtrain.train.loop import train as train

__version__ = "0.1.0"
__all__ = ["AdapterPipeline", "Config", "ConfigError", "export", "prepare", "sample", "train"]

# Imported when first asked for: `import dbtrain` alone loads no library.
_NAMES = {
    "AdapterPipeline": "dbtrain.sample.pipeline",
    "Config": "dbtrain.config",
    "ConfigError": "dbtrain.runtime.errors",
}
_VERBS = ("export", "prepare", "sample", "train")  # packages, each callable as its function of that name


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(import_module(_NAMES[name]), name)
    if name in _VERBS:
        return import_module(f"dbtrain.{name}")
    raise AttributeError(f"module 'dbtrain' has no attribute '{name}'")
