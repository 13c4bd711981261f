"""Matrix products of 8-bit floats, which tensor cores multiply twice as fast as bfloat16."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from gla_jax.parallel.sharding import in_mesh, shard

Scaled = tuple[jax.Array, jax.Array]
"""An array of 8-bit floats and what it has to be multiplied by."""

VALUES = jnp.float8_e4m3fn
"""Of what goes forward: 3 bits of mantissa, up to 448."""
GRADIENTS = jnp.float8_e5m2
"""Of gradients, which differ more in size among themselves: 2 bits of mantissa, up to 57344."""
FLOAT8_LEAST = 64
"""Features on both sides that a linear map must have for it to pay; narrower ones take little time as they are."""


class _Type(NamedTuple):
    """What a product has to be: dtype, and layout inside a mesh."""

    dtype: Any
    spec: PartitionSpec | None


def float8_dot(x: jax.Array, kernel: jax.Array, out_sharding: PartitionSpec | None = None) -> jax.Array:
    """Multiply x @ kernel with 8-bit factors and float32 sums (arXiv 2209.05433).

    Every array is rounded as a whole, scaled by the power of two that makes its largest entry of now just fit, so no
    history has to be kept. The two products of the gradient take the factors as the forward pass has rounded them, and
    the incoming gradient as rounded for itself.

    Args:
        x: [.., features].
        kernel: [features, features].
        out_sharding: of the result.

    Returns:
        The product in the dtype of x.
    """
    return _dot((_Type(x.dtype, out_sharding), _type_of_gradient(x), _type_of_gradient(kernel)), x, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dot(types: tuple[_Type, ...], x: jax.Array, kernel: jax.Array) -> jax.Array:
    return _forward(types, x, kernel)[0]


def _forward(types: tuple[_Type, ...], x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, Any]:
    kept = round_to(x, VALUES), round_to(kernel, VALUES)
    return _multiply(*kept, ((x.ndim - 1,), (0,)), types[0]), kept


def _backward(types: tuple[_Type, ...], kept: Any, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = kept
    rounded = round_to(gradient, GRADIENTS)
    *rows, last = range(gradient.ndim)
    d_x = _multiply(rounded, kernel, ((last,), (1,)), types[1])
    return d_x, _multiply(x, rounded, (tuple(rows), tuple(rows)), types[2])


_dot.defvjp(_forward, _backward)


def _multiply(a: Scaled, b: Scaled, summed: tuple[tuple[int, ...], tuple[int, ...]], wanted: _Type) -> jax.Array:
    """Sum over the given axes of two scaled arrays."""
    left, right = jax.lax.optimization_barrier((a[0], b[0]))  # of no other product; see `one_input_each`
    y = jax.lax.dot_general(
        left, right, (summed, ((), ())), preferred_element_type=wanted.dtype, out_sharding=wanted.spec
    )
    # A power of two rounds nothing, so it can follow in the product's own dtype, in the pass over the product that
    # comes next. Left in sight of the product, it would become a pass of its own.
    y = jax.lax.optimization_barrier(y)
    scale = (a[1] * b[1]).astype(wanted.dtype)
    if wanted.spec is not None:  # JAX wants it said that a factor of sums that are not yet added up is the same for all
        scale = jax.sharding.reshard(scale, PartitionSpec(reduced=wanted.spec.unreduced))
    return y * scale


def _type_of_gradient(x: jax.Array) -> _Type:
    """Return the type of the gradient of x: not yet added up over the devices that share x, if any do."""
    if not in_mesh():
        return _Type(x.dtype, None)
    spec = jax.typeof(x).sharding.spec
    return _Type(x.dtype, PartitionSpec(*spec.partitions, unreduced=spec.reduced))


def round_to(x: jax.Array, dtype: DTypeLike) -> Scaled:
    """Return an array in an 8-bit dtype and the float32 power of two that it has to be multiplied by."""
    least = shard(jnp.max(jnp.abs(x)).astype(jnp.float32)) / float(jnp.finfo(dtype).max)
    bits = jax.lax.bitcast_convert_type(jnp.maximum(least, 2.0**-100), jnp.int32)
    up = (bits + 0x7FFFFF) & ~0x7FFFFF  # no mantissa left, the exponent one more if there was any
    scale = jax.lax.bitcast_convert_type(up, jnp.float32)
    return (x.astype(jnp.float32) / scale).astype(dtype), scale
