"""Elementwise functions by their names in a config."""

from collections.abc import Callable

import jax

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": jax.nn.gelu,
    "logsigmoid": jax.nn.log_sigmoid,
    "relu": jax.nn.relu,
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "sqrelu": lambda x: jax.nn.relu(x) ** 2,
    "swish": jax.nn.silu,
}
