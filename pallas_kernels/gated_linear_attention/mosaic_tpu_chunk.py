"""The algebra of one chunk that the TPU kernels share: cumulative gates, masks, and attention inside the chunk.

Inside a chunk of C tokens let G_i be the cumulative log2 gate. The attention of row i on column j carries the decay
2^(G_i - G_j) per channel, which a product of two tiles q 2^G and k 2^-G would give if 2^-G did not overflow. Two ways out:

- bounded: with the reference m in the middle of the chunk, D_i = G_i - G_m is small for every gate a trained layer produces,
  and one pair of tiles, q 2^D and k 2^-D, serves the attention inside the chunk, the read of the state (kept as 2^{G_m} S)
  and its update. Taken when |D| stays below `BOUND`, which the kernel reads off the data.
- exact: dyadic levels s = 1, 2, 4, .. C/2. At level s the rows of the second half of each block of 2s tokens attend to the
  columns of its first half, with the last row of the first half as the reference, so that no exponent is ever positive.

Every exponent is a product of the gates with a matrix of zeros and ones, so bfloat16 gates are summed exactly (to float32) by
one pass through the matrix unit, and float32 gates by three.
"""

import jax
import jax.numpy as jnp
from jax import lax

LOG2E = 1.4426950408889634
# |D| (log2) up to which the bounded form is used: each factor stays within 2^87, so tiles and their sums fit float32.
BOUND = 87.0
# A gate of -128 (natural log) already multiplies a float32 state by zero; -inf would turn 0 * -inf in a product into NaN.
LOWEST_GATE = -128.0


def dot(a: jax.Array, b: jax.Array, contract: tuple[int, int] = (1, 0)) -> jax.Array:
    """Multiply two tiles over the given axes: native bfloat16, or float32 in full precision; accumulate in float32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    dimension_numbers = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dimension_numbers, precision=precision, preferred_element_type=jnp.float32)


def split(x: jax.Array, terms: int) -> list[jax.Array]:
    """Split float32 into `terms` bfloat16 arrays of 8 bits each that add up to it; 3 terms are exact."""
    parts = []
    for _ in range(terms):
        # Truncated by its bits: a round trip through bfloat16 may be optimised away as excess precision.
        bits = lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(-65536)
        part = lax.bitcast_convert_type(bits, jnp.float32)
        parts.append(part.astype(jnp.bfloat16))
        x = x - part
    return parts


def dot01(weights: jax.Array, x: jax.Array, terms: int = 3) -> jax.Array:
    """Multiply a float32 matrix of {-1, 0, 1} with x: exact products, float32 sums."""
    weights = weights.astype(jnp.bfloat16)
    parts = [x] if x.dtype == jnp.bfloat16 else split(x, terms)
    return sum(dot(weights, part) for part in parts[1:]) + dot(weights, parts[0]) if len(parts) > 1 else dot(weights, x)


def iota(length: int, axis: int) -> jax.Array:
    """Return the row (axis 0) or column (axis 1) number of a [C, C] tile."""
    return lax.broadcasted_iota(jnp.int32, (length, length), axis)


def where01(mask: jax.Array) -> jax.Array:
    """Turn a mask into float32 zeros and ones."""
    return jnp.where(mask, 1.0, 0.0)


def causal(length: int) -> jax.Array:
    """Return the mask [C, C] of the columns that a row may read: itself and those before it."""
    return iota(length, 0) >= iota(length, 1)


def middle_weights(length: int) -> jax.Array:
    """Return W with W g = G - G_m, where m = C/2 - 1."""
    return where01(causal(length)) - where01(iota(length, 1) < length // 2)


def level_weights(length: int, level: jax.Array | int) -> tuple[jax.Array, jax.Array]:
    """Return W and the mask of the dyadic level s = 2^level.

    (W g) is, in a row i of a second half, the gate from the reference to i; in a row j of a first half, the gate after j up to
    the reference. The mask holds the pairs (i, j) whose attention this level computes.
    """
    row, column = iota(length, 0), iota(length, 1)
    block = row >> (level + 1) == column >> (level + 1)
    row_second, column_second = (row >> level) & 1 == 1, (column >> level) & 1 == 1
    reading = row_second & column_second & (column <= row)
    written = ~row_second & ~column_second & (column > row)
    return where01(block & (reading | written)), block & row_second & ~column_second


def column(row: jax.Array) -> jax.Array:
    """Turn a row [1, K] into a column [K, 1]."""
    return jnp.transpose(jnp.broadcast_to(row, (8, row.shape[1])))[:, :1]
