"""Rows that go on for several steps: the state is carried, the gradient is not, and a resumed run has not lost it."""

import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_config import get_config

from gla_jax.config import ConfigError, build
from gla_jax.data.rows import make_batch
from gla_jax.models import abstract_model, bind
from gla_jax.parallel.mesh import make_mesh, place_batch
from gla_jax.training import loop
from gla_jax.training.display import LineDisplay
from gla_jax.training.loss import cross_entropy
from gla_jax.training.optimizer import make_optimizer
from gla_jax.training.state import abstract_state, init_state
from gla_jax.training.step import make_train_step

SEGMENTS, T = 3, 16
NAMES = ("inputs", "targets", "segment_ids", "positions", "weights")


def settings():
    config = get_config()
    config.data.segments, config.data.batch_size = SEGMENTS, 4
    config.steps, config.eval.every, config.sample.tokens = 7, 0, 0
    return config


def rows():
    """Four rows of three segments. A document begins at the start of one, at the end of another, and in the midst."""
    ids = np.random.default_rng(0).integers(1, 256, (4, SEGMENTS * T + 1)).astype(np.int32)
    for row, column in ((0, 0), (1, T), (2, 2 * T - 1), (3, T + 5), (3, T + 9)):
        ids[row, column] = 0
    return make_batch(list(ids), 0)


@pytest.mark.parametrize(
    ("mixers", "sizes"),
    [
        (("linear_attention", "attention"), (1, 1)),
        pytest.param(("gla", "retention", "mamba", "attention"), (1, 1), marks=pytest.mark.long),
        pytest.param(("gla", "retention", "mamba", "attention"), (2, 2), marks=pytest.mark.long),
    ],
    ids=["two mixers", "all mixers", "mesh"],
)
def test_equals_a_direct_computation(mixers, sizes):
    """The losses of the steps are those of whole rows, the gradients those of each segment."""
    config = settings()
    config.model.mixer, config.model.num_layers, config.model.intermediate_size = mixers, len(mixers), 0
    config.model.vocab_size = 256
    config.model.mixers.gla.use_short_conv = True
    config.optimizer.learning_rate = config.optimizer.final_learning_rate = 1e-12  # so that parameters stay
    config.optimizer.weight_decay, config.mesh.fsdp, config.mesh.tensor = 0.0, *sizes
    config = build(config)
    batch = rows()
    with jax.set_mesh(make_mesh(config.mesh, jax.devices()[: sizes[0] * sizes[1]])):
        graphdef, abstract_params = abstract_model(config.model, config.dtype)
        optimizer = make_optimizer(config.optimizer, config.steps)
        state = init_state(config, optimizer)
        layout = lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding)
        described = jax.tree.map(layout, abstract_state(config, optimizer, abstract_params))
        params = jax.tree.map(jnp.copy, state.params)
        step, measured = make_train_step(config, graphdef, optimizer), []
        parts = [place_batch({name: batch[name][:, i * T : (i + 1) * T] for name in NAMES}, 4) for i in range(SEGMENTS)]
        for part in [*parts, parts[0]]:  # the last begins rows anew, so that it is the first again
            state, metrics = step(state, part)
            assert jax.tree.map(layout, state) == described
            measured.append(metrics)
        assert step._cache_size() == 1

        @jax.jit
        def whole(params, batch):
            model = bind(graphdef, params)
            hidden, _ = model.hidden_states(
                batch["inputs"], segment_ids=batch["segment_ids"], positions=batch["positions"]
            )
            return cross_entropy(hidden, model.head_matrix(), batch["targets"], batch["weights"])[1]["nll"]

        wanted = whole(params, place_batch(batch, 4)) / (4 * T * SEGMENTS)
        assert np.mean([float(metrics["loss"]) for metrics in measured[:3]]) == pytest.approx(float(wanted), rel=2e-6)
        assert float(measured[3]["loss"]) == pytest.approx(float(measured[0]["loss"]), rel=1e-6)

        @jax.jit
        def gradient(params, before, part):
            """Of the second segment, after the first; no document begins at its start in these rows."""
            call = lambda model, batch, state: model.hidden_states(
                batch["inputs"], state, segment_ids=batch["segment_ids"], positions=batch["positions"]
            )
            model = bind(graphdef, params)
            _, state = call(model, before, model.init_state(4))

            def loss(params):
                model = bind(graphdef, params)
                hidden, _ = call(model, part, jax.lax.stop_gradient(state))
                total, sums = cross_entropy(hidden, model.head_matrix(), part["targets"], part["weights"])
                return total / sums["weight"]

            return optax.tree.norm(jax.grad(loss)(params))

        if sizes == (1, 1):
            smooth = [place_batch({n: x[np.array([0, 2, 3, 0])] for n, x in part.items()}, 4) for part in parts[:2]]
            state = init_state(config, optimizer)
            for part in smooth:
                state, metrics = step(state, part)
            assert float(metrics["grad_norm"]) == pytest.approx(float(gradient(params, *smooth)), rel=1e-5)


@pytest.mark.long
def test_a_resumed_run_has_not_lost_the_state(tmp_path, monkeypatch):
    config = settings()
    config.model.mixer, config.model.intermediate_size = "linear_attention", 0
    config = build(config)
    straight = loop.train(config, str(tmp_path / "straight"), devices=jax.devices()[:1])
    assert jax.tree.leaves(straight.state.carried)[0].any()
    with monkeypatch.context() as patch:
        stop = lambda self, now, loss: os.kill(os.getpid(), signal.SIGTERM) if now == 3 else None
        patch.setattr(LineDisplay, "advance", stop)
        stopped = loop.train(config, str(tmp_path / "stopped"), devices=jax.devices()[:1])
        assert stopped.step % SEGMENTS, "in the midst of a row"
    resumed = loop.train(config, str(tmp_path / "stopped"), devices=jax.devices()[:1])
    jax.tree.map(np.testing.assert_array_equal, resumed.state, straight.state)


def test_microbatches_are_refused():
    config = settings()
    config.optimizer.accumulation_steps = 2
    with pytest.raises(ConfigError, match=r"data\.segments=3 carries the state of whole batches on, .*; set it to 1"):
        build(config)
