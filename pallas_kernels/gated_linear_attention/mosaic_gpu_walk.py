"""The walk over the chunks of wide heads on Hopper, forwards or backwards, with the state in registers.

With what `mosaic_gpu_prepare` makes, the recurrence and its gradient are the same two products a chunk:

    forwards   o  = q~ S  + A v        S  <- Diag(e^{G_last}) S  + k~^T v       S  at the start of a chunk
    backwards  dv = k~ dS + A^T do     dS <- Diag(e^{G_last}) dS + q~^T do      dS at its end

One thread block walks a row, head and 128 value columns, or 64 where 128 would leave half of the chip idle. A consumer
warpgroup holds the state of 64 columns, transposed, [64, K] in float32 registers: so it multiplies from the left as it
is, and decays along its columns. Two of a block share nothing but the tiles that another warpgroup copies in. Two
blocks of a head make a cluster and read each tile once, and all blocks of a head start together, to find in the L2
cache what one of them has read. Rows too few to fill the chip are walked in segments side by side, from states that a
first walk, which writes no output, has found; see `mosaic_gpu_wide`.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gated_linear_attention.block_sizes import MULTIPROCESSORS
from pallas_kernels.gated_linear_attention.mosaic_gpu_chunk import (
    BF16,
    CHUNK,
    COL,
    CONSUMER,
    F32,
    PRODUCER,
    SLAB,
    barrier,
    kernel,
    load_turned_state,
    matmul,
    result,
    set_registers,
    tile,
    turned,
    zeros,
)

COLUMNS = 64  # value columns of one warpgroup
STAGES = 2  # chunks in shared memory


def walk(
    read,
    write,
    x,
    scores,
    decay,
    start,
    *,
    reverse=False,
    save=False,
    every=2,
    ends=True,
    segment=None,
    value_tile=None,
    interpret=False,
):
    """Walk every row, or each of its segments, chunk by chunk.

    Args:
        read: [B, T, H, K] bfloat16, what the state is read with, K a multiple of 64; None writes no output.
        write: [B, T, H, K] bfloat16, what the state is written with.
        x: [B, T, heads, V] bfloat16, what is written; consecutive heads of `write` share one of it.
        scores: [B, H, N, C, C] bfloat16, A; None without `read`.
        decay: [B, H, N, K] float32, e^{G_last}.
        start: [B, segments, H, K, V] float32, the states before the segments, or None for zeros.
        reverse: walk from the last chunk to the first, with A^T.
        save: return what the backward pass needs of the states.
        every: of how many chunks one state is saved, 2 or 4.
        ends: return the states after the segments.
        segment: chunks of a segment, a multiple of `every`; None: the whole row.
        value_tile: value columns of a thread block, 64 or 128; None: what fills the chip.
        interpret: run in the interpreter.

    Returns:
        If there is a `read` the output [B, T, H, V] bfloat16; with `ends` the states after the segments [B, segments,
        H, K, V] float32; with `save` the states S before chunks 0, every, 2 every... or, in reverse, after chunks
        every - 1, 2 every - 1... and the last, in bfloat16, [B, H, ceil(N / every), K, V].
    """
    batch, time, heads, key_dim = write.shape
    value_dim, group = x.shape[-1], heads // x.shape[2]
    chunks, slabs = pl.cdiv(time, CHUNK), key_dim // SLAB
    segment = segment or chunks
    segments = pl.cdiv(chunks, segment)
    if value_tile is None:
        fills = 2 * batch * segments * heads * (value_dim // (2 * COLUMNS)) > MULTIPROCESSORS
        value_tile = 2 * COLUMNS if value_dim % (2 * COLUMNS) == 0 and fills else COLUMNS
    consumers, tiles = value_tile // COLUMNS, value_dim // value_tile
    blocks = 2 if tiles % 2 == 0 else 1  # of a cluster

    out_type = [] if read is None else [result((batch, time, heads, value_dim), BF16, write)]
    if ends:
        out_type.append(result((batch, segments, heads, key_dim, value_dim), F32, write))
    if save:
        out_type.append(result((batch, heads, pl.cdiv(chunks, every), key_dim, value_dim), BF16, write))
    reads, starts = read is not None, start is not None

    def body(*all_refs):
        refs = list(all_refs)
        take: Any = lambda count, present=True: [refs.pop(0) if present else None for _ in range(count)]
        read_ref, scores_ref = take(2, reads)
        write_ref, x_ref, decay_ref = take(3)
        (start_ref,), (out_ref,), (end_ref,), (states_ref,) = (take(1, there) for there in (starts, reads, ends, save))
        write_s, x_s, decay_s, write_full, write_free, done = take(6)
        read_s, scores_s, out_s, read_full, read_free = take(5, reads)
        (states_s,) = take(1, save)

        block = lax.axis_index("v") * blocks + (lax.axis_index("c") if blocks > 1 else 0)
        head, warpgroup = lax.axis_index("h"), lax.axis_index("warpgroup")
        row, part = lax.div(lax.axis_index("b"), segments), lax.rem(lax.axis_index("b"), segments)
        first = part * segment
        steps = jnp.minimum(segment, chunks - first)
        number = lambda i: first + (steps - 1 - i if reverse else i)
        tokens = lambda n: pl.ds(n * CHUNK, CHUNK)
        slab = lambda s: pl.ds(s * SLAB, SLAB)
        columns = lambda w: pl.ds((block * consumers + w) * COLUMNS, COLUMNS)
        shared: Any = {"collective_axes": "c"} if blocks > 1 else {}

        @pl.when(warpgroup == 0)
        def _copies():
            set_registers(PRODUCER, interpret)

            def chunk(i, _):
                p, n = lax.rem(i, STAGES), number(i)
                when_free = lambda barrier: pl.when(i >= STAGES)(lambda: plgpu.barrier_wait(barrier))
                if reads:
                    when_free(read_free.at[p])
                    plgpu.copy_gmem_to_smem(read_ref.at[row, tokens(n), head], read_s.at[p], read_full.at[p], **shared)
                    plgpu.copy_gmem_to_smem(scores_ref.at[row, head, n], scores_s.at[p], read_full.at[p], **shared)
                when_free(write_free.at[p])
                for w in range(consumers):
                    source = x_ref.at[row, tokens(n), lax.div(head, group), columns(w)]
                    plgpu.copy_gmem_to_smem(source, x_s.at[p, w], write_full.at[p])
                plgpu.copy_gmem_to_smem(write_ref.at[row, tokens(n), head], write_s.at[p], write_full.at[p], **shared)
                plgpu.copy_gmem_to_smem(decay_ref.at[row, head, n], decay_s.at[p], write_full.at[p], **shared)

            lax.fori_loop(0, steps, chunk, None)

            def drain(i, _):
                p = lax.rem(i, STAGES)
                plgpu.barrier_wait(write_free.at[p])
                if reads:
                    plgpu.barrier_wait(read_free.at[p])

            lax.fori_loop(jnp.maximum(steps - STAGES, 0), steps, drain, None)

        @pl.when(warpgroup > 0)
        def _states():
            set_registers(CONSUMER, interpret)
            w = warpgroup - 1
            mine = columns(w)
            of_slab = lambda state, s: state[:, s * SLAB : (s + 1) * SLAB]

            def save_slab(rounded, n, s):
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                states_s.at[w, s % 2].T[...] = rounded
                plgpu.commit_smem()
                target = states_ref.at[row, head, lax.div(n, every), slab(s), mine]
                plgpu.copy_smem_to_gmem(states_s.at[w, s % 2], target)

            def put_out(state, p, n):
                """Write the chunk's output, and the state if it is one of those to keep."""
                last = jnp.logical_or(lax.rem(n, every) == every - 1, n == chunks - 1)
                keep = last if reverse else lax.rem(n, every) == 0

                def products(accumulator):
                    for s in range(slabs):
                        rounded = of_slab(state, s).astype(BF16)
                        if interpret:  # which wants both operands in shared memory
                            out_s.at[w][...] = rounded
                            plgpu.commit_smem()
                            plgpu.wgmma(accumulator, out_s.at[w], read_s.at[p, :, slab(s)].T)
                            plgpu.wgmma_wait(0)
                        else:
                            plgpu.wgmma(accumulator, rounded, read_s.at[p, :, slab(s)].T)
                        if save:
                            pl.when(keep)(functools.partial(save_slab, rounded, n, s))
                            if not interpret:
                                plgpu.wgmma_wait(0)  # or all rounded slabs would need registers at once
                    plgpu.barrier_wait(write_full.at[p])
                    plgpu.wgmma(accumulator, x_s.at[p, w].T, scores_s.at[p] if reverse else scores_s.at[p].T)
                    return accumulator[...]

                plgpu.barrier_wait(read_full.at[p])
                out = lax.optimization_barrier(pl.run_scoped(products, plgpu.ACC((COLUMNS, CHUNK), F32)))
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                out_s.at[w].T[...] = out.astype(BF16)
                plgpu.commit_smem()  # after which all warps have read the tiles: a cluster's barrier waits for one only
                plgpu.barrier_arrive(read_free.at[p])
                plgpu.copy_smem_to_gmem(out_s.at[w], out_ref.at[row, tokens(n), head, mine])

            def chunk(i, state):
                p, n = lax.rem(i, STAGES), number(i)
                if reads:
                    put_out(state, p, n)
                else:
                    plgpu.barrier_wait(write_full.at[p])
                decayed = []
                for s in range(slabs):
                    factor = plgpu.load(decay_s.at[p, slab(s)], layout=COL, optimized=False)
                    decayed.append(of_slab(state, s) * lax.broadcast_in_dim(factor, (COLUMNS, SLAB), [1]))
                state = jnp.concatenate(decayed, axis=1)
                if interpret:  # which has no accumulators that start from a value
                    state = state + matmul((x_s.at[p, w].T, write_s.at[p]), shape=(COLUMNS, key_dim))
                else:
                    update = lambda accumulator: plgpu.wgmma(accumulator, x_s.at[p, w].T, write_s.at[p])
                    state = lax.optimization_barrier(pl.run_state(update)(plgpu.ACC.init(state)))
                plgpu.commit_smem()  # as above
                plgpu.barrier_arrive(write_free.at[p])
                return state

            if not starts:
                state = zeros((COLUMNS, key_dim))
            else:
                state = load_turned_state(start_ref.at[row, part, head, :, mine], interpret)
            state = lax.fori_loop(0, steps, chunk, state)
            for s in range(slabs if ends else 0):
                end_ref.at[row, part, head, slab(s), mine].T[...] = turned(of_slab(state, s), interpret)
            plgpu.wait_smem_to_gmem(0)

        # no warpgroup leaves while another still multiplies, no block while another of its cluster copies to it
        plgpu.barrier_arrive(done)
        plgpu.barrier_wait(done)

    def of_cluster(arrivals, count=()):
        if blocks == 1:
            return plgpu.Barrier(num_arrivals=arrivals, num_barriers=count or 1)
        return plgpu.ClusterBarrier(collective_axes=("c",), num_arrivals=arrivals, num_barriers=count)

    scratch = [
        tile(STAGES, CHUNK, key_dim),
        tile(STAGES, consumers, CHUNK, COLUMNS),
        plgpu.SMEM((STAGES, key_dim), F32),
        barrier(2 + consumers, STAGES),  # write_full
        of_cluster(consumers, STAGES),  # write_free
        of_cluster(1 + consumers),  # done
    ]
    if reads:
        scratch += [
            tile(STAGES, CHUNK, key_dim),
            tile(STAGES, CHUNK, CHUNK),
            tile(consumers, CHUNK, COLUMNS),
            barrier(2, STAGES),  # read_full
            of_cluster(consumers, STAGES),  # read_free
        ]
    if save:
        scratch.append(tile(consumers, 2, SLAB, COLUMNS))
    run = kernel(
        body,
        name="gla_walk",
        interpret=interpret,
        warpgroups=1 + consumers,
        out_type=out_type,
        grid=(batch * segments, heads, tiles // blocks),
        grid_names=("b", "h", "v"),  # the last runs fastest
        scratch_types=scratch,
        **({"cluster": (blocks,), "cluster_names": ("c",)} if blocks > 1 else {}),
    )
    inputs = [*([read, scores] if reads else []), write, x, decay, *([start] if starts else [])]
    return run(*inputs)
