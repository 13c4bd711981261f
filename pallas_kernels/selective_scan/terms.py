"""What comes before and after the recurrence, for the forms of the op that leave it to the compiler."""

import jax
import jax.numpy as jnp


def step_size(delta, delta_bias):
    """Return the step size in float32: delta itself, or softplus(delta + delta_bias) where there is a bias."""
    delta = delta.astype(jnp.float32)
    return delta if delta_bias is None else jax.nn.softplus(delta + delta_bias.astype(jnp.float32))


def output(y, x, D, gate):
    """Return (y + D x) silu(gate), for y in float32, in the dtype of x; D and gate may be None."""
    if D is not None:
        y = y + D.astype(jnp.float32) * x.astype(jnp.float32)
    if gate is not None:
        y = y * jax.nn.silu(gate.astype(jnp.float32))
    return y.astype(x.dtype)
