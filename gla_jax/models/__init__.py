"""Language models: how they are made, and their parameters as plain nested dicts of arrays."""

from gla_jax.models.language_model import LanguageModel, split_layers, stack_layers
from gla_jax.models.parameters import (
    ParameterRow,
    abstract_model,
    bind,
    decay_mask,
    init_params,
    parameter_table,
)

__all__ = [
    "LanguageModel",
    "ParameterRow",
    "abstract_model",
    "bind",
    "decay_mask",
    "init_params",
    "parameter_table",
    "split_layers",
    "stack_layers",
]
