"""The step: the same on every mesh, in any number of microbatches, compiled once, and as it was yesterday."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_config import get_config

from gla_jax.config import build, override
from gla_jax.layers.float8 import COMPILER_OPTIONS
from gla_jax.models import abstract_model, init_params
from gla_jax.parallel.mesh import make_mesh, place_batch
from gla_jax.training import step as step_module
from gla_jax.training.loop import open_data
from gla_jax.training.optimizer import make_optimizer
from gla_jax.training.state import Params, TrainState, abstract_state, init_state
from gla_jax.training.step import make_train_step, split_rows
from pallas_kernels.target import Target

STEPS = 3


class Run(NamedTuple):
    """What a few steps did."""

    metrics: list[dict[str, float]]
    state: TrainState
    """On the host, as the history."""
    history: list[Params]
    """The parameters after each step."""
    compilations: int


@functools.cache
def run(devices: int = 1, **overrides: str) -> Run:
    """Make a few steps on so many devices; in names of fields `__` stands for the dot."""
    settings = get_config()
    for name, text in overrides.items():
        override(settings, name.replace("__", "."), text)
    config = build(settings)
    with jax.set_mesh(make_mesh(config.mesh, jax.devices()[:devices])):
        config, data = open_data(config)
        graphdef, abstract_params = abstract_model(config.model, config.dtype)
        optimizer = make_optimizer(config.optimizer, config.steps)
        abstract = abstract_state(config, optimizer, abstract_params)
        params = jax.device_put(first_params(), jax.tree.map(sharding, abstract.params), may_alias=False)
        state = init_state(config, optimizer, params)
        step = make_train_step(config, graphdef, optimizer)
        metrics, history = [], []
        for number in range(STEPS):
            assert jax.tree.map(layout, state) == jax.tree.map(layout, abstract)
            before, batch = state, place_batch(data.train_batch(number), config.data.batch_size)
            state, measured = step(state, batch)
            if number == 0:  # later ones are still referred to by the history, which is a view of them
                assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before)), (
                    "the old state's memory is not reused"
                )
            metrics.append({name: float(value) for name, value in measured.items()})
            history.append(jax.device_get(state.params))
        return Run(metrics, jax.device_get(state), history, step._cache_size())


@functools.cache
def first_params() -> Params:
    """Return the parameters of the tiny model, on the host."""
    config = build(get_config())
    model = dataclasses.replace(config.model, vocab_size=256)
    return jax.device_get(init_params(model, config.dtype, jax.random.key(0)))


def sharding(leaf: Any) -> Any:
    return leaf.sharding


def layout(leaf: Any) -> Any:
    return leaf.shape, leaf.dtype, leaf.sharding


def assert_same(found: Run, expected: Run) -> None:
    for ours, theirs in zip(found.metrics, expected.metrics, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-5)
    # Adam divides a gradient by its own size, so that where it is all rounding, so is the update: compare whole arrays.
    for ours, theirs in zip(jax.tree.leaves(found.state.params), jax.tree.leaves(expected.state.params), strict=True):
        assert np.linalg.norm(ours - theirs) <= 1e-3 * np.linalg.norm(theirs)


@pytest.mark.parametrize(
    "mesh",
    [
        {"mesh__fsdp": "8"},
        {"mesh__data": "8"},
        {"mesh__data": "4", "mesh__tensor": "2"},
        {"mesh__data": "2", "mesh__fsdp": "2", "mesh__tensor": "2"},
    ],
    ids=["fsdp", "data", "tensor", "mixed"],
)
def test_eight_devices_compute_what_one_does(mesh: dict[str, str]) -> None:
    assert_same(run(devices=8, **mesh), run())


def test_microbatches_compute_what_one_batch_does() -> None:
    assert_same(run(devices=4, mesh__fsdp="2", mesh__tensor="2", optimizer__accumulation_steps="2"), run())


@pytest.mark.long
def test_dropout_is_the_same_on_any_mesh_and_another_at_each_step() -> None:
    dropped = run(model__embedding_dropout="0.5")
    assert_same(run(devices=4, mesh__fsdp="2", mesh__tensor="2", model__embedding_dropout="0.5"), dropped)
    difference = abs(dropped.metrics[0]["grad_norm"] / run().metrics[0]["grad_norm"] - 1)
    assert 1e-3 < difference < 1, "as many entries are larger as others are 0"


def test_microbatches_take_turns_of_rows() -> None:
    batch = {"inputs": jnp.arange(12).reshape(6, 2)}
    np.testing.assert_array_equal(split_rows(batch, 3)["inputs"][1], [[2, 3], [8, 9]])


def test_it_is_compiled_once() -> None:
    assert run().compilations == 1
    assert run(devices=8, mesh__data="2", mesh__fsdp="2", mesh__tensor="2").compilations == 1


def test_the_moving_average_and_the_z_loss() -> None:
    averaged = run(optimizer__ema_decay="0.75", optimizer__z_loss="1")
    plain = run()
    assert plain.state.ema is None and "z_loss" not in plain.metrics[0]
    # At the start logits are near 0, so that log Z is near log(vocabulary).
    assert averaged.metrics[0]["z_loss"] == pytest.approx(np.log(256) ** 2, rel=0.05)
    assert averaged.metrics[0]["loss"] == pytest.approx(plain.metrics[0]["loss"], rel=1e-6), "the loss is without it"
    assert averaged.metrics[0]["grad_norm"] != pytest.approx(plain.metrics[0]["grad_norm"], rel=1e-3)
    assert averaged.state.eval_params is averaged.state.ema and plain.state.eval_params is plain.state.params
    average = first_params()
    for params in averaged.history:
        average = jax.tree.map(lambda mean, x: 0.75 * mean + 0.25 * x, average, params)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), averaged.state.ema, average)


def test_moments_are_float32_whatever_the_parameters_are() -> None:
    settings = get_config()
    settings.dtype.params = "bfloat16"
    config = build(settings)
    with jax.set_mesh(make_mesh(config.mesh, jax.devices()[:1])):
        config, _ = open_data(config)
        _, abstract_params = abstract_model(config.model, config.dtype)
        state = abstract_state(config, make_optimizer(config.optimizer, config.steps), abstract_params)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(state.opt_state)} == {jnp.dtype("float32"), jnp.dtype("int32")}


GOLDEN = [
    {"loss": 5.551636, "grad_norm": 0.551624, "learning_rate": 0.0010},
    {"loss": 5.551315, "grad_norm": 0.539400, "learning_rate": 0.0028},
    {"loss": 5.560676, "grad_norm": 0.554161, "learning_rate": 0.0046},
]


def test_golden_metrics() -> None:
    assert run().metrics == [pytest.approx(golden, rel=2e-5) for golden in GOLDEN], (
        "The first steps of the tiny run are not what they were. If that is the intention (another initialisation, "
        "another order of data, another default), put the values on the left into GOLDEN and say why in the commit; if "
        "not, a change has altered the training of every model."
    )


def test_8_bit_products_are_left_to_cublas_on_gpus(monkeypatch):
    monkeypatch.setattr(step_module, "target", lambda: Target("gpu", "NVIDIA H100 80GB HBM3"))
    assert step_module.compiler_options(build({"dtype": {"matmul": "float8"}})) == COMPILER_OPTIONS
    assert not step_module.compiler_options(build({}))
    monkeypatch.setattr(step_module, "target", lambda: Target("cpu", "cpu"))
    assert not step_module.compiler_options(build({"dtype": {"matmul": "float8"}}))
