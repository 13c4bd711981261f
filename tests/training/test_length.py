"""The config of length extrapolation: it trains, with the state handed on, and is read beyond its training length."""

import jax
import pytest

from gla_jax.config import load
from gla_jax.data import open_dataset
from gla_jax.data.pipeline import open_long_rows
from gla_jax.evaluation.by_position import evaluate_by_position
from gla_jax.models import abstract_model, bind
from gla_jax.training.together import make_steps, stack_states

TINY = {
    "model.hidden_size": "16", "model.num_layers": "1", "model.intermediate_size": "16", "model.vocab_size": "256",
    "data.sequence_length": "32", "data.batch_size": "2", "data.segments": "12", "steps": "12",
    "optimizer.warmup_steps": "2", "dtype.compute": "float32",
}  # fmt: skip


@pytest.mark.long
def test_first_steps():
    config = load("configs/length.py", TINY)
    data = open_dataset(config.data, seed=0, vocab_size=256)
    run_steps, _ = make_steps(config)
    batches = data.train_batches()
    rows = [next(batches) for _ in range(config.steps)]
    stacked = {name: jax.numpy.stack([row[name] for row in rows]) for name in rows[0]}
    states, metrics = run_steps(stack_states(config, 1, [0]), jax.numpy.array([1e-2]), stacked)
    assert metrics["loss"][-1, 0] < metrics["loss"][0, 0]

    texts = open_long_rows(config.data, length=12 * 32, stream=False, most=4, vocab_size=256)
    graphdef, _ = abstract_model(config.model, config.dtype)
    model = bind(graphdef, jax.tree.map(lambda x: x[0], states.params))
    buckets = evaluate_by_position(model, texts, bucket=32, batch_size=4, segment=32)
    assert [bucket["to"] for bucket in buckets] == list(range(32, 385, 32))
    assert all(bucket["rows"] == 4 and 2 < bucket["loss"] < 6 for bucket in buckets)
