"""The GLA layer against flash-linear-attention's semantics, written out token by token in float64."""

import dataclasses
import itertools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from mixer_cases import MixerCases

from gla_jax.config import ConfigError
from gla_jax.layers import GatedLinearAttention
from gla_jax.parallel import sequence

D, H = 16, 4
Options = GatedLinearAttention.Options
CASES = {
    "default": {},
    "wide": {"expand_k": 1.0, "expand_v": 2.0},
    "grouped": {"num_kv_heads": 2},
    "one key head": {"num_kv_heads": 1, "feature_map": "relu"},
    "short convolution": {"use_short_conv": True},
    "short convolution with bias, grouped": {
        "use_short_conv": True,
        "conv_size": 3,
        "conv_bias": True,
        "num_kv_heads": 2,
    },
    "no output gate": {"use_output_gate": False},
    "other functions": {"gate_fn": "sigmoid", "feature_map": "gelu"},
    "no scale in the norm": {"elementwise_affine": False},
    "strong gates of low rank": {"gate_logit_normalizer": 1, "gate_low_rank_dim": 3},
    "clamped gates": {"clamp_min": -0.1},
}


class TestContract(MixerCases):
    mixer = "gla"
    variants: ClassVar = {"default": {"chunk_size": 4}}


def make(options, **kwargs):
    """Return the graphdef of a layer, and parameters that are all far from their beginnings."""
    options = Options(**{"implementation": "reference"} | options)  # the op has its own tests
    layer = jax.eval_shape(lambda: GatedLinearAttention(D, H, options, rngs=nnx.Rngs(0), **kwargs))
    graphdef, state = nnx.split(layer)
    random = np.random.default_rng(0)
    draw = lambda x: jnp.asarray(random.normal(0.3, 0.5, x.shape), jnp.float32)
    return graphdef, jax.tree.map(draw, nnx.to_pure_dict(state))


@jax.jit(static_argnums=0)
def run(graphdef, params, x, state=None, segment_ids=None):
    return nnx.merge(graphdef, params)(x, state, segment_ids=segment_ids)


def inputs(batch_size=2, length=13, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(batch_size, length, D)), jnp.float32)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


FUNCTIONS = {
    None: lambda x: x,
    "swish": lambda x: x * sigmoid(x),
    "sigmoid": sigmoid,
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x * sigmoid(x),
    "sqrelu": lambda x: np.maximum(x, 0) ** 2,
    "logsigmoid": lambda x: np.log(sigmoid(x)),
    "gelu": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
}


def truth(params, options, x):
    """Return y and the final recurrent state, each document and token by itself, in float64."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    options, x = Options(**options), np.asarray(x, np.float64)
    batch_size, length, _ = x.shape
    kv_heads = options.num_kv_heads or H
    shared = H // kv_heads
    eps = 1e-6
    projected = {name: x @ p[name]["kernel"] for name in ("query", "key", "value")}
    if options.use_short_conv:
        for name, before in projected.items():
            taps = p["convolutions"][name]["taps"]
            after = np.zeros_like(before)
            for t in range(length):
                for back in range(min(options.conv_size, t + 1)):
                    after[:, t] += taps[options.conv_size - 1 - back] * before[:, t - back]
            if options.conv_bias:
                after = after + p["convolutions"][name]["bias"]
            projected[name] = after * sigmoid(after)
    z = x @ p["forget_gate_down"]["kernel"] @ p["forget_gate_up"]["kernel"] + p["forget_gate_up"]["bias"]
    log_decay = np.log(sigmoid(z)) / options.gate_logit_normalizer
    if options.clamp_min is not None:
        log_decay = np.maximum(log_decay, options.clamp_min)
    query = FUNCTIONS[options.feature_map](projected["query"]).reshape(batch_size, length, H, -1)
    key = FUNCTIONS[options.feature_map](projected["key"]).reshape(batch_size, length, kv_heads, -1)
    value = projected["value"].reshape(batch_size, length, kv_heads, -1)
    log_decay = log_decay.reshape(key.shape)
    state = np.zeros((batch_size, H, key.shape[-1], value.shape[-1]))
    y = np.zeros_like(x)
    for b in range(batch_size):
        for t in range(length):
            outs = []
            for h in range(H):
                k, v, g = key[b, t, h // shared], value[b, t, h // shared], log_decay[b, t, h // shared]
                state[b, h] = np.exp(g)[:, None] * state[b, h] + np.outer(k, v)
                o = state[b, h].T @ query[b, t, h] / np.sqrt(len(k))
                o = o / np.sqrt(np.mean(o**2) + eps)
                outs.append(o * p["output_norm"]["scale"] if options.elementwise_affine else o)
            out = np.concatenate(outs)
            if options.use_output_gate:
                out = out * FUNCTIONS[options.gate_fn](x[b, t] @ p["output_gate"]["kernel"])
            y[b, t] = out @ p["output"]["kernel"]
    return y, state


def relative(x, wanted):
    wanted = np.asarray(wanted, np.float64)
    return np.sqrt(np.mean((np.asarray(x, np.float64) - wanted) ** 2) / np.mean(wanted**2))


@pytest.mark.parametrize("case", CASES)
def test_equals_the_definition(case):
    graphdef, params = make(CASES[case])
    y, state = run(graphdef, params, inputs())
    wanted_y, wanted_state = truth(params, CASES[case], inputs())
    assert y.dtype == jnp.float32
    assert relative(y, wanted_y) < 1e-4
    assert relative(state["recurrent"], wanted_state) < 1e-4


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_feature_map_and_gate_is_that_of_its_name(name):
    options = {"feature_map": name, "gate_fn": name or "swish"}
    graphdef, params = make(options)
    assert relative(run(graphdef, params, inputs())[0], truth(params, options, inputs())[0]) < 1e-4


@pytest.mark.parametrize("case", ["short convolution with bias, grouped", "clamped gates"])
def test_gradients_equal_the_definition(case):
    options = CASES[case]
    graphdef, params = make(options | {"implementation": None})
    x = inputs()
    weight = np.random.default_rng(2).normal(size=x.shape)

    def total(arguments):
        y, state = nnx.merge(graphdef, arguments[0])(arguments[1])
        return jnp.sum(y * weight) + jnp.sum(state["recurrent"] ** 2)

    def wanted(arguments):
        y, state = truth(arguments[0], options, arguments[1])
        return np.sum(y * weight) + np.sum(state**2)

    # Each gradient along a random direction, against the central difference of the definition.
    gradients = jax.tree.leaves(jax.jit(jax.grad(total))((params, x)))
    leaves, structure = jax.tree.flatten((jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params), np.array(x)))
    random = np.random.default_rng(3)
    for i, (leaf, gradient) in enumerate(zip(leaves, gradients, strict=True)):
        direction = random.normal(size=leaf.shape)
        moved = lambda by, i=i, leaf=leaf: structure.unflatten([*leaves[:i], leaf + by, *leaves[i + 1 :]])
        difference = (wanted(moved(1e-5 * direction)) - wanted(moved(-1e-5 * direction))) / 2e-5
        along = np.sum(np.asarray(gradient, np.float64) * direction)
        assert abs(along - difference) < 1e-4 * np.linalg.norm(gradient) * np.linalg.norm(direction)


def test_beginnings_are_those_of_the_authors_library():
    layer = GatedLinearAttention(
        256, 4, Options(use_short_conv=True, conv_bias=True), initializer_range=0.02, rngs=nnx.Rngs(0)
    )
    kernels = 0
    for path, variable in nnx.to_flat_state(nnx.state(layer)):
        x = np.asarray(variable[...])
        if path[-1] in ("kernel", "taps"):
            kernels += 1
            assert abs(np.std(x) - 0.02) < 5 * 0.02 / np.sqrt(2 * x.size), path
            assert abs(np.mean(x)) < 5 * 0.02 / np.sqrt(x.size), path
            assert np.max(np.abs(x)) > 0.02 * 2.5, "not truncated"
        else:
            assert np.all(x == (1 if path[-1] == "scale" else 0)), path
    assert kernels == 7 + 3
    # so a fresh layer keeps 2^(-1/16) of its state at every token
    z = layer.forget_gate_up(layer.forget_gate_down(jnp.zeros((1, 1, 256))))
    np.testing.assert_allclose(np.exp(layer._log_decay(z)), 0.5 ** (1 / 16), rtol=1e-6)


STATEFUL = pytest.mark.parametrize("case", ["default", "short convolution with bias, grouped"])


def assert_states_equal(state, wanted):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=1e-5), state, wanted)


@STATEFUL
def test_a_row_in_parts_equals_the_whole_row(case):
    graphdef, params = make(CASES[case])
    x = inputs(length=12)
    whole, last = run(graphdef, params, x)
    for cuts in ([5], [1, 2, 7]):
        state, parts = nnx.merge(graphdef, params).init_state(2), []
        for part in jnp.split(x, cuts, axis=1):
            y, state = run(graphdef, params, part, state)
            parts.append(y)
        assert relative(jnp.concatenate(parts, axis=1), whole) < 2e-6
        assert_states_equal(state, last)


def test_a_single_token_is_one_step_of_the_recurrence(monkeypatch):
    layer = nnx.merge(*make({"use_short_conv": True}))
    state = layer.init_state(2)
    monkeypatch.setattr(sequence, "gated_linear_attention", None)  # the form for whole rows
    jax.eval_shape(layer, inputs(length=1), state)
    with pytest.raises(TypeError):
        jax.eval_shape(layer, inputs(length=2), state)


@STATEFUL
def test_documents_in_a_row_equal_separate_rows(case):
    graphdef, params = make(CASES[case])
    x = inputs(batch_size=1, length=17)
    lengths, ids = (2, 1, 8, 6), (5, 7, 5, 9)  # an id may come back
    segment_ids = jnp.asarray(np.repeat(ids, lengths))[None]
    together, last = run(graphdef, params, x, None, segment_ids)
    for start, stop in itertools.pairwise(np.cumsum((0, *lengths))):
        alone, state = run(graphdef, params, x[:, start:stop])
        assert relative(together[:, start:stop], alone) < 2e-6
    assert_states_equal(last, state)
    # cut in two amid a document: the first token of the second part goes on from the state whatever its id
    first, state = run(graphdef, params, x[:, :6], None, segment_ids[:, :6])
    second, _ = run(graphdef, params, x[:, 6:], state, segment_ids[:, 6:] + 1)
    assert relative(jnp.concatenate([first, second], axis=1), together) < 2e-6
    # no leak, not even a small one
    last_document = lambda x: jnp.sum(run(graphdef, params, x, None, segment_ids)[0][:, 11:])
    leak = jax.jit(jax.grad(last_document))(x)
    assert np.all(leak[:, :11] == 0) and np.all(np.abs(leak[:, 11:]).sum(-1) > 0)


def test_padding_on_the_left_changes_nothing():
    graphdef, params = make({"use_short_conv": True})
    x = inputs(length=10)
    padded = jnp.concatenate([100 * inputs(length=6, seed=9), x], axis=1)
    y, state = run(graphdef, params, padded, None, jnp.asarray([[0] * 6 + [1] * 10] * 2))
    wanted, wanted_state = run(graphdef, params, x)
    assert relative(y[:, 6:], wanted) < 2e-6
    assert_states_equal(state, wanted_state)


def test_no_token_sees_a_later_one():
    graphdef, params = make({"use_short_conv": True})
    x = inputs(batch_size=1, length=9)
    of_each = lambda x: jnp.sum(run(graphdef, params, x)[0][0], axis=-1)
    seen = np.abs(jax.jit(jax.jacrev(of_each))(x)[:, 0]).sum(-1) > 0  # [T of y, T of x]
    np.testing.assert_array_equal(seen, np.tril(np.ones((9, 9), bool)))


def test_bfloat16_stays_close_to_float32():
    options = {"use_short_conv": True}
    graphdef, params = make(options)
    low, _ = make(options, dtype=jnp.bfloat16)
    x = inputs(length=40)
    y, state = run(low, params, x)
    assert y.dtype == jnp.bfloat16
    assert state["recurrent"].dtype == jnp.float32
    assert relative(y, run(graphdef, params, x)[0]) < 3e-2


@STATEFUL
def test_state_has_the_shapes_that_are_returned(case):
    for dtype in (jnp.float32, jnp.bfloat16):
        layer = nnx.merge(*make(CASES[case], dtype=dtype))
        shapes = lambda state: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)
        returned = jax.eval_shape(layer, inputs())[1]
        assert shapes(jax.eval_shape(lambda layer=layer: layer.init_state(2))) == shapes(returned)


def test_flops_count_what_is_multiplied():
    layer = nnx.merge(*make({}))
    matrices = D * (8 + 8 + 16 + 16 + 16) + D * 16 + 16 * 8
    assert layer.flops_per_token(100) == 2 * matrices + 4 * H * 2 * 4
    convolutions = nnx.merge(*make({"use_short_conv": True}))
    assert convolutions.flops_per_token(100) == layer.flops_per_token(7) + 2 * 4 * (8 + 8 + 16)


@pytest.mark.parametrize(
    ("hidden_size", "num_heads", "options", "message"),
    [
        (256, 3, {}, "model.num_heads=3 does not divide model.hidden_size*expand_k=128; try 2 or 4."),
        (12, 4, {"expand_v": 0.5}, "model.num_heads=4 does not divide model.hidden_size*expand_k=6; try 3 or 6."),
        (16, 4, {"num_kv_heads": 3}, "model.mixers.gla.num_kv_heads=3 does not divide model.num_heads=4; try 2 or 4."),
        (16, 0, {}, "model.num_heads=0 does not divide model.hidden_size*expand_k=8; try 1."),
        (16, 4, {"feature_map": "rellu"}, "model.mixers.gla.feature_map='rellu' is unknown; did you mean 'relu'?"),
        (16, 4, {"gate_fn": "swich"}, "model.mixers.gla.gate_fn='swich' is unknown; did you mean 'swish'?"),
        (16, 4, {"conv_size": 0}, "model.mixers.gla.conv_size=0 must be at least 1."),
        (16, 4, {"chunk_size": 0}, "model.mixers.gla.chunk_size=0 must be at least 1."),
        (16, 4, {"clamp_min": 1.0}, "model.mixers.gla.clamp_min=1.0 must be at most 0: it bounds a logarithm."),
        (16, 4, {"longest_half_life": 0.5},
         "model.mixers.gla.longest_half_life=0.5 must be at least 1, the shortest."),
        (16, 4, {"half_life_skew": 0}, "model.mixers.gla.half_life_skew=0 must be above 0."),
        (16, 4, {"gate_logit_normalizer": 0}, "model.mixers.gla.gate_logit_normalizer=0 must be above 0."),
        (16, 4, {"implementation": "chunk"}, "model.mixers.gla.implementation='chunk' is unknown; "
         "did you mean 'chunked'?"),
    ],
)  # fmt: skip
def test_mistakes_are_said_in_one_sentence(hidden_size, num_heads, options, message):
    with pytest.raises(ConfigError) as error:
        GatedLinearAttention(hidden_size, num_heads, Options(**options), rngs=nnx.Rngs(0))
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("normalizer", "skew", "expected"),
    [(16, 1.0, [1, 4, 16, 64]), (256, 1.0, [1, 4, 16, 64]), (16, 0.5, [1, 64 ** (1 / 9), 64 ** (4 / 9), 64])],
)
def test_new_channels_forget_at_rates_that_are_spread(normalizer, skew, expected):
    options = Options(longest_half_life=64.0, half_life_skew=skew, gate_logit_normalizer=normalizer)
    layer = GatedLinearAttention(16, 2, options, rngs=nnx.Rngs(0))
    bias = np.asarray(layer.forget_gate_up.bias[...], np.float64)
    half_lives = normalizer * np.log(2) / np.logaddexp(0, -bias)
    np.testing.assert_allclose(half_lives, expected * 2, rtol=1e-5)


def test_options_are_plain_values():
    assert dataclasses.asdict(Options()).keys() >= {"expand_k", "num_kv_heads", "clamp_min", "implementation"}
    assert hash(Options()) == hash(Options())
