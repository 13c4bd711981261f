import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gla_jax.config import DtypeConfig, MeshConfig, ModelConfig, load
from gla_jax.models import abstract_model, bind, decay_mask, init_params, parameter_table
from gla_jax.models.parameters import initialiser
from gla_jax.parallel.mesh import make_mesh

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
SMALL = ModelConfig(vocab_size=24, hidden_size=16, num_layers=2, num_heads=4, intermediate_size=32)
CONVOLUTION = dataclasses.replace(
    SMALL, tie_embeddings=False, mixers={"gla": {"use_short_conv": True, "conv_bias": True}}
)


@pytest.mark.parametrize(
    ("name", "count", "macs"), [("gla_340m", 341_707_776, 347_930_624), ("gla_1p3b", 1_365_514_240, 1_325_006_848)]
)
def test_the_papers_models_have_the_papers_size(name, count, macs):
    config = load(str(CONFIGS / f"{name}.py"))
    graphdef, params = abstract_model(config.model, config.dtype)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params))
    model = bind(graphdef, params)
    assert model.parameter_count == count
    assert sum(row.count for row in parameter_table(params)) == count
    assert model.flops_per_token(2048) == model.flops_per_token(16) == 2 * macs
    # counted by hand: the paper's 4 d^2 + gate, 3 d * ffn, and the norms of a layer
    d, ffn, rank, heads = config.model.hidden_size, 2816 if name == "gla_340m" else 5632, 16, 4
    layer = 4 * d * d + d * rank + rank * d // 2 + d // 2 + d // heads + 3 * d * ffn + 2 * d
    tables = 1 if config.model.tie_embeddings else 2
    assert count == 24 * layer + d + tables * 32_000 * d
    recurrence = 2 * heads * (d // 2 // heads) * (d // heads)
    assert macs == 24 * (layer - d // 2 - d // heads - 2 * d + recurrence) + 32_000 * d
    tokens = config.data.batch_size * config.data.sequence_length
    paper = {"gla_340m": (15e9, 0.5e6, 0.5e9), "gla_1p3b": (100e9, 2e6, 1e9)}[name]
    measured = (config.steps * tokens, tokens, config.optimizer.warmup_steps * tokens)
    np.testing.assert_allclose(measured, paper, rtol=0.05)


def test_description_is_what_is_made():
    def check(made, described):
        assert (made.shape, made.dtype) == (described.shape, described.dtype)

    dtype = DtypeConfig(params="bfloat16")
    _, abstract = abstract_model(CONVOLUTION, dtype)
    params = init_params(CONVOLUTION, dtype, jax.random.key(0))
    jax.tree.map(check, params, abstract)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}


def test_beginnings_are_what_the_config_says():
    config = dataclasses.replace(SMALL, hidden_size=64, initializer_range=0.05)
    init = initialiser(config, DtypeConfig())
    first, second, other = (init(jax.random.key(seed)) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, second)
    assert not np.allclose(first["embed"]["embedding"], other["embed"]["embedding"])
    for name, leaf in (("embedding", first["embed"]["embedding"]), ("up", first["layers"]["mlp"]["up"]["kernel"])):
        assert abs(np.std(leaf) - 0.05) < 0.002, name
    query = first["layers"]["mixer"]["query"]["kernel"]
    assert abs(np.corrcoef(query[0].ravel(), query[1].ravel())[0, 1]) < 0.1, "layers begin differently"


def test_only_matrices_decay():
    _, abstract = abstract_model(CONVOLUTION, DtypeConfig())
    rows = {row.path: row for row in parameter_table(abstract)}
    matrices = {f"layers/mixer/{name}/kernel" for name in ("query", "key", "value", "output", "output_gate")}
    matrices |= {f"layers/mixer/{name}/kernel" for name in ("forget_gate_down", "forget_gate_up")}
    matrices |= {f"layers/mlp/{name}/kernel" for name in ("gate", "up", "down")} | {"head/kernel"}
    assert {path for path, row in rows.items() if row.decayed} == matrices
    taps = {
        f"layers/mixer/convolutions/{name}/{kind}" for name in ("query", "key", "value") for kind in ("taps", "bias")
    }
    norms = {"norm/scale", "layers/mixer_norm/scale", "layers/mlp_norm/scale", "layers/mixer/output_norm/scale"}
    assert rows.keys() - matrices == taps | norms | {"embed/embedding", "layers/mixer/forget_gate_up/bias"}
    assert jax.tree.structure(decay_mask(abstract)) == jax.tree.structure(abstract)
    assert rows["layers/mixer/query/kernel"].shape == (2, 16, 8)
    assert all(row.decayed for row in parameter_table(abstract, "all"))


def test_each_device_makes_its_own_part():
    config = dataclasses.replace(SMALL, hidden_size=256, num_layers=4)
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=4, tensor=2))):
        _, abstract = abstract_model(config, DtypeConfig())
        rows = {row.path: row.spec for row in parameter_table(abstract)}
        assert rows["layers/mixer/query/kernel"] == "(None, 'fsdp', 'tensor')"
        assert rows["layers/mixer/output/kernel"] == "(None, 'tensor', 'fsdp')"
        init = initialiser(config, DtypeConfig()).lower(jax.random.key(0)).compile()
        params = init(jax.random.key(0))
        assert all(
            leaf.sharding == wanted.sharding
            for leaf, wanted in zip(jax.tree.leaves(params), jax.tree.leaves(abstract), strict=True)
        )
        whole = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
        part = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(params))
        assert part < 1.1 * whole / 8
        sharded = jax.device_get(params)
        memory = init.memory_analysis()
        assert memory.output_size_in_bytes < 1.1 * whole / 8
        assert memory.temp_size_in_bytes < whole / 4
    jax.tree.map(np.testing.assert_array_equal, sharded, init_params(config, DtypeConfig(), jax.random.key(0)))


def test_binding_works_under_transformations():
    graphdef, abstract = abstract_model(SMALL, DtypeConfig(compute="float32"))
    params = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.1, leaf.dtype), abstract)
    head = lambda params: bind(graphdef, params).head_matrix()
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), params)
    np.testing.assert_array_equal(jax.jit(jax.vmap(head))(stacked)[1], 2 * head(params))
