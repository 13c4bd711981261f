"""A model's parameters as a nested dict of arrays: their shapes, places, beginnings, and which of them decay."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gla_jax.config import DtypeConfig, ModelConfig
from gla_jax.layers.check import check_divides
from gla_jax.models.language_model import LanguageModel
from gla_jax.parallel.sharding import RULES, axis_size, in_mesh, named_sharding

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class ParameterRow:
    """One parameter, described."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    spec: str
    """How the mesh cuts it; empty outside a mesh."""
    count: int
    decayed: bool


def abstract_model(config: ModelConfig, dtype: DtypeConfig) -> tuple[Any, Params]:
    """Describe a model without allocating it.

    Args:
        config: the model.
        dtype: its number formats.

    Returns:
        The graphdef that `bind` wants, and a nested dict of `jax.ShapeDtypeStruct`, with shardings inside a mesh.

    Raises:
        ConfigError: the config cannot be made into a model, or the mesh does not divide one of its parameters.
    """
    graphdef, state = nnx.split(jax.eval_shape(lambda: _make(config, dtype, jax.random.key(0))))
    for path, variable in nnx.to_flat_state(state):
        _check_divides("/".join(map(str, path)), variable.shape, _axes(variable))
    place = lambda variable: jax.ShapeDtypeStruct(
        variable.shape, variable.dtype, sharding=named_sharding(*_axes(variable))
    )
    is_variable = lambda leaf: isinstance(leaf, nnx.Variable)
    return graphdef, nnx.to_pure_dict(jax.tree.map(place, state, is_leaf=is_variable))


def init_params(config: ModelConfig, dtype: DtypeConfig, key: jax.Array) -> Params:
    """Make the parameters of a model; inside a mesh each device makes its own part of them.

    Args:
        config: the model.
        dtype: its number formats.
        key: a `jax.random.key`; the same key gives the same parameters on every mesh.

    Returns:
        A nested dict of arrays, e.g. params["layers"]["mixer"]["query"]["kernel"].

    Raises:
        ConfigError: as `abstract_model`.
    """
    return initialiser(config, dtype)(key)


def initialiser(config: ModelConfig, dtype: DtypeConfig) -> Any:
    """Return the jitted function of a key that `init_params` calls."""
    _, abstract = abstract_model(config, dtype)  # raises before anything is compiled
    init = lambda key: nnx.to_pure_dict(nnx.state(_make(config, dtype, key)))
    if in_mesh():
        # Initialisers know nothing of the mesh: the compiler carries the layout of the results back to them.
        init = jax.sharding.auto_axes(init, out_sharding=jax.tree.map(lambda leaf: leaf.sharding.spec, abstract))
    # Random numbers are slow to compile and run but once; the results are the same.
    return jax.jit(init, compiler_options={"xla_backend_optimization_level": 1})


def bind(graphdef: Any, params: Params) -> LanguageModel:
    """Return the model that has these parameters."""
    return nnx.merge(graphdef, params)


def decay_mask(abstract_params: Params, decayed: str = "kernels") -> Params:
    """Say which parameters weight decay applies to.

    Args:
        abstract_params: nested dict of anything.
        decayed: "kernels" of linear maps, or "all".

    Returns:
        The same nested dict with True for these, False for others: norms, biases, embeddings.
    """
    decays = lambda path, _: decayed == "all" or path[-1].key == "kernel"
    return jax.tree_util.tree_map_with_path(decays, abstract_params)


def parameter_table(abstract_params: Params, decayed: str = "kernels") -> list[ParameterRow]:
    """Describe every parameter, in the order of the dict.

    Args:
        abstract_params: nested dict of arrays or `jax.ShapeDtypeStruct`.
        decayed: as in `decay_mask`.
    """
    mask = jax.tree.leaves(decay_mask(abstract_params, decayed))
    rows = []
    for (path, leaf), decays in zip(jax.tree_util.tree_leaves_with_path(abstract_params), mask, strict=True):
        sharding = getattr(leaf, "sharding", None)
        rows.append(
            ParameterRow(
                path="/".join(key.key for key in path),
                shape=leaf.shape,
                dtype=str(leaf.dtype),
                spec=str(tuple(sharding.spec)) if isinstance(sharding, jax.sharding.NamedSharding) else "",
                count=leaf.size,
                decayed=decays,
            )
        )
    return rows


def _make(config: ModelConfig, dtype: DtypeConfig, key: jax.Array) -> LanguageModel:
    return LanguageModel(
        config,
        compute_dtype=jnp.dtype(dtype.compute),
        param_dtype=jnp.dtype(dtype.params),
        float8=dtype.matmul == "float8",
        rngs=nnx.Rngs(key),
    )


def _axes(variable: nnx.Variable) -> tuple[str | None, ...]:
    """Return the logical axes of a parameter: before the layer's own the one that layers are stacked along."""
    own = variable.get_metadata().get("axes", ())
    return ("layers",) * (len(variable.shape) - len(own)) + tuple(own)


def _check_divides(path: str, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> None:
    for size, name in zip(shape, axes, strict=True):
        if name is not None and axis_size(name) > 1:
            check_divides(f"mesh.{'*'.join(RULES[name])}", axis_size(name), f"the {name!r} axis of {path}", size)
