"""The definition: the recurrence of Gated Linear Attention, token by token. All else is the same thing, faster."""

import jax
import jax.numpy as jnp

from pallas_kernels.segments import segment_starts


def step(query, key, value, log_decay, state, *, scale):
    """Advance the state by one token and read it: `S = Diag(exp(g)) S + k v^T`, `o = scale S^T q` (equation 3).

    Args:
        query, key, log_decay: [..., K] float32.
        value: [..., V] float32.
        state: [..., K, V] float32.
        scale: float.

    Returns:
        The output [..., V] and the new state, both float32.
    """
    state = jnp.exp(log_decay)[..., :, None] * state + key[..., :, None] * value[..., None, :]
    return scale * jnp.sum(query[..., :, None] * state, axis=-2), state


def unsupported(query, key, value, log_decay, initial_state, segment_ids, *, chunk_size, interpret):
    """Return None: the definition serves every call."""
    return None


def gated_linear_attention(
    query, key, value, log_decay, initial_state, segment_ids, *, scale, chunk_size, interpret, output_final_state=True
):
    """Compute the op by `lax.scan` over tokens; see `api.py`. `chunk_size` and `interpret` do not matter here."""
    per_head = lambda x: jnp.repeat(x, query.shape[2] // x.shape[2], axis=2).astype(jnp.float32)
    q, k, v = per_head(query), per_head(key), per_head(value)
    g = jnp.broadcast_to(0.0 if log_decay is None else per_head(log_decay), k.shape)
    if segment_ids is not None:
        g = jnp.where(segment_starts(segment_ids)[:, :, None, None], -jnp.inf, g)
    state = initial_state
    if state is None:
        state = jnp.zeros_like(k[:, 0, :, :, None] * v[:, 0, :, None, :])

    def body(state, token):
        q, k, v, g = token
        out, state = step(q, k, v, g, state, scale=scale)
        return state, out

    state, out = jax.lax.scan(body, state, tuple(jnp.moveaxis(x, 1, 0) for x in (q, k, v, g)))
    return jnp.moveaxis(out, 0, 1).astype(value.dtype), state
