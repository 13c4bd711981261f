"""Where every array lies: logical axis names, and the one table that maps them to mesh axes.

Layers name the axes of what they compute and of the parameters they own ("batch", "heads", ...) and know nothing of the
mesh. This module alone knows which mesh axis serves which name. Outside a mesh (a notebook, a quick test) every function
here is the identity, so the same layer runs anywhere.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

Axes = Sequence[str | None]

RULES: dict[str, str | tuple[str, ...] | None] = {
    # activations
    "batch": ("data", "fsdp"),
    "time": "sequence",
    "hidden": None,
    # activations and parameters
    "heads": "tensor",  # anything laid out head by head, split into heads or not
    "mlp": "tensor",
    "vocab": "tensor",
    # parameters
    "embed": "fsdp",  # the model dimension of a weight: gathered where it is used
    "layers": None,
}


def spec(*axes: str | None) -> PartitionSpec:
    """Return the PartitionSpec of an array whose dimensions carry these logical names (None: not sharded)."""
    return PartitionSpec(*(None if name is None else RULES[name] for name in axes))


def in_mesh() -> bool:
    """Say whether a mesh has been set (`jax.set_mesh`)."""
    return not jax.sharding.get_abstract_mesh().empty


def out_sharding(*axes: str | None) -> PartitionSpec | None:
    """Return `spec(*axes)` inside a mesh and None outside: what `out_sharding=` arguments want."""
    return spec(*axes) if in_mesh() else None


def shard(x: jax.Array, *axes: str | None) -> jax.Array:
    """Lay `x` out by its logical axes; the identity outside a mesh."""
    return jax.sharding.reshard(x, spec(*axes)) if in_mesh() else x


def per_shard(function: Callable[..., Any], in_axes: Sequence[Axes | None], out_axes: Any) -> Callable[..., Any]:
    """Run `function` on each device's own part of its arguments (`jax.shard_map`); as it is outside a mesh.

    The function sees local shapes and needs no knowledge of the mesh, which is how kernels are called.

    Args:
        function: takes positional arrays.
        in_axes: for each argument its logical axes; None for an argument that is None.
        out_axes: a pytree of logical axes, the shape of the result; each leaf a tuple of names.
    """
    if not in_mesh():
        return function
    is_axes = lambda axes: isinstance(axes, tuple) and all(name is None or isinstance(name, str) for name in axes)
    out_specs = jax.tree.map(lambda axes: spec(*axes), out_axes, is_leaf=is_axes)

    def call(*arguments: Any) -> Any:
        laid_out = [x if x is None else shard(x, *axes) for x, axes in zip(arguments, in_axes, strict=True) if axes]
        holes = [axes is None for axes in in_axes]

        def local(*present: Any) -> Any:
            remaining = iter(present)
            return function(*(None if hole else next(remaining) for hole in holes))

        in_specs = tuple(spec(*axes) for axes in in_axes if axes is not None)
        return jax.shard_map(local, in_specs=in_specs, out_specs=out_specs)(*laid_out)

    return call
