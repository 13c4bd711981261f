"""Forward TPU kernel: one pass over the tokens, the state of every head in VMEM."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.gated_linear_attention.mosaic_tpu_chunk import (
    BOUND,
    LOG2E,
    LOWEST_GATE,
    causal,
    column,
    dot,
    dot01,
    iota,
    level_weights,
    middle_weights,
    where01,
)


def _forward_kernel(
    *refs, scale, chunk, heads, key_dim, value_dim, dtype, gated, scalar_gate, packed, has_initial, save_states
):
    refs = list(refs)
    q_ref, k_ref, v_ref = refs[:3]
    refs = refs[3:]
    g_ref = refs.pop(0) if gated else None
    run_ref = refs.pop(0) if packed else None
    initial_ref = refs.pop(0) if has_initial else None
    out_ref, state_ref = refs[:2]
    refs = refs[2:]
    saved_ref = refs.pop(0) if save_states else None
    d_ref, pending_ref = refs if gated else (None, None)

    step = pl.program_id(2)
    chunks = q_ref.shape[0] // chunk
    keys = [slice(h * key_dim, (h + 1) * key_dim) for h in range(heads)]
    values = [slice(h * value_dim, (h + 1) * value_dim) for h in range(heads)]

    # The state of head h is 2^pending * state_ref[h]: the decay from the last reference to the end of the chunk is applied
    # together with the next one.
    @pl.when(step == 0)
    def _():
        state_ref[...] = initial_ref[...] if has_initial else jnp.zeros_like(state_ref)
        if gated:
            pending_ref[...] = jnp.zeros_like(pending_ref)

    if save_states:
        for h in range(heads):
            state = state_ref[h]
            if gated:
                state = state * column(jnp.exp2(pending_ref[:1, keys[h]]))
            saved_ref[h] = state.astype(saved_ref.dtype)

    def segments(rows):
        """Return the masks of a packed chunk: pairs in one document, rows reading the state, rows kept, state kept."""
        if not packed:
            return None
        runs = run_ref[:, rows]  # [2, C]: the run of each token, and of the last token before the chunk
        return runs

    def tile(ref, rows, columns):
        return ref[rows, columns].astype(jnp.float32)

    def ungated_chunk(c):
        rows = slice(c * chunk, (c + 1) * chunk)
        mask = causal(chunk)
        for h in range(heads):
            q = (tile(q_ref, rows, keys[h]) * scale).astype(dtype)
            k, v = k_ref[rows, keys[h]].astype(dtype), v_ref[rows, values[h]].astype(dtype)
            attention = jnp.where(mask, dot(q, k, (1, 1)), 0.0).astype(dtype)
            state = state_ref[h]
            out_ref[rows, values[h]] = (dot(q, state.astype(dtype)) + dot(attention, v)).astype(out_ref.dtype)
            state_ref[h] = state + dot(k, v, (0, 0))

    def bounded_chunk(c):
        rows = slice(c * chunk, (c + 1) * chunk)
        mask = causal(chunk)
        for h in range(heads):
            d = d_ref[rows, keys[h]]
            q = (tile(q_ref, rows, keys[h]) * (jnp.exp2(d) * scale)).astype(dtype)
            k = (tile(k_ref, rows, keys[h]) * jnp.exp2(-d)).astype(dtype)
            v = v_ref[rows, values[h]].astype(dtype)
            attention = jnp.where(mask, dot(q, k, (1, 1)), 0.0).astype(dtype)
            first = g_ref[rows, keys[h]][:1].astype(jnp.float32) * LOG2E - d[:1]
            state = state_ref[h] * column(jnp.exp2(pending_ref[:1, keys[h]] + first))
            out_ref[rows, values[h]] = (dot(q, state.astype(dtype)) + dot(attention, v)).astype(out_ref.dtype)
            state_ref[h] = state + dot(k, v, (0, 0))
            pending_ref[:1, keys[h]] = d[chunk - 1 :]

    if not gated:
        for c in range(chunks):
            ungated_chunk(c)
        return

    weights = middle_weights(chunk)
    unbounded = jnp.zeros((1, q_ref.shape[1]), jnp.float32)
    for c in range(chunks):
        rows = slice(c * chunk, (c + 1) * chunk)
        d = dot01(weights, g_ref[rows, :]) * LOG2E
        d_ref[rows, :] = d
        # D falls along the chunk, so its first and last rows bound it. Compared so that NaN (a gate of -inf) is unbounded.
        inside = (d[:1] <= BOUND) & (d[chunk - 1 :] >= -BOUND)
        unbounded = jnp.maximum(unbounded, jnp.where(inside, 0.0, 1.0))
    bounded = jnp.max(unbounded) == 0.0

    @pl.when(bounded)
    def _():
        for c in range(chunks):
            bounded_chunk(c)

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        for h in range(heads):
            state_ref[h] = state_ref[h] * column(jnp.exp2(pending_ref[:1, keys[h]]))


def forward(q, k, v, g, *, heads, scale, chunk, step, head_block, interpret=False, vmem=64 * 2**20):
    batch, time, key_width = q.shape
    value_width = v.shape[2]
    key_dim, value_dim = key_width // heads, value_width // heads
    dtype = jnp.bfloat16
    block = lambda width: pl.BlockSpec((None, step, head_block * width), lambda b, h, t: (b, t, h))
    state_block = pl.BlockSpec((None, head_block, key_dim, value_dim), lambda b, h, t: (b, h, 0, 0))
    gated = g is not None
    args = [q, k, v] + ([g] if gated else [])
    specs = [block(key_dim), block(key_dim), block(value_dim)] + ([block(key_dim)] if gated else [])
    scratch = (
        [pltpu.VMEM((step, head_block * key_dim), jnp.float32), pltpu.VMEM((8, head_block * key_dim), jnp.float32)]
        if gated
        else []
    )
    return pl.pallas_call(
        functools.partial(
            _forward_kernel,
            scale=scale,
            chunk=chunk,
            heads=head_block,
            key_dim=key_dim,
            value_dim=value_dim,
            dtype=dtype,
            gated=gated,
            scalar_gate=False,
            packed=False,
            has_initial=False,
            save_states=False,
        ),
        out_shape=(
            jax.ShapeDtypeStruct(v.shape, v.dtype),
            jax.ShapeDtypeStruct((batch, heads, key_dim, value_dim), jnp.float32),
        ),
        grid=(batch, heads // head_block, time // step),
        in_specs=specs,
        out_specs=(block(value_dim), state_block),
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=vmem,
            fuse_transposed_lhs_in_matmul=__import__("os").environ.get("FUSE") == "1",
        ),
        interpret=interpret,
        name="gla_forward",
    )(*args)
