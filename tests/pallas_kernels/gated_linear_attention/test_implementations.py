"""Every implementation of the op against the float64 recurrence, forward and every gradient, on the shared cases."""

import dataclasses

import pytest
from cases import GATES, Case, check

# A kernel joins by a line in INTERPRETED: does it serve this case? Interpreters are slow, which makes its tests long.
PLAIN = ("reference", "chunked")
INTERPRETED = {"mosaic_tpu": lambda case: case.dtype != "float16"}

ANY_GATE = [Case(gate=gate, dtype=dtype) for dtype in ("float32", "bfloat16") for gate in GATES]

GATE_SHAPES = [
    Case(gate=None),
    Case(gate_shape="bthK"),  # a scalar gate
    Case(gate_shape="BTHK"),
    Case(gate_shape="BThK"),  # RetNet
    Case(gate_shape="BThk", gate="strong"),
    Case(gate_shape="bTHk"),
    Case(gate_shape="bthK", gate="mixed"),
    Case(gate_shape="BthK", gate="-7", dtype="bfloat16"),
    Case(gate=None, dtype="bfloat16"),
    Case(gate_dtype="float32", dtype="bfloat16"),
]

GROUPED_HEADS = [
    Case(heads=6, kv_heads=2, batch=1, key_dim=8, value_dim=12),
    Case(heads=6, kv_heads=2, batch=1, key_dim=8, value_dim=12, gate_shape="btxk", gate="mixed"),
    Case(heads=6, kv_heads=1, batch=1, key_dim=8, value_dim=12),
    Case(heads=6, kv_heads=2, batch=1, key_dim=8, value_dim=12, gate_shape="bthK"),
    Case(heads=6, kv_heads=2, batch=1, key_dim=8, value_dim=12, gate_shape="BTxK", segments=(0, 20, 50)),
]

SHAPES = [
    Case(batch=1, time=1, heads=1, key_dim=1, value_dim=1),
    Case(time=1),
    Case(time=2, chunk_size=None),
    Case(time=15, chunk_size=None),
    Case(time=16, key_dim=7, value_dim=3),
    Case(time=17, key_dim=7, value_dim=3, gate="mixed"),
    Case(time=33, batch=3, heads=1, key_dim=5, value_dim=64, chunk_size=None),
    Case(time=7, chunk_size=1),
    Case(time=100, key_dim=8, value_dim=16, gate="mixed", chunk_size=64),
]

OPTIONS = [
    Case(scale=1.0),
    Case(scale=-0.37, dtype="bfloat16"),
    Case(initial_state=False),
    Case(final_state_gradient=False),
    Case(initial_state=False, final_state_gradient=False, gate="mixed"),
    Case(segments=(0, 1, 20, 37, 50)),
    Case(segments=(0, 16, 32, 50), gate=None, dtype="bfloat16"),
    Case(segments=(0, 3, 5, 50), gate="mixed"),
    Case(segments=(0, 13, 50), gate="strong", gate_shape="bthK"),
    Case(segments=(0, 30, 50), gate_shape="BTHK"),
    Case(dtype="float16"),
]


def fla(batch, time, heads, dim, normalizer, dtype, segments=None):
    """A case of flash-linear-attention's tests/ops/test_gla.py: K = V, gates logsigmoid(U[0, 1)) / normalizer."""
    return Case(
        batch, time, heads, dim, dim, dtype, f"fla {normalizer}", positive=True, segments=segments, chunk_size=None
    )


FLA = [
    fla(1, 63, 1, 64, 1, "float32"),
    fla(1, 63, 1, 64, 1, "float16"),
    fla(1, 64, 2, 320, 1, "float16"),
    fla(1, 15, 4, 64, 1, "float32", (0, 15)),
    fla(1, 15, 4, 64, 1, "float16", (0, 15)),
    fla(1, 16, 4, 64, 1, "float16", (0, 0, 16)),
]

FLA_LONG = [
    fla(2, 1024, 4, 60, 1, "float32"),
    fla(2, 1024, 8, 128, 0.1, "float32"),
    fla(2, 1024, 8, 128, 1, "float32"),
    fla(2, 1024, 8, 128, 10, "float32"),
    fla(4, 2048, 8, 64, 1, "float32"),
    fla(2, 1024, 4, 60, 1, "float16"),
    fla(2, 1024, 8, 128, 0.1, "float16"),
    fla(2, 1024, 8, 128, 1, "float16"),
    fla(2, 1024, 8, 128, 10, "float16"),
    fla(4, 2048, 8, 64, 1, "float16"),
    fla(1, 128, 4, 256, 1, "float16"),
    fla(1, 128, 4, 512, 1, "bfloat16"),
    fla(2, 256, 4, 64, 1, "float32"),
    fla(2, 1024, 4, 128, 1, "float16"),
    fla(1, 1000, 4, 64, 1, "float32", (0, 256, 500, 1000)),
    fla(1, 2000, 4, 100, 1, "float32", (0, 15, 100, 300, 1200, 2000)),
    fla(1, 2048, 4, 64, 1, "float16", (0, 1, 100, 300, 1200, 2048)),
    fla(1, 2048, 4, 128, 1, "float16", (0, 200, 512, 1200, 2048)),
    fla(1, 1000, 4, 64, 1, "float16", (0, 256, 500, 1000)),
    fla(1, 2000, 4, 100, 1, "float16", (0, 15, 100, 300, 1200, 2000)),
    # ours: gates that hardly forget, for as long as it takes roundings to add up
    Case(1, 16384, 1, 16, 16, gate="faint", gate_shape="BThK", chunk_size=None),
    Case(1, 16384, 1, 16, 16, gate="faint", chunk_size=None),
]


@pytest.mark.parametrize(
    "implementation", [*PLAIN, *(pytest.param(name, marks=pytest.mark.long) for name in INTERPRETED)]
)
@pytest.mark.parametrize("case", [*ANY_GATE, *GATE_SHAPES, *GROUPED_HEADS, *SHAPES, *OPTIONS, *FLA], ids=str)
def test_matches_the_float64_recurrence(case, implementation):
    if implementation in PLAIN:
        check(case, implementation)
    elif INTERPRETED[implementation](case):
        check(dataclasses.replace(case, chunk_size=None), implementation, interpret=True)
    else:
        pytest.skip(f"{implementation} does not serve this case")


@pytest.mark.long
@pytest.mark.parametrize("implementation", PLAIN)
@pytest.mark.parametrize("case", FLA_LONG, ids=str)
def test_matches_the_float64_recurrence_on_long_rows(case, implementation):
    check(case, implementation)
