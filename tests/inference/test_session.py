"""Sessions: the same tokens as in one go, states that are saved, and text that appears as it is drawn."""

import jax
import numpy as np
import pytest

from gla_jax.config import ConfigError, build
from gla_jax.data.tokenizer import ByteTokenizer
from gla_jax.inference import generate
from gla_jax.inference.session import Session
from gla_jax.inference.text import TextStream
from gla_jax.models import abstract_model, bind
from pallas_kernels.target import Target

PROMPTS = [[0, 5, 6], [0, 7, 8, 9, 10, 11, 12]]


@pytest.fixture(scope="module")
def model():
    mixers = {"gla": {"implementation": "reference"}, "attention": {"cache_length": 40}}
    sizes = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 16, "vocab_size": 32}
    settings = {"model": sizes | {"mixer": ["gla", "attention"], "mixers": mixers}, "dtype": {"compute": "float32"}}
    config = build(settings)
    graphdef, abstract = abstract_model(config.model, config.dtype)
    random = np.random.default_rng(0)
    return bind(
        graphdef, jax.tree.map(lambda x: jax.numpy.asarray(random.normal(0.1, 0.5, x.shape), x.dtype), abstract)
    )


@pytest.mark.long
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_the_tokens_are_those_of_generate(model, platform, monkeypatch):
    # On a GPU both loops run the layers one by one.
    jax.clear_caches()
    for module in ("generation", "session"):
        monkeypatch.setattr(f"gla_jax.inference.{module}.target", lambda: Target(platform, ""))
    expected = generate(model, PROMPTS, max_tokens=12, temperature=1.5, seed=3)
    session = Session(model, PROMPTS, temperature=1.5, seed=3)
    found = np.concatenate([session.draw(4), session.draw(4), session.draw(4)], axis=1)
    np.testing.assert_array_equal(found, expected)
    assert len(set(found.ravel().tolist())) > 5
    # A row draws the same in another batch, if it is told its number.
    other = Session(model, PROMPTS[::-1], temperature=1.5, seed=3, first_row=1)
    np.testing.assert_array_equal(other.draw(4)[0], expected[1][:4])


def test_what_is_fed_later_is_read_like_a_prompt_and_a_saved_state_goes_on(model, tmp_path):
    tokens = np.random.default_rng(1).integers(0, 32, 11).tolist()
    whole = Session(model, [tokens], temperature=0.0)
    expected = np.concatenate([whole.draw(4)[0], whole.draw(4)[0]])
    parts = Session(model, [tokens[:3]], temperature=0.0)
    parts.feed(tokens[3:])
    parts.save(tmp_path / "state.npz")
    np.testing.assert_array_equal(parts.draw(4)[0], expected[:4])
    other = Session(model, [[0, 1, 2]], temperature=0.0)
    other.load(tmp_path / "state.npz")
    np.testing.assert_array_equal(other.draw(4)[0], expected[:4])
    np.testing.assert_array_equal(other.draw(4)[0], expected[4:])
    assert [path.name for path in tmp_path.iterdir()] == ["state.npz"]


def test_what_cannot_be(model, tmp_path):
    session = Session(model, [[0, 1, 2, 3]], room=12)
    session.draw(4)
    session.save(tmp_path / "state.npz")
    session.draw(4)
    with pytest.raises(ConfigError, match="16 tokens do not fit into the 12 that this model's state has room for"):
        session.draw(4)
    with pytest.raises(ConfigError, match=r"nothing\.npz: there is no such file"):
        session.load(tmp_path / "nothing.npz")
    (tmp_path / "bad.npz").write_bytes(b"PK nothing")
    with pytest.raises(ConfigError, match=r"bad\.npz is no saved state"):
        session.load(tmp_path / "bad.npz")
    with pytest.raises(
        ConfigError, match=r"state\.npz is the state of another model: .* is \(1, .* there, \(2, .* here"
    ):
        Session(model, PROMPTS).load(tmp_path / "state.npz")


@pytest.mark.parametrize("size", [1, 3, 100])
def test_text_appears_when_it_is_certain(size):
    tokenizer = ByteTokenizer()
    stream, shown = TextStream(tokenizer, stops=["\n\n", "END"], max_tokens=100), []
    tokens = tokenizer.encode("Äpfel\nEN und E\n\nmore").tolist()
    for start in range(0, len(tokens), size):
        stream.add(tokens[start : start + size])
        shown.append(stream.take())
        assert "\ufffd" not in shown[-1]
    assert "".join(shown) == stream.text == "Äpfel\nEN und E"
    assert stream.ended_by == "stop"


def test_texts_end_with_their_document_or_when_they_are_long_enough():
    tokenizer = ByteTokenizer()
    ended, long = TextStream(tokenizer, max_tokens=9), TextStream(tokenizer, max_tokens=3)
    ended.add([65, 66, 0, 67])
    long.add([65, 66, 67, 68])
    assert (ended.text, ended.ended_by, ended.take()) == ("AB", "end", "AB")
    assert (long.text, long.ended_by) == ("ABC", "length")
