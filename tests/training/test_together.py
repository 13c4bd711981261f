"""Several learning rates at once: each model is the one that it would be alone."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from tiny_config import get_config

from gla_jax.config import ConfigError, build
from gla_jax.data import open_dataset
from gla_jax.evaluation import evaluate
from gla_jax.layers.attention import AttentionOptions
from gla_jax.models import abstract_model
from gla_jax.parallel.mesh import make_mesh, place_batch
from gla_jax.training.optimizer import make_optimizer
from gla_jax.training.state import init_state
from gla_jax.training.step import make_eval_step, make_train_step
from gla_jax.training.together import train_together

RATES = (1e-2, 3e-3, 1e8)
SEEDS = (5, 0)
ALONE = 3  # the place of the second learning rate with the second seed, which is the config's
DIVERGED = (4, 5)


def tiny(**data):
    settings = get_config()
    settings.steps, settings.eval.every = 6, 4  # calls of 2 steps: before the last evaluation there are one and two
    settings.model.mixer, settings.model.intermediate_size = "attention", 0  # what is quickest to compile
    settings.data.update(data)
    return build(settings)


@pytest.fixture(scope="module")
def found():
    return list(train_together(tiny(), RATES, SEEDS))


def test_a_model_is_what_it_would_be_alone(found):
    config = tiny()
    data = open_dataset(config.data, seed=config.seed)
    model = dataclasses.replace(config.model, vocab_size=data.vocab_size)
    optimizer_config = dataclasses.replace(config.optimizer, learning_rate=RATES[1])
    alone = dataclasses.replace(config, model=model, optimizer=optimizer_config)
    with jax.set_mesh(make_mesh(config.mesh, jax.devices()[:1])):
        graphdef, _ = abstract_model(model, config.dtype)
        optimizer = make_optimizer(optimizer_config, config.steps)
        state, step = init_state(alone, optimizer), make_train_step(alone, graphdef, optimizer)
        losses = []
        for number in range(config.steps):
            state, measured = step(state, place_batch(data.train_batch(number), config.data.batch_size))
            losses.append(float(measured["loss"]))
        figures = evaluate(
            make_eval_step(graphdef),
            state.params,
            data.eval_batches(config.eval.batches),
            batch_size=config.data.batch_size,
            bytes_per_token=1.0,
        )
    assert found[-1].loss[ALONE] == pytest.approx(np.mean(losses), rel=1e-5)
    assert found[-1].eval_loss[ALONE] == pytest.approx(figures["eval/loss"], rel=1e-5)
    assert found[-1].eval_accuracy[ALONE] == pytest.approx(figures["eval/accuracy"], abs=0.01)


def test_progress_comes_with_every_evaluation_and_divergence_stays_with_its_model(found):
    assert [progress.step for progress in found] == [4, 6]
    assert found[0].seconds < found[1].seconds
    for progress in found:
        assert all(math.isfinite(x) for x in progress.eval_loss[:4])
        assert len(set(progress.eval_loss[:4])) == 4, "seeds differ"
        for model in DIVERGED:
            assert not progress.eval_loss[model] < 10 and not progress.eval_accuracy[model] > 0.1


def test_there_must_be_something_to_evaluate():
    with pytest.raises(ConfigError, match=r"data\.held_out=0\.0 leaves nothing to evaluate"):
        next(train_together(tiny(corpus="kjv", held_out=0.0), RATES))


def test_cudnn_does_not_tell_documents_apart_here():
    attention = {"attention": AttentionOptions(implementation="cudnn")}
    config = dataclasses.replace(tiny(), model=dataclasses.replace(tiny().model, mixers=attention))
    with pytest.raises(ConfigError, match=r"implementation=cudnn cannot be trained at several learning rates on rows"):
        next(train_together(config, RATES))
