"""Chunk after chunk, in plain JAX: parallel within a chunk, one state stored per chunk, any backend.

Within a chunk the recurrence h_t = a_t h_{t-1} + b_t, a_t = exp(δ_t A), is an associative scan over the pairs (a, b).
It multiplies decays and never divides by them, so that a decay of any strength is as safe as token by token. The
[C, D, N] states of a chunk live only while the chunk is worked on: the forward pass keeps the state before each chunk,
and the backward pass makes the others again, with the adjoint of the recurrence, h'_t = dy_t C_t + a_{t+1} h'_{t+1},
as a second associative scan from the end.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.segments import segment_starts
from pallas_kernels.selective_scan.terms import output, step_size
from pallas_kernels.target import target


def unsupported(**call):
    """Return None: plain JAX serves every call."""
    return None


def selective_scan(*, x, delta, A, B, C, D, gate, delta_bias, initial_state, segment_ids, chunk_size, interpret):
    """Compute the op chunk by chunk; see `api.py`. `interpret` does not matter here."""
    batch, time, channels = x.shape
    chunk = min(chunk_size or _tuned_chunk_size(), time)
    starts = None if segment_ids is None else segment_starts(segment_ids)
    state = initial_state
    if state is None:
        state = jnp.zeros_like((x[:, 0, :, None] * A).astype(jnp.float32))

    def cut(array):  # [B, T, ..] to [T / C, B, C, ..]; a step size of 0 on the padding leaves the state untouched
        padded = jnp.pad(array, ((0, 0), (0, -time % chunk)) + ((0, 0),) * (array.ndim - 2))
        return jnp.moveaxis(padded.reshape(batch, -1, chunk, *array.shape[2:]), 1, 0)

    tokens = jax.tree.map(cut, (x, step_size(delta, delta_bias), B, C, starts))
    y, state = _scan_chunks(tokens, A.astype(jnp.float32), state)
    return output(jnp.moveaxis(y, 0, 1).reshape(batch, -1, channels)[:, :time], x, D, gate), state


def _tuned_chunk_size():
    """Return what was fast for its memory: on a CPU at x [1, 1024, 256], on an H100 at [8, 2048, 2048], N = 16."""
    return 32 if target().platform == "cpu" else 64


@jax.custom_vjp
def _scan_chunks(tokens, A, state):
    """Return y [T / C, B, C, D] float32 and the final state; tokens are (x, delta, B, C, starts) cut into chunks."""
    y, _, state = _forward(tokens, A, state)
    return y, state


def _forward(tokens, A, state):
    """Return y, the state before each chunk [T / C, B, D, N], and the final state."""

    def body(state, chunk):
        _, _, states = _chunk_states(chunk, A, state)
        y = jnp.sum(states * chunk[3].astype(jnp.float32)[:, :, None, :], axis=-1)
        return states[:, -1], (y, state)

    state, (y, states) = jax.lax.scan(body, state, tokens)
    return y, states, state


def _forward_rule(tokens, A, state):
    y, states, state = _forward(tokens, A, state)
    return (y, state), (tokens, A, states)


def _backward_rule(saved, gradients):
    tokens, A, states = saved
    dy, dstate = gradients

    def body(carry, chunk):
        dstate, dA = carry
        (x, delta, B, C, _), state, dy = chunk
        decay, written, states = _chunk_states(chunk[0], A, state)
        x, delta, B, C = (array.astype(jnp.float32) for array in (x, delta, B, C))
        dstates = dy[..., None] * C[:, :, None, :]
        dstates = dstates.at[:, -1].add(dstate)
        following = jnp.concatenate([decay[:, 1:], jnp.ones_like(decay[:, :1])], axis=1)
        dstates = _recur(following, dstates, reverse=True)
        before = jnp.concatenate([state[:, None], states[:, :-1]], axis=1)
        dlog_decay = dstates * before * decay
        # Sums and not einsums: a GPU would round the factors of a matrix product to TF32.
        dwritten = jnp.sum(dstates * B[:, :, None, :], axis=-1)
        ddelta = jnp.sum(dlog_decay * A, axis=-1) + dwritten * x
        dB = jnp.sum(dstates * written[..., None], axis=2)
        dC = jnp.sum(states * dy[..., None], axis=2)
        dA = dA + jnp.sum(dlog_decay * delta[..., None], axis=(0, 1))
        return (decay[:, 0] * dstates[:, 0], dA), (dwritten * delta, ddelta, dB, dC)

    (dstate, dA), dtokens = jax.lax.scan(body, (dstate, jnp.zeros_like(A)), (tokens, states, dy), reverse=True)
    dtokens = tuple(d.astype(array.dtype) for d, array in zip(dtokens, tokens[:4], strict=True))
    return (*dtokens, None), dA, dstate


_scan_chunks.defvjp(_forward_rule, _backward_rule)


def _chunk_states(chunk, A, state):
    """Return the decays [B, C, D, N], what is written δ x [B, C, D], and the states after every token [B, C, D, N]."""
    x, delta, B, _, starts = chunk
    x, delta, B = (array.astype(jnp.float32) for array in (x, delta, B))
    decay = jnp.exp(delta[..., None] * A)
    if starts is not None:
        decay = jnp.where(starts[..., None, None], 0.0, decay)
    written = delta * x
    inputs = written[..., None] * B[:, :, None, :]
    inputs = inputs.at[:, 0].add(decay[:, 0] * state)
    return decay, written, _recur(decay, inputs)


def _recur(decay, inputs, *, reverse=False):
    """Return h with h_t = decay_t h_{t-1} + inputs_t along axis 1, from the end if `reverse`."""

    def combine(first, second):
        return first[0] * second[0], second[0] * first[1] + second[1]

    return jax.lax.associative_scan(combine, (decay, inputs), axis=1, reverse=reverse)[1]
