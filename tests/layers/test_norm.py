import jax.numpy as jnp
import numpy as np
from flax import nnx

from gla_jax.layers.norm import RMSNorm


def test_equals_the_definition_and_keeps_the_dtype():
    x = np.random.default_rng(0).normal(size=(4, 6))
    norm = RMSNorm(6, epsilon=0.1, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    norm.scale[...] = jnp.arange(6.0)
    wanted = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 0.1) * np.arange(6)
    np.testing.assert_allclose(norm(jnp.asarray(x, jnp.float32)), wanted, rtol=1e-5)
    assert norm(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16


def test_is_computed_in_float32_and_rounded_once():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4096)), jnp.bfloat16)
    norm = RMSNorm(4096, epsilon=1e-6, use_scale=False, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(norm(x), norm(x.astype(jnp.float32)).astype(jnp.bfloat16))
