"""The config of the gate ablation: its variants differ in the gate, and train."""

import math

import jax
import pytest

from gla_jax.config import load
from gla_jax.models import abstract_model
from gla_jax.training.points import make_points, train_point

AXIS = (
    "model.mixer, model.mixers.linear_attention.gate, model.num_heads ="
    "linear_attention:none:4, retention:none:4, linear_attention:scalar:4, gla:none:4, gla:none:1, gla:none:8"
)
POINTS = make_points([AXIS])
TINY = {
    "model.hidden_size": "16", "model.num_layers": "1", "model.vocab_size": "256", "data.corpus": "kjv",
    "data.sequence_length": "32", "data.batch_size": "4", "optimizer.warmup_steps": "2", "steps": "8",
    "eval.every": "8", "eval.batches": "1", "dtype.compute": "float32",
}  # fmt: skip


def size(config):
    _, params = abstract_model(config.model, config.dtype)
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def test_variants_are_of_one_size_but_for_the_gate():
    none, retention, scalar, gla, gla_1, gla_8 = (
        size(load("configs/gates.py", {"model.vocab_size": "256"} | point)) for point in POINTS
    )
    assert none == retention and scalar - none == 4 * (256 + 1) * 4, "256 weights and a bias, 4 heads, 4 layers"
    assert gla - none == 4 * (256 * 16 + 16 * 128 + 128)
    assert [gla - other for other in (gla_1, gla_8)] == [4 * (64 - 256), 4 * (64 - 32)], "norms of V channels"


@pytest.mark.parametrize(
    "point",
    [pytest.param(point, marks=[] if point["model.mixer"] == "gla" else pytest.mark.long) for point in POINTS[:4]],
)
def test_first_steps(point):
    line = train_point(load("configs/gates.py", TINY | point), [1e-2], None)
    (evaluation,) = line["evaluations"]
    assert line["steps"] == evaluation["step"] == 8
    assert evaluation["eval/loss"][0] < evaluation["loss"][0] < math.log(256)
