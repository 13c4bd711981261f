"""Where every array lies: logical axis names, and the one table that maps them to mesh axes.

Layers name the axes of what they compute and of the parameters they own ("batch", "heads", ...) and know nothing of
the mesh. This module alone knows which mesh axis serves which name. Outside a mesh (a notebook, a quick test) every
function here is the identity, so the same layer runs anywhere.
"""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

Axes = Sequence[str | None]

RULES: dict[str, tuple[str, ...]] = {
    # activations
    "batch": ("data", "fsdp"),
    "time": ("sequence",),
    "hidden": (),
    # activations and parameters
    "heads": ("tensor",),  # anything laid out head by head, split into heads or not
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    # parameters
    "embed": ("fsdp",),  # the model dimension of a weight: gathered where it is used
    "layers": (),
}


_rows_are_whole = contextvars.ContextVar("rows_are_whole", default=False)


@contextlib.contextmanager
def whole_rows() -> Iterator[None]:
    """Leave rows uncut along time inside, whatever the mesh: for rows of a token or two, which cannot be cut."""
    token = _rows_are_whole.set(True)
    try:
        yield
    finally:
        _rows_are_whole.reset(token)


def in_mesh() -> bool:
    """Say whether a mesh has been set (`jax.set_mesh`) whose axes are explicit, as all code here wants them."""
    return bool(jax.sharding.get_abstract_mesh().explicit_axes)


def mesh_axes(*names: str | None) -> tuple[str, ...]:
    """Return the axes of the current mesh that serve these logical names; axes that cut nothing are left out."""
    shape = jax.sharding.get_abstract_mesh().shape if in_mesh() else {}
    return tuple(axis for name in names if name is not None for axis in _rule(name) if shape.get(axis, 1) > 1)


def axis_size(name: str) -> int:
    """Return the number of parts that the current mesh cuts a logical axis into; 1 outside a mesh."""
    size = 1
    for axis in mesh_axes(name):
        size *= jax.sharding.get_abstract_mesh().shape[axis]
    return size


def spec(*axes: str | None) -> PartitionSpec:
    """Return the PartitionSpec, on the current mesh, of an array whose dimensions have these logical names."""
    return PartitionSpec(*(mesh_axes(name) or None for name in axes))


def out_sharding(*axes: str | None) -> PartitionSpec | None:
    """Return `spec(*axes)` inside a mesh and None outside: what `out_sharding=` arguments want."""
    return spec(*axes) if in_mesh() else None


def named_sharding(*axes: str | None) -> NamedSharding | None:
    """Return `spec(*axes)` bound to the devices of the current mesh, for arrays that are yet to be made; else None."""
    return NamedSharding(jax.sharding.get_mesh(), spec(*axes)) if in_mesh() else None


def shard(x: jax.Array, *axes: str | None) -> jax.Array:
    """Lay `x` out by its logical axes; the identity outside a mesh."""
    return jax.sharding.reshard(x, spec(*axes)) if in_mesh() else x


def share(x: jax.Array, name: str, *axes: str | None) -> jax.Array:
    """Say that all devices along an axis use `x`, each for its own part of something that `name` cuts.

    Its gradients, one for each use, are then added up on each device first and over the devices once.

    Args:
        x: laid out by its logical axes.
        name: what the parts are of, e.g. "heads".
        axes: of x.
    """
    users = mesh_axes(name)
    return jax.sharding.reshard(x, PartitionSpec(*spec(*axes), reduced=set(users))) if users else x


def gather_weight(weight: jax.Array, *axes: str | None) -> jax.Array:
    """Return a weight as products with tokens use it: whole along "embed", whatever devices hold of it.

    Its gradient is added up over the devices with other tokens, and left where the weight is held: along the axis that
    cuts it that is a reduce-scatter, and only what is left goes over the other axes.

    Args:
        weight: laid out by its logical axes.
        axes: their names.
    """
    tokens, held = mesh_axes("batch", "time"), spec(*axes)
    if not tokens:
        return weight
    apart = {axis for axis in tokens if axis not in mesh_axes("embed")}
    used = spec(*(None if name == "embed" else name for name in axes))
    if apart:
        weight = jax.sharding.reshard(weight, PartitionSpec(*held, reduced=apart))
    return jax.sharding.reshard(weight, PartitionSpec(*used, reduced=set(tokens)))


def to_host(tree: Any) -> Any:
    """Move arrays, inside a jitted function, to the memory of the hosts: each part to that of its device's host.

    Scalars stay: they take no room.
    """
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Host) if x.ndim else x, tree)


def to_device(tree: Any) -> Any:
    """Bring back what `to_host` has moved."""
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device) if x.ndim else x, tree)


def describe_on_host(tree: Any) -> Any:
    """Return what `to_host` makes of arrays that are described by `jax.ShapeDtypeStruct` with a NamedSharding."""

    def move(leaf: Any) -> Any:
        if not leaf.ndim:
            return leaf
        place = leaf.sharding.with_memory_kind("pinned_host")
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    return jax.tree.map(move, tree)


def zeros(shape: Sequence[int], dtype: Any, *axes: str | None) -> jax.Array:
    """Make zeros that are laid out by their logical axes."""
    return jnp.zeros(shape, dtype, out_sharding=out_sharding(*axes)) if in_mesh() else jnp.zeros(shape, dtype)


def per_shard(function: Callable[..., Any], in_axes: Sequence[Axes], out_axes: Any) -> Callable[..., Any]:
    """Run `function` on each device's own part of its arguments (`jax.shard_map`); as it is outside a mesh.

    The function sees local shapes and needs no knowledge of the mesh, which is how kernels are called. What it returns
    must be the same on all devices that `out_axes` does not tell apart.

    Args:
        function: takes positional arrays, any of which may be None.
        in_axes: for each argument the logical names of its dimensions.
        out_axes: a pytree of tuples of names, the shape of the result.
    """
    if not in_mesh():
        return function
    is_axes = lambda axes: isinstance(axes, tuple) and all(name is None or isinstance(name, str) for name in axes)
    out_specs = jax.tree.map(lambda axes: spec(*axes), out_axes, is_leaf=is_axes)

    def call(*arguments: Any) -> Any:
        pairs = list(zip(arguments, in_axes, strict=True))
        present = [(x, axes) for x, axes in pairs if x is not None]

        def local(*parts: Any) -> Any:
            remaining = iter(parts)
            return function(*(None if x is None else next(remaining) for x in arguments))

        # Kernels cannot say which mesh axes their results vary over, hence check_vma=False.
        in_specs = tuple(spec(*axes) for _, axes in present)
        mapped = jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, check_vma=False)
        return mapped(*(shard(x, *axes) for x, axes in present))

    return call


def sum_shards(x: jax.Array, *names: str, scatter: Mapping[int, str] | None = None) -> jax.Array:
    """Add up the parts that devices hold of a sum over these logical axes; to be called inside `per_shard`.

    Args:
        x: this device's summand.
        names: logical axes that were summed over locally.
        scatter: {dimension: name} of the dimensions of the result that are to be left sharded.
    """
    scatter = scatter or {}
    kept = {axis: dimension for dimension, name in scatter.items() for axis in manual_axes(name)}
    summed = tuple(axis for axis in manual_axes(*names) if axis not in kept)
    for axis, dimension in kept.items():
        x = jax.lax.psum_scatter(x, axis, scatter_dimension=dimension, tiled=True)
    return jax.lax.psum(x, summed) if summed else x


def max_shards(x: jax.Array, *names: str) -> jax.Array:
    """Take the largest over devices along these logical axes; to be called inside `per_shard`."""
    axes = manual_axes(*names)
    return jax.lax.pmax(x, axes) if axes else x


def shard_index(name: str) -> jax.Array | int:
    """Return which part of a logical axis this device holds; to be called inside `per_shard`."""
    axes = manual_axes(name)
    return jax.lax.axis_index(axes) if axes else 0


def shard_count(name: str) -> int:
    """Return the number of parts that a logical axis is cut into; to be called inside `per_shard`."""
    return math.prod(jax.lax.axis_size(axis) for axis in manual_axes(name))


def manual_axes(*names: str) -> tuple[str, ...]:
    """Return the axes that serve these names, for collectives inside `per_shard`; only those that cut something."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(a for name in names for a in _rule(name) if a in mesh.manual_axes and mesh.shape[a] > 1)


def _rule(name: str) -> tuple[str, ...]:
    return () if name == "time" and _rows_are_whole.get() else RULES[name]
