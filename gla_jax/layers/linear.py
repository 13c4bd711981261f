"""Linear maps whose weights know the logical names of their axes."""

import jax
from flax import nnx
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from gla_jax.layers.recompute import recomputed
from gla_jax.parallel.sharding import axis_size


class Linear(nnx.Linear):
    """A linear map of the last axis; how to make one, see `linear`."""

    def __call__(self, inputs: jax.Array, out_sharding: PartitionSpec | None = None) -> jax.Array:
        """Map inputs [B, T, features] to [B, T, features]."""
        # Only the product itself has to be done: a gradient needs the inputs and the kernel as they came, neither cast
        # nor in rows, and shares them with whoever else keeps them.
        return recomputed(lambda inputs: self._multiply(inputs, out_sharding))(inputs)

    def _multiply(self, inputs: jax.Array, out_sharding: PartitionSpec | None) -> jax.Array:
        if inputs.ndim != 3 or axis_size("time") > 1:
            return super().__call__(inputs, out_sharding=out_sharding)
        # As one long list of rows: the gradient of the kernel then sums over one axis. Over two of them, XLA transposes
        # both factors on the CPU, which costs more than the product.
        rows = inputs.reshape(-1, inputs.shape[-1])
        flat_sharding = None if out_sharding is None else PartitionSpec(out_sharding[0], out_sharding[-1])
        return super().__call__(rows, out_sharding=flat_sharding).reshape(*inputs.shape[:-1], -1)


def linear(
    in_features: int,
    out_features: int,
    axes: tuple[str | None, str | None],
    *,
    use_bias: bool = False,
    initializer_range: float,
    dtype: DTypeLike,
    param_dtype: DTypeLike,
    rngs: nnx.Rngs,
) -> Linear:
    """Make a linear map with weights N(0, initializer_range^2) and, if asked for, a bias of zeros.

    Args:
        in_features, out_features: sizes of the last axis, before and after.
        axes: logical names of the kernel's two axes, e.g. ("embed", "heads").
        use_bias: add a bias.
        initializer_range: standard deviation of the weights.
        dtype: what inputs and weights are cast to when used.
        param_dtype: what weights are held in.
        rngs: source of randomness.
    """
    return Linear(
        in_features,
        out_features,
        use_bias=use_bias,
        kernel_init=jax.nn.initializers.normal(initializer_range),
        kernel_metadata={"axes": axes},
        bias_metadata={"axes": axes[1:]},
        dtype=dtype,
        param_dtype=param_dtype,
        rngs=rngs,
    )


def linear_flops(*maps: nnx.Linear | None) -> float:
    """Return the FLOPs per token of linear maps, two per weight; None counts nothing."""
    return float(sum(2 * m.in_features * m.out_features for m in maps if m is not None))
