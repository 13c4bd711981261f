"""The learning rate's course, and what AdamW is given."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gla_jax.config import OptimizerConfig
from gla_jax.training.optimizer import make_optimizer, make_schedule

CONFIG = OptimizerConfig(learning_rate=1.0, final_learning_rate=0.1, warmup_steps=10)


def course(steps: int = 110, **changes: object) -> np.ndarray:
    config = OptimizerConfig(**{**vars(CONFIG), **changes})
    return np.asarray(jax.jit(jax.vmap(make_schedule(config, steps)))(jnp.arange(steps + 20)))


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_it_rises_linearly_to_the_peak(schedule: str) -> None:
    np.testing.assert_allclose(course(schedule=schedule)[:11], np.linspace(0.1, 1.0, 11), rtol=1e-6)
    assert course(schedule=schedule, warmup_steps=0)[0] == pytest.approx(1.0)


def test_cosine_ends_at_the_final_rate() -> None:
    rate = course(schedule="cosine")
    angles = np.pi * np.arange(101) / 100
    np.testing.assert_allclose(rate[10:111], 0.1 + 0.9 * (1 + np.cos(angles)) / 2, rtol=1e-5)
    np.testing.assert_allclose(rate[110:], 0.1, rtol=1e-5)


def test_wsd_is_stable_and_then_falls_linearly() -> None:
    rate = course(schedule="wsd", decay_fraction=0.5)
    np.testing.assert_allclose(rate[10:56], 1.0, rtol=1e-6)
    np.testing.assert_allclose(rate[55:111], np.linspace(1.0, 0.1, 56), rtol=1e-5)
    np.testing.assert_allclose(rate[110:], 0.1, rtol=1e-5)


def test_constant_stays() -> None:
    np.testing.assert_allclose(course(schedule="constant")[10:], 1.0)


def test_a_warm_up_longer_than_the_run_only_rises() -> None:
    for schedule in ("cosine", "constant"):
        rate = course(steps=5, schedule=schedule)[:6]
        assert (np.diff(rate) > 0).all() and rate[-1] < 1


@pytest.mark.parametrize("decayed", ["kernels", "all"])
def test_weight_decay_is_for_kernels_or_for_all(decayed) -> None:
    constant = {"learning_rate": 0.5, "final_learning_rate": 0.5, "warmup_steps": 0}
    config = OptimizerConfig(**constant, weight_decay=0.1, decayed=decayed)
    params = {"query": {"kernel": jnp.ones(3), "bias": jnp.ones(3)}, "embed": {"embedding": jnp.ones(3)}}
    optimizer = make_optimizer(config, 10)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    np.testing.assert_allclose(updates["query"]["kernel"], -0.5 * 0.1)
    for others in (updates["query"]["bias"], updates["embed"]["embedding"]):
        np.testing.assert_allclose(others, -0.5 * 0.1 if decayed == "all" else 0)


def test_an_update_is_adamw_of_the_clipped_gradient() -> None:
    constant = {"learning_rate": 0.1, "final_learning_rate": 0.1, "warmup_steps": 0}
    config = OptimizerConfig(**constant, clip_norm=1.0, weight_decay=0.2, b1=0.8, b2=0.9, eps=1e-3)
    optimizer = make_optimizer(config, 10)
    params = {"kernel": jnp.array([1.0, -2.0])}
    state = optimizer.init(params)
    first = second = np.zeros(2)
    expected = np.array([1.0, -2.0])
    for count, gradient in enumerate([np.array([3.0, 4.0]), np.array([0.1, -0.2])], start=1):
        updates, state = optimizer.update({"kernel": jnp.asarray(gradient, jnp.float32)}, state, params)
        params = optax.apply_updates(params, updates)
        clipped = gradient * min(1.0, 1.0 / np.linalg.norm(gradient))
        first = 0.8 * first + 0.2 * clipped
        second = 0.9 * second + 0.1 * clipped**2
        step = (first / (1 - 0.8**count)) / (np.sqrt(second / (1 - 0.9**count)) + 1e-3)
        expected = expected - 0.1 * (step + 0.2 * expected)
        np.testing.assert_allclose(params["kernel"], expected, rtol=1e-5)
