"""Loss by position, against one forward pass over the whole row."""

import jax
import numpy as np
import pytest

from gla_jax.config import build
from gla_jax.evaluation import evaluate_by_position
from gla_jax.evaluation.by_position import position_table
from gla_jax.models import abstract_model, bind, init_params
from gla_jax.parallel.mesh import make_mesh

LENGTH, TRAINED, VOCABULARY = 200, 16, 24


def make_model(mixer, options):
    model = {
        "mixer": mixer, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 16,
        "vocab_size": VOCABULARY, "initializer_range": 0.4, "mixers": options,
    }  # fmt: skip
    config = build({"model": model, "dtype": {"compute": "float32"}})
    graphdef, _ = abstract_model(config.model, config.dtype)
    return bind(graphdef, init_params(config.model, config.dtype, jax.random.key(3)))


@pytest.mark.parametrize(
    ("mixer", "options"),
    [
        ("attention", {"attention": {"cache_length": TRAINED}}),
        (("gla", "attention"), {"attention": {"window": 24}}),
    ],
    ids=["attention", "hybrid"],
)
def test_segments_equal_one_forward_pass(mixer, options):
    random = np.random.default_rng(0)
    rows = [random.integers(0, VOCABULARY, LENGTH + 1).astype(np.int32) for _ in range(3)]
    edges = [*range(0, LENGTH, 48), LENGTH]
    with jax.set_mesh(make_mesh(build({}).mesh, jax.devices()[:1])):
        model = make_model(mixer, options)
        whole, _ = jax.jit(lambda ids: model(ids))(np.stack(rows)[:, :-1])
        found = evaluate_by_position(model, rows, bucket=48, batch_size=2, segment=32)
    logits = np.asarray(whole, np.float64)
    log_probability = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nll = -np.take_along_axis(log_probability, np.stack(rows)[:, 1:, None], -1)[..., 0]
    assert [(one["from"], one["to"]) for one in found] == [(0, 48), (48, 96), (96, 144), (144, 192), (192, 200)]
    for one, first, last in zip(found, edges[:-1], edges[1:], strict=True):
        by_row = nll[:, first:last].mean(axis=1)
        assert one["loss"] == pytest.approx(by_row.mean(), rel=1e-5)
        assert one["perplexity"] == pytest.approx(np.exp(by_row.mean()), rel=1e-4)
        assert one["standard_error"] == pytest.approx(by_row.std(ddof=1) / 3**0.5, rel=1e-3)
        assert one["rows"] == 3
    table = position_table(found).splitlines()
    assert len(table) == 6 and table[5].split()[0] == "192-199"
