"""Open the model that a training run left behind, or another library."""

import logging
from pathlib import Path
from typing import Any

import jax

from gla_jax import interop
from gla_jax.config import Config
from gla_jax.interop.folder import Parameter
from gla_jax.interop.translation import is_hugging_face
from gla_jax.interop.translation import read_config as read_hugging_face_config
from gla_jax.models import LanguageModel, abstract_model, bind
from gla_jax.storage import is_remote, open_path
from gla_jax.training.checkpoint import restore_params
from gla_jax.training.workdir import read_config


def load_model(path: str | Path) -> LanguageModel:
    """Load the newest model of a run, or a model of fla or transformers.

        model = load_model("runs/quickstart")
        logits, state = model(input_ids)                  # [B, T] int32 -> [B, T, vocab] float32
        logits, state = model(more_input_ids, state)      # goes on where the first call left off

    Inside `jax.set_mesh` the parameters are read straight into their shards; elsewhere onto the first device.

    Args:
        path: the run's folder, which may be gs://BUCKET/FOLDER, or a Hugging Face directory: config.json, safetensors
            files.

    Returns:
        A `gla_jax.models.LanguageModel` with the run's parameters, or their moving average if the run keeps one.

    Raises:
        ConfigError: the folder is neither, or what it holds cannot be read.
    """
    path = open_path(path)
    if is_hugging_face(path) and not is_remote(path):
        _, graphdef, pairs = interop.open_model(path)
        is_pair = lambda leaf: isinstance(leaf, tuple)
        return bind(graphdef, jax.tree.map(lambda pair: _read(*pair), pairs, is_leaf=is_pair))
    config = read_config(path)
    graphdef, abstract = abstract_model(config.model, config.dtype)
    if jax.sharding.get_abstract_mesh().empty:
        device = _first_device()
        abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), abstract)
    params, _ = restore_params(path / "checkpoints", abstract, logging.getLogger(__name__).warning)
    return bind(graphdef, params)


def load_config(path: str | Path) -> Config:
    """Return the config of what `load_model` loads from the same path.

    Raises:
        ConfigError: as `load_model`.
    """
    path = open_path(path)
    return read_hugging_face_config(path)[0] if is_hugging_face(path) else read_config(path)


def describe_files(path: str | Path) -> list[tuple[str, int, int]]:
    """Return (name, size, time of change) of the files that `load_model` would read first: different for another model.

    Args:
        path: as for `load_model`.
    """
    path = open_path(path)
    patterns = ("*.safetensors", "checkpoints/*/file_sizes.json", "checkpoints/*/commit_success.txt")
    found = [path / "config.json", *(file for pattern in patterns for file in path.glob(pattern))]
    return sorted((file.relative_to(path).as_posix(), *_size_and_time(file.stat())) for file in found)


def _size_and_time(stat: Any) -> tuple[int, int]:
    return (stat.length, stat.mtime) if hasattr(stat, "length") else (stat.st_size, stat.st_mtime_ns)


def _read(leaf: jax.ShapeDtypeStruct, parameter: Parameter) -> jax.Array:
    """Read a parameter from its files, every device the part that it holds."""
    sharding: Any = leaf.sharding or _first_device()
    read: Any = parameter.read
    # One after the other: the host never holds more than one of them beside what is on the devices.
    return jax.block_until_ready(jax.make_array_from_callback(leaf.shape, sharding, read))


def _first_device() -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])
