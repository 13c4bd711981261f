"""The channel mixer."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from gla_jax.layers.float8 import float8_gated
from gla_jax.layers.linear import as_rows, linear, linear_flops
from gla_jax.layers.recompute import recomputed_afresh
from gla_jax.parallel.sharding import out_sharding, share


def default_intermediate_size(hidden_size: int) -> int:
    """Return 8/3 of the model dimension rounded up to a multiple of 256, the paper's width of the SwiGLU."""
    return 256 * -(-(8 * hidden_size // 3) // 256)


class SwiGLU(nnx.Module):
    """down(swish(gate x) * up x), without biases (arXiv 2002.05202).

    Args:
        hidden_size: model dimension D.
        intermediate_size: width; None takes `default_intermediate_size`.
        initializer_range: standard deviation of the weights.
        dtype: compute dtype.
        param_dtype: dtype that weights are held in.
        rngs: source of randomness.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int | None = None,
        *,
        initializer_range: float = 0.02,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        width = default_intermediate_size(hidden_size) if intermediate_size is None else intermediate_size
        weights = functools.partial(
            linear, initializer_range=initializer_range, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.gate = weights(hidden_size, width, ("embed", "mlp"))
        self.up = weights(hidden_size, width, ("embed", "mlp"))
        self.down = weights(width, hidden_size, ("mlp", "embed"))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x [B, T, D] to [B, T, D]."""
        wide = out_sharding("batch", "time", "mlp")
        x = share(x, "mlp", "batch", "time", None)
        if self.gate.float8:
            rows, rows_sharding = as_rows(x.astype(self.gate.dtype), wide)
            hidden = float8_gated(rows, self.gate.factor(), self.up.factor(), rows_sharding)
            hidden = hidden.reshape(*x.shape[:-1], -1)
        else:
            hidden = recomputed_afresh(_gated)(self.gate(x, out_sharding=wide), self.up(x, out_sharding=wide))
        return self.down(hidden, out_sharding=out_sharding("batch", "time", "hidden"))

    def flops_per_token(self) -> float:
        """Return the FLOPs of the forward pass for one token."""
        return linear_flops(self.gate, self.up, self.down)


def _gated(gate: jax.Array, up: jax.Array) -> jax.Array:
    return (jax.nn.silu(gate.astype(jnp.float32)) * up).astype(up.dtype)
