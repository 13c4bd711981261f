"""Our parameters as they lie in the files of a Hugging Face directory: found and checked first, read when asked for."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gla_jax.config import Config, ConfigError, ModelConfig
from gla_jax.interop.architectures import IGNORED_TENSORS, Architecture, Names
from gla_jax.interop.safetensors import Tensor, open_folder
from gla_jax.interop.translation import read_config, with_formats
from gla_jax.models import abstract_model
from gla_jax.models.language_model import layer_groups


def _scale_keys(weight: np.ndarray, model: ModelConfig) -> np.ndarray:
    """Multiply by the factor that the original code applies to keys: (D / H)^-0.5."""
    return (weight.astype(np.float64) * (model.hidden_size / model.num_heads) ** -0.5).astype(np.float32)


def _center_values(weight: np.ndarray, model: ModelConfig) -> np.ndarray:
    """Take from every head its mean over channels, and so from what the head returns, which is linear in the values.

    The original code normalises that by LayerNorm, which is RMSNorm of what has mean 0.
    """
    heads = weight.astype(np.float64).reshape(model.num_heads, -1, weight.shape[-1])
    return (heads - heads.mean(axis=1, keepdims=True)).reshape(weight.shape).astype(np.float32)


_ADJUSTMENTS = {"scale_keys": _scale_keys, "center_values": _center_values}


@dataclasses.dataclass(frozen=True)
class Source:
    """What one layer of a parameter is made of: a tensor, or a part of its rows, laid out another way."""

    tensor: Tensor
    part: int
    """Which of so many equal parts of the rows."""
    parts: int
    layout: str
    """The last word of our path."""
    adjust: Callable[[np.ndarray], np.ndarray] | None
    """What is done to the whole tensor first."""

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        """Read a slice, in our order of axes."""
        if self.adjust is not None:
            return from_theirs(self.layout, self.adjust(self.tensor.read()))[index]
        # Rows of theirs are our last axis of kernels and taps, and only those that are asked for are read.
        rows = index[-1] if self.layout in ("kernel", "taps") else index[0]
        count = self.tensor.shape[0] // self.parts
        start, stop, _ = rows.indices(count)
        array = self.tensor.read(self.part * count + start, self.part * count + stop)
        rest = (*index[:-1], slice(None)) if self.layout in ("kernel", "taps") else (slice(None), *index[1:])
        return from_theirs(self.layout, array)[rest]


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter of ours that is still in the files; stacked along a leading axis, or one tensor alone."""

    shape: tuple[int, ...]
    dtype: np.dtype
    sources: tuple[Source, ...]
    stacked: bool

    @property
    def size(self) -> int:
        """The number of its entries."""
        return math.prod(self.shape)

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        """Read a slice, e.g. one device's part."""
        if not self.stacked:
            return self.sources[0].read(index).astype(self.dtype)
        layers = range(*index[0].indices(len(self.sources)))
        shape = tuple(len(range(*part.indices(size))) for part, size in zip(index, self.shape, strict=True))
        result = np.empty(shape, self.dtype)
        for place, layer in enumerate(layers):
            result[place] = self.sources[layer].read(index[1:])
        return result

    def pieces(self) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
        """Read all of it layer by layer: where each piece goes, and the piece."""
        whole = tuple(slice(None) for _ in self.shape[1:] if self.stacked) or tuple(slice(None) for _ in self.shape)
        for layer, source in enumerate(self.sources):
            yield ((layer,) if self.stacked else ()), source.read(whole).astype(self.dtype)


def open_model(folder: Path) -> tuple[Config, Any, dict[str, Any]]:
    """Find a model's parameters in a Hugging Face directory; of the tensors only the headers are read.

    Parameters keep the files' precision: bfloat16 if all are, else float32.

    Args:
        folder: config.json and safetensors files.

    Returns:
        Our config, the graphdef for `gla_jax.models.bind`, and a nested dict of pairs: the description of the
        parameter (`jax.ShapeDtypeStruct`, with its sharding inside a mesh), and the `Parameter`.

    Raises:
        ConfigError: a file that is missing or damaged, a field of config.json that is not supported, or a tensor that
            is missing, too many, or of a shape that does not fit.
    """
    config, architecture = read_config(folder)
    tensors = open_folder(folder)
    dtypes = {str(tensor.dtype) for tensor in tensors.values()}
    config = with_formats(
        config,
        "bfloat16" if dtypes == {"bfloat16"} else "float32",
        "bfloat16" if dtypes <= {"bfloat16", "float16"} else "float32",
    )
    graphdef, abstract = abstract_model(config.model, config.dtype)
    used: set[str] = set()

    def find(path: Any, leaf: Any) -> tuple[Any, Parameter]:
        ours = "/".join(key.key for key in path)
        places = names_of(ours, config.model, architecture)
        if places is None:
            raise ConfigError(f"{folder / 'config.json'}: a {architecture.model_type} has no {ours}.")
        stacked = places.stacked
        shape = leaf.shape[1:] if stacked else leaf.shape
        function = None
        if ours.partition("/")[2] in architecture.adjustments:
            function = functools.partial(adjust, ours, model=config.model, architecture=architecture)
        sources = tuple(_find_source(folder, names, ours, shape, tensors, function) for names in places.names)
        used.update(source.tensor.name for source in sources)
        return leaf, Parameter(leaf.shape, np.dtype(leaf.dtype), sources, stacked)

    params = jax.tree_util.tree_map_with_path(find, abstract)
    allowed_tied = architecture.tensors["head/kernel"] if config.model.tie_embeddings else ()
    for name, tensor in tensors.items():
        if name not in used and name not in allowed_tied and not name.endswith(IGNORED_TENSORS):
            raise ConfigError(
                f"{tensor.path} holds the tensor {name} of shape {tensor.shape}, for which a model of "
                f"{folder / 'config.json'} has no place."
            )
    return config, graphdef, params


@dataclasses.dataclass(frozen=True)
class Places:
    """The names, in an architecture, of the tensors of one parameter: one layer after the other, or one."""

    names: tuple[Names, ...]
    stacked: bool


def names_of(ours: str, model: ModelConfig, architecture: Architecture) -> Places | None:
    """Return what a parameter of ours is called; None if the architecture has no such thing."""
    if ours in architecture.tensors:
        return Places((architecture.tensors[ours],), stacked=False)
    group, _, rest = ours.partition("/")
    start = 0
    for name, mixer, count in layer_groups(model):
        if name == group:
            names = architecture.layers[mixer].get(rest)
            if names is None:
                return None
            if rest == "mixer/output_norm/scale" and not model.mixers[mixer].use_output_gate:
                names = names[::-1]  # fla calls a norm by its other name where no gate is fused with it
            numbers = range(start, start + count)
            return Places(tuple(tuple(name.replace("{}", str(n)) for name in names) for n in numbers), stacked=True)
        start += count
    return None


def from_theirs(layout: str, array: np.ndarray) -> np.ndarray:
    """Lay a tensor out our way: [out, in] as [in, out], [C, 1, W] as [W, C]."""
    return array.T if layout == "kernel" else array[:, 0].T if layout == "taps" else array


def to_theirs(layout: str, array: np.ndarray) -> np.ndarray:
    """Undo `from_theirs`."""
    return array.T if layout == "kernel" else array.T[:, None] if layout == "taps" else array


def their_shape(layout: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of what `to_theirs` makes."""
    return shape[::-1] if layout == "kernel" else (shape[1], 1, shape[0]) if layout == "taps" else shape


def _find_source(
    folder: Path,
    names: Names,
    ours: str,
    shape: tuple[int, ...],
    tensors: dict[str, Tensor],
    function: Callable[[np.ndarray], np.ndarray] | None,
) -> Source:
    layout = ours.rpartition("/")[2]
    wanted = their_shape(layout, shape)
    misfit = None
    for name in names:
        stem, _, half = name.partition("[")
        part, parts = (int(half[0]), int(half[2])) if half else (0, 1)
        if stem not in tensors:
            continue
        expected = (wanted[0] * parts, *wanted[1:])
        if tensors[stem].shape == expected:
            return Source(tensors[stem], part, parts, layout, function)
        misfit = misfit or (tensors[stem], expected)
    if misfit is None:
        raise ConfigError(
            f"{folder} has no tensor {names[0]} of shape {wanted}, which its config.json calls for (our {ours})."
        )
    tensor, expected = misfit
    raise ConfigError(
        f"{tensor.path}: the tensor {tensor.name} has shape {tensor.shape}, which config.json makes {expected}."
    )


def adjust(ours: str, weight: np.ndarray, model: ModelConfig, architecture: Architecture) -> np.ndarray:
    """Return what our parameter is made of, where that is not their tensor itself."""
    name = architecture.adjustments.get(ours.partition("/")[2])
    return weight if name is None else _ADJUSTMENTS[name](weight, model)


def flatten(params: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Return every leaf of a nested dict with its path, e.g. "layers/mixer/query/kernel"."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda leaf: not isinstance(leaf, dict)):
        yield "/".join(key.key for key in path), leaf
