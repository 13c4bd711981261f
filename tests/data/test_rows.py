import numpy as np
import pytest

from gla_jax.config import ConfigError
from gla_jax.data.rows import Rows, Span, make_batch, split
from gla_jax.data.token_file import tokens_in_memory
from gla_jax.data.tokenizer import load_tokenizer

BYTES = load_tokenizer("bytes")


def documents(lengths, seed=0):
    random = np.random.default_rng(seed)
    return ["".join(map(chr, random.integers(1, 128, length))) for length in lengths]


def batch_of(texts, length):
    array = tokens_in_memory("test", texts, BYTES)
    rows = Rows([Span(array, 0, len(array.tokens) - 1)], length)
    return make_batch([rows[i] for i in range(len(rows))], BYTES.end_of_document)


@pytest.mark.parametrize("lengths", [[5, 1, 1, 30, 2], [64], [1] * 40, [7, 8, 9], [15], [16], [17]])
@pytest.mark.parametrize("length", [1, 8, 16])
def test_rows_are_what_the_definition_says(lengths, length):
    texts = documents(lengths)
    # (document, input, target, place in the document) of every token in order, by the definition.
    expected = []
    for number, text in enumerate(texts):
        ids = [0, *text.encode(), 0]
        expected += [(number, ids[i], ids[i + 1], i) for i in range(len(ids) - 1)]
    batch = batch_of(texts, length)
    assert batch["inputs"].shape == (-(-len(expected) // length), length)
    flat = {name: values.reshape(-1) for name, values in batch.items()}
    for i, (number, token, target, place) in enumerate(expected):
        row, column = divmod(i, length)
        assert flat["inputs"][i] == token and flat["targets"][i] == target and flat["weights"][i] == 1
        assert flat["positions"][i] == min(place, column)
        assert flat["segment_ids"][i] == 1 + number - expected[row * length][0]
    for name, value in (("weights", 0), ("segment_ids", 0), ("positions", 0), ("inputs", 0), ("targets", 0)):
        assert (flat[name][len(expected) :] == value).all()
    for name, values in batch.items():
        assert values.dtype == (np.float32 if name == "weights" else np.int32)


def test_no_token_of_another_document_shares_a_segment():
    # Each document is written in a letter of its own.
    texts = [chr(ord("A") + i) * n for i, n in enumerate(np.random.default_rng(0).integers(1, 40, 50))]
    batch = batch_of(texts, 32)
    seen = 0
    for row in range(len(batch["inputs"])):
        for segment in range(1, batch["segment_ids"][row].max() + 1):
            here = batch["segment_ids"][row] == segment
            tokens = set(batch["inputs"][row][here]) | set(batch["targets"][row][here & (batch["weights"][row] > 0)])
            assert len(tokens - {0}) <= 1
            seen += 1
    assert seen > len(texts)  # some documents go on in another row


def test_padding_has_no_weight():
    batch = make_batch([np.full(5, -1, np.int32), np.array([0, 7, 0, -1, -1], np.int32)], 0)
    assert batch["weights"].tolist() == [[0, 0, 0, 0], [1, 1, 0, 0]]
    assert batch["segment_ids"].tolist() == [[0, 0, 0, 0], [1, 1, 0, 0]]
    assert batch["targets"].tolist() == [[0, 0, 0, 0], [7, 0, 0, 0]]


def test_a_damaged_id_names_the_file():
    array = tokens_in_memory("some.tokens", ["abc"], BYTES)
    array.tokens[2] = 256
    with pytest.raises(ConfigError, match=r"some\.tokens is damaged: it has id 256"):
        Rows([Span(array, 0, 3)], 8)[0]


def arrays_of(*corpora):
    return [tokens_in_memory(f"{i}", documents(lengths, i), BYTES) for i, lengths in enumerate(corpora)]


@pytest.mark.parametrize(
    ("corpora", "share", "whole"),
    [
        ([[100] * 50], 0.05, True),
        ([[10] * 500], 0.05, True),
        ([[100] * 50, [100] * 50, [5], [4]], 0.05, True),
        ([[100] * 50, [300]], 0.05, True),
        ([[1000]], 0.05, False),
        ([[500, 500]], 0.05, False),
        ([[10, 1000]], 0.05, False),
        ([[1000], [40]], 0.05, True),
        ([[20, 1000], [2, 2]], 0.05, False),
        ([[100] * 10], 0.5, True),
    ],
)
def test_the_held_out_part(corpora, share, whole):
    arrays = arrays_of(*corpora)
    total = sum(len(array.tokens) - 1 for array in arrays)
    parts = split(arrays, share, BYTES)
    held = sum(span.end - span.start for span in parts.held_out)
    assert held == parts.tokens
    assert share / 2 - 1 / total <= held / total <= 2 * share
    # Training comes first, then what is held out; between them at most the token that a cut leaves to neither.
    order = {id(array): i for i, array in enumerate(arrays)}
    targets = [
        [(order[id(span.array)], i) for span in spans for i in range(span.start + 1, span.end + 1)]
        for spans in (parts.train, parts.held_out)
    ]
    assert max(targets[0]) < min(targets[1])
    assert len(targets[0]) + len(targets[1]) == total - (not whole)
    first = parts.held_out[0]
    assert (first.start in first.array.starts) == whole
    # Bytes held out, counted from the ids: in this tokeniser each but the marks between documents is one.
    tokens = np.concatenate([span.array.tokens[span.start : span.end] for span in parts.held_out])
    assert parts.bytes == (tokens != 0).sum()
    assert parts.documents == (tokens == 0).sum() + (not whole)


def test_nothing_held_out():
    arrays = arrays_of([100] * 5)
    parts = split(arrays, 0.0, BYTES)
    assert parts.held_out == [] and parts.tokens == parts.bytes == parts.documents == 0
    assert parts.train[0].end == 505
