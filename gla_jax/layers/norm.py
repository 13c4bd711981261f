"""Root-mean-square normalisation."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from gla_jax.layers.recompute import recomputed


class RMSNorm(nnx.RMSNorm):
    """x / rms(x) * scale over the last axis, computed in float32, returned in the dtype of x (arXiv 1910.07467)."""

    def __init__(
        self, num_features: int, *, epsilon: float, use_scale: bool = True, param_dtype: DTypeLike, rngs: nnx.Rngs
    ):
        super().__init__(
            num_features,
            epsilon=epsilon,
            use_scale=use_scale,
            dtype=jnp.float32,
            param_dtype=param_dtype,
            scale_metadata={"axes": ("hidden",)},
            rngs=rngs,
        )

    def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]
        """Normalise the last axis of x."""
        return recomputed(lambda x: super(RMSNorm, self).__call__(x).astype(x.dtype))(x)
