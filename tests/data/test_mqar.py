"""Multi-query associative recall: the examples one by one, and the distributions that they are drawn from."""

import dataclasses
import itertools

import numpy as np
import pytest

from gla_jax.config import ConfigError, DataConfig
from gla_jax.data import open_dataset
from gla_jax.data.mqar import AssociativeRecall

CONFIG = DataConfig(corpus="mqar", sequence_length=32, pairs=3, batch_size=1000)


@pytest.fixture(scope="module")
def data():
    return open_dataset(CONFIG, seed=0)


@pytest.mark.parametrize(
    ("vocab_size", "length", "pairs"), [(8192, 512, 64), (8192, 256, 16), (8192, 64, 4), (32, 60, 15), (7, 8, 2)]
)
def test_every_query_has_one_answer_and_nothing_gives_it_away(vocab_size, length, pairs):
    examples = AssociativeRecall(vocab_size, length, pairs, "some", 200)
    for index in range(len(examples)):
        inputs, targets = examples[index]
        keys, values = inputs[0 : 2 * pairs : 2], inputs[1 : 2 * pairs : 2]
        assert len(set(keys)) == len(set(values)) == pairs
        assert keys.min() >= 1 and keys.max() < vocab_size // 2 <= values.min() and values.max() < vocab_size
        (queries,) = np.nonzero(inputs[2 * pairs :])
        queries += 2 * pairs
        assert sorted(inputs[queries]) == sorted(keys) and not np.any(queries % 2)
        answers = dict(zip(keys, values, strict=True))
        assert [answers[key] for key in inputs[queries]] == targets[queries].tolist()
        assert np.array_equal(np.nonzero(targets >= 0)[0], queries) and np.all(targets[targets < 0] == -1)


def assert_frequencies(found, expected):
    """Compare counts with probabilities by chi-square, to within four standard deviations."""
    expected = np.asarray(expected).ravel() * np.sum(found)
    assert expected.min() > 5
    freedom = len(expected) - 1
    assert np.sum((np.ravel(found) - expected) ** 2 / expected) < freedom + 4 * np.sqrt(2 * freedom)


def test_keys_and_values_are_drawn_without_replacement():
    examples = AssociativeRecall(16, 12, 3, "other", 40_000)
    tokens = np.stack([examples[index][0, :6] for index in range(len(examples))])
    for first, count in ((1, 7), (8, 8)):
        numbers = tokens[:, first > 1 :: 2] - first
        found = np.zeros((count,) * 3)
        np.add.at(found, tuple(numbers.T), 1)
        ordered = list(itertools.permutations(range(count), 3))
        assert found.sum() == sum(found[each] for each in ordered) == 40_000
        assert_frequencies([found[each] for each in ordered], np.full(len(ordered), 1 / len(ordered)))


def test_gaps_follow_the_power_law():
    """The first two draws have the joint distribution p_i p_j / (1 - p_i)."""
    examples = AssociativeRecall(8192, 24, 2, "third", 40_000)
    found = np.zeros((10, 10))
    for index in range(len(examples)):
        inputs, _ = examples[index]
        found[tuple(np.nonzero(inputs[4:] == key)[0][0] // 2 for key in inputs[0:4:2])] += 1
    p = 0.01 * np.arange(1, 11) ** (0.01 - 1)
    p /= p.sum()
    pairs = list(itertools.permutations(range(10), 2))
    assert_frequencies([found[pair] for pair in pairs], [p[i] * p[j] / (1 - p[i]) for i, j in pairs])
    assert np.trace(found) == 0


def test_batches_are_functions_of_seed_and_step(data):
    again, other = open_dataset(CONFIG, seed=0), open_dataset(CONFIG, seed=1)
    for step in (0, 7, 10**6):
        batch = data.train_batch(step)
        assert {name: (x.shape, x.dtype.name) for name, x in batch.items()} == {
            **dict.fromkeys(("inputs", "targets"), ((1000, 32), "int32")),
            "weights": ((1000, 32), "float32"),
        }
        assert all(np.array_equal(batch[name], again.train_batch(step)[name]) for name in batch)
        assert not np.array_equal(batch["inputs"], other.train_batch(step)["inputs"])
    assert data.fingerprint == again.fingerprint != other.fingerprint
    assert data.fingerprint != open_dataset(dataclasses.replace(CONFIG, pairs=2), seed=0).fingerprint
    assert (data.vocab_size, data.steps_per_epoch) == (8192, 100)


def test_an_epoch_has_every_example_once_and_none_that_is_held_out(data):
    rows = lambda batch: [row.tobytes() for row in batch["inputs"]]
    first = {row for step in range(100) for row in rows(data.train_batch(step))}
    assert len(first) == 100_000
    assert rows(data.train_batch(0)) != rows(data.train_batch(100)) and first.issuperset(rows(data.train_batch(100)))
    held_out = list(data.eval_batches())
    assert len(held_out) == 3 and first.isdisjoint(row for batch in held_out for row in rows(batch))


def test_only_answers_count_and_what_fills_up_the_last_batch_does_not():
    data = open_dataset(dataclasses.replace(CONFIG, batch_size=1024), seed=0)
    batches = list(data.eval_batches())
    assert [batch["weights"].sum() for batch in batches] == [3 * 1024, 3 * 1024, 3 * (3000 - 2048)]
    assert data.eval_tokens == 9000
    for batch in batches:
        assert np.array_equal(batch["weights"] == 1, batch["targets"] >= 4096)
        assert batch["inputs"].min() == batch["targets"].min() == 0


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"pairs": 9}, "data.pairs=9 must be from 1 to a quarter of data.sequence_length=32, which must be even"),
        ({"pairs": 0}, "data.pairs=0 must be"),
        ({"sequence_length": 31}, "data.sequence_length=31, which must be even"),
        ({"pairs": 8, "vocab_size": 16}, "data.pairs=8 needs as many keys, for which model.vocab_size=16 is too small"),
        ({"path": "mqar:0.5,kjv:0.5"}, "mqar tokens are no text, so they cannot be mixed"),
    ],
)
def test_mistakes_are_one_sentence(changes, sentence):
    changes = dict(changes)
    vocab_size = changes.pop("vocab_size", None)
    with pytest.raises(ConfigError) as error:
        open_dataset(dataclasses.replace(CONFIG, **changes), seed=0, vocab_size=vocab_size)
    assert sentence in str(error.value)
