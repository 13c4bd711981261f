import errno
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from gla_jax.config import ConfigError, DataConfig
from gla_jax.data import load_tokenizer, open_dataset
from gla_jax.data import prepare as prepare_module
from gla_jax.data.manifest import load_manifest, open_folder
from gla_jax.data.prepare import main, prepare
from gla_jax.data.token_file import TokenWriter

DOCUMENTS = [
    "First document.",
    "Second,\nof two lines.",
    "Größe",
    "",
    "last \ud83d\ude42".encode("utf-16", "surrogatepass").decode("utf-16"),
]


def texts_in(folder, tokenizer="bytes"):
    """The documents of a folder, decoded."""
    loaded = load_tokenizer(tokenizer)
    return [
        loaded.decode(array.tokens[start + 1 : end])
        for array in open_folder(folder)
        for start, end in zip(array.starts, array.starts[1:], strict=False)
    ]


def write_jsonl(path, documents=DOCUMENTS, field="text"):
    data = "".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(documents)).encode()
    path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)
    return path


def write_parquet(path, documents=DOCUMENTS, field="text"):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"id": range(len(documents)), field: documents}), path, row_group_size=2)
    return path


def write_separated(path, documents=DOCUMENTS):
    path.write_text("\n<|endoftext|>\n".join(documents), encoding="utf-8")
    return path


WRITERS = {"a.jsonl": write_jsonl, "a.jsonl.gz": write_jsonl, "a.parquet": write_parquet, "a.txt": write_separated}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_documents(tmp_path, name, capsys):
    path = WRITERS[name](tmp_path / name)
    assert main([f"--input={path}", f"--output={tmp_path / 'out'}", "--separator=<|endoftext|>"]) == 0
    kept = [text for text in DOCUMENTS if text]
    assert texts_in(tmp_path / "out") == kept
    size = sum(len(text.encode()) for text in kept)
    out = capsys.readouterr().out
    assert f"4 documents, {size + 5} tokens" in out and f"--config.data.path={tmp_path / 'out'}\n" in out
    assert load_manifest(tmp_path / "out").shards[0].counts == {"documents": 4, "tokens": size + 5, "bytes": size}


def test_a_text_file_is_a_document(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n\ntwo\n")
    (tmp_path / "b.txt").write_bytes(b"")
    (tmp_path / "c.txt").write_bytes(b"three")
    prepare([str(tmp_path / "*.txt")], tmp_path / "out")
    assert texts_in(tmp_path / "out") == ["one\r\n\ntwo\n", "three"]


def test_separators_are_found_across_blocks(tmp_path):
    documents = ["x" * n for n in (2**20 - 5, 3, 2**20, 7)]
    write_separated(tmp_path / "a.txt", documents)
    prepare([str(tmp_path / "a.txt")], tmp_path / "out", separator="<|endoftext|>")
    assert texts_in(tmp_path / "out") == documents


def test_the_folder_trains(tmp_path, some_text, capsys):
    lines = some_text.split("\n")
    write_jsonl(tmp_path / "a.jsonl", lines, "verse")
    assert (
        main([f"--input={tmp_path}/*.jsonl", f"--output={tmp_path}/out", "--text_field=verse", "--train_tokenizer=500"])
        == 0
    )
    tokenizer = f"{tmp_path}/out/tokenizer.json"
    assert f"--config.data.path={tmp_path}/out --config.data.tokenizer={tokenizer}" in capsys.readouterr().out
    assert texts_in(tmp_path / "out", tokenizer) == lines
    data = open_dataset(DataConfig(path=f"{tmp_path}/out", tokenizer=tokenizer, sequence_length=32), seed=0)
    assert data.vocab_size == 500 and f"{len(lines)} documents" in data.description
    assert data.train_batch(0)["inputs"].max() < 500
    with pytest.raises(ConfigError, match=r"00000\.tokens was made with tokenizer tokenizer\.json .*'bytes'"):
        open_dataset(DataConfig(path=f"{tmp_path}/out"), seed=0)


def test_the_folder_has_its_tokeniser(tmp_path, bpe_path, sentencepiece_path):
    write_jsonl(tmp_path / "a.jsonl")
    own = tmp_path / "own"
    own.mkdir()
    shutil.copy(bpe_path, own / "mine.json")
    (own / "tokenizer_config.json").write_text('{"eos_token": "A"}')
    shutil.copy(sentencepiece_path, own / "mine.model.v1")
    copies = [(own / "mine.json", "tokenizer.json"), (own / "mine.model.v1", "tokenizer.model")]
    for i, (path, copy) in enumerate(copies):
        prepare([f"{tmp_path}/a.jsonl"], tmp_path / f"{i}", tokenizer=str(path))
        assert load_tokenizer(f"{tmp_path}/{i}/{copy}").fingerprint == load_tokenizer(str(path)).fingerprint
        # The copy serves as well as the original when the folder is to grow.
        prepare([f"{tmp_path}/a.jsonl"], tmp_path / f"{i}", tokenizer=f"{tmp_path}/{i}/{copy}")


def test_more_files_are_added_and_finished_ones_left_alone(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "b.jsonl", ["b"])
    prepare([f"{tmp_path}/b.jsonl"], tmp_path / "out")
    write_jsonl(tmp_path / "a.jsonl", ["a"])
    write_jsonl(tmp_path / "c.jsonl", ["c"])
    before = (tmp_path / "out" / "00000.tokens").stat()
    prepare([f"{tmp_path}/*.jsonl"], tmp_path / "out")
    assert texts_in(tmp_path / "out") == ["b", "a", "c"]
    after = (tmp_path / "out" / "00000.tokens").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    monkeypatch.setattr(prepare_module, "_make_shard", None)  # would fail if anything were made again
    prepare([f"{tmp_path}/*.jsonl"], tmp_path / "out")


def test_files_are_put_together_up_to_a_size(tmp_path, monkeypatch):
    for i in range(10):
        write_jsonl(tmp_path / f"{i}.jsonl", [str(i)])
    monkeypatch.setattr(prepare_module, "SHARD_BYTES", 3 * (tmp_path / "0.jsonl").stat().st_size)
    manifest = prepare([f"{tmp_path}/*.jsonl"], tmp_path / "out")
    assert [len(shard.inputs) for shard in manifest.shards] == [3, 3, 3, 1]
    assert texts_in(tmp_path / "out") == [str(i) for i in range(10)]


def test_workers_make_the_same_files_and_name_a_bad_one(tmp_path, bpe_path, monkeypatch):
    for i in range(4):
        write_jsonl(tmp_path / f"{i}.jsonl", [f"document {i} {j}" for j in range(100)])
    whole = (tmp_path / "3.jsonl").read_bytes()
    monkeypatch.setattr(prepare_module, "SHARD_BYTES", len(whole))
    (tmp_path / "3.jsonl").write_bytes(whole[:-3])
    with pytest.raises(ConfigError, match=r"3\.jsonl, line 100, is not JSON"):
        prepare([f"{tmp_path}/*.jsonl"], tmp_path / "two", tokenizer=bpe_path, workers=2)
    (tmp_path / "3.jsonl").write_bytes(whole)
    prepare([f"{tmp_path}/*.jsonl"], tmp_path / "two", tokenizer=bpe_path)
    prepare([f"{tmp_path}/*.jsonl"], tmp_path / "one", tokenizer=bpe_path)
    assert_same_folders(tmp_path / "one", tmp_path / "two")


def test_a_bad_file_may_be_mended_or_taken_away(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "SHARD_BYTES", 1)
    for name in "abcd":
        write_jsonl(tmp_path / f"{name}.jsonl", [name])
    for bad in "bc":
        (tmp_path / f"{bad}.jsonl").write_text("{")
    for bad in "bc":
        with pytest.raises(ConfigError, match=rf"{bad}\.jsonl, line 1, is not JSON"):
            prepare([f"{tmp_path}/*.jsonl"], tmp_path / "out")
        if bad == "b":
            write_jsonl(tmp_path / "b.jsonl", ["B"])
        else:
            (tmp_path / "c.jsonl").unlink()
    prepare([f"{tmp_path}/*.jsonl"], tmp_path / "out")
    assert texts_in(tmp_path / "out") == ["a", "B", "d"]
    write_jsonl(tmp_path / "c.jsonl", ["c"])
    prepare([f"{tmp_path}/*.jsonl"], tmp_path / "out")
    assert texts_in(tmp_path / "out") == ["a", "B", "d", "c"]


def assert_same_folders(a, b):
    files = sorted(path.name for path in a.iterdir())
    assert files == sorted(path.name for path in b.iterdir()) and not any("partial" in name for name in files)
    for name in files:
        assert (a / name).read_bytes() == (b / name).read_bytes()


SLOW = """
import sys, time
from gla_jax.data import prepare, token_file
prepare.SHARD_BYTES = 1
add = token_file.TokenWriter.add
def slow_add(*arguments):
    time.sleep(0.02)
    add(*arguments)
token_file.TokenWriter.add = slow_add
sys.exit(prepare.main(sys.argv[1:]))
"""


def test_a_killed_run_goes_on_to_the_same_end(tmp_path, monkeypatch):
    for i in range(6):
        write_jsonl(tmp_path / f"{i}.jsonl", [f"document {i} {j}" for j in range(30)])
    flags = [f"--input={tmp_path}/*.jsonl", f"--output={tmp_path}/killed"]
    for finished in (1, 3):
        process = subprocess.Popen([sys.executable, "-c", SLOW, *flags])
        while sum(shard.counts is not None for shard in _shards(tmp_path / "killed")) < finished or not list(
            (tmp_path / "killed").glob("*.partial")
        ):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert any("partial" in path.name for path in (tmp_path / "killed").iterdir())
        with pytest.raises(ConfigError, match=r"killed is unfinished, \d of 6 token files are still to be made"):
            open_dataset(DataConfig(path=f"{tmp_path}/killed"), seed=0)
    # A token file that was complete when the kill came, and is not in the manifest, is made again.
    (tmp_path / "killed" / "00005.tokens").write_bytes(b"damaged")
    monkeypatch.setattr(prepare_module, "SHARD_BYTES", 1)
    assert main(flags) == 0
    prepare([f"{tmp_path}/*.jsonl"], tmp_path / "whole")
    assert_same_folders(tmp_path / "whole", tmp_path / "killed")


def _shards(folder):
    return load_manifest(folder).shards if (folder / "manifest.json").exists() else []


def test_two_runs_do_not_share_a_folder(tmp_path):
    write_jsonl(tmp_path / "a.jsonl")
    with prepare_module._locked(tmp_path), pytest.raises(ConfigError, match="is being written by another run"):
        prepare([f"{tmp_path}/a.jsonl"], tmp_path)


def test_another_setting_or_input_is_refused(tmp_path, bpe_path):
    write_jsonl(tmp_path / "a.jsonl")
    inputs, out = [f"{tmp_path}/a.jsonl"], tmp_path / "out"
    prepare(inputs, out)
    with pytest.raises(ConfigError, match=r"made with tokenizer bytes \(\w{8}\), not tokenizer.json \(\w{8}\)"):
        prepare(inputs, out, tokenizer=bpe_path)
    with pytest.raises(ConfigError, match="was made with --text_field=text, not content; choose another --output"):
        prepare(inputs, out, text_field="content")
    with pytest.raises(ConfigError, match="was made with --separator=None, not ---"):
        prepare(inputs, out, separator="---")
    write_jsonl(tmp_path / "a.jsonl", ["changed"])
    with pytest.raises(ConfigError, match=r"a\.jsonl has changed since"):
        prepare(inputs, out)
    assert texts_in(out) == [text for text in DOCUMENTS if text]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds thesis\.tex and no manifest\.json; choose an empty --output"):
        prepare(inputs, tmp_path / "other")


def test_another_size_of_trained_tokeniser_is_refused(tmp_path):
    write_jsonl(tmp_path / "a.jsonl")
    prepare([f"{tmp_path}/a.jsonl"], tmp_path / "out", train_size=260)
    prepare([f"{tmp_path}/a.jsonl"], tmp_path / "out", train_size=260)
    with pytest.raises(ConfigError, match="was made with --train_tokenizer=260, not 270"):
        prepare([f"{tmp_path}/a.jsonl"], tmp_path / "out", train_size=270)
    with pytest.raises(ConfigError, match="exclude each other"):
        prepare([f"{tmp_path}/a.jsonl"], tmp_path / "out", train_size=260, tokenizer="x.json")


def test_files_of_a_folder_that_are_not_what_was_made(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["text " * 100])
    out = tmp_path / "out"
    prepare([f"{tmp_path}/a.jsonl"], out)
    shard, manifest = out / "00000.tokens", out / "manifest.json"
    whole = shard.read_bytes()
    for damage, sentence in (
        (lambda: shard.write_bytes(whole[:-1]), r"00000\.tokens has \d+ bytes and its header says"),
        (shard.unlink, r"00000\.tokens cannot be read: No such file"),
        (lambda: write_other(shard), r"00000\.tokens is not the file that .*manifest\.json lists"),
        (lambda: manifest.write_text("{"), r"manifest\.json is damaged"),
        (lambda: manifest.write_text('{"format": "other"}'), r"manifest\.json is damaged or of another version"),
    ):
        damage()
        with pytest.raises(ConfigError, match=sentence):
            open_dataset(DataConfig(path=str(out)), seed=0)


def write_other(path):
    with TokenWriter(path, load_tokenizer("bytes")) as writer:
        writer.add(np.array([1, 2, 3]), 3)


def text_of(content):
    return lambda path: path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "write", "sentence"),
    [
        ("a.jsonl", text_of(b'{"text": "a"}\n\n{"text": "b'), r"a\.jsonl, line 3, is not JSON"),
        ("a.jsonl", text_of(b'{"content": "a"}'), r"a\.jsonl, line 1, has no field 'text' but content; name one with"),
        ("a.jsonl", text_of(b"[1]"), r"a\.jsonl, line 1, has no field 'text' but a list"),
        ("a.jsonl", text_of(b'{"text": 5}'), r"a\.jsonl, line 1: the text is a int, not a string"),
        ("a.jsonl", text_of(b'{"text": "\xff"}'), r"a\.jsonl, line 1, is not UTF-8"),
        ("a.jsonl.gz", text_of(b'{"text": "a"}'), r"a\.jsonl\.gz is no gzip file"),
        ("a.jsonl.gz", text_of(gzip.compress(b'{"text": "a"}')[:-9]), r"a\.jsonl\.gz is no gzip file, or only a part"),
        ("a.txt", text_of(b"caf\xe9 noir"), r"a\.txt is not UTF-8 \(it has a byte 0xe9"),
        ("a.txt", text_of(b""), r"a\.txt holds no text"),
        ("a.parquet", text_of(b"PAR1 no more"), r"a\.parquet is no Parquet file that can be read"),
        (
            "a.parquet",
            lambda path: write_parquet(path, field="content"),
            r"a\.parquet has no column 'text' but id, con",
        ),
        ("a.parquet", lambda path: write_parquet(path, [1, 2]), r"a\.parquet, row 1: the text is a int"),
        ("a.csv", text_of(b"a,b"), r"a\.csv is none of \.txt, \.jsonl, \.jsonl\.gz, \.parquet"),
        ("b.txt", text_of(b"a"), r"there is no file .*a\.txt"),
    ],
)
def test_a_bad_input_is_named_in_one_sentence(tmp_path, name, write, sentence, capsys):
    write(tmp_path / name)
    given = tmp_path / ("a.txt" if name == "b.txt" else name)
    assert main([f"--input={given}", f"--output={tmp_path}/out"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    with pytest.raises(ConfigError, match=sentence):
        prepare([str(given)], tmp_path / "out2")
    assert not list(tmp_path.glob("out*/*.partial"))
    with pytest.raises(ConfigError):
        open_dataset(DataConfig(path=f"{tmp_path}/out"), seed=0)


def test_half_a_character_in_json_is_replaced(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800b"}\n{"text": null}\n')
    prepare([f"{tmp_path}/a.jsonl"], tmp_path / "out")
    assert texts_in(tmp_path / "out") == ["a?b"]


def test_a_full_disk_leaves_nothing_half_done(tmp_path, monkeypatch, capsys):
    write_jsonl(tmp_path / "a.jsonl")
    append = TokenWriter._append

    def fail(self, ids):
        if self.documents:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._partial))
        append(self, ids)

    monkeypatch.setattr(TokenWriter, "_append", fail)
    flags = [f"--input={tmp_path}/a.jsonl", f"--output={tmp_path}/out"]
    assert main(flags) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".lock", "manifest.json"]
    monkeypatch.undo()
    assert main(flags) == 0
    assert texts_in(tmp_path / "out") == [text for text in DOCUMENTS if text]


def test_no_match_and_a_missing_library(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"--input=.*\*\.txt matches no file"):
        prepare([f"{tmp_path}/*.txt"], tmp_path / "out")
    with pytest.raises(ConfigError, match="--workers=0 must be at least 1"):
        prepare([f"{tmp_path}/*.txt"], tmp_path / "out", workers=0)
    write_parquet(tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"pip install 'gla-jax\[parquet\]'"):
        prepare([f"{tmp_path}/a.parquet"], tmp_path / "out")


def test_a_log_gets_plain_lines(tmp_path, monkeypatch, capsys):
    write_jsonl(tmp_path / "a.jsonl")
    clock = iter(range(0, 10**6, 11))
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    prepare([f"{tmp_path}/a.jsonl"], tmp_path / "out")
    error = capsys.readouterr().err
    assert error.startswith("100% of 0 MB read, ") and "\x1b" not in error
