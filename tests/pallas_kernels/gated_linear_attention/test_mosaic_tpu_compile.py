"""The TPU kernels through the real TPU compiler, which needs libtpu but no TPU: pytest -m tpu."""

import pytest
from tpu_compiler import TOPOLOGIES, check_compiles

pytestmark = pytest.mark.tpu

# One kernel per process: libtpu reads the environment once.
SCRIPT = """
import json, sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from pallas_kernels import gated_linear_attention, gated_linear_attention_step

topology, key_dim, value_dim, dtype, kernel = json.loads(sys.argv[1])
device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
mesh = jax.sharding.Mesh([device], "device")
jax.set_mesh(mesh)  # which tells the kernels what they are compiled for
sharding = jax.sharding.NamedSharding(mesh, jax.P())
shape = lambda *dims, dtype=dtype: jax.ShapeDtypeStruct(dims, dtype, sharding=sharding)
keys, values = shape(1, 1024, 4, key_dim), shape(1, 1024, 4, value_dim)
shared_keys, shared_values = shape(1, 1024, 2, key_dim), shape(1, 1024, 2, value_dim)
state = shape(1, 4, key_dim, value_dim, dtype="float32")
segments = shape(1, 1024, dtype="int32")

def call(q, k, v, g, initial, segments):
    return gated_linear_attention(q, k, v, g, scale=1.0, initial_state=initial, segment_ids=segments)

def train(q, k, v, g, initial, segments, dout, dstate):
    results, pull = jax.vjp(lambda *a: call(*a, segments), q, k, v, g, initial)
    return results, pull((dout, dstate))

def step(q, k, v, g, state):
    token = lambda x: x[:, 0]
    return gated_linear_attention_step(token(q), token(k), token(v), token(g), state, scale=1.0)

arguments = {
    "forward": (call, keys, keys, values, keys, state, None),
    "train": (train, keys, keys, values, keys, state, None, values, state),
    "packed": (train, keys, keys, values, shape(1, 1024, 4, 1), state, segments, values, state),
    "grouped": (train, keys, shared_keys, shared_values, shared_keys, state, None, values, state),
    "step": (step, keys, keys, values, keys, state),
}[kernel]
compiled = jax.jit(arguments[0]).trace(*arguments[1:]).lower().compile()
assert "tpu_custom_call" in compiled.as_text()
print("compiled")
"""
SHAPES = [(64, 64), (128, 128), (128, 256), (256, 512)]
CALLS = [
    *((chip, *shape, "bfloat16", kernel) for chip in TOPOLOGIES for shape in SHAPES for kernel in ("forward", "train")),
    *((chip, 128, 256, "float32", "train") for chip in TOPOLOGIES),
    *((chip, 64, 64, "bfloat16", "packed") for chip in TOPOLOGIES),
    *((chip, 128, 128, "bfloat16", "grouped") for chip in TOPOLOGIES),
    *((chip, 128, 256, "bfloat16", "step") for chip in TOPOLOGIES),
]


@pytest.mark.parametrize(("chip", "key_dim", "value_dim", "dtype", "kernel"), CALLS, ids=str)
def test_compiles(chip, key_dim, value_dim, dtype, kernel):
    pytest.importorskip("libtpu")
    check_compiles(SCRIPT, TOPOLOGIES[chip], key_dim, value_dim, dtype, kernel)
