"""The op over arrays that are laid out over a mesh: each device runs it on its own rows and channels.

XLA cannot cut a kernel into parts: left to itself it gathers all arguments on all devices. The rows and channels of the
op need nothing of each other, so where the types of the arguments say how they are laid out (explicit mesh axes), the
op runs inside `jax.shard_map`. Under auto axes types say nothing, and calling inside `jax.shard_map` is the caller's
part.
"""

from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec

_ROWS, _TIME, _CHANNELS, _STATE = "rows", "time", "channels", "state"
_DIMENSIONS = {
    "x": (_ROWS, _TIME, _CHANNELS),
    "delta": (_ROWS, _TIME, _CHANNELS),
    "A": (_CHANNELS, _STATE),
    "B": (_ROWS, _TIME, _STATE),
    "C": (_ROWS, _TIME, _STATE),
    "D": (_CHANNELS,),
    "gate": (_ROWS, _TIME, _CHANNELS),
    "delta_bias": (_CHANNELS,),
    "initial_state": (_ROWS, _CHANNELS, _STATE),
    "segment_ids": (_ROWS, _TIME),
}


def per_shard(
    function: Callable[..., tuple[jax.Array, jax.Array]], arguments: dict[str, jax.Array | None]
) -> tuple[jax.Array, jax.Array]:
    """Call `function(**arguments)`, all of them laid out as x is, on each device's own part of them.

    Returns:
        y [B, T, D] and final_state [B, D, N], laid out as x is.

    Raises:
        ValueError: x is laid out over time.
    """
    spec = jax.typeof(arguments["x"]).sharding.spec
    layout = dict(zip(_DIMENSIONS["x"], (*spec, *[None] * (3 - len(spec))), strict=True)) | {_STATE: None}
    if not any(layout.values()):
        return function(**arguments)
    if layout[_TIME]:
        raise ValueError(
            f"x is laid out over mesh axis {layout[_TIME]!r} along its time; lay out its rows and channels only "
            "(jax.sharding.reshard), or cut it yourself inside jax.shard_map."
        )
    given = {name: array for name, array in arguments.items() if array is not None}
    specs = {name: PartitionSpec(*(layout[dimension] for dimension in _DIMENSIONS[name])) for name in given}
    laid_out = {name: jax.sharding.reshard(array, specs[name]) for name, array in given.items()}
    missing = {name: None for name in arguments if name not in given}
    results = PartitionSpec(layout[_ROWS], None, layout[_CHANNELS]), PartitionSpec(layout[_ROWS], layout[_CHANNELS])
    return jax.shard_map(lambda parts: function(**parts, **missing), in_specs=(specs,), out_specs=results)(laid_out)
