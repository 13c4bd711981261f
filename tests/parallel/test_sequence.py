"""Rows cut along time over devices: the same numbers as on one device, and little said between them.

The recurrences are held against their definitions in float64, forward and every gradient; language models against one
device, the loss and every gradient, on mixed meshes.
"""

import functools
import itertools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_selective_scan as mamba
from cases import Case
from mixer_cases import VOCABULARY, assert_close, draw, value_and_grad

from gla_jax.config import DtypeConfig, MeshConfig, ModelConfig
from gla_jax.models import abstract_model
from gla_jax.parallel import sequence
from gla_jax.parallel.mesh import make_mesh
from gla_jax.parallel.sharding import per_shard, shard

ROWS, STATES = ("batch", "time", "heads", None), ("batch", "heads", None, None)


def mesh_of(**sizes):
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    return jax.set_mesh(make_mesh(MeshConfig(**({"fsdp": 1} | sizes)), devices))


def pull(function, arguments, cotangents):
    """Return the results and the gradients of everything but segment_ids, in one compilation."""

    def run(differentiable, ids, cotangents):
        results, pull_back = jax.vjp(lambda differentiable: function(**differentiable, **ids), differentiable)
        return results, pull_back(tuple(shard(c, *ROWS[: c.ndim]) for c in cotangents[:1]) + cotangents[1:])[0]

    ids = {name: x for name, x in arguments.items() if name == "segment_ids"}
    rest = {name: x for name, x in arguments.items() if name not in ids}
    return jax.jit(run)(rest, ids, cotangents)


# The recurrences ------------------------------------------------------------------------------------------------------


def check_gla(case, parts):
    arguments, cotangents = cases.inputs(case)
    gate_axes = ()
    if case.gate is not None:
        gate_axes = tuple(n if size > 1 else None for n, size in zip(ROWS, arguments["log_decay"].shape, strict=True))
    local = lambda q, k, v, g, initial, ids: sequence.gated_linear_attention(
        q, k, v, g, initial_state=initial, segment_ids=ids, chunk_size=case.chunk_size
    )

    def whole(query, key, value, log_decay=None, initial_state=None, segment_ids=None):
        run = per_shard(local, (ROWS, ROWS, ROWS, gate_axes, STATES, ROWS[:2]), (ROWS, STATES))
        return run(query, key, value, log_decay, initial_state, segment_ids)

    with mesh_of(sequence=parts):
        state = jnp.zeros((case.batch, case.heads, case.key_dim, case.value_dim))
        given = (cotangents["out"], cotangents.get("final_state", state))
        (out, final), gradients = jax.device_get(pull(whole, arguments, given))
    truth = cases.truth(case)
    got = {"out": out, "final_state": final} | gradients
    assert set(got) == set(truth)
    for_results, for_gradients = cases.TOLERANCES[case.dtype]
    for name, x in got.items():
        error = cases.relative_rms(x, truth[name])
        assert error <= (for_results if name in cases.RESULTS else for_gradients), (name, error, case, parts)


SMALL = functools.partial(Case, time=64, key_dim=8, value_dim=16, chunk_size=8)


@pytest.mark.parametrize(
    ("parts", "case"),
    [
        # Documents end at the border of two parts, just after one, and within one; some parts are of one document.
        (8, SMALL(heads=4, kv_heads=2, gate="mixed", segments=(16, 25, 26, 28, 56))),
        (4, SMALL(gate=None, initial_state=False, final_state_gradient=False)),
        pytest.param(2, SMALL(gate_shape="BThK", heads=4), marks=pytest.mark.long),
        pytest.param(4, SMALL(gate_shape="bthK", segments=(3, 20), heads=4, kv_heads=2), marks=pytest.mark.long),
        pytest.param(8, SMALL(gate="rare resets", gate_shape="btxk", heads=4, kv_heads=2), marks=pytest.mark.long),
        pytest.param(2, SMALL(gate="-inf"), marks=pytest.mark.long),
        pytest.param(4, SMALL(gate=None, segments=(16, 33)), marks=pytest.mark.long),
        pytest.param(8, SMALL(dtype="bfloat16", gate="strong"), marks=pytest.mark.long),
    ],
    ids=str,
)
def test_gla_in_parts_equals_the_definition(parts, case):
    check_gla(case, parts)


@pytest.mark.long
@pytest.mark.parametrize(
    ("parts", "time", "gate"), list(itertools.product((2, 4, 8), (64, 256, 1024, 4096), ("weak", "mixed", "packed")))
)
def test_gla_in_parts_equals_the_definition_at_any_length(parts, time, gate):
    borders = None
    if gate == "packed":
        gate, borders = "rare resets", tuple(sorted(np.random.default_rng(time).choice(time, 9, replace=False) + 1))
    check_gla(SMALL(time=time, gate=gate, segments=borders, chunk_size=None), parts)


@pytest.mark.parametrize(
    ("parts", "time", "borders", "decay"),
    [
        (4, 64, (16, 25, 26, 28), 1.0),
        *(
            pytest.param(parts, time, borders, decay, marks=pytest.mark.long)
            for parts, time, borders, decay in itertools.product((2, 8), (64, 1024), ((), (5, 48)), (1.0, 30.0))
        ),
    ],
)
def test_mamba_in_parts_equals_the_definition(parts, time, borders, decay):
    arguments = mamba.make(time, 2, time, 8, 4, decay=decay)
    ids = np.broadcast_to(np.searchsorted(borders, np.arange(time), side="right"), (2, time)).astype(np.int32)
    random = np.random.default_rng(7)
    cotangents = tuple(random.normal(size=arguments[name].shape).astype(np.float32) for name in ("x", "initial_state"))
    with jax.enable_x64(True):
        exact = {name: jnp.asarray(np.asarray(array, np.float64)) for name, array in arguments.items()}
        wanted = mamba.value_and_gradients(functools.partial(mamba.truth, segment_ids=ids), exact, cotangents)
        wanted = jax.tree.map(np.asarray, wanted)
    rows, all_channels, channels = ("batch", "time", "heads"), ("batch", "time", None), ("heads", None)
    local = lambda *a: sequence.selective_scan(*a[:6], initial_state=a[6], segment_ids=a[7], chunk_size=8)
    axes = (rows, rows, channels, all_channels, all_channels, ("heads",), STATES[:3], rows[:2])

    def whole(x, delta, A, B, C, D, initial_state, segment_ids):
        return per_shard(local, axes, (rows, STATES[:3]))(x, delta, A, B, C, D, initial_state, segment_ids)

    with mesh_of(sequence=parts):
        got = jax.device_get(pull(whole, arguments | {"segment_ids": jnp.asarray(ids)}, cotangents))
    for path, error in jax.tree_util.tree_leaves_with_path(jax.tree.map(mamba.error, got, wanted)):
        assert error < 5e-6, (jax.tree_util.keystr(path), error)


# Language models ------------------------------------------------------------------------------------------------------

T = 16
TOKENS = np.random.default_rng(3).integers(0, VOCABULARY, (8, T)).astype(np.int32)
# Documents of every length, so that some end with a part, some hold several parts and some parts several of them.
BORDERS = [np.asarray([2 + row, 7 + row]) for row in range(8)]
SEGMENT_IDS = np.stack([np.searchsorted(border, np.arange(T), side="right") for border in BORDERS]).astype(np.int32)
STARTS = np.stack([np.asarray([0, *border])[ids] for border, ids in zip(BORDERS, SEGMENT_IDS, strict=True)])
POSITIONS = (np.arange(T) - STARTS).astype(np.int32)
MODELS = {
    "gla": {"mixer": "gla", "mixers": {"gla": {"use_short_conv": True, "num_kv_heads": 2, "chunk_size": 1}}},
    "retention": {"mixer": "retention", "mixers": {"retention": {"use_short_conv": True, "chunk_size": 1}}},
    "attention": {"mixer": "attention", "mixers": {"attention": {"window": 6}}},
    "mamba": {"mixer": "mamba", "mixers": {"mamba": {"conv_size": 3}}},
    "hybrid": {
        "mixer": ["gla", "attention", "mamba"],
        "mixers": {"gla": {"chunk_size": 1}, "mamba": {"chunk_size": 1}},
    },
}
MESHES = {
    "fsdp-sequence-tensor": {"fsdp": 2, "sequence": 2, "tensor": 2},
    "data-sequence": {"data": 2, "sequence": 4},
    "data-fsdp-sequence": {"data": 2, "fsdp": 2, "sequence": 2},
    "data-tensor-sequence": {"data": 2, "tensor": 2, "sequence": 2},
}


@pytest.mark.long
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("model", MODELS)
def test_a_mixed_mesh_equals_one_device(model, mesh):
    """The loss and every gradient, of packed rows; one mesh for each mixer is among the mixers' own cases."""
    settings = MODELS[model]
    layers = 2 if isinstance(settings["mixer"], str) else len(settings["mixer"])
    config = ModelConfig(
        **settings, vocab_size=VOCABULARY, hidden_size=16, num_layers=layers, num_heads=4, intermediate_size=16
    )
    float32 = DtypeConfig(compute="float32")
    graphdef, abstract = abstract_model(config, float32)
    params = draw(abstract)
    wanted = jax.device_get(value_and_grad(graphdef, params, TOKENS, SEGMENT_IDS, POSITIONS))
    with mesh_of(**MESHES[mesh]):
        graphdef, abstract = abstract_model(config, float32)
        params = jax.tree.map(lambda leaf, place: jax.device_put(leaf, place.sharding), params, abstract)
        row = lambda x: shard(jnp.asarray(x, jnp.int32), "batch", "time")
        got = value_and_grad(graphdef, params, row(TOKENS), row(SEGMENT_IDS), row(POSITIONS))
    assert_close(jax.device_get(got), wanted, 4e-5)
