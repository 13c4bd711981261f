import json
import pickle
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from gla_jax.config import ConfigError
from gla_jax.data import tokenizer as tokenizer_module
from gla_jax.data.tokenizer import IntegerTokenizer, load_tokenizer, train_tokenizer

TEXTS = [
    "In the beginning God created the heaven and the earth.",
    " leading, trailing ",
    "tabs\tand\n\nlines\r\n",
    "runs   of    spaces  and\n        indented = code(  )",
    "Größe, 北京, 🙂, e\u0301, \u200b",
    "<|endoftext|></s><s><unk><pad>",
]
FILES = ["bpe_path", "sentencepiece_path", "sentencepiece_without_prefix_path"]


@pytest.fixture(params=["bytes", *FILES])
def tokenizer(request):
    name = request.param
    return load_tokenizer(name if name == "bytes" else request.getfixturevalue(name))


def test_every_text_comes_back(tokenizer):
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert ids.dtype == np.int32 and ids.min() >= 0 and ids.max() < tokenizer.vocab_size


def test_no_text_spells_the_end_of_a_document(tokenizer):
    for text in [*TEXTS, "\0", "a\0b"]:
        assert tokenizer.end_of_document not in tokenizer.encode(text)
    assert tokenizer.decode([tokenizer.end_of_document]) == ""


def test_a_batch_is_its_texts_one_by_one(tokenizer):
    for text, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
        np.testing.assert_array_equal(ids, tokenizer.encode(text))
    assert tokenizer.encode_batch([]) == [] and len(tokenizer.encode("")) == 0


def test_a_copy_in_another_process_is_the_same(tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.fingerprint == tokenizer.fingerprint
    np.testing.assert_array_equal(copy.encode(TEXTS[0]), tokenizer.encode(TEXTS[0]))


def test_bytes_are_the_bytes():
    bytes_ = load_tokenizer("bytes")
    assert bytes_.encode("aé").tolist() == list("aé".encode())
    assert bytes_.decode(bytes_.encode("a\0b")) == "a\ufffdb"
    assert bytes_.decode([0xC3]) == "\ufffd"  # half a character, as a model may sample it
    assert bytes_.encode("\ud800").tolist() == [ord("?")]


@pytest.mark.parametrize("name", FILES)
def test_a_long_text_in_pieces_has_the_ids_of_the_whole(name, request, some_text, monkeypatch):
    tokenizer = load_tokenizer(request.getfixturevalue(name))
    assert tokenizer._space_at_cut == ("" if name == "sentencepiece_path" else " ")
    text = some_text[:20_000] + " ".join(TEXTS)
    (whole,) = tokenizer._encode([text])
    monkeypatch.setattr(tokenizer_module, "_PIECE_CHARACTERS", 50)
    assert len(tokenizer._cut(text)) > 200
    np.testing.assert_array_equal(tokenizer.encode(text), whole)


def test_ids_with_gaps_count_up_to_the_last(bpe_path, tmp_path):
    content = json.loads(Path(bpe_path).read_text())
    content["added_tokens"][0]["id"] = 5000
    content["model"]["vocab"] = {k: v for k, v in content["model"]["vocab"].items() if k != "<|endoftext|>"}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    assert load_tokenizer(str(path)).vocab_size == max(load_tokenizer(str(path)).end_of_document, 599) + 1


def test_the_file_beside_it_names_the_end_of_document(bpe_path, tmp_path):
    path = shutil.copy(bpe_path, tmp_path / "tokenizer.json")
    usual = load_tokenizer(str(path))
    for named in ("A", {"content": "A", "lstrip": False}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": named}))
        other = load_tokenizer(str(path))
        assert other.end_of_document != usual.end_of_document
        assert other.fingerprint != usual.fingerprint
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "not there"}))
    with pytest.raises(ConfigError, match=r"no token to end documents with \(looked for not there\)"):
        load_tokenizer(str(path))
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ConfigError, match="is not a JSON object"):
        load_tokenizer(str(path))


def test_sentencepiece_ends_are_read_from_the_model(sentencepiece_path):
    assert load_tokenizer(sentencepiece_path).end_of_document == 2


def test_integers():
    tokenizer = IntegerTokenizer(100)
    assert tokenizer.encode("5 17 99").tolist() == [5, 17, 99]
    assert tokenizer.decode([0, 5, 17]) == "5 17"
    for text in ("100", "0", "-1", "x"):
        with pytest.raises(ConfigError, match="is not an id from 1 to 99"):
            tokenizer.encode(text)


def test_mistakes_are_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="is none of"):
        load_tokenizer("byte")
    with pytest.raises(ConfigError, match="there is no such file"):
        load_tokenizer(str(tmp_path / "gone.json"))
    for name in ("damaged.json", "damaged.model"):
        (tmp_path / name).write_bytes(random.Random(0).randbytes(1000))
        with pytest.raises(ConfigError, match=r"damaged\.(json|model) is not a"):
            load_tokenizer(str(tmp_path / name))
    with pytest.raises(ConfigError, match="256 are bytes"):
        train_tokenizer(["text"], 100, tmp_path / "small.json")
    monkeypatch.setitem(__import__("sys").modules, "sentencepiece", None)
    with pytest.raises(ConfigError, match=r"pip install 'gla-jax\[tokenizer\]'"):
        load_tokenizer(str(tmp_path / "damaged.model"))
