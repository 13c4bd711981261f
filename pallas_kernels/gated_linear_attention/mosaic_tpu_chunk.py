"""The algebra of one chunk that the TPU kernels share: sizes, cumulative gates, masks, decays.

Inside a chunk of C tokens let G_i be the cumulative log2 gate. The attention of row i on column j carries the decay
2^(G_i - G_j) per channel, which a product of two tiles q 2^G and k 2^-G would give if 2^-G did not overflow. Two
ways out:

- bounded: with the reference m in the middle of the chunk, D_i = G_i - G_m is small for every gate that a trained layer
  produces, and one pair of tiles, q 2^D and k 2^-D, serves the attention inside the chunk, the read of the state
  (kept as 2^{G_m} S) and its update. Taken where |D| stays below `BOUND`, which the kernel reads off the data,
  chunk by chunk.
- exact: dyadic levels s = 1, 2, 4, .. C/2. At level s the rows of the second half of each block of 2s tokens attend to
  the columns of its first half, with the last row of the first half as the reference: no exponent is ever positive.

Every exponent is a product of the gates with a matrix of zeros and ones, so bfloat16 gates are summed exactly (to
float32) by one pass through the matrix unit, and float32 gates by three.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LOG2E = 1.4426950408889634
# |D| (log2) up to which the bounded form is used: each factor stays within 2^87, so tiles and their sums fit float32.
BOUND = 87.0
# A gate of -128 (natural log) already multiplies a float32 state by zero; -inf would turn 0 * -inf in a product
# into NaN.
LOWEST_GATE = -128.0
# Of the 64 MiB of v5p and tpu7x; v5e and v6e have 128.
VMEM_BYTES = 56 * 2**20


@dataclass(frozen=True)
class Sizes:
    """What a kernel is built for; everything static.

    A unit is the heads that share whole registers of 128 lanes: one head, or two where K or V is an odd multiple
    of 64. The state of a unit is kept transposed, [unit_values, unit_keys]: the decay of a key channel is then that of
    a lane, and multiplies as a row, where a column would first have to be made of it. With two heads it is block
    diagonal, so that one product serves both.

    Attributes:
        scale: Multiplies the query.
        chunk: C, tokens of one chunk.
        step: Tokens of one grid step, a multiple of `chunk`.
        unroll: Chunks laid out in a straight line of code.
        heads: H, all heads.
        units: Units of one grid step; they divide `group` or are a multiple of it.
        parts: Heads of one unit, 1 or 2.
        group: Consecutive units that share one unit of keys and values.
        key_dim: K.
        value_dim: V.
        dtype: What the matrix unit multiplies, bfloat16 or float32.
        gate: "none", "scalar" ([.., 1]) or "channel" ([.., K]).
        shared_gates: Whether the units that share keys share gates too.
        packed: Whether rows hold several documents.
    """

    scale: float
    chunk: int
    step: int
    unroll: int
    heads: int
    units: int
    parts: int
    group: int
    key_dim: int
    value_dim: int
    dtype: Any
    gate: str
    shared_gates: bool
    packed: bool

    @property
    def chunks(self) -> int:
        """Return the chunks of one grid step."""
        return self.step // self.chunk

    @property
    def block_heads(self) -> int:
        """Return the heads of one grid step."""
        return self.units * self.parts

    @property
    def unit_keys(self) -> int:
        """Return the key lanes of one unit."""
        return self.parts * self.key_dim

    @property
    def unit_values(self) -> int:
        """Return the value lanes of one unit."""
        return self.parts * self.value_dim

    @property
    def key_units(self) -> int:
        """Return the units of keys and values of one grid step."""
        return max(1, self.units // self.group)

    @property
    def gate_heads(self) -> int:
        """Return the heads of gates of one grid step."""
        return self.parts * (self.key_units if self.shared_gates else self.units)

    @property
    def gate_width(self) -> int:
        """Return the lanes of the gates of one grid step."""
        return self.gate_heads * (1 if self.gate == "scalar" else self.key_dim)

    def key_block(self, block: Any) -> Any:
        """Return which block of keys and values serves a block of units."""
        return block if self.units >= self.group else lax.div(block, self.group // self.units)

    def gate_block(self, block: Any) -> Any:
        """Return which block of gates serves a block of units."""
        return self.key_block(block) if self.shared_gates else block

    def gate_unit(self, unit: int) -> int:
        """Return which unit of gates serves a unit."""
        return unit // self.group if self.shared_gates else unit

    def rows(self, chunk: Any) -> Any:
        """Return the rows of a chunk within the step."""
        return pl.ds(pl.multiple_of(chunk * self.chunk, self.chunk), self.chunk)

    def queries(self, unit: int) -> slice:
        """Return the lanes of a unit's queries within the step's block."""
        return slice(unit * self.unit_keys, (unit + 1) * self.unit_keys)

    def outputs(self, unit: int) -> slice:
        """Return the lanes of a unit's outputs within the step's block."""
        return slice(unit * self.unit_values, (unit + 1) * self.unit_values)

    def keys(self, unit: int) -> slice:
        """Return the lanes of the keys that a unit reads, within the step's block."""
        return self.queries(unit // self.group)

    def values(self, unit: int) -> slice:
        """Return the lanes of the values that a unit reads, within the step's block."""
        return self.outputs(unit // self.group)

    def unit_gates(self, x: jax.Array, unit: int) -> jax.Array:
        """Cut a unit out of [rows, gate_width]: [rows, unit_keys], or [rows, 1] for one head with a scalar gate."""
        if self.gate == "channel":
            return x[:, self.queries(self.gate_unit(unit))]
        first = self.gate_unit(unit) * self.parts
        if self.parts == 1:
            return x[:, first : first + 1]
        lane = lax.broadcasted_iota(jnp.int32, (x.shape[0], self.unit_keys), 1)
        return jnp.where(lane < self.key_dim, x[:, first : first + 1], x[:, first + 1 : first + 2])

    def part(self, x: jax.Array, index: int, width: int) -> jax.Array:
        """Zero the lanes of a unit's tile [rows, parts * width] that belong to its other head."""
        if self.parts == 1:
            return x
        dtype = x.dtype
        if dtype == jnp.bfloat16:
            x = pltpu.bitcast(x, jnp.int32)  # two rows in one: a select of bfloat16 would unpack them on most chips
        lane = lax.broadcasted_iota(jnp.int32, x.shape, 1)
        x = jnp.where((lane < width) == (index == 0), x, jnp.zeros_like(x))
        return pltpu.bitcast(x, dtype) if dtype == jnp.bfloat16 else x

    def stacked(self, x: jax.Array, width: int) -> jax.Array:
        """Put the two heads of a unit's tile [rows, 2 * width] on top of each other, each in its own lanes."""
        return jnp.concatenate([self.part(x, 0, width), self.part(x, 1, width)], axis=0)

    def diagonal(self, state: jax.Array) -> jax.Array:
        """Zero what a product over a unit's lanes [unit_values, unit_keys] mixes between its heads."""
        if self.parts == 1:
            return state
        row = lax.broadcasted_iota(jnp.int32, state.shape, 0)
        lane = lax.broadcasted_iota(jnp.int32, state.shape, 1)
        return jnp.where((row < self.value_dim) == (lane < self.key_dim), state, 0.0)

    def load_state(self, ref: Any, unit: int) -> jax.Array:
        """Read a unit's state out of a block [heads, K, V], as [unit_values, unit_keys] float32."""
        if self.parts == 1:
            return jnp.transpose(ref[unit])
        first, second = ref[2 * unit], ref[2 * unit + 1]
        zeros = jnp.zeros_like(first)
        first, second = jnp.concatenate([first, zeros], axis=1), jnp.concatenate([zeros, second], axis=1)
        return jnp.transpose(jnp.concatenate([first, second], axis=0))

    def store_state(self, ref: Any, unit: int, state: jax.Array) -> None:
        """Write a unit's state into a block [heads, K, V]."""
        state = jnp.transpose(state)
        for i in range(self.parts):
            rows = slice(i * self.key_dim, (i + 1) * self.key_dim)
            columns = slice(i * self.value_dim, (i + 1) * self.value_dim)
            ref[self.parts * unit + i] = state[rows, columns]


def dot(a: jax.Array, b: jax.Array, contract: tuple[int, int] = (1, 0)) -> jax.Array:
    """Multiply two tiles over the given axes: native bfloat16, or float32 in full precision; accumulate in float32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    dimension_numbers = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dimension_numbers, precision=precision, preferred_element_type=jnp.float32)


def split(x: jax.Array, terms: int) -> list[jax.Array]:
    """Split float32 into bfloat16 terms that add up to it; three are exact."""
    parts = []
    for _ in range(terms - 1):
        # Truncated by its bits: a round trip through bfloat16 may be optimised away as excess precision.
        bits = lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(-65536)
        part = lax.bitcast_convert_type(bits, jnp.float32)
        parts.append(part.astype(jnp.bfloat16))
        x = x - part
    return [*parts, x.astype(jnp.bfloat16)]


def dot01(weights: jax.Array, x: jax.Array, terms: int = 3) -> jax.Array:
    """Multiply a matrix of -1, 0 and 1 with x [C, ..]: exact products of bfloat16 terms, float32 sums."""
    weights = weights.astype(jnp.bfloat16)
    parts = [x] if x.dtype == jnp.bfloat16 else split(x, terms)
    total = dot(weights, parts[-1])
    for part in reversed(parts[:-1]):
        total += dot(weights, part)
    return total


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
    """Return W with (W g)_i = G_i - G_m, where m = C/2 - 1."""
    return where01(causal(length)) - where01(iota(length, 1) < length // 2)


def level_weights(length: int, level: jax.Array | int) -> tuple[jax.Array, jax.Array]:
    """Return W and the mask of the dyadic level s = 2^level.

    (W g) is, in a row i of a second half, the gate from the reference to i; in a row j of a first half, the gate
    after j up to the reference. The mask holds the pairs (i, j) whose attention this level computes.
    """
    row, column = iota(length, 0), iota(length, 1)
    same_block = lax.shift_right_logical(row, level + 1) == lax.shift_right_logical(column, level + 1)
    row_second = lax.shift_right_logical(row, level) & 1
    column_second = lax.shift_right_logical(column, level) & 1
    reading = (row_second == 1) & (column_second == 1) & (column <= row)
    written = (row_second == 0) & (column_second == 0) & (column > row)
    return where01(same_block & (reading | written)), same_block & (row_second > column_second)


def levels(length: int) -> int:
    """Return the number of dyadic levels of a chunk, a power of two."""
    return length.bit_length() - 1


def to_column(row: jax.Array) -> jax.Array:
    """Turn a row [1, C] into a column [C, 1]."""
    return jnp.transpose(jnp.broadcast_to(row, (8, row.shape[1])))[:, :1]


def prepare_gates(sizes: Sizes, g_ref: Any, d_ref: Any, middle_ref: Any, flag_ref: Any) -> None:
    """Compute for every chunk of the step, all heads at once, D, G_m, and a flag: 0 where the bounded form serves."""
    weights = middle_weights(sizes.chunk)
    for chunk in range(sizes.chunks):
        g = g_ref[chunk * sizes.chunk : (chunk + 1) * sizes.chunk, :]
        d = dot01(weights, g) * LOG2E
        d_ref[chunk] = d
        middle_ref[chunk, :1, :] = g[:1].astype(jnp.float32) * LOG2E - d[:1]
        # D falls along the chunk: its first and last rows bound it. Compared such that NaN, from a gate of -inf,
        # is unbounded.
        inside = (d[:1] <= BOUND) & (d[sizes.chunk - 1 :] >= -BOUND)
        flag_ref[chunk] = jnp.max(jnp.where(inside, 0.0, 1.0)).astype(jnp.int32)


def exact_gates(sizes: Sizes, g_ref: Any, rows: Any, unit: int) -> Any:
    """Return the function from weights [C, C] to their product with a unit's log2 gates."""
    g = jnp.maximum(sizes.unit_gates(g_ref[rows, :].astype(jnp.float32), unit), LOWEST_GATE).astype(g_ref.dtype)
    return lambda weights: dot01(weights, g) * LOG2E


def when_unbounded(flag: jax.Array) -> Any:
    """Run what a flag of `prepare_gates` asks for; a name of its own, so that an estimate can leave it out."""
    return pl.when(flag != 0)


def walk(sizes: Sizes, order: list[Any], flag_ref: Any, bounded: Any, exact: Any) -> None:
    """Visit the chunks of the step, each in its form.

    Where all are bounded, which is the rule, runs of `unroll` chunks are laid out in a straight line: the matrix unit
    then works on one while the next one's gates are being exponentiated.

    Args:
        sizes: The kernel's sizes.
        order: [first, last], the chunks to visit, in either direction.
        flag_ref: The flags of `prepare_gates`; None without gates.
        bounded: Called with a chunk.
        exact: Called with a chunk.
    """
    first, last = order
    count, sign = abs(last - first) + 1, 1 if last >= first else -1
    unroll = min(count, sizes.unroll)

    def bounded_run(index: Any, carry: None) -> None:
        for i in range(unroll):
            bounded(first + sign * (index * unroll + i))

    def all_bounded() -> None:
        lax.fori_loop(0, count // unroll, bounded_run, None)
        for i in range(count - count % unroll, count):
            bounded(first + sign * i)

    def each(index: Any, carry: None) -> None:
        chunk = first + sign * index
        flag = flag_ref[chunk]
        pl.when(flag == 0)(lambda: bounded(chunk))
        when_unbounded(flag)(lambda: exact(chunk))

    if flag_ref is None:
        all_bounded()
        return
    unbounded = sum(flag_ref[chunk] for chunk in range(sizes.chunks))
    pl.when(unbounded == 0)(all_bounded)
    when_unbounded(unbounded)(lambda: lax.fori_loop(0, count, each, None))


def document_masks(run_ref: Any, rows: Any) -> tuple[Any, jax.Array, jax.Array, jax.Array]:
    """Say what a chunk's tokens may read, from the number of the document run that each belongs to.

    Args:
        run_ref: [3, step] float32: the run of each token, of the last token before its chunk, of the last of its chunk.
        rows: The chunk's tokens.

    Returns:
        runs: [C, 1] and [1, C], the run of each row and of each column, for `readable`.
        reads: [C, 1], tokens that still see the state from before the chunk.
        writes: [C, 1], tokens that the state after the chunk still sees.
        keeps: [1, 1], whether the state after the chunk still sees the state before it.
    """
    run = run_ref[:, rows]
    of_token, before, last = run[:1], run[1:2, :1], run[2:3, :1]
    of_row = to_column(of_token)
    return (of_row, of_token), of_row == before, of_row == last, before == last


def readable(length: int, runs: Any) -> jax.Array:
    """Return the mask [C, C] of the columns that a row may read: no later token, none of another run."""
    if runs is None:
        return causal(length)
    of_row, of_column = runs
    return causal(length) & (of_row == of_column)


def readable_half(length: int, first: int, runs: Any) -> jax.Array:
    """Return the mask [C - first, C] of the rows from `first` on, for the C/2 columns from there on, twice."""
    shape, half = (length - first, length), length // 2
    row, column = lax.broadcasted_iota(jnp.int32, shape, 0), lax.broadcasted_iota(jnp.int32, shape, 1)
    mask = row >= (column & (half - 1))
    if runs is None:
        return mask
    of_row, of_column = runs[0][first:], runs[1][:, first : first + half]
    return mask & (of_row == jnp.concatenate([of_column, of_column], axis=1))


class BlockSpecs(NamedTuple):
    """What a grid step sees of the arrays; the grid is (batch, blocks of units, steps in time)."""

    queries: pl.BlockSpec
    keys: pl.BlockSpec
    values: pl.BlockSpec
    gates: list[pl.BlockSpec]
    runs: pl.BlockSpec
    outputs: pl.BlockSpec
    states: pl.BlockSpec
    saved: pl.BlockSpec


def block_specs(sizes: Sizes, time_index: Any, shared: bool = True) -> BlockSpecs:
    """Return what a grid step sees of the arrays.

    Args:
        sizes: The kernel's sizes.
        time_index: Maps the last index of the grid to the step that it stands for.
        shared: Whether blocks of units share keys, values and gates; or each has its own, as their gradients do.
    """
    key_block, gate_block = (sizes.key_block, sizes.gate_block) if shared else (lambda h: h, lambda h: h)
    lanes = lambda width, block: pl.BlockSpec((None, sizes.step, width), lambda b, h, t: (b, time_index(t), block(h)))
    if sizes.gate == "scalar":
        rows = (None, None, sizes.step, sizes.gate_heads)
        gates = [pl.BlockSpec(rows, lambda b, h, t: (b, gate_block(h), time_index(t), 0))]
    else:
        gates = [lanes(sizes.gate_width, gate_block)] * (sizes.gate == "channel")
    state = (None, sizes.block_heads, sizes.key_dim, sizes.value_dim)
    saved = (None, None, sizes.units, sizes.unit_values, sizes.unit_keys)
    return BlockSpecs(
        queries=lanes(sizes.units * sizes.unit_keys, lambda h: h),
        keys=lanes(sizes.key_units * sizes.unit_keys, key_block),
        values=lanes(sizes.key_units * sizes.unit_values, key_block),
        gates=gates,
        runs=pl.BlockSpec((None, 3, sizes.step), lambda b, h, t: (b, 0, time_index(t))),
        outputs=lanes(sizes.units * sizes.unit_values, lambda h: h),
        states=pl.BlockSpec(state, lambda b, h, t: (b, h, 0, 0)),
        saved=pl.BlockSpec(saved, lambda b, h, t: (b, time_index(t), h, 0, 0)),
    )


def gate_scratch(sizes: Sizes) -> list[Any]:
    """Return the scratch of `prepare_gates` (D, G_m, flags), and that of the decay that waits for the next chunk."""
    return [
        pltpu.VMEM((sizes.chunks, sizes.chunk, sizes.gate_width), jnp.float32),
        pltpu.VMEM((sizes.chunks, 8, sizes.gate_width), jnp.float32),
        pltpu.SMEM((sizes.chunks,), jnp.int32),
        pltpu.VMEM((8, sizes.gate_width), jnp.float32),
    ]


def out_struct(shape: tuple[int, ...], dtype: Any, like: jax.Array) -> jax.ShapeDtypeStruct:
    """Describe an output that varies over the same manual mesh axes as an input."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(like).manual_axis_type)


def compiler_params() -> pltpu.CompilerParams:
    """Return how every kernel here is compiled: rows and heads in any order, time in order."""
    return pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES)
