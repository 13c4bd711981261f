import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gla_jax.layers.mlp import SwiGLU, default_intermediate_size


@pytest.mark.parametrize(("hidden_size", "width"), [(1024, 2816), (2048, 5632), (2560, 6912), (256, 768), (96, 256)])
def test_default_width_is_the_papers(hidden_size, width):
    assert default_intermediate_size(hidden_size) == width


def test_equals_the_definition():
    layer = SwiGLU(8, 5, initializer_range=1.0, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(2, 3, 8))
    gate, up, down = (np.asarray(m.kernel[...], np.float64) for m in (layer.gate, layer.up, layer.down))
    wanted = (x @ gate / (1 + np.exp(-x @ gate)) * (x @ up)) @ down
    np.testing.assert_allclose(layer(jnp.asarray(x, jnp.float32)), wanted, rtol=1e-4, atol=1e-5)
    assert layer.flops_per_token() == 2 * 3 * 8 * 5
    assert jax.tree.map(jnp.shape, nnx.to_pure_dict(nnx.state(layer))) == {
        "gate": {"kernel": (8, 5)}, "up": {"kernel": (8, 5)}, "down": {"kernel": (5, 8)}
    }  # fmt: skip
