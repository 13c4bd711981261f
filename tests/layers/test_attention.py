"""Softmax attention: the shared cases, its definition in float64, its window and its cache."""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from mixer_cases import B, H, MixerCases, T, assert_close, assert_equals_truth, call, inputs, join, make

from gla_jax.config import ConfigError
from gla_jax.layers import Attention, attention


class TestContract(MixerCases):
    mixer = "attention"
    variants: ClassVar = {
        "grouped": {"num_kv_heads": 2, "qkv_bias": True, "cache_length": 32},
        "window": {"window": 3},
    }

    def window_of(self, layer):
        return layer.options.window or T


def rotated(x, base):
    """Turn x [B, T, H, K] as complex numbers."""
    half = x.shape[-1] // 2
    angles = jnp.arange(x.shape[1])[:, None, None] * base ** (-jnp.arange(half) / half)
    turned = (x[..., :half] + 1j * x[..., half:]) * jnp.exp(1j * angles)
    return jnp.concatenate([turned.real, turned.imag], axis=-1)


def truth(params, x, *, kv_heads=H, window=T, base=10_000.0, documents=None):
    """Return y by the textbook."""
    project = lambda name: x @ params[name]["kernel"] + params[name].get("bias", 0.0)
    heads = lambda x, count: x.reshape(*x.shape[:2], count, -1)
    query, key = rotated(heads(project("query"), H), base), rotated(heads(project("key"), kv_heads), base)
    value = heads(project("value"), kv_heads)
    key, value = (jnp.repeat(x, H // kv_heads, axis=2) for x in (key, value))
    scores = jnp.einsum("bthk,bshk->bhts", query, key) / np.sqrt(query.shape[-1])
    ages = np.arange(x.shape[1])[:, None] - np.arange(x.shape[1])
    seen = (ages >= 0) & (ages < window)
    if documents is not None:
        seen = seen & (documents[:, None] == documents)
    weights = jnp.exp(scores) * seen
    weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    out = jnp.einsum("bhts,bshv->bthv", weights, value)
    return out.reshape(*x.shape[:2], -1) @ params["output"]["kernel"]


@pytest.mark.parametrize(
    ("options", "known"),
    [
        ({}, {}),
        ({"num_kv_heads": 2, "qkv_bias": True, "rotary_base": 100.0}, {"kv_heads": 2, "base": 100.0}),
        ({"window": 4}, {"window": 4}),
    ],
)
def test_equals_the_definition(options, known):
    assert_equals_truth(make("attention", options), lambda params, x: truth(params, x, **known))


def test_documents_equal_the_definition():
    documents = np.repeat([4, 1, 4], [3, 5, 4])
    segment_ids = jnp.asarray([documents] * B, jnp.int32)
    distinct = np.repeat([0, 1, 2], [3, 5, 4])
    assert_equals_truth(
        make("attention"), lambda params, x: truth(params, x, documents=distinct), segment_ids=segment_ids
    )


@pytest.mark.parametrize("options", [{}, {"window": 5, "num_kv_heads": 2}])
def test_queries_in_parts_equal_all_at_once(options, monkeypatch):
    """Long rows are worked on some queries at a time; 11 rows are not a multiple of 4 either."""
    layer = make("attention", options)
    segment_ids = jnp.asarray([[1] * 4 + [2] * 7] * B, jnp.int32)
    loss = lambda layer, x: jnp.sum(jnp.sin(layer(x, segment_ids=segment_ids)[0]))
    whole = jax.jit(jax.value_and_grad(loss, argnums=1))(layer, inputs(length=11))
    monkeypatch.setattr(attention, "_QUERIES_AT_A_TIME", 4)
    parts = jax.jit(jax.value_and_grad(lambda layer, x: loss(layer, x), argnums=1))(layer, inputs(length=11))
    assert_close(parts, whole)


def test_memory_grows_with_the_length_and_not_with_its_square():
    layer = make("attention")

    def temporary_bytes(length):
        x = jax.ShapeDtypeStruct((1, length, 16), jnp.float32)
        gradient = jax.jit(jax.grad(lambda x: jnp.sum(layer(x)[0])))
        return gradient.lower(x).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(16384) < 3 * temporary_bytes(8192)


def test_a_training_step_does_not_write_the_cache():
    """What is not asked for is not computed: the gradient needs no scatter into a cache."""
    layer = make("attention", {"cache_length": 1 << 16})
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(layer(x)[0])))
    compiled = gradient.lower(jax.ShapeDtypeStruct((1, 64, 16), jnp.float32)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 1 << 20  # a cache would be 8 MiB


@pytest.mark.parametrize("cut", [1, 2, 5, 9])
def test_a_ring_goes_round(cut):
    """A window's cache holds no more than the window, however the row is cut."""
    layer = make("attention", {"window": 3})
    x = inputs(length=11)
    whole, _ = call(layer, x)
    first, state = call(layer, x[:, :cut])
    assert state["key"].shape[1] == 3
    second, state = call(layer, x[:, cut:], state)
    assert_close(join(first, second), whole)
    np.testing.assert_array_equal(np.sort(state["order"], axis=1), [[9, 10, 11]] * B)


def test_a_full_cache_is_an_error_or_not_a_number():
    layer = make("attention", {"cache_length": 8})
    x = inputs()
    _, state = layer(x[:, :6])
    with pytest.raises(ValueError, match=r"3 tokens after 6 do not fit .*cache_length=8; raise it to 9 or more"):
        layer(x[:, 6:9], state)
    with pytest.raises(ValueError, match="9 tokens after 0 do not fit"):
        call(layer, x[:, :9], state)
    y, state = call(layer, x[:, 6:8], state)
    assert np.all(np.isfinite(y))
    y, _ = call(layer, x[:, 8:9], state)  # traced, so that the length cannot be seen
    assert np.all(np.isnan(y))
    y, state = call(layer, x)  # without a state any length is served,
    assert np.all(np.isfinite(y))
    y, _ = call(layer, x[:, :1], state)  # but there is no going on from there
    assert np.all(np.isnan(y))


def test_flops_count_the_tokens_that_are_seen():
    matrices = 2 * 4 * 16 * 16
    assert make("attention").flops_per_token(5) == matrices + 4 * 16 * (1 + 2 + 3 + 4 + 5) / 5
    assert make("attention", {"window": 3}).flops_per_token(5) == matrices + 4 * 16 * (1 + 2 + 3 + 3 + 3) / 5
    assert make("attention", {"window": 9}).flops_per_token(5) == make("attention").flops_per_token(5)


@pytest.mark.parametrize(
    ("hidden_size", "num_heads", "options", "message"),
    [
        (16, 3, {}, "model.num_heads=3 does not divide model.hidden_size=16; try 2 or 4."),
        (12, 4, {}, "model.num_heads=4 makes heads of 3 channels, which rotary positions turn in pairs; "
         "choose one that makes their number even."),
        (16, 4, {"num_kv_heads": 3}, "model.mixers.attention.num_kv_heads=3 does not divide model.num_heads=4; "
         "try 2 or 4."),
        (16, 4, {"window": 0}, "model.mixers.attention.window=0 must be at least 1."),
        (16, 4, {"cache_length": 0}, "model.mixers.attention.cache_length=0 must be at least 1."),
        (16, 4, {"rotary_base": 0.0}, "model.mixers.attention.rotary_base=0.0 must be above 0."),
        (16, 4, {"implementation": "cudn"}, "model.mixers.attention.implementation='cudn' is unknown; "
         "did you mean 'cudnn'?"),
    ],
)  # fmt: skip
def test_mistakes_are_said_in_one_sentence(hidden_size, num_heads, options, message):
    with pytest.raises(ConfigError) as error:
        Attention(hidden_size, num_heads, Attention.Options(**options), rngs=nnx.Rngs(0))
    assert str(error.value) == message


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"window": 100}, {"num_kv_heads": 2}])
@pytest.mark.parametrize("packed", [False, True])
def test_cudnn_equals_xla(options, packed):
    segment_ids = jnp.asarray([[1] * 100 + [2] * 156] * B, jnp.int32) if packed else None
    x, weight = (np.random.default_rng(seed).normal(size=(B, 256, 128)) for seed in (0, 1))

    def run(dtype, implementation):
        options_here = Attention.Options(implementation=implementation, **options)
        layer = Attention(128, 4, options_here, initializer_range=0.1, dtype=dtype, rngs=nnx.Rngs(0))

        def loss(x):
            y = layer(x, segment_ids=segment_ids)[0]
            return jnp.sum(y.astype(jnp.float32) * weight), y

        (_, y), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(jnp.asarray(x, dtype))
        return np.asarray(y, np.float64), np.asarray(gradient, np.float64)

    exact = run(jnp.float32, "xla")
    relative = lambda got: [np.sqrt(np.mean((g - w) ** 2) / np.mean(w**2)) for g, w in zip(got, exact, strict=True)]
    errors, plain = relative(run(jnp.bfloat16, "cudnn")), relative(run(jnp.bfloat16, "xla"))
    assert all(error < 1.5 * other < 3e-2 for error, other in zip(errors, plain, strict=True)), (errors, plain)
