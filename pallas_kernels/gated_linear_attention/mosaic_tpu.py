"""Gated Linear Attention on TPUs: forward and backward kernels that carry the state in VMEM along time.

The kernels see the arrays as they are, [B, T, H, K] viewed as [B, T, H*K], and take whole heads of 128 lanes out
of them, so nothing is transposed in HBM. What the caller's shapes lack is padded here: T to whole chunks with
gates and keys of zero, which leave the state untouched; K and V to multiples of 64.
"""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.gated_linear_attention.block_sizes import tpu_block_sizes
from pallas_kernels.gated_linear_attention.mosaic_tpu_backward import backward
from pallas_kernels.gated_linear_attention.mosaic_tpu_chunk import Sizes
from pallas_kernels.gated_linear_attention.mosaic_tpu_forward import forward
from pallas_kernels.target import target


@dataclass(frozen=True)
class Kernels:
    """The sizes of a call's kernels: forward alone; or forward with states saved at every grid step, and backward."""

    forward: Sizes
    training_forward: Sizes
    backward: Sizes


CHUNK_SIZES = (64, 128, 256)
LARGEST_DIM = 1024
# The state of one unit of heads, which VMEM holds several times over.
LARGEST_STATE = 256 * 1024


def unsupported(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_decay: jax.Array | None,
    initial_state: jax.Array | None,
    segment_ids: jax.Array | None,
    *,
    chunk_size: int | None,
    interpret: Any,
) -> str | None:
    """Say in one sentence why these kernels do not serve a call, or None if they do.

    Args:
        query: [B, T, H, K].
        key: [B, T, H_kv, K].
        value: [B, T, H_kv, V].
        log_decay: None, or broadcastable to [B, T, H_kv or H, K].
        initial_state: None or [B, H, K, V] float32.
        segment_ids: None or [B, T] int32.
        chunk_size: None or C.
        interpret: Whether the call is interpreted, on any backend.

    Returns:
        The reason, or None.
    """
    platform, kind = target()
    if not interpret and platform != "tpu":
        return f"it would run on {kind}, and needs a TPU; use 'chunked', or interpret=True to try it."
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dtype not in (jnp.bfloat16, jnp.float32):
            return f"{name} is {x.dtype}; it must be bfloat16 or float32."
    for name, dim in (("K", query.shape[-1]), ("V", value.shape[-1])):
        if dim > LARGEST_DIM:
            return f"{name} is {dim}; it must be at most {LARGEST_DIM}."
    state = _padded_dim(query.shape[-1]) * _padded_dim(value.shape[-1])
    if state > LARGEST_STATE:
        return f"a state of K * V = {state} values is too large for VMEM; {LARGEST_STATE} is the most."
    if chunk_size is not None and chunk_size not in CHUNK_SIZES:
        return f"chunk_size is {chunk_size}; it must be None or one of {', '.join(map(str, CHUNK_SIZES))}."
    return None


def gated_linear_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_decay: jax.Array | None,
    initial_state: jax.Array | None,
    segment_ids: jax.Array | None,
    *,
    scale: float,
    chunk_size: int | None,
    interpret: Any,
    output_final_state: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """Run the TPU kernels on a call that `unsupported` accepts.

    Args:
        query: [B, T, H, K].
        key: [B, T, H_kv, K].
        value: [B, T, H_kv, V].
        log_decay: None, or broadcastable to [B, T, H_kv or H, K].
        initial_state: None or [B, H, K, V] float32.
        segment_ids: None or [B, T] int32.
        scale: Multiplies the query.
        chunk_size: None or C.
        interpret: As for `pallas_call`.

    Returns:
        out: [B, T, H, V] in value's dtype.
        final_state: [B, H, K, V] float32.
    """
    batch, time, heads, key_dim = query.shape
    value_dim = value.shape[-1]
    key_pad, value_pad = _padded_dim(key_dim) - key_dim, _padded_dim(value_dim) - value_dim
    parts = 1 if (key_dim + key_pad) % 128 == 0 and (value_dim + value_pad) % 128 == 0 else 2
    head_pad = heads % parts
    kv_heads = key.shape[2]
    if parts == 2 and kv_heads != heads:
        # Two heads in one unit: each key head twice, for units to share; or one for every query head.
        kv_heads = heads if (heads // kv_heads) % 2 else 2 * kv_heads
    shared_gates = log_decay is None or log_decay.shape[2] != heads
    kernels = _sizes(
        query,
        value,
        log_decay,
        segment_ids,
        scale,
        chunk_size,
        heads + head_pad,
        parts,
        heads // kv_heads,
        shared_gates,
    )
    sizes = kernels.training_forward
    time_pad = -time % sizes.step

    def repeat(x: jax.Array, heads: int) -> jax.Array:
        """Give consecutive heads their own copy of the one they share; their gradients are summed in float32."""
        if x.shape[2] == heads:
            return x
        return jnp.repeat(x.astype(jnp.float32), heads // x.shape[2], axis=2).astype(x.dtype)

    def lanes(x: jax.Array, dim_pad: int) -> jax.Array:
        """Pad, and view [B, T, H, D] as [B, T, H*D]."""
        if time_pad or head_pad or dim_pad:
            x = jnp.pad(x, ((0, 0), (0, time_pad), (0, head_pad), (0, dim_pad)))
        return x.reshape(batch, time + time_pad, -1)

    q, k, v = lanes(query, key_pad), lanes(repeat(key, kv_heads), key_pad), lanes(repeat(value, kv_heads), value_pad)
    g = None
    if log_decay is not None:
        g, gate_heads = log_decay, kv_heads if shared_gates else heads
        shape = (batch, time, gate_heads, 1 if sizes.gate == "scalar" else key_dim)
        if g.shape[2] != 1:
            g = repeat(g, gate_heads)
        if g.shape != shape or sizes.gate == "scalar" or g.dtype not in (jnp.bfloat16, jnp.float32):
            # In float32, in which the gradient is then summed.
            narrow = g.dtype if sizes.gate == "channel" and g.dtype == jnp.bfloat16 else jnp.float32
            g = jnp.broadcast_to(g.astype(jnp.float32), shape).astype(narrow)
        g = lanes(g, 0 if sizes.gate == "scalar" else key_pad)
        if sizes.gate == "scalar":
            g = g.reshape(batch, time + time_pad, -1, sizes.gate_heads).transpose(0, 2, 1, 3)
    initial = initial_state
    if initial is not None and (head_pad or key_pad or value_pad):
        initial = jnp.pad(initial, ((0, 0), (0, head_pad), (0, key_pad), (0, value_pad)))
    run = None if segment_ids is None else _runs(segment_ids, time_pad, sizes.chunk)
    out, final = _attend(kernels, interpret, q, k, v, g, run, initial)
    out = out.reshape(batch, time + time_pad, sizes.heads, sizes.value_dim)[:, :time, :heads, :value_dim]
    return out, final[:, :heads, :key_dim, :value_dim]


def _padded_dim(dim: int) -> int:
    return -(-dim // 64) * 64


def _sizes(
    query: jax.Array,
    value: jax.Array,
    log_decay: Any,
    segment_ids: Any,
    scale: float,
    chunk_size: Any,
    heads: int,
    parts: int,
    group: int,
    shared_gates: bool,
) -> Kernels:
    """Choose what to compile for a call; `group` units share their keys."""
    key_dim, value_dim = _padded_dim(query.shape[-1]), _padded_dim(value.shape[-1])
    narrow = query.dtype == value.dtype == jnp.bfloat16
    tuned = tpu_block_sizes(target().kind, key_dim, value_dim)
    chunk = chunk_size or tuned.chunk
    if not narrow:
        tuned = tuned.halved()
    fits = lambda n: heads // parts % n == 0 and (group % n == 0 or n % group == 0)
    units = max(n for n in range(1, max(1, tuned.heads // parts) + 1) if fits(n))
    chunks = -(-query.shape[1] // chunk)
    # The fewest chunks to walk, padding included, with a grid step costing about as much as half a chunk.
    per_step = min(range(1, max(1, tuned.backward_step // chunk) + 1), key=lambda n: -(-chunks // n) * (n + 0.5))
    steps, step = -(-chunks // per_step), chunk * per_step
    merged = max(n for n in range(1, steps + 1) if steps % n == 0 and (n == 1 or n * step <= tuned.step))
    training = Sizes(
        scale=scale,
        chunk=chunk,
        step=step,
        unroll=tuned.unroll,
        heads=heads,
        units=units,
        parts=parts,
        group=group,
        key_dim=key_dim,
        value_dim=value_dim,
        dtype=jnp.bfloat16 if narrow else jnp.float32,
        gate="none" if log_decay is None else "scalar" if log_decay.shape[-1] == 1 else "channel",
        shared_gates=shared_gates,
        packed=segment_ids is not None,
    )
    return Kernels(
        forward=dataclasses.replace(training, step=merged * step),
        training_forward=training,
        backward=dataclasses.replace(training, unroll=tuned.backward_unroll),
    )


def _runs(segment_ids: jax.Array, time_pad: int, chunk: int) -> jax.Array:
    """Return [B, 3, T] float32: the run of each token, of the last one before its chunk, and of its chunk's last."""
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    run = jnp.pad(jnp.cumsum(changes, axis=1).astype(jnp.float32), ((0, 0), (1, 0)))
    run = jnp.pad(run, ((0, 0), (0, time_pad)), mode="edge")
    last = run[:, chunk - 1 :: chunk]
    before = jnp.pad(last[:, :-1], ((0, 0), (1, 0)))
    return jnp.stack([run, jnp.repeat(before, chunk, axis=1), jnp.repeat(last, chunk, axis=1)], axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(
    kernels: Kernels, interpret: Any, q: Any, k: Any, v: Any, g: Any, run: Any, initial: Any
) -> tuple[jax.Array, jax.Array]:
    """Run the forward kernel on padded arrays; see `forward` for their shapes."""
    out, final = forward(kernels.forward, q, k, v, g, run, initial, save_states=False, interpret=interpret)
    return out, final


def _attend_forward(kernels: Kernels, interpret: Any, q: Any, k: Any, v: Any, g: Any, run: Any, initial: Any) -> Any:
    out, final, saved = forward(
        kernels.training_forward, q, k, v, g, run, initial, save_states=True, interpret=interpret
    )
    # Residuals are arrays; whether there is an initial state is said by the structure alone.
    return (out, final), (q, k, v, g, run, saved, None if initial is None else ())


def _attend_backward(kernels: Kernels, interpret: Any, residuals: Any, gradients: Any) -> Any:
    q, k, v, g, run, saved, marker = residuals
    has_initial = marker is not None
    dout, dfinal = gradients
    sizes = kernels.backward
    grads = list(backward(sizes, q, k, v, g, run, saved, dout, dfinal, has_initial=has_initial, interpret=interpret))

    def add_parts(x: jax.Array, of: jax.Array, axis: int, width: int) -> jax.Array:
        """Sum the parts that the grid steps of one group of heads have in the gradient of what they share."""
        if x.shape == of.shape:
            return x
        split = (*of.shape[:axis], of.shape[axis] // width, -1, width, *of.shape[axis + 1 :])
        return x.astype(jnp.float32).reshape(split).sum(axis=axis + 1).reshape(of.shape).astype(of.dtype)

    dq = grads[0]
    dk = add_parts(grads[1], k, 2, sizes.unit_keys)
    dv = add_parts(grads[2], v, 2, sizes.unit_values)
    dg = None
    if g is not None:
        dg = add_parts(grads[3], g, *((1, 1) if sizes.gate == "scalar" else (2, sizes.unit_keys)))
    drun = None if run is None else jnp.zeros_like(run)
    return dq, dk, dv, dg, drun, grads[-1] if has_initial else None


_attend.defvjp(_attend_forward, _attend_backward, optimize_remat=True)
