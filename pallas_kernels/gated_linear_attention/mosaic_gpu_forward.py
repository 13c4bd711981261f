"""The forward kernel on Hopper: one pass over a row, the state in registers.

One thread block per (batch row, head, tile of value columns) walks the chunks. Warpgroup 0 makes the gated tiles, the
scores A and the output; warpgroup 1 holds the state in float32 registers; warpgroup 2 drives the copy engine. What must
move moves once: q, k, v, g in, out and the final state out, and where a gradient will follow what it needs of every
chunk: R in bfloat16, whether the chunk is exact, and A. See `mosaic_gpu_chunk` for the algebra and its letters.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gated_linear_attention.mosaic_gpu_chunk import (
    AFTER,
    BF16,
    CHUNK,
    F32,
    ROW,
    SHIFTED,
    SLAB,
    UP_TO_HERE,
    WGMMA,
    along_rows,
    barrier,
    choose,
    clamp_log_decay,
    constants,
    decay_source,
    exact_scores,
    exceeds_bound,
    kernel,
    load,
    matmul,
    result,
    tile,
    unless,
    when,
    zeros,
)

SHARED_MEMORY = 232_448  # bytes a thread block can have


def forward(q, k, v, g, initial_state, *, scale, value_tile, save=None, interpret=False):
    """Run the forward kernel.

    Args:
        q: [B, T, H, K] bfloat16, K a multiple of 64.
        k: [B, T, H_kv, K], v: [B, T, H_kv, V] bfloat16, V a multiple of value_tile.
        g: one or two terms [B or 1, T or C, any heads, K or 64] bfloat16 that sum to the log decay; see `decay_source`.
        initial_state: [B, H, K, V] float32 or None.
        scale: of the query.
        value_tile: value columns of a thread block, 64 or 128.
        save: what to return for the backward pass: None; "states"; "scores": them too. Those of exact chunks always.
        interpret: run in the interpreter.

    Returns:
        out [B, T, H, V] bfloat16, final state [B, H, K, V] float32, then if asked for:
        states R [B, H, N, K, V] bfloat16 (with "scores", of even chunks only), exact [B, H, N] int32,
        scores [B, H, N, C, C] bfloat16 (with "states", those of bounded chunks are not written).
    """
    batch, time, heads, key_dim = q.shape
    value_dim, group, terms = v.shape[-1], heads // k.shape[2], len(g)
    chunks, slabs = pl.cdiv(time, CHUNK), key_dim // SLAB
    fixed = 2 * CHUNK * (3 * value_tile + key_dim + 3 * SLAB) + 2 * key_dim * value_tile + 4096  # the other buffers
    stages = min(4, (SHARED_MEMORY - fixed) // (2 * CHUNK * SLAB * (2 + terms)))
    assert stages >= slabs, (stages, slabs)  # an exact chunk keeps all its slabs until the scores are done
    lag = 1 if stages >= 2 * slabs else 0  # a chunk is judged once the next one is on its way, if there is room for it

    out_type = [result((batch, time, heads, value_dim), BF16, q), result((batch, heads, key_dim, value_dim), F32, q)]
    every = 2 if save == "scores" else 1  # which chunks' states are saved
    if save is not None:
        out_type += [
            result((batch, heads, pl.cdiv(chunks, every), key_dim, value_dim), BF16, q),
            result((batch, heads, chunks), jnp.int32, q),
            result((batch, heads, chunks, CHUNK, CHUNK), BF16, q),
        ]

    def body(*all_refs):
        refs = list(all_refs)
        take = lambda count: [refs.pop(0) for _ in range(count)]
        q_ref, k_ref, v_ref, select_ref, triangles_ref, tables_ref = take(6)
        g_refs = take(terms)
        (initial_ref,) = take(1) if initial_state is not None else (None,)
        out_ref, final_ref = take(2)
        states_ref, exact_ref, scores_ref = take(3 if save is not None else 0) or [None] * 3
        q_s, k_s, g_s, v_s, gated_k_s, r_s, out_s, q_level_s, k_level_s, shift_s, select_s, exact_s = take(12)
        full, free, v_full, v_free, k_ready, k_free, exact_ready, r_ready, r_free = take(9)
        shift_ready, select_ready, done, *staging = refs
        scores_s = q_level_s  # free whenever the scores are done

        value_index, head, row = lax.axis_index("v"), lax.axis_index("h"), lax.axis_index("b")
        warpgroup = lax.axis_index("warpgroup")
        kv_head = lax.div(head, group)
        columns = pl.ds(value_index * value_tile, value_tile)
        slot = lambda n, s: lax.rem(n * slabs + s, stages)
        g_tiles = lambda n, s: [g_s.at[slot(n, s), t] for t in range(terms)]

        def matmul_registers(accumulator, a, b):
            """Accumulate a @ b with a in registers, which the interpreter wants in shared memory."""
            if interpret:
                staging[0][...] = a
                plgpu.commit_smem()
                plgpu.wgmma(accumulator, staging[0], b)
                plgpu.wgmma_wait(0)
            else:
                plgpu.wgmma(accumulator, a, b)

        halves = lambda n, s: matmul(*((term.T, select_s.T) for term in g_tiles(n, s)), shape=(SLAB, 8))
        exponents = lambda w, n, s: matmul(*((w, term) for term in g_tiles(n, s)))

        def walk(chunk, carry):
            """Walk the chunks: by the lean code until one is exact, from there on by the code for both kinds."""

            def judged(n):
                plgpu.barrier_wait(exact_ready.at[lax.rem(n, 4)])
                return exact_s[lax.rem(n, 4)]

            def lean(loop):
                n, _, carry = loop
                carry = chunk(n, carry, None)
                return n + 1, lax.cond(n + 1 < chunks, lambda: judged(n + 1), lambda: jnp.int32(0)), carry

            def careful(n, carry):
                carry = chunk(n, carry, exact_s[lax.rem(n, 4)] > 0)
                pl.when(n + 1 < chunks)(lambda: plgpu.barrier_wait(exact_ready.at[lax.rem(n + 1, 4)]))
                return carry

            bounded = lambda loop: jnp.logical_and(loop[0] < chunks, loop[1] == 0)
            n, _, carry = lax.while_loop(bounded, lean, (jnp.int32(0), judged(jnp.int32(0)), carry))
            return lax.fori_loop(n, chunks, careful, carry)

        @pl.when(warpgroup == 2)
        def _copies():
            if not interpret:
                plgpu.set_max_registers(40, action="decrease")

            plgpu.copy_gmem_to_smem(select_ref, select_s, select_ready)
            plgpu.barrier_wait(select_ready)

            def judge(n):
                """Say whether chunk n is exact."""
                for s in range(slabs):
                    plgpu.barrier_wait(full.at[slot(n, s)])
                exact = exceeds_bound(*(halves(n, s) for s in range(slabs)), interpret=interpret)

                @pl.when(exact)
                def _():
                    for s in range(slabs):
                        clamp_log_decay(g_tiles(n, s))

                exact_s[lax.rem(n, 4)] = exact.astype(jnp.int32)
                plgpu.barrier_arrive(exact_ready.at[lax.rem(n, 4)])

            def chunk(n, _):
                tokens, v_slot = pl.ds(n * CHUNK, CHUNK), lax.rem(n, 2)
                pl.when(n >= 2)(lambda: plgpu.barrier_wait(v_free.at[v_slot]))
                plgpu.copy_gmem_to_smem(v_ref.at[row, tokens, kv_head, columns], v_s.at[v_slot], v_full.at[v_slot])
                for s in range(slabs):
                    i = slot(n, s)
                    pl.when(n * slabs + s >= stages)(functools.partial(plgpu.barrier_wait, free.at[i]))
                    channels = pl.ds(s * SLAB, SLAB)
                    plgpu.copy_gmem_to_smem(q_ref.at[row, tokens, head, channels], q_s.at[i], full.at[i])
                    plgpu.copy_gmem_to_smem(k_ref.at[row, tokens, kv_head, channels], k_s.at[i], full.at[i])
                    for t, g_ref in enumerate(g_refs):
                        source = decay_source(g_ref, row, n, head, heads, s)
                        plgpu.copy_gmem_to_smem(source, g_s.at[i, t], full.at[i])
                pl.when(n >= lag)(lambda: judge(n - lag))

            lax.fori_loop(0, chunks, chunk, None)
            if lag:
                judge(jnp.int32(chunks - 1))
            # every completion of a barrier must be seen by whoever waits on it
            total = chunks * slabs
            for i in range(total - min(stages, total), total):
                plgpu.barrier_wait(free.at[i % stages])
            for i in range(chunks - min(2, chunks), chunks):
                plgpu.barrier_wait(v_free.at[i % 2])

        @pl.when(warpgroup == 0)
        def _output():
            if not interpret:
                plgpu.set_max_registers(232, action="increase")
            plgpu.copy_gmem_to_smem(triangles_ref.at[SHIFTED], shift_s, shift_ready)
            plgpu.barrier_wait(shift_ready)
            iota = lambda axis: plgpu.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), axis, layout=WGMMA)
            causal = iota(0) >= iota(1)

            def chunk(n, carry, exact):
                v_slot = lax.rem(n, 2)
                unknown_zero = lambda: exact_s[lax.rem(n, 4)] - 1  # in exact chunks; see `exact_scores`
                gated_q = []
                for s in range(slabs):
                    i = slot(n, s)
                    plgpu.barrier_wait(full.at[i])
                    d = exponents(shift_s, n, s)
                    q_tile = (load(q_s.at[i]) * (jnp.exp(d) * scale)).astype(BF16)
                    k_tile = (load(k_s.at[i]) * jnp.exp(-d)).astype(BF16)
                    unless(exact, functools.partial(plgpu.barrier_arrive, free.at[i]))
                    pl.when(n >= 1)(functools.partial(plgpu.barrier_wait, k_free.at[s]))
                    gated_k_s.at[s][...] = k_tile

                    def unbounded(s=s, i=i):
                        at = unknown_zero()
                        if s == 0:
                            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last scores lie in a buffer used here
                        for buffer, index in ((q_level_s, UP_TO_HERE), (k_level_s, AFTER)):
                            buffer[...] = plgpu.load(triangles_ref.at[index + at], layout=WGMMA, optimized=False)
                        plgpu.commit_smem()
                        gated_k_s.at[s][...] = (load(k_s.at[i]) * jnp.exp(exponents(k_level_s, n, s))).astype(BF16)
                        return (load(q_s.at[i]) * (jnp.exp(exponents(q_level_s, n, s)) * scale)).astype(BF16)

                    gated_q.append(choose(exact, unbounded, lambda q_tile=q_tile: q_tile))
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(k_ready.at[s])

                def scores(accumulator):
                    for s in range(slabs):
                        matmul_registers(accumulator, gated_q[s], gated_k_s.at[s].T)
                    return accumulator[...]

                a = lax.optimization_barrier(pl.run_scoped(scores, plgpu.ACC((CHUNK, CHUNK), F32)))

                def by_levels():
                    tiles = lambda s: (q_s.at[slot(n, s)], k_s.at[slot(n, s)], g_tiles(n, s))
                    buffers = (out_s.at[:, pl.ds(0, CHUNK)], q_level_s, k_level_s)
                    return exact_scores(tables_ref, unknown_zero(), tiles, slabs, scale, buffers).astype(BF16)

                a = choose(exact, by_levels, lambda: jnp.where(causal, a, 0.0).astype(BF16))

                for s in range(slabs):
                    when(exact, functools.partial(plgpu.barrier_arrive, free.at[slot(n, s)]))
                plgpu.barrier_wait(v_full.at[v_slot])
                plgpu.barrier_wait(r_ready)

                def output(accumulator):
                    matmul_registers(accumulator, a, v_s.at[v_slot])
                    for s in range(slabs):
                        matmul_registers(accumulator, gated_q[s], r_s.at[pl.ds(s * SLAB, SLAB)])
                    return accumulator[...]

                out = lax.optimization_barrier(pl.run_scoped(output, plgpu.ACC((CHUNK, value_tile), F32)))
                plgpu.barrier_arrive(r_free)
                plgpu.barrier_arrive(v_free.at[v_slot])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                out_s[...] = out.astype(BF16)
                if save == "scores":
                    scores_s[...] = a
                elif save == "states":
                    when(exact, lambda: scores_s.__setitem__(..., a))
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out_s, out_ref.at[row, pl.ds(n * CHUNK, CHUNK), head, columns])
                write = lambda: plgpu.copy_smem_to_gmem(scores_s, scores_ref.at[row, head, n])
                if save == "scores":
                    pl.when(value_index == 0)(write)
                elif save == "states":
                    when(exact, lambda: pl.when(value_index == 0)(write))
                return carry

            walk(chunk, ())
            for s in range(slabs):
                plgpu.barrier_wait(k_free.at[s])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == 1)
        def _state():
            if not interpret:
                plgpu.set_max_registers(232, action="increase")
            plgpu.barrier_wait(select_ready)
            rows = lambda s: pl.ds(s * SLAB, SLAB)
            shape = (SLAB, value_tile)
            column = plgpu.broadcasted_iota(jnp.int32, (SLAB, 8), 1, layout=WGMMA)
            zero_row = plgpu.layout_cast(jnp.zeros((SLAB,), F32), ROW)

            def initial(s):
                if initial_ref is None:
                    return zeros(shape)
                return plgpu.load(initial_ref.at[row, head, rows(s), columns], layout=WGMMA, optimized=False)

            def chunk(n, carry, exact):
                state, pending, v_slot = list(carry[0]), list(carry[1]), lax.rem(n, 2)
                pl.when(n >= 1)(lambda: plgpu.barrier_wait(r_free))
                if states_ref is not None:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                for s in range(slabs):
                    plgpu.barrier_wait(full.at[slot(n, s)])
                    sums = halves(n, s)
                    plgpu.barrier_arrive(free.at[slot(n, s)])
                    middle = jnp.sum(jnp.where(column == 0, sums, 0.0), axis=1)
                    rest = jnp.sum(jnp.where(column == 1, sums, 0.0), axis=1)
                    before = choose(exact, lambda p, _: p, lambda p, m: p + m, pending[s], middle)
                    r = state[s] * along_rows(jnp.exp(before), shape)
                    r_s.at[rows(s)][...] = r.astype(BF16)
                    state[s], pending[s] = choose(
                        exact,
                        lambda r, middle, rest: (r * along_rows(jnp.exp(middle + rest), shape), zero_row),
                        lambda r, _, rest: (r, rest),
                        *(r, middle, rest),
                    )
                plgpu.commit_smem()
                plgpu.barrier_arrive(r_ready)
                if states_ref is not None:
                    target = states_ref.at[row, head, lax.div(n, every), :, columns]
                    pl.when(lax.rem(n, every) == 0)(lambda: plgpu.copy_smem_to_gmem(r_s, target))
                    exact_ref[row, head, n] = jnp.int32(0) if exact is None else exact.astype(jnp.int32)
                plgpu.barrier_wait(v_full.at[v_slot])
                for s in range(slabs):
                    plgpu.barrier_wait(k_ready.at[s])
                    state[s] = add_product(state[s], gated_k_s.at[s].T, v_s.at[v_slot])
                    plgpu.barrier_arrive(k_free.at[s])
                plgpu.barrier_arrive(v_free.at[v_slot])
                return tuple(state), tuple(pending)

            def add_product(x, a, b):
                if interpret:  # which has no accumulators that start from a value
                    return x + matmul((a, b), shape=shape)
                return lax.optimization_barrier(pl.run_state(lambda acc: plgpu.wgmma(acc, a, b))(plgpu.ACC.init(x)))

            start = tuple(initial(s) for s in range(slabs)), (zero_row,) * slabs
            state, pending = walk(chunk, start)
            for s in range(slabs):
                final = state[s] * along_rows(jnp.exp(pending[s]), shape)
                final_ref.at[row, head, rows(s), columns][...] = final
            plgpu.barrier_wait(r_free)
            plgpu.wait_smem_to_gmem(0)

        # no warpgroup leaves while another still issues matrix products
        plgpu.barrier_arrive(done)
        plgpu.barrier_wait(done)

    scratch = [
        tile(stages, CHUNK, SLAB),
        tile(stages, CHUNK, SLAB),
        tile(stages, terms, CHUNK, SLAB),
        tile(2, CHUNK, value_tile),
        tile(slabs, CHUNK, SLAB),
        tile(key_dim, value_tile),
        tile(CHUNK, value_tile),
        tile(CHUNK, SLAB),
        tile(CHUNK, SLAB),
        tile(CHUNK, CHUNK),
        tile(8, CHUNK),
        plgpu.SMEM((4,), jnp.int32),
        barrier(2 + terms, stages),  # full
        barrier(2, stages),  # free
        barrier(1, 2),  # v_full
        barrier(2, 2),  # v_free
        barrier(1, slabs),  # k_ready
        barrier(1, slabs),  # k_free
        barrier(1, 4),  # exact_ready: no chunk is judged before all are done with the fourth before it
        *(barrier(1) for _ in range(4)),  # r_ready, r_free, shift_ready, select_ready
        barrier(3),  # done
    ]
    if interpret:
        scratch.append(tile(CHUNK, CHUNK))
    run = kernel(
        body,
        name="gla_forward",
        interpret=interpret,
        out_type=out_type,
        grid=(value_dim // value_tile, heads, batch),
        grid_names=("v", "h", "b"),
        scratch_types=scratch,
    )
    select, triangles, tables = constants()
    inputs = [q, k, v, select, triangles, tables, *g]
    if initial_state is not None:
        inputs.append(initial_state)
    return run(*inputs)
