"""The serial part of the backward pass of wide heads on Hopper; see `mosaic_gpu_backward_sweep` for the algebra.

One thread block per (batch row, head, tile of value columns) walks the chunks from the last to the first. Warpgroup 0
makes the gated tiles and the scores; warpgroup 1 holds dR in float32 registers; warpgroup 2 drives the copy engine;
warpgroup 3 makes dv, while warpgroup 0 is at the next chunk.
"""

import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gated_linear_attention.mosaic_gpu_chunk import (
    AFTER,
    BF16,
    CHUNK,
    F32,
    LOG2_E,
    PRODUCER,
    SHIFTED,
    SLAB,
    UP_TO_HERE,
    add_matmul,
    along_rows,
    barrier,
    clamp_log_decay,
    constants,
    decay_source,
    halves,
    kernel,
    load,
    load_state,
    matmul,
    result,
    set_registers,
    tile,
    zero_row,
    zeros,
)

_GATES, _STATE, _VALUES = 152, 200, 136  # registers a thread; with PRODUCER, 4 x 128 in all


def backward_state(q, k, g, d_out, exact, scores, d_final, *, scale, value_tile, initial, interpret=False):
    """Run the serial part of the backward pass.

    Args:
        q, k, g: as in `forward`.
        d_out: [B, T, H, V] bfloat16.
        exact, scores: what the forward saved; the scores of exact chunks are enough.
        d_final: [B, H, K, V] float32, or None for zeros.
        scale: of the query.
        value_tile: value columns of a thread block, 64 or 128.
        initial: return the gradient of the initial state.
        interpret: run in the interpreter.

    Returns:
        du [B, H, ceil(N / 2), K, V] bfloat16, dU of odd chunks (a row of odd length ends with an empty one); dv, a head
        of the query each, [B, T, H, V] bfloat16; d_initial [B, H, K, V] float32 or None.
    """
    batch, time, heads, key_dim = q.shape
    value_dim, group, terms = d_out.shape[-1], heads // k.shape[2], len(g)
    chunks, slabs = pl.cdiv(time, CHUNK), key_dim // SLAB
    stages = 3 if value_tile == 2 * SLAB and terms == 1 else 2  # one more where it fits and pays
    shape, log_scale = (SLAB, value_tile), math.log2(scale)

    def body(q_ref, k_ref, d_out_ref, exact_ref, scores_ref, select_ref, triangles_ref, *all_refs):
        refs = list(all_refs)
        take: Any = lambda count, present=True: [refs.pop(0) if present else None for _ in range(count)]
        g_refs = take(terms)
        (d_final_ref,) = take(1, d_final is not None)
        du_ref, dv_ref = take(2)
        (d_initial_ref,) = take(1, initial)
        (
            q_s, k_s, g_s, d_out_s, a_s, gated_q_s, gated_k_s, du_s, dv_s, select_s, triangles_s, exact_s,
            full, free, chunk_full, chunk_free, gated_ready, gated_free, du_ready, du_free, clamped,
            select_ready, triangles_ready, scores_ready, a_ready, done,
        ) = refs  # fmt: skip
        value_index, head, row = lax.axis_index("v"), lax.axis_index("h"), lax.axis_index("b")
        warpgroup = lax.axis_index("warpgroup")
        kv_head = lax.div(head, group)
        columns, tokens = pl.ds(value_index * value_tile, value_tile), lambda n: pl.ds(n * CHUNK, CHUNK)
        rows = lambda s: pl.ds(s * SLAB, SLAB)

        def clamp(exact, slot):
            @pl.when(exact)
            def _():
                pl.when(warpgroup == 0)(lambda: clamp_log_decay([g_s.at[slot, t] for t in range(terms)]))
                plgpu.barrier_arrive(clamped)
                plgpu.barrier_wait(clamped)

        @pl.when(warpgroup == 0)
        def _gates():
            set_registers(_GATES, interpret)
            for at, index in enumerate((SHIFTED, UP_TO_HERE, AFTER)):
                plgpu.copy_gmem_to_smem(triangles_ref.at[index], triangles_s.at[at], triangles_ready)
            plgpu.barrier_wait(triangles_ready)

            def chunk(i, _):
                n, even = chunks - 1 - i, lax.rem(i, 2)
                plgpu.barrier_wait(chunk_full.at[even])
                exact = exact_s[even] > 0

                def gates(s, _):  # a loop: unrolled addresses are hoisted into registers
                    slot = lax.rem(i * slabs + s, stages)
                    plgpu.barrier_wait(full.at[slot])
                    clamp(exact, slot)
                    exponents = lambda at: matmul(*((triangles_s.at[at], g_s.at[slot, t]) for t in range(terms)))
                    d = exponents(0) * LOG2_E
                    gated_q = (load(q_s.at[slot]) * jnp.exp2(d + log_scale)).astype(BF16)
                    gated_k = (load(k_s.at[slot]) * jnp.exp2(-d)).astype(BF16)
                    pl.when(i >= 1)(lambda: plgpu.barrier_wait(gated_free.at[s]))
                    gated_q_s.at[s][...] = gated_q
                    gated_k_s.at[s][...] = gated_k

                    @pl.when(exact)
                    def _again():
                        to_here = jnp.exp2(exponents(1) * LOG2_E + log_scale)
                        gated_q_s.at[s][...] = (load(q_s.at[slot]) * to_here).astype(BF16)
                        gated_k_s.at[s][...] = (load(k_s.at[slot]) * jnp.exp(exponents(2))).astype(BF16)

                    plgpu.barrier_arrive(free.at[slot])
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(gated_ready.at[s])

                lax.fori_loop(0, slabs, gates, None)

                @pl.when(exact)
                def _saved_scores():
                    plgpu.copy_gmem_to_smem(scores_ref.at[row, head, n], a_s, scores_ready)
                    plgpu.barrier_wait(scores_ready)

                @pl.when(jnp.logical_not(exact))
                def _scores():
                    a = matmul(*((gated_q_s.at[s], gated_k_s.at[s].T) for s in range(slabs)))
                    a_s[...] = jnp.where(load(triangles_s.at[1]) > 0, a, 0.0).astype(BF16)
                    plgpu.commit_smem()

                plgpu.barrier_arrive(a_ready)

            lax.fori_loop(0, chunks, chunk, None)
            for s in range(slabs):
                plgpu.barrier_wait(gated_free.at[s])

        @pl.when(warpgroup == 3)
        def _values():
            set_registers(_VALUES, interpret)

            def chunk(i, _):
                n, even = chunks - 1 - i, lax.rem(i, 2)
                plgpu.barrier_wait(chunk_full.at[even])
                plgpu.barrier_wait(a_ready)
                plgpu.barrier_wait(du_ready)
                keys = ((gated_k_s.at[s], du_s.at[rows(s)]) for s in range(slabs))
                dv = matmul((a_s.T, d_out_s.at[even]), *keys, shape=(CHUNK, value_tile))
                plgpu.barrier_arrive(du_free)
                for s in range(slabs):
                    plgpu.barrier_arrive(gated_free.at[s])
                plgpu.barrier_arrive(chunk_free.at[even])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                dv_s[...] = dv.astype(BF16)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(dv_s, dv_ref.at[row, tokens(n), head, columns])

            lax.fori_loop(0, chunks, chunk, None)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == 1)
        def _state():
            set_registers(_STATE, interpret)
            plgpu.copy_gmem_to_smem(select_ref, select_s, select_ready)
            plgpu.barrier_wait(select_ready)

            def write_du(n):
                plgpu.copy_smem_to_gmem(du_s, du_ref.at[row, head, lax.div(n, 2), :, columns])

            def chunk(i, carry):
                state, next_middle, n, even = list(carry[0]), list(carry[1]), chunks - 1 - i, lax.rem(i, 2)
                pl.when(i >= 1)(lambda: plgpu.barrier_wait(du_free))
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_wait(chunk_full.at[even])
                exact = exact_s[even] > 0
                for s in range(slabs):
                    slot = lax.rem(i * slabs + s, stages)
                    plgpu.barrier_wait(full.at[slot])
                    clamp(exact, slot)
                    middle, rest = halves([g_s.at[slot, t] for t in range(terms)], select_s)
                    plgpu.barrier_arrive(free.at[slot])
                    decay = lax.cond(exact, lambda m, _: m, lambda m, rest: m + rest, next_middle[s], rest)
                    du = state[s] * along_rows(jnp.exp(decay), shape)
                    du_s.at[rows(s)][...] = du.astype(BF16)
                    state[s], next_middle[s] = lax.cond(
                        exact,
                        lambda du, m, rest: (du * along_rows(jnp.exp(m + rest), shape), zero_row()),
                        lambda du, m, _: (du, m),
                        *(du, middle, rest),
                    )
                plgpu.commit_smem()
                plgpu.barrier_arrive(du_ready)
                pl.when(lax.rem(n, 2) == 1)(lambda: write_du(n))
                for s in range(slabs):
                    plgpu.barrier_wait(gated_ready.at[s])
                    state[s] = add_matmul(state[s], (gated_q_s.at[s].T, d_out_s.at[even]), interpret=interpret)
                    plgpu.barrier_arrive(gated_free.at[s])
                plgpu.barrier_arrive(chunk_free.at[even])
                return tuple(state), tuple(next_middle)

            def final(s):
                return zeros(shape) if d_final_ref is None else load_state(d_final_ref.at[row, head, rows(s), columns])

            start = tuple(final(s) for s in range(slabs)), (zero_row(),) * slabs
            if chunks % 2:
                for s in range(slabs):
                    du_s.at[rows(s)][...] = start[0][s].astype(BF16)
                plgpu.commit_smem()
                write_du(chunks)
            state, middle = lax.fori_loop(0, chunks, chunk, start)
            for s in range(slabs if d_initial_ref is not None else 0):
                d_initial_ref.at[row, head, rows(s), columns][...] = state[s] * along_rows(jnp.exp(middle[s]), shape)
            plgpu.barrier_wait(du_free)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == 2)
        def _copies():
            set_registers(PRODUCER, interpret)

            def chunk(i, _):
                n, even = chunks - 1 - i, lax.rem(i, 2)
                pl.when(i >= 2)(lambda: plgpu.barrier_wait(chunk_free.at[even]))
                plgpu.copy_gmem_to_smem(
                    d_out_ref.at[row, tokens(n), head, columns], d_out_s.at[even], chunk_full.at[even]
                )
                exact_s[even] = exact_ref[row, head, n]
                plgpu.barrier_arrive(chunk_full.at[even])

                def slab(s, _):
                    j = i * slabs + s
                    slot = lax.rem(j, stages)
                    pl.when(j >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
                    plgpu.copy_gmem_to_smem(q_ref.at[row, tokens(n), head, rows(s)], q_s.at[slot], full.at[slot])
                    plgpu.copy_gmem_to_smem(k_ref.at[row, tokens(n), kv_head, rows(s)], k_s.at[slot], full.at[slot])
                    for t, g_ref in enumerate(g_refs):
                        source = decay_source(g_ref, row, n, head, heads, s)
                        plgpu.copy_gmem_to_smem(source, g_s.at[slot, t], full.at[slot])

                lax.fori_loop(0, slabs, slab, None)

            lax.fori_loop(0, chunks, chunk, None)
            total = chunks * slabs
            for i in range(total - min(stages, total), total):
                plgpu.barrier_wait(free.at[i % stages])
            for i in range(chunks - min(2, chunks), chunks):
                plgpu.barrier_wait(chunk_free.at[i % 2])

        # no warpgroup leaves while another still issues matrix products
        plgpu.barrier_arrive(done)
        plgpu.barrier_wait(done)

    scratch = [tile(stages, CHUNK, SLAB)] * 2 + [tile(stages, terms, CHUNK, SLAB), tile(2, CHUNK, value_tile)]
    scratch += [tile(CHUNK, CHUNK)] + [tile(slabs, CHUNK, SLAB)] * 2 + [tile(key_dim, value_tile)]
    scratch += [tile(CHUNK, value_tile), tile(8, CHUNK), tile(3, CHUNK, CHUNK), plgpu.SMEM((2,), jnp.int32)]
    scratch += [barrier(2 + terms, stages), barrier(2, stages), barrier(2, 2), barrier(2, 2)]
    scratch += [barrier(1, slabs), barrier(2, slabs), barrier(1), barrier(1), barrier(2)]
    scratch += [barrier(1), barrier(3), barrier(1), barrier(1), barrier(4)]
    run = kernel(
        body,
        name="gla_backward_state",
        interpret=interpret,
        warpgroups=4,
        out_type=[
            result((batch, heads, pl.cdiv(chunks, 2), key_dim, value_dim), BF16, q),
            result(d_out.shape, BF16, q),
            *([result((batch, heads, key_dim, value_dim), F32, q)] if initial else []),
        ],
        grid=(batch, heads, value_dim // value_tile),  # those that share q, k and g side by side
        grid_names=("b", "h", "v"),
        scratch_types=scratch,
    )
    select, triangles, _ = constants()
    inputs = [q, k, d_out, exact, scores, select, triangles, *g, *([] if d_final is None else [d_final])]
    du, dv, *d_initial = run(*inputs)
    return du, dv, d_initial[0] if initial else None
