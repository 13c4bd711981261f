"""The forward kernel on Hopper for heads of at most 128 key channels: one pass over a row, the state in registers.

One thread block per (batch row, head, tile of value columns) walks the chunks. One of its warpgroups drives the copy
engine, one makes the gated tiles and the scores, and one for each 64 value columns holds its part of the state,
transposed, in float32 registers. There it is the left operand of

    o^T = R^T q'^T + v^T A^T,   U^T = R^T + v^T k'

as it stands, and never passes through shared memory. What must move moves once: q, k, v, g in, out and the final state
out, and where a gradient will follow what it needs of the chunks. `mosaic_gpu_chunk` has the algebra and its letters.
"""

import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gated_linear_attention.mosaic_gpu_chunk import (
    BEFORE,
    BF16,
    CHUNK,
    COL,
    CONSUMER,
    F32,
    LOG2_E,
    MIDDLE,
    PRODUCER,
    SHIFTED,
    SLAB,
    WGMMA,
    add_matmul,
    barrier,
    clamp_log_decay,
    constants,
    decay_source,
    exact_scores,
    exceeds_bound,
    kernel,
    left_operand,
    load,
    load_turned_state,
    matmul,
    put_table,
    result,
    set_registers,
    tile,
    turned,
    unknown_zero,
    zero_row,
    zeros,
)

VALUES = 64  # value columns of a warpgroup
_SCORES, _SHIFT, _ANY = range(3)  # tiles of the gates: A, the table SHIFTED, and one to use
# Registers a thread of the producer, the gates and the values has, by the number of warpgroups with values.
REGISTERS = {1: (PRODUCER, CONSUMER, CONSUMER), 2: (PRODUCER, 200, 144)}


def forward(q, k, v, g, initial_state, *, scale, value_tile, save=None, ends=True, interpret=False):
    """Run the forward kernel.

    Args:
        q: [B, T, H, K] bfloat16, K 64 or 128.
        k: [B, T, H_kv, K], v: [B, T, H_kv, V] bfloat16, V a multiple of value_tile.
        g: one or two terms [B or 1, T or C, any heads, K or 64] bfloat16 that sum to the log decay; see `decay_source`.
        initial_state: [B, H, K, V] float32 or None.
        scale: of the query, positive.
        value_tile: value columns of a thread block, 64 or 128.
        save: return what the backward pass needs, with states of all chunks, 1, or of even ones, 2; None: nothing.
        ends: return the final state.
        interpret: run in the interpreter.

    Returns:
        out [B, T, H, V] bfloat16, final state [B, H, K, V] float32 or None, then if asked for:
        states R [B, H, ceil(N / save), K, V] bfloat16, exact [B, H, N] int32, scores [B, H, N, C, C] bfloat16, of which
        those of bounded chunks are not written. With save 1, states [B, N K, H, V], scores [B, N C, H, C].
    """
    batch, time, heads, key_dim = q.shape
    value_dim, group, terms = v.shape[-1], heads // k.shape[2], len(g)
    chunks, slabs = pl.cdiv(time, CHUNK), key_dim // SLAB
    if terms * slabs == 4 and save is not None:
        value_tile = VALUES  # two terms of the gate and states on their way out fill shared memory
    warpgroups = value_tile // VALUES

    out_type = [result((batch, time, heads, value_dim), BF16, q)]
    if ends:
        out_type.append(result((batch, heads, key_dim, value_dim), F32, q))
    of_states: tuple[int, ...] = batch, heads, pl.cdiv(chunks, save or 1), key_dim, value_dim
    of_scores: tuple[int, ...] = batch, heads, chunks, CHUNK, CHUNK
    if save == 1:  # laid out as the gradients of k and q, which the sweep writes in their place
        of_states, of_scores = (batch, chunks * key_dim, heads, value_dim), (batch, chunks * CHUNK, heads, CHUNK)
    if save is not None:
        out_type += [
            result(of_states, BF16, q),
            result((batch, heads, chunks), jnp.int32, q),
            result(of_scores, BF16, q),
        ]

    def body(*all_refs):
        refs = list(all_refs)
        take: Any = lambda count, present=True: [refs.pop(0) if present else None for _ in range(count)]
        q_ref, k_ref, v_ref, select_ref, triangles_ref, tables_ref = take(6)
        g_refs = take(terms)
        (initial_ref,) = take(1, initial_state is not None)
        (out_ref,) = take(1)
        (final_ref,) = take(1, ends)
        states_ref, exact_ref, scores_ref = take(3, save is not None)
        q_s, k_s, g_s, v_s, work_s, out_s, level_s, select_s, factors_s, exact_s = take(10)
        state_tiles = take(1 if save is not None else 0)
        full, v_full, ready, a_ready, a_free, q_free, kv_free, constants_ready, done = refs

        block, head, row = (lax.axis_index(axis) for axis in "vhb")
        warpgroup = lax.axis_index("warpgroup")
        kv_head = lax.div(head, group)
        tokens = lambda n: pl.ds(n * CHUNK, CHUNK)
        slab = lambda s: pl.ds(s * SLAB if isinstance(s, int) else pl.multiple_of(s * SLAB, SLAB), SLAB)
        columns = lambda w: pl.ds((block * warpgroups + w) * VALUES, VALUES)

        def saved_state(n, s, columns):
            if save == 1:
                return states_ref.at[row, pl.ds(n * key_dim + s * SLAB, SLAB), head, columns]
            return states_ref.at[row, head, lax.div(n, save), slab(s), columns]

        def saved_scores(n):
            return scores_ref.at[row, tokens(n), head] if save == 1 else scores_ref.at[row, head, n]

        @pl.when(warpgroup == 0)
        def _copies():
            set_registers(REGISTERS[warpgroups][0], interpret)

            def chunk(n, _):
                p = lax.rem(n, 2)
                pl.when(n >= 2)(lambda: plgpu.barrier_wait(q_free.at[p]))
                for s in range(slabs):
                    for t, g_ref in enumerate(g_refs):
                        source = decay_source(g_ref, row, n, head, heads, s)
                        plgpu.copy_gmem_to_smem(source, g_s.at[p, s, t], full.at[p])
                plgpu.copy_gmem_to_smem(q_ref.at[row, tokens(n), head], q_s.at[p], full.at[p])
                pl.when(n >= 2)(lambda: plgpu.barrier_wait(kv_free.at[p]))
                plgpu.copy_gmem_to_smem(k_ref.at[row, tokens(n), kv_head], k_s.at[p], full.at[p])
                for w in range(warpgroups):
                    source = v_ref.at[row, tokens(n), kv_head, columns(w)]
                    plgpu.copy_gmem_to_smem(source, v_s.at[p, w], v_full.at[p])

            lax.fori_loop(0, chunks, chunk, None)
            # every completion of a barrier must be seen by whoever waits on it
            for n in range(max(0, chunks - 2), chunks):
                plgpu.barrier_wait(q_free.at[n % 2])
                plgpu.barrier_wait(kv_free.at[n % 2])

        @pl.when(warpgroup == 1)
        def _gates():
            set_registers(REGISTERS[warpgroups][1], interpret)
            plgpu.copy_gmem_to_smem(select_ref, select_s.at[0], constants_ready)
            plgpu.copy_gmem_to_smem(triangles_ref.at[SHIFTED], work_s.at[_SHIFT], constants_ready)
            exact_s[0] = exact_s[1] = jnp.int32(0)
            plgpu.barrier_wait(constants_ready)
            g_tiles = lambda p, s: [g_s.at[p, s, t] for t in range(terms)]
            nothing = zero_row()
            column = plgpu.broadcasted_iota(jnp.int32, (SLAB, 8), 1, layout=WGMMA)
            cell = lambda sums, index: jnp.sum(jnp.where(column == index, sums, 0.0), axis=1)

            def scaled_exp(x):
                """Return scale e^x, the scale in the exponent: e^x takes a product anyway, this a multiply-add."""
                return jnp.exp2(x * LOG2_E + math.log2(scale))

            def wait_for_scores(n):
                pl.when(n >= 1)(lambda: plgpu.barrier_wait(a_free))
                if save is not None:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            def put_scores(n, a, a_s, exact):
                a_s[...] = a.astype(BF16)
                plgpu.commit_smem()
                plgpu.barrier_arrive(a_ready)
                if save is None:
                    return

                @pl.when(block == 0)
                def _save_scores():
                    exact_ref[row, head, n] = jnp.int32(exact)
                    if exact:
                        plgpu.copy_smem_to_gmem(a_s, saved_scores(n))

            def bounded(loop):
                """Make a chunk, unless it is exact; say whether it is."""
                n, _, pending = loop
                p = lax.rem(n, 2)
                plgpu.barrier_wait(full.at[p])
                zero = unknown_zero(exact_s[p])
                a_s, shift_s, select = work_s.at[zero + _SCORES], work_s.at[zero + _SHIFT], select_s.at[zero]

                def products(accumulators):
                    for s, (sums, d) in enumerate(accumulators):
                        for term in g_tiles(p, s):
                            plgpu.wgmma(sums, term.T, select.T)
                            plgpu.wgmma(d, shift_s, term)
                    return [(sums[...], d[...]) for sums, d in accumulators]

                pair = plgpu.ACC((SLAB, 8), F32), plgpu.ACC((CHUNK, SLAB), F32)
                made = lax.optimization_barrier(pl.run_scoped(products, [pair] * slabs))
                after = []
                for s, (sums, _) in enumerate(made):
                    factors_s.at[p, 0, slab(s)][...] = jnp.exp(pending[s] + cell(sums, 0))
                    after.append(cell(sums, 1))
                exact_s[p] = exceeds_bound(*(sums for sums, _ in made), interpret=interpret).astype(jnp.int32)
                exact = exact_s[p]

                @pl.when(exact == 0)
                def _gate():
                    for s, (_, d) in enumerate(made):
                        q, k = q_s.at[p, :, slab(s)], k_s.at[p, :, slab(s)]
                        q[...] = (load(q) * scaled_exp(d)).astype(BF16)
                        k[...] = (load(k) * jnp.exp(-d)).astype(BF16)
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(ready.at[p])
                    a = matmul((q_s.at[p], k_s.at[p].T))
                    w, m = load(shift_s), MIDDLE + 1  # which knows what is causal, and costs no registers to keep
                    left, right = jnp.where(w[:, :m] > -0.5, a[:, :m], 0.0), jnp.where(w[:, m:] > 0.5, a[:, m:], 0.0)
                    wait_for_scores(n)
                    put_scores(n, jnp.concatenate([left, right], axis=1), a_s, 0)

                after = [jnp.where(exact > 0, old, new) for old, new in zip(pending, after, strict=True)]
                return jnp.where(exact > 0, n, n + 1), exact, tuple(after)

            def unbounded(n, pending):
                """Make a chunk for any gate."""
                p = lax.rem(n, 2)
                zero = unknown_zero(exact_s[p])
                a_s, w_s, select = work_s.at[zero + _SCORES], work_s.at[zero + _ANY], select_s.at[zero]
                for s in range(slabs):
                    clamp_log_decay(g_tiles(p, s))
                    sums = matmul(*((term.T, select.T) for term in g_tiles(p, s)), shape=(SLAB, 8))
                    before = jnp.exp(pending[s])
                    factors_s.at[p, 0, slab(s)][...] = before
                    factors_s.at[p, 1, slab(s)][...] = before * jnp.exp(cell(sums, 0) + cell(sums, 1))
                wait_for_scores(n)
                tiles = [(q_s.at[p, :, slab(s)], k_s.at[p, :, slab(s)], g_tiles(p, s)) for s in range(slabs)]
                a = exact_scores(tables_ref, zero, tiles, scale, (w_s, a_s, level_s)[: 1 + slabs])
                put_table(w_s, triangles_ref, zero + BEFORE)  # the transpose of AFTER; with the row itself UP_TO_HERE
                plgpu.commit_smem()
                for q, k, g in tiles:
                    up_to_here = matmul(*((w_s, term) for term in g)) + sum(load(term) for term in g)
                    q[...] = (load(q) * scaled_exp(up_to_here)).astype(BF16)
                    after = matmul(*((w_s.T, term) for term in g))
                    k[...] = (load(k) * jnp.exp(after)).astype(BF16)
                plgpu.commit_smem()
                plgpu.barrier_arrive(ready.at[p])
                put_scores(n, a, a_s, 1)

            def until_exact(loop):
                """Make chunks up to an exact one, and that one: apart, as its registers would slow the others."""
                n, pending = loop
                more = lambda loop: jnp.logical_and(loop[0] < chunks, loop[1] == 0)
                n, exact, pending = lax.while_loop(more, bounded, (n, jnp.int32(0), pending))
                pl.when(exact > 0)(lambda: unbounded(n, pending))
                return n + exact, tuple(jnp.where(exact > 0, nothing, x) for x in pending)

            start = jnp.int32(0), (nothing,) * slabs
            _, pending = lax.while_loop(lambda loop: loop[0] < chunks, until_exact, start)
            plgpu.barrier_wait(a_free)
            for s in range(slabs):
                factors_s.at[chunks % 2, 0, slab(s)][...] = jnp.exp(pending[s])
            plgpu.barrier_arrive(ready.at[chunks % 2])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup >= 2)
        def _values():
            set_registers(REGISTERS[warpgroups][2], interpret)
            w = warpgroup - 2
            mine = columns(w)
            join = lambda parts: jnp.concatenate(parts, axis=1) if slabs > 1 else parts[0]

            def scaled(state, s, p, index):
                factor = plgpu.load(factors_s.at[p, index, slab(s)], layout=COL, optimized=False)
                part = state[:, s * SLAB : (s + 1) * SLAB]
                return part * lax.broadcast_in_dim(factor, part.shape, [1])

            def chunk(n, state):
                p = lax.rem(n, 2)
                plgpu.barrier_wait(ready.at[p])
                exact = exact_s[p]
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last chunk's results

                def output(accumulator):
                    for s in range(slabs):
                        rounded = scaled(state, s, p, 0).astype(BF16)
                        left = left_operand(rounded, out_s.at[w], interpret)
                        plgpu.wgmma(accumulator, left, q_s.at[p, :, slab(s)].T)
                        plgpu.wgmma_wait(0)  # for the registers of the operand
                        for states_s in state_tiles:

                            @pl.when(lax.rem(n, save) == 0)
                            def _save_state(states_s=states_s, s=s, rounded=rounded):
                                states_s.at[w, s].T[...] = rounded
                                plgpu.commit_smem()
                                plgpu.copy_smem_to_gmem(states_s.at[w, s], saved_state(n, s, mine))

                    plgpu.barrier_wait(v_full.at[p])
                    plgpu.barrier_wait(a_ready)
                    plgpu.wgmma(accumulator, v_s.at[p, w].T, work_s.at[_SCORES].T)
                    return accumulator[...]

                out = lax.optimization_barrier(pl.run_scoped(output, plgpu.ACC((VALUES, CHUNK), F32)))
                plgpu.barrier_arrive(a_free)
                plgpu.barrier_arrive(q_free.at[p])
                out_s.at[w].T[...] = out.astype(BF16)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out_s.at[w], out_ref.at[row, tokens(n), head, mine])
                state = join([scaled(state, s, p, exact) for s in range(slabs)])
                state = add_matmul(state, (v_s.at[p, w].T, k_s.at[p]), interpret=interpret)
                plgpu.barrier_arrive(kv_free.at[p])
                return state

            if initial_ref is None:
                state = zeros((VALUES, key_dim))
            else:
                state = load_turned_state(initial_ref.at[row, head, :, mine], interpret)
            state = lax.fori_loop(0, chunks, chunk, state)
            plgpu.barrier_wait(ready.at[chunks % 2])
            if final_ref is not None:
                final = join([scaled(state, s, chunks % 2, 0) for s in range(slabs)])
                final_ref.at[row, head, :, mine].T[...] = turned(final, interpret)
            plgpu.wait_smem_to_gmem(0)

        # no warpgroup leaves while another still issues matrix products
        plgpu.barrier_arrive(done)
        plgpu.barrier_wait(done)

    scratch = [
        tile(2, CHUNK, key_dim),
        tile(2, CHUNK, key_dim),
        tile(2, slabs, terms, CHUNK, SLAB),
        tile(2, warpgroups, CHUNK, VALUES),
        tile(3, CHUNK, CHUNK),
        tile(warpgroups, CHUNK, VALUES),
        tile(CHUNK, SLAB),
        tile(1, 8, CHUNK),
        plgpu.SMEM((2, 2, key_dim), F32),
        plgpu.SMEM((2,), jnp.int32),
        *([tile(warpgroups, slabs, SLAB, VALUES)] if save is not None else []),
        barrier(2 + slabs * terms, 2),  # full
        barrier(warpgroups, 2),  # v_full
        barrier(1, 2),  # ready
        barrier(1),  # a_ready
        barrier(warpgroups),  # a_free
        barrier(warpgroups, 2),  # q_free
        barrier(warpgroups, 2),  # kv_free
        barrier(2),  # constants_ready
        barrier(2 + warpgroups),  # done
    ]
    run = kernel(
        body,
        name="gla_forward",
        interpret=interpret,
        warpgroups=2 + warpgroups,
        out_type=out_type,
        grid=(batch, heads, value_dim // value_tile),  # those that share q, k and g side by side
        grid_names=("b", "h", "v"),
        scratch_types=scratch,
    )
    inputs = [q, k, v, *constants(), *g]
    if initial_state is not None:
        inputs.append(initial_state)
    out, *others = run(*inputs)
    return out, others.pop(0) if ends else None, *others
