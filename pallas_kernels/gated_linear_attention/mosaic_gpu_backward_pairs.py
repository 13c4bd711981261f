"""The parallel part of the backward pass on Hopper for any gate; see `mosaic_gpu_backward_inputs` for the usual one.

One thread block per 64 key channels and pair of chunks. Of a pair, only R of its first chunk and dU of its second go
through memory. With a = 1 in a bounded chunk and e^{G_last} in an exact one, b the decay from U of the first chunk to R
of the second, M_10 = do_1 v_0^T, and products of the first chunk's R and the second's dU alone,

    Z = do_1 R_0^T,   W = v_0 dU_1^T,   s = sum over V of R_0 dU_1,
    X_1 = b (a_0 Z + M_10 k_0') + M_11 k_1',          r_1 = a_1 b (a_0 s + sum over t of k_0' W),
    Y_U0 = b (a_1 W + M_10^T q_1'),                   r_0 = a_0 b (a_1 s + sum over t of q_1' Z).

What is saved may also be S at the start of the first chunk and dS at the end of the second: R_0 = x_0 S, dU_1 = y_1 dS
with x = e^{G_m} and y = e^{G_last - G_m} in a bounded chunk, 1 in an exact one. Four warpgroups each take one side,
query's or key's, of one chunk; the lightest of them also drives the copy engine. All blocks of a pair read d_out and v;
clusters of two share them.

It serves what the usual kernel does not (other than 128 channels at a time, float32 gates), and does again the pairs
that the usual one gets wrong, those with an exact chunk. A thread block then visits several pairs, as nearly all of
them need nothing. After `backward_quads` only S before the first and dS after the last of four chunks are saved. With
q~, k~ and a = e^{G_last} of `prepare`, the block first makes what a pair lacks,

    after chunks 0 and 1,   dS = a_2 (a_3 dS + q~_3^T do_3) + q~_2^T do_2,
    before chunks 2 and 3,  S  = a_1 (a_0 S  + k~_0^T v_0 ) + k~_1^T v_1,

and writes it to a place that all its pairs share.
"""

import functools
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
    F32,
    ROW,
    SHIFTED,
    SLAB,
    UP_TO_HERE,
    add_matmul,
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
    matmul,
    put_split,
    result,
    tile,
    when,
    zero_row,
)

RUN = 16  # pairs that a thread block takes one after the other
_STAGES = 2  # of the value columns, 64 at a time, on their way to shared memory
# Rows of the products of decays: b; b a_0 x_0; b a_1 y_1; all of these; x_0; y_1.
_BETWEEN, _FROM_START, _TO_END, _ACROSS, _START, _END = range(6)


def visit_exact(exact_ref, number, one_pair):
    """Call `one_pair` with those of the `number`th RUN pairs of a row that have an exact chunk."""
    (chunks,) = exact_ref.shape
    is_exact = lambda n: jnp.where(n < chunks, exact_ref[jnp.minimum(n, chunks - 1)], 0)
    first, last = number * RUN, jnp.minimum((number + 1) * RUN, pl.cdiv(chunks, 2))
    is_wrong = lambda pair: is_exact(2 * pair) + is_exact(2 * pair + 1) > 0
    visit = lambda pair, _: pl.when(is_wrong(pair))(functools.partial(one_pair, pair))
    # all flags at once: nearly all blocks find their pairs bounded, in the time of one load
    some = sum(is_exact(2 * first + i) for i in range(2 * RUN)) > 0
    pl.when(some)(lambda: lax.fori_loop(first, last, visit, None))


def backward_pairs(
    q, k, v, g, d_out, states, d_states, exact, results=None, prepared=None, *, scale, at_edges, interpret=False
):  # fmt: skip
    """Compute the gradients of q, k and g, all pairs of chunks at once.

    Args:
        q, k, v, g: as in `forward`.
        d_out: [B, T, H, V] bfloat16.
        states, d_states: [B, H, ceil(N / 2), K, V] bfloat16, R of even and dU of odd chunks, or with `at_edges` S at
            the start of even and dS at the end of odd chunks.
        exact: [B, H, N] int32, whether a chunk is exact.
        scale: of the query.
        at_edges: which of the two `states` and `d_states` are.
        results: dq, dk and dg, right but for the pairs that have an exact chunk: only those are computed, in place.
        prepared: gated q, gated k and decay of `prepare`, where `states` and `d_states` are only those of every other
            pair, S before even pairs and dS after odd ones; with `results` only.
        interpret: run in the interpreter.

    Returns:
        dq, dk, dg: a head of the query each, [B, T, H, K] bfloat16.
    """
    batch, time, heads, key_dim = q.shape
    value_dim, group, terms = v.shape[-1], heads // k.shape[2], len(g)
    chunks, key_tiles, value_tiles = pl.cdiv(time, CHUNK), key_dim // SLAB, value_dim // SLAB
    # Blocks of a cluster: on an H100, (K, V) = (128, 256) takes 0.34 ms alone and 0.30 in twos; at (256, 512) fours are
    # slower than twos, as blocks that share also wait for each other.
    share = 2 if key_tiles % 2 == 0 and not interpret else 1
    pairs = pl.cdiv(chunks, 2)

    def body(
        q_ref, k_ref, v_ref, d_out_ref, states_ref, d_states_ref, exact_ref, select_ref, triangles_ref, tables_ref,
        *other_refs,
    ):  # fmt: skip
        refs = list(other_refs)
        take: Any = lambda count, present=True: [refs.pop(0) if present else None for _ in range(count)]
        g_refs = take(terms)
        gated_q_ref, gated_k_ref, decay_ref = take(3, prepared is not None)
        dq_ref, dk_ref, dg_ref = take(3)
        (missing_ref,) = take(1, prepared is not None)
        (
            q_s, k_s, g_s, v_s, d_out_s, r_s, du_s, m_s, shift_s, to_here_s, before_s, select_s, decays_s, dot_s,
            sums_s, exact_s,
            inputs_full, full, free, q_ready, k_ready, m_ready, decays_ready, streamed, products_ready, clamped,
            raw_full, saved_full, done,
        ) = refs  # fmt: skip
        number, head, row = (lax.axis_index(a) for a in "nhb")
        key_index = lax.axis_index("k") * share + (lax.axis_index("c") if share > 1 else 0)
        is_exact = lambda n: jnp.where(n < chunks, exact_ref[row, head, jnp.minimum(n, chunks - 1)], 0)
        warpgroup = lax.axis_index("warpgroup")
        kv_head, channels = lax.div(head, group), pl.ds(key_index * SLAB, SLAB)

        def one_pair(pair):
            tokens = lambda c: pl.ds((2 * pair + c) * CHUNK, CHUNK)
            two, odd = lax.div(pair, 2), lax.rem(pair, 2)  # of two pairs that share what is saved
            g_tiles = lambda c: [g_s.at[c, t] for t in range(terms)]
            exponents = lambda w, c: matmul(*((w, term) for term in g_tiles(c)))
            column = lambda ref: plgpu.load(ref, layout=COL, optimized=False)
            decays = lambda index: lax.broadcast_in_dim(column(decays_s.at[index]), (CHUNK, SLAB), [1])

            def sync(barrier_ref):
                plgpu.barrier_arrive(barrier_ref)
                plgpu.barrier_wait(barrier_ref)

            shared = "c" if share > 1 else None

            def copy_inputs():
                for c in range(2):
                    for t, g_ref in enumerate(g_refs):
                        source = decay_source(g_ref, row, 2 * pair + c, head, heads, key_index)
                        plgpu.copy_gmem_to_smem(source, g_s.at[c, t], inputs_full)
                    plgpu.copy_gmem_to_smem(q_ref.at[row, tokens(c), head, channels], q_s.at[c], inputs_full)
                    plgpu.copy_gmem_to_smem(k_ref.at[row, tokens(c), kv_head, channels], k_s.at[c], inputs_full)
                for index, table in ((SHIFTED, shift_s), (UP_TO_HERE, to_here_s), (BEFORE, before_s)):
                    plgpu.copy_gmem_to_smem(triangles_ref.at[index], table, inputs_full)
                plgpu.copy_gmem_to_smem(select_ref, select_s, inputs_full)
                for c in range(2):  # a row of odd length ends with half a pair
                    n = 2 * pair + c
                    exact_s[c] = is_exact(n)
                plgpu.barrier_arrive(inputs_full)

            def copy_values(j):
                slot, columns = lax.rem(j, _STAGES), pl.ds(j * SLAB, SLAB)
                for c in range(2):
                    out_source = d_out_ref.at[row, tokens(c), head, columns]
                    plgpu.copy_gmem_to_smem(out_source, d_out_s.at[slot, c], full.at[slot], collective_axes=shared)
                    v_source = v_ref.at[row, tokens(c), kv_head, columns]
                    plgpu.copy_gmem_to_smem(v_source, v_s.at[slot, c], full.at[slot], collective_axes=shared)

                def copy_states(start_ref, start, end_ref, end):
                    of_pair = lambda ref, index: ref.at[row, head, index, channels, columns]
                    plgpu.copy_gmem_to_smem(of_pair(start_ref, start), r_s.at[slot], full.at[slot])
                    plgpu.copy_gmem_to_smem(of_pair(end_ref, end), du_s.at[slot], full.at[slot])

                if prepared is None:
                    copy_states(states_ref, pair, d_states_ref, pair)
                else:
                    pl.when(odd == 0)(lambda: copy_states(states_ref, two, missing_ref, number))
                    pl.when(odd == 1)(lambda: copy_states(missing_ref, number, d_states_ref, two))

            def rebuild_state():
                """Make what was not saved, dS after an even pair or S before an odd one, in this block's own place."""
                first = 4 * two + 2 * (1 - odd)  # of the two chunks between the pair and what was saved
                between = first + odd, first + 1 - odd  # the one next to the pair first
                gated_s, written_s, state_s, result_s = q_s, (r_s, du_s), k_s, m_s.at[2]  # which hold nothing yet
                gated_full = raw_full.at[warpgroup]

                def copy_gated(ref):
                    for i, n in enumerate(between):
                        source = ref.at[row, pl.ds(n * CHUNK, CHUNK), head, channels]
                        plgpu.copy_gmem_to_smem(source, gated_s.at[i], gated_full)

                def fill(j):
                    def copy(saved_ref, ref, ref_head):
                        slot, columns = lax.rem(j, 2), pl.ds(j * SLAB, SLAB)
                        saved = saved_ref.at[row, head, two, channels, columns]
                        plgpu.copy_gmem_to_smem(saved, state_s.at[slot], saved_full.at[slot])
                        for written, n in zip(written_s, between, strict=True):
                            source = ref.at[row, pl.ds(n * CHUNK, CHUNK), ref_head, columns]
                            plgpu.copy_gmem_to_smem(source, written.at[slot], saved_full.at[slot])

                    pl.when(odd == 0)(lambda: copy(d_states_ref, d_out_ref, head))
                    pl.when(odd == 1)(lambda: copy(states_ref, v_ref, kv_head))

                def decay_of(n):  # a row may end within a group
                    source = decay_ref.at[row, head, jnp.minimum(n, chunks - 1), channels]
                    return jnp.where(n < chunks, plgpu.load(source, layout=ROW, optimized=False), 1.0)

                pl.when(odd == 0)(lambda: copy_gated(gated_q_ref))
                pl.when(odd == 1)(lambda: copy_gated(gated_k_ref))
                for j in range(min(2, value_tiles)):
                    fill(j)
                decays = [decay_of(n) for n in between]
                plgpu.barrier_wait(gated_full)

                def columns_of(j, _):
                    slot = lax.rem(j, 2)
                    plgpu.barrier_wait(saved_full.at[slot])
                    state = load(state_s.at[slot])
                    for i in (1, 0):
                        product = matmul((gated_s.at[i].T, written_s[i].at[slot]))
                        state = along_rows(decays[i], (SLAB, SLAB)) * state + product
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    result_s[...] = state.astype(BF16)
                    plgpu.commit_smem()
                    target = missing_ref.at[row, head, number, channels, pl.ds(j * SLAB, SLAB)]
                    plgpu.copy_smem_to_gmem(result_s, target)
                    pl.when(j + 2 < value_tiles)(lambda: fill(j + 2))

                lax.fori_loop(0, value_tiles, columns_of, None)
                plgpu.wait_smem_to_gmem(0)
                plgpu.commit_smem()

            def gate(raw, c, factor, sign, exact, table, ready):
                """Replace the raw tile by the gated one; `table` is the triangle that an exact chunk takes."""
                bounded = (load(raw) * (jnp.exp(sign * exponents(shift_s, c)) * factor)).astype(BF16)
                exactly = lambda: (load(raw) * (jnp.exp(exponents(table, c)) * factor)).astype(BF16)
                raw[...] = choose(exact and exact[c], exactly, lambda: bounded)
                plgpu.commit_smem()
                plgpu.barrier_arrive(ready)

            def clamp(exact):
                for c in range(2):
                    chosen = jnp.logical_and(warpgroup == c, exact[c])
                    pl.when(chosen)(functools.partial(clamp_log_decay, g_tiles(c)))
                sync(clamped)

            def put_decays(exact):
                """Write the decays from the first chunk to the second, and with those across the chunks themselves."""
                (middle_0, rest_0), (middle_1, rest_1) = (halves(g_tiles(c), select_s) for c in range(2))
                none = zero_row()
                if exact is None:
                    exact = False, False
                between = jnp.where(exact[0], none, rest_0) + jnp.where(exact[1], none, middle_1)
                start = jnp.where(exact[0], none, middle_0) if at_edges else none
                end = jnp.where(exact[1], none, rest_1) if at_edges else none
                from_start = start + jnp.where(exact[0], middle_0 + rest_0, none)
                to_end = end + jnp.where(exact[1], middle_1 + rest_1, none)
                for index, x in (
                    (_BETWEEN, between), (_FROM_START, between + from_start), (_TO_END, between + to_end),
                    (_ACROSS, between + from_start + to_end), (_START, start), (_END, end),
                ):  # fmt: skip
                    decays_s.at[index][...] = jnp.exp(x)
                plgpu.barrier_arrive(decays_ready)

            def stream(sides, of_slot, dot=None, refills=False):
                """Sum products over the value columns; `of_slot` gives the operands, one pair a sum."""

                def accumulate(*sums):
                    def one(j, total):
                        slot = lax.rem(j, _STAGES)
                        plgpu.barrier_wait(full.at[slot])
                        for accumulator, (a, b) in zip(sums, of_slot(slot), strict=True):
                            plgpu.wgmma(accumulator, a, b)
                        if dot is not None:
                            total += dot(slot)
                        plgpu.wgmma_wait(0)
                        plgpu.commit_smem()  # for the other warps: a barrier of a cluster does not wait for them
                        plgpu.barrier_arrive(free.at[slot])
                        if refills:
                            plgpu.barrier_wait(free.at[slot])
                            pl.when(j + _STAGES < value_tiles)(lambda: copy_values(j + _STAGES))
                        return total

                    total = lax.fori_loop(0, value_tiles, one, None if dot is None else zero_row())
                    return *(x[...] for x in sums), total

                return lax.optimization_barrier(pl.run_scoped(accumulate, *[plgpu.ACC((CHUNK, SLAB), F32)] * sides))

            def put_m(m, index):
                m_s.at[index][...] = m.astype(BF16)
                plgpu.commit_smem()
                plgpu.barrier_arrive(m_ready.at[index])

            # the mask is read from shared memory: index arithmetic would be hoisted into registers
            lower = lambda m: jnp.where(load(to_here_s) > 0, m, 0.0)

            def put_sums(x, buffer, index):
                """Write the sums of x over the tokens; reducing registers would share its memory between warpgroups."""
                buffer[...] = x.astype(BF16)
                plgpu.commit_smem()
                first, second = halves([buffer], select_s)
                sums_s.at[index][...] = first + second

            def raw_again(q_tile, k_tile, c):
                """Load q and k once more: the gated tiles took their place."""
                plgpu.commit_smem()
                full = raw_full.at[warpgroup]
                plgpu.copy_gmem_to_smem(q_ref.at[row, tokens(c), head, channels], q_tile, full)
                plgpu.copy_gmem_to_smem(k_ref.at[row, tokens(c), kv_head, channels], k_tile, full)
                plgpu.barrier_wait(full)

            # Once all are done with the streams, their buffers serve again. Of chunk c, d_out_s and v_s hold the
            # products P of the query's and of the key's side, r_s holds Q, du_s takes dq; dk takes the place of k'.
            query_products = lambda c: (d_out_s.at[0, c], d_out_s.at[1, c])
            key_products = lambda c: (v_s.at[0, c], v_s.at[1, c])

            def write_dg(c):
                pairs = [(to_here_s.T, x) for x in (*query_products(c), *key_products(c))]
                dg = matmul(*pairs, (before_s, r_s.at[c]))
                outer = _FROM_START if c == 0 else _TO_END
                constant = column(decays_s.at[_ACROSS]) * column(dot_s) + column(decays_s.at[outer]) * column(
                    sums_s.at[c]
                )
                target = d_out_s.at[0, c]
                target[...] = (dg + lax.broadcast_in_dim(constant, (CHUNK, SLAB), [1])).astype(BF16)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(target, dg_ref.at[row, tokens(c), head, channels])

            def query(c, exact):
                high, low = query_products(c)
                gate(q_s.at[c], c, scale, 1.0, exact, to_here_s, q_ready.at[c])
                m, z, _ = stream(2, lambda slot: ((d_out_s.at[slot, c], x.T) for x in (v_s.at[slot, 0], r_s.at[slot])))
                put_m(lower(m) if c == 0 else m, c)
                plgpu.barrier_wait(decays_ready)
                plgpu.barrier_wait(k_ready.at[0])
                if c == 0:
                    x = decays(_START) * z if at_edges else z
                else:
                    x = decays(_FROM_START) * z + decays(_BETWEEN) * matmul((m_s.at[1], k_s.at[0]))
                    plgpu.barrier_wait(k_ready.at[1])
                    plgpu.barrier_wait(m_ready.at[2])
                # an exact chunk takes the parts of its own M by levels
                all_of = lambda: add_matmul(x, (m_s.at[2 * c], k_s.at[c]), interpret=interpret)
                x = choose(exact and exact[c], lambda: x, all_of)
                sync(streamed)
                if c == 1:
                    put_sums(load(q_s.at[1]) * z, high, 0)
                put_split(load(q_s.at[c]) * x, high, low)
                du_s.at[c][...] = (x * (jnp.exp(exponents(shift_s, c)) * scale)).astype(BF16)

                def differentiate_exactly():
                    at = exact_s[c] - 1  # 0; see `exact_scores`
                    raw = du_s.at[c + at], q_s.at[c + at]
                    product = load(q_s.at[c]) * x
                    raw_again(*raw, c)
                    dq, product = exact_gradient(
                        tables_ref, at, m_s.at[2 * c + at], *raw, g_tiles(c), scale, (high, low), of_query=True,
                        product=product,
                    )  # fmt: skip
                    du_s.at[c][...] = (dq + jnp.exp(exponents(to_here_s, c)) * scale * x).astype(BF16)
                    put_split(product, high, low)

                when(exact and exact[c], differentiate_exactly)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(du_s.at[c], dq_ref.at[row, tokens(c), head, channels])

            def key(c, exact):
                high, low = key_products(c)
                gate(k_s.at[c], c, 1.0, -1.0, exact, before_s.T, k_ready.at[c])
                if c == 0:
                    dot = lambda slot: jnp.sum(load(r_s.at[slot]) * load(du_s.at[slot]), axis=1)
                    w, dot_s[...] = stream(1, lambda slot: ((v_s.at[slot, 0], du_s.at[slot].T),), dot, refills=True)
                    put_decays(exact)
                    plgpu.barrier_wait(q_ready.at[1])
                    plgpu.barrier_wait(m_ready.at[1])
                    y = decays(_TO_END) * w + decays(_BETWEEN) * matmul((m_s.at[1].T, q_s.at[1]))
                    plgpu.barrier_wait(m_ready.at[0])
                else:
                    of_slot = lambda slot: (
                        (v_s.at[slot, 1], du_s.at[slot].T),
                        (d_out_s.at[slot, 1], v_s.at[slot, 1].T),
                    )
                    y, m, _ = stream(2, of_slot)
                    put_m(lower(m), 2)
                    plgpu.barrier_wait(decays_ready)
                    y = decays(_END) * y if at_edges else y
                plgpu.barrier_wait(q_ready.at[c])
                y_m = matmul((m_s.at[2 * c].T, q_s.at[c]))
                sync(streamed)
                if c == 0:
                    put_sums(load(k_s.at[0]) * w, high, 1)
                gated_k = load(k_s.at[c])
                q_term = (gated_k * y).astype(BF16)
                r_s.at[c][...] = q_term
                put_split(-gated_k * y_m, high, low)
                k_s.at[c][...] = ((y + y_m) * jnp.exp(-exponents(shift_s, c))).astype(BF16)

                def differentiate_exactly():
                    at = exact_s[c] - 1
                    raw = r_s.at[c + at], k_s.at[c + at]
                    raw_again(*raw, c)
                    dk, product = exact_gradient(
                        tables_ref, at, m_s.at[2 * c + at], *raw, g_tiles(c), scale, (high, low), of_query=False
                    )
                    k_s.at[c][...] = (dk + jnp.exp(exponents(before_s.T, c)) * y).astype(BF16)
                    r_s.at[c][...] = q_term
                    put_split(-product, high, low)

                when(exact and exact[c], differentiate_exactly)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(k_s.at[c], dk_ref.at[row, tokens(c), head, channels])

            def work(side, c):
                if (side, c) == (key, 0):
                    if prepared is not None:
                        rebuild_state()
                    copy_inputs()
                    for j in range(min(_STAGES, value_tiles)):
                        copy_values(j)
                plgpu.barrier_wait(inputs_full)
                exact = exact_s[0] > 0, exact_s[1] > 0

                def carefully():
                    clamp(exact)
                    side(c, exact)

                if results is None:  # lean code where both are bounded
                    lax.cond(jnp.logical_or(*exact), carefully, lambda: side(c, None))
                else:
                    carefully()
                sync(products_ready)
                if (side, c) in ((query, 0), (key, 1)):
                    write_dg(c)
                plgpu.wait_smem_to_gmem(0)
                if results is not None:
                    plgpu.commit_smem()  # for the other warps, as above
                # No warpgroup leaves while another still multiplies, no block copies to one that is not done with a
                # pair.
                sync(done)

            for index, (side, c) in enumerate(((query, 0), (query, 1), (key, 0), (key, 1))):
                pl.when(warpgroup == index)(functools.partial(work, side, c))

        if results is None:
            one_pair(number)
        else:
            visit_exact(exact_ref.at[row, head], number, one_pair)

    free, done = barrier(4, _STAGES), barrier(4)
    if share > 1:
        of_cluster = functools.partial(plgpu.ClusterBarrier, collective_axes=("c",), num_arrivals=4)
        free = of_cluster(num_barriers=_STAGES)
        if results is not None:
            done = of_cluster()
    scratch = [tile(2, CHUNK, SLAB)] * 2 + [tile(2, terms, CHUNK, SLAB)] + [tile(_STAGES, 2, CHUNK, SLAB)] * 2
    scratch += [tile(_STAGES, SLAB, SLAB)] * 2 + [tile(3, CHUNK, CHUNK)] + [tile(CHUNK, CHUNK)] * 3 + [tile(8, CHUNK)]
    scratch += [plgpu.SMEM((6, SLAB), F32), plgpu.SMEM((SLAB,), F32), plgpu.SMEM((2, SLAB), F32)]
    scratch += [plgpu.SMEM((2,), jnp.int32), barrier(2 * (2 + terms) + 5), barrier(6, _STAGES), free]
    scratch += [barrier(1, 2)] * 2 + [barrier(1, 3), barrier(1)] + [barrier(4)] * 3
    scratch += [barrier(2, 4), barrier(3, 2), done]
    cluster = {"cluster": (share,), "cluster_names": ("c",)} if share > 1 else {}
    blocks = pl.cdiv(pairs, 1 if results is None else RUN)
    out_type = [result(q.shape, BF16, q)] * 3 if results is None else []
    if prepared is not None:
        out_type.append(result((batch, heads, blocks, key_dim, value_dim), BF16, q))
    run = kernel(
        body,
        name="gla_backward_pairs",
        interpret=interpret,
        warpgroups=4,
        changes=0 if results is None else 3,
        out_type=out_type,
        grid=(key_tiles // share, blocks, heads, batch),
        grid_names=tuple("knhb"),
        scratch_types=scratch,
        **cluster,
    )
    arrays = q, k, v, d_out, states, d_states, exact, *constants(), *g, *(prepared or ())
    dq, dk, dg, *_ = run(*arrays, *(results or ()))
    return dq, dk, dg
