"""Every benchmark of models runs at a tiny size, says what it measured, and can be drawn."""

import json

import jax
import pytest

from benchmarks import decode, layers, loss_agreement, plot, table, training
from benchmarks.kernel_times import part_of, read_op_names

TINY = ["--set=model.hidden_size=16", "--set=model.num_layers=2", "--set=model.num_heads=2"]
MODEL = [*TINY, "--set=model.vocab_size=32", "--set=mesh.fsdp=1"]


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: devices)
    monkeypatch.setattr(jax, "device_count", lambda: 1)


def run(benchmark, folder, *arguments):
    file, picture = folder / "report.json", folder / "report.png"
    benchmark.main([*arguments, f"--output={file}"])
    plot.main([str(file), str(picture)])
    assert picture.stat().st_size > 5_000
    table.main([str(file)])
    return json.loads(file.read_text())["rows"]


def test_training(tmp_path):
    (row,) = run(training, tmp_path, "--models=gla_340m", "--shapes=2x32", "--documents=2", "--steps=3", *MODEL)
    assert row["losses"][-1] < row["losses"][0]
    rates = row["tokens_per_second"]
    assert rates["least"] <= rates["median"] <= rates["most"]
    assert abs(rates["median"] * row["step_ms"] / 1e3 - 64) < 1


@pytest.mark.long
def test_layers(tmp_path):
    rows = run(layers, tmp_path, "--lengths=16,32", "--tokens=32", "--runs=2", *TINY)
    assert len(rows) == 10 and all(row[name]["ms"] > 0 for row in rows for name in ("forward", "forward_backward"))


@pytest.mark.long
def test_decode(tmp_path):
    settings = [*MODEL, "--set=model.mixers.attention.cache_length=1"]
    arguments = ["--contexts=8,64", "--batch-sizes=2", "--tokens=4", "--runs=2", *settings]
    rows = run(decode, tmp_path, *arguments)
    gla, longer_gla, attention, longer_attention = (row["state_GiB"] for row in rows)
    assert gla == longer_gla
    assert attention < longer_attention


@pytest.mark.long
def test_loss_agreement(tmp_path):
    file = tmp_path / "report.json"
    sizes = ["--set=model.num_layers=1", "--set=data.sequence_length=32", "--set=model.hidden_size=128"]
    forms = "--forms=bfloat16;float8 products"
    loss_agreement.main([forms, "--seeds=2", "--set=steps=20", *sizes, f"--output={file}"])
    reference, *others = json.loads(file.read_text())["forms"]
    assert reference["farthest"] == 0 < reference["seed_noise"]
    assert len(reference["losses"]) == 2 and len(reference["losses"][0]) == 20
    assert [form["form"] for form in others] == ["bfloat16", "float8 products"]
    assert all(0 < form["farthest"] < 0.02 for form in others)


def test_operations_are_told_apart_by_the_part_of_the_model_and_the_direction():
    def f(x):
        with jax.named_scope("mlp"):
            return (x @ x).sum()

    text = jax.jit(jax.grad(f)).lower(jax.numpy.ones((8, 8))).compile().as_text()
    parts = {part_of(name, "") for name in read_op_names(text).values()}
    assert "mlp backward" in parts
    assert part_of("jit(train_step)/jvp(embed)/gather", "") == "embed"
    assert part_of("", "MemcpyD2D") == "copies"
