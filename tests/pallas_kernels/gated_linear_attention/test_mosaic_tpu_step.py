"""The TPU kernel for one token: in the interpreter, and exported for TPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from pallas_kernels import gated_linear_attention_step
from pallas_kernels.gated_linear_attention import mosaic_tpu_step


def make(gate, batch=2, heads=4, kv_heads=2, key_dim=128, value_dim=256):
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    shape = {"channel": (batch, kv_heads, key_dim), "scalar": (batch, heads, 1), "none": None}[gate]
    log_decay = None if shape is None else -jnp.abs(normal(*shape)).at[0, 0, 0].set(jnp.inf)
    inputs = normal(batch, heads, key_dim), normal(batch, kv_heads, key_dim), normal(batch, kv_heads, value_dim)
    return (*inputs, log_decay, normal(batch, heads, key_dim, value_dim))


def recurrence(q, k, v, g, state):
    heads = q.shape[1]
    spread = lambda x: jnp.repeat(x, heads // x.shape[1], axis=1)
    decay = jnp.ones_like(q) if g is None else jnp.broadcast_to(jnp.exp(spread(g)), q.shape)
    state = decay[..., None] * state + spread(k)[..., None] * spread(v)[..., None, :]
    return jnp.einsum("bhk,bhkv->bhv", q, state) * 0.25, state


@pytest.mark.parametrize("gate", ["channel", "scalar", "none"])
def test_equals_the_recurrence(gate):
    arguments = make(gate)
    step = lambda *a: gated_linear_attention_step(*a, scale=0.25, implementation="mosaic_tpu", interpret=True)
    found, pull = jax.vjp(jax.jit(step), *arguments)
    with jax.enable_x64(True):
        up = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float64), tree)
        expected, pull_expected = jax.vjp(recurrence, *up(arguments))
        gradients = jax.tree.map(jnp.cos, expected)
        expected = jax.tree.map(np.asarray, (expected, pull_expected(gradients)))
    found = found, pull(jax.tree.map(lambda x: x.astype(jnp.float32), gradients))
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("key_dim", "value_dim"), [(128, 128), (128, 256), (256, 512)])
def test_exports_for_tpu(key_dim, value_dim):
    arguments = make("channel", key_dim=key_dim, value_dim=value_dim)
    step = lambda *a: mosaic_tpu_step.gated_linear_attention_step(*a, scale=1.0, interpret=False)
    exported = export.export(jax.jit(step), platforms=["tpu"])(*arguments)
    assert exported.mlir_module().count("tpu_custom_call") == 1


def test_says_what_it_does_not_serve():
    shape = lambda dim: jax.ShapeDtypeStruct((1, 2, dim), jnp.float32)
    reason = lambda key_dim, value_dim, interpret=True: mosaic_tpu_step.unsupported_step(
        shape(key_dim), shape(value_dim), interpret=interpret
    )
    assert reason(128, 256) is None
    assert "multiples of 128" in reason(64, 128)
    assert "too large" in reason(1024, 2048)
    assert reason(128, 256, interpret=False).startswith("it would run on cpu, and needs a TPU")
