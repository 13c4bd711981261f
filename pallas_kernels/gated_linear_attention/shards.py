"""The op over arrays that are laid out over a mesh: each device runs it on its own rows and heads.

XLA cannot cut a kernel into parts: left to itself it gathers all arguments on all devices. The rows and heads of the op
need nothing of each other, so where the types of the arguments say how they are laid out (explicit mesh axes), the op
runs inside `jax.shard_map`. Under auto axes types say nothing, and calling inside `jax.shard_map` is the caller's part.
"""

import math
from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec

_ROWS, _TIME, _HEADS, _CHANNELS = "rows", "time", "heads", "channels"
_TOKENS, _STATES = (_ROWS, _TIME, _HEADS, _CHANNELS), (_ROWS, _HEADS, _CHANNELS, _CHANNELS)


def per_shard(
    function: Callable[..., tuple[jax.Array, jax.Array]],
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_decay: jax.Array | None,
    initial_state: jax.Array | None,
    segment_ids: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Call `function` with the arguments of the op, all laid out as the query is, on each device's own part of them.

    Returns:
        out [B, T, H, V] and final_state [B, H, K, V], laid out as the query is.

    Raises:
        ValueError: the query is laid out over time or channels, or key heads cannot be cut as query heads are.
    """
    sharding = jax.typeof(query).sharding
    layout = dict(zip(_TOKENS, (*sharding.spec, *[None] * (query.ndim - len(sharding.spec))), strict=True))
    arguments = (query, key, value, log_decay, initial_state, segment_ids)
    if not any(layout.values()):
        return function(*arguments)
    for dimension in (_TIME, _CHANNELS):
        if layout[dimension]:
            raise ValueError(
                f"query is laid out over mesh axis {layout[dimension]!r} along its {dimension}; lay out its "
                "rows and heads only (jax.sharding.reshard), or cut it yourself inside jax.shard_map."
            )
    axes = layout[_HEADS] if isinstance(layout[_HEADS], tuple) else (layout[_HEADS],)
    parts = math.prod(sharding.mesh.shape[axis] for axis in axes if axis is not None)
    if key.shape[2] % parts:
        raise ValueError(
            f"query has its heads on {parts} devices, which must divide the {key.shape[2]} heads of key; "
            "lay out its rows only, or repeat the heads of key and value."
        )
    names = (_TOKENS, _TOKENS, _TOKENS, _TOKENS, _STATES, (_ROWS, _TIME))
    specs = [
        None
        if x is None
        else PartitionSpec(*(layout[n] if size > 1 else None for n, size in zip(dims, x.shape, strict=True)))
        for x, dims in zip(arguments, names, strict=True)
    ]
    laid_out = [x if x is None else jax.sharding.reshard(x, spec) for x, spec in zip(arguments, specs, strict=True)]
    results = PartitionSpec(layout[_ROWS], None, layout[_HEADS]), PartitionSpec(layout[_ROWS], layout[_HEADS])
    return jax.shard_map(function, in_specs=tuple(specs), out_specs=results)(*laid_out)
