"""The parallel part of the backward pass on Hopper, from states of every fourth chunk.

A cluster of two thread blocks takes a group of four chunks and 128 key channels, block p = 0 the first two chunks and
p = 1 the last two. The algebra of two chunks is that of `mosaic_gpu_backward_inputs`, with R_0 = e^{G_m} S from S at
their start and dU_1 = e^{G_last - G_m} dS from dS at their end. Of a group, only S at its start and dS at its end go
through memory. Both blocks read both, and each makes the one that it lacks, slab by slab of value columns, in place of
the one that it does not use. With q~, k~ and a = e^{G_last} of `prepare`,

    p = 0    dS after chunk 1  = a_2 a_3 dS + q~_2^T do_2 + a_2 q~_3^T do_3
    p = 1    S before chunk 2  = a_0 a_1 S  + a_1 k~_0^T v_0 + k~_1^T v_1

No exponent in these is positive, so exact chunks in the other half of a group do no harm.

Two warpgroups each take 64 channels of both chunks and hold everything transposed, [channels, tokens], so that a decay
is a number a row, a sum over tokens stays within four lanes, and a state that was just made is the left operand of its
product from registers. The two have no value to exchange but M: until their sums over the value columns are complete
neither waits for the other. The third warpgroup copies, and sums M of the second chunk and most of M_00: the rest of
its rows go to the other two, as that is what registers allow. What streams passes through two stages of shared memory;
then one stage holds queries and keys, and what is computed goes where room is.

All this is for bounded chunks. A pair that has an exact chunk gets a wrong result here, and `backward_pairs` replaces
it.
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
    ROW,
    SHIFTED,
    SLAB,
    UP_TO_HERE,
    WGMMA,
    add_matmul,
    along_rows,
    barrier,
    begin_apart,
    constants,
    decay_source,
    first_columns,
    kernel,
    left_operand,
    load,
    matmul,
    result,
    set_registers,
    tile,
    zero_row,
)

_REGISTERS, _FEWER_REGISTERS = 192, 120  # a thread of the first two warpgroups and of the third, 3 x 168 in all
_STAGES, _TILES = 2, 10  # stages of shared memory, tiles of each
_BESIDE = _STAGES * _TILES  # the first tile after the stages
_AHEAD = 2  # value columns from what is fetched to what is asked of the memory
_SLABS = 2  # of channels in a thread block
# The first tiles of what is where, by slab and chunk unless said otherwise.
# A stage of value columns: v of chunks 0 and 1 and d_out of 2 and 3 of the group, which both blocks read; what one
# alone reads, d_out of 0 and 1 or v of 2 and 3; S and dS.
_V01, _DO23, _OWN, _S, _DS = 0, 2, 4, 6, 8
# After these, one stage holds q, k and the log decays of the first chunk, one W, dk, M_10 and M_11.
_Q, _K, _G0 = 0, 4, 8
_W, _DK, _M1 = 0, 4, 8
# Beside the stages: gated tiles, and once they are used two tables and M_00; log decays of the second chunk, a table.
_GATED, _TO_HERE, _BEFORE, _M0, _G1, _SHIFTED = 0, 0, 1, 2, 4, 6
_M0_ROWS, _M0_MORE = 48, 8  # of M_00: those of the third warpgroup, and of each of the others after them
_TO_MIDDLE, _FROM_MIDDLE = range(2)  # the decays over the halves of a chunk


def serves_quads(q, g):
    """Return whether `backward_quads` serves such arrays."""
    return q.shape[-1] % (_SLABS * SLAB) == 0 and len(g) == 1


def backward_quads(
    q, k, v, g, d_out, states, d_states, gated_q, gated_k, decay, exact, *, scale, interpret=False
):  # fmt: skip
    """Compute the gradients of q, k and g, all groups of four chunks at once.

    Args:
        q, k, v, g: as in `forward`; see `serves_quads`.
        d_out: [B, T, H, V] bfloat16.
        states, d_states: [B, H, ceil(N / 4), K, V] bfloat16, S before chunks 0, 4... and dS after chunks 3, 7... and
            the last.
        gated_q, gated_k, decay, exact: what `prepare` returns.
        scale: of the query.
        interpret: run in the interpreter.

    Returns:
        dq, dk, dg: a head of the query each, [B, T, H, K] bfloat16.
    """
    batch, time, heads, key_dim = q.shape
    value_dim, group = v.shape[-1], heads // k.shape[2]
    chunks, key_tiles, value_tiles = pl.cdiv(time, CHUNK), key_dim // (_SLABS * SLAB), value_dim // SLAB
    groups = pl.cdiv(chunks, 4)
    share = 1 if interpret else 2  # blocks of a cluster
    at_once = MULTIPROCESSORS // 2  # clusters
    # the stage that follows that of the last value columns, `last`
    of_keys, last = value_tiles % _STAGES, (value_tiles - 1) % _STAGES
    log_scale = math.log2(scale)

    def redo(results):
        arrays = (q, k, v, g, d_out, states, d_states, exact, results, (gated_q, gated_k, decay))
        return backward_pairs(*arrays, scale=scale, at_edges=True, interpret=interpret)

    def body(
        q_ref, k_ref, v_ref, d_out_ref, states_ref, d_states_ref, select_ref, triangles_ref, g_ref,
        gated_q_ref, gated_k_ref, decay_ref,
        dq_ref, dk_ref, dg_ref,
        buffer_s, select_s, a_s, decays_s, gains_s, place_s,
        gated_full, tables_full, constants_full, keys_full, full, free, spent, streamed, m_ready, done,
    ):  # fmt: skip
        row, head, pair, block = (lax.axis_index(a) for a in "bhnk")
        group_index, p = (pair, lax.axis_index("c")) if share > 1 else (lax.div(pair, 2), lax.rem(pair, 2))
        pair = 2 * group_index + p
        others = 4 * group_index + 2 * (1 - p)  # the first of the two chunks that the other block does
        part = lambda first, count=1: buffer_s.at[pl.ds(first * CHUNK, count * CHUNK)]
        beside = lambda first, count=1: part(_BESIDE + first, count)
        to_here_s, before_s, shift_s = (beside(i) for i in (_TO_HERE, _BEFORE, _SHIFTED))
        warpgroup = lax.axis_index("warpgroup")
        shared = "c" if share > 1 else None
        kv_head = lax.div(head, group)
        channels = lambda s: pl.ds((block * _SLABS + s) * SLAB, SLAB)
        tiles = lambda stage, first, count=1: part(stage * _TILES + first, count)
        at = lambda stage, first, s, c: tiles(stage, first + 2 * s + c)
        rows = lambda stage, first, start, count: buffer_s.at[pl.ds((stage * _TILES + first) * CHUNK + start, count)]
        m_at = lambda index: part(jnp.where(index == 0, _BESIDE + _M0, last * _TILES + _M1 + index - 1))
        g_at = lambda s, c: part(jnp.where(c == 0, of_keys * _TILES + _G0, _BESIDE + _G1) + s)
        gated_at = lambda c, s: beside(_GATED + 2 * s + c)

        # The first tiles in a stage of what each block uses in its own way: d_out, v of its own chunks; what the state
        # that it lacks is made from; its d_out and v again, by the state that they meet; the two states.
        own_d_out, own_v, d_out_or_v = _OWN - 2 * p, _V01 + 4 * p, _DO23 - 2 * p
        with_saved, with_made = _OWN, _V01 + 2 * p
        saved, lacked = _S + 2 * p, _DS - 2 * p

        def sync(barrier_ref):
            plgpu.barrier_arrive(barrier_ref)
            plgpu.barrier_wait(barrier_ref)

        def copy_tables():
            """Fetch what is needed after the stream and has room from the start."""
            plgpu.copy_gmem_to_smem(triangles_ref.at[SHIFTED], shift_s, tables_full)
            plgpu.copy_gmem_to_smem(select_ref, select_s, tables_full)
            copy_gates(1, tables_full)

        def copy_constants():
            for index, table in ((UP_TO_HERE, to_here_s), (BEFORE, before_s)):
                plgpu.copy_gmem_to_smem(triangles_ref.at[index], table, constants_full)

        def copy_decays():
            for c in range(2):
                source = decay_ref.at[row, head, jnp.minimum(others + c, chunks - 1)]
                all_channels = pl.ds(block * _SLABS * SLAB, _SLABS * SLAB)
                plgpu.copy_gmem_to_smem(source.at[all_channels], a_s.at[c], gated_full)

        def copy_gated(source_ref):
            for s in range(_SLABS):
                source = source_ref.at[row, pl.ds(others * CHUNK, 2 * CHUNK), head, channels(s)]
                plgpu.copy_gmem_to_smem(source, beside(_GATED + 2 * s, 2), gated_full)
            copy_decays()

        def sources(j):
            """Return what the value columns j have for both blocks, with its place in a stage, and what for each."""
            columns = pl.ds(j * SLAB, SLAB)
            two = lambda first: pl.ds((4 * group_index + first) * CHUNK, 2 * CHUNK)
            of_v = lambda first: v_ref.at[row, two(first), kv_head].at[:, columns]
            of_d_out = lambda first: d_out_ref.at[row, two(first), head].at[:, columns]
            of_states = lambda ref: ref.at[row, head, group_index, pl.ds(block * _SLABS * SLAB, _SLABS * SLAB), columns]
            both = (of_v(0), _V01), (of_d_out(2), _DO23), (of_states(states_ref), _S), (of_states(d_states_ref), _DS)
            return both, (of_d_out(0), of_v(2))

        def copy_values(j):
            slot = lax.rem(j, _STAGES)
            copy = functools.partial(plgpu.copy_gmem_to_smem, barrier=full.at[slot])
            both, own = sources(j)
            for source, first in both:
                copy(source, tiles(slot, first, 2), collective_axes=shared)
            for index, source in enumerate(own):
                pl.when(p == index)(functools.partial(copy, source, tiles(slot, _OWN, 2)))

        def prefetch_values(j):
            """Ask the memory for value columns before there is room for them, so that they then come from the cache."""
            if interpret:
                return
            both, own = sources(j)
            for source, _ in both:
                plgpu.async_prefetch(source, collective_axes=shared)
            for index, source in enumerate(own):
                pl.when(p == index)(functools.partial(plgpu.async_prefetch, source))

        def copy_keys():
            copy = functools.partial(plgpu.copy_gmem_to_smem, barrier=keys_full)
            for s in range(_SLABS):
                two = pl.ds(2 * pair * CHUNK, 2 * CHUNK)
                copy(q_ref.at[row, two, head, channels(s)], tiles(of_keys, _Q + 2 * s, 2))
                copy(k_ref.at[row, two, kv_head, channels(s)], tiles(of_keys, _K + 2 * s, 2))
            copy_gates(0, keys_full)

        def copy_gates(c, on):
            for s in range(_SLABS):
                source = decay_source(g_ref, row, 2 * pair + c, head, heads, block * _SLABS + s)
                plgpu.copy_gmem_to_smem(source, g_at(s, c), on)

        def decay_of(c, s, layout):  # a row may end within a group
            value = plgpu.load(a_s.at[c, pl.ds(s * SLAB, SLAB)], layout=layout, optimized=False)
            return jnp.where(others + c < chunks, value, 1.0)

        def prepare_rebuilding(s):
            """Give the gated tile that is further away the decay of the nearer chunk; return that of both chunks."""
            plgpu.barrier_wait(gated_full)
            far = gated_at(1 - p, s)
            decay = lax.broadcast_in_dim(decay_of(p, s, COL), (CHUNK, SLAB), [1])
            far[...] = (load(far) * decay).astype(BF16)
            plgpu.commit_smem()
            return decay_of(0, s, ROW) * decay_of(1, s, ROW)

        def stream(s):
            """Sum over the value columns; put W, rounded, in shared memory, and return Z of both chunks and s."""
            decays_s.at[s, 0, 0][...] = prepare_rebuilding(s)  # in registers it would be spilled, as would `place_s`
            first_row = _M0_ROWS + _M0_MORE * s

            def accumulate(of_saved, of_made, m0):
                def one(j, dot):
                    slot = lax.rem(j, _STAGES)
                    plgpu.barrier_wait(full.at[slot])
                    used, target = tiles(slot, saved + s), tiles(slot, lacked + s)
                    made = matmul(*((gated_at(x, s).T, tiles(slot, d_out_or_v + x)) for x in range(2)))
                    plgpu.wgmma(of_saved, used, tiles(slot, with_saved, 2).T)
                    plgpu.wgmma(m0, tiles(slot, own_v), rows(slot, own_d_out, first_row, _M0_MORE).T)
                    made += load(target) * along_rows(decay_at(s, 0, 0), (SLAB, SLAB))
                    made = lax.optimization_barrier(made.astype(BF16))  # rounded once, for both uses
                    plgpu.wgmma(of_made, left_operand(made, target, interpret), tiles(slot, with_made, 2).T)
                    dot += jnp.sum(load(used) * made.astype(F32), axis=1)
                    plgpu.wgmma_wait(0)
                    plgpu.commit_smem()  # for the other warps: a barrier of a cluster does not wait for them
                    plgpu.barrier_arrive(free.at[slot])
                    pl.when(j == value_tiles - 1)(lambda: plgpu.barrier_arrive(spent))
                    return dot

                dot = lax.fori_loop(0, value_tiles, one, zero_row())
                return of_saved[...], of_made[...], m0[...], dot

            accumulator = lambda columns: plgpu.ACC((SLAB, columns), F32)
            sums = pl.run_scoped(accumulate, accumulator(2 * CHUNK), accumulator(2 * CHUNK), accumulator(_M0_MORE))
            *sums, m0, dot = lax.optimization_barrier(sums)
            of_saved, of_made = ((x[:, :CHUNK], x[:, CHUNK:]) for x in sums)
            sync(streamed)  # no warpgroup reads what streamed any more
            put_m0(m0, first_row)

            def put_w(w):
                for c in range(2):
                    at(last, _W, s, c).T[...] = w[c].astype(BF16)

            pl.when(p == 0)(lambda: put_w(of_made))
            pl.when(p == 1)(lambda: put_w(of_saved))
            return lax.cond(p == 0, lambda: of_saved, lambda: of_made), dot

        def put_m0(x, first):
            """Write rows of M_00, lower triangular, from registers [C, rows]."""
            iota = lambda axis: plgpu.broadcasted_iota(jnp.int32, x.shape, axis, layout=WGMMA)
            x = jnp.where(iota(0) <= iota(1) + first, x, 0.0).astype(BF16)
            rows(_STAGES, _M0, first, x.shape[1]).T[...] = x

        def gate(s):
            """Make q' and k' of both chunks, and the decays over their halves."""
            g_tiles = [g_at(s, c) for c in range(2)]

            def products(*accumulators):
                for c, g_tile in enumerate(g_tiles):
                    plgpu.wgmma(accumulators[c], g_tile.T, select_s.T)
                    plgpu.wgmma(accumulators[2 + c], g_tile.T, shift_s.T)
                return tuple(x[...] for x in accumulators)

            accumulators = [plgpu.ACC((SLAB, 8), F32)] * 2 + [plgpu.ACC((SLAB, CHUNK), F32)] * 2
            sums = lax.optimization_barrier(pl.run_scoped(products, *accumulators))
            for c in range(2):
                for index, x in enumerate(first_columns(sums[c])):
                    decays_s.at[s, c, index][...] = jnp.exp(x)
                d = sums[2 + c] * LOG2_E
                q_tile, k_tile = at(of_keys, _Q, s, c), at(of_keys, _K, s, c)
                q_tile.T[...] = (load(q_tile.T) * jnp.exp2(d + log_scale)).astype(BF16)
                k_tile.T[...] = (load(k_tile.T) * jnp.exp2(-d)).astype(BF16)

        def work():
            set_registers(_REGISTERS, interpret)
            s = warpgroup
            z, dot = stream(s)
            plgpu.barrier_wait(tables_full)
            plgpu.barrier_wait(keys_full)
            gate(s)
            plgpu.commit_smem()
            sync(m_ready)
            zs = cross(s, z, dot)
            plgpu.barrier_wait(constants_full)

            def one_chunk(c, z):  # one code for both: with a copy for each more is spilled
                finish(s, c, z)
                return zs[1]

            lax.fori_loop(0, 2, one_chunk, zs[0])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        def decay_at(s, c, index):
            return plgpu.load(decays_s.at[s, c, index], layout=ROW, optimized=False)

        def scaled(x, factor):
            return x * along_rows(factor, (SLAB, CHUNK))

        def cross(s, z, dot):
            """Add to Z and W what goes from one chunk to the other; return Z, and what dg gains, of both chunks."""
            q_tile, k_tile, w_tile = at(of_keys, _Q, s, 1), at(of_keys, _K, s, 0), at(last, _W, s, 0)
            from_start, to_end = decay_at(s, 0, _TO_MIDDLE), decay_at(s, 1, _FROM_MIDDLE)
            between = decay_at(s, 0, _FROM_MIDDLE) * decay_at(s, 1, _TO_MIDDLE)
            w = scaled(load(w_tile.T), to_end)
            of_k = jnp.sum(load(k_tile.T) * w, axis=1)
            x = scaled(z[1], from_start)
            of_q = jnp.sum(load(q_tile.T) * x, axis=1)

            def products(of_w, of_x):
                plgpu.wgmma(of_w, q_tile.T, m_at(1))
                plgpu.wgmma(of_x, k_tile.T, m_at(1).T)
                return of_w[...], of_x[...]

            accumulator = plgpu.ACC((SLAB, CHUNK), F32)
            of_w, of_x = lax.optimization_barrier(pl.run_scoped(products, accumulator, accumulator))
            w_tile.T[...] = scaled(w + of_w, between).astype(BF16)
            x = scaled(x + of_x, between)
            constant = dot * from_start * to_end
            for c, of_other in enumerate((of_q, of_k)):
                gains_s.at[s, c][...] = between * (constant + of_other)
            return scaled(z[0], from_start), x

        def finish(s, c, z):
            """Compute the gradients of a chunk and slab from Z and what is in shared memory."""
            q_tile, k_tile, w_tile = at(of_keys, _Q, s, c), at(of_keys, _K, s, c), at(last, _W, s, c)
            g_tile, m_tile = g_at(s, c), m_at(2 * c)
            of_row, of_head, of_pair = (place_s[i] for i in range(3))

            def put(x, target, out_ref):
                target.T[...] = x.astype(BF16)
                plgpu.commit_smem()
                tokens = pl.ds((2 * of_pair + c) * CHUNK, CHUNK)
                plgpu.copy_smem_to_gmem(target, out_ref.at[of_row, tokens, of_head, channels(s)])

            def products(d, y):
                plgpu.wgmma(d, g_tile.T, shift_s.T)
                plgpu.wgmma(y, q_tile.T, m_tile)
                return d[...], y[...]

            accumulator = plgpu.ACC((SLAB, CHUNK), F32)
            d, y = lax.optimization_barrier(pl.run_scoped(products, accumulator, accumulator))
            d = d * LOG2_E
            x = add_matmul(z, (k_tile.T, m_tile.T), interpret=interpret)
            # of dg the products of both sides, whose large parts cancel: they take two terms
            product = load(q_tile.T) * x
            put(x * jnp.exp2(d + log_scale), q_tile, dq_ref)
            product -= load(k_tile.T) * y
            # made twice, as there are no registers to keep it in while dk is made
            w = lambda: scaled(load(w_tile.T), jnp.where(c == 0, 1.0, decay_at(s, 1, _FROM_MIDDLE)))
            put((y + w()) * jnp.exp2(-d), at(last, _DK, s, c), dk_ref)
            of_k = lax.optimization_barrier((load(k_tile.T) * w()).astype(BF16))
            high = lax.optimization_barrier(product.astype(BF16))
            low = (product - high.astype(F32)).astype(BF16)
            terms = zip((high, low, of_k), (w_tile, g_tile, k_tile), strict=True)
            high, low, of_k = (left_operand(*term, interpret) for term in terms)
            dg = matmul((high, to_here_s), (low, to_here_s), (of_k, before_s.T))
            gain = plgpu.load(gains_s.at[s, c], layout=ROW, optimized=False)
            put(dg + along_rows(gain, (SLAB, CHUNK)), g_tile, dg_ref)

        @pl.when(warpgroup == 2)
        def _copy_and_sum_m():
            set_registers(_FEWER_REGISTERS, interpret)
            number = block + key_tiles * (group_index + groups * (head + heads * row))
            clusters = batch * heads * groups * key_tiles
            begin_apart(number, clusters, at_once=at_once, groups=8, clocks=5600, interpret=interpret)
            for i, index in enumerate((row, head, pair)):
                place_s[i] = index
            pl.when(p == 0)(lambda: copy_gated(gated_q_ref))
            pl.when(p == 1)(lambda: copy_gated(gated_k_ref))

            def constants_when_spent():
                plgpu.barrier_wait(spent)
                copy_constants()

            def fill(j):
                pl.when(j < value_tiles)(lambda: copy_values(j))
                pl.when(j + _AHEAD < value_tiles)(lambda: prefetch_values(j + _AHEAD))
                pl.when(j == 1)(copy_tables)
                pl.when(j == value_tiles)(copy_keys)
                pl.when(j == value_tiles + 1)(constants_when_spent)

            lax.fori_loop(0, _STAGES, lambda j, _: fill(j), None)

            def accumulate(m0, m1):
                def one(j, _):
                    slot = lax.rem(j, _STAGES)
                    plgpu.barrier_wait(full.at[slot])
                    plgpu.wgmma(m0, tiles(slot, own_v), rows(slot, own_d_out, 0, _M0_ROWS).T)
                    plgpu.wgmma(m1, tiles(slot, own_d_out + 1), tiles(slot, own_v, 2).T)
                    plgpu.wgmma_wait(0)
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(free.at[slot])
                    pl.when(j == value_tiles - 1)(lambda: plgpu.barrier_arrive(streamed))
                    plgpu.barrier_wait(free.at[slot])
                    fill(j + _STAGES)

                lax.fori_loop(0, value_tiles, one, None)
                return m0[...], m1[...]

            accumulators = plgpu.ACC((CHUNK, _M0_ROWS), F32), plgpu.ACC((CHUNK, 2 * CHUNK), F32)
            m0, m1 = lax.optimization_barrier(pl.run_scoped(accumulate, *accumulators))
            put_m0(m0, 0)
            m_at(1)[...] = m1[:, :CHUNK].astype(BF16)
            iota = lambda axis: plgpu.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), axis, layout=WGMMA)
            m_at(2)[...] = jnp.where(iota(0) >= iota(1), m1[:, CHUNK:], 0.0).astype(BF16)
            plgpu.commit_smem()
            plgpu.barrier_arrive(m_ready)

        pl.when(warpgroup < 2)(work)
        sync(done)  # no warpgroup leaves while another still issues matrix products

    free = barrier(3, _STAGES)
    if share > 1:
        free = plgpu.ClusterBarrier(collective_axes=("c",), num_arrivals=3, num_barriers=_STAGES)
    cluster = {"cluster": (share,), "cluster_names": ("c",)} if share > 1 else {}
    run = kernel(
        body,
        name="gla_backward_quads",
        interpret=interpret,
        replace=redo,
        out_type=[result(q.shape, BF16, q)] * 3,
        grid=(batch, heads, 2 * groups // share, key_tiles),
        grid_names=tuple("bhnk"),  # the last runs fastest: blocks that read the same v and d_out
        scratch_types=[
            tile((_BESIDE + 7) * CHUNK, SLAB),  # one buffer, so that the chunk may choose between places in it
            tile(8, CHUNK),
            plgpu.SMEM((2, _SLABS * SLAB), F32),  # a_s
            plgpu.SMEM((_SLABS, 2, 2, SLAB), F32),  # decays_s
            plgpu.SMEM((_SLABS, 2, SLAB), F32),  # gains_s
            plgpu.SMEM((3,), jnp.int32),  # place_s
            barrier(4),  # gated_full
            barrier(2 + _SLABS),  # tables_full
            barrier(2),  # constants_full
            barrier(6),  # keys_full
            barrier(5, _STAGES),  # full
            free,
            barrier(2),  # spent
            barrier(3),  # streamed
            barrier(3),  # m_ready
            barrier(3),  # done
        ],
        **cluster,
    )
    select, triangles, _ = constants()
    return run(q, k, v, d_out, states, d_states, select, triangles, g[0], gated_q, gated_k, decay)
