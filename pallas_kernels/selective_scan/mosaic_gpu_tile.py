"""How the selective scan lies on a Hopper warpgroup, shared by its kernels: layouts, copies, sums over lanes.

A thread block is one warpgroup and walks a row of W channels, chunk after chunk of C = 16 tokens, with the state
[W, 16] in float32 registers: each warp has a quarter of the channels.

Forwards a thread has one channel and all of its state (WHOLE). The backward kernel sums over channels too: there a
thread has 4 numbers of the state of each of a few neighbouring channels: these sums go over 8 lanes
then, and those over the state over 4. What needs no recurrence (softplus, silu, products of inputs) is done there for a
slice of tokens at once, every element by one thread, in another layout (TOKENS); shared memory is in between.
"""

import math

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu.fragmented_array import Tiling
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, memref, vector

from pallas_kernels.dispatch import vary_alike

CHUNK = 16  # tokens
STATES = 16  # numbers in the state of a channel, N
PER_THREAD = 4  # channels of a thread
LANES = 8 * PER_THREAD  # channels of a warp
WIDTH = 4 * LANES  # channels of a thread block, W
SLICE = CHUNK // PER_THREAD  # tokens whose channels give every thread 4 elements
ALL = (4, LANES, STATES)

F32 = jnp.float32
LOG2_E = math.log2(math.e)

# [4, LANES, STATES]: warps, 8 groups of lanes, 4 lanes of a group.
STATE = plgpu.Layout.TILED(Tiling(((4, LANES, STATES), (PER_THREAD, 4))), (-5,), (-4, -3), -1)
OF_CHANNEL, OF_STATE = STATE.reduce(2), STATE.reduce((0, 1))
# [4, LANES]: one channel a thread.
OF_LANE = plgpu.Layout.TILED(Tiling(((4, LANES), (1,))), (-3,), (-2,), -1)
# [4, LANES, STATES]: one channel a thread, and all numbers of its state.
WHOLE = plgpu.Layout.TILED(Tiling(((4, LANES, STATES), (4,))), (-4,), (-3,), -1)
WHOLE_CHANNEL, WHOLE_STATE = WHOLE.reduce(2), WHOLE.reduce((0, 1))
# [SLICE, 4, LANES]: 4 neighbouring channels of one token a thread.
TOKENS = plgpu.Layout.TILED(Tiling(((SLICE, 4, LANES), (4,))), (-4,), (-3, -2), -1)


def kernel(body, *, grid, name, interpret, **kwargs):
    """Return `body` as a kernel of one warpgroup a block, whose barriers are those that `body` asks for.

    Its results vary over the manual mesh axes that its first argument varies over, which they do not by themselves.
    """
    run = plgpu.kernel(
        body,
        grid=grid,
        grid_names=("channels", "row"),
        kernel_name=name,
        interpret=plgpu.InterpretGPUParams() if interpret else None,
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, approx_math=True, unsafe_no_auto_barriers=True
        ),
        **kwargs,
    )

    def call(*arguments):
        return vary_alike((arguments[0], run(*arguments)))[1]

    return call


def by_warp(array):
    """Cut channels, the last axis, as warps share them."""
    return array.reshape(*array.shape[:-1], -1, LANES)


def by_warp_state(array):
    """Cut channels, the last axis but one, as warps share them."""
    return array.reshape(*array.shape[:-2], -1, LANES, STATES)


def rows(B, C, starts):
    """Return what channels share of a token, float32 [B, T, 2 or 3, STATES]: B, C, and 0 where the state is reset."""
    parts = [B.astype(F32), C.astype(F32)]
    if starts is not None:
        parts.append(jnp.broadcast_to(jnp.where(starts, 0.0, 1.0)[..., None], B.shape))
    return jnp.stack(parts, axis=2)


def load(ref, layout):
    """Read an array into registers as it is."""
    return plgpu.load(ref, layout=layout, optimized=False)


def store(ref, x):
    """Write registers as they are, which jax 0.11 always does and 0.12, on its own, not where banks conflict."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, x, optimized=False)
    else:
        ref[...] = x


def load_tokens(ref, first):
    """Read a slice of tokens of a chunk as float32."""
    return load(ref.at[pl.ds(first, SLICE)], TOKENS).astype(F32)


def along_states(x, layout=STATE):
    """Broadcast a value a channel over its state."""
    return plgpu.layout_cast(lax.broadcast_in_dim(x, ALL, (0, 1)), layout)


def along_channels(x, layout=STATE):
    """Broadcast a value a number of the state over the channels."""
    return plgpu.layout_cast(lax.broadcast_in_dim(x, ALL, (2,)), layout)


def along_tokens(x):
    """Broadcast a value a channel over a slice of tokens."""
    return plgpu.layout_cast(lax.broadcast_in_dim(x, (SLICE, 4, LANES), (1, 2)), TOKENS)


def zeros(shape, layout):
    """Return float32 zeros in registers."""
    return plgpu.layout_cast(jnp.zeros(shape, F32), layout)


# Functions ------------------------------------------------------------------------------------------------------------


def _reciprocal(x):
    """Return 1 / x for positive x; a division would take ten instructions."""
    root = lax.rsqrt(x)
    return root * root


def _exp_minus_abs(x):
    return jnp.exp2(-LOG2_E * jnp.abs(x))


def sigmoid(x):
    """Return 1 / (1 + exp(-x)), with a small relative error at both ends."""
    e = _exp_minus_abs(x)
    return _sigmoid(x, e, _reciprocal(1.0 + e))


def softplus(x):
    """Return log(1 + exp(x)) with a small relative error, also of step sizes near 0."""
    e = _exp_minus_abs(x)
    return _softplus(x, e, _reciprocal(2.0 + e))


def softplus_and_sigmoid(x, z):
    """Return softplus(x) and sigmoid(z) by one root, whose unit is the busiest."""
    e_x, e_z = _exp_minus_abs(x), _exp_minus_abs(z)
    both = _reciprocal((2.0 + e_x) * (1.0 + e_z))
    return _softplus(x, e_x, both * (1.0 + e_z)), _sigmoid(z, e_z, both * (2.0 + e_x))


def _sigmoid(x, e, reciprocal):
    """Return sigmoid(x), given exp(-|x|) and 1 / (1 + exp(-|x|))."""
    return jnp.where(x >= 0, reciprocal, e * reciprocal)


def _softplus(x, e, reciprocal):
    """Return softplus(x), given e = exp(-|x|) and 1 / (2 + e).

    log1p(e) = 2 artanh(e / (2 + e)), whose argument is at most 1/3, and its series.
    """
    s = e * reciprocal
    square = s * s
    series = 1 / 13
    for odd in (11, 9, 7, 5, 3, 1):
        series = series * square + 1 / odd
    return jnp.maximum(x, 0.0) + 2.0 * s * series


# Sums over lanes ------------------------------------------------------------------------------------------------------
#
# Each exchange between lanes halves the sums that a lane still works on, so few are needed where many sums are wanted.


def read(state, row, *, interpret):
    """Return sum_n state[.., n] row[n], a value a channel."""
    return jnp.sum(state * along_channels(row), axis=2) if interpret else _read(state, row)


def read_each(state, weights, *, interpret):
    """Return sum_n state[.., n] weights[.., n], a value a channel."""
    return jnp.sum(state * weights, axis=2) if interpret else _read_each(state, weights)


def sum_channels(ref, first, second, *, interpret):
    """Write the sums of two arrays over the channels of each warp to ref [4, 2, STATES]."""
    if interpret:
        ref[:, 0], ref[:, 1] = jnp.sum(first, axis=1), jnp.sum(second, axis=1)
    else:
        _sum_channels(ref, first, second)


_A_CHANNEL = plgpu.ShapeDtypeStruct((4, LANES), jnp.dtype(F32), layout=OF_LANE)


def _i32(value):
    return mgpu.c(value, ir.IntegerType.get_signless(32))


def _add(a, b):
    return arith.addf(a, b, fastmath=arith.FastMathFlags.contract)


def _multiply(a, b):
    return arith.mulf(a, b, fastmath=arith.FastMathFlags.contract)


def _elements(registers):
    """Return the scalars of a thread, a list for each of its vectors."""
    of = lambda i: ir.DenseI64ArrayAttr.get([i])
    extract = lambda x, i: vector.extract(x, dynamic_position=[], static_position=of(i))
    return [[extract(x, i) for i in range(ir.VectorType(x.type).shape[0])] for x in registers.flat]


def _bit_of_thread(bit):
    bits = arith.andi(mgpu.utils.thread_idx(), _i32(2**bit))
    return arith.cmpi(arith.CmpIPredicate.ne, bits, _i32(0))


def _sum_over_lanes(sums, bit):
    """Add what the lane across holds to half of the sums, the upper half where the lane's bit is set; return those."""
    upper = _bit_of_thread(bit)
    halves = list(zip(sums[: len(sums) // 2], sums[len(sums) // 2 :], strict=True))
    keep = [arith.select(upper, high, low) for low, high in halves]
    give = [arith.select(upper, low, high) for low, high in halves]
    return [_add(mine, mgpu.utils.shfl_bfly(x, 2**bit)) for mine, x in zip(keep, give, strict=True)]


def _sum_products(channels, weights):
    """Sum the products of a thread's numbers, and over the 4 lanes that share channels: a channel for each of them."""
    sums = []
    for x, w in zip(channels, weights, strict=True):
        total = _multiply(x[0], w[0])
        for a, b in zip(x[1:], w[1:], strict=True):
            total = _add(total, _multiply(a, b))
        sums.append(total)
    for bit in (1, 0):
        sums = _sum_over_lanes(sums, bit)
    layout = OF_LANE.to_mgpu()
    registers = np.empty(layout.registers_shape((4, LANES)), dtype=object)
    registers.flat[:] = [vector.broadcast(ir.VectorType.get((1,), ir.F32Type.get()), x) for x in sums]
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


@plgpu.inline_mgpu(arg_types=(STATE, OF_STATE), return_type=_A_CHANNEL)
def _read(_, state, row):
    weights = [x for part in _elements(row.registers) for x in part]
    return _sum_products(_elements(state.registers), [weights] * PER_THREAD)


@plgpu.inline_mgpu(arg_types=(STATE, STATE), return_type=_A_CHANNEL)
def _read_each(_, state, weights):
    return _sum_products(_elements(state.registers), _elements(weights.registers))


@plgpu.inline_mgpu(arg_types=(plgpu.RefType(), STATE, STATE))
def _sum_channels(_, ref, first, second):
    """Sum over a thread's channels, then over the 8 lanes that have the same numbers of the state."""
    sums = []
    for array in (first, second):
        total, *others = array.registers.flat
        for x in others:
            total = _add(total, x)
        sums += _elements(np.asarray([total], dtype=object))[0]
    for bit in (4, 3, 2):
        sums = _sum_over_lanes(sums, bit)
    thread = mgpu.utils.thread_idx()
    bits = lambda start, count: arith.andi(arith.shrui(thread, _i32(start)), _i32(2**count - 1))
    state = arith.addi(arith.muli(bits(0, 2), _i32(4)), bits(2, 2))
    place = [arith.index_cast(ir.IndexType.get(), x) for x in (bits(5, 2), bits(4, 1), state)]
    memref.store(sums[0], ref, place)
