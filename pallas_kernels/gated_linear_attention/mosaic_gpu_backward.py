"""The backward kernels on Hopper; see `mosaic_gpu_chunk` for the forward's algebra and its letters.

With dR' the gradient of the next chunk's R (of the final state at the end) and M = tril(do v^T), a bounded chunk has

    dU = e^{G_last - G_m + G_m(next)} dR',   dR = dU + q'^T do,   dv = A^T do + k' dU
    X  = do R^T + M k',   Y_U = v dU^T,   Y_M = M^T q',   dq = scale e^D X,   dk = e^-D (Y_U + Y_M)
    dg_j = sum_{i >= j} P_i + sum_{i < j} Q_i + r,   P = q' X - k' Y_M,   Q = k' Y_U,   r = sum over V of dU R.

The parts of M telescope in P, which therefore multiplies the rounded operands and goes through its triangular product
as two bfloat16 terms. In an exact chunk dU is not decayed by the chunk, dR = e^{G_last} dU + q'^T do, r has a factor
e^{G_last}, and the parts of M are summed by levels.

`backward_sweep` does all of it in one pass from the last chunk to the first, for K = V = 64. Other sizes take two
kernels: `backward_state`, the serial part, writes dU and dv; `backward_inputs` does all chunks at once.
"""

import functools

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
    F32,
    FROM_HERE,
    ROW,
    SHIFTED,
    SLAB,
    UP_TO_HERE,
    WGMMA,
    add_matmul,
    along_rows,
    barrier,
    choose,
    clamp_log_decay,
    constants,
    decay_source,
    exact_gradient,
    kernel,
    load,
    matmul,
    result,
    tile,
    unless,
    when,
)

_PRODUCER, _CONSUMER = 24, 240  # registers a thread; 3 x 168 in all


def _registers(count, interpret):
    if not interpret:
        plgpu.set_max_registers(count, action="decrease" if count == _PRODUCER else "increase")


def _halves(g, select):
    """Return the sums of g up to the middle row and after it, a value a key channel."""
    sums = matmul(*((term.T, select.T) for term in g), shape=(SLAB, 8))
    column = plgpu.broadcasted_iota(jnp.int32, (SLAB, 8), 1, layout=WGMMA)
    return tuple(jnp.sum(jnp.where(column == c, sums, 0.0), axis=1) for c in range(2))


def _put_split(x, high, low):
    """Write float32 registers as the sum of two bfloat16 tiles."""
    rounded = x.astype(BF16)
    high[...] = rounded
    low[...] = (x - rounded.astype(F32)).astype(BF16)


def _put_table(buffer, tables, index):
    buffer[...] = plgpu.load(tables.at[index], layout=WGMMA, optimized=False)


def _zero_row():
    return plgpu.layout_cast(jnp.zeros((SLAB,), F32), ROW)


def backward_sweep(q, k, v, g, d_out, states, exact, scores, d_final, *, scale, interpret=False):
    """Run the whole backward pass in one kernel, K = V = 64, one term of g.

    Args:
        q, k, v, g: as in `forward`.
        d_out: [B, T, H, V] bfloat16.
        states, exact, scores: what the forward saved; the scores of exact chunks are enough.
        d_final: [B, H, K, V] float32.
        scale: of the query.
        interpret: run in the interpreter.

    Returns:
        dq, dk, dv, dg: a head of the query each, [B, T, H, 64] bfloat16; d_initial [B, H, K, V] float32.
    """
    batch, time, heads, key_dim = q.shape
    group, chunks, stages = heads // k.shape[2], pl.cdiv(time, CHUNK), 2
    (g,) = g
    assert key_dim == v.shape[-1] == SLAB, (key_dim, v.shape)
    shape = (SLAB, SLAB)

    def body(
        q_ref, k_ref, v_ref, g_ref, d_out_ref, states_ref, exact_ref, any_ref, scores_ref, d_final_ref, select_ref,
        triangles_ref, tables_ref, dq_ref, dk_ref, dv_ref, dg_ref, d_initial_ref,
        q_s, k_s, v_s, g_s, d_out_s, r_s, gated_q_s, gated_k_s, a_s, m_s, du_s, p_s, dq_s, dk_s, dv_s,
        select_s, triangles_s, dot_s, exact_s,
        full, free, gated_ready, a_ready, gated_free, du_ready, du_free, dot_ready, dot_free, scores_ready, clamped,
        select_ready, triangles_ready, done,
    ):  # fmt: skip
        head, row, warpgroup = lax.axis_index("h"), lax.axis_index("b"), lax.axis_index("warpgroup")
        kv_head = lax.div(head, group)
        tokens = lambda n: pl.ds(n * CHUNK, CHUNK)

        @pl.when(warpgroup == 2)
        def _copies():
            _registers(_PRODUCER, interpret)

            def chunk(i, _):
                n, slot = chunks - 1 - i, lax.rem(i, stages)
                pl.when(i >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
                plgpu.copy_gmem_to_smem(decay_source(g_ref, row, n, head, heads, 0), g_s.at[slot], full.at[slot])
                plgpu.copy_gmem_to_smem(q_ref.at[row, tokens(n), head], q_s.at[slot], full.at[slot])
                plgpu.copy_gmem_to_smem(k_ref.at[row, tokens(n), kv_head], k_s.at[slot], full.at[slot])
                plgpu.copy_gmem_to_smem(d_out_ref.at[row, tokens(n), head], d_out_s.at[slot], full.at[slot])
                plgpu.copy_gmem_to_smem(v_ref.at[row, tokens(n), kv_head], v_s.at[slot], full.at[slot])
                plgpu.copy_gmem_to_smem(states_ref.at[row, head, n], r_s.at[slot], full.at[slot])
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
            _registers(_CONSUMER, interpret)
            plgpu.copy_gmem_to_smem(triangles_ref.at[pl.ds(0, 4)], triangles_s, triangles_ready)
            plgpu.barrier_wait(triangles_ready)
            # the mask is read from shared memory: index arithmetic would be hoisted out of the loop, into registers
            lower = lambda x: jnp.where(load(triangles_s.at[UP_TO_HERE]) > 0, x, 0.0).astype(BF16)

            def chunk(i, carry, careful):
                n, slot = chunks - 1 - i, lax.rem(i, stages)
                plgpu.barrier_wait(full.at[slot])
                q, k, v, g, d_out, r = (x.at[slot] for x in (q_s, k_s, v_s, g_s, d_out_s, r_s))
                exact = exact_s[slot] > 0 if careful else None
                when(exact, lambda: clamp(slot))
                shifted = lambda: matmul((triangles_s.at[SHIFTED], g))
                d = shifted()
                gated_q = (load(q) * (jnp.exp(d) * scale)).astype(BF16)
                gated_k = (load(k) * jnp.exp(-d)).astype(BF16)
                pl.when(i >= 1)(lambda: plgpu.barrier_wait(gated_free))
                gated_q_s[...] = gated_q
                gated_k_s[...] = gated_k

                def gate_exactly():
                    at = exact_s[slot] - 1  # 0; see `exact_scores`
                    plgpu.copy_gmem_to_smem(scores_ref.at[row, head, n], a_s, scores_ready)
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    _put_table(p_s.at[at], triangles_ref, AFTER + at)
                    plgpu.commit_smem()
                    gated_k_s[...] = (load(k) * jnp.exp(matmul((p_s.at[at], g)))).astype(BF16)
                    to_here = matmul((triangles_s.at[UP_TO_HERE + at], g))
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
                _put_split(p - load(gated_k_s) * y_m, p_s.at[0], p_s.at[1])
                plgpu.barrier_wait(du_ready)
                y_u = matmul((v, du_s.T))
                d = shifted()

                unless(exact, lambda: plgpu.barrier_arrive(du_free))
                unless(exact, lambda: plgpu.barrier_arrive(free.at[slot]))
                p_s.at[2][...] = (load(gated_k_s) * y_u).astype(BF16)
                dk_s[...] = ((y_u + y_m) * jnp.exp(-d)).astype(BF16)

                def differentiate_exactly():
                    at = exact_s[slot] - 1
                    high, low, third = (p_s.at[i + at] for i in range(3))
                    intra = lambda **side: exact_gradient(tables_ref, at, m_s, q, k, [g], scale, (high, low), **side)
                    dk, product = intra(of_query=False)
                    _put_table(high, triangles_ref, AFTER + at)
                    plgpu.commit_smem()
                    dk_s[...] = (dk + jnp.exp(matmul((high, g))) * matmul((v, du_s.T))).astype(BF16)
                    dq, product = intra(of_query=True, product=-product)
                    x = matmul((d_out, r.T))
                    dq_s[...] = (dq + jnp.exp(matmul((triangles_s.at[UP_TO_HERE + at], g))) * scale * x).astype(BF16)
                    _put_split(product + load(gated_q_s) * x, high, low)
                    third[...] = (load(gated_k_s) * matmul((v, du_s.T))).astype(BF16)
                    plgpu.barrier_arrive(du_free)
                    plgpu.barrier_arrive(free.at[slot])

                when(exact, differentiate_exactly)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(dq_s, dq_ref.at[row, tokens(n), head])
                plgpu.copy_smem_to_gmem(dk_s, dk_ref.at[row, tokens(n), head])
                from_here, before = triangles_s.at[FROM_HERE], triangles_s.at[BEFORE]
                dg = matmul((from_here, p_s.at[0]), (from_here, p_s.at[1]), (before, p_s.at[2]))
                plgpu.barrier_wait(dot_ready)
                dot = plgpu.load(dot_s, layout=COL, optimized=False)
                plgpu.barrier_arrive(dot_free)
                p_s.at[0][...] = (dg + lax.broadcast_in_dim(dot, shape, [1])).astype(BF16)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(p_s.at[0], dg_ref.at[row, tokens(n), head])
                return carry

            walk(chunk, ())
            plgpu.barrier_wait(gated_free)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == 1)
        def _state():
            _registers(_CONSUMER, interpret)
            plgpu.copy_gmem_to_smem(select_ref, select_s, select_ready)
            plgpu.barrier_wait(select_ready)

            def chunk(i, carry, careful):
                dr, next_middle = carry
                n, slot = chunks - 1 - i, lax.rem(i, stages)
                plgpu.barrier_wait(full.at[slot])
                exact = exact_s[slot] > 0 if careful else None
                when(exact, lambda: clamp(slot))
                middle, rest = _halves([g_s.at[slot]], select_s)
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
                middle = choose(exact, lambda _: _zero_row(), lambda x: x, middle)
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

            start = plgpu.load(d_final_ref.at[row, head], layout=WGMMA, optimized=False), _zero_row()
            dr, middle = walk(chunk, start)
            d_initial_ref.at[row, head][...] = dr * along_rows(jnp.exp(middle), shape)
            plgpu.barrier_wait(du_free)
            plgpu.barrier_wait(dot_free)
            plgpu.wait_smem_to_gmem(0)

        # no warpgroup leaves while another still issues matrix products
        plgpu.barrier_arrive(done)
        plgpu.barrier_wait(done)

    token_grads = [result((batch, time, heads, SLAB), BF16, q)] * 4
    one = [tile(CHUNK, SLAB)]
    scratch = [tile(stages, CHUNK, SLAB)] * 6 + one * 5 + [tile(3, CHUNK, SLAB)] + one * 3
    scratch += [tile(8, CHUNK), tile(4, CHUNK, CHUNK), plgpu.SMEM((SLAB,), F32), plgpu.SMEM((stages,), jnp.int32)]
    scratch += [barrier(7, stages), barrier(2, stages)] + [barrier(1)] * 8
    scratch += [barrier(2), barrier(1), barrier(1), barrier(3)]
    run = kernel(
        body,
        name="gla_backward_sweep",
        interpret=interpret,
        out_type=[*token_grads, result((batch, heads, key_dim, SLAB), F32, q)],
        grid=(heads, batch),
        grid_names=("h", "b"),
        scratch_types=scratch,
    )
    return run(q, k, v, g, d_out, states, exact, jnp.max(exact, axis=2), scores, d_final, *constants())


def backward_state(q, k, g, d_out, exact, scores, d_final, *, scale, value_tile, interpret=False):
    """Run the serial part of the backward pass.

    Args:
        q, k, g: as in `forward`.
        d_out: [B, T, H, V] bfloat16.
        exact, scores: what the forward saved.
        d_final: [B, H, K, V] float32.
        scale: of the query.
        value_tile: value columns of a thread block, 64 or 128.
        interpret: run in the interpreter.

    Returns:
        du [B, H, N, K, V] bfloat16; dv, a head of the query each, [B, T, H, V] bfloat16;
        d_initial [B, H, K, V] float32.
    """
    batch, time, heads, key_dim = q.shape
    value_dim, group, terms = d_out.shape[-1], heads // k.shape[2], len(g)
    chunks, slabs, stages = pl.cdiv(time, CHUNK), key_dim // SLAB, 2
    shape = (SLAB, value_tile)

    def body(q_ref, k_ref, d_out_ref, exact_ref, scores_ref, d_final_ref, select_ref, triangles_ref, *refs):
        g_refs, refs = refs[:terms], refs[terms:]
        (
            du_ref, dv_ref, d_initial_ref,
            q_s, k_s, g_s, d_out_s, a_s, gated_q_s, gated_k_s, du_s, dv_s, select_s, triangles_s, exact_s,
            full, free, chunk_full, chunk_free, gated_ready, gated_free, du_ready, du_free, clamped,
            select_ready, triangles_ready, done,
        ) = refs  # fmt: skip
        value_index, head, row = lax.axis_index("v"), lax.axis_index("h"), lax.axis_index("b")
        warpgroup = lax.axis_index("warpgroup")
        kv_head = lax.div(head, group)
        columns, tokens = pl.ds(value_index * value_tile, value_tile), lambda n: pl.ds(n * CHUNK, CHUNK)
        rows = lambda s: pl.ds(s * SLAB, SLAB)

        @pl.when(warpgroup == 2)
        def _copies():
            _registers(_PRODUCER, interpret)

            def chunk(i, _):
                n, even = chunks - 1 - i, lax.rem(i, 2)
                pl.when(i >= 2)(lambda: plgpu.barrier_wait(chunk_free.at[even]))
                plgpu.copy_gmem_to_smem(
                    d_out_ref.at[row, tokens(n), head, columns], d_out_s.at[even], chunk_full.at[even]
                )
                plgpu.copy_gmem_to_smem(scores_ref.at[row, head, n], a_s.at[even], chunk_full.at[even])
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

        def clamp(exact, slot):
            @pl.when(exact)
            def _():
                pl.when(warpgroup == 0)(lambda: clamp_log_decay([g_s.at[slot, t] for t in range(terms)]))
                plgpu.barrier_arrive(clamped)
                plgpu.barrier_wait(clamped)

        @pl.when(warpgroup == 0)
        def _values():
            _registers(_CONSUMER, interpret)
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
                    d = exponents(0)
                    gated_q = (load(q_s.at[slot]) * (jnp.exp(d) * scale)).astype(BF16)
                    gated_k = (load(k_s.at[slot]) * jnp.exp(-d)).astype(BF16)
                    pl.when(i >= 1)(lambda: plgpu.barrier_wait(gated_free.at[s]))
                    gated_q_s.at[s][...] = gated_q
                    gated_k_s.at[s][...] = gated_k

                    @pl.when(exact)
                    def _again():
                        gated_q_s.at[s][...] = (load(q_s.at[slot]) * (jnp.exp(exponents(1)) * scale)).astype(BF16)
                        gated_k_s.at[s][...] = (load(k_s.at[slot]) * jnp.exp(exponents(2))).astype(BF16)

                    plgpu.barrier_arrive(free.at[slot])
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(gated_ready.at[s])

                lax.fori_loop(0, slabs, gates, None)
                plgpu.barrier_wait(du_ready)
                keys = ((gated_k_s.at[s], du_s.at[rows(s)]) for s in range(slabs))
                dv = matmul((a_s.at[even].T, d_out_s.at[even]), *keys, shape=(CHUNK, value_tile))
                plgpu.barrier_arrive(du_free)
                plgpu.barrier_arrive(chunk_free.at[even])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                dv_s[...] = dv.astype(BF16)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(dv_s, dv_ref.at[row, tokens(n), head, columns])

            lax.fori_loop(0, chunks, chunk, None)
            for s in range(slabs):
                plgpu.barrier_wait(gated_free.at[s])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == 1)
        def _state():
            _registers(_CONSUMER, interpret)
            plgpu.copy_gmem_to_smem(select_ref, select_s, select_ready)
            plgpu.barrier_wait(select_ready)

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
                    middle, rest = _halves([g_s.at[slot, t] for t in range(terms)], select_s)
                    plgpu.barrier_arrive(free.at[slot])
                    decay = lax.cond(exact, lambda m, _: m, lambda m, rest: m + rest, next_middle[s], rest)
                    du = state[s] * along_rows(jnp.exp(decay), shape)
                    du_s.at[rows(s)][...] = du.astype(BF16)
                    state[s], next_middle[s] = lax.cond(
                        exact,
                        lambda du, m, rest: (du * along_rows(jnp.exp(m + rest), shape), _zero_row()),
                        lambda du, m, _: (du, m),
                        *(du, middle, rest),
                    )
                plgpu.commit_smem()
                plgpu.barrier_arrive(du_ready)
                plgpu.copy_smem_to_gmem(du_s, du_ref.at[row, head, n, :, columns])
                for s in range(slabs):
                    plgpu.barrier_wait(gated_ready.at[s])
                    state[s] = add_matmul(state[s], gated_q_s.at[s].T, d_out_s.at[even], interpret=interpret)
                    plgpu.barrier_arrive(gated_free.at[s])
                plgpu.barrier_arrive(chunk_free.at[even])
                return tuple(state), tuple(next_middle)

            final = lambda s: plgpu.load(d_final_ref.at[row, head, rows(s), columns], layout=WGMMA, optimized=False)
            start = tuple(final(s) for s in range(slabs)), (_zero_row(),) * slabs
            state, middle = lax.fori_loop(0, chunks, chunk, start)
            for s in range(slabs):
                d_initial_ref.at[row, head, rows(s), columns][...] = state[s] * along_rows(jnp.exp(middle[s]), shape)
            plgpu.barrier_wait(du_free)
            plgpu.wait_smem_to_gmem(0)

        # no warpgroup leaves while another still issues matrix products
        plgpu.barrier_arrive(done)
        plgpu.barrier_wait(done)

    scratch = [tile(stages, CHUNK, SLAB)] * 2 + [tile(stages, terms, CHUNK, SLAB), tile(2, CHUNK, value_tile)]
    scratch += [tile(2, CHUNK, CHUNK)] + [tile(slabs, CHUNK, SLAB)] * 2 + [tile(key_dim, value_tile)]
    scratch += [tile(CHUNK, value_tile), tile(8, CHUNK), tile(3, CHUNK, CHUNK), plgpu.SMEM((2,), jnp.int32)]
    scratch += [barrier(2 + terms, stages), barrier(2, stages), barrier(3, 2), barrier(2, 2)]
    scratch += [barrier(1, slabs)] * 2 + [barrier(1)] * 2 + [barrier(2), barrier(1), barrier(3), barrier(3)]
    run = kernel(
        body,
        name="gla_backward_state",
        interpret=interpret,
        out_type=[
            result((batch, heads, chunks, key_dim, value_dim), BF16, q),
            result(d_out.shape, BF16, q),
            result((batch, heads, key_dim, value_dim), F32, q),
        ],
        grid=(value_dim // value_tile, heads, batch),
        grid_names=("v", "h", "b"),
        scratch_types=scratch,
    )
    select, triangles, _ = constants()
    return run(q, k, d_out, exact, scores, d_final, select, triangles, *g)


def backward_inputs(q, k, v, g, d_out, states, du, exact, *, scale, interpret=False):
    """Compute the gradients of q, k and g, all chunks at once.

    Args:
        q, k, v, g: as in `forward`.
        d_out: [B, T, H, V] bfloat16.
        states, exact: what the forward saved.
        du: what `backward_state` wrote.
        scale: of the query.
        interpret: run in the interpreter.

    Returns:
        dq, dk, dg: a head of the query each, [B, T, H, K] bfloat16.
    """
    batch, time, heads, key_dim = q.shape
    value_dim, group, terms = v.shape[-1], heads // k.shape[2], len(g)
    chunks, value_tiles, stages = pl.cdiv(time, CHUNK), value_dim // SLAB, 2
    slabs = 2 if key_dim % 128 == 0 and terms == 1 else 1  # of a thread block: what shared memory holds
    keys = slabs * SLAB

    def body(
        q_ref, k_ref, v_ref, d_out_ref, states_ref, du_ref, exact_ref, select_ref, triangles_ref, tables_ref, *refs
    ):  # fmt: skip
        g_refs, refs = refs[:terms], refs[terms:]
        (
            dq_ref, dk_ref, dg_ref,
            q_s, k_s, g_s, v_s, d_out_s, r_s, du_s, m_s, dq_s, dk_s, triangles_s, select_s, dot_s, exact_s,
            inputs_full, full, free, q_ready, k_ready, m_ready, streamed, products_ready, clamped, raw_full, done,
        ) = refs  # fmt: skip
        key_index, n, head, row = (lax.axis_index(a) for a in "knhb")
        warpgroup = lax.axis_index("warpgroup")
        kv_head, tokens = lax.div(head, group), pl.ds(n * CHUNK, CHUNK)
        channels, rows = lambda s: pl.ds(key_index * keys + s * SLAB, SLAB), lambda s: pl.ds(s * SLAB, SLAB)
        g_tiles = lambda s: [g_s.at[s, t] for t in range(terms)]
        exponents = lambda w, s: matmul(*((w, term) for term in g_tiles(s)))

        @pl.when(warpgroup == 2)
        def _copies():
            _registers(_PRODUCER, interpret)
            plgpu.copy_gmem_to_smem(triangles_ref.at[pl.ds(0, 4)], triangles_s, inputs_full)
            plgpu.copy_gmem_to_smem(select_ref, select_s, inputs_full)
            for s in range(slabs):
                for t, g_ref in enumerate(g_refs):
                    source = decay_source(g_ref, row, n, head, heads, key_index * slabs + s)
                    plgpu.copy_gmem_to_smem(source, g_s.at[s, t], inputs_full)
                plgpu.copy_gmem_to_smem(q_ref.at[row, tokens, head, channels(s)], q_s.at[s], inputs_full)
                plgpu.copy_gmem_to_smem(k_ref.at[row, tokens, kv_head, channels(s)], k_s.at[s], inputs_full)

            def stream(j, _):
                slot, columns, block = lax.rem(j, stages), pl.ds(j * SLAB, SLAB), pl.ds(key_index * keys, keys)
                pl.when(j >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
                plgpu.copy_gmem_to_smem(d_out_ref.at[row, tokens, head, columns], d_out_s.at[slot], full.at[slot])
                plgpu.copy_gmem_to_smem(v_ref.at[row, tokens, kv_head, columns], v_s.at[slot], full.at[slot])
                plgpu.copy_gmem_to_smem(states_ref.at[row, head, n, block, columns], r_s.at[slot], full.at[slot])
                plgpu.copy_gmem_to_smem(du_ref.at[row, head, n, block, columns], du_s.at[slot], full.at[slot])

            exact_s[0] = exact_ref[row, head, n]
            plgpu.barrier_arrive(inputs_full)
            lax.fori_loop(0, value_tiles, stream, None)
            for i in range(value_tiles - min(stages, value_tiles), value_tiles):
                plgpu.barrier_wait(free.at[i % stages])

        def gated(inputs, factor, bounded_sign, w, exact):
            """Replace the raw tiles by the gated ones; w is the triangle that an exact chunk takes."""
            for s in range(slabs):
                d = exponents(triangles_s.at[SHIFTED], s)
                tile_s = inputs.at[s]
                bounded = (load(tile_s) * (jnp.exp(bounded_sign * d) * factor)).astype(BF16)
                tile_s[...] = choose(
                    exact,
                    lambda s=s, tile_s=tile_s: (load(tile_s) * (jnp.exp(exponents(w, s)) * factor)).astype(BF16),
                    lambda bounded=bounded: bounded,
                )
            plgpu.commit_smem()

        def clamp():
            pl.when(warpgroup == 0)(lambda: clamp_log_decay([x for s in range(slabs) for x in g_tiles(s)]))
            sync(clamped)

        def both_ways(role):
            """Act by the lean code if the chunk is bounded."""
            _registers(_CONSUMER, interpret)
            plgpu.barrier_wait(inputs_full)
            exact = exact_s[0] > 0
            lax.cond(exact, lambda: role(exact), lambda: role(None))

        def raw_again(q_tile, k_tile, s):
            """Load q and k once more: the gated tiles took their place."""
            plgpu.commit_smem()
            full = raw_full.at[warpgroup]
            plgpu.copy_gmem_to_smem(q_ref.at[row, tokens, head, channels(s)], q_tile, full)
            plgpu.copy_gmem_to_smem(k_ref.at[row, tokens, kv_head, channels(s)], k_tile, full)
            plgpu.barrier_wait(full)

        def sync(barrier_ref):
            plgpu.barrier_arrive(barrier_ref)
            plgpu.barrier_wait(barrier_ref)

        # Once both warpgroups are done with the streams, their buffers serve again: r_s and du_s hold the products P of
        # the query's and of the key's side, v_s holds Q, and d_out_s takes dg.
        def write_dg(s):
            from_here, before = triangles_s.at[FROM_HERE], triangles_s.at[BEFORE]
            pairs = [(from_here, x.at[half, rows(s)]) for x in (r_s, du_s) for half in range(2)]
            dg = matmul(*pairs, (before, v_s.at[s]))
            dot = plgpu.load(dot_s.at[rows(s)], layout=COL, optimized=False)
            d_out_s.at[s][...] = (dg + lax.broadcast_in_dim(dot, (CHUNK, SLAB), [1])).astype(BF16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(d_out_s.at[s], dg_ref.at[row, tokens, head, channels(s)])

        def query(exact):
            when(exact, clamp)
            gated(q_s, scale, 1.0, triangles_s.at[UP_TO_HERE], exact)
            plgpu.barrier_arrive(q_ready)

            def stream(m_accumulator, *x_accumulators):
                def one(j, _):
                    slot = lax.rem(j, stages)
                    plgpu.barrier_wait(full.at[slot])
                    plgpu.wgmma(m_accumulator, d_out_s.at[slot], v_s.at[slot].T)
                    for s in range(slabs):
                        plgpu.wgmma(x_accumulators[s], d_out_s.at[slot], r_s.at[slot, rows(s)].T)
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(free.at[slot])

                lax.fori_loop(0, value_tiles, one, None)
                m = lax.optimization_barrier(m_accumulator[...])
                plgpu.barrier_wait(k_ready)
                m_s[...] = jnp.where(load(triangles_s.at[UP_TO_HERE]) > 0, m, 0.0).astype(BF16)
                plgpu.commit_smem()
                plgpu.barrier_arrive(m_ready)
                for s in range(slabs):
                    plgpu.wgmma(x_accumulators[s], m_s, k_s.at[s])
                plgpu.wgmma_wait(0)
                return tuple(x[...] for x in x_accumulators)

            accumulators = [plgpu.ACC((CHUNK, CHUNK), F32), *[plgpu.ACC((CHUNK, SLAB), F32)] * slabs]
            x = lax.optimization_barrier(pl.run_scoped(stream, *accumulators))
            sync(streamed)
            for s in range(slabs):
                high, low = r_s.at[0, rows(s)], r_s.at[1, rows(s)]
                _put_split(load(q_s.at[s]) * x[s], high, low)
                d = exponents(triangles_s.at[SHIFTED], s)
                dq_s.at[s][...] = (x[s] * (jnp.exp(d) * scale)).astype(BF16)

                def differentiate_exactly(s=s, high=high, low=low):
                    at = exact_s[0] - 1  # 0; see `exact_scores`
                    raw = d_out_s.at[at], dq_s.at[s + at]
                    raw_again(*raw, s)
                    dq, product = exact_gradient(
                        tables_ref, at, m_s, *raw, g_tiles(s), scale, (high, low), of_query=True
                    )
                    between = x[s] - matmul((m_s, k_s.at[s + at]))
                    to_here = jnp.exp(exponents(triangles_s.at[UP_TO_HERE], s))
                    dq_s.at[s][...] = (dq + to_here * scale * between).astype(BF16)
                    _put_split(product + load(q_s.at[s]) * between, high, low)

                when(exact, differentiate_exactly)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(dq_s.at[s], dq_ref.at[row, tokens, head, channels(s)])
            sync(products_ready)
            write_dg(0)
            plgpu.wait_smem_to_gmem(0)

        def key(exact):
            when(exact, clamp)
            when(exact, lambda: _put_table(m_s, triangles_ref, AFTER))  # M comes later
            plgpu.commit_smem()
            gated(k_s, 1.0, -1.0, m_s, exact)
            plgpu.barrier_arrive(k_ready)

            def stream(*y_accumulators):
                def one(j, dots):
                    slot = lax.rem(j, stages)
                    plgpu.barrier_wait(full.at[slot])
                    for s in range(slabs):
                        plgpu.wgmma(y_accumulators[s], v_s.at[slot], du_s.at[slot, rows(s)].T)
                    dot = lambda s: jnp.sum(load(r_s.at[slot, rows(s)]) * load(du_s.at[slot, rows(s)]), axis=1)
                    dots = tuple(dots[s] + dot(s) for s in range(slabs))
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(free.at[slot])
                    return dots

                dots = lax.fori_loop(0, value_tiles, one, (_zero_row(),) * slabs)
                for s in range(slabs):
                    dot_s.at[rows(s)][...] = dots[s]
                return tuple(y[...] for y in y_accumulators)

            y = lax.optimization_barrier(pl.run_scoped(stream, *[plgpu.ACC((CHUNK, SLAB), F32)] * slabs))
            plgpu.barrier_wait(q_ready)
            plgpu.barrier_wait(m_ready)
            sync(streamed)
            for s in range(slabs):
                high, low = du_s.at[0, rows(s)], du_s.at[1, rows(s)]
                gated_k = load(k_s.at[s])
                v_s.at[s][...] = (gated_k * y[s]).astype(BF16)
                y_m = matmul((m_s.T, q_s.at[s]))
                _put_split(-gated_k * y_m, high, low)
                d = exponents(triangles_s.at[SHIFTED], s)
                dk_s.at[s][...] = ((y[s] + y_m) * jnp.exp(-d)).astype(BF16)

                def differentiate_exactly(s=s, high=high, low=low, y=y):
                    at = exact_s[0] - 1
                    raw = v_s.at[s + at], dk_s.at[s + at]
                    raw_again(*raw, s)
                    dk, product = exact_gradient(
                        tables_ref, at, m_s, *raw, g_tiles(s), scale, (high, low), of_query=False
                    )
                    _put_table(high, triangles_ref, AFTER + at)
                    plgpu.commit_smem()
                    dk_s.at[s][...] = (dk + jnp.exp(exponents(high, s)) * y[s]).astype(BF16)
                    v_s.at[s][...] = (load(k_s.at[s]) * y[s]).astype(BF16)
                    _put_split(-product, high, low)
                    middle, rest = _halves(g_tiles(s), select_s)
                    dot = plgpu.load(dot_s.at[rows(s)], layout=ROW, optimized=False)
                    dot_s.at[rows(s)][...] = dot * jnp.exp(middle + rest)

                when(exact, differentiate_exactly)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(dk_s.at[s], dk_ref.at[row, tokens, head, channels(s)])
            sync(products_ready)
            if slabs > 1:
                write_dg(1)
            plgpu.wait_smem_to_gmem(0)

        pl.when(warpgroup == 0)(lambda: both_ways(query))
        pl.when(warpgroup == 1)(lambda: both_ways(key))
        # no warpgroup leaves while another still issues matrix products
        sync(done)

    scratch = [tile(slabs, CHUNK, SLAB)] * 2 + [tile(slabs, terms, CHUNK, SLAB)] + [tile(stages, CHUNK, SLAB)] * 2
    scratch += [tile(stages, keys, SLAB)] * 2 + [tile(CHUNK, CHUNK)] + [tile(slabs, CHUNK, SLAB)] * 2
    scratch += [tile(4, CHUNK, CHUNK), tile(8, CHUNK), plgpu.SMEM((keys,), F32), plgpu.SMEM((1,), jnp.int32)]
    scratch += [barrier(3 + slabs * (2 + terms)), barrier(4, stages), barrier(2, stages)] + [barrier(1)] * 3
    scratch += [barrier(2)] * 3 + [barrier(2, 2), barrier(3)]
    run = kernel(
        body,
        name="gla_backward_inputs",
        interpret=interpret,
        out_type=[result(q.shape, BF16, q)] * 3,
        grid=(key_dim // keys, chunks, heads, batch),
        grid_names=tuple("knhb"),
        scratch_types=scratch,
    )
    return run(q, k, v, d_out, states, du, exact, *constants(), *g)
