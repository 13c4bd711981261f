import dataclasses
import itertools
import threading
import time
import zlib
from collections import Counter

import numpy as np
import pytest

from gla_jax.config import ConfigError, DataConfig
from gla_jax.data import corpora, open_dataset
from gla_jax.data import rows as rows_module
from gla_jax.data.pipeline import open_long_rows

T = 16


def letters(first, count, length):
    """Documents that are each one letter, from `first` on, repeated."""
    return [chr(ord(first) + i) * length for i in range(count)]


@pytest.fixture(scope="module")
def noise(tmp_path_factory, write_tokens):
    """Documents of random characters: no two rows are equal."""
    random = np.random.default_rng(0)
    texts = ["".join(map(chr, random.integers(1, 128, length))) for length in random.integers(1, 200, 80)]
    return write_tokens(tmp_path_factory.mktemp("noise") / "noise.tokens", texts)


@pytest.fixture
def config(noise):
    return DataConfig(path=noise, sequence_length=T, batch_size=8)


def assert_equal(a, b):
    assert a.keys() == b.keys() == {"inputs", "targets", "segment_ids", "positions", "weights"}
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], strict=True)


def rows_of(batch):
    return [row.tobytes() for row in np.concatenate([batch["inputs"], batch["targets"]], axis=1)]


@pytest.mark.parametrize("process_count", [1, 2, 4, 8])
def test_any_number_of_processes_gets_the_same_rows(config, process_count):
    whole = open_dataset(config, seed=0)
    parts = [open_dataset(config, seed=0, process_index=i, process_count=process_count) for i in range(process_count)]
    batches = [(whole.train_batch(step), [part.train_batch(step) for part in parts]) for step in (0, 1, 70, 10**6)]
    evals = zip(whole.eval_batches(), zip(*(part.eval_batches() for part in parts), strict=True), strict=True)
    for batch, split in [*batches, *evals]:
        assert_equal(batch, {name: np.concatenate([part[name] for part in split]) for name in batch})
    assert {part.fingerprint for part in parts} == {whole.fingerprint}


@pytest.mark.parametrize("corpus", ["noise", "synthetic"])
@pytest.mark.parametrize("prefetch", [0, 1, 4])
def test_iterating_is_random_access_from_any_step(config, corpus, prefetch):
    config = dataclasses.replace(config, prefetch=prefetch)
    if corpus == "synthetic":
        config = dataclasses.replace(config, path=None, corpus=corpus)
    data, again = open_dataset(config, seed=3), open_dataset(config, seed=3)
    for start in (0, 13, 1000):
        for step, batch in enumerate(itertools.islice(data.train_batches(start), 50), start=start):
            assert_equal(batch, again.train_batch(step))


def test_a_row_goes_on_for_its_segments(config):
    long = open_dataset(dataclasses.replace(config, sequence_length=3 * T), seed=0)
    config = dataclasses.replace(config, segments=3)
    whole, part = open_dataset(config, seed=0), open_dataset(config, seed=0, process_index=1, process_count=2)
    for start in (0, 3000):
        parts = list(itertools.islice(whole.train_batches(start), 3))
        row = long.train_batch(start // 3)
        assert_equal({name: np.concatenate([part[name] for part in parts], axis=1) for name in row}, row)
        assert_equal({name: values[4:] for name, values in parts[1].items()}, part.train_batch(start + 1))
    assert whole.steps_per_epoch == 3 * long.steps_per_epoch and whole.fingerprint != long.fingerprint
    assert next(whole.eval_batches())["inputs"].shape == (8, T)
    with pytest.raises(ConfigError, match=r"data\.segments=3 must be 1 with data\.corpus='mqar'"):
        open_dataset(dataclasses.replace(config, path=None, corpus="mqar"), seed=0)


def test_every_row_comes_once_an_epoch_in_an_order_of_its_own(config):
    config = dataclasses.replace(config, held_out=0.0)
    data = open_dataset(config, seed=0)
    count = round(data.steps_per_epoch * config.batch_size)
    assert count % config.batch_size  # an epoch ends inside a batch
    rows = [row for batch in itertools.islice(data.train_batches(), count) for row in rows_of(batch)]
    epochs = [rows[i * count : (i + 1) * count] for i in range(config.batch_size)]
    assert len(set(epochs[0])) == count
    assert all(set(epoch) == set(epochs[0]) for epoch in epochs)
    assert all(a != b for a, b in itertools.combinations(epochs, 2))
    # Every token of the file but its first, which is no token, is a target once.
    targets = Counter()
    for batch in itertools.islice(data.train_batches(), count):  # as many rows as batch_size epochs
        targets.update(batch["targets"][batch["weights"] > 0].tolist())
    stored = np.memmap(config.path, np.uint16, offset=4096)
    stored = stored[1 : 1 + sum(targets.values()) // config.batch_size]
    assert targets == {token: n * config.batch_size for token, n in Counter(stored.tolist()).items()}


def test_the_seed_decides_the_order(config):
    epoch = round(open_dataset(config, seed=0).steps_per_epoch * config.batch_size)

    def order(seed, number):
        data = open_dataset(dataclasses.replace(config, batch_size=1), seed=seed)
        return [rows_of(data.train_batch(number * epoch + i))[0] for i in range(epoch)]

    orders = [tuple(order(seed, number)) for seed in (0, 1, 2) for number in (0, 1, 2)]
    assert len(set(orders)) == 9  # no epoch of one seed is an epoch of another
    assert order(1, 0) == list(orders[3])


def test_batches_are_those_of_earlier_versions(tmp_path, write_tokens):
    # A run that is resumed relies on this. If the change is meant, put in the new numbers, and something new in what
    # `fingerprint` hashes, so that runs of before are refused rather than continued on other data.
    path = write_tokens(tmp_path / "letters.tokens", [chr(ord("A") + i) * (i + 7) for i in range(50)])
    base = DataConfig(path=path, sequence_length=T, batch_size=8)
    mixture = dataclasses.replace(base, path=f"{path}:2,{path}:1")
    found = [
        zlib.crc32(b"".join(rows_of(open_dataset(config, seed=5).train_batch(1000))))
        for config in (base, mixture, DataConfig(corpus="synthetic"))
    ]
    assert found == [2487703478, 3988931029, 1936634293]


def test_held_out_documents_are_not_trained_on(tmp_path, write_tokens):
    path = write_tokens(tmp_path / "letters.tokens", letters("A", 50, 23))
    data = open_dataset(DataConfig(path=path, sequence_length=T, batch_size=8), seed=0)

    def tokens(batches):
        return set(np.concatenate([batch[name] for batch in batches for name in ("inputs", "targets")], None).tolist())

    trained = tokens(itertools.islice(data.train_batches(), 100))
    held_out = tokens(data.eval_batches())
    assert trained == {0, *range(ord("A"), ord("A") + 47)}
    assert held_out == {0, *range(ord("A") + 47, ord("A") + 50)}
    assert data.eval_tokens == 3 * 24 and data.eval_bytes_per_token == 23 / 24


def test_evaluation_is_the_same_for_every_seed_and_call(config):
    data = open_dataset(config, seed=0)
    batches = list(data.eval_batches())
    assert len(batches) > 2
    assert sum(batch["weights"].sum() for batch in batches) == data.eval_tokens
    assert batches[-1]["weights"].min() == 0 and batches[-1]["inputs"].shape == (8, T)
    rows = [row for batch in batches for row, real in zip(rows_of(batch), batch["weights"].any(1), strict=True) if real]
    assert len(set(rows)) == len(rows) == -(-data.eval_tokens // T)
    for other in (data.eval_batches(), open_dataset(config, seed=1).eval_batches(), data.eval_batches(10**6)):
        for a, b in zip(batches, other, strict=True):
            assert_equal(a, b)
    for a, b in zip(batches[:2], data.eval_batches(2), strict=True):
        assert_equal(a, b)


def test_nothing_held_out_gives_no_evaluation(config):
    data = open_dataset(dataclasses.replace(config, held_out=0.0), seed=0)
    assert list(data.eval_batches()) == [] and data.eval_tokens == 0


def test_mixtures_take_turns_by_weight(tmp_path, write_tokens):
    write_tokens(tmp_path / "a", letters("A", 20, 47))
    write_tokens(tmp_path / "b", letters("a", 20, 95))
    config = DataConfig(path=f"{tmp_path}/a:3,{tmp_path}/b:1", sequence_length=48, batch_size=8, held_out=0.0)
    data = open_dataset(config, seed=0)
    rows = [row for batch in itertools.islice(data.train_batches(), 100) for row in batch["inputs"]]
    small = [max(row) >= ord("a") for row in rows]
    assert sum(small) == 200
    # And so in every stretch, not only in the end.
    assert all(1 <= sum(small[i : i + 8]) <= 3 for i in range(len(small)))
    # Each part goes through its own epochs: 20 rows of one, 40 of the other.
    for part, count in ((0, 20), (1, 40)):
        own = [row.tobytes() for row, is_small in zip(rows, small, strict=True) if is_small == part]
        assert len(set(own)) == count
        assert all(set(own[i : i + count]) == set(own) for i in range(0, len(own) - count + 1, count))
    assert data.steps_per_epoch == 40 / 0.25 / 8
    assert "75.0% of the rows" in data.description and "25.0% of the rows" in data.description


def test_a_corpus_can_be_part_of_a_mixture(noise):
    data = open_dataset(DataConfig(path=f"kjv:0.9,{noise}:0.1"), seed=0)
    assert "kjv, 90.0% of the rows: 66 documents" in data.description
    kjv, own = open_dataset(DataConfig(), seed=0), open_dataset(DataConfig(path=noise), seed=0)
    assert data.eval_tokens == kjv.eval_tokens + own.eval_tokens
    assert sum(batch["weights"].sum() for batch in data.eval_batches()) == data.eval_tokens


def test_the_fingerprint_is_of_all_that_decides_the_batches(config, bpe_path, tmp_path, write_tokens, monkeypatch):
    monkeypatch.setitem(corpora.TEXTS, "kjv", lambda: [["a short text " * 100]])  # takes less time to tokenise
    other = write_tokens(tmp_path / "other.tokens", ["text " * 100])
    base = {"config": config, "seed": 0}
    changes = [
        {"seed": 1},
        *(
            {"config": dataclasses.replace(config, **change)}
            for change in (
                {"sequence_length": 17},
                {"batch_size": 4},
                {"held_out": 0.1},
                {"path": other},
                {"path": f"{config.path}:1,{other}:1"},
                {"path": f"{config.path}:1,{other}:2"},
                {"path": None},
                {"path": None, "tokenizer": bpe_path},
                {"path": None, "corpus": "synthetic"},
            )
        ),
    ]
    prints = [open_dataset(**{**base, **change}).fingerprint for change in [{}, *changes]]
    assert len(set(prints)) == len(prints)
    same = open_dataset(dataclasses.replace(config, prefetch=0), seed=0, process_index=1, process_count=2)
    assert same.fingerprint == prints[0]


@pytest.mark.parametrize("name", ["bpe_path", "sentencepiece_path"])
def test_other_tokenisers(name, request, some_text):
    tokenizer = request.getfixturevalue(name)
    data = open_dataset(DataConfig(tokenizer=tokenizer, sequence_length=64), seed=0)
    bytes_ = open_dataset(DataConfig(sequence_length=64), seed=0)
    assert data.vocab_size == 600 and data.tokenizer.name in ("tokenizer.json", "tokenizer.model")
    assert 1.5 < data.eval_bytes_per_token < 4
    # The boundary falls into the same or the next book, so the bytes held out are about the same.
    assert data.eval_tokens * data.eval_bytes_per_token == pytest.approx(bytes_.eval_tokens, rel=0.1)
    text = "\0".join(corpora.kjv())
    for ids in data.train_batch(0)["inputs"]:
        # The first and the last token of a row may be part of a character.
        for piece in np.split(ids, np.flatnonzero(ids == data.tokenizer.end_of_document)):
            assert data.tokenizer.decode(piece[1:-1]).strip() in text


def test_synthetic_tokens_fill_the_vocabulary_of_the_model():
    data = open_dataset(DataConfig(corpus="synthetic", sequence_length=512), seed=0, vocab_size=5000)
    assert data.vocab_size == 5000
    batches = [data.train_batch(step) for step in range(20)]
    tokens = np.concatenate([batch["inputs"] for batch in batches])
    assert tokens.min() == 0 and tokens.max() == 4999 and len(np.unique(tokens)) > 4000
    # The process that the docstring gives: steps of 1 .. 8 round the ring, an end of document in 512.
    inputs, targets = (np.concatenate([batch[name] for batch in batches]) for name in ("inputs", "targets"))
    plain = (inputs > 0) & (targets > 0)
    steps = Counter(((targets - inputs)[plain] % 4999).tolist())
    assert set(steps) == set(range(1, 9))
    assert max(steps.values()) < 1.05 * min(steps.values())
    assert (targets == 0).mean() == pytest.approx(1 / 512, rel=0.2)
    held_out = {row for batch in data.eval_batches() for row in rows_of(batch)}
    assert len(held_out) == 64
    assert held_out.isdisjoint(row for batch in batches for row in rows_of(batch))
    assert rows_of(open_dataset(DataConfig(corpus="synthetic"), seed=1).train_batch(0)) != rows_of(
        open_dataset(DataConfig(corpus="synthetic"), seed=0).train_batch(0)
    )


def test_prefetch_is_by_threads_and_stays_that_far_ahead(config, monkeypatch):
    makers = []

    def make_batch(rows, end_of_document):
        makers.append(threading.current_thread().name)
        return rows_module.make_batch(rows, end_of_document)

    monkeypatch.setattr("gla_jax.data.pipeline.make_batch", make_batch)
    batches = open_dataset(dataclasses.replace(config, prefetch=3), seed=0).train_batches()
    assert makers == []
    next(batches)
    deadline = time.monotonic() + 10
    while len(makers) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert len(makers) == 4 and all(name.startswith("grain-prefetch") for name in makers)
    makers.clear()
    next(open_dataset(dataclasses.replace(config, prefetch=0), seed=0).train_batches())
    assert makers == [threading.current_thread().name]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"corpus": "kvj"}, "data.corpus='kvj' is none of kjv, stdlib, .*; did you mean 'kjv'?"),
        ({"path": "kvj"}, "there is no file or folder kvj; .*; did you mean 'kjv'?"),
        ({"path": "gone.tokens"}, "there is no file or folder gone.tokens; make one with"),
        ({"path": "kjv:0.5,stdlib"}, "'stdlib' needs a positive number as its weight"),
        ({"path": "kjv:0.5,stdlib:-1"}, "'stdlib:-1' needs a positive number"),
        ({"path": "kjv:0.5,stdlib:0"}, "'stdlib:0' needs a positive number"),
        ({"path": "kjv:0.5,stdlib:nan"}, "'stdlib:nan' needs a positive number"),
        ({"path": "kjv:0.5,stdlib:inf"}, "'stdlib:inf' needs a positive number"),
        ({"path": "kjv:x"}, "'kjv:x' needs a positive number"),
        ({"path": "kjv:0.5,synthetic:0.5"}, "synthetic tokens are no text"),
        ({"tokenizer": "gone.json"}, "tokenizer='gone.json': there is no such file"),
        ({"sequence_length": 10**7}, "kjv has 3,929,288 tokens to train on, fewer than"),
        ({"sequence_length": 0}, "data.sequence_length=0 must be at least 1"),
        ({"batch_size": 0}, "data.batch_size=0 must be at least 1"),
        ({"batch_size": 10}, "data.batch_size=10 does not divide among 4 processes; try 8 or 12"),
        ({"batch_size": 2}, "data.batch_size=2 does not divide among 4 processes; try 4"),
        ({"held_out": 1.0}, "data.held_out=1.0 must be a share from 0 to below 1"),
        ({"prefetch": -1}, "data.prefetch=-1 must be 0"),
    ],
)
def test_mistakes_are_one_sentence(change, sentence):
    with pytest.raises(ConfigError, match=sentence.replace("?", r"\?")):
        open_dataset(DataConfig(**{"batch_size": 8, **change}), seed=0, process_count=4)


def test_a_vocabulary_too_small_for_the_tokeniser():
    with pytest.raises(ConfigError, match=r"model\.vocab_size=100 is smaller .* 256; leave it unset"):
        open_dataset(DataConfig(), seed=0, vocab_size=100)
    assert open_dataset(DataConfig(), seed=0, vocab_size=512).vocab_size == 256


def test_files_that_do_not_fit_are_named(tmp_path, write_tokens, bpe_path):
    path = write_tokens(tmp_path / "a.tokens", ["text " * 1000])
    with pytest.raises(ConfigError, match=r"a\.tokens was made with tokenizer bytes \(\w{8}\), which data.tokenizer="):
        open_dataset(DataConfig(path=path, tokenizer=bpe_path), seed=0)
    empty = write_tokens(tmp_path / "empty.tokens", [])
    with pytest.raises(ConfigError, match=r"empty\.tokens is empty"):
        open_dataset(DataConfig(path=empty), seed=0)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match=r"folder has no manifest\.json"):
        open_dataset(DataConfig(path=str(tmp_path / "folder")), seed=0)


def test_rows_are_documents_that_are_long_enough_or_the_stream(tmp_path, write_tokens):
    texts = ["a" * 5, "b" * 9, "c" * 3, "d" * 12]
    config = DataConfig(path=write_tokens(tmp_path / "some.tokens", texts), sequence_length=1, held_out=0.0)
    documents = open_long_rows(config, length=8, stream=False)
    end = int(documents[0][0])
    of = lambda text: [end, *map(ord, text[:8])]
    assert sorted(documents[i].tolist() for i in range(len(documents))) == sorted([of("b" * 9), of("d" * 12)])
    stream = open_long_rows(config, length=8, stream=True)
    rows = sorted((stream[i].tolist() for i in range(len(stream))), key=str)
    whole = [token for text in texts for token in (end, *map(ord, text))]
    assert rows == sorted((whole[i : i + 9] for i in range(0, 32, 8)), key=str)
    assert len(open_long_rows(config, length=8, stream=True, most=3)) == 3
    # A document's last target is the token that ends it.
    assert len(open_long_rows(config, length=13, stream=False)) == 1
    with pytest.raises(ConfigError, match=r"has no document of 14 tokens; the longest has 13: lower --length to"):
        open_long_rows(config, length=14, stream=False)
    with pytest.raises(ConfigError, match=r"has no 40 tokens in a row; the longest has 33: lower --length to that\."):
        open_long_rows(config, length=40, stream=True)
    with pytest.raises(ConfigError, match=r"model\.vocab_size=24 is smaller than the vocabulary of data\.tokenizer="):
        open_long_rows(config, length=8, stream=True, vocab_size=24)
    with pytest.raises(ConfigError, match=r"data\.corpus='synthetic' is no text"):
        open_long_rows(DataConfig(corpus="synthetic"), length=8, stream=True)


def test_only_what_is_held_out_is_read():
    config = DataConfig(corpus="kjv", held_out=0.05)
    rows = open_long_rows(config, length=1000, stream=True)
    assert len(rows) == 208
    with pytest.raises(ConfigError, match=r"kjv holds out no document of 100,000 tokens; the longest has"):
        open_long_rows(config, length=100_000, stream=False)
