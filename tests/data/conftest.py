"""Token files, and tokenisers of both libraries, made in the tests."""

import io
from pathlib import Path

import pytest

from gla_jax.data import corpora
from gla_jax.data.token_file import TokenWriter
from gla_jax.data.tokenizer import load_tokenizer, train_tokenizer


@pytest.fixture(scope="session")
def write_tokens():
    def write(path: Path, texts: list[str], tokenizer: str = "bytes") -> str:
        loaded = load_tokenizer(tokenizer)
        with TokenWriter(path, loaded) as writer:
            for text in texts:
                writer.add(loaded.encode(text), len(text.encode()))
        return str(path)

    return write


@pytest.fixture(scope="session")
def some_text() -> str:
    return corpora.kjv()[0][:100_000]


@pytest.fixture(scope="session")
def bpe_path(tmp_path_factory, some_text) -> str:
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    train_tokenizer([some_text], 600, path)
    return str(path)


def _sentencepiece(folder: Path, text: str, **options) -> str:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.split("\n")),
        model_writer=model,
        vocab_size=600,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        **options,
    )
    path = folder / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return str(path)


@pytest.fixture(scope="session")
def sentencepiece_path(tmp_path_factory, some_text) -> str:
    return _sentencepiece(tmp_path_factory.mktemp("sp"), some_text)


@pytest.fixture(scope="session")
def sentencepiece_without_prefix_path(tmp_path_factory, some_text) -> str:
    return _sentencepiece(tmp_path_factory.mktemp("sp_plain"), some_text, add_dummy_prefix=False)
