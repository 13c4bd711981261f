import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gla_jax.layers.short_convolution import ShortConvolution


def truth(layer, x, past=None):
    """Convolve one row x [T, C] in float64, by hand."""
    taps, bias = np.asarray(layer.taps[...], np.float64), 0
    if layer.bias is not None:
        bias = np.asarray(layer.bias[...], np.float64)
    width = len(taps)
    past = np.zeros((width - 1, x.shape[1])) if past is None else past
    x = np.concatenate([past, x])
    y = np.stack([np.sum(taps * x[t : t + width], axis=0) for t in range(len(x) - width + 1)]) + bias
    return y / (1 + np.exp(-y))


def make(width, use_bias, seed=0):
    layer = ShortConvolution(3, width, use_bias=use_bias, initializer_range=1.0, rngs=nnx.Rngs(seed))
    if use_bias:
        layer.bias[...] = jnp.asarray([0.5, -1.0, 2.0])
    return layer


@pytest.mark.parametrize(("width", "use_bias", "length"), [(4, False, 9), (4, True, 2), (1, True, 5), (3, False, 1)])
def test_equals_the_definition_with_documents_and_a_state(width, use_bias, length):
    layer = make(width, use_bias)
    random = np.random.default_rng(0)
    x = random.normal(size=(2, length, 3))
    past = random.normal(size=(2, width - 1, 3))
    y, state = layer(jnp.asarray(x, jnp.float32), jnp.asarray(past, jnp.float32))
    for row in range(2):
        np.testing.assert_allclose(y[row], truth(layer, x[row], past[row]), rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(state, np.concatenate([past, x], 1)[:, length:], rtol=1e-6)

    # the second row starts a new document at its third token
    if length > 3:
        segment_ids = np.zeros((2, length), np.int32)
        segment_ids[1, 2:] = 1
        y, state = layer(jnp.asarray(x, jnp.float32), jnp.asarray(past, jnp.float32), segment_ids=segment_ids)
        np.testing.assert_allclose(y[0], truth(layer, x[0], past[0]), rtol=2e-5, atol=1e-6)
        np.testing.assert_allclose(y[1, :2], truth(layer, x[1, :2], past[1]), rtol=2e-5, atol=1e-6)
        np.testing.assert_allclose(y[1, 2:], truth(layer, x[1, 2:]), rtol=2e-5, atol=1e-6)


def test_the_state_holds_nothing_of_an_earlier_document():
    layer = make(4, False)
    x = jnp.ones((1, 5, 3))
    _, state = layer(x, segment_ids=jnp.asarray([[0, 0, 0, 0, 1]]))
    np.testing.assert_array_equal(state[0, :, 0], [0, 0, 1])
    _, state = layer(x[:, :1], jnp.ones((1, 3, 3)), segment_ids=jnp.asarray([[3]]))
    np.testing.assert_array_equal(state[0, :, 0], [1, 1, 1])
