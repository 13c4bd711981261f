"""The config of the recall experiment, from its first steps to a task that is learnt."""

import json
import math

import jax
import pytest

from gla_jax.config import ConfigError, load
from gla_jax.training import train

TINY = {
    "model.hidden_size": "32", "data.batch_size": "16", "eval.every": "3", "eval.batches": "2", "log.every": "1",
    "mesh.fsdp": "1", "dtype.compute": "float32",
}  # fmt: skip


def test_first_steps(tmp_path):
    config = load("configs/mqar.py:64", TINY | {"steps": "3"})
    assert (config.data.sequence_length, config.data.pairs) == (64, 4)
    outcome = train(config, str(tmp_path), devices=jax.devices()[:1])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    # Chance over the vocabulary, to begin with; over all positions, were they counted, it would be a guess of 0.
    assert [line["loss"] for line in lines[:3]] == [pytest.approx(math.log(8192), rel=0.02)] * 3
    assert lines[3]["eval/loss"] == outcome.evaluation["eval/loss"] == pytest.approx(math.log(8192), rel=0.02)
    assert 0 <= lines[3]["eval/accuracy"] < 0.05


def test_lengths_are_those_of_the_figure():
    for length, pairs, batch_size, steps in ((256, 16, 256, 64 * 391), (512, 64, 128, 64 * 782)):
        config = load(f"configs/mqar.py:{length}")
        found = (config.data.sequence_length, config.data.pairs, config.data.batch_size, config.steps)
        assert found == (length, pairs, batch_size, steps)
    with pytest.raises(ConfigError, match=r"configs/mqar.py:100 must end in one of 64, 128, 256, 512\."):
        load("configs/mqar.py:100")


@pytest.mark.long
@pytest.mark.parametrize(
    ("mixer", "hidden_size", "learning_rate", "steps"),
    [("gla", "32", "1e-2", "1000"), ("attention", "64", "2e-3", "600")],
)
def test_recall_is_learnt(tmp_path, mixer, hidden_size, learning_rate, steps):
    task = {"model.vocab_size": "32", "data.sequence_length": "16", "data.pairs": "2", "data.batch_size": "64"}
    model = {"model.mixer": mixer, "model.hidden_size": hidden_size, "optimizer.learning_rate": learning_rate}
    config = load("configs/mqar.py:64", TINY | task | model | {"steps": steps, "eval.every": steps})
    assert train(config, str(tmp_path), devices=jax.devices()[:1]).evaluation["eval/accuracy"] > 0.95
