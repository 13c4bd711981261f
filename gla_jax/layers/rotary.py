"""Rotary position embeddings (arXiv 2104.09864), and positions that go on where a state left off."""

import jax
import jax.numpy as jnp

from gla_jax.parallel.sequence import last_part
from gla_jax.parallel.sharding import shard_index


def rotate(x: jax.Array, positions: jax.Array, base: float) -> jax.Array:
    """Turn each pair of channels (i, i + K/2) of x by the angle position * base^(-2i/K).

    Products of two vectors turned like this depend on the difference of their positions only.

    Args:
        x: [B, T, H, K], K even.
        positions: [B, T] int32.
        base: of the geometric progression of frequencies; 10000 in LLaMA and RetNet.

    Returns:
        As x, in its dtype; computed in float32.
    """
    half = x.shape[-1] // 2
    frequencies = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def continue_positions(
    x: jax.Array, positions: jax.Array | None, next_position: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Return the positions of the tokens of x, and the position after the last of the row.

    Args:
        x: [B, T, ...]; inside `per_shard` this device's part of the rows.
        positions: [B, T] int32, or None to count.
        next_position: [B] int32, where an earlier call ended; None: 0.

    Returns:
        positions [B, T] and next_position [B], int32.
    """
    if positions is None:
        start = jnp.zeros(x.shape[0], jnp.int32) if next_position is None else next_position
        tokens = shard_index("time") * x.shape[1] + jnp.arange(x.shape[1], dtype=jnp.int32)
        positions = start[:, None] + tokens
    return positions, last_part(positions[:, -1] + 1)
