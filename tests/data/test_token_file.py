import numpy as np
import pytest

from gla_jax.config import ConfigError
from gla_jax.data.token_file import TokenWriter, open_token_file, tokens_in_memory
from gla_jax.data.tokenizer import IntegerTokenizer, load_tokenizer

TEXTS = ["first document", "", "é", "third\nand last"]


def test_documents_come_back(tmp_path, write_tokens):
    write_tokens(tmp_path / "a.tokens", TEXTS)
    array = open_token_file(tmp_path / "a.tokens")
    kept = [text.encode() for text in TEXTS if text]
    assert bytes(array.tokens.astype(np.uint8)) == b"".join(b"\0" + text for text in kept) + b"\0"
    assert array.starts.tolist() == [0, 15, 18, len(array.tokens) - 1]
    assert array.source_bytes.tolist() == np.cumsum([0, *map(len, kept)]).tolist()
    assert array.tokens.dtype == np.uint16 and array.vocab_size == 256
    assert array.tokenizer_fingerprint == load_tokenizer("bytes").fingerprint


def test_memory_and_file_hold_the_same(tmp_path, write_tokens):
    write_tokens(tmp_path / "a.tokens", TEXTS)
    file, memory = open_token_file(tmp_path / "a.tokens"), tokens_in_memory("a", TEXTS, load_tokenizer("bytes"))
    for name in ("tokens", "starts", "source_bytes"):
        np.testing.assert_array_equal(getattr(file, name), getattr(memory, name))
    assert file.content == memory.content


def test_a_large_vocabulary_has_wider_ids(tmp_path):
    for vocab_size, dtype in ((1 << 16, np.uint16), ((1 << 16) + 1, np.uint32)):
        with TokenWriter(tmp_path / "a.tokens", IntegerTokenizer(vocab_size)) as writer:
            writer.add(np.array([1, vocab_size - 1]), 2)
        array = open_token_file(tmp_path / "a.tokens")
        assert array.tokens.dtype == dtype
        assert array.tokens.tolist() == [0, 1, vocab_size - 1, 0]


def test_a_file_without_documents_is_whole(tmp_path, write_tokens):
    write_tokens(tmp_path / "a.tokens", [])
    assert open_token_file(tmp_path / "a.tokens").tokens.tolist() == [0]


def test_the_end_of_a_document_inside_one_is_refused(tmp_path):
    with (
        pytest.raises(ConfigError, match="could not be told apart"),
        TokenWriter(tmp_path / "a.tokens", load_tokenizer("bytes")) as writer,
    ):
        writer.add(np.array([1, 0, 1]), 3)
    assert list(tmp_path.iterdir()) == []


def test_nothing_appears_before_it_is_complete(tmp_path):
    with pytest.raises(RuntimeError), TokenWriter(tmp_path / "a.tokens", load_tokenizer("bytes")) as writer:
        writer.add(np.array([1]), 1)
        assert not (tmp_path / "a.tokens").exists()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("length", [0, 7, 12, 100, 4095, 4096, 4100, -8, -1])
def test_a_file_cut_short_is_named(tmp_path, length, write_tokens):
    path = tmp_path / "a.tokens"
    write_tokens(path, TEXTS)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ConfigError, match=r"a\.tokens (is not a token file|is cut short|has \d+ bytes and)"):
        open_token_file(path)


def test_other_files_are_named(tmp_path, write_tokens):
    path = tmp_path / "a.tokens"
    with pytest.raises(ConfigError, match=r"a\.tokens cannot be read: No such file"):
        open_token_file(path)
    path.write_text("text " * 2000)
    with pytest.raises(ConfigError, match=r"a\.tokens is not a token file"):
        open_token_file(path)
    write_tokens(path, TEXTS)
    whole = path.read_bytes()
    path.write_bytes(whole[:8] + b"\2" + whole[9:])
    with pytest.raises(ConfigError, match=r"a\.tokens is of version 2"):
        open_token_file(path)
    for old, new in ((b"{", b"["), (b'"tokens": ', b'"tokenz": '), (b'"uint16"', b'"object"'), (b'ts": 3', b'ts": x')):
        assert old in whole
        path.write_bytes(whole.replace(old, new, 1))
        with pytest.raises(ConfigError, match=r"a\.tokens has a damaged header"):
            open_token_file(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(ConfigError, match="its header says"):
        open_token_file(path)
