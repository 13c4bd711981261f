"""A model with a layer of every mixer that there is: what holds for one holds for any list of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gla_jax.config import DtypeConfig, ModelConfig
from gla_jax.inference import generate
from gla_jax.layers import MIXERS
from gla_jax.models import abstract_model, bind

CONFIG = ModelConfig(
    mixer=tuple(MIXERS),
    num_layers=len(MIXERS),
    vocab_size=24,
    hidden_size=16,
    num_heads=4,
    intermediate_size=0,
    mixers={"attention": {"cache_length": 32}},
)


@pytest.fixture(scope="module")
def model():
    graphdef, abstract = abstract_model(CONFIG, DtypeConfig(compute="float32"))
    random = np.random.default_rng(0)
    return bind(
        graphdef, jax.tree.map(lambda leaf: jnp.asarray(random.normal(0.1, 0.4, leaf.shape), jnp.float32), abstract)
    )


def test_a_row_in_parts_equals_the_whole_row(model):
    input_ids = np.random.default_rng(1).integers(0, 24, (2, 9)).astype(np.int32)
    run = jax.jit(lambda input_ids, state=None: model(input_ids, state))
    whole, _ = run(input_ids)
    first, state = run(input_ids[:, :8])
    second, _ = run(input_ids[:, 8:], state)
    np.testing.assert_allclose(np.concatenate([first, second], axis=1), whole, rtol=1e-3, atol=1e-4)


def test_a_batch_of_prompts_is_continued_as_each_alone(model):
    prompts = [[1, 2, 3, 4, 5, 6, 7], [8, 9], [10, 11, 12]]
    together = generate(model, prompts, max_tokens=5, temperature=0)
    for prompt, continued in zip(prompts, together, strict=True):
        np.testing.assert_array_equal(continued, generate(model, [prompt], max_tokens=5, temperature=0)[0])
