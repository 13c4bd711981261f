"""Runs kept in a bucket, whose server here is one that gcsfs, TensorStore and Orbax talk to as they do to the real."""

import importlib.util
import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest
from bucket_server import BucketServer
from tiny_config import get_config

from gla_jax import load_model, storage
from gla_jax.config import ConfigError, build, override
from gla_jax.loading import describe_files
from gla_jax.storage import GrowingFile, open_path
from gla_jax.training import loop
from gla_jax.training.display import LineDisplay

STEPS, CHECKPOINT = 8, 3


@pytest.fixture(scope="module")
def bucket():
    """Return the address of an empty bucket."""
    pytest.importorskip("gcsfs")
    server = BucketServer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", server.url)
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", server.url)
        patch.setenv("GOOGLE_CLOUD_PROJECT", "project")
        patch.setenv("GCE_METADATA_HOST", "localhost:1")  # nobody looks for credentials
        patch.setenv("GCE_METADATA_ROOT", "localhost:1")
        yield "gs://bucket"
    server.shutdown()


@pytest.fixture(autouse=True, scope="module")
def _quick_compilation(tmp_path_factory):
    settings = {"jax_disable_most_optimizations": True, "jax_persistent_cache_min_compile_time_secs": 0.1,
                "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled"))}  # fmt: skip
    before = {name: getattr(jax.config, name, False) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def train(workdir, **overrides):
    settings = get_config()
    fields = {"steps": STEPS, "checkpoint.every": CHECKPOINT, "eval.every": 4, "log.every": 1}
    for name, value in (fields | overrides).items():
        override(settings, name, str(value))
    return loop.train(build(settings), str(workdir), devices=jax.devices()[:1])


@pytest.mark.long
def test_a_run_in_a_bucket_is_the_run_on_a_disk(bucket, tmp_path, monkeypatch, capsys):
    train(tmp_path, **{"sample.tokens": 2})
    run = f"{bucket}/runs/one"

    def fail(self, step, loss):
        if step == 7:
            raise RuntimeError("killed")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(LineDisplay, "advance", fail)
        train(run, **{"sample.tokens": 2})
    # What a process leaves behind that was killed while it wrote, and a checkpoint that lost something.
    (open_path(run) / "checkpoints" / "00000007" / "params").mkdir(parents=True)
    (open_path(run) / "checkpoints" / "00000007" / "params" / "manifest.ocdbt").write_bytes(b"half")
    capsys.readouterr()
    outcome = train(run, **{"sample.tokens": 2})
    assert f"Resuming {run} at step 6 of {STEPS}" in capsys.readouterr().out
    assert outcome.step == STEPS
    for name in ("metrics.jsonl", "samples.txt"):
        assert (open_path(run) / name).read_text() == (tmp_path / name).read_text()
    assert json.loads((open_path(run) / "config.json").read_text())["steps"] == STEPS

    ours, theirs = load_model(run), load_model(tmp_path)
    ids = np.arange(12, dtype=np.int32)[None]
    np.testing.assert_array_equal(ours(ids)[0], theirs(ids)[0])
    assert [name for name, *_ in describe_files(run)][-1] == "config.json" and len(describe_files(run)) > 1


@pytest.mark.long
def test_a_damaged_checkpoint_is_set_aside(bucket, capsys):
    run = f"{bucket}/runs/two"
    train(run)
    newest = open_path(run) / "checkpoints" / f"{STEPS:08}"
    (newest / "params").rmtree()
    train(run, steps=STEPS + 1)
    said = capsys.readouterr().out
    assert f"Checkpoint {STEPS} cannot be read" in said and f"Resuming {run} at step 6" in said
    assert {path.name for path in newest.parent.glob("*")} >= {f"unreadable-{STEPS:08}.0", f"{STEPS + 1:08}"}


@pytest.mark.long
def test_starting_from_a_run_in_a_bucket(bucket, tmp_path, capsys):
    train(f"{bucket}/runs/three", steps=1)
    train(tmp_path, steps=2, init_from=f"{bucket}/runs/three")
    assert f"Starting with the parameters of {bucket}/runs/three at step 1." in capsys.readouterr().out


def test_a_bucket_that_cannot_be_written_is_refused_in_a_sentence(bucket):
    with pytest.raises(ConfigError, match=r"--workdir=gs://elsewhere/run cannot be written: \w+"):
        train("gs://elsewhere/run")


def test_lines_reach_a_bucket_in_time(bucket, monkeypatch):
    path = open_path(f"{bucket}/lines.txt")
    path.write_text("before\n")
    now = [100.0]
    monkeypatch.setattr(storage.time, "monotonic", lambda: now[0])
    file = GrowingFile(path)
    file.write("one\n")
    assert path.read_text() == "before\n"
    now[0] += 31
    file.write("two\n")
    assert path.read_text() == "before\none\ntwo\n"
    file.write("three\n")
    file.flush()
    assert path.read_text().endswith("three\n")
    file.write("four\n")
    file.close()
    assert path.read_text().endswith("four\n")


def test_lines_are_on_a_disk_at_once(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("before\n")
    file = GrowingFile(path)
    file.write("one\n")
    assert path.read_text() == "before\none\n"
    file.close()


def test_addresses_that_cannot_work_are_refused_in_a_sentence(monkeypatch):
    with pytest.raises(
        ConfigError, match="s3://bucket/run is no address that runs can be kept at; give a folder, or gs:"
    ):
        open_path("s3://bucket/run")
    with monkeypatch.context() as patch, pytest.raises(ConfigError, match=r"pip install 'gla-jax\[gcs\]'"):
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        open_path("gs://bucket/run")
    assert open_path("runs/one") == Path("runs/one") and open_path(Path(os.sep)) == Path(os.sep)
