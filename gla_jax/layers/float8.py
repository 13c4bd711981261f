"""Matrix products of 8-bit floats, which tensor cores multiply twice as fast as bfloat16."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
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

COMPILER_OPTIONS = {"xla_gpu_enable_triton_gemm": False}
"""What XLA for GPUs has to be told: to leave all products to cuBLAS. Else it makes kernels of its own for them, with
bfloat16 factors, and takes minutes to try them."""


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
    return float8_dots(x, (kernel,), out_sharding)[0]


def float8_dots(
    x: jax.Array, kernels: Sequence[jax.Array], out_sharding: PartitionSpec | None = None
) -> tuple[jax.Array, ...]:
    """Multiply x with each kernel as `float8_dot` does; what the products share is rounded and transposed once."""
    types = _Type(x.dtype, out_sharding), _type_of_gradient(x), *map(_type_of_gradient, kernels)
    return _dots(types, x, tuple(kernels))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dots(types: tuple[_Type, ...], x: jax.Array, kernels: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    return _forward(types, x, kernels)[0]


def _forward(
    types: tuple[_Type, ...], x: jax.Array, kernels: tuple[jax.Array, ...]
) -> tuple[tuple[jax.Array, ...], Any]:
    kept = round_to(x, VALUES), tuple(round_to(kernel, VALUES) for kernel in kernels)
    return tuple(_multiply(kept[0], kernel, ((x.ndim - 1,), (0,)), types[0]) for kernel in kept[1]), kept


def _backward(
    types: tuple[_Type, ...], kept: Any, gradients: tuple[jax.Array, ...]
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    x, kernels = kept
    return _gradients(types, x, kernels, [round_to(gradient, GRADIENTS) for gradient in gradients])


_dots.defvjp(_forward, _backward)


def _gradients(
    types: tuple[_Type, ...], x: Scaled, kernels: Sequence[Scaled], gradients: Sequence[Scaled]
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Return the gradients of x and of the kernels."""
    last = gradients[0][0].ndim - 1
    d_x = (
        _multiply(gradient, kernel, ((last,), (1,)), types[1])
        for gradient, kernel in zip(gradients, kernels, strict=True)
    )
    # Hopper multiplies 8-bit factors only with the axis that is summed over last. The compiler would transpose x anew
    # for every product.
    x, rows = (_features_first(x[0]), x[1]), tuple(range(1, last + 1))
    d_kernels = tuple(
        _multiply(x, (jnp.moveaxis(gradient, -1, 0), scale), (rows, rows), wanted)
        for (gradient, scale), wanted in zip(gradients, types[2:], strict=True)
    )
    return functools.reduce(jnp.add, d_x), d_kernels


def _features_first(x: jax.Array) -> jax.Array:
    """Transpose x in memory, behind a barrier so that what made x need not write it twice."""
    as_it_is = Layout(tuple(range(x.ndim)))
    x = with_layout_constraint(jax.lax.optimization_barrier(x), as_it_is)
    return with_layout_constraint(jnp.moveaxis(x, -1, 0), as_it_is)


def float8_gated(x: jax.Array, gate: jax.Array, up: jax.Array, out_sharding: PartitionSpec | None = None) -> jax.Array:
    """Return swish(x @ gate) * (x @ up), multiplied as `float8_dot` does.

    The gradients of both products come from one pass over all that they need. Their largest entries would take another
    pass, so they are scaled by bounds instead, from the largest entries of what they are made of.

    Args:
        x: [.., features].
        gate, up: kernels [features, features].
        out_sharding: of the result.

    Returns:
        The gated product in the dtype of x.
    """
    types = _Type(x.dtype, out_sharding), _type_of_gradient(x), _type_of_gradient(gate), _type_of_gradient(up)
    return _gated(types, x, gate, up)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gated(types: tuple[_Type, ...], x: jax.Array, gate: jax.Array, up: jax.Array) -> jax.Array:
    return _forward_gated(types, x, gate, up)[0]


def _forward_gated(types: tuple[_Type, ...], x: jax.Array, gate: jax.Array, up: jax.Array) -> tuple[jax.Array, Any]:
    products, rounded = _forward(types, x, (gate, up))
    kept = *rounded, products, tuple(_largest(product) for product in products)
    return _swish_times(*products).astype(x.dtype), kept


def _backward_gated(types: tuple[_Type, ...], kept: Any, gradient: jax.Array) -> tuple[jax.Array, ...]:
    x, kernels, products, largest = kept
    most = _largest(gradient)
    _, pull = jax.vjp(_swish_times, *(product.astype(jnp.float32) for product in products))
    # The derivative of swish is below 1.1, and swish itself below its argument.
    bounds = 1.1 * most * largest[1], most * largest[0]
    d_gate, d_up = (
        round_to(d, GRADIENTS, bound) for d, bound in zip(pull(gradient.astype(jnp.float32)), bounds, strict=True)
    )
    d_x, d_kernels = _gradients(types, x, kernels, (d_gate, d_up))
    return d_x, *d_kernels


_gated.defvjp(_forward_gated, _backward_gated)


def _swish_times(gate: jax.Array, up: jax.Array) -> jax.Array:
    return jax.nn.silu(gate.astype(jnp.float32)) * up


def _multiply(a: Scaled, b: Scaled, summed: tuple[tuple[int, ...], tuple[int, ...]], wanted: _Type) -> jax.Array:
    """Sum over the given axes of two scaled arrays."""
    factors = jax.lax.optimization_barrier((a[0], b[0]))  # of no other product; see `apply_each`
    # A power of two rounds nothing. XLA for GPUs recognises in this a product of 8-bit factors and their scales, if
    # `COMPILER_OPTIONS` say so; else the product is one of the factors as they are here.
    left, right = (
        factor.astype(wanted.dtype) * scale.astype(wanted.dtype)
        for factor, scale in zip(factors, (a[1], b[1]), strict=True)
    )
    y = jax.lax.dot_general(left, right, (summed, ((), ())), out_sharding=wanted.spec)
    return jax.lax.optimization_barrier(y)  # else the product adds what comes next, for which XLA copies that first


def _type_of_gradient(x: jax.Array) -> _Type:
    """Return the type of the gradient of x: not yet added up over the devices that share x, if any do."""
    if not in_mesh():
        return _Type(x.dtype, None)
    spec = jax.typeof(x).sharding.spec
    return _Type(x.dtype, PartitionSpec(*spec.partitions, unreduced=spec.reduced))


def round_to(x: jax.Array, dtype: DTypeLike, largest: jax.Array | None = None) -> Scaled:
    """Return an array in an 8-bit dtype and the float32 power of two that it has to be multiplied by.

    `largest` bounds the entries, if that is known already.
    """
    least = (_largest(x) if largest is None else largest) / float(jnp.finfo(dtype).max)
    bits = jax.lax.bitcast_convert_type(jnp.maximum(least, 2.0**-100), jnp.int32)
    up = (bits + 0x7FFFFF) & ~0x7FFFFF  # no mantissa left, the exponent one more if there was any
    scale = jax.lax.bitcast_convert_type(up, jnp.float32)
    return (x.astype(jnp.float32) / scale).astype(dtype), scale


def _largest(x: jax.Array) -> jax.Array:
    return shard(jnp.max(jnp.abs(x)).astype(jnp.float32))
