"""The walk over the chunks of wide heads in the interpreter against its two products a chunk in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.gated_linear_attention.mosaic_gpu_walk import walk

CHUNK, KEYS, VALUES, CHUNKS = 64, 64, 128, 3


def inputs():
    random = np.random.default_rng(0)
    bfloat16 = lambda *shape: jnp.asarray(random.standard_normal(shape), jnp.bfloat16)
    read, write = (bfloat16(1, CHUNKS * CHUNK, 1, KEYS) for _ in range(2))
    x, scores = bfloat16(1, CHUNKS * CHUNK, 1, VALUES), bfloat16(1, 1, CHUNKS, CHUNK, CHUNK)
    decay = jnp.asarray(random.random((1, 1, CHUNKS, KEYS)), jnp.float32)
    return read, write, x, scores, decay


def expected(arrays, state, reverse):
    """Return the output, the states before all chunks and the state after them."""
    read, write, x, scores, decay = arrays
    by_chunk = lambda y: np.asarray(y, np.float64).reshape(CHUNKS, CHUNK, -1)
    read, write, x = by_chunk(read), by_chunk(write), by_chunk(x)
    scores, decay = np.asarray(scores, np.float64)[0, 0], np.asarray(decay, np.float64)[0, 0]
    out, states = np.empty_like(x), np.empty((CHUNKS, KEYS, VALUES))
    for n in reversed(range(CHUNKS)) if reverse else range(CHUNKS):
        states[n] = state
        out[n] = read[n] @ state + (scores[n].T if reverse else scores[n]) @ x[n]
        state = decay[n][:, None] * state + write[n].T @ x[n]
    return out.reshape(-1, VALUES), states, state


def error(value, right):
    return np.sqrt(np.mean((np.asarray(value, np.float64) - right) ** 2) / np.mean(right**2))


@pytest.mark.parametrize("value_tile", [64, 128])
@pytest.mark.parametrize("reverse", [False, True], ids=["forwards", "backwards"])
def test_walk_matches_float64(reverse, value_tile):
    arrays = inputs()
    start = jnp.asarray(np.random.default_rng(1).standard_normal((1, 1, 1, KEYS, VALUES)), jnp.float32)
    out, end, saved = walk(*(*arrays, start), reverse=reverse, save=True, value_tile=value_tile, interpret=True)
    right_out, states, right_end = expected(arrays, np.asarray(start, np.float64)[0, 0, 0], reverse)
    assert error(out[0, :, 0], right_out) < 4e-3
    assert error(end[0, 0, 0], right_end) < 1e-6
    assert error(saved[0, 0], states[[1, 2] if reverse else [0, 2]]) < 3e-3


@pytest.mark.parametrize("reverse", [False, True], ids=["forwards", "backwards"])
def test_a_walk_without_output_leaves_out_the_segment_that_nobody_follows(reverse):
    _, write, x, _, decay = arrays = inputs()
    (ends,) = walk(None, write, x, None, decay, None, segment=2, reverse=reverse, interpret=True)
    assert ends.shape == (1, 1, 1, KEYS, VALUES)
    _, states, _ = expected(arrays, np.zeros((KEYS, VALUES)), reverse)
    # forwards what chunks 0 and 1 write, which is the state before chunk 2; backwards what chunk 2 writes
    assert error(ends[0, 0, 0], states[1] if reverse else states[2]) < 1e-6


def test_walk_without_a_start_or_an_end():
    arrays = inputs()
    out, saved = walk(*(*arrays, None), save=True, ends=False, interpret=True)
    right_out, states, _ = expected(arrays, np.zeros((KEYS, VALUES)), reverse=False)
    assert error(out[0, :, 0], right_out) < 4e-3 and error(saved[0, 0], states[[0, 2]]) < 3e-3
