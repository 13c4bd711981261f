"""The gradients of queries, keys and gates over pairs and groups of chunks, in the interpreter, against float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.gated_linear_attention.mosaic_gpu_backward_inputs import backward_inputs
from pallas_kernels.gated_linear_attention.mosaic_gpu_backward_quads import backward_quads
from pallas_kernels.gated_linear_attention.mosaic_gpu_chunk import BOUND, CHUNK, MIDDLE

TIME, KEYS, VALUES, SCALE = 4 * CHUNK, 128, 64, 0.1


def bfloat16(x):
    return jnp.asarray(x, jnp.bfloat16)


def recurrence(q, k, v, g, d_out, d_final):
    """Return the states before all tokens, their gradients after them, and dq, dk, dg, token by token."""
    states, d_states = np.zeros((TIME + 1, KEYS, VALUES)), np.zeros((TIME + 1, KEYS, VALUES))
    for t in range(TIME):
        states[t + 1] = np.exp(g[t])[:, None] * states[t] + k[t][:, None] * v[t]
    d_states[TIME] = d_final
    dq, dk, dg = np.empty_like(q), np.empty_like(q), np.empty_like(q)
    for t in reversed(range(TIME)):
        d_state = d_states[t + 1] + SCALE * q[t][:, None] * d_out[t]
        dq[t], dk[t] = SCALE * states[t + 1] @ d_out[t], d_state @ v[t]
        d_states[t] = np.exp(g[t])[:, None] * d_state
        dg[t] = (d_states[t] * states[t]).sum(axis=1)
    return states, d_states, (dq, dk, dg)


def relative_error(value, right):
    return np.sqrt(np.mean((np.asarray(value, np.float64) - right) ** 2) / np.mean(right**2))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # what is made of an exact pair at first
@pytest.mark.parametrize("by_groups", [False, True], ids=["pairs", "groups of four"])
def test_bounded_and_exact_pairs_match_float64(by_groups):
    """The first pair of chunks is bounded; a reset makes the third chunk exact, and its pair is done again."""
    random = np.random.default_rng(0)
    normal = lambda *shape: random.standard_normal(shape)
    g = bfloat16(-np.log1p(np.exp(-normal(TIME, KEYS))) / 16).at[2 * CHUNK + 9].set(-jnp.inf)
    arrays = [bfloat16(normal(TIME, width)) for width in (KEYS, KEYS, VALUES, VALUES)]
    q, k, v, d_out, log_decay = (np.asarray(x, np.float64) for x in (*arrays, g))
    states, d_states, expected = recurrence(q, k, v, log_decay, d_out, normal(KEYS, VALUES))

    halves = log_decay.reshape(-1, 2, MIDDLE + 1, KEYS).sum(axis=2)
    exact = (np.abs(halves) > BOUND).any(axis=(1, 2))
    assert exact.tolist() == [False, False, True, False]
    flags = jnp.asarray(exact, jnp.int32)[None, None]
    of_tokens = [bfloat16(x)[None, :, None] for x in (*arrays, g)]
    q_, k_, v_, d_out_, g_ = of_tokens
    in_head = lambda *many: [bfloat16(x)[None, None] for x in many]
    if by_groups:
        sums = np.maximum(log_decay, -1e9).reshape(-1, CHUNK, KEYS).cumsum(axis=1)
        gated_q = SCALE * q * np.exp(sums).reshape(TIME, KEYS)
        gated_k = k * np.exp(sums[:, -1:] - sums).reshape(TIME, KEYS)
        gated = [bfloat16(x)[None, :, None] for x in (gated_q, gated_k)]
        decay = jnp.asarray(np.exp(sums[:, -1]), jnp.float32)[None, None]
        ends = in_head(states[:1], d_states[TIME:])
        gradients = backward_quads(q_, k_, v_, (g_,), d_out_, *ends, *gated, decay, flags, scale=SCALE, interpret=True)
    else:  # seen from the middle of their chunks, unless these are exact
        starts, ends = states[: -1 : 2 * CHUNK], d_states[2 * CHUNK :: 2 * CHUNK]
        starts = starts * np.where(exact[::2, None], 1, np.exp(halves[::2, 0]))[..., None]
        ends = ends * np.where(exact[1::2, None], 1, np.exp(halves[1::2, 1]))[..., None]
        options = {"scale": SCALE, "interpret": True}
        gradients = backward_inputs(q_, k_, v_, (g_,), d_out_, *in_head(starts, ends), flags, **options)
    for name, gradient, right in zip(("dq", "dk", "dg"), gradients, expected, strict=True):
        for pair in range(2):
            tokens = slice(2 * pair * CHUNK, 2 * (pair + 1) * CHUNK)
            assert relative_error(gradient[0, tokens, 0], right[tokens]) < 8e-3, (name, pair)
