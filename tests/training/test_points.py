"""The sweep: its points, its file, and what it says of mistakes."""

import json
import subprocess
import sys

import pytest
from tiny_config import get_config

from gla_jax.config import ConfigError, build, flat, load
from gla_jax.training.points import (
    learning_rates,
    make_points,
    read_points,
    read_seeds,
    shared_settings,
    train_point,
)

TINY = {
    "model.mixer": "attention", "model.hidden_size": "16", "model.vocab_size": "32", "data.sequence_length": "16",
    "data.pairs": "2", "data.batch_size": "8", "steps": "4", "eval.every": "2", "eval.batches": "1",
    "dtype.compute": "float32",
}  # fmt: skip


def test_points_are_all_combinations():
    points = make_points(["model.mixer=gla,mamba", "model.hidden_size, model.num_heads =\n 64:1, 128:2"])
    assert points == [
        {"model.mixer": mixer, "model.hidden_size": size, "model.num_heads": heads}
        for mixer in ("gla", "mamba")
        for size, heads in (("64", "1"), ("128", "2"))
    ]
    assert make_points([]) == [{}]


@pytest.mark.parametrize(
    ("axes", "sentence"),
    [
        (["seed"], r"--over=seed must be FIELD=VALUE"),
        (["seed=1,,2"], r"--over=seed=1,,2 must be"),
        (["seed,steps=1:2,3"], r"as many values as fields"),
        (["seed=1", "steps,seed=1:2"], r"--over names seed twice"),
    ],
)
def test_axes_that_are_written_wrongly(axes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        make_points(axes)


def test_learning_rates_are_checked():
    config = build(get_config())
    assert learning_rates([], config) == [config.optimizer.learning_rate]
    for text, sentence in (("fast", "'fast' must be a number above 0"), ("1e-4", "final_learning_rate=0.001")):
        with pytest.raises(ConfigError, match=sentence):
            learning_rates(["0.1", text], config)


def test_seeds_are_checked():
    assert read_seeds(["3", "0"]) == [3, 0] and read_seeds(None) is None
    for texts, sentence in ((["0", "-1"], "'-1' must be a whole number"), (["1", "01"], "--seeds=1,01 has one twice")):
        with pytest.raises(ConfigError, match=sentence):
            read_seeds(texts)


def test_a_file_is_gone_on_with_if_it_is_of_the_same_sweep(tmp_path):
    configs = [build(get_config())]
    settings = shared_settings(configs, {"seed"}, [0.1], None)
    assert "seed" not in settings and settings["learning_rates"] == [0.1]
    path = tmp_path / "points.jsonl"
    assert read_points(path, settings) == set()
    line = json.dumps({"point": {"seed": 3}, "settings": settings}) + "\n"
    path.write_text(line + '{"point": {"se')
    assert read_points(path, settings) == {'{"seed": 3}'}
    assert path.read_text() == line, "what a killed run left half written is cut off"
    with pytest.raises(ConfigError, match=r"points\.jsonl holds points with solved=None, which is 0\.9 now"):
        read_points(path, settings | {"solved": 0.9})
    path.write_text("{}\n")
    with pytest.raises(ConfigError, match=r"no file of a sweep: see its line 1"):
        read_points(path, settings)


def test_a_point_ends_when_it_is_solved():
    config = load("configs/mqar.py:64", TINY)
    assert flat(config)["data.pairs"] == 2
    line = train_point(config, [1e-3, 1e-2], 0.0)
    assert line["solved"] and line["steps"] == 2 and len(line["evaluations"]) == 1
    assert len(line["evaluations"][0]["eval/accuracy"]) == 2


@pytest.mark.long
def test_the_command_resumes(tmp_path):
    output = tmp_path / "new" / "points.jsonl"
    command = [sys.executable, "-m", "gla_jax.sweep", "--config=configs/mqar.py:64", f"--output={output}"]
    command += [f"--config.{name}={value}" for name, value in TINY.items()] + ["--learning_rates=1e-3,1e-2"]

    def sweep(*axes):
        done = subprocess.run([*command, *axes], capture_output=True, text=True, timeout=300)
        return done.returncode, done.stderr, output.read_text().splitlines()

    code, _, lines = sweep("--over=seed=1")
    assert code == 0 and [json.loads(line)["point"] for line in lines] == [{"seed": 1}]
    code, said, more = sweep("--over=seed=1,2")
    assert code == 0 and "1 of 2: seed=1: done before" in said
    assert more[0] == lines[0] and json.loads(more[1])["point"] == {"seed": 2}
    code, said, _ = sweep("--over=seed=1", "--config.seed=3")
    assert code == 2 and said.strip() == "--config.seed=3 is set by --over as well; leave one of them out."
