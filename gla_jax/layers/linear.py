"""Linear maps whose weights know the logical names of their axes."""

import jax
from flax import nnx
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from gla_jax.layers.float8 import float8_dot, float8_dots
from gla_jax.layers.recompute import recomputed
from gla_jax.parallel.sharding import axis_size, gather_weight
from pallas_kernels.target import target


class Linear(nnx.Linear):
    """A linear map of the last axis; how to make one, see `linear`."""

    float8 = False
    """Multiply in 8-bit floats; see `float8_dot`."""

    def __call__(self, inputs: jax.Array, out_sharding: PartitionSpec | None = None) -> jax.Array:
        """Map inputs [B, T, features] to [B, T, features]."""
        # Only the product itself has to be done: a gradient needs the inputs and the kernel as they came, neither cast
        # nor in rows nor gathered, and shares them with whoever else keeps them.
        # In 8 bits it is the other way round: what a gradient needs are the factors as they were rounded.
        multiply = lambda inputs: self._multiply(inputs, out_sharding)
        return multiply(inputs) if self.float8 else recomputed(multiply)(inputs)

    def factor(self) -> jax.Array:
        """Return the kernel as products take it: in the compute dtype, whole along the model dimension."""
        (kernel,) = self.promote_dtype((self.kernel[...],), dtype=self.dtype)
        return gather_weight(kernel, *self.kernel.axes)

    def _multiply(self, inputs: jax.Array, out_sharding: PartitionSpec | None) -> jax.Array:
        bias = None if self.bias is None else self.bias[...]
        inputs, bias = self.promote_dtype((inputs, bias), dtype=self.dtype)
        kernel, shape = self.factor(), inputs.shape
        inputs, out_sharding = as_rows(inputs, out_sharding)
        if self.float8:
            y = float8_dot(inputs, kernel, out_sharding)
        else:
            last_with_first = (((inputs.ndim - 1,), (0,)), ((), ()))
            y = jax.lax.dot_general(inputs, kernel, last_with_first, out_sharding=out_sharding)
        return (y if bias is None else y + bias).reshape(*shape[:-1], -1)


def as_rows(inputs: jax.Array, out_sharding: PartitionSpec | None) -> tuple[jax.Array, PartitionSpec | None]:
    """Return inputs [B, T, features] as one long list of rows, and the sharding of a product with them likewise.

    The gradient of a kernel then sums over one axis. Over two of them, XLA transposes both factors on the CPU, which
    costs more than the product. Rows that are cut along time stay apart.
    """
    if axis_size("time") > 1:
        return inputs, out_sharding
    # jax 0.11 can't reshape away an axis of length 1 where gradients are to be summed over devices
    rows = inputs.squeeze(1) if inputs.shape[1] == 1 else inputs.reshape(-1, inputs.shape[-1])
    return rows, None if out_sharding is None else PartitionSpec(out_sharding[0], out_sharding[-1])


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


def apply_each(x: jax.Array, *maps: Linear, out_sharding: PartitionSpec | None) -> tuple[jax.Array, ...]:
    """Apply several maps to one input [B, T, features].

    In 8 bits what the products share is rounded and transposed once. Else, of products with one factor in common, XLA
    for GPUs makes a single one if any is small, for which it copies the weights together and the results apart again.
    Behind a barrier it does not know that the factor is the same. Single tokens it may treat so: there, launches cost
    more than copies.
    """
    if all(m.float8 and m.bias is None for m in maps):
        rows, rows_sharding = as_rows(x.astype(maps[0].dtype), out_sharding)
        products = float8_dots(rows, [m.factor() for m in maps], rows_sharding)
        return tuple(product.reshape(*x.shape[:-1], -1) for product in products)
    inputs = (x,) * len(maps)
    if x.shape[1] > 1 and target().platform == "gpu":
        inputs = jax.lax.optimization_barrier(inputs)
    return tuple(m(x, out_sharding=out_sharding) for m, x in zip(maps, inputs, strict=True))


def linear_flops(*maps: nnx.Linear | None) -> float:
    """Return the FLOPs per token of linear maps, two per weight; None counts nothing."""
    return float(sum(2 * m.in_features * m.out_features for m in maps if m is not None))
