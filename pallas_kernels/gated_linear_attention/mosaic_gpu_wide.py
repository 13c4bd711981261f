"""Wide heads and few rows on Hopper: gated tiles first, then walks that know nothing of gates.

The state of a head of more than 128 key channels does not fit one thread block. Blocks that share a head would each
make its gated tiles and each find out which chunks are exact; here `prepare` does both once, and `walk` serves forward
and backward pass.

Rows that do not fill the chip, of any width, are cut into segments. A first walk finds what every segment writes into a
state of zero; with the decay over whole segments that gives the state before each (the paper's chunkwise form, with
segments for chunks), from where all are walked side by side. Backwards it is the same with the gradient of the state.
"""

import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.gated_linear_attention.mosaic_gpu_backward_pairs import backward_pairs
from pallas_kernels.gated_linear_attention.mosaic_gpu_backward_quads import backward_quads, serves_quads
from pallas_kernels.gated_linear_attention.mosaic_gpu_chunk import CHUNK
from pallas_kernels.gated_linear_attention.mosaic_gpu_prepare import prepare
from pallas_kernels.gated_linear_attention.mosaic_gpu_walk import walk


def wide_forward(q, k, v, g, initial_state, *, scale, segments, save=False, ends=True, interpret=False):
    """Run the forward pass.

    Args:
        q: [B, T, H, K] bfloat16, K a multiple of 64.
        k: [B, T, H_kv, K], v: [B, T, H_kv, V] bfloat16, V a multiple of 64.
        g: one or two terms of the log decay; see `decay_source`.
        initial_state: [B, H, K, V] float32 or None.
        scale: of the query.
        segments: how many pieces to cut a row into.
        save: return what `wide_backward` needs as well.
        ends: return the final state.
        interpret: run in the interpreter.

    Returns:
        out [B, T, H, V] bfloat16, final state [B, H, K, V] float32 or None, and with `save` six arrays for
        `wide_backward`.
    """
    gated_q, gated_k, scores, decay, exact = prepare(q, k, g, scale=scale, interpret=interpret)
    arrays = (gated_q, gated_k, v, scores, decay, initial_state)
    every = 4 if serves_quads(q, g) else 2
    options = {"segments": segments, "every": every, "ends": ends, "interpret": interpret}
    out, final_state, *states = _walk(*arrays, save=save, **options)
    return (out, final_state, gated_q, gated_k, scores, decay, exact, *states) if save else (out, final_state)


def wide_backward(q, k, v, g, d_out, d_final, saved, *, scale, segments, initial, interpret=False):
    """Return the gradients of q, k, v and g, one for each query head, and if there was an `initial` state, of that."""
    gated_q, gated_k, scores, decay, exact, states = saved
    walked = (gated_k, gated_q, d_out, scores, decay, d_final)
    quads = serves_quads(q, g)
    options = {"segments": segments, "every": 4 if quads else 2, "ends": initial, "interpret": interpret}
    dv, d_initial, d_states = _walk(*walked, reverse=True, save=True, **options)
    arrays, options = (q, k, v, g, d_out, states, d_states), {"scale": scale, "interpret": interpret}
    if quads:
        dq, dk, dg = backward_quads(*arrays, gated_q, gated_k, decay, exact, **options)
    else:
        dq, dk, dg = backward_pairs(*arrays, exact, at_edges=True, **options)
    return dq, dk, dv, dg, d_initial


def _walk(
    read, write, x, scores, decay, start, *, segments, every, reverse=False, save=False, ends=True, interpret=False
):
    """Walk rows from `start` [B, H, K, V] or None, cut into segments; return what `walk` does, but one end or None."""
    chunks = pl.cdiv(write.shape[1], CHUNK)
    segment = chunks if segments == 1 else every * pl.cdiv(chunks, every * segments)
    common = {"reverse": reverse, "segment": segment, "interpret": interpret}
    starts = None if start is None else start[:, None]
    if segment < chunks:
        (written,) = walk(None, write, x, None, decay, None, **common)
        starts = _states_before(start, written, _decay_of_segments(decay, segment), reverse)
    out, *others = walk(read, write, x, scores, decay, starts, save=save, every=every, ends=ends, **common)
    end = others.pop(0)[:, 0 if reverse else -1] if ends else None
    return out, end, *others


def _decay_of_segments(decay, segment):
    """Multiply the decays of chunks [B, H, N, K] over segments: [B, segments, H, K]."""
    batch, heads, chunks, key_dim = decay.shape
    beyond = -chunks % segment
    whole = jnp.pad(decay, ((0, 0), (0, 0), (0, beyond), (0, 0)), constant_values=1.0)
    return jnp.moveaxis(whole.reshape(batch, heads, -1, segment, key_dim).prod(axis=3), 2, 1)


def _states_before(start, written, decay, reverse):
    """Return the states before all segments [B, segments, H, K, V] from `start` and what all but the last write."""
    state = jnp.zeros_like(written[:, 0]) if start is None else start
    before, order = [state], range(written.shape[1])
    for i in reversed(order) if reverse else order:
        state = decay[:, i + 1 if reverse else i, :, :, None] * state + written[:, i]
        before.append(state)
    return jnp.stack(before[::-1] if reverse else before, axis=1)
