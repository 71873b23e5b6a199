"""The config: one YAML file per subject, read into strict, frozen, typed sections."""

from dbtrain.config.adapter import Adapter, AdapterSettings
from dbtrain.config.config import Config, fields
from dbtrain.config.inputs import Augment, Data, Model, Prepare, Sampling
from dbtrain.config.outputs import Evaluation, Export, Hub, Sample, Validation
from dbtrain.config.subjects import Subject
from dbtrain.config.training import Faults, Loss, Optim, Train

__all__ = [
    "Adapter", "AdapterSettings", "Augment", "Config", "Data", "Evaluation", "Export", "Faults", "Hub",
    "Loss", "Model", "Optim", "Prepare", "Sample", "Sampling", "Subject", "Train", "Validation", "fields",
]  # fmt: skip
