import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gla_jax.inference import sample

LOGITS = jnp.log(jnp.array([[0.5, 0.25, 0.125, 0.0625, 0.0625]]))


def draws(number=4000, **options):
    keys = jax.random.split(jax.random.key(0), number)
    return np.asarray(sample(jnp.repeat(LOGITS, number, axis=0), keys, **options))


def test_frequencies_follow_the_probabilities():
    frequency = np.bincount(draws(), minlength=5) / 4000
    np.testing.assert_allclose(frequency, np.exp(LOGITS[0]), atol=0.03)


def test_zero_temperature_takes_the_likeliest():
    assert set(draws(temperature=0.0)) == {0}


def test_temperature_sharpens():
    assert np.mean(draws(temperature=0.25) == 0) > 0.9


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_top_k_keeps_the_k_likeliest(top_k):
    assert set(draws(top_k=top_k)) == set(range(top_k))


def test_top_k_beyond_the_vocabulary_keeps_all():
    assert set(draws(top_k=50)) == set(range(5))


@pytest.mark.parametrize(("top_p", "kept"), [(0.1, 1), (0.5, 1), (0.6, 2), (0.8, 3)])
def test_top_p_keeps_the_smallest_set_that_reaches_p(top_p, kept):
    assert set(draws(top_p=top_p)) == set(range(kept))


def test_a_rows_draw_does_not_depend_on_its_neighbours():
    keys = jax.random.split(jax.random.key(1), 8)
    logits = jax.random.normal(jax.random.key(2), (8, 50))
    together = sample(logits, keys)
    alone = jnp.concatenate([sample(logits[i : i + 1], keys[i : i + 1]) for i in range(8)])
    np.testing.assert_array_equal(together, alone)
