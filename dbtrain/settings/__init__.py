"""Every section of the config: its keys, their kinds and defaults, and what they mean."""

from dbtrain.settings.adapter import Adapter, AdapterSettings
from dbtrain.settings.inputs import Data, Model, Prepare, Sampling
from dbtrain.settings.results import Evaluation, Export, Hub, Sample, Validation
from dbtrain.settings.training import Faults, Loss, Optim, Train

__all__ = [
    "Adapter", "AdapterSettings", "Data", "Evaluation", "Export", "Faults", "Hub", "Loss", "Model", "Optim",
    "Prepare", "Sample", "Sampling", "Train", "Validation",
]  # fmt: skip
