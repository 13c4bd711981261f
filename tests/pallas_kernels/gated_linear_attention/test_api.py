"""The door to the op: what it refuses and with which words, and which implementation it takes."""

import contextlib
import logging
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import gated_linear_attention, gated_linear_attention_step
from pallas_kernels.dispatch import say_once
from pallas_kernels.gated_linear_attention import IMPLEMENTATIONS, api, gated_linear_attention_support
from pallas_kernels.target import Target

B, T, H, H_KV, K, V = 2, 5, 4, 2, 3, 6


def arguments(**changes):
    good = {
        "query": jnp.ones((B, T, H, K)),
        "key": jnp.ones((B, T, H_KV, K)),
        "value": jnp.ones((B, T, H_KV, V)),
        "log_decay": -jnp.ones((B, T, H_KV, K)),
    }
    return good | changes


REFUSED = {
    "rank": (
        {"query": jnp.ones((B, H, K))},
        "query has shape (2, 4, 3); it must be of rank 4, [batch, time, heads, dim], none of them 0.",
    ),
    "no tokens": (
        {"query": jnp.ones((B, 0, H, K))},
        "query has shape (2, 0, 4, 3); it must be of rank 4, [batch, time, heads, dim], none of them 0.",
    ),
    "dtype": (
        {"value": jnp.ones((B, T, H_KV, V), jnp.int32)},
        "value is int32; it must be float32, bfloat16 or float16.",
    ),
    "key dim": (
        {"key": jnp.ones((B, T, H_KV, K + 1))},
        "key has shape (2, 5, 2, 4); it must be (2, 5, 2, 3), to go with query (2, 5, 4, 3) and value (2, 5, 2, 6).",
    ),
    "key heads": (
        {"key": jnp.ones((B, T, 1, K))},
        "key has shape (2, 5, 1, 3); it must be (2, 5, 2, 3), to go with query (2, 5, 4, 3) and value (2, 5, 2, 6).",
    ),
    "value time": (
        {"value": jnp.ones((B, T + 1, H_KV, V))},
        "value has shape (2, 6, 2, 6); its batch and time must be (2, 5), those of query.",
    ),
    "heads": (
        {"key": jnp.ones((B, T, 3, K)), "value": jnp.ones((B, T, 3, V))},
        "key and value have 3 heads; their number must divide the 4 heads of query.",
    ),
    "log_decay shape": (
        {"log_decay": -jnp.ones((B, T, 3, K))},
        "log_decay has shape (2, 5, 3, 3); it must be broadcastable to (2, 5, 2, 3) or (2, 5, 4, 3).",
    ),
    "log_decay rank": (
        {"log_decay": -jnp.ones((1, B, T, H_KV, K))},
        "log_decay has shape (1, 2, 5, 2, 3); it must be broadcastable to (2, 5, 2, 3) or (2, 5, 4, 3).",
    ),
    "log_decay dtype": (
        {"log_decay": jnp.zeros((B, T, H_KV, K), jnp.int32)},
        "log_decay is int32; it must be float32, bfloat16 or float16.",
    ),
    "positive log_decay": (
        {"log_decay": jnp.full((1, 1, 1, 1), 0.5)},
        "log_decay reaches 0.5; it must be at most 0, for exp(log_decay) to be a gate.",
    ),
    "initial_state shape": (
        {"initial_state": jnp.ones((B, H, V, K))},
        "initial_state is float32[2, 4, 6, 3]; it must be float32[2, 4, 3, 6].",
    ),
    "initial_state dtype": (
        {"initial_state": jnp.ones((B, H, K, V), jnp.bfloat16)},
        "initial_state is bfloat16[2, 4, 3, 6]; it must be float32[2, 4, 3, 6].",
    ),
    "segment_ids shape": (
        {"segment_ids": jnp.ones((T,), jnp.int32)},
        "segment_ids is int32[5]; it must be int32[2, 5].",
    ),
    "segment_ids dtype": (
        {"segment_ids": jnp.ones((B, T))},
        "segment_ids is float32[2, 5]; it must be int32[2, 5].",
    ),
    "scale": ({"scale": float("nan")}, "scale is nan; it must be a finite Python number (a traced one can multiply"),
    "scale array": ({"scale": np.ones(2)}, "scale is [1. 1.]; it must be a finite Python number"),
    "chunk_size": ({"chunk_size": 0}, "chunk_size is 0; it must be None or a positive integer."),
    "implementation": (
        {"implementation": "triton"},
        "implementation is 'triton'; it must be None, one of reference, chunked, mosaic_gpu, mosaic_tpu, or a",
    ),
    "no implementation": ({"implementation": ()}, "implementation is (); it must be None, one of reference"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_refuses_in_one_sentence(changes, message):
    with pytest.raises(ValueError) as error:
        gated_linear_attention(**arguments(**changes))
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_refuses_while_tracing_too():
    with pytest.raises(ValueError, match="key and value have 3 heads"):
        jax.eval_shape(
            gated_linear_attention, *arguments(key=jnp.ones((B, T, 3, K)), value=jnp.ones((B, T, 3, V))).values()
        )
    with pytest.raises(ValueError, match="log_decay reaches 1"):
        jax.jit(lambda query: gated_linear_attention(**arguments(query=query, log_decay=np.float32(1))))(
            jnp.ones((B, T, H, K))
        )
    with pytest.raises(ValueError, match=r"scale is .*; it must be a finite Python number"):
        jax.jit(lambda scale: gated_linear_attention(**arguments(scale=scale)))(1.0)


def test_a_positive_log_decay_that_cannot_be_seen_is_let_through():
    jax.jit(lambda g: gated_linear_attention(**arguments(log_decay=g)))(jnp.full((1, 1, 1, 1), 0.5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": jnp.ones((B, 1, H, K))}, "query has shape (2, 1, 4, 3); it must be of rank 3, [batch, heads, dim]"),
        ({"log_decay": -jnp.ones((B, 1, H, K))}, "log_decay has shape (2, 1, 4, 3); it must be of rank 3 at most"),
        ({"log_decay": jnp.ones((H, K))}, "log_decay reaches 1; it must be at most 0"),
        ({"state": jnp.ones((B, H, V, K))}, "state is float32[2, 4, 6, 3]; it must be float32[2, 4, 3, 6]."),
        ({"state": None}, "state is None; it must be a float32 array of shape [batch, heads, key dim, value dim]."),
    ],
)
def test_a_step_refuses_in_one_sentence(changes, message):
    with pytest.raises(ValueError) as error:
        gated_linear_attention_step(**step_arguments(**changes))
    assert str(error.value).startswith(message)


def test_takes_numpy_arrays_and_python_numbers():
    expected, _ = gated_linear_attention(**arguments(log_decay=jnp.full((B, T, H_KV, K), -0.5)))
    out, _ = gated_linear_attention(**{name: np.asarray(x) for name, x in arguments(log_decay=-0.5).items()})
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_allclose(gated_linear_attention(**arguments(log_decay=-0.5))[0], expected, rtol=1e-6)


def test_the_default_scale_is_that_of_attention():
    expected, _ = gated_linear_attention(**arguments(scale=K**-0.5))
    np.testing.assert_array_equal(gated_linear_attention(**arguments())[0], expected)


@pytest.mark.parametrize("over_a_mesh", [False, True])
def test_leaves_out_the_final_state(over_a_mesh):
    def results(arrays, **options):
        return gated_linear_attention(**arrays, implementation="chunked", **options)

    arrays = arguments()
    expected, _ = results(arrays)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,), devices=jax.devices()[:2])
    with jax.set_mesh(mesh) if over_a_mesh else contextlib.nullcontext():
        if over_a_mesh:
            arrays = {name: jax.sharding.reshard(x, jax.P("data")) for name, x in arrays.items()}
        out, state = results(arrays, output_final_state=False)
    assert state is None
    np.testing.assert_array_equal(out, expected)


def test_a_named_implementation_that_cannot_serve_says_why():
    with pytest.raises(NotImplementedError) as error:
        gated_linear_attention(**arguments(implementation="chunked", chunk_size=3))
    assert str(error.value) == (
        "gated_linear_attention is not served by 'chunked': "
        "chunk_size is 3, and blocks that double need a power of two."
    )


@pytest.fixture
def fake(monkeypatch):
    """Stand-ins for the kernels, which serve or do not; returns the names in the order in which they were called."""
    called = []

    def implementation(name, reason):
        def run(query, *rest, **options):
            called.append(name)
            return query, None

        return types.SimpleNamespace(unsupported=lambda *arguments, **options: reason, gated_linear_attention=run)

    modules = {
        "mosaic_gpu": implementation("mosaic_gpu", "the moon is full."),
        "mosaic_tpu": implementation("mosaic_tpu", "the tide is low."),
        "chunked": implementation("chunked", None),
        "reference": implementation("reference", None),
    }
    monkeypatch.setattr(api, "_module", modules.__getitem__)
    say_once.cache_clear()
    return called


def test_a_sequence_is_tried_in_order(fake):
    gated_linear_attention(**arguments(implementation=("mosaic_gpu", "reference", "chunked")))
    gated_linear_attention(**arguments(implementation=["chunked", "reference"]))
    assert fake == ["reference", "chunked"]


def test_a_sequence_that_fails_lists_every_reason(fake):
    with pytest.raises(NotImplementedError) as error:
        gated_linear_attention(**arguments(implementation=("mosaic_gpu", "mosaic_tpu")))
    assert str(error.value) == (
        "gated_linear_attention is not served by 'mosaic_gpu': the moon is full; nor by 'mosaic_tpu': the tide is low."
    )


@pytest.mark.parametrize(("backend", "kernel"), [("gpu", "mosaic_gpu"), ("tpu", "mosaic_tpu"), ("cpu", None)])
def test_the_default_is_the_best_that_serves_and_says_once_what_it_passed_over(
    fake, monkeypatch, caplog, backend, kernel
):
    monkeypatch.setattr(api, "target", lambda: Target(backend, "some kind"))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            gated_linear_attention(**arguments())
    assert fake == ["chunked", "chunked"]
    reasons = {"mosaic_gpu": "the moon is full.", "mosaic_tpu": "the tide is low."}
    said = [f"gated_linear_attention runs as 'chunked' and not as {kernel!r}: {reasons[kernel]}"] if kernel else []
    assert [record.getMessage() for record in caplog.records] == said


def step_arguments(**changes):
    return {name: x[:, 0] for name, x in arguments().items()} | {"state": jnp.ones((B, H, K, V))} | changes


@pytest.mark.parametrize("reason", [None, "the moon is full."])
def test_a_step_takes_the_kernel_on_tpu_where_it_serves(monkeypatch, caplog, reason):
    def step(query, key, value, log_decay, state, *, scale, interpret):
        return jnp.full(query.shape[:2] + value.shape[-1:], 7.0), state

    module = types.SimpleNamespace(unsupported_step=lambda *_, interpret: reason, gated_linear_attention_step=step)
    monkeypatch.setattr(api, "_module", {"mosaic_tpu_step": module}.__getitem__)
    monkeypatch.setattr(api, "target", lambda: Target("tpu", "some kind"))
    say_once.cache_clear()
    expected, _ = gated_linear_attention_step(**step_arguments(implementation="reference"))
    with caplog.at_level(logging.WARNING):
        out, _ = gated_linear_attention_step(**step_arguments())
    said = [record.getMessage() for record in caplog.records]
    if reason is None:
        assert (out == 7).all() and not said
    else:
        np.testing.assert_array_equal(out, expected)
        assert said == [f"gated_linear_attention_step runs as 'reference' and not as 'mosaic_tpu': {reason}"]


def test_a_step_says_why_a_named_implementation_cannot_serve():
    with pytest.raises(NotImplementedError) as error:
        gated_linear_attention_step(**step_arguments(implementation=("chunked", "mosaic_tpu")))
    assert str(error.value) == (
        "gated_linear_attention_step is not served by 'chunked': it has no step for a single token; take 'reference', "
        "'mosaic_tpu' or None; nor by 'mosaic_tpu': it would run on cpu, and needs a TPU; use 'reference', or "
        "interpret=True to try it."
    )
    with pytest.raises(ValueError, match="implementation is 'triton'; it must be None, one of reference, chunked"):
        gated_linear_attention_step(**step_arguments(implementation="triton"))


def test_support_says_why_for_arrays_and_for_shapes(fake):
    expected = {"reference": None, "chunked": None, "mosaic_gpu": "the moon is full.", "mosaic_tpu": "the tide is low."}
    assert gated_linear_attention_support(**arguments()) == expected
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in arguments().items()}
    assert gated_linear_attention_support(**shapes) == expected
    assert tuple(expected) == IMPLEMENTATIONS
    with pytest.raises(ValueError, match="query is int32"):
        gated_linear_attention_support(**shapes | {"query": jax.ShapeDtypeStruct((B, T, H, K), jnp.int32)})


def test_an_implementation_that_cannot_be_imported_is_a_reason(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError("No module named 'toolchain'", name="toolchain")

    monkeypatch.setattr(api, "_module", missing)
    reason = "it cannot be imported here (No module named 'toolchain')."
    assert gated_linear_attention_support(**arguments())["mosaic_gpu"] == reason
