"""Held-out loss, against the definition in float64."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_config import get_config

from gla_jax.config import build
from gla_jax.evaluation import evaluate
from gla_jax.models import abstract_model, bind, init_params
from gla_jax.parallel.mesh import make_mesh
from gla_jax.training.loop import open_data
from gla_jax.training.step import make_eval_step


def test_figures_are_those_of_the_definition() -> None:
    settings = get_config()
    settings.model.num_layers = 1
    config = build(settings)
    with jax.set_mesh(make_mesh(config.mesh, jax.devices()[:1])):
        config, data = open_data(config)
        graphdef, _ = abstract_model(config.model, config.dtype)
        params = init_params(config.model, config.dtype, jax.random.key(1))
        batches = list(itertools.islice(data.eval_batches(), 3))
        batches[2] = batches[2] | {"weights": batches[2]["weights"] * np.linspace(0, 2, 8, dtype=np.float32)[:, None]}
        figures = evaluate(make_eval_step(graphdef), params, batches, batch_size=8, bytes_per_token=2.5)
        nll = weight = correct = 0.0
        for batch in batches:
            inputs, segments, positions = (jnp.asarray(batch[name]) for name in ("inputs", "segment_ids", "positions"))
            logits, _ = bind(graphdef, params)(inputs, segment_ids=segments, positions=positions)
            logits = np.asarray(logits, np.float64)
            log_probability = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            of_targets = np.take_along_axis(log_probability, batch["targets"][..., None], -1)[..., 0]
            nll -= (of_targets * batch["weights"]).sum()
            weight += batch["weights"].sum()
            correct += ((logits.argmax(-1) == batch["targets"]) * batch["weights"]).sum()
    assert figures == {
        "eval/loss": pytest.approx(nll / weight, rel=1e-6),
        "eval/perplexity": pytest.approx(math.exp(nll / weight), rel=1e-5),
        "eval/bits_per_byte": pytest.approx(nll / weight / math.log(2) / 2.5, rel=1e-6),
        "eval/accuracy": pytest.approx(correct / weight, rel=1e-6),
    }


def test_sums_of_many_batches_do_not_lose_the_small_ones() -> None:
    """In float32 a sum of 2^24 would no longer grow by ones."""
    values = iter([(2.0**24, 2.0**24), *[(1.0, 0.0)] * 4])
    names = ("nll", "weight", "correct")
    sums = lambda *_: {name: jnp.float32(value) for name, value in zip(names, (*next(values), 0), strict=True)}
    mesh = make_mesh(build(get_config()).mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        figures = evaluate(sums, None, [{}] * 5, batch_size=8, bytes_per_token=1.0)
    assert figures["eval/loss"] == (2.0**24 + 4) / 2.0**24


def test_a_hopeless_model_has_a_perplexity_all_the_same() -> None:
    with jax.set_mesh(make_mesh(build(get_config()).mesh, jax.devices()[:1])):
        sums = lambda *_: {"nll": jnp.float32(1e6), "weight": jnp.float32(1), "correct": jnp.float32(0)}
        assert math.isfinite(evaluate(sums, None, [{}], batch_size=8, bytes_per_token=1.0)["eval/perplexity"])
