"""Gated Linear Attention on Hopper in Pallas Mosaic GPU: bfloat16 queries, keys and values, any gate, any length.

This file makes the kernels one differentiable op: it pads head sizes to whole slabs of 64 channels, brings the gate to
a shape that the kernels read without repeating it in memory, picks the kernels, and sums the gradients of what is
shared. Rows need no padding to whole chunks: the copy engine reads zeros beyond their end, and a zero key with a zero
log decay changes nothing.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.gated_linear_attention.block_sizes import gpu_block_sizes
from pallas_kernels.gated_linear_attention.mosaic_gpu_backward_inputs import backward_inputs
from pallas_kernels.gated_linear_attention.mosaic_gpu_backward_state import backward_state
from pallas_kernels.gated_linear_attention.mosaic_gpu_backward_sweep import backward_sweep
from pallas_kernels.gated_linear_attention.mosaic_gpu_chunk import CHUNK, LEAST_LOG_DECAY, SLAB
from pallas_kernels.gated_linear_attention.mosaic_gpu_forward import forward
from pallas_kernels.gated_linear_attention.mosaic_gpu_wide import wide_backward, wide_forward
from pallas_kernels.segments import segment_starts
from pallas_kernels.target import not_hopper

_MOST_CHUNKS = 65_535  # a grid's second and third axis


def unsupported(query, key, value, log_decay, initial_state, segment_ids, *, chunk_size, interpret):
    """Return why the Hopper kernels do not serve the call, or None; see `api.py`."""
    key_dim, value_dim = query.shape[-1], value.shape[-1]
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dtype != jnp.bfloat16:
            return f"{name} is {x.dtype}; the kernels take bfloat16."
    if log_decay is not None and log_decay.dtype not in (jnp.bfloat16, jnp.float32):
        return f"log_decay is {log_decay.dtype}; the kernels take bfloat16 or float32."
    if key_dim > 256 or value_dim > 512:
        return f"the head sizes are {key_dim} and {value_dim}; the kernels take at most 256 and 512."
    if chunk_size not in (None, CHUNK):
        return f"chunk_size is {chunk_size}; the kernels walk chunks of {CHUNK}."
    if query.shape[1] > _MOST_CHUNKS * CHUNK:
        return f"a row has {query.shape[1]} tokens; a grid has room for {_MOST_CHUNKS * CHUNK}."
    return None if interpret else not_hopper()


def gated_linear_attention(
    query, key, value, log_decay, initial_state, segment_ids, *, scale, chunk_size, interpret, output_final_state=True
):
    """Compute the op on a Hopper GPU; see `api.py`."""
    if scale <= 0:  # the kernels take the logarithm of it into their exponents
        query, scale = query * (-1 if scale else 0), -scale or 1.0
    (batch, time, _, key_dim), value_dim = query.shape, value.shape[-1]
    keys, values = -(-key_dim // SLAB) * SLAB, -(-value_dim // SLAB) * SLAB
    # The copy engine wants whole groups of 8 tokens; the backward pass more than one chunk, whose gate `decay_source`
    # would take for constant; the interpreter whole pairs of chunks.
    tail = -time % (2 * CHUNK if interpret or time <= CHUNK else 8)
    decay = _decay(log_decay, segment_ids, (batch, time, keys), tail)
    pad = lambda x, width: jnp.pad(x, ((0, 0), (0, tail), (0, 0), (0, width - x.shape[-1])))
    if initial_state is not None:
        initial_state = jnp.pad(initial_state, ((0, 0), (0, 0), (0, keys - key_dim), (0, values - value_dim)))
    arrays = (pad(query, keys), pad(key, keys), pad(value, values), decay, initial_state)
    out, final_state = _ATTENTION[interpret](*arrays, scale, log_decay is not None, output_final_state, interpret)
    out = out[:, :time, :, :value_dim]
    return out, final_state[:, :, :key_dim, :value_dim] if output_final_state else None


def _decay(log_decay, segment_ids, shape, tail):
    """Return log decays [B or 1, T or C, heads, K or SLAB] as `decay_source` reads them, segments reset."""
    time, keys = shape[1:]
    constant = log_decay is None
    if log_decay is None:
        log_decay = jnp.zeros((1, 1, 1, 1), jnp.bfloat16)
    if segment_ids is not None:
        starts = segment_starts(segment_ids)[..., None, None]
        log_decay = jnp.where(starts, jnp.asarray(LEAST_LOG_DECAY, log_decay.dtype), log_decay)
    rows, times, heads, channels = log_decay.shape
    if times == 1:  # beyond the end of a row nothing may decay
        times = CHUNK if time % (2 * CHUNK) == 0 or constant else time
    log_decay = jnp.broadcast_to(log_decay, (rows, times, heads, SLAB if channels == 1 else channels))
    beyond, wider = tail if times == time else 0, 0 if channels == 1 else keys - channels
    return jnp.pad(log_decay, ((0, 0), (0, beyond), (0, 0), (0, wider)))


def _terms(decay):
    """Return log decays as a sum of bfloat16 terms: two of them leave a float32 gate an error of 2^-17."""
    if decay.dtype == jnp.bfloat16:
        return (decay,)
    decay = jnp.maximum(decay, LEAST_LOG_DECAY)
    high = decay.astype(jnp.bfloat16)
    return high, (decay - high.astype(jnp.float32)).astype(jnp.bfloat16)


def _sizes(query, value):
    batch, time, heads, key_dim = query.shape
    return gpu_block_sizes(key_dim, value.shape[-1], batch * heads, -(-time // CHUNK))


def _wide(query, sizes):
    """Return whether a head's state is too wide for one thread block, or rows too few for one block each."""
    return query.shape[-1] > 2 * SLAB or sizes.segments > 1


def _sweeps(query, value, decay):
    """Return whether the whole backward pass fits in one kernel."""
    return query.shape[-1] == value.shape[-1] == SLAB and decay.dtype == jnp.bfloat16


def _attention(query, key, value, decay, initial_state, scale, gated, ends, interpret):
    """Run the forward pass; `gated`: with a gradient of the decay, `ends`: with final states, or None for them."""
    arrays = (query, key, value, _terms(decay), initial_state)
    options, sizes = {"scale": scale, "ends": ends, "interpret": interpret}, _sizes(query, value)
    if _wide(query, sizes):
        return wide_forward(*arrays, segments=sizes.segments, **options)
    return forward(*arrays, value_tile=sizes.value_tile, **options)


def _attention_forward(query, key, value, decay, initial_state, scale, gated, ends, interpret):
    arrays = (query, key, value, _terms(decay), initial_state)
    options, sizes = {"scale": scale, "ends": ends, "interpret": interpret}, _sizes(query, value)
    if _wide(query, sizes):
        out, final_state, *saved = wide_forward(*arrays, segments=sizes.segments, save=True, **options)
    else:
        save = 1 if _sweeps(query, value, decay) else 2
        out, final_state, *saved = forward(*arrays, value_tile=sizes.value_tile, save=save, **options)
    return (out, final_state), (query, key, value, decay, None if initial_state is None else (), saved)


def _attention_backward(scale, gated, ends, interpret, residuals, gradients):
    query, key, value, decay, initial_state, saved = residuals  # of the initial state: whether there was one
    d_out, d_final = gradients  # None where there are no final states
    arrays = (query, key, value, _terms(decay), d_out)
    options, sizes = {"scale": scale, "interpret": interpret}, _sizes(query, value)
    initial = initial_state is not None
    if _wide(query, sizes):
        options |= {"segments": sizes.segments, "initial": initial}
        dq, dk, dv, dg, d_initial = wide_backward(*arrays, d_final, saved, **options)
    elif _sweeps(query, value, decay):
        states, exact, scores = saved
        dq, dk, dv, dg, d_initial = backward_sweep(*arrays, states, exact, scores, d_final, initial=initial, **options)
    else:
        states, exact, scores = saved
        of_state = (*arrays[:2], *arrays[3:], exact, scores, d_final)
        du, dv, d_initial = backward_state(*of_state, value_tile=sizes.value_tile, initial=initial, **options)
        dq, dk, dg = backward_inputs(*arrays, states, du, exact, **options)
    d_decay = _sum_to(dg, decay) if gated else jnp.zeros_like(decay)
    return dq, _sum_to(dk, key), _sum_to(dv, value), d_decay, d_initial


def _sum_to(gradient, like):
    """Sum a gradient [B, T, H, channels] over what `like` shares: rows, chunks, consecutive heads, slabs."""
    if gradient.shape == like.shape:
        return gradient.astype(like.dtype)
    rows, time, heads, channels = like.shape
    batch, tokens, all_heads, width = gradient.shape
    beyond = -tokens % time
    gradient = jnp.pad(gradient, ((0, 0), (0, beyond), (0, 0), (0, 0))).astype(jnp.float32)
    outer = (batch // rows, rows, (tokens + beyond) // time, time)
    inner = (heads, all_heads // heads, width // channels, channels)
    return gradient.reshape(*outer, *inner).sum(axis=(0, 2, 5, 6)).astype(like.dtype)


def _differentiable(interpret):
    """Give the forward pass its gradient; under `jax.checkpoint` its first run then saves nothing for it."""
    attention = jax.custom_vjp(_attention, nondiff_argnums=(5, 6, 7, 8))
    lean = not interpret  # whose effects stand in the way
    attention.defvjp(_attention_forward, _attention_backward, optimize_remat=lean)
    return attention


_ATTENTION = {interpret: _differentiable(interpret) for interpret in (False, True)}
