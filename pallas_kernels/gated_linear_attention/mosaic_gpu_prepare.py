"""What a walk over the chunks of wide heads needs of queries, keys and gates, made by all chunks at once on Hopper.

A wide head's state fills the registers of several thread blocks, and each of them would make the same gated tiles. So
they are made here, once, with references that suit every gate (the second kind of `mosaic_gpu_chunk`):

    q~ = scale q e^G,   k~ = k e^{G_last - G},   A,   e^{G_last}

after which the walk is two matrix products a chunk, o = q~ S + A v and S_next = Diag(e^{G_last}) S + k~^T v.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gated_linear_attention.block_sizes import MULTIPROCESSORS
from pallas_kernels.gated_linear_attention.mosaic_gpu_chunk import (
    BEFORE,
    BF16,
    CHUNK,
    COL,
    F32,
    SHIFTED,
    SLAB,
    WGMMA,
    add_matmul,
    barrier,
    begin_apart,
    clamp_log_decay,
    constants,
    decay_source,
    exact_scores,
    exceeds_bound,
    kernel,
    load,
    matmul,
    put_table,
    result,
    tile,
    unknown_zero,
    zeros,
)

STAGES = 2  # slabs on their way or in work: what lets two thread blocks share a multiprocessor


def prepare(q, k, g, *, scale, interpret=False):
    """Make the gated tiles, the scores and the decay of every chunk.

    Args:
        q: [B, T, H, K] bfloat16, K a multiple of 64.
        k: [B, T, H_kv, K] bfloat16.
        g: one or two terms [B or 1, T or C, any heads, K or 64] bfloat16 that sum to the log decay; see `decay_source`.
        scale: of the query.
        interpret: run in the interpreter.

    Returns:
        q~ and k~ [B, T, H, K] bfloat16, scores A [B, H, N, C, C] bfloat16, decay e^{G_last} [B, H, N, K] float32,
        exact [B, H, N] int32: 1 where the chunk is not bounded.
    """
    batch, time, heads, key_dim = q.shape
    group, terms = heads // k.shape[2], len(g)
    chunks, slabs = pl.cdiv(time, CHUNK), key_dim // SLAB
    together = STAGES if slabs % STAGES == 0 else 1  # slabs of an exact chunk made at once

    def body(*all_refs):
        refs = list(all_refs)
        take = lambda count: [refs.pop(0) for _ in range(count)]
        q_ref, k_ref, select_ref, triangles_ref, tables_ref = take(5)
        g_refs = take(terms)
        gated_q_ref, gated_k_ref, scores_ref, decay_ref, exact_ref = take(5)
        q_s, k_s, g_s, work_s, select_s, factors_s, exact_s, full, constants_ready = refs
        q_level_s, k_level_s, w_s = (work_s.at[i] for i in range(3))

        n, head, row = lax.axis_index("n"), lax.axis_index("h"), lax.axis_index("b")
        tokens = pl.ds(n * CHUNK, CHUNK)
        slab = lambda s: pl.ds(s * SLAB, SLAB)
        g_tiles = lambda stage: [g_s.at[stage, t] for t in range(terms)]
        iota = lambda shape, axis: plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=WGMMA)
        cell = lambda sums, index: jnp.sum(jnp.where(iota((SLAB, 8), 1) == index, sums, 0.0), axis=1)

        def fetch(s, stage):
            key_head = lax.div(head, group)
            plgpu.copy_gmem_to_smem(q_ref.at[row, tokens, head, slab(s)], q_s.at[stage], full.at[stage])
            plgpu.copy_gmem_to_smem(k_ref.at[row, tokens, key_head, slab(s)], k_s.at[stage], full.at[stage])
            for g_ref, g_tile in zip(g_refs, g_tiles(stage), strict=True):
                plgpu.copy_gmem_to_smem(decay_source(g_ref, row, n, head, heads, s), g_tile, full.at[stage])

        def put(s, stage):
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_s.at[stage], gated_q_ref.at[row, tokens, head, slab(s)])
            plgpu.copy_smem_to_gmem(k_s.at[stage], gated_k_ref.at[row, tokens, head, slab(s)])

        def put_scores(a):
            w_s[...] = a.astype(BF16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(w_s, scores_ref.at[row, head, n])
            plgpu.wait_smem_to_gmem(0)

        def bounded(s, a, worst):
            """Make a slab with one exponential a tile: k' and q' for A, which times e^{G_m} or so are k~ and q~."""
            stage = s % STAGES
            plgpu.barrier_wait(full.at[stage])

            def products(sums, d):
                for term in g_tiles(stage):
                    plgpu.wgmma(sums, term.T, select_s.T)
                for term in g_tiles(stage):
                    plgpu.wgmma(d, w_s, term)
                return sums[...], d[...]

            accumulators = plgpu.ACC((SLAB, 8), F32), plgpu.ACC((CHUNK, SLAB), F32)
            sums, d = lax.optimization_barrier(pl.run_scoped(products, *accumulators))
            to_middle, from_middle = cell(sums, 0), cell(sums, 1)
            factors_s.at[0][...] = jnp.exp(to_middle)
            factors_s.at[1][...] = jnp.exp(from_middle)
            decay_ref.at[row, head, n, slab(s)][...] = jnp.exp(to_middle + from_middle)
            for index, (x, level, factor) in enumerate(
                ((q_s.at[stage], q_level_s, jnp.exp(d) * scale), (k_s.at[stage], k_level_s, jnp.exp(-d)))
            ):
                gated = load(x) * factor
                level[...] = gated.astype(BF16)
                shift = plgpu.load(factors_s.at[index], layout=COL, optimized=False)
                x[...] = (gated * lax.broadcast_in_dim(shift, (CHUNK, SLAB), [1])).astype(BF16)
            put(s, stage)
            a = add_matmul(a, (q_level_s, k_level_s.T), interpret=interpret)
            return a, jnp.maximum(worst, jnp.abs(sums))

        def unbounded(i, a):
            """Make some slabs again, for any gate."""
            zero = unknown_zero(exact_s[0])
            q_level_s, k_level_s, w_s = (work_s.at[zero + i] for i in range(3))
            plgpu.commit_smem()
            for stage in range(together):
                fetch(i * together + stage, stage)
            stages = [stage + zero for stage in range(together)]
            tiles = [(q_s.at[stage], k_s.at[stage], g_tiles(stage)) for stage in stages]
            for stage, (_, _, g) in enumerate(tiles):
                plgpu.barrier_wait(full.at[stage])
                clamp_log_decay(g)
                sums = matmul(*((term.T, select_s.T) for term in g), shape=(SLAB, 8))
                decay_ref.at[row, head, n, slab(i * together + stage)][...] = jnp.exp(cell(sums, 0) + cell(sums, 1))
            a = a + exact_scores(tables_ref, zero, tiles, scale, (w_s, q_level_s, k_level_s)[: 1 + together])
            put_table(w_s, triangles_ref, zero + BEFORE)  # the transpose of AFTER; with the row itself UP_TO_HERE
            plgpu.commit_smem()
            for stage, (q, k, g) in enumerate(tiles):
                up_to_here = matmul(*((w_s, term) for term in g)) + sum(load(term) for term in g)
                q[...] = (load(q) * (jnp.exp(up_to_here) * scale)).astype(BF16)
                k[...] = (load(k) * jnp.exp(matmul(*((w_s.T, term) for term in g)))).astype(BF16)
                put(i * together + stage, stage)
            plgpu.wait_smem_to_gmem(0)
            return a

        number, blocks = head + heads * (n + chunks * row), batch * chunks * heads
        # 6,000 cycles from the first group to the last, of the 28,000 that a block takes: 3,000 to 10,000 are as good
        begin_apart(number, blocks, at_once=2 * MULTIPROCESSORS, groups=4, clocks=2000, interpret=interpret)
        for s in range(min(STAGES, slabs)):
            fetch(s, s)
        plgpu.copy_gmem_to_smem(select_ref, select_s, constants_ready)
        plgpu.copy_gmem_to_smem(triangles_ref.at[SHIFTED], w_s, constants_ready)
        plgpu.barrier_wait(constants_ready)

        a, worst = zeros((CHUNK, CHUNK)), zeros((SLAB, 8))
        for s in range(slabs):
            ahead = s + STAGES - 1
            if s > 0 and ahead < slabs:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last slab is on its way from there
                fetch(ahead, ahead % STAGES)
            a, worst = bounded(s, a, worst)
        exact_s[0] = exceeds_bound(worst, interpret=interpret).astype(jnp.int32)
        exact_ref[row, head, n] = exact_s[0]
        put_scores(jnp.where(iota((CHUNK, CHUNK), 0) >= iota((CHUNK, CHUNK), 1), a, 0.0))
        # What was made of an exact chunk is wrong, and found so too late to matter to the others.
        again = lambda: put_scores(lax.fori_loop(0, slabs // together, unbounded, zeros((CHUNK, CHUNK))))
        pl.when(exact_s[0] > 0)(again)

    run = kernel(
        body,
        name="gla_prepare",
        interpret=interpret,
        warpgroups=1,
        out_type=[
            result(q.shape, BF16, q),
            result(q.shape, BF16, q),
            result((batch, heads, chunks, CHUNK, CHUNK), BF16, q),
            result((batch, heads, chunks, key_dim), F32, q),
            result((batch, heads, chunks), jnp.int32, q),
        ],
        grid=(batch, chunks, heads),
        grid_names=("b", "n", "h"),
        scratch_types=[
            tile(STAGES, CHUNK, SLAB),
            tile(STAGES, CHUNK, SLAB),
            tile(STAGES, terms, CHUNK, SLAB),
            tile(3, CHUNK, SLAB),
            tile(8, CHUNK),
            plgpu.SMEM((2, SLAB), F32),
            plgpu.SMEM((1,), jnp.int32),
            barrier(2 + terms, STAGES),  # full
            barrier(2),  # constants_ready
        ],
    )
    return run(q, k, *constants(), *g)
