"""Rows cut along time over the mesh: what crosses from one device's part of a row to the next.

A recurrence is linear in the state S that it starts from, and all that a part of a row does to it is

    S_after = decay * S_before + written.

So each device first adds up what its own tokens write, which is one product and no recurrence; all devices exchange
these summaries, H K V + H K numbers a row, however long the part; each combines those of the parts before its own, and
runs the op once, from the right state. The gradient goes the same way from the other end: what a part's outputs want of
the state before it is again one product, `read` below, and the op's own gradient runs once, given what all later parts
want of the state after it.

The exchange is one all-gather each way, as in LASP-2 (arXiv 2502.07563). Doubling by permutations would move log2(n)
states instead of n - 1, in log2(n) steps that wait for each other; a state is no larger than some hundred tokens, so
for the few parts that a row is cut into it is the steps that cost.

Everything here is called inside `per_shard`, and does nothing where rows are whole.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import pallas_kernels
import pallas_kernels.selective_scan
from gla_jax.parallel.sharding import manual_axes, shard_count, shard_index
from pallas_kernels.selective_scan.terms import step_size

Arrays = tuple[Any, ...]

_LOG_OF_ZERO = -128.0  # exp of it is 0 in float32; finite, so that sums of it stay numbers


def gather_parts(x: jax.Array) -> jax.Array:
    """Return the whole rows, [B, T, ...], of which this device holds a part."""
    return x if shard_count("time") == 1 else jax.lax.all_gather(x, manual_axes("time"), axis=1, tiled=True)


def own_part(x: jax.Array) -> jax.Array:
    """Return this device's part of whole rows: undo `gather_parts`."""
    length = x.shape[1] // shard_count("time")
    return x if length == x.shape[1] else jax.lax.dynamic_slice_in_dim(x, shard_index("time") * length, length, axis=1)


def last_part(x: jax.Array) -> jax.Array:
    """Return what the device with the last part of the rows has as `x`."""
    count = shard_count("time")
    if count == 1:
        return x
    return jax.lax.psum(jnp.where(shard_index("time") == count - 1, x, jnp.zeros_like(x)), manual_axes("time"))


def tokens_before(x: jax.Array, count: int, first: jax.Array) -> jax.Array:
    """Return the `count` tokens before this part.

    Args:
        x: [B, T, ...], this part.
        count: a number of tokens, at most T.
        first: [B, count, ...], the tokens before the row.

    Raises:
        ValueError: the part is shorter than that.
    """
    parts, length = shard_count("time"), x.shape[1]
    if parts == 1 or count == 0:
        return first
    if length < count:
        raise ValueError(
            f"Rows of {parts * length} tokens are cut into mesh.sequence={parts} parts of {length} tokens, but a part "
            f"must have the {count} tokens that the next one looks back to; use longer rows or fewer parts."
        )
    shifted = jax.lax.ppermute(x[:, length - count :], manual_axes("time"), [(i, i + 1) for i in range(parts - 1)])
    return jnp.where(shard_index("time") == 0, first, shifted)


def gated_linear_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_decay: jax.Array | None,
    *,
    initial_state: jax.Array | None,
    segment_ids: jax.Array | None,
    **options: Any,
) -> tuple[jax.Array, jax.Array]:
    """Apply `pallas_kernels.gated_linear_attention` to rows of which each device holds a part.

    Args:
        query, key, value, log_decay: this device's part, as the op takes them; scaled by K**-0.5.
        initial_state: [B, H, K, V], before the whole rows; or None.
        segment_ids: [B, T] int32, this device's part; or None.
        options: `chunk_size` and the like.

    Returns:
        This device's part of the output, and the state after the whole rows.
    """
    recurrence = _Recurrence(
        functools.partial(pallas_kernels.gated_linear_attention, **options), _gla_written, _gla_read
    )
    return _recur(recurrence, (query, key, value, log_decay), initial_state, segment_ids)


def selective_scan(
    x: jax.Array,
    delta: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array,
    *,
    gate: jax.Array | None = None,
    delta_bias: jax.Array | None = None,
    initial_state: jax.Array | None,
    segment_ids: jax.Array | None,
    **options: Any,
) -> tuple[jax.Array, jax.Array]:
    """Apply `pallas_kernels.selective_scan` to rows of which each device holds a part.

    Args:
        x, delta, A, B, C, D, gate, delta_bias: this device's part, as the op takes them.
        initial_state: [B, E, N], before the whole rows; or None.
        segment_ids: [B, T] int32, this device's part; or None.
        options: `chunk_size` and the like.

    Returns:
        This device's part of the output, and the state after the whole rows.
    """

    def op(x, delta, A, B, C, D, gate, delta_bias, **carried):
        return pallas_kernels.selective_scan.selective_scan(
            x, delta, A, B, C, D, gate=gate, delta_bias=delta_bias, **carried, **options
        )

    arrays = (x, delta, A, B, C, D, gate, delta_bias)
    return _recur(_Recurrence(op, _mamba_written, _mamba_read), arrays, initial_state, segment_ids)


# Any recurrence -------------------------------------------------------------------------------------------------------


class _Recurrence(NamedTuple):
    op: Callable[..., tuple[jax.Array, jax.Array]]
    """(*arrays, initial_state=, segment_ids=) -> (out, final state)."""
    written: Callable[[Arrays, jax.Array | None], tuple[jax.Array, jax.Array]]
    """(arrays, resets [B, T]) -> (decay, state): the final state is decay * initial state + state."""
    read: Callable[[Arrays, jax.Array | None, jax.Array], jax.Array]
    """(arrays, resets [B, T], gradient of out) -> gradient of the initial state."""


def _recur(
    recurrence: _Recurrence, arrays: Arrays, initial_state: jax.Array | None, segment_ids: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    if shard_count("time") == 1:
        return recurrence.op(*arrays, initial_state=initial_state, segment_ids=segment_ids)
    resets = None
    if segment_ids is not None:  # the row's very first token continues from the initial state, whatever its id
        before = tokens_before(segment_ids, 1, segment_ids[:, :1])
        resets = segment_ids != jnp.concatenate([before, segment_ids[:, :-1]], axis=1)
    out, state = _recur_in_parts(recurrence, arrays, initial_state, segment_ids, resets)
    return out, last_part(state)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recur_in_parts(recurrence, arrays, initial_state, segment_ids, resets):
    """Return this part's output and the state after this part."""
    before, _, _ = _state_before(recurrence, arrays, initial_state, resets)
    return recurrence.op(*arrays, initial_state=before, segment_ids=segment_ids)


def _forward(recurrence, arrays, initial_state, segment_ids, resets):
    before, decay, decays = _state_before(recurrence, arrays, initial_state, resets)
    op = lambda arrays, before: recurrence.op(*arrays, initial_state=before, segment_ids=segment_ids)
    result, gradient = jax.vjp(op, arrays, before)
    return result, (gradient, arrays, resets, decay, decays, initial_state)


def _state_before(recurrence, arrays, initial_state, resets):
    """Return the state before this part, the decay of this part, and those of all parts."""
    is_first = shard_index("time") == 0
    decay, state = recurrence.written(arrays, resets)
    if initial_state is not None:
        state += jnp.where(is_first, decay * initial_state, 0)
    decays, states = jax.lax.all_gather((decay, state), manual_axes("time"))
    before = _combine(decays, states)
    if resets is not None:
        before = jnp.where(_rank(resets[:, 0], before), 0, before)
    if initial_state is not None:
        before = jnp.where(is_first, initial_state, before)
    return before, decay, decays


def _backward(recurrence, saved, gradients):
    op_gradient, arrays, resets, decay, decays, initial_state = saved
    d_out, d_after = gradients
    d_before = recurrence.read(arrays, resets, d_out) + decay * d_after
    d_after += _combine(decays, jax.lax.all_gather(d_before, manual_axes("time")), reverse=True)
    d_arrays, d_initial = op_gradient((d_out, d_after))
    d_initial = None if initial_state is None else jnp.where(shard_index("time") == 0, d_initial, 0)
    return d_arrays, d_initial, None, None


_recur_in_parts.defvjp(_forward, _backward)


def _combine(decays, changes, *, reverse=False):
    """Return `state = decays[i] * state + changes[i]` over all parts i before this one, or after it if `reverse`."""
    own, last = shard_index("time"), len(changes) - 1
    state = jnp.zeros_like(changes[0])
    for part in range(last, 0, -1) if reverse else range(last):
        reached = part > own if reverse else part < own
        state = jnp.where(reached, decays[part] * state + changes[part], state)
    return state


def _rank(x, like):
    """Append axes of size 1."""
    return x.reshape(*x.shape, *(1,) * (like.ndim - x.ndim))


def _exclusive_sum_from_end(x):
    """Sum what comes later along axis 1; nothing is subtracted, so that large numbers leave no rounding behind."""
    return jnp.pad(jax.lax.cumsum(x, axis=1, reverse=True)[:, 1:], ((0, 0), (0, 1)) + ((0, 0),) * (x.ndim - 2))


# Gated Linear Attention -----------------------------------------------------------------------------------------------


def _gla_written(arrays, resets):
    query, key, value, _ = arrays
    key, value = (_per_head(x, query.shape[2]) for x in (key, value))
    log_decay = _gla_log_decay(arrays, resets)
    decay = jnp.exp(jnp.sum(log_decay, axis=1))[..., None]
    return decay, _outer(key * jnp.exp(_exclusive_sum_from_end(log_decay)), value, arrays)


def _gla_read(arrays, resets, d_out):
    query = arrays[0]
    from_start = jnp.exp(jax.lax.cumsum(_gla_log_decay(arrays, resets), axis=1))
    return _outer(query.shape[-1] ** -0.5 * query * from_start, d_out, arrays)


def _gla_log_decay(arrays, resets):
    """Return the gate's logarithm, float32 [B or 1, T, H or 1, K or 1], finite."""
    query, _, _, log_decay = arrays
    if log_decay is None:
        log_decay = jnp.zeros((1, 1, 1, 1))
    log_decay = jnp.maximum(_per_head(log_decay, query.shape[2]).astype(jnp.float32), _LOG_OF_ZERO)
    if resets is not None:
        log_decay = jnp.where(resets[..., None, None], _LOG_OF_ZERO, log_decay)
    return jnp.broadcast_to(log_decay, (len(log_decay), query.shape[1], *log_decay.shape[2:]))


def _per_head(x, heads):
    """Repeat each head of [B, T, heads, dim] for the query heads that share it; one for all needs no repetition."""
    return x if x.shape[2] == 1 else jnp.repeat(x, heads // x.shape[2], axis=2)


def _outer(x, y, arrays):
    """Sum outer products over time, in bfloat16 where the op itself would: [B, H, K, V] float32."""
    half = all(x.dtype == jnp.bfloat16 for x in arrays[:3])
    dtype, precision = (jnp.bfloat16, None) if half else (jnp.float32, jax.lax.Precision.HIGHEST)
    x, y = (jnp.broadcast_to(x, (*arrays[0].shape[:3], x.shape[-1])).astype(dtype) for x in (x, y))
    return jnp.einsum("bthk,bthv->bhkv", x, y, precision=precision, preferred_element_type=jnp.float32)


# Mamba ----------------------------------------------------------------------------------------------------------------


def _mamba_written(arrays, resets):
    x, delta, A, B, _, _, _, delta_bias = arrays
    delta = step_size(delta, delta_bias)
    x, A, B = _float32((x, A, B))
    decay = jnp.exp(jnp.sum(delta, axis=1)[..., None] * A)
    written = delta * x
    if resets is not None:
        decay = jnp.where(_rank(jnp.any(resets, axis=1), decay), 0, decay)
        written = jnp.where(_exclusive_sum_from_end(resets.astype(jnp.int32))[..., None] > 0, 0, written)
    return decay, _decayed_outer(A, _exclusive_sum_from_end(delta), written, B)


def _mamba_read(arrays, resets, d_out):
    _, delta, A, _, C, _, gate, delta_bias = arrays
    delta = step_size(delta, delta_bias)
    A, C, wanted = _float32((A, C, d_out))
    if gate is not None:
        wanted *= jax.nn.silu(gate.astype(jnp.float32))
    if resets is not None:
        wanted = jnp.where(jnp.cumsum(resets, axis=1)[..., None] > 0, 0, wanted)
    return _decayed_outer(A, jax.lax.cumsum(delta, axis=1), wanted, C)


def _decayed_outer(A, steps, x, y):
    """Sum exp(A steps) x y over time: [B, T, E], [B, T, E], [B, T, N] to [B, E, N]; the compiler fuses it all."""
    return jnp.sum(jnp.exp(steps[..., None] * A) * x[..., None] * y[:, :, None, :], axis=1)


def _float32(arrays):
    return [x.astype(jnp.float32) for x in arrays]
