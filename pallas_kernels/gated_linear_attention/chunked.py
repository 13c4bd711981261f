"""The chunkwise form in plain JAX: matrix products, exact for every gate, on any backend, its gradient written out.

Rows are cut into chunks of C tokens. A chunk reads the state S before it and its own tokens (the paper's section 4.3):

    out = (q decayed from the chunk's start) S + A v,       A_ij = sum over channels of q_i k_j a_{j+1} .. a_i  (j <= i)
    S'  = (decay of the whole chunk) S + (k decayed to the chunk's end)^T v,           a = exp(log_decay)

What is hard is A: it is a plain product of q and k only if the decay between j and i is split into a factor of i and a
factor of j, and with one reference point for the whole chunk one of them overflows. Here every pair of neighbouring
blocks gets its own reference, the border between them (`_attend`). Blocks of 1 token grow to 2, 4, .. C; whenever two
blocks merge, the queries of the second, decayed from the border, meet the keys of the first, decayed to the border, in
one matrix product. All factors are products of the gates on one side of the border, so they are at most 1, and nothing
is ever divided or subtracted: a gate of 0, of 1 and anything between cost no accuracy, in any mixture. The gradient
(`_attend_gradient`) runs the same merges backwards; a gate's gradient is a sum over the pairs of tokens that it lies
between, without cancellation, and 0 for a gate of 0.

The backward pass keeps the inputs and the state before every chunk, and recomputes the rest chunk by chunk.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.segments import segment_starts
from pallas_kernels.target import target

FLOAT32 = jnp.float32


def unsupported(query, key, value, log_decay, initial_state, segment_ids, *, chunk_size, interpret):
    """Return why this form does not serve the call, or None."""
    if chunk_size is not None and chunk_size & (chunk_size - 1):
        return f"chunk_size is {chunk_size}, and blocks that double need a power of two."
    return None


def gated_linear_attention(
    query, key, value, log_decay, initial_state, segment_ids, *, scale, chunk_size, interpret, output_final_state=True
):
    """Compute the op chunk by chunk; see `api.py` for the arguments. `interpret` does not matter here."""
    time, heads = query.shape[1:3]
    cut = _cut_of(query.shape, chunk_size)
    state = initial_state
    if state is None:
        outer = jnp.einsum("bhk,bhv->bhkv", query[:, 0], _per_head(value, heads)[:, 0])
        state = jnp.zeros_like(outer, dtype=FLOAT32)
    starts = None if segment_ids is None else segment_starts(segment_ids)
    if log_decay is not None:
        log_decay = jnp.broadcast_to(log_decay, (log_decay.shape[0], time, *log_decay.shape[2:]))
    # Padding with zeros leaves the state as it is: a key of 0 and a log_decay of 0.
    padding = -time % cut.span
    pad = lambda x: jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2)) if padding else x
    arrays = jax.tree.map(pad, (query, key, value, log_decay, starts))
    out, state = _chunked(*arrays, state, scale, cut)
    return out[:, :time], state


class Cut(NamedTuple):
    """How a row is cut: a scan walks over its spans, each of some chunks that are computed side by side."""

    chunks: int  # of a span
    chunk: int  # tokens of a chunk

    @property
    def span(self):
        """Return the tokens of a span."""
        return self.chunks * self.chunk


def _cut_of(shape, chunk_size):
    """Choose the cut for a query of this shape: spans with work enough for the machine, and little padding."""
    batch, time, heads, _ = shape
    on_cpu = target().platform == "cpu"
    chunk = min(chunk_size or (32 if on_cpu else 64), 1 << (time - 1).bit_length())
    chunks = -(-time // chunk)
    at_once = max(1, (2**11 if on_cpu else 2**14) // (batch * heads * chunk))
    spans = -(-chunks // at_once)
    return Cut(-(-chunks // spans), chunk)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _chunked(q, k, v, g, starts, state, scale, cut):
    """Scan over the spans. q, k, v, g: [B, T, heads, dim]; starts: [B, T] bool; state: [B, H, K, V]."""
    result, _ = _scan_spans((q, k, v, g, starts), state, scale, cut, keep_states=False)
    return result


def _chunked_forward(q, k, v, g, starts, state, scale, cut):
    result, states = _scan_spans((q, k, v, g, starts), state, scale, cut, keep_states=True)
    return result, (q, k, v, g, starts, states)


def _scan_spans(arrays, state, scale, cut, *, keep_states):
    """Return (out, final state) and, where they are kept, the states before every chunk, [spans, N, B, H, K, V]."""
    q, _, v, _, _ = arrays

    def body(carry, n):
        out, state = carry
        span_out, state, states = _span(_take(arrays, n, cut), state, scale)
        return (_put(out, span_out, n), state), states if keep_states else None

    out = jnp.zeros_like(_per_head(v, q.shape[2]))
    return jax.lax.scan(body, (out, state), jnp.arange(q.shape[1] // cut.span))


def _chunked_backward(scale, cut, residuals, cotangents):
    *arrays, states = residuals
    d_out, d_state = cotangents

    def body(carry, span):
        gradients, d_state = carry
        n, states = span
        here = _take(arrays, n, cut)
        d_span, d_state = _span_gradient(here, states, _take(d_out, n, cut), d_state, scale)
        return (jax.tree.map(functools.partial(_put, n=n), gradients, d_span), d_state), None

    gradients = jax.tree.map(jnp.zeros_like, arrays[:4])
    spans = (jnp.arange(states.shape[0]), states)
    (gradients, d_state), _ = jax.lax.scan(body, (gradients, d_state), spans, reverse=True)
    return *gradients, None, d_state


_chunked.defvjp(_chunked_forward, _chunked_backward)


def _take(arrays, n, cut):
    """Return span n of arrays [B, T, ...] as [N, B, C, ...]."""

    def take(x):
        x = jax.lax.dynamic_slice_in_dim(x, n * cut.span, cut.span, axis=1)
        return jnp.moveaxis(x.reshape(x.shape[0], cut.chunks, cut.chunk, *x.shape[2:]), 1, 0)

    return jax.tree.map(take, arrays)


def _put(whole, span, n):
    """Write span n, [N, B, C, ...], into [B, T, ...]."""
    span = jnp.moveaxis(span, 0, 1).reshape(span.shape[1], -1, *span.shape[3:])
    return jax.lax.dynamic_update_slice_in_dim(whole, span.astype(whole.dtype), n * span.shape[1], axis=1)


def _span(arrays, state, scale):
    """Return (out [N, B, C, H, V], the state after the span, the states before its chunks [N, B, H, K, V])."""
    q, k, v, g, starts = arrays
    dot = _dot_for(q, k, v)
    q, k, v, g = _load(q, k, v, g, starts, scale)
    scores, q_in, k_out, _ = _attend(q, k, jnp.exp(g), dot)
    state, states = _walk(state, _chunk_decay(g), dot("...ck,...cv->...kv", k_out, v))
    out = dot("...ik,...kv->...iv", q_in, states) + dot("...ij,...jv->...iv", scores, v)
    return jnp.swapaxes(out, 2, 3), state, states


def _walk(state, decays, additions, reverse=False):
    """Let `state = decay * state + addition` along the first axis; return the last state and those before each step."""
    step = lambda state, change: (change[0] * state + change[1], state)
    return jax.lax.scan(step, state, (decays, additions), reverse=reverse)


def _span_gradient(arrays, states, d_out, d_state, scale):
    """Return the gradients of q, k, v, g and of the state before the span, given those of out and the last state."""
    q, k, v, g, starts = arrays
    shapes = [None if x is None else jnp.swapaxes(x, 2, 3).shape for x in (q, k, v, g)]
    dot = _dot_for(q, k, v)
    q, k, v, g = _load(q, k, v, g, starts, scale)
    d_out = jnp.swapaxes(d_out, 2, 3).astype(FLOAT32)
    a, decays = jnp.exp(g), _chunk_decay(g)
    scores, q_in, k_out, merges = _attend(q, k, a, dot)
    d_state, d_next = _walk(d_state, decays, dot("...ik,...iv->...kv", q_in, d_out), reverse=True)
    d_scores = dot("...iv,...jv->...ij", d_out, v)
    d_v = dot("...ij,...iv->...jv", scores, d_out) + dot("...ck,...kv->...cv", k_out, d_next)
    d_q_in = dot("...iv,...kv->...ik", d_out, states)
    d_k_out = dot("...cv,...kv->...ck", v, d_next)
    d_decay = jnp.sum(decays * d_next * states, axis=-1)[..., None, :]
    d_q, d_k, d_g = _attend_gradient(q, k, a, merges, d_scores, d_q_in, d_k_out, d_decay, dot)
    gradients = [
        None if shape is None else jnp.swapaxes(_sum_to(x, shape), 2, 3)
        for x, shape in zip((scale * d_q, d_k, d_v, d_g), shapes, strict=True)
    ]
    return gradients, d_state


def _attend(q, k, a, dot):
    """Attend within each chunk.

    Args:
        q, k: [N, B, H, C, K].
        a: the gates, broadcastable to that.
        dot: the einsum for matrix products.

    Returns:
        scores: [N, B, H, C, C], A above.
        q_in: [N, B, H, C, K], q decayed from the chunk's start, its own gate included.
        k_out: [N, B, H, C, K], k decayed to the chunk's end, its own gate excluded.
        seen: what `_attend_gradient` wants to see again.
    """
    if a.shape[-1] == q.shape[-1]:
        return _merge(q, k, a, dot)
    # A scalar gate comes out of the products. The decay between two tokens is how a one attends to a one.
    ones = jnp.ones_like(a)
    decays, from_start, to_end, merges = _merge(ones, ones, a, _dot_for(a))
    products = jnp.tril(dot("...ik,...jk->...ij", q, k))
    return products * decays, q * from_start, k * to_end, (products, decays, from_start, to_end, merges)


def _attend_gradient(q, k, a, seen, d_scores, d_q_in, d_k_out, d_decay, dot):
    """Return the gradients of q, k and log(a), given those of the results of `_attend` and of the sum of log(a)."""
    if a.shape[-1] == q.shape[-1]:
        d_q, d_k, d_g = _merge_gradient(q, k, a, seen, d_scores, d_q_in, d_k_out, d_decay, dot)
        return d_q, d_k, _sum_to(d_g, a.shape)
    products, decays, from_start, to_end, merges = seen
    d_scores = jnp.tril(d_scores)
    d_products = d_scores * decays
    d_q = dot("...ij,...jk->...ik", d_products, k) + d_q_in * from_start
    d_k = dot("...ij,...ik->...jk", d_products, q) + d_k_out * to_end
    d_decays = _sum_to(d_scores * products, decays.shape)
    d_from_start, d_to_end = _sum_to(d_q_in * q, a.shape), _sum_to(d_k_out * k, a.shape)
    d_decay = _sum_to(d_decay, (*a.shape[:3], 1, 1))
    ones = jnp.ones_like(a)
    _, _, d_g = _merge_gradient(ones, ones, a, merges, d_decays, d_from_start, d_to_end, d_decay, _dot_for(a))
    return d_q, d_k, d_g


def _merge(q, k, a, dot):
    """Return (scores, q_in, k_out, merges) by merging neighbouring blocks, from single tokens to the whole chunk."""
    scores = jnp.sum(q * k, axis=-1, keepdims=True)
    # From here on [..., blocks, tokens, dim]: q, k decayed from and to the borders of their block, a its whole decay.
    scores, q, k, a = (x[..., :, None, :] for x in (scores, q * a, k, a))
    merges = []
    while q.shape[-3] > 1:
        merges.append((q, k, a))
        (q0, q1), (k0, k1), (a0, a1), (scores0, scores1) = map(_pairs, (q, k, a, scores))
        # Single rows are multiplied without `dot`: as matrix products they cost the TPU's compiler minutes.
        size = q1.shape[-2]
        across = jnp.sum(q1 * k0, axis=-1, keepdims=True) if size == 1 else dot("...ik,...jk->...ij", q1, k0)
        upper = jnp.concatenate([scores0, jnp.zeros_like(across)], axis=-1)
        scores = jnp.concatenate([upper, jnp.concatenate([across, scores1], axis=-1)], axis=-2)
        q = jnp.concatenate([q0, q1 * a0], axis=-2)
        k = jnp.concatenate([k0 * a1, k1], axis=-2)
        a = a0 * a1
    return *(x[..., 0, :, :] for x in (scores, q, k)), merges


def _merge_gradient(q, k, a, merges, d_scores, d_q, d_k, d_g, dot):
    """Return the gradients of q, k and log(a), undoing the merges of `_merge` one by one.

    d_scores, d_q, d_k are the gradients of its results, d_g [..., 1, K] is that of the logarithm of the whole decay.
    """
    d_scores, d_q, d_k = (x[..., None, :, :] for x in (d_scores, d_q, d_k))
    for block_q, block_k, block_a in reversed(merges):
        (_, q1), (k0, _), (a0, a1) = map(_pairs, (block_q, block_k, block_a))
        size = q1.shape[-2]
        d_across = d_scores[..., size:, :size]
        d_q0, d_q1, d_k0, d_k1 = (
            d_q[..., :size, :],
            d_q[..., size:, :] * a0,
            d_k[..., :size, :] * a1,
            d_k[..., size:, :],
        )
        d_pair = d_g[..., None, :] + jnp.stack([d_q1 * q1, d_k0 * k0], axis=-3).sum(axis=-2)
        d_g = d_pair.reshape(*d_pair.shape[:-3], -1, d_pair.shape[-1])
        d_q = _unpaired(d_q0, d_q1 + (d_across * k0 if size == 1 else dot("...ij,...jk->...ik", d_across, k0)))
        d_k = _unpaired(d_k0 + (d_across * q1 if size == 1 else dot("...ij,...ik->...jk", d_across, q1)), d_k1)
        d_scores = _unpaired(d_scores[..., :size, :size], d_scores[..., size:, size:])
    d_own, d_q, d_k = (x[..., 0, :] for x in (d_scores, d_q, d_k))
    d_q = d_q * a
    return d_q + d_own * k, d_k + d_own * q, d_q * q + d_g


def _pairs(x):
    """Split [..., 2 n, rows, dim] into the even and the odd blocks, [..., n, rows, dim] each."""
    x = x.reshape(*x.shape[:-3], x.shape[-3] // 2, 2, *x.shape[-2:])
    return x[..., 0, :, :], x[..., 1, :, :]


def _unpaired(even, odd):
    """Undo `_pairs`."""
    return jnp.stack([even, odd], axis=-3).reshape(*even.shape[:-3], -1, *even.shape[-2:])


def _load(q, k, v, g, starts, scale):
    """Return a span of the arguments as float32 [N, B, H, C, dim], q scaled, g -inf where a segment starts."""
    heads = q.shape[3]
    by_head = lambda x: jnp.swapaxes(x, 2, 3).astype(FLOAT32)
    if g is None:
        g = jnp.zeros((q.shape[0], 1, 1, q.shape[2], 1), FLOAT32)
    else:
        g = by_head(g if g.shape[3] == 1 else _per_head(g, heads))
    if starts is not None:
        g = jnp.where(starts[:, :, None, :, None], -jnp.inf, g)
    return scale * by_head(q), by_head(_per_head(k, heads)), by_head(_per_head(v, heads)), g


def _per_head(x, heads):
    """Repeat the key heads of [..., H_kv, dim] for their query heads."""
    *rest, kv_heads, dim = x.shape
    repeated = jnp.broadcast_to(x[..., None, :], (*rest, kv_heads, heads // kv_heads, dim))
    return repeated.reshape(*rest, heads, dim)


def _sum_to(x, shape):
    """Sum [N, B, H, C, dim] over what was broadcast, or repeated for query heads, from `shape`."""
    x = x.reshape(*x.shape[:2], shape[2], -1, *x.shape[3:]).sum(axis=3)
    return x.sum(axis=tuple(axis for axis, size in enumerate(shape) if size == 1), keepdims=True)


def _chunk_decay(g):
    """Return the decay of each chunk, [N, B, H, K, 1]: a sum of logarithms, as its rounding adds up over the chunks."""
    return jnp.exp(jnp.sum(g, axis=-2))[..., None]


def _dot_for(*inputs):
    """Return the einsum for inputs of these dtypes: bfloat16 products if all are that, float32 ones otherwise."""
    dtype = jnp.bfloat16 if all(x.dtype == jnp.bfloat16 for x in inputs) else FLOAT32
    precision = None if dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
    return lambda spec, x, y: jnp.einsum(
        spec, x.astype(dtype), y.astype(dtype), precision=precision, preferred_element_type=FLOAT32
    )
