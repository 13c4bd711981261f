import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gla_jax.config import DtypeConfig, ModelConfig
from gla_jax.inference import generate
from gla_jax.models import abstract_model, bind, init_params

CONFIG = ModelConfig(
    hidden_size=32, num_layers=2, num_heads=2, vocab_size=32, intermediate_size=32, initializer_range=0.3,
    mixers={"gla": {"use_short_conv": True}},
)  # fmt: skip
NEW = 8
PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [9], [8, 7, 6, 5, 4, 3, 2, 1, 2, 3, 4], [30, 31]]


@pytest.fixture(scope="module")
def model():
    dtype = DtypeConfig(compute="float32")
    graphdef, _ = abstract_model(CONFIG, dtype)
    return bind(graphdef, init_params(CONFIG, dtype, jax.random.key(0)))


@pytest.fixture(scope="module")
def full_forward(model):
    """Greedy decoding without states: the whole text again for every token."""
    forward = jax.jit(lambda ids: model(ids)[0])

    def decode(prompt):
        tokens = list(prompt)
        for _ in range(NEW):
            padded = jnp.array([tokens + [0] * (32 - len(tokens))])  # later tokens cannot reach back
            tokens.append(int(jnp.argmax(forward(padded)[0, len(tokens) - 1])))
        return tokens[len(prompt) :]

    return decode


def test_prefill_and_steps_equal_the_full_forward(model, full_forward):
    results = generate(model, PROMPTS, max_tokens=NEW, temperature=0.0)
    assert [result.tolist() for result in results] == [full_forward(prompt) for prompt in PROMPTS]


def test_a_rows_text_does_not_depend_on_its_neighbours(model):
    together = generate(model, PROMPTS, max_tokens=NEW, seed=5)
    beside_others = generate(model, [PROMPTS[0], *PROMPTS[:0:-1]], max_tokens=NEW, seed=5)
    np.testing.assert_array_equal(together[0], beside_others[0])


def test_seeds(model):
    first, again, other = (generate(model, PROMPTS, max_tokens=NEW, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    rows_of_one_prompt = generate(model, [PROMPTS[2]] * 4, max_tokens=NEW)
    assert len({tuple(row) for row in rows_of_one_prompt}) > 1


def test_a_row_ends_before_its_end_token(model):
    whole = generate(model, PROMPTS, max_tokens=NEW, seed=3)
    end_token = int(whole[0][4])
    ended = generate(model, PROMPTS, max_tokens=NEW, seed=3, end_token=end_token)
    for full, cut in zip(whole, ended, strict=True):
        expected = full.tolist()
        assert cut.tolist() == (expected[: expected.index(end_token)] if end_token in expected else expected)


def test_on_a_mesh_as_on_one_device(model):
    alone = generate(model, PROMPTS, max_tokens=NEW, temperature=0.0)
    mesh = jax.make_mesh(
        (2, 2, 1, 2), ("data", "fsdp", "sequence", "tensor"), axis_types=(jax.sharding.AxisType.Explicit,) * 4
    )
    with jax.set_mesh(mesh):
        dtype = DtypeConfig(compute="float32")
        graphdef, _ = abstract_model(CONFIG, dtype)
        sharded = bind(graphdef, init_params(CONFIG, dtype, jax.random.key(0)))
        spread = generate(sharded, PROMPTS[:3], max_tokens=NEW, temperature=0.0)
    np.testing.assert_array_equal(alone[:3], spread)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": [[1], []]}, "at least one token"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_k": -2}, "top_k=-2"),
    ],
)
def test_bad_options(model, options, message):
    with pytest.raises(ValueError, match=message):
        generate(model, **({"prompts": [[1]], "max_tokens": 4} | options))
