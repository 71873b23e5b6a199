"""What is trained of a model, and the adapters that its components get."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import Tensor, nn

from dbtrain.adapters import inject as adapters
from dbtrain.adapters import tokens
from dbtrain.adapters.state import AdapterState
from dbtrain.config import Config
from dbtrain.config.adapter import AdapterSettings
from dbtrain.models.families.family import Family


class Adapted:
    """What is trained of a model: the adapters on its components, and the words that they learn."""

    learned: Sequence[str] = ()  # words
    row: tuple[Tensor, Tensor] | None = None  # (N,) weights and gradients of which all adapters are views

    @property
    def trained(self) -> dict[str, nn.Module]:
        """The components with an adapter, by their name in the base's folder."""
        raise NotImplementedError

    @property
    def words(self) -> dict[str, tokens.Rows]:
        """The embeddings of the learned words, by text encoder; {} if none is learned."""
        return {}

    def trainable(self) -> dict[str, nn.Parameter]:
        """The trained parameters, as `<component>.<parameter>`."""
        found = {
            f"{component}.{name}": parameter
            for component, module in self.trained.items()
            for name, parameter in adapters.trainable(module).items()
        }
        return found | {f"{name}.{tokens.DIRECTION}": rows.direction for name, rows in self.words.items()}

    def states(self) -> dict[str, AdapterState]:
        """The adapters' weights, by component."""
        return {name: adapters.collect(module) for name, module in self.trained.items()}


def attach(components: Mapping[str, nn.Module], family: Family, cfg: Config) -> None:
    """Give the denoiser, and the text encoders if they are trained, new adapters.

    `components`: the denoiser, then the text encoders.
    """
    for name, settings, seed in _settings(components, cfg):
        module, first = components[name], name == family.denoiser
        part, presets = ("denoiser", family.presets) if first else ("text_encoder", None)
        adapters.attach(module, settings, part, seed, family.idle(name, module), presets)


def start_anew(components: Mapping[str, nn.Module], cfg: Config) -> None:
    """Give adapters that `attach` made for another run with these settings the weights of a new run."""
    for name, settings, seed in _settings(components, cfg):
        adapters.start(components[name], settings, seed)


def _settings(components: Iterable[str], cfg: Config) -> Iterator[tuple[str, AdapterSettings, int]]:
    """Of each component with an adapter: its name, the adapter's settings and its seed."""
    for number, name in enumerate(components):
        settings = cfg.adapter.text_encoder if number else cfg.adapter
        if settings:
            yield name, settings, cfg.seed + number
