"""Linear attention without a gate and with a scalar one: the shared cases, and the definition in float64."""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from mixer_cases import H, MixerCases, assert_equals_truth, make

from gla_jax.config import ConfigError
from gla_jax.layers import LinearAttention


class TestContract(MixerCases):
    mixer = "linear_attention"
    variants: ClassVar = {"scalar": {"gate": "scalar", "chunk_size": 4}, "none": {"num_kv_heads": 2, "chunk_size": 4}}


def truth(params, x, *, kv_heads=H, normalizer=16.0, eps=1e-6):
    """Return y by the parallel form: scores q_t k_s exp(g_{s+1} + .. + g_t), all pairs at once."""
    heads = lambda name, count: (x @ params[name]["kernel"]).reshape(*x.shape[:2], count, -1)
    query, key, value = heads("query", H), heads("key", kv_heads), heads("value", kv_heads)
    log_decay = jnp.zeros((*x.shape[:2], kv_heads))
    if "forget_gate" in params:
        logits = x @ params["forget_gate"]["kernel"] + params["forget_gate"]["bias"]
        log_decay = -jnp.log1p(jnp.exp(-logits)) / normalizer
    key, value, log_decay = (jnp.repeat(x, H // kv_heads, axis=2) for x in (key, value, log_decay))
    total = jnp.cumsum(log_decay, axis=1)
    decay = jnp.exp(total[:, :, None] - total[:, None])  # [B, T, S, H]
    causal = np.tril(np.ones(2 * (x.shape[1],)))[:, :, None]
    scores = jnp.einsum("bthk,bshk->btsh", query, key) / np.sqrt(query.shape[-1]) * decay * causal
    out = jnp.einsum("btsh,bshv->bthv", scores, value)
    out = out / jnp.sqrt(jnp.mean(out**2, axis=-1, keepdims=True) + eps) * params["output_norm"]["scale"]
    gate = x @ params["output_gate"]["kernel"]
    return (out.reshape(*x.shape[:2], -1) * gate / (1 + jnp.exp(-gate))) @ params["output"]["kernel"]


@pytest.mark.parametrize(
    ("options", "known"),
    [
        ({}, {}),
        ({"gate": "scalar"}, {}),
        ({"gate": "scalar", "gate_logit_normalizer": 1.0, "num_kv_heads": 2}, {"kv_heads": 2, "normalizer": 1.0}),
    ],
    ids=["none", "scalar", "strong and grouped"],
)
def test_equals_the_definition(options, known):
    assert_equals_truth(make("linear_attention", options), lambda params, x: truth(params, x, **known), tolerance=2e-5)


def test_a_gate_costs_one_column_per_head():
    count = lambda options: sum(
        leaf.size for leaf in jax.tree.leaves(nnx.state(make("linear_attention", options), nnx.Param))
    )
    assert count({"gate": "scalar"}) - count({}) == 16 * 4 + 4
    flops = lambda options: make("linear_attention", options).flops_per_token(9)
    assert flops({"gate": "scalar"}) - flops({}) == 2 * 16 * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gate": "skalar"}, "model.mixers.linear_attention.gate='skalar' is unknown; did you mean 'scalar'?"),
        ({"gate_logit_normalizer": 0.0}, "model.mixers.linear_attention.gate_logit_normalizer=0.0 must be above 0."),
    ],
)
def test_mistakes_are_said_in_one_sentence(options, message):
    with pytest.raises(ConfigError) as error:
        LinearAttention(16, 4, LinearAttention.Options(**options), rngs=nnx.Rngs(0))
    assert str(error.value) == message
