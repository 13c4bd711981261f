"""The definition: Mamba's recurrence, token by token. All else is the same thing, faster."""

import jax
import jax.numpy as jnp

from pallas_kernels.segments import segment_starts
from pallas_kernels.selective_scan.terms import output, step_size


def step(x, delta, A, B, C, state):
    """Advance the state by one token and read it: `h = exp(δ A) h + δ x B`, `y = h C` (arXiv 2312.00752, algorithm 2).

    Args:
        x, delta: [..., D] float32.
        A: [D, N] float32.
        B, C: [..., N] float32.
        state: [..., D, N] float32.

    Returns:
        The output [..., D], without the skip D x, and the new state, both float32.
    """
    state = jnp.exp(delta[..., None] * A) * state + (delta * x)[..., None] * B[..., None, :]
    return jnp.sum(state * C[..., None, :], axis=-1), state


def unsupported(**call):
    """Return None: the definition serves every call."""
    return None


def selective_scan(*, x, delta, A, B, C, D, gate, delta_bias, initial_state, segment_ids, chunk_size, interpret):
    """Compute the op by `lax.scan` over tokens; see `api.py`. `chunk_size` and `interpret` do not matter here."""
    size = step_size(delta, delta_bias)
    wide_x, A, B, C = (array.astype(jnp.float32) for array in (x, A, B, C))
    starts = jnp.zeros(x.shape[:2], bool)
    if segment_ids is not None:
        starts = segment_starts(segment_ids)
    state = initial_state
    if state is None:
        state = jnp.zeros_like(wide_x[:, 0, :, None] * A)

    def body(state, token):
        x, delta, B, C, start = token
        y, state = step(x, delta, A, B, C, jnp.where(start[:, None, None], 0.0, state))
        return state, y

    tokens = tuple(jnp.moveaxis(array, 1, 0) for array in (wide_x, size, B, C, starts))
    state, y = jax.lax.scan(body, state, tokens)
    return output(jnp.moveaxis(y, 0, 1), x, D, gate), state
