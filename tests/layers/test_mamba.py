"""The Mamba block: the shared cases, its definition in float64, and how it begins."""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from mixer_cases import MixerCases, assert_equals_truth, make

from gla_jax.config import ConfigError
from gla_jax.layers import Mamba


class TestContract(MixerCases):
    mixer = "mamba"
    variants: ClassVar = {"default": {"chunk_size": 4}}
    intermediate_size = 0  # a model of Mamba blocks has no MLPs


def truth(params, x):
    """Return y token by token."""
    silu = lambda x: x / (1 + jnp.exp(-x))
    u = x @ params["input"]["kernel"]
    taps = params["convolution"]["taps"]
    padded = jnp.pad(u, ((0, 0), (len(taps) - 1, 0), (0, 0)))
    u = silu(sum(tap * padded[:, i : i + x.shape[1]] for i, tap in enumerate(taps)) + params["convolution"]["bias"])
    rank = params["step_size"]["kernel"].shape[0]
    selection = u @ params["selection"]["kernel"]
    size = (selection.shape[-1] - rank) // 2
    low_rank, B, C = selection[..., :rank], selection[..., rank : rank + size], selection[..., rank + size :]
    delta = jnp.log1p(jnp.exp(low_rank @ params["step_size"]["kernel"] + params["step_size_bias"]))
    A = -jnp.exp(params["A_log"])

    def step(state, token):
        u, delta, B, C = token
        state = jnp.exp(delta[..., None] * A) * state + (delta * u)[..., None] * B[:, None]
        return state, jnp.einsum("ben,bn->be", state, C) + params["D"] * u

    state = jnp.zeros((len(x), *A.shape), x.dtype)
    _, out = jax.lax.scan(step, state, tuple(jnp.moveaxis(array, 1, 0) for array in (u, delta, B, C)))
    return (jnp.moveaxis(out, 0, 1) * silu(x @ params["gate"]["kernel"])) @ params["output"]["kernel"]


def test_equals_the_definition():
    assert_equals_truth(make("mamba"), truth)


def test_begins_as_the_authors_code():
    layer = jax.jit(lambda: Mamba(64, 1, rngs=nnx.Rngs(0)))()
    np.testing.assert_allclose(-jnp.exp(layer.A_log[...]), -np.tile(np.arange(1.0, 17), (128, 1)), rtol=1e-6)
    np.testing.assert_array_equal(layer.D[...], np.ones(128))
    steps = np.asarray(jax.nn.softplus(layer.step_size_bias[...]))
    assert steps.min() >= 0.001 * 0.999 and steps.max() <= 0.1 * 1.001
    spread = np.log(steps)
    assert abs(spread.mean() - np.log(0.01)) < 0.4 and abs(spread.std() - np.log(100) / np.sqrt(12)) < 0.25
    assert layer.step_size.kernel.shape == (4, 128)  # of rank ceil(64 / 16)
    for leaf, bound in (
        (layer.step_size.kernel, 0.5),
        (layer.convolution.taps, 0.5),
        (layer.convolution.bias, 0.5),
    ):
        values = np.asarray(leaf[...])
        assert 0.95 * bound < np.abs(values).max() <= bound and abs(values.std() - bound / np.sqrt(3)) < 0.05
    assert abs(np.std(layer.input.kernel[...]) - 0.02) < 1e-3


def test_flops_count_what_is_multiplied():
    channels, rank, size = 32, 1, 16
    matrices = 16 * channels * 3 + channels * (rank + 2 * size) + rank * channels
    assert make("mamba").flops_per_token(9) == 2 * matrices + 2 * 4 * channels + 6 * channels * size


def test_small_steps_are_not_blurred_in_bfloat16():
    """The bias of the step sizes, between -7 and -2, is added in float32."""
    layer = make("mamba", dtype=jnp.bfloat16)
    layer.step_size_bias[...] = jnp.full(32, -6.9)
    layer.step_size.kernel[...] = jnp.zeros((1, 32))
    wanted = make("mamba")
    wanted.step_size_bias[...] = layer.step_size_bias[...]
    wanted.step_size.kernel[...] = layer.step_size.kernel[...]
    x = np.random.default_rng(0).normal(size=(1, 8, 16)).astype(np.float32)
    state = lambda layer: np.asarray(layer(x.astype(layer.dtype))[1]["recurrent"], np.float64)
    error = np.sqrt(np.mean((state(layer) - state(wanted)) ** 2) / np.mean(state(wanted) ** 2))
    assert error < 1.2e-2, error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expand": 0.0}, "model.mixers.mamba.expand=0.0 leaves no channels; it must be above 0."),
        ({"state_size": 0}, "model.mixers.mamba.state_size=0 must be at least 1."),
        ({"dt_rank": 0}, "model.mixers.mamba.dt_rank=0 must be at least 1."),
        ({"dt_min": 1.0}, "model.mixers.mamba.dt_min=1.0 must be above 0 and at most model.mixers.mamba.dt_max=0.1."),
        ({"implementation": "chunk"}, "model.mixers.mamba.implementation='chunk' is unknown; "
         "did you mean 'chunked'?"),
    ],
)  # fmt: skip
def test_mistakes_are_said_in_one_sentence(options, message):
    with pytest.raises(ConfigError) as error:
        Mamba(16, 1, Mamba.Options(**options), rngs=nnx.Rngs(0))
    assert str(error.value) == message
