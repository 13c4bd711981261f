"""The parallel part of the backward pass of 128 key channels on Hopper; its algebra is in `mosaic_gpu_backward_sweep`.

One thread block per pair of chunks. Of a pair, only R of its first chunk and dU of its second go
through memory. With b the decay from U of the first chunk to R of the second, M_10 = do_1 v_0^T, and products of the
first chunk's R and the second's dU alone,

    Z = do R_0^T,   W = v dU_1^T,   s = sum over V of R_0 dU_1,
    X_0 = Z_0 + M_00 k_0',                      r_0 = b (s + sum over t of q_1' Z_1),
    X_1 = b (Z_1 + M_10 k_0') + M_11 k_1',      r_1 = b (s + sum over t of k_0' W_0),
    Y_0 = b (W_0 + M_10^T q_1'),                Y_1 = W_1,

dq = scale e^D X, dk = e^-D (Y + M^T q'), and dg of a chunk is r plus sums over its tokens of q' X, k' Y and k' M^T q'.

Each of four warpgroups takes one chunk and 64 of the channels. The value columns stream through three stages of shared
memory, then queries and keys, then the log decays; what was in a stage makes room for what is computed.

All this is for bounded chunks. A pair that has an exact chunk gets a wrong result here, and `backward_pairs` replaces
it: code for exact chunks in this kernel would cost it registers that it does not have.
"""

import functools
import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gated_linear_attention.block_sizes import MULTIPROCESSORS
from pallas_kernels.gated_linear_attention.mosaic_gpu_backward_pairs import backward_pairs
from pallas_kernels.gated_linear_attention.mosaic_gpu_chunk import (
    BEFORE,
    BF16,
    CHUNK,
    COL,
    F32,
    LOG2_E,
    SHIFTED,
    SLAB,
    UP_TO_HERE,
    add_matmul,
    barrier,
    begin_apart,
    constants,
    decay_source,
    first_columns,
    halves,
    kernel,
    load,
    matmul,
    put_split,
    result,
    tile,
    zero_row,
)

_STAGES, _TILES = 3, 8  # stages of shared memory, tiles of each
_SLABS = 2  # of channels in a thread block
# The first tiles of what a stage holds. Of value columns: d_out and v by chunk, R and dU by slab.
_D_OUT, _V, _R, _DU = 0, 2, 4, 6
# After the last of these, one stage holds q and k, one g and M_00, M_10, M_11, one two tiles of each warpgroup to use.
_Q, _K = 0, 4
_G, _M = 0, 4
_A, _B = 0, 4
_TO_MIDDLE, _FROM_MIDDLE = range(2)  # the decays over the halves of a chunk


def backward_inputs(q, k, v, g, d_out, states, d_states, exact, *, scale, interpret=False):
    """Compute the gradients of q, k and g, all pairs of chunks at once.

    Args:
        q, k, v, g: as in `forward`.
        d_out: [B, T, H, V] bfloat16.
        states, d_states: [B, H, ceil(N / 2), K, V] bfloat16, R of even and dU of odd chunks.
        exact: [B, H, N] int32, whether a chunk is exact.
        scale: of the query.
        interpret: run in the interpreter.

    Returns:
        dq, dk, dg: a head of the query each, [B, T, H, K] bfloat16.
    """
    arrays = q, k, v, g, d_out, states, d_states
    exactly = functools.partial(backward_pairs, *arrays, exact, scale=scale, at_edges=False, interpret=interpret)
    if q.shape[-1] != _SLABS * SLAB or len(g) > 1:
        return exactly()
    return _bounded(*arrays, redo=exactly, scale=scale, interpret=interpret)


def _bounded(q, k, v, g, d_out, states, d_states, *, redo, scale, interpret):
    """Compute the gradients as if all chunks were bounded, and `redo` those that are not."""
    batch, time, heads, _ = q.shape
    group = heads // k.shape[2]
    chunks, value_tiles = pl.cdiv(time, CHUNK), v.shape[-1] // SLAB
    # the stages that follow that of the last value columns, `last`
    of_keys, of_gates, last = (i % _STAGES for i in (value_tiles, value_tiles + 1, value_tiles - 1))
    log_scale = math.log2(scale)

    def body(
        q_ref, k_ref, v_ref, d_out_ref, states_ref, d_states_ref, select_ref, triangles_ref, g_ref,
        dq_ref, dk_ref, dg_ref,
        stages_s, shift_s, to_here_s, before_s, select_s, decays_s, dot_s, sums_s, zero_s,
        constants_full, gates_full, full, free, streamed, gated, crossed, done,
    ):  # fmt: skip
        pair, head, row = (lax.axis_index(a) for a in "nhb")
        warpgroup = lax.axis_index("warpgroup")
        kv_head = lax.div(head, group)
        tokens = lambda c: pl.ds((2 * pair + c) * CHUNK, CHUNK)
        channels = lambda s: pl.ds(s * SLAB, SLAB)
        both = pl.ds(2 * pair * CHUNK, 2 * CHUNK)  # tokens of the pair
        each = [(s, c) for s in range(_SLABS) for c in range(2)]
        tiles = lambda stage, first, count=1: stages_s.at[stage, pl.ds(first * CHUNK, count * CHUNK)]

        def sync(barrier_ref):
            plgpu.barrier_arrive(barrier_ref)
            plgpu.barrier_wait(barrier_ref)

        def copy_constants():
            for index, table in ((SHIFTED, shift_s), (UP_TO_HERE, to_here_s), (BEFORE, before_s)):
                plgpu.copy_gmem_to_smem(triangles_ref.at[index], table, constants_full)
            plgpu.copy_gmem_to_smem(select_ref, select_s, constants_full)

        def copy_values(j):
            slot, columns = lax.rem(j, _STAGES), pl.ds(j * SLAB, SLAB)
            copy = functools.partial(plgpu.copy_gmem_to_smem, barrier=full.at[slot])
            copy(d_out_ref.at[row, both, head].at[:, columns], tiles(slot, _D_OUT, 2))
            copy(v_ref.at[row, both, kv_head].at[:, columns], tiles(slot, _V, 2))
            copy(states_ref.at[row, head, pair, :, columns], tiles(slot, _R, _SLABS))
            copy(d_states_ref.at[row, head, pair, :, columns], tiles(slot, _DU, _SLABS))

        def copy_keys():
            copy = functools.partial(plgpu.copy_gmem_to_smem, barrier=full.at[of_keys])
            for s in range(_SLABS):
                copy(q_ref.at[row, both, head, channels(s)], tiles(of_keys, _Q + 2 * s, 2))
                copy(k_ref.at[row, both, kv_head, channels(s)], tiles(of_keys, _K + 2 * s, 2))

        def copy_gates():
            for s, c in each:
                source = decay_source(g_ref, row, 2 * pair + c, head, heads, s)
                plgpu.copy_gmem_to_smem(source, tiles(of_gates, _G + 2 * s + c), gates_full)

        def fill(j):
            """Fetch what stage `j` of all holds."""
            pl.when(j < value_tiles)(lambda: copy_values(j))
            pl.when(j == value_tiles)(copy_keys)
            pl.when(j == value_tiles + 1)(copy_gates)

        def stream(s, c):
            """Sum the products over the value columns: M of the two chunks that are this warpgroup's, Z, W, and s."""
            other = 0 if c == 0 else s

            def accumulate(m, z, w):
                def one(j, total):
                    slot = lax.rem(j, _STAGES)
                    of = lambda index: tiles(slot, index)
                    plgpu.barrier_wait(full.at[slot])
                    plgpu.wgmma(m, of(_D_OUT + c), of(_V + other).T)
                    plgpu.wgmma(z, of(_D_OUT + c), of(_R + s).T)
                    plgpu.wgmma(w, of(_V + c), of(_DU + s).T)
                    if c == 0:
                        total += jnp.sum(load(of(_R + s)) * load(of(_DU + s)), axis=1)
                    plgpu.wgmma_wait(0)
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(free.at[slot])

                    def refill():
                        plgpu.barrier_wait(free.at[slot])
                        fill(j + _STAGES)

                    if c == 1:
                        pl.when(s == 0)(refill)
                    return total

                total = lax.fori_loop(0, value_tiles, one, zero_row() if c == 0 else None)
                return m[...], z[...], w[...], total

            return lax.optimization_barrier(pl.run_scoped(accumulate, *[plgpu.ACC((CHUNK, SLAB), F32)] * 3))

        def work(c):
            s = lax.div(warpgroup, 2)

            def places(zero):
                """Return the tiles of g, q and k, the other chunk's q and k, two to use, and M by number.

                A zero unknown to the compiler has it compute the addresses anew: kept, they would be spilled.
                """
                at = lambda stage, first, c: tiles(stage + zero, first + 2 * s + c)
                keys = (at(of_keys, x, d) for d in (c, 1 - c) for x in (_Q, _K))
                to_use = (at(last, x, c) for x in (_A, _B))
                return at(of_gates, _G, c), *keys, *to_use, lambda index: tiles(of_gates + zero, _M + index)

            g_tile, q_tile, k_tile, other_q, other_k, a_tile, b_tile, m_at = places(0)
            exponents = lambda: matmul((shift_s, g_tile)) * LOG2_E
            column = lambda ref: plgpu.load(ref, layout=COL, optimized=False)
            spread = lambda x: lax.broadcast_in_dim(x, (CHUNK, SLAB), [1])
            between = lambda: column(decays_s.at[s, 0, _FROM_MIDDLE]) * column(decays_s.at[s, 1, _TO_MIDDLE])

            def put_sums(x, of_chunk):
                """Write the sums over tokens by a product: reductions of two warpgroups would share their memory."""
                a_tile[...] = x.astype(BF16)
                plgpu.commit_smem()
                first, second = halves([a_tile], select_s)
                sums_s.at[s, of_chunk][...] = first + second

            def put(x, target, out_ref):
                target[...] = x.astype(BF16)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(target, out_ref.at[row, tokens(c), head, channels(s)])

            # M goes to shared memory, and so does W, rounded: its registers are needed
            m, z, w, total = stream(s, c)
            plgpu.barrier_wait(constants_full)
            plgpu.barrier_wait(gates_full)
            if c == 0:
                dot_s.at[s][...] = total
                lower = jnp.where(load(to_here_s) > 0, m, 0.0).astype(BF16)

                @pl.when(s == 0)
                def _put():
                    m_at(0)[...] = lower

            else:
                seen = load(to_here_s) + (1 - s).astype(F32) > 0  # all of the first chunk
                m_at(1 + s)[...] = jnp.where(seen, m, 0.0).astype(BF16)
            sync(streamed)
            b_tile[...] = w.astype(BF16)

            # q', k' and the decays
            def products(halves_of_g, d):
                plgpu.wgmma(halves_of_g, g_tile.T, select_s.T)
                plgpu.wgmma(d, shift_s, g_tile)
                return halves_of_g[...], d[...]

            accumulators = plgpu.ACC((SLAB, 8), F32), plgpu.ACC((CHUNK, SLAB), F32)
            halves_of_g, d = lax.optimization_barrier(pl.run_scoped(products, *accumulators))
            for index, x in enumerate(first_columns(halves_of_g)):
                decays_s.at[s, c, index][...] = jnp.exp(x)
            d = d * LOG2_E
            plgpu.barrier_wait(full.at[of_keys])
            q_tile[...] = (load(q_tile) * jnp.exp2(d + log_scale)).astype(BF16)
            k_tile[...] = (load(k_tile) * jnp.exp2(-d)).astype(BF16)
            plgpu.commit_smem()
            sync(gated)

            # what goes from one chunk to the other
            if c == 0:
                w = load(b_tile)
                put_sums(load(k_tile) * w, 1)
                w = add_matmul(w, (m_at(1).T, other_q), interpret=interpret) * spread(between())
                b_tile[...] = w.astype(BF16)
            else:
                put_sums(load(q_tile) * z, 0)
                z = add_matmul(z, (m_at(1), other_k), interpret=interpret) * spread(between())
            plgpu.barrier_arrive(crossed.at[s])

            # dq, dk, and of dg the products of both sides, whose large parts cancel
            x = add_matmul(z, (m_at(2 * c), k_tile), interpret=interpret)
            put(x * jnp.exp2(exponents() + log_scale), a_tile, dq_ref)
            product = load(q_tile) * x
            y_m = matmul((m_at(2 * c).T, q_tile))
            product -= load(k_tile) * y_m
            plgpu.barrier_wait(crossed.at[s])  # the other chunk has read this one's q' and k'
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            g_tile, q_tile, k_tile, _, _, a_tile, b_tile, _ = places(zero_s[0])
            put_split(product, a_tile, q_tile)
            y = load(b_tile)
            b_tile[...] = (load(k_tile) * y).astype(BF16)
            put((y + y_m) * jnp.exp2(-exponents()), k_tile, dk_ref)

            dg = matmul((to_here_s.T, a_tile), (to_here_s.T, q_tile), (before_s, b_tile))
            put(dg + spread(between() * (column(dot_s.at[s]) + column(sums_s.at[s, c]))), g_tile, dg_ref)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            sync(done)  # no warpgroup leaves while another still issues matrix products

        @pl.when(warpgroup == 1)
        def _first():
            zero_s[0] = jnp.int32(0)
            number = row + batch * (head + heads * pair)
            pairs = batch * heads * chunks // 2
            begin_apart(number, pairs, at_once=MULTIPROCESSORS, groups=6, clocks=4800, interpret=interpret)
            fill(0)
            copy_constants()
            for j in range(1, _STAGES):
                fill(j)

        for c in range(2):
            pl.when(lax.rem(warpgroup, 2) == c)(functools.partial(work, c))

    run = kernel(
        body,
        name="gla_backward_inputs",
        interpret=interpret,
        warpgroups=4,
        replace=redo,
        out_type=[result(q.shape, BF16, q)] * 3,
        grid=(pl.cdiv(chunks, 2), heads, batch),
        grid_names=tuple("nhb"),
        scratch_types=[
            tile(_STAGES, _TILES * CHUNK, SLAB),
            *(tile(CHUNK, CHUNK) for _ in range(3)),
            tile(8, CHUNK),
            plgpu.SMEM((_SLABS, 2, 2, SLAB), F32),  # decays_s
            plgpu.SMEM((_SLABS, SLAB), F32),  # dot_s
            plgpu.SMEM((_SLABS, 2, SLAB), F32),  # sums_s
            plgpu.SMEM((1,), jnp.int32),  # zero_s
            barrier(4),  # constants_full
            barrier(2 * _SLABS),  # gates_full
            barrier(_TILES // 2, _STAGES),  # full: a copy fills two tiles
            barrier(4, _STAGES),  # free
            barrier(4),  # streamed
            barrier(4),  # gated
            barrier(2, _SLABS),  # crossed
            barrier(4),  # done
        ],
    )
    select, triangles, _ = constants()
    return run(q, k, v, d_out, states, d_states, select, triangles, g[0])
