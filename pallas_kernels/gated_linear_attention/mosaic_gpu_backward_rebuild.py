"""States between those that were saved, for pairs of chunks with an exact one; see `mosaic_gpu_backward_quads`.

Of a group of four chunks, S before the first and dS after the last are saved. `backward_pairs` wants both S before and
dS after a pair. With q~, k~ and a = e^{G_last} of `prepare`, what is missing is

    after chunks 0 and 1,   dS = a_2 (a_3 dS + q~_3^T do_3) + q~_2^T do_2,
    before chunks 2 and 3,  S  = a_1 (a_0 S  + k~_0^T v_0 ) + k~_1^T v_1.

A thread block takes 64 key channels of several pairs, of which nearly all are bounded and need nothing.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gated_linear_attention.mosaic_gpu_backward_pairs import RUN, visit_exact
from pallas_kernels.gated_linear_attention.mosaic_gpu_chunk import (
    BF16,
    CHUNK,
    ROW,
    SLAB,
    along_rows,
    barrier,
    kernel,
    load,
    matmul,
    result,
    tile,
)


def rebuild_states(v, d_out, states, d_states, gated_q, gated_k, decay, exact, *, interpret=False):
    """Rebuild the state that pairs with an exact chunk lack.

    Args:
        v, d_out: as in `forward`.
        states, d_states: [B, H, ceil(N / 4), K, V] bfloat16, S before chunks 0, 4... and dS after chunks 3, 7...
        gated_q, gated_k, decay, exact: what `prepare` returns.
        interpret: run in the interpreter.

    Returns:
        [B, H, ceil(N / 2), K, V] bfloat16: dS after even pairs and S before odd ones, anything where both chunks are
        bounded.
    """
    batch, time, heads, key_dim = gated_q.shape
    value_dim, group = v.shape[-1], heads // v.shape[2]
    chunks = pl.cdiv(time, CHUNK)
    pairs = pl.cdiv(chunks, 2)

    def body(
        v_ref, d_out_ref, states_ref, d_states_ref, gated_q_ref, gated_k_ref, decay_ref, exact_ref, missing_ref,
        gated_s, written_s, state_s, gated_full, full,
    ):  # fmt: skip
        slab, number, head, row = (lax.axis_index(a) for a in "knhb")
        channels, kv_head = pl.ds(slab * SLAB, SLAB), lax.div(head, group)

        def one_pair(pair):
            odd = lax.rem(pair, 2)
            first = 4 * lax.div(pair, 2) + 2 * (1 - odd)  # of the two chunks between the pair and what was saved
            tokens = lambda c: pl.ds((first + c) * CHUNK, CHUNK)

            def copy_gated(ref):
                for c in range(2):
                    plgpu.copy_gmem_to_smem(ref.at[row, tokens(c), head, channels], gated_s.at[c], gated_full)

            def copy_values(saved_ref, ref, ref_head, columns):
                plgpu.copy_gmem_to_smem(saved_ref.at[row, head, lax.div(pair, 2), channels, columns], state_s, full)
                for c in range(2):
                    plgpu.copy_gmem_to_smem(ref.at[row, tokens(c), ref_head, columns], written_s.at[c], full)

            def decay_of(c):  # a row may end within a group
                value = plgpu.load(
                    decay_ref.at[row, head, jnp.minimum(first + c, chunks - 1), channels], layout=ROW, optimized=False
                )
                return along_rows(jnp.where(first + c < chunks, value, 1.0), (SLAB, SLAB))

            def columns_of(j, _):
                columns = pl.ds(j * SLAB, SLAB)
                pl.when(odd == 0)(lambda: copy_values(d_states_ref, d_out_ref, head, columns))
                pl.when(odd == 1)(lambda: copy_values(states_ref, v_ref, kv_head, columns))
                plgpu.barrier_wait(full)
                near, far = odd, 1 - odd
                state = decay_of(far) * load(state_s) + matmul((gated_s.at[far].T, written_s.at[far]))
                state = decay_of(near) * state + matmul((gated_s.at[near].T, written_s.at[near]))
                state_s[...] = state.astype(BF16)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(state_s, missing_ref.at[row, head, pair, channels, columns])
                plgpu.wait_smem_to_gmem(0)

            pl.when(odd == 0)(lambda: copy_gated(gated_q_ref))
            pl.when(odd == 1)(lambda: copy_gated(gated_k_ref))
            plgpu.barrier_wait(gated_full)
            lax.fori_loop(0, value_dim // SLAB, columns_of, None)

        visit_exact(exact_ref.at[row, head], number, one_pair)

    run = kernel(
        body,
        name="gla_backward_rebuild",
        interpret=interpret,
        warpgroups=1,
        out_type=[result((batch, heads, pairs, key_dim, value_dim), BF16, gated_q)],
        grid=(key_dim // SLAB, pl.cdiv(pairs, RUN), heads, batch),
        grid_names=tuple("knhb"),
        scratch_types=[tile(2, CHUNK, SLAB)] * 2 + [tile(SLAB, SLAB), barrier(2), barrier(3)],
    )
    return run(v, d_out, states, d_states, gated_q, gated_k, decay, exact)[0]
