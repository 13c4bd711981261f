"""The parallel part of the backward pass on Hopper, from states of every fourth chunk.

A cluster of two thread blocks takes a group of four chunks and 128 key channels, block p = 0 the first two chunks and
p = 1 the last two. The algebra of two chunks is that of `mosaic_gpu_backward_inputs`, with R_0 = e^{G_m} S from S at
their start and dU_1 = e^{G_last - G_m} dS from dS at their end. Of a group, only S at its start and dS at its end go
through memory. Both blocks read both, and each makes the one that it lacks, slab by slab of value columns, in place of
the one that it does not use. With q~, k~ and a = e^{G_last} of `prepare`,

    p = 0    dS after chunk 1  = a_2 a_3 dS + q~_2^T do_2 + a_2 q~_3^T do_3
    p = 1    S before chunk 2  = a_0 a_1 S  + a_1 k~_0^T v_0 + k~_1^T v_1

No exponent in these is positive, so exact chunks in the other half of a group do no harm.

One warpgroup copies. The other two, with the registers that this leaves them, each take a chunk and all 128 channels:
sums over the value columns accumulate, and in one of the two the states are made as well, while the other goes on with
the products that need none. What streams passes through two stages of shared memory; then one stage holds queries and
keys, and what is computed goes where room is. From there on both chunks run the same code: with a copy for each,
instructions come too slowly.

All this is for bounded chunks. A pair that has an exact chunk gets a wrong result here, and `backward_pairs` replaces
it; it wants states of every other chunk, and `rebuild_states` makes those that it lacks.
"""

import functools
import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gated_linear_attention.block_sizes import MULTIPROCESSORS
from pallas_kernels.gated_linear_attention.mosaic_gpu_backward_pairs import backward_pairs
from pallas_kernels.gated_linear_attention.mosaic_gpu_backward_rebuild import rebuild_states
from pallas_kernels.gated_linear_attention.mosaic_gpu_chunk import (
    BEFORE,
    BF16,
    CHUNK,
    COL,
    CONSUMER,
    F32,
    LOG2_E,
    PRODUCER,
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
    halves,
    kernel,
    load,
    matmul,
    put_split,
    result,
    set_registers,
    tile,
    zero_row,
)

_STAGES, _TILES = 2, 10  # stages of shared memory, tiles of each
_BESIDE = _STAGES * _TILES  # the first tile after the stages
_AHEAD = 2  # value columns from what is fetched to what is asked of the memory
_SLABS = 2  # of channels in a thread block
# The first tiles of what is where, by slab and chunk unless said otherwise.
# A stage of value columns: v of chunks 0 and 1 and d_out of 2 and 3 of the group, which both blocks read; what one
# alone reads, d_out of 0 and 1 or v of 2 and 3; S and dS.
_V01, _DO23, _OWN, _S, _DS = 0, 2, 4, 6, 8
# After these, one stage holds q, k and the log decays of the first chunk, one two tiles to use, M_10 and M_11.
_Q, _K, _G0 = 0, 4, 8
_A, _B, _M1 = 0, 4, 8
# Beside the stages: gated tiles, and once they are used two tables and M_00; log decays of the second chunk, a table.
_GATED, _TO_HERE, _BEFORE, _M0, _G1, _SHIFTED = 0, 0, 1, 2, 4, 6
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
        missing = rebuild_states(v, d_out, states, d_states, gated_q, gated_k, decay, exact, interpret=interpret)
        arrays = (q, k, v, g, d_out, states, d_states, exact, results, missing)
        return backward_pairs(*arrays, scale=scale, at_edges=True, interpret=interpret)

    def body(
        q_ref, k_ref, v_ref, d_out_ref, states_ref, d_states_ref, select_ref, triangles_ref, g_ref,
        gated_q_ref, gated_k_ref, decay_ref,
        dq_ref, dk_ref, dg_ref,
        buffer_s, select_s, a_s, decays_s, dot_s, sums_s,
        gated_full, tables_full, constants_full, full, free, rebuilt, spent, streamed, gated, crossed, done,
    ):  # fmt: skip
        row, head, pair, block = (lax.axis_index(a) for a in "bhnk")
        if share > 1:
            pair = 2 * pair + lax.axis_index("c")
        group_index, p = lax.div(pair, 2), lax.rem(pair, 2)
        others = 4 * group_index + 2 * (1 - p)  # the first of the two chunks that the other block does
        part = lambda first, count=1: buffer_s.at[pl.ds(first * CHUNK, count * CHUNK)]
        beside = lambda first, count=1: part(_BESIDE + first, count)
        to_here_s, before_s, shift_s = (beside(i) for i in (_TO_HERE, _BEFORE, _SHIFTED))
        warpgroup = lax.axis_index("warpgroup")
        shared = "c" if share > 1 else None
        kv_head = lax.div(head, group)
        tokens = lambda c: pl.ds((2 * pair + c) * CHUNK, CHUNK)
        channels = lambda s: pl.ds((block * _SLABS + s) * SLAB, SLAB)
        tiles = lambda stage, first, count=1: part(stage * _TILES + first, count)
        at = lambda stage, first, s, c: tiles(stage, first + 2 * s + c)
        m_at = lambda index: part(jnp.where(index == 0, _BESIDE + _M0, last * _TILES + _M1 + index - 1))
        g_at = lambda s, c: part(jnp.where(c == 0, of_keys * _TILES + _G0, _BESIDE + _G1) + s)
        gated_at = lambda c, s: beside(_GATED + 2 * s + c)
        column = lambda ref: plgpu.load(ref, layout=COL, optimized=False)
        spread = lambda x: lax.broadcast_in_dim(x, (CHUNK, SLAB), [1])

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
            plgpu.barrier_arrive(full.at[slot])  # there are six copies of keys and gates

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
            copy = functools.partial(plgpu.copy_gmem_to_smem, barrier=full.at[of_keys])
            for s in range(_SLABS):
                two = pl.ds(2 * pair * CHUNK, 2 * CHUNK)
                copy(q_ref.at[row, two, head, channels(s)], tiles(of_keys, _Q + 2 * s, 2))
                copy(k_ref.at[row, two, kv_head, channels(s)], tiles(of_keys, _K + 2 * s, 2))
            copy_gates(0, full.at[of_keys])

        def copy_gates(c, on):
            for s in range(_SLABS):
                source = decay_source(g_ref, row, 2 * pair + c, head, heads, block * _SLABS + s)
                plgpu.copy_gmem_to_smem(source, g_at(s, c), on)

        def decay_of(c, s, layout):  # a row may end within a group
            value = plgpu.load(a_s.at[c, pl.ds(s * SLAB, SLAB)], layout=layout, optimized=False)
            return jnp.where(others + c < chunks, value, 1.0)

        def prepare_rebuilding():
            """Give the gated tiles that are further away the decay of the nearer chunk; return those of both chunks."""
            plgpu.barrier_wait(gated_full)
            for s in range(_SLABS):
                far = gated_at(1 - p, s)
                far[...] = (load(far) * spread(decay_of(p, s, COL))).astype(BF16)
            plgpu.commit_smem()
            return [decay_of(0, s, ROW) * decay_of(1, s, ROW) for s in range(_SLABS)]

        def rebuild(slot, decays, *, meanwhile):
            """Put the missing state in place of the saved one, and issue other products after those of a slab."""
            of_others = lambda x: tiles(slot, _DO23 - 2 * p + x)
            for s in range(_SLABS):
                target = tiles(slot, _DS - 2 * p + s)
                state = load(target) * along_rows(decays[s], (SLAB, SLAB))
                products = [(gated_at(x, s).T, of_others(x)) for x in range(2)]
                state = add_matmul(state, *products, interpret=interpret)
                if s == 0:
                    meanwhile()
                target[...] = state.astype(BF16)
                plgpu.commit_smem()
                plgpu.barrier_arrive(rebuilt.at[_SLABS * slot + s])

        def stream(c):
            """Sum over the value columns: M of the chunks, Z and W, of the saved state first, and s."""
            if c == 0:
                decays = prepare_rebuilding()

            def accumulate(*sums):
                m, of_saved, of_made = sums

                def one(j, totals):
                    slot = lax.rem(j, _STAGES)
                    d_out_first, v_first = _OWN - 2 * p, 4 * p  # of the block's own chunks
                    plgpu.barrier_wait(full.at[slot])

                    def add(accumulator, of_d_out):  # Z, or else W: which state was saved depends on the block
                        read = jnp.where(of_d_out, d_out_first, v_first) + c
                        state = jnp.where(of_d_out, _S, _DS)
                        plgpu.wgmma(accumulator, tiles(slot, read), tiles(slot, state, _SLABS).T)

                    def add_known():
                        plgpu.wgmma(m, tiles(slot, d_out_first + c), tiles(slot, v_first, c + 1).T)
                        add(of_saved, p == 0)

                    if c == 0:
                        rebuild(slot, decays, meanwhile=add_known)
                        pl.when(j == value_tiles - 1)(lambda: plgpu.barrier_arrive(spent))
                        add(of_made, p == 1)
                    else:
                        add_known()
                        dots = []
                        for s, total in enumerate(totals):
                            plgpu.barrier_wait(rebuilt.at[_SLABS * slot + s])
                            if s == _SLABS - 1:
                                add(of_made, p == 1)
                            product = load(tiles(slot, _S + s)) * load(tiles(slot, _DS + s))
                            dots.append(total + jnp.sum(product, axis=1))
                        totals = tuple(dots)
                    plgpu.wgmma_wait(0)
                    plgpu.commit_smem()  # for the other warps: a barrier of a cluster does not wait for them
                    plgpu.barrier_arrive(free.at[slot])
                    return totals

                totals = lax.fori_loop(0, value_tiles, one, (zero_row(), zero_row()) if c == 1 else ())
                return *(x[...] for x in sums), *totals

            wide = plgpu.ACC((CHUNK, _SLABS * SLAB), F32)
            sums = wide if c else plgpu.ACC((CHUNK, SLAB), F32), wide, wide
            m, of_saved, of_made, *totals = lax.optimization_barrier(pl.run_scoped(accumulate, *sums))
            parts = lambda x: tuple(x[:, i : i + SLAB] for i in range(0, x.shape[1], SLAB))
            return parts(m), parts(of_saved), parts(of_made), totals

        def start(c):
            """Stream, and put M and W, rounded, in shared memory; return Z."""
            m, of_saved, of_made, totals = stream(c)
            plgpu.barrier_wait(tables_full)
            sync(streamed)
            iota = lambda axis: plgpu.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), axis, layout=WGMMA)
            lower = lambda x: jnp.where(iota(0) >= iota(1), x, 0.0).astype(BF16)
            if c == 0:
                m_at(0)[...] = lower(m[0])
            else:
                m_at(1)[...] = m[0].astype(BF16)
                m_at(2)[...] = lower(m[1])
                for s in range(_SLABS):
                    dot_s.at[s][...] = totals[s]
            for s in range(_SLABS):
                at(last, _B, s, c)[...] = jnp.where(p == 0, of_made[s], of_saved[s]).astype(BF16)
            return lax.cond(p == 0, lambda: of_saved, lambda: of_made)

        def work():
            set_registers(CONSUMER, interpret)
            c = warpgroup
            zs = lax.cond(c == 0, functools.partial(start, 0), functools.partial(start, 1))

            # q', k' and the decays
            plgpu.barrier_wait(full.at[of_keys])

            def gate(s, _):
                g_tile, q_tile, k_tile = g_at(s, c), at(of_keys, _Q, s, c), at(of_keys, _K, s, c)

                def products(halves_of_g, d):
                    plgpu.wgmma(halves_of_g, g_tile.T, select_s.T)
                    plgpu.wgmma(d, shift_s, g_tile)
                    return halves_of_g[...], d[...]

                accumulators = plgpu.ACC((SLAB, 8), F32), plgpu.ACC((CHUNK, SLAB), F32)
                halves_of_g, d = lax.optimization_barrier(pl.run_scoped(products, *accumulators))
                for index, x in enumerate(first_columns(halves_of_g)):
                    decays_s.at[s, c, index][...] = jnp.exp(x)
                d = d * LOG2_E
                q_tile[...] = (load(q_tile) * jnp.exp2(d + log_scale)).astype(BF16)
                k_tile[...] = (load(k_tile) * jnp.exp2(-d)).astype(BF16)

            lax.fori_loop(0, _SLABS, gate, None)
            plgpu.commit_smem()
            sync(gated)
            plgpu.barrier_wait(constants_full)

            def one_slab(s, zs):
                finish(s, c, zs[0])
                return zs[1], zs[1]

            lax.fori_loop(0, _SLABS, one_slab, tuple(zs))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        def finish(s, c, z):
            """Compute the gradients of a chunk and slab from Z and what is in shared memory."""
            g_tile = g_at(s, c)
            exponents = lambda: matmul((shift_s, g_at(s, c))) * LOG2_E
            q_tile, k_tile, other_q, other_k = (at(of_keys, x, s, d) for d in (c, 1 - c) for x in (_Q, _K))
            a_tile, b_tile = (at(last, x, s, c) for x in (_A, _B))
            to_end = lambda: column(decays_s.at[s, 1, _FROM_MIDDLE])
            from_start = lambda: column(decays_s.at[s, 0, _TO_MIDDLE])
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

            load_w = lambda: load(b_tile) * spread(to_end())

            # what goes from one chunk to the other
            z = z * spread(from_start())
            x = jnp.where(c == 0, load_w(), z)
            put_sums(load(at(of_keys, jnp.where(c == 0, _K, _Q), s, c)) * x, 1 - c)
            x = lax.cond(
                c == 0,
                lambda x: add_matmul(x, (m_at(1).T, other_q), interpret=interpret),
                lambda x: add_matmul(x, (m_at(1), other_k), interpret=interpret),
                x,
            ) * spread(between())

            @pl.when(c == 0)
            def _():
                b_tile[...] = x.astype(BF16)

            z = jnp.where(c == 0, z, x)
            plgpu.barrier_arrive(crossed.at[s])

            # dq, dk, and of dg the products of both sides, whose large parts cancel
            x = add_matmul(z, (m_at(2 * c), k_tile), interpret=interpret)
            put(x * jnp.exp2(exponents() + log_scale), a_tile, dq_ref)
            product = load(q_tile) * x
            y_m = matmul((m_at(2 * c).T, q_tile))
            product -= load(k_tile) * y_m
            plgpu.barrier_wait(crossed.at[s])  # the other chunk has read this one's q' and k'
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            put_split(product, a_tile, q_tile)
            y = load(b_tile) * jnp.where(c == 0, 1.0, spread(to_end()))
            b_tile[...] = (load(k_tile) * y).astype(BF16)
            put((y + y_m) * jnp.exp2(-exponents()), k_tile, dk_ref)

            dg = matmul((to_here_s.T, a_tile), (to_here_s.T, q_tile), (before_s, b_tile))
            constant = column(dot_s.at[s]) * from_start() * to_end()
            put(dg + spread(between() * (constant + column(sums_s.at[s, c]))), g_tile, dg_ref)

        @pl.when(warpgroup == 2)
        def _copies():
            set_registers(PRODUCER, interpret)
            number = block + key_tiles * (group_index + groups * (head + heads * row))
            clusters = batch * heads * groups * key_tiles
            begin_apart(number, clusters, at_once=at_once, groups=8, clocks=5800, interpret=interpret)
            pl.when(p == 0)(lambda: copy_gated(gated_q_ref))
            pl.when(p == 1)(lambda: copy_gated(gated_k_ref))

            def constants_when_spent():
                plgpu.barrier_wait(spent)
                copy_constants()

            def fill(j, _):
                pl.when(j == value_tiles + 1)(constants_when_spent)
                pl.when(j >= _STAGES)(lambda: plgpu.barrier_wait(free.at[lax.rem(j, _STAGES)]))
                pl.when(j < value_tiles)(lambda: copy_values(j))
                pl.when(j + _AHEAD < value_tiles)(lambda: prefetch_values(j + _AHEAD))
                pl.when(j == 1)(copy_tables)
                pl.when(j == value_tiles)(copy_keys)

            lax.fori_loop(0, value_tiles + _STAGES, fill, None)

        pl.when(warpgroup < 2)(work)
        sync(done)  # no warpgroup leaves while another still issues matrix products

    free = barrier(2, _STAGES)
    if share > 1:
        free = plgpu.ClusterBarrier(collective_axes=("c",), num_arrivals=2, num_barriers=_STAGES)
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
            plgpu.SMEM((_SLABS, SLAB), F32),  # dot_s
            plgpu.SMEM((_SLABS, 2, SLAB), F32),  # sums_s
            barrier(4),  # gated_full
            barrier(2 + _SLABS),  # tables_full
            barrier(2),  # constants_full
            barrier(6, _STAGES),  # full
            free,
            barrier(1, _STAGES * _SLABS),  # rebuilt
            barrier(1),  # spent
            barrier(2),  # streamed
            barrier(2),  # gated
            barrier(2, _SLABS),  # crossed
            barrier(3),  # done
        ],
        **cluster,
    )
    select, triangles, _ = constants()
    return run(q, k, v, d_out, states, d_states, select, triangles, g[0], gated_q, gated_k, decay)
