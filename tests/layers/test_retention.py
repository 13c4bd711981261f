"""Retention: the shared cases, and its definition in float64."""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from mixer_cases import H, MixerCases, assert_equals_truth, make

from gla_jax.config import ConfigError
from gla_jax.layers import Retention


class TestContract(MixerCases):
    mixer = "retention"
    bfloat16_tolerance = 8e-2  # a convolution and a norm of small heads on top of each other
    variants: ClassVar = {
        "default": {"chunk_size": 4},
        "short convolution": {"use_short_conv": True, "num_kv_heads": 2, "chunk_size": 4},
    }


def truth(params, x, *, base=10_000.0, eps=1e-6):
    """Return y by the parallel form: scores q_t k_s γ^(t - s), all pairs at once."""
    batch_size, length, _ = x.shape
    heads = lambda name: (x @ params[name]["kernel"]).reshape(batch_size, length, H, -1)
    query, key, value = heads("query"), heads("key"), heads("value")
    half = query.shape[-1] // 2
    turns = jnp.exp(1j * jnp.arange(length)[:, None, None] * base ** (-jnp.arange(half) / half))
    query, key = ((x[..., :half] + 1j * x[..., half:]) * turns for x in (query, key))
    scores = jnp.einsum("bthk,bshk->bhts", query, jnp.conj(key)).real / np.sqrt(2 * half)
    ages = np.arange(length)[:, None] - np.arange(length)
    decay = 1 - 2.0 ** (-5 - np.arange(H))
    scores = scores * np.where(ages >= 0, decay[:, None, None] ** np.maximum(ages, 0), 0)
    out = jnp.einsum("bhts,bshv->bthv", scores, value)
    out = out / jnp.sqrt(jnp.mean(out**2, axis=-1, keepdims=True) + eps) * params["output_norm"]["scale"]
    gate = x @ params["output_gate"]["kernel"]
    return (out.reshape(*x.shape[:2], -1) * gate / (1 + jnp.exp(-gate))) @ params["output"]["kernel"]


def test_equals_the_definition():
    assert_equals_truth(make("retention"), truth, tolerance=2e-5)


def test_sizes_are_those_of_the_paper():
    """Keys of the model's width, values of twice that: 8 D^2 weights."""
    layer = jax.eval_shape(lambda: Retention(64, 4, rngs=nnx.Rngs(0)))
    assert (layer.key_size, layer.value_size) == (16, 32)
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(layer))) == 8 * 64**2 + 32
    assert layer.flops_per_token(9) == layer.flops_per_token(99) == 2 * 8 * 64**2 + 4 * 4 * 16 * 32


@pytest.mark.parametrize(
    ("hidden_size", "options", "message"),
    [
        (12, {}, "model.num_heads=4 makes keys of 3 channels, which rotary positions turn in pairs; "
         "choose one that makes their number even."),
        (18, {}, "model.num_heads=4 does not divide model.hidden_size*expand_k=18; try 3 or 6."),
        (16, {"rotary_base": 0.0}, "model.mixers.retention.rotary_base=0.0 must be above 0."),
        (16, {"gate_fn": "swich"}, "model.mixers.retention.gate_fn='swich' is unknown; did you mean 'swish'?"),
        (16, {"num_kv_heads": 3}, "model.mixers.retention.num_kv_heads=3 does not divide model.num_heads=4; "
         "try 2 or 4."),
    ],
)  # fmt: skip
def test_mistakes_are_said_in_one_sentence(hidden_size, options, message):
    with pytest.raises(ConfigError) as error:
        Retention(hidden_size, 4, Retention.Options(**options), rngs=nnx.Rngs(0))
    assert str(error.value) == message
