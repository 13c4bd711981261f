"""The models of fla, transformers and the paper's own code, and ours with their parameters, compute the same.

The fixtures are what those libraries wrote and computed; see tests/fixtures/make_interop.py.
"""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gla_jax.interop.architectures import Architecture
from gla_jax.interop.folder import adjust, flatten, names_of, open_model, to_theirs
from gla_jax.interop.safetensors import open_file
from gla_jax.interop.translation import read_config
from gla_jax.models import abstract_model, bind

FIXTURES = Path(__file__).parents[1] / "fixtures" / "interop"
QUICK = ("gla_hybrid",)  # has two kinds of layer
NAMES = [
    pytest.param(path.name, marks=() if path.name in QUICK else pytest.mark.long) for path in sorted(FIXTURES.iterdir())
]


def assert_close(found, expected, name):
    """Allow a relative root mean square of 1e-4: norms of heads that relu made nearly 0 amplify rounding to 3e-5."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    error = np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2))
    assert error < 1e-4, f"{name}: {error:.1e}"


@functools.cache
def opened(name):
    """Return the reference, our graphdef with the op's plain definition, and parameters read from the directory."""
    folder = FIXTURES / name
    reference = {key: tensor.read() for key, tensor in open_file(folder / "reference.safetensors").items()}
    config, _, pairs = open_model(folder)
    mixers = {
        mixer: dataclasses.replace(options, implementation="xla" if mixer == "attention" else "reference")
        for mixer, options in config.model.mixers.items()
        if mixer != "mamba"
    }
    model = dataclasses.replace(config.model, mixers=config.model.mixers | mixers)
    everything = lambda parameter: parameter.read((slice(None),) * len(parameter.shape))
    params = jax.tree.map(lambda pair: everything(pair[1]), pairs, is_leaf=lambda pair: isinstance(pair, tuple))
    return reference, model, abstract_model(model, config.dtype)[0], params


# Compilation takes nearly all of the time.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.partial(quick_jit, static_argnums=1)
@functools.partial(jax.value_and_grad, has_aux=True)
def loss_and_logits(params, graphdef, input_ids):
    logits, _ = bind(graphdef, params)(input_ids)
    likelihood = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), input_ids[:, 1:, None], axis=-1)
    return -jnp.mean(likelihood), logits


def their_tensors(ours, array, model, architecture: Architecture):
    """Yield the gradients of their tensors for a gradient of one of ours, under the first of their names."""
    places = names_of(ours, model, architecture)
    for names, layer in zip(places.names, array if places.stacked else [array], strict=True):
        # What is done to some weights while they are read is linear and symmetric.
        yield names, adjust(ours, to_theirs(ours.rpartition("/")[2], layer), model, architecture)


@pytest.mark.parametrize("name", NAMES)
def test_logits_loss_and_every_gradient(name):
    reference, model, graphdef, params = opened(name)
    (loss, logits), gradients = loss_and_logits(params, graphdef, reference["input_ids"])
    assert_close(logits, reference["logits"], "logits")
    assert_close(loss, reference["loss"], "loss")
    architecture = read_config(FIXTURES / name)[1]
    expected = {key: array for key, array in reference.items() if key.startswith("gradient.")}
    for ours, gradient in flatten(jax.tree.map(np.asarray, gradients)):
        for names, array in their_tensors(ours, gradient, model, architecture):
            key = next(key for key in (f"gradient.{name}" for name in names) if key in expected)
            assert_close(array, expected.pop(key), key)
    assert not expected


@pytest.mark.parametrize("name", [name for name in NAMES if name.values[0] != "gla_original"])
def test_tokens_decoded_from_a_state(name):
    reference, _, graphdef, params = opened(name)
    call = quick_jit(lambda params, input_ids, state: bind(graphdef, params)(input_ids, state))
    input_ids, decoded = reference["input_ids"], reference["decode"]
    _, state = call(params, input_ids[:, : -decoded.shape[1]], None)
    for step in range(-decoded.shape[1], 0):
        logits, state = call(params, input_ids[:, step][:, None], state)
        assert_close(logits[:, 0], decoded[:, step], f"token {step}")
