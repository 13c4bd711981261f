"""The walk over the chunks of wide heads on Hopper, forwards or backwards, with the state in registers.

With what `mosaic_gpu_prepare` makes, the recurrence and its gradient are the same two products a chunk:

    forwards   o  = q~ S  + A v        S  <- Diag(e^{G_last}) S  + k~^T v       S  at the start of a chunk
    backwards  dv = k~ dS + A^T do     dS <- Diag(e^{G_last}) dS + q~^T do      dS at its end

One thread block walks a row, head and 128 value columns, or 64 where 128 would leave half of the chip idle. A consumer
warpgroup holds the state of 64 columns, transposed, [64, K] in float32 registers: so it multiplies from the left as it
is, and decays along its columns, slab by slab, while the product with the rounded slab runs. Two of a block share
nothing but the tiles that another warpgroup copies in. Two blocks of a head make a cluster and read each tile once, and
all blocks of a head start together, to find in the L2 cache what one of them has read. Rows too few to fill the chip
are walked in segments side by side, from states that a first walk, which writes no output, has found; see
`mosaic_gpu_wide`.
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
    left_operand,
    load_turned_state,
    matmul,
    result,
    set_registers,
    tile,
    turned,
    zeros,
)

COLUMNS = 64  # value columns of one warpgroup


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
        ends: return the states after the segments; without `read` only after those that another one follows.
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
    reads, starts = read is not None, start is not None
    walked = segments if reads or segments == 1 else segments - 1
    if value_tile is None:
        fills = 2 * batch * segments * heads * (value_dim // (2 * COLUMNS)) > MULTIPROCESSORS
        value_tile = 2 * COLUMNS if value_dim % (2 * COLUMNS) == 0 and fills else COLUMNS
    consumers, tiles = value_tile // COLUMNS, value_dim // value_tile
    blocks = 2 if tiles % 2 == 0 else 1  # of a cluster
    kinds = 2 if reads else 1  # of tiles [C, K]: of `read` and of `write`, by turns in a ring of slots, as many as fit
    slots = 3 if not reads else 5 if value_tile == COLUMNS and not save else 4
    places = pl.cdiv(slots, kinds)  # for what else a chunk needs

    out_type = [result((batch, time, heads, value_dim), BF16, write)] if reads else []
    if ends:
        out_type.append(result((batch, walked, heads, key_dim, value_dim), F32, write))
    if save:
        out_type.append(result((batch, heads, pl.cdiv(chunks, every), key_dim, value_dim), BF16, write))

    def body(*all_refs):
        refs = list(all_refs)
        take: Any = lambda count, present=True: [refs.pop(0) if present else None for _ in range(count)]
        read_ref, scores_ref = take(2, reads)
        write_ref, x_ref, decay_ref = take(3)
        (start_ref,), (out_ref,), (end_ref,), (states_ref,) = (take(1, there) for there in (starts, reads, ends, save))
        tiles_s, x_s, decay_s, write_full, free, done = take(6)
        scores_s, out_s, read_full = take(3, reads)
        (states_s,) = take(1, save)

        block = lax.axis_index("v") * blocks + (lax.axis_index("c") if blocks > 1 else 0)
        head, warpgroup = lax.axis_index("h"), lax.axis_index("warpgroup")
        row, part = lax.div(lax.axis_index("b"), walked), lax.rem(lax.axis_index("b"), walked)
        first = (part + segments - walked if reverse else part) * segment
        steps = jnp.minimum(segment, chunks - first)
        number = lambda i: first + (steps - 1 - i if reverse else i)
        slot = lambda t: lax.rem(t, slots)  # of tile t
        read_slot, write_slot = (lambda i: slot(kinds * i)), (lambda i: slot(kinds * i + kinds - 1))
        tokens = lambda n: pl.ds(n * CHUNK, CHUNK)
        slab = lambda s: pl.ds(s * SLAB, SLAB)
        columns = lambda w: pl.ds((block * consumers + w) * COLUMNS, COLUMNS)
        shared: Any = {"collective_axes": "c"} if blocks > 1 else {}

        @pl.when(warpgroup == 0)
        def _copies():
            set_registers(PRODUCER, interpret)

            def chunk(i, _):
                p, n = lax.rem(i, places), number(i)

                def copy_decay(full):
                    plgpu.copy_gmem_to_smem(decay_ref.at[row, head, n], decay_s.at[p], full.at[p], **shared)

                def copy_tile(ref, t, full):
                    plgpu.copy_gmem_to_smem(ref.at[row, tokens(n), head], tiles_s.at[slot(t)], full.at[p], **shared)

                def wait_for_slot(t):
                    pl.when(t >= slots)(lambda: plgpu.barrier_wait(free.at[slot(t)]))

                if reads:
                    wait_for_slot(kinds * i)
                    copy_tile(read_ref, kinds * i, read_full)
                    plgpu.copy_gmem_to_smem(scores_ref.at[row, head, n], scores_s.at[p], read_full.at[p], **shared)
                    copy_decay(read_full)
                wait_for_slot(kinds * i + kinds - 1)
                for w in range(consumers):
                    source = x_ref.at[row, tokens(n), lax.div(head, group), columns(w)]
                    plgpu.copy_gmem_to_smem(source, x_s.at[p, w], write_full.at[p])
                copy_tile(write_ref, kinds * i + kinds - 1, write_full)
                if not reads:
                    copy_decay(write_full)

            lax.fori_loop(0, steps, chunk, None)
            drain = lambda t, _: plgpu.barrier_wait(free.at[slot(t)])
            lax.fori_loop(jnp.maximum(kinds * steps - slots, 0), kinds * steps, drain, None)

        @pl.when(warpgroup > 0)
        def _states():
            set_registers(CONSUMER, interpret)
            w = warpgroup - 1
            mine = columns(w)
            of_slab = lambda state, s: state[:, s * SLAB : (s + 1) * SLAB]

            def load_factor(p, s):
                factor = plgpu.load(decay_s.at[p, slab(s)], layout=COL, optimized=False)
                return lax.optimization_barrier(factor)  # here, and not where it is used

            def decayed(state, s, factor):
                x = of_slab(state, s) * lax.broadcast_in_dim(factor, (COLUMNS, SLAB), [1])
                return lax.optimization_barrier(x)  # here

            def save_slab(rounded, n, s):
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                states_s.at[w, s % 2].T[...] = rounded
                plgpu.commit_smem()
                target = states_ref.at[row, head, lax.div(n, every), slab(s), mine]
                plgpu.copy_smem_to_gmem(states_s.at[w, s % 2], target)

            def output(state, i, p, n):
                """Return the chunk's output and the decayed state; write the state if it is one of those to keep."""
                last = jnp.logical_or(lax.rem(n, every) == every - 1, n == chunks - 1)
                keep = last if reverse else lax.rem(n, every) == 0

                def products(accumulator):
                    after = []
                    for s in range(slabs):
                        rounded, factor = of_slab(state, s).astype(BF16), None if save else load_factor(p, s)
                        read = tiles_s.at[read_slot(i), :, slab(s)].T
                        if interpret:
                            plgpu.wait_smem_to_gmem(0)  # the last chunk's output is on its way from there
                        plgpu.wgmma(accumulator, left_operand(rounded, out_s.at[w], interpret), read)
                        if save:
                            pl.when(keep)(functools.partial(save_slab, rounded, n, s))
                        else:
                            after.append(decayed(state, s, factor))
                        plgpu.wgmma_wait(0 if save or interpret else 1)  # rounded slabs take registers until then
                    plgpu.barrier_wait(write_full.at[p])
                    plgpu.wgmma(accumulator, x_s.at[p, w].T, scores_s.at[p] if reverse else scores_s.at[p].T)
                    return accumulator[...], *after

                plgpu.barrier_wait(read_full.at[p])
                out, *after = pl.run_scoped(products, plgpu.ACC((COLUMNS, CHUNK), F32))
                if save:  # which leaves no registers to decay slabs beside the products
                    after = [decayed(state, s, load_factor(p, s)) for s in range(slabs)]
                return lax.optimization_barrier(out), jnp.concatenate(after, axis=1)

            def put_out(out, i, n):
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                out_s.at[w].T[...] = out.astype(BF16)
                plgpu.commit_smem()  # after which all warps have read the tiles: a cluster's barrier waits for one only
                plgpu.barrier_arrive(free.at[read_slot(i)])
                plgpu.copy_smem_to_gmem(out_s.at[w], out_ref.at[row, tokens(n), head, mine])

            def chunk(i, state):
                p, n = lax.rem(i, places), number(i)
                x, write = x_s.at[p, w].T, tiles_s.at[write_slot(i)]
                if reads:
                    out, state = output(state, i, p, n)
                else:
                    plgpu.barrier_wait(write_full.at[p])
                    state = jnp.concatenate([decayed(state, s, load_factor(p, s)) for s in range(slabs)], axis=1)
                if interpret:  # which has no accumulators that start from a value
                    state = state + matmul((x, write), shape=(COLUMNS, key_dim))
                    if reads:
                        put_out(out, i, n)
                else:

                    def update(accumulator):
                        plgpu.wgmma(accumulator, x, write)
                        if reads:
                            put_out(out, i, n)  # meanwhile

                    state = lax.optimization_barrier(pl.run_state(update)(plgpu.ACC.init(state)))
                plgpu.commit_smem()  # as above
                plgpu.barrier_arrive(free.at[write_slot(i)])
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
        tile(slots, CHUNK, key_dim),
        tile(places, consumers, CHUNK, COLUMNS),
        plgpu.SMEM((places, key_dim), F32),
        barrier((1 if reads else 2) + consumers, places),  # write_full
        of_cluster(consumers, slots),  # free
        of_cluster(1 + consumers),  # done
    ]
    if reads:
        scratch += [
            tile(places, CHUNK, CHUNK),
            tile(consumers, CHUNK, COLUMNS),
            barrier(3, places),  # read_full
        ]
    if save:
        scratch.append(tile(consumers, 2, SLAB, COLUMNS))
    run = kernel(
        body,
        name="gla_walk",
        interpret=interpret,
        warpgroups=1 + consumers,
        out_type=out_type,
        grid=(batch * walked, heads, tiles // blocks),
        grid_names=("b", "h", "v"),  # the last runs fastest
        scratch_types=scratch,
        **({"cluster": (blocks,), "cluster_names": ("c",)} if blocks > 1 else {}),
    )
    inputs = [*([read, scores] if reads else []), write, x, decay, *([start] if starts else [])]
    return run(*inputs)
