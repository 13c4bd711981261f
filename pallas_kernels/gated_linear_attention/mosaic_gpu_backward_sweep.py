"""The backward kernel on Hopper for K = V = 64, and the algebra of all; see `mosaic_gpu_chunk` for the letters.

With dR' the gradient of the next chunk's R (of the final state at the end) and M = tril(do v^T), a bounded chunk has

    dU = e^{G_last - G_m + G_m(next)} dR',   dR = dU + q'^T do,   dv = A^T do + k' dU
    X  = do R^T + M k',   Y_U = v dU^T,   Y_M = M^T q',   dq = scale e^D X,   dk = e^-D (Y_U + Y_M)
    dg_j = sum_{i >= j} P_i + sum_{i < j} Q_i + r,   P = q' X - k' Y_M,   Q = k' Y_U,   r = sum over V of dU R.

The parts of M telescope in P, which therefore multiplies the rounded operands and goes through its triangular product
as two bfloat16 terms. In an exact chunk dU is not decayed by the chunk, dR = e^{G_last} dU + q'^T do, r has a factor
e^{G_last}, and the parts of M are summed by levels.

`backward_sweep` does all of it in one pass from the last chunk to the first. Other sizes take two kernels:
`backward_state`, the serial part, and `backward_inputs`, all chunks at once.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gated_linear_attention.mosaic_gpu_chunk import (
    AFTER,
    BEFORE,
    BF16,
    CHUNK,
    COL,
    CONSUMER,
    F32,
    FROM_HERE,
    PRODUCER,
    SHIFTED,
    SLAB,
    UP_TO_HERE,
    along_rows,
    barrier,
    choose,
    clamp_log_decay,
    constants,
    decay_source,
    exact_gradient,
    halves,
    kernel,
    load,
    load_state,
    matmul,
    put_split,
    put_table,
    result,
    set_registers,
    tile,
    unknown_zero,
    unless,
    when,
    zero_row,
    zeros,
)

# Where the tiles of one chunk begin in `tiles_s`: q', k', A, M, dU, dq and dk, then dv, then the three parts of dg.
_DV, _PARTS, _TILES = 7, 8, 11


def backward_sweep(q, k, v, g, d_out, states, exact, scores, d_final, *, scale, initial, interpret=False):
    """Run the whole backward pass in one kernel, K = V = 64, one term of g.

    Args:
        q, k, v, g: as in `forward`.
        d_out: [B, T, H, V] bfloat16.
        states, exact, scores: what the forward saved, of all chunks. Where a row is whole chunks, dk and dq take the
            place of states and scores in memory.
        d_final: [B, H, K, V] float32, or None for zeros.
        scale: of the query.
        initial: return the gradient of the initial state.
        interpret: run in the interpreter.

    Returns:
        dq, dk, dv, dg: a head of the query each, [B, T, H, 64] bfloat16; d_initial [B, H, K, V] float32 or
        None.
    """
    batch, time, heads, key_dim = q.shape
    group, chunks, stages = heads // k.shape[2], pl.cdiv(time, CHUNK), 2
    (g,) = g
    assert key_dim == v.shape[-1] == SLAB, (key_dim, v.shape)
    shape = (SLAB, SLAB)
    # A chunk's state and scores are as large as its dk and dq, and read before those are written. Kernels take no
    # references whose type varies over manual mesh axes.
    in_place = time % CHUNK == 0 and not jax.typeof(q).manual_axis_type.varying

    def body(*all_refs):
        refs = list(all_refs)
        take: Any = lambda count, present=True: [refs.pop(0) if present else None for _ in range(count)]
        q_ref, k_ref, v_ref, g_ref, d_out_ref, exact_ref, any_ref, select_ref, triangles_ref, tables_ref = take(10)
        (d_final_ref,) = take(1, d_final is not None)
        scores_ref, states_ref = take(2)
        dq_ref, dk_ref = (scores_ref, states_ref) if in_place else take(2)
        dv_ref, dg_ref = take(2)
        (d_initial_ref,) = take(1, initial)
        (
            q_s, k_s, v_s, g_s, d_out_s, r_s, tiles_s, select_s, triangles_s, dot_s, exact_s,
            full, free, gated_ready, a_ready, gated_free, du_ready, du_free, dot_ready, dot_free, scores_ready,
            clamped, select_ready, triangles_ready, done,
        ) = refs  # fmt: skip
        head, row, warpgroup = lax.axis_index("h"), lax.axis_index("b"), lax.axis_index("warpgroup")
        kv_head = lax.div(head, group)
        tokens = lambda n: pl.ds(n * CHUNK, CHUNK)

        @pl.when(warpgroup == 2)
        def _copies():
            set_registers(PRODUCER, interpret)

            def chunk(i, _):
                n, slot = chunks - 1 - i, lax.rem(i, stages)
                pl.when(i >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
                plgpu.copy_gmem_to_smem(decay_source(g_ref, row, n, head, heads, 0), g_s.at[slot], full.at[slot])
                plgpu.copy_gmem_to_smem(q_ref.at[row, tokens(n), head], q_s.at[slot], full.at[slot])
                plgpu.copy_gmem_to_smem(k_ref.at[row, tokens(n), kv_head], k_s.at[slot], full.at[slot])
                plgpu.copy_gmem_to_smem(d_out_ref.at[row, tokens(n), head], d_out_s.at[slot], full.at[slot])
                plgpu.copy_gmem_to_smem(v_ref.at[row, tokens(n), kv_head], v_s.at[slot], full.at[slot])
                plgpu.copy_gmem_to_smem(states_ref.at[row, tokens(n), head], r_s.at[slot], full.at[slot])
                exact_s[slot] = exact_ref[row, head, n]
                plgpu.barrier_arrive(full.at[slot])

            lax.fori_loop(0, chunks, chunk, None)
            for i in range(chunks - min(stages, chunks), chunks):
                plgpu.barrier_wait(free.at[i % stages])

        def clamp(slot):
            pl.when(warpgroup == 0)(lambda: clamp_log_decay([g_s.at[slot]]))
            plgpu.barrier_arrive(clamped)
            plgpu.barrier_wait(clamped)

        def walk(chunk, carry):
            """Walk the chunks: by the lean code if none of the row is exact."""
            careful_from = jnp.where(any_ref[row, head] > 0, 0, chunks)
            carry = lax.fori_loop(0, careful_from, functools.partial(chunk, careful=False), carry)
            return lax.fori_loop(careful_from, chunks, functools.partial(chunk, careful=True), carry)

        @pl.when(warpgroup == 0)
        def _inputs():
            set_registers(CONSUMER, interpret)
            plgpu.copy_gmem_to_smem(triangles_ref.at[pl.ds(0, 4)], triangles_s, triangles_ready)
            plgpu.barrier_wait(triangles_ready)

            def chunk(i, carry, careful):
                n, slot = chunks - 1 - i, lax.rem(i, stages)
                plgpu.barrier_wait(full.at[slot])
                q, k, v, g, d_out, r = (x.at[slot] for x in (q_s, k_s, v_s, g_s, d_out_s, r_s))
                exact = exact_s[slot] > 0 if careful else None
                when(exact, lambda: clamp(slot))
                zero = unknown_zero(exact_s[slot])
                gated_q_s, gated_k_s, a_s, m_s, du_s, dq_s, dk_s = (tiles_s.at[zero + i] for i in range(7))
                high, low, third = (tiles_s.at[zero + _PARTS + i] for i in range(3))
                triangle = lambda index: triangles_s.at[zero + index]
                lower = lambda x: jnp.where(load(triangle(UP_TO_HERE)) > 0, x, 0.0).astype(BF16)
                shifted = lambda: matmul((triangle(SHIFTED), g))
                d = shifted()
                gated_q = (load(q) * (jnp.exp(d) * scale)).astype(BF16)
                gated_k = (load(k) * jnp.exp(-d)).astype(BF16)
                pl.when(i >= 1)(lambda: plgpu.barrier_wait(gated_free))
                gated_q_s[...] = gated_q
                gated_k_s[...] = gated_k

                def gate_exactly():
                    plgpu.copy_gmem_to_smem(scores_ref.at[row, tokens(n), head], a_s, scores_ready)
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    put_table(high, triangles_ref, zero + AFTER)
                    plgpu.commit_smem()
                    gated_k_s[...] = (load(k) * jnp.exp(matmul((high, g)))).astype(BF16)
                    to_here = matmul((triangle(UP_TO_HERE), g))
                    gated_q_s[...] = (load(q) * (jnp.exp(to_here) * scale)).astype(BF16)
                    plgpu.barrier_wait(scores_ready)

                when(exact, gate_exactly)
                plgpu.commit_smem()
                plgpu.barrier_arrive(gated_ready)
                a = matmul((gated_q_s, gated_k_s.T))
                unless(exact, lambda: a_s.__setitem__(..., lower(a)))
                m_s[...] = lower(matmul((d_out, v.T)))
                plgpu.commit_smem()
                plgpu.barrier_arrive(a_ready)
                x = matmul((d_out, r.T), (m_s, gated_k_s))
                d = shifted()  # again, and the gated tiles from shared memory again: fewer live registers
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                dq_s[...] = (x * (jnp.exp(d) * scale)).astype(BF16)
                p = load(gated_q_s) * x
                y_m = matmul((m_s.T, gated_q_s))
                put_split(p - load(gated_k_s) * y_m, high, low)
                plgpu.barrier_wait(du_ready)
                y_u = matmul((v, du_s.T))
                d = shifted()

                unless(exact, lambda: plgpu.barrier_arrive(du_free))
                unless(exact, lambda: plgpu.barrier_arrive(free.at[slot]))
                third[...] = (load(gated_k_s) * y_u).astype(BF16)
                dk_s[...] = ((y_u + y_m) * jnp.exp(-d)).astype(BF16)

                def differentiate_exactly():
                    intra = lambda **side: exact_gradient(tables_ref, zero, m_s, q, k, [g], scale, (high, low), **side)
                    dk, product = intra(of_query=False)
                    put_table(high, triangles_ref, zero + AFTER)
                    plgpu.commit_smem()
                    dk_s[...] = (dk + jnp.exp(matmul((high, g))) * matmul((v, du_s.T))).astype(BF16)
                    dq, product = intra(of_query=True, product=-product)
                    x = matmul((d_out, r.T))
                    dq_s[...] = (dq + jnp.exp(matmul((triangle(UP_TO_HERE), g))) * scale * x).astype(BF16)
                    put_split(product + load(gated_q_s) * x, high, low)
                    third[...] = (load(gated_k_s) * matmul((v, du_s.T))).astype(BF16)
                    plgpu.barrier_arrive(du_free)
                    plgpu.barrier_arrive(free.at[slot])

                when(exact, differentiate_exactly)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(dq_s, dq_ref.at[row, tokens(n), head])
                plgpu.copy_smem_to_gmem(dk_s, dk_ref.at[row, tokens(n), head])
                from_here = triangle(FROM_HERE)
                dg = matmul((from_here, high), (from_here, low), (triangle(BEFORE), third))
                plgpu.barrier_wait(dot_ready)
                dot = plgpu.load(dot_s, layout=COL, optimized=False)
                plgpu.barrier_arrive(dot_free)
                high[...] = (dg + lax.broadcast_in_dim(dot, shape, [1])).astype(BF16)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(high, dg_ref.at[row, tokens(n), head])
                return carry

            walk(chunk, ())
            plgpu.barrier_wait(gated_free)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == 1)
        def _state():
            set_registers(CONSUMER, interpret)
            plgpu.copy_gmem_to_smem(select_ref, select_s.at[0], select_ready)
            plgpu.barrier_wait(select_ready)

            def chunk(i, carry, careful):
                dr, next_middle = carry
                n, slot = chunks - 1 - i, lax.rem(i, stages)
                plgpu.barrier_wait(full.at[slot])
                exact = exact_s[slot] > 0 if careful else None
                when(exact, lambda: clamp(slot))
                zero = unknown_zero(exact_s[slot])
                gated_q_s, gated_k_s, a_s, _, du_s = (tiles_s.at[zero + i] for i in range(5))
                dv_s = tiles_s.at[zero + _DV]
                middle, rest = halves([g_s.at[slot]], select_s.at[zero])
                decay = choose(exact, lambda m, _: m, lambda m, rest: m + rest, next_middle, rest)
                du = dr * along_rows(jnp.exp(decay), shape)
                pl.when(i >= 1)(lambda: plgpu.barrier_wait(du_free))
                du_s[...] = du.astype(BF16)
                plgpu.commit_smem()
                plgpu.barrier_arrive(du_ready)
                pl.when(i >= 1)(lambda: plgpu.barrier_wait(dot_free))
                dot = jnp.sum(load(r_s.at[slot]) * du, axis=1)
                by_chunk = jnp.exp(middle + rest)
                dot_s[...] = choose(exact, lambda x, y: x * y, lambda x, _: x, dot, by_chunk)
                plgpu.barrier_arrive(dot_ready)
                du = choose(exact, lambda x, y: x * along_rows(y, shape), lambda x, _: x, du, by_chunk)
                middle = choose(exact, lambda _: zero_row(), lambda x: x, middle)
                plgpu.barrier_wait(gated_ready)
                dr = du + matmul((gated_q_s.T, d_out_s.at[slot]))
                plgpu.barrier_wait(a_ready)
                dv = matmul((a_s.T, d_out_s.at[slot]), (gated_k_s, du_s))
                plgpu.barrier_arrive(gated_free)
                plgpu.barrier_arrive(free.at[slot])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                dv_s[...] = dv.astype(BF16)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(dv_s, dv_ref.at[row, tokens(n), head])
                return dr, middle

            start = zeros(shape) if d_final_ref is None else load_state(d_final_ref.at[row, head])
            dr, middle = walk(chunk, (start, zero_row()))
            if d_initial_ref is not None:
                d_initial_ref.at[row, head][...] = dr * along_rows(jnp.exp(middle), shape)
            plgpu.barrier_wait(du_free)
            plgpu.barrier_wait(dot_free)
            plgpu.wait_smem_to_gmem(0)

        # no warpgroup leaves while another still issues matrix products
        plgpu.barrier_arrive(done)
        plgpu.barrier_wait(done)

    out_type = [result(q.shape, BF16, q)] * (2 if in_place else 4)
    if initial:
        out_type.append(result((batch, heads, key_dim, SLAB), F32, q))
    scratch = [tile(stages, CHUNK, SLAB)] * 6 + [tile(_TILES, CHUNK, SLAB)]
    scratch += [tile(1, 8, CHUNK), tile(4, CHUNK, CHUNK), plgpu.SMEM((SLAB,), F32), plgpu.SMEM((stages,), jnp.int32)]
    scratch += [barrier(7, stages), barrier(2, stages)] + [barrier(1)] * 8
    scratch += [barrier(2), barrier(1), barrier(1), barrier(3)]
    run = kernel(
        body,
        name="gla_backward_sweep",
        interpret=interpret,
        changes=2 if in_place else 0,
        out_type=out_type,
        grid=(heads, batch),
        grid_names=("h", "b"),
        scratch_types=scratch,
    )
    inputs = [q, k, v, g, d_out, exact, jnp.max(exact, axis=2), *constants(), *([] if d_final is None else [d_final])]
    dq, dk, dv, dg, *d_initial = run(*inputs, scores, states)
    return dq, dk, dv, dg, d_initial[0] if initial else None
