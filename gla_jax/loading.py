"""Open the model that a training run left behind."""

import logging
from pathlib import Path

import jax

from gla_jax.models import LanguageModel, abstract_model, bind
from gla_jax.training.checkpoint import restore_params
from gla_jax.training.workdir import read_config


def load_model(path: str | Path) -> LanguageModel:
    """Load the newest model of a run.

        model = load_model("runs/quickstart")
        logits, state = model(input_ids)                  # [B, T] int32 -> [B, T, vocab] float32
        logits, state = model(more_input_ids, state)      # goes on where the first call left off

    Inside `jax.set_mesh` the parameters are read straight into their shards; elsewhere onto the first device.

    Args:
        path: the run's folder.

    Returns:
        A `gla_jax.models.LanguageModel` with the run's parameters, or their moving average if the run keeps one.

    Raises:
        ConfigError: the folder is not a run's, or none of its checkpoints can be read.
    """
    path = Path(path)
    config = read_config(path)
    graphdef, abstract = abstract_model(config.model, config.dtype)
    if jax.sharding.get_abstract_mesh().empty:
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), abstract)
    params, _ = restore_params(path / "checkpoints", abstract, logging.getLogger(__name__).warning)
    return bind(graphdef, params)
