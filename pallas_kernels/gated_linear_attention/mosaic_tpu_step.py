"""One token on a TPU: every head's state passes through VMEM once and is updated in place."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.gated_linear_attention.mosaic_tpu_chunk import VMEM_BYTES, out_struct, to_column
from pallas_kernels.target import target

# Bytes of state of one grid step; in and out, double buffered, it is in VMEM four times.
BLOCK_BYTES = 4 * 2**20


def _step_kernel(
    q_ref: Any, k_ref: Any, v_ref: Any, decay_ref: Any, state_ref: Any, out_ref: Any, new_ref: Any
) -> None:
    heads, key_dim, value_dim = state_ref.shape
    for head in range(heads):
        keys, values = pl.ds(head * key_dim, key_dim), pl.ds(head * value_dim, value_dim)
        state = state_ref[head] * to_column(decay_ref[:, keys]) + to_column(k_ref[:, keys]) * v_ref[:, values]
        new_ref[head] = state
        out_ref[:, values] = jnp.sum(to_column(q_ref[:, keys]) * state, axis=0, keepdims=True)


def unsupported_step(query: jax.Array, value: jax.Array, *, interpret: Any) -> str | None:
    """Say in one sentence why the kernel does not serve one token of [B, H, K] and [B, H_kv, V], or None if it does."""
    platform, kind = target()
    if not interpret and platform != "tpu":
        return f"it would run on {kind}, and needs a TPU; use 'reference', or interpret=True to try it."
    key_dim, value_dim = query.shape[-1], value.shape[-1]
    if key_dim % 128 or value_dim % 128:
        return f"K, V are {key_dim}, {value_dim}; they must be multiples of 128."
    if key_dim * value_dim * 4 > BLOCK_BYTES:
        return f"a state of K * V = {key_dim * value_dim} values is too large; {BLOCK_BYTES // 4} is the most."
    return None


def gated_linear_attention_step(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_decay: jax.Array | None,
    state: jax.Array,
    *,
    scale: float,
    interpret: Any,
) -> tuple[jax.Array, jax.Array]:
    """Decay, write and read the state for one token: S <- Diag(exp(g)) S + k v^T, out = scale * S^T q.

    Args:
        query: [B, H, K].
        key: [B, H_kv, K].
        value: [B, H_kv, V].
        log_decay: None, or broadcastable to [B, H_kv or H, K].
        state: [B, H, K, V] float32; overwritten if it is donated.
        scale: Multiplies the query.
        interpret: As for `pallas_call`.

    Returns:
        out: [B, H, V] in value's dtype.
        state: [B, H, K, V] float32.
    """
    batch, heads, _ = query.shape
    spread = lambda x: jnp.repeat(x, heads // x.shape[1], axis=1) if x.shape[1] != heads else x
    row = lambda x: x.astype(jnp.float32).reshape(batch, 1, -1)
    decay = jnp.ones(query.shape, jnp.float32)
    if log_decay is not None:
        decay = jnp.broadcast_to(jnp.exp(spread(log_decay).astype(jnp.float32)), query.shape)
    out, state = _step(interpret, row(query) * scale, row(spread(key)), row(spread(value)), row(decay), state)
    return out.reshape(batch, heads, -1).astype(value.dtype), state


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _step(interpret: Any, q: Any, k: Any, v: Any, decay: Any, state: Any) -> tuple[jax.Array, jax.Array]:
    """Run the kernel on rows [B, 1, H*K] and [B, 1, H*V] and the state [B, H, K, V], all float32."""
    batch, heads, key_dim, value_dim = state.shape
    block_heads = math.gcd(heads, max(1, BLOCK_BYTES // (4 * key_dim * value_dim)))
    row = lambda dim: pl.BlockSpec((None, 1, block_heads * dim), lambda b, h: (b, 0, h))
    states = pl.BlockSpec((None, block_heads, key_dim, value_dim), lambda b, h: (b, h, 0, 0))
    return tuple(
        pl.pallas_call(
            _step_kernel,
            out_shape=[out_struct(v.shape, jnp.float32, q), out_struct(state.shape, jnp.float32, q)],
            grid=(batch, heads // block_heads),
            in_specs=[row(key_dim), row(key_dim), row(value_dim), row(key_dim), states],
            out_specs=[row(value_dim), states],
            input_output_aliases={4: 1},
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=VMEM_BYTES
            ),
            interpret=interpret,
            name="gla_step",
        )(q, k, v, decay, state)
    )


def _step_forward(interpret: Any, *inputs: Any) -> Any:
    return _step(interpret, *inputs), inputs


def _step_backward(interpret: Any, inputs: Any, gradients: Any) -> Any:
    batch, heads, key_dim, value_dim = inputs[4].shape
    q, k, decay = (inputs[i].reshape(batch, heads, key_dim, 1) for i in (0, 1, 3))
    v, dout = (x.reshape(batch, heads, 1, value_dim) for x in (inputs[2], gradients[0]))
    decayed = decay * inputs[4]
    dnew = gradients[1] + q * dout
    dq = jnp.sum((decayed + k * v) * dout, axis=3)
    dk, dv = jnp.sum(dnew * v, axis=3), jnp.sum(dnew * k, axis=2)
    ddecay = jnp.sum(dnew * inputs[4], axis=3)
    return *(x.reshape(batch, 1, -1) for x in (dq, dk, dv, ddecay)), decay * dnew


_step.defvjp(_step_forward, _step_backward)
