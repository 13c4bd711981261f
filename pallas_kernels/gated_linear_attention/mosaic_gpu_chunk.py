"""The algebra of one chunk on Hopper, shared by the forward and the backward kernels.

Letters: G is the running sum of log decays inside a chunk of C = 64 tokens, m = 31 its middle row.

Bounded chunks, where no channel decays by more than e^-60 over half a chunk (for a trained gate, all of them), use one
pair of gated tiles for everything. With D = G - G_m, a triangular product W g with W in {-1, 0, 1},

    q' = scale q e^D,   k' = k e^-D,   A = tril(q' k'^T),   R = e^{G_m} S,   U = R + k'^T v
    o  = q' R + A v,    S_next = e^{G_last - G_m} U.

All other chunks (strong gates, resets) take references that make every exponent <= 0:

    q' = scale q e^G,   k' = k e^{G_last - G},   R = S,   U = e^{G_last} R + k'^T v,   S_next = U

and A = sum over 7 levels of mask_l o (q_l k_l^T): level 0 is the diagonal; level l > 0 cuts the chunk into blocks of
2^l rows and pairs the second half of a block with its first half, both relative to the last row of the first half. The
exponents of a level are again a product W_l g with 0/1 entries, so nothing cancels, however strong the gate.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm
from jaxlib.mlir.dialects import math as mlir_math

from pallas_kernels.dispatch import vary_alike

CHUNK = 64  # tokens
MIDDLE = 31  # the reference row
SLAB = 64  # key channels handled at once: one 128-byte swizzle
LEVELS = 7
BOUND = 60.0  # on |D|: e^60 leaves room for sums in float32
LOG2_E = math.log2(math.e)
LEAST_LOG_DECAY = -128.0  # exp is 0 in float32 here and below; keeps -inf out of products with 0

F32, BF16 = jnp.float32, jnp.bfloat16
WGMMA, TRANSPOSED = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA_TRANSPOSED
ROW, COL = WGMMA.reduce(1), WGMMA.reduce(0)

_i, _j = np.arange(CHUNK)[:, None], np.arange(CHUNK)[None]
# The sums of g up to the middle row and after it, in rows 0 and 1: a matrix product takes 8 at least.
SELECT = np.zeros((8, CHUNK), F32)
SELECT[0, : MIDDLE + 1] = SELECT[1, MIDDLE + 1 :] = 1
SHIFTED, FROM_HERE, BEFORE, UP_TO_HERE, AFTER = range(5)
TRIANGLES = np.stack(
    [1.0 * (_j <= _i) - (_j <= MIDDLE), _j >= _i, _j < _i, _j <= _i, _j > _i]  # rows of W, in the order above
).astype(F32)


def _level(level):
    """Return (W_l, mask_l) of a level."""
    if level == 0:
        return np.zeros((CHUNK, CHUNK)), _i == _j
    half = 2 ** (level - 1)
    block, reference = _i // (2 * half), _i // (2 * half) * 2 * half + half - 1
    second = _i > reference
    sums = np.where(second, (_j > reference) & (_j <= _i), (_j > _i) & (_j <= reference))
    return sums, second & (_j // (2 * half) == block) & (_j <= reference)


LEVEL_TABLES = np.stack([np.stack(pair) for pair in zip(*map(_level, range(LEVELS)), strict=True)]).astype(F32)


def constants():
    """Return SELECT, TRIANGLES and LEVEL_TABLES [2, LEVELS, C, C] in bfloat16, as literals."""
    return tuple(jnp.asarray(x, BF16) for x in (SELECT, TRIANGLES, LEVEL_TABLES))


def tile(*shape):
    """Return a bfloat16 buffer in shared memory, tiled and swizzled for the tensor cores and the copy engine."""
    swizzle = plgpu.find_swizzle(shape[-1] * 16)
    tiling = plgpu.TilingTransform((8, swizzle // 2))  # type: ignore[abstract]
    return plgpu.SMEM(shape, BF16, transforms=(tiling, plgpu.SwizzleTransform(swizzle)))  # type: ignore[abstract]


def barrier(arrivals, count=1):
    """Return `count` barriers that complete after `arrivals` copies or warpgroups."""
    return plgpu.Barrier(num_arrivals=arrivals, num_barriers=count)


def kernel(body, *, name, interpret, warpgroups=3, changes=0, replace=None, **kwargs):
    """Return `body` as a kernel of so many warpgroups.

    Its results vary over the manual mesh axes that its first argument varies over, which they do not by themselves.
    Before that, `replace` may return others in their place. The last `changes` arguments are memory that the kernel
    writes to; what they become is returned before its results.
    """
    run = plgpu.kernel(
        body,
        num_threads=warpgroups,
        thread_name="warpgroup",
        kernel_name=name,
        interpret=plgpu.InterpretGPUParams() if interpret else None,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane, approx_math=True),
        **kwargs,
    )

    if changes:
        run = _in_place(run, changes)

    def call(*arguments):
        results = run(*arguments)
        if replace is not None:
            results = replace(results)
        return vary_alike((arguments[0], results))[1]

    return call


def _in_place(run, changes):
    """Return a kernel that writes to its last arguments as a function of arrays.

    The barriers keep it out of XLA's fusions with slices of what a loop stacks (its dynamic-slice fusion), which forget
    which results share their memory with which arguments: those are then never written. Under `vmap` all arguments get
    the mapped axis, also those without one, or all instances would write to the same.
    """

    @jax.custom_batching.custom_vmap
    def call(*arguments):
        arguments = lax.optimization_barrier(arguments)
        references = [jax.new_ref(x) for x in arguments[-changes:]]
        results = run(*arguments[:-changes], *references)
        return lax.optimization_barrier((*(jax.freeze(x) for x in references), *results))

    @call.def_vmap
    def _over_axis(size, mapped, *arguments):
        spread = [x if y else jnp.broadcast_to(x, (size, *x.shape)) for x, y in zip(arguments, mapped, strict=True)]
        results = _in_place(jax.vmap(run), changes)(*spread)
        return results, (True,) * len(results)

    return call


def result(shape, dtype, like):
    """Return the type of a kernel's result that varies over the same manual mesh axes as `like`."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(like).manual_axis_type)


PRODUCER, CONSUMER = 24, 240  # registers a thread where there are three warpgroups, 3 x 168 in all
_AT_START = 128  # registers that every thread has at least, where there are four


def set_registers(count, interpret):
    """Give the warpgroup its registers: more than it was started with, or less than any are."""
    if not interpret:
        plgpu.set_max_registers(count, action="decrease" if count < _AT_START else "increase")


def begin_apart(number, clusters, *, at_once, groups, clocks, interpret):
    """Wait in the first clusters, which start together: each of `groups` of them `clocks` after the one before.

    Of all `clusters` this is the one of that `number`, in the order in which they start, `at_once` of them together.

    A block first reads for much of its time and then computes and writes. Blocks that all do so at the same time leave
    the memory idle in between. Where there are few, the wait is not made up for.
    """
    if clusters < 4 * at_once or interpret:
        return

    @plgpu.inline_mgpu()
    def spin(_):
        llvm.inline_asm(
            ir.Type.parse("!llvm.void"),
            [],
            "{ .reg .pred p; .reg .u64 start, now; mov.u64 start, %clock64; "
            "again_${:uid}: mov.u64 now, %clock64; sub.u64 now, now, start; "
            f"setp.lt.u64 p, now, {clocks}; @p bra again_${{:uid}}; }}",
            "",
            has_side_effects=True,
        )

    times = jnp.where(number < at_once, lax.rem(number, groups), 0)
    lax.fori_loop(0, times, lambda *_: spin(), None)


def load(ref):
    """Read a tile into registers as float32."""
    return plgpu.load(ref, layout=WGMMA, optimized=False).astype(F32)


def turned(x, interpret):
    """Return float32 registers in the layout that `ref.T[...] = x` stores to global memory from.

    Bfloat16 goes to the transpose of a tile as it is: the copy from registers to shared memory transposes it.
    """
    return x if interpret else plgpu.layout_cast(x, TRANSPOSED)  # the interpreter has no layouts


def load_state(ref):
    """Read a float32 array in global memory, for a loop to start from, as it is.

    The type of what is loaded varies over manual mesh axes as the type of the whole array does, and that of a sum does
    not, nor that of anything computed from it: a loop wants the same type at its start as at its end.
    """
    x = plgpu.load(ref, layout=WGMMA, optimized=False)
    return x + zeros(x.shape)


def load_turned_state(ref, interpret):
    """Read the transpose of what `load_state` reads."""
    if interpret:  # which has no layouts
        return load_state(ref.T)
    x = plgpu.layout_cast(plgpu.load(ref.T, layout=TRANSPOSED, optimized=False), WGMMA)
    return x + zeros(x.shape)


def matmul(*pairs, shape=(CHUNK, CHUNK)):
    """Sum `a @ b` over pairs of operands in shared memory, into float32 registers.

    The barrier keeps arithmetic from moving before the wait for the tensor cores.
    """

    def go(accumulator):
        for a, b in pairs:
            plgpu.wgmma(accumulator, a, b)
        return accumulator[...]

    return lax.optimization_barrier(pl.run_scoped(go, plgpu.ACC(shape, F32)))


def add_matmul(x, *pairs, interpret):
    """Add `a @ b` over pairs of operands to x, accumulated in place."""
    if interpret:  # which has no accumulators that start from a value
        return x + matmul(*pairs, shape=x.shape)

    def go(accumulator):
        for a, b in pairs:
            plgpu.wgmma(accumulator, a, b)

    return lax.optimization_barrier(pl.run_state(go)(plgpu.ACC.init(x)))


def left_operand(x, spare, interpret):
    """Return bfloat16 registers to multiply from the left; the interpreter wants them in shared memory, in `spare`."""
    if not interpret:
        return x
    spare[...] = x
    plgpu.commit_smem()
    return spare


def halves(g, select):
    """Return the sums of g, terms in tiles, up to the middle row and after it, a value a key channel."""
    return first_columns(matmul(*((term.T, select.T) for term in g), shape=(SLAB, 8)))


def first_columns(x):
    """Return columns 0 and 1 of registers [64, 8], a value a row."""
    column = plgpu.broadcasted_iota(jnp.int32, (SLAB, 8), 1, layout=WGMMA)
    return tuple(jnp.sum(jnp.where(column == c, x, 0.0), axis=1) for c in range(2))


def put_split(x, high, low):
    """Write float32 registers as the sum of two bfloat16 tiles."""
    rounded = lax.optimization_barrier(x.astype(BF16))  # or numbers are converted one by one
    high[...] = rounded
    low[...] = (x - rounded.astype(F32)).astype(BF16)


def put_table(buffer, tables, index):
    """Write one of the tables in global memory to a tile."""
    buffer[...] = plgpu.load(tables.at[index], layout=WGMMA, optimized=False)


def zero_row():
    """Return a float32 zero a key channel, in registers."""
    return plgpu.layout_cast(jnp.zeros((SLAB,), F32), ROW)


def along_rows(x, shape):
    """Broadcast a value a row over the columns."""
    return lax.broadcast_in_dim(x, shape, [0])


def exceeds_bound(*arrays, interpret):
    """Return whether any element of the arrays is beyond BOUND or NaN, the same scalar in all threads."""
    if interpret:
        return jnp.logical_not(jnp.all(jnp.stack([jnp.all(jnp.abs(x) <= BOUND) for x in arrays])))

    splat = plgpu.Layout.WG_SPLAT

    @plgpu.inline_mgpu(
        arg_types=(WGMMA,) * len(arrays), return_type=plgpu.ShapeDtypeStruct((), jnp.dtype(jnp.int32), layout=splat)
    )
    def vote(_, *registers):
        i32 = ir.IntegerType.get_signless(32)
        magnitudes = [mlir_math.absf(r) for array in registers for r in array.registers.flat]
        largest = functools.reduce(arith.maximumf, magnitudes)
        beyond = mgpu.c(0, i32)
        for lane in range(ir.VectorType(largest.type).shape[0]):
            value = llvm.extractelement(largest, mgpu.c(lane, i32))
            within = arith.cmpf(arith.CmpFPredicate.OLE, value, mgpu.c(BOUND, value.type))
            beyond = arith.select(within, beyond, mgpu.c(1, i32))
        voted = llvm.inline_asm(
            i32,
            [beyond, mgpu.utils.warpgroup_barrier_idx(sync=False)],
            "{ .reg .pred p; setp.ne.s32 p, $1, 0; barrier.cta.red.or.pred p, $2, 128, p; selp.s32 $0, 1, 0, p; }",
            "=r,r,r",
            has_side_effects=True,
        )
        return mgpu.FragmentedArray.splat(voted, (), is_signed=True)

    return vote(*arrays) > 0


def unknown_zero(exact):
    """Return 0, made of a flag that is 0 or 1, as a value unknown to the compiler.

    Added to an index of shared memory it keeps the compiler from computing all addresses ahead of the loops, for which
    there are no registers.
    """
    return jnp.right_shift(exact, 1)


def when(exact, action):
    """Act in an exact chunk; `exact` is a traced scalar, or None in code that only ever meets bounded chunks.

    The code for exact chunks needs many registers, and what it makes the compiler spill would slow all chunks down. The
    kernels therefore have their loops twice: with `exact` None, and with both kinds of chunk.
    """
    if exact is not None:
        pl.when(exact)(action)


def unless(exact, action):
    """Act in a bounded chunk; see `when`."""
    if exact is None:
        action()
    else:
        pl.when(jnp.logical_not(exact))(action)


def choose(exact, if_exact, if_bounded, *args):
    """Return `if_exact(*args)` or `if_bounded(*args)`; see `when`."""
    return if_bounded(*args) if exact is None else lax.cond(exact, if_exact, if_bounded, *args)


def clamp_log_decay(refs):
    """Replace -inf in tiles of log decays by a finite number that means the same."""
    for ref in refs:
        ref[...] = jnp.maximum(load(ref), LEAST_LOG_DECAY).astype(BF16)
    plgpu.commit_smem()


def exact_scores(tables, first, tiles, scale, buffers):
    """Return A [C, C] in float32 by levels.

    A level pairs the second half of every block with its first half. So one tile does for both operands: gated queries
    in the rows of second halves, gated keys in those of first halves.

    Args:
        tables: LEVEL_TABLES in global memory.
        first: where the levels start there: 0, by `unknown_zero`, or addresses for the rare exact chunk would take
            registers that all others need.
        tiles: (q, k, [g...]) of each slab, with one or two terms of g.
        scale: of the query.
        buffers: tiles to work in, one and one more for each slab.
    """
    w, *gated = buffers
    raw = functools.partial(plgpu.load, layout=WGMMA, optimized=False)
    table = lambda which, number: raw(tables.at[which, first + number])
    row = plgpu.broadcasted_iota(jnp.int32, (CHUNK, SLAB), 0, layout=WGMMA)

    def level(number, carry):
        scores, sums = carry
        w[...] = sums
        plgpu.commit_smem()
        mask, next_sums = table(1, number), table(0, jnp.minimum(number + 1, LEVELS - 1))  # slow, so asked for early
        second = jnp.bitwise_and(jnp.right_shift(row, number - 1), 1) > 0
        for (q, k, g), x in zip(tiles, gated, strict=True):
            exponents = matmul(*((w, term) for term in g))
            x[...] = (jnp.where(second, raw(q), raw(k)).astype(F32) * jnp.exp(exponents)).astype(BF16)
        plgpu.commit_smem()
        product = matmul(*((x, x.T) for x in gated))
        return jnp.where(mask.astype(F32) > 0, product, scores), next_sums

    diagonal, sums = table(1, 0), table(0, 1)
    scores = jnp.where(diagonal.astype(F32) > 0, matmul(*((q, k.T) for q, k, _ in tiles)), 0.0)
    return scale * lax.fori_loop(1, LEVELS, level, (scores, sums))[0]


def exact_gradient(tables, first, masked, q, k, g, scale, buffers, *, of_query, product=None):
    """Return one side of the gradient of the scores by levels, d q or d k, and its product with q_l or k_l.

    The products of the two sides cancel in the gradient of g but for rounding: both multiply the rounded operands.
    Those of the diagonal cancel whole, and are left out: where gates are strong, all else is far smaller.

    Args:
        tables: LEVEL_TABLES in global memory.
        first: where the levels start there: 0, by `unknown_zero`, or addresses for the rare exact chunk would take
            registers that all others need.
        masked: M = tril(do v^T), a tile.
        q, k, g: tiles; g a list of terms.
        scale: of the query.
        buffers: two tiles to work in.
        of_query: which side.
        product: what to add the product to.
    """
    left, other = buffers

    def level(number, carry):
        gradient, product = carry
        left[...] = plgpu.load(tables.at[0, first + number], layout=WGMMA, optimized=False)
        plgpu.commit_smem()
        decay = jnp.exp(matmul(*((left, term) for term in g)))
        left[...] = jnp.where(load(tables.at[1, first + number]) > 0, load(masked), 0.0).astype(BF16)
        mine, theirs = (q, k) if of_query else (k, q)
        my_factor, their_factor = (decay * scale, decay) if of_query else (decay, decay * scale)
        other[...] = (load(theirs) * their_factor).astype(BF16)
        plgpu.commit_smem()
        x = matmul((left if of_query else left.T, other))
        rounded = (load(mine) * my_factor).astype(BF16).astype(F32)
        return gradient + my_factor * x, product + jnp.where(number > 0, rounded * x, 0.0)

    nothing = zeros((CHUNK, SLAB))
    return lax.fori_loop(0, LEVELS, level, (nothing, nothing if product is None else product))


def zeros(shape):
    """Return float32 zeros in registers."""
    return plgpu.layout_cast(jnp.zeros(shape, F32), WGMMA)


def decay_source(ref, row, n, head, heads, slab):
    """Return the tile of log decays of one chunk and slab; a size that does not match is 1, or constant along the axis.

    Args:
        ref: [B or 1, T or C, H or fewer, K or SLAB] in global memory.
        row, n, head, slab: which batch row, chunk, query head, slab.
        heads: H.
    """
    rows, time, decay_heads, channels = ref.shape
    return ref.at[
        row if rows > 1 else 0,
        pl.ds(0 if time == CHUNK else n * CHUNK, CHUNK),
        lax.div(head, heads // decay_heads),
        pl.ds(slab * SLAB if channels > SLAB else 0, SLAB),
    ]
