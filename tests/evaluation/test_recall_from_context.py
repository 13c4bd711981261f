"""Recall: what a model copies out of its context counts, whatever stands beside it in the batch."""

import re
import string

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gla_jax.config import ConfigError, build
from gla_jax.data import load_tokenizer
from gla_jax.evaluation.recall import Question, evaluate_recall, read_questions
from gla_jax.models import abstract_model, bind, init_params
from gla_jax.parallel.mesh import make_mesh

BYTES = load_tokenizer("bytes")


class Copier:
    """A model whose state is what it has read: it goes on as the text did where its two latest bytes stood first."""

    groups = ()
    room = 512

    def hidden_states(self, tokens, state=None, *, segment_ids=None, positions=None):
        batch, length = tokens.shape
        if state is None:
            state = jnp.zeros((batch, self.room), jnp.int32), jnp.zeros(batch, jnp.int32)
        read, count = state
        keep = jnp.ones_like(tokens) if segment_ids is None else segment_ids
        places = count[:, None] + jnp.cumsum(keep, axis=1) - 1
        rows = jnp.arange(batch)[:, None]
        read = read.at[rows, jnp.where(keep > 0, places, self.room)].set(tokens, mode="drop")
        count = count + keep.sum(axis=1)
        index = jnp.arange(self.room)
        last, before = (jnp.take_along_axis(read, count[:, None] - back, axis=1) for back in (1, 2))
        same = (read == last) & (jnp.roll(read, 1, axis=1) == before) & (index < count[:, None] - 1) & (index > 0)
        place = jnp.argmax(same, axis=1)
        following = jnp.take_along_axis(read, (place + 1)[:, None], axis=1)
        hidden = jnp.broadcast_to(following[..., None], (batch, length, 1)).astype(jnp.float32)
        return hidden, (read, count)

    def logits(self, hidden):
        return jax.nn.one_hot(hidden[..., 0].astype(jnp.int32), 256)


@pytest.fixture
def copier(monkeypatch):
    monkeypatch.setattr("gla_jax.inference.session.nnx.split", lambda model: (model, {}))
    monkeypatch.setattr("gla_jax.inference.session.nnx.merge", lambda model, params: model)
    with jax.set_mesh(make_mesh(build({}).mesh, jax.devices()[:1])):
        yield Copier()


def test_what_is_copied_from_the_text_is_right(copier):
    letters = string.ascii_letters
    questions = [
        Question("Maker: Ohm Works.\nKind: a valve\nSee also\nMaker:", "OHM works"),
        Question(f"x\nName: {letters[:41]}end\nName:", "end"),  # the answer's bytes 43 to 45
        Question(f"x\nName: {letters[:45]}longer\nName:", "longer"),  # beyond the 48th
        Question("Colour: red\nSize: 3\nColour:", "3"),  # on the next line
    ]
    for batch_size in (1, 3):
        counts = []
        figures, answers = evaluate_recall(
            copier, BYTES, questions, batch_size=batch_size, begin_documents=True, advance=counts.append
        )
        assert answers[0] == " Ohm Works." and answers[3] == " red"
        assert answers[1] == f" {letters[:41]}end" and answers[2] == f" {letters[:45]}lo"
        assert figures == {"accuracy": 0.5, "standard_error": pytest.approx(0.5 / 3**0.5), "questions": 4}
        assert sum(counts) == 4


def test_a_model_of_ours_answers_alike_in_any_batch():
    """Attention, whose cache is at first too small for the texts."""
    model = {"mixer": "attention", "hidden_size": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 256}
    model |= {"initializer_range": 0.4, "intermediate_size": 0, "mixers": {"attention": {"cache_length": 8}}}
    config = build({"model": model, "dtype": {"compute": "float32"}})
    random = np.random.default_rng(0)
    questions = [Question("".join(map(chr, random.integers(65, 91, size))), "A") for size in (9, 30, 17)]
    found = []
    with jax.set_mesh(make_mesh(config.mesh, jax.devices()[:1])):
        model = bind(
            abstract_model(config.model, config.dtype)[0], init_params(config.model, config.dtype, jax.random.key(0))
        )
        for batch_size in (1, 3):
            found.append(evaluate_recall(model, BYTES, questions, batch_size=batch_size, begin_documents=False))
    assert found[0] == found[1] and any(found[0][1])


def test_files_are_read_and_mistakes_are_one_sentence(tmp_path):
    path = tmp_path / "fda.jsonl"
    path.write_text('{"text": " a b ", "value": "b ", "doc_id": 3}\n{"text": "c", "value": "c"}\n')
    assert read_questions(path) == [Question("a b", "b"), Question("c", "c")]
    assert read_questions(path, limit=1) == [Question("a b", "b")]
    for content, sentence in (
        (
            '{"text": "c", "answer": "c"}',
            "line 1, needs the texts 'text' and 'value': it lacks 'value' and has 'text',",
        ),
        ('{"value": ["c"]}', "it lacks 'text' and 'value' and has 'value'."),
        ("[1]", "and has no fields."),
        ('{"text": "c", ', "line 1, is not JSON ("),
        ("", "is empty."),
        ("\udcff", "cannot be read: it is not UTF-8."),
    ):
        path.write_bytes(content.encode("utf-8", "surrogateescape"))
        with pytest.raises(ConfigError, match=re.escape(sentence)):
            read_questions(path)
    with pytest.raises(ConfigError, match=r"gone\.jsonl cannot be read: No such file or directory\."):
        read_questions(tmp_path / "gone.jsonl")
