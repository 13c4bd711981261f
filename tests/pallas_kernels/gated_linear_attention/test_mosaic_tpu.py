"""The TPU kernels in the interpreter on the shared cases, and exported for TPU; no TPU or libtpu needed."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import GATES, Case, check, inputs
from jax import export
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.gated_linear_attention import mosaic_tpu

# One unit of heads in most: what takes time is compiling what the interpreter makes of a kernel, once for every shape.
PAIR = {"batch": 1, "time": 260, "heads": 2, "key_dim": 64, "value_dim": 64, "chunk_size": None}
ONE = {"batch": 1, "time": 140, "heads": 1, "key_dim": 128, "value_dim": 128, "chunk_size": None}


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.long)])
def test_every_gate(dtype):
    """Two heads in a unit, documents, both states; the bounded form, the exact one, and rows that need both."""
    for gate in GATES:
        check(Case(**PAIR, dtype=dtype, gate=gate, segments=(0, 37, 50, 200, 260)), "mosaic_tpu", interpret=True)


# Grouped heads: all of a grid step share a key; two groups; a group that spans grid steps, two heads each.
ALL, GROUPS = ONE | {"heads": 2, "kv_heads": 1}, ONE | {"heads": 4, "kv_heads": 2}
SPANNING = ONE | {"heads": 4, "kv_heads": 1}


@pytest.mark.parametrize(
    "case",
    [
        Case(**ALL | {"time": 260}, dtype="bfloat16", gate=None, segments=(0, 100, 260)),
        Case(**SPANNING, gate="strong", gate_shape="bthK"),
        *(
            pytest.param(case, marks=pytest.mark.long)
            for case in (
                Case(**ONE, dtype="bfloat16", gate="rare resets"),
                Case(**ONE, gate="mixed", dtype="bfloat16", gate_dtype="float32", initial_state=False),
                Case(**ONE | {"key_dim": 48, "value_dim": 80}, gate_shape="BThK", final_state_gradient=False),
                Case(**PAIR, dtype="bfloat16", gate="rare resets", gate_shape="btxK", kv_heads=1),
                Case(**PAIR | {"heads": 4}, dtype="bfloat16", gate="mixed", kv_heads=2),
                Case(**PAIR | {"heads": 4}, dtype="bfloat16", gate="mixed", kv_heads=1),
                Case(**PAIR | {"heads": 3}, dtype="bfloat16", gate="rare resets", kv_heads=1),
                Case(**ALL, dtype="bfloat16", gate="rare resets"),
                Case(**GROUPS, dtype="bfloat16", gate="rare resets", segments=(0, 100, 140)),
                Case(**GROUPS, dtype="bfloat16", gate_shape="bthK"),
                Case(**GROUPS, dtype="bfloat16", gate="mixed", gate_shape="btxk"),
                Case(**SPANNING, gate="mixed"),
                Case(**SPANNING, gate="rare resets", gate_shape="btxk"),
                Case(**ONE, dtype="bfloat16", gate_shape="BThk"),
                Case(**ONE, dtype="bfloat16", gate="-7", initial_state=False),
            )
        ),
    ],
    ids=str,
)
def test_equals_the_recurrence(case):
    check(case, "mosaic_tpu", interpret=True)


def test_halves_with_the_state_handed_over_equal_the_whole():
    arguments, _ = inputs(Case(**ONE | {"time": 200}))
    q, k, v, g, initial = (arguments[name] for name in ("query", "key", "value", "log_decay", "initial_state"))
    run = jax.jit(lambda *a: mosaic_tpu.gated_linear_attention(*a, None, scale=0.1, chunk_size=None, interpret=True))
    out, state = run(q, k, v, g, initial)
    first, middle = run(q[:, :100], k[:, :100], v[:, :100], g[:, :100], initial)
    second, last = run(q[:, 100:], k[:, 100:], v[:, 100:], g[:, 100:], middle)
    np.testing.assert_allclose(np.concatenate([first, second], axis=1), out, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(last, state, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(
    jax.__version_info__ < (0, 12), reason="jax 0.11 cannot differentiate what its interpreter looks for races in"
)
def test_no_races_and_nothing_read_before_it_is_written():
    interpret = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")  # a race raises
    check(Case(**ONE | {"time": 128, "chunk_size": 64}, dtype="bfloat16", gate="rare resets"), "mosaic_tpu", interpret)


@pytest.mark.parametrize(("key_dim", "value_dim"), [(64, 64), (128, 128), (128, 256), (256, 512)])
def test_exports_for_tpu(key_dim, value_dim):
    shape = lambda *dims, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(dims, dtype)
    lead = (1, 512, 4)
    arguments = shape(*lead, key_dim), shape(*lead, key_dim), shape(*lead, value_dim), shape(*lead, key_dim)
    state = shape(1, 4, key_dim, value_dim, dtype=jnp.float32)

    def step(q, k, v, g, initial, dout, dstate):
        call = lambda *a: mosaic_tpu.gated_linear_attention(*a, None, scale=1.0, chunk_size=None, interpret=False)
        results, pull = jax.vjp(call, q, k, v, g, initial)
        return results, pull((dout, dstate))

    exported = export.export(jax.jit(step), platforms=["tpu"])(*arguments, state, arguments[2], state)
    text = exported.mlir_module()
    assert text.count("tpu_custom_call") == 2  # forward and backward
    assert "stablehlo.transpose" not in text


@pytest.mark.parametrize("kv_heads", [2, 1], ids=["a group in a grid step", "a group in several"])
def test_shared_keys_reach_the_kernels_as_they_are(kv_heads):
    """No copy of a key, value or shared gate for every query head, neither forwards nor backwards."""
    shape = lambda heads, dim: jax.ShapeDtypeStruct((1, 512, heads, dim), jnp.bfloat16)
    arguments = shape(8, 128), shape(kv_heads, 128), shape(kv_heads, 256), shape(kv_heads, 128)
    widths = (8 * 128, kv_heads * 128, kv_heads * 256, kv_heads * 128)

    def step(dout, *arguments):
        call = lambda *a: mosaic_tpu.gated_linear_attention(
            *a, None, None, scale=1.0, chunk_size=None, interpret=False
        )[0]
        out, pull = jax.vjp(call, *arguments)
        return out, pull(dout)

    text = export.export(jax.jit(step), platforms=["tpu"])(shape(8, 256), *arguments).mlir_module()
    for operands in re.findall(r"@tpu_custom_call.* : \((.*?)\) ->", text):
        assert operands.startswith(", ".join(f"tensor<1x512x{width}xbf16>" for width in widths))
    assert text.count("@tpu_custom_call") == 2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": jnp.float16}, "query is float16; it must be bfloat16 or float32."),
        ({"key_dim": 2048}, "K is 2048; it must be at most 1024."),
        (
            {"key_dim": 512, "value_dim": 1024},
            "a state of K * V = 524288 values is too large for VMEM; 262144 is the most.",
        ),
        ({"chunk_size": 48}, "chunk_size is 48; it must be None or one of 64, 128, 256."),
        ({"interpret": False}, "it would run on cpu, and needs a TPU"),
        ({}, None),
    ],
)
def test_says_what_it_does_not_serve(change, reason):
    of = {"dtype": jnp.bfloat16, "key_dim": 64, "value_dim": 64, "chunk_size": None, "interpret": True} | change
    q = jax.ShapeDtypeStruct((1, 8, 2, of["key_dim"]), of["dtype"])
    v = jax.ShapeDtypeStruct((1, 8, 2, of["value_dim"]), of["dtype"])
    found = mosaic_tpu.unsupported(q, q, v, None, None, None, chunk_size=of["chunk_size"], interpret=of["interpret"])
    assert found == reason if reason is None else found.startswith(reason)
