"""The models that the paper compares have the sizes that it names, counted without allocating them."""

from pathlib import Path

import jax
import pytest

from gla_jax.config import load
from gla_jax.models import abstract_model

CONFIGS = Path(__file__).parents[2] / "configs"


def transformer(d, ffn, embeddings):
    return 24 * (4 * d * d + 3 * ffn * d + 2 * d) + d + embeddings * 32_000 * d


def retnet(d, ffn, embeddings, heads):
    return 24 * (8 * d * d + 2 * d // heads + 3 * ffn * d + 2 * d) + d + embeddings * 32_000 * d


def mamba(d):
    e, n, r = 2 * d, 16, d // 16
    return 48 * (3 * d * e + (2 * r + 2 * n) * e + (n + 4 + 3) * e + d) + d + 32_000 * d


@pytest.mark.parametrize(
    ("name", "count", "millions"),
    [
        ("transformer_340m", transformer(1024, 2816, 1), 341.1),
        ("transformer_1p3b", transformer(2048, 5632, 2), 1364.3),
        ("retnet_340m", retnet(1024, 1536, 1, heads=4), 347.4),
        ("retnet_1p3b", retnet(2048, 2816, 2, heads=8), 1351.7),
        ("mamba_340m", mamba(1024), 352.8),
        ("mamba_1p3b", mamba(2048), 1334.7),
    ],
)
def test_parameter_counts(name, count, millions):
    path = CONFIGS / f"{name}.py"
    config = load(str(path))
    _, params = abstract_model(config.model, config.dtype)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count
    assert round(count / 1e6, 1) == millions and f"{millions}M parameters" in path.read_text()
    tokens = config.steps * config.data.batch_size * config.data.sequence_length
    assert abs(tokens / (15e9 if name.endswith("340m") else 100e9) - 1) < 1e-3
