"""Flash attention for TPUs: values and gradients in Pallas' interpreter, and the real TPU compiler (pytest -m tpu)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tpu_compiler import TOPOLOGIES, check_compiles

from gla_jax.config import MeshConfig
from gla_jax.layers import Attention, attention, splash_attention
from gla_jax.parallel.mesh import make_mesh
from gla_jax.parallel.sharding import shard
from pallas_kernels.target import Target


def draw_documents(rows, length):
    """Return [rows, length] int32: a new document at the middle of each row, on average, and at a few other places."""
    return np.cumsum(np.random.default_rng(3).random((rows, length)) < 4 / length, axis=1).astype(np.int32)


def truth(query, key, value, document, window):
    """Return out by the textbook, in whatever precision the arguments have."""
    key, value = (jnp.repeat(x, query.shape[2] // x.shape[2], axis=2) for x in (key, value))
    ages = np.arange(query.shape[1])[:, None] - np.arange(query.shape[1])
    seen = ((ages >= 0) & (ages < window)) & (document[:, :, None] == document[:, None, :])
    scores = jnp.where(seen[:, None], jnp.einsum("bthk,bshk->bhts", query, key) / np.sqrt(query.shape[-1]), -jnp.inf)
    return jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(scores, axis=-1), value)


def value_and_gradients(function, arrays, weight):
    def loss(*arrays):
        out = function(*arrays)
        return jnp.sum(out * weight), out

    gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*arrays)
    return [np.asarray(x, np.float64) for x in (out, *gradients)]


def compare(length, heads, kv_heads, head_size, window, packed, dtype=jnp.float32, tolerance=2e-6):
    random = np.random.default_rng(length + head_size + kv_heads)
    draw = lambda count: jnp.asarray(random.normal(size=(2, length, count, head_size)), dtype)
    arrays, weight = (draw(heads), draw(kv_heads), draw(kv_heads)), draw(heads)
    document = draw_documents(2, length)
    ids = (document, document) if packed else (None, None)
    document = document if packed else np.zeros_like(document)
    kernel = functools.partial(splash_attention.splash_attention, window=window, interpret=True)
    got = value_and_gradients(lambda *arrays: kernel(*arrays, *ids), arrays, weight)
    with jax.enable_x64(True):
        *exact, weight = (jnp.asarray(np.asarray(x, np.float64)) for x in (*arrays, weight))
        by_definition = functools.partial(truth, document=document, window=length if window is None else window)
        wanted = value_and_gradients(by_definition, exact, weight)
    size = lambda x: np.sqrt(np.mean(x**2))
    for name, x, want in zip(("out", "query", "key", "value"), got, wanted, strict=True):
        error = size(x - want) / max(size(want), 0.3)  # where a token sees itself alone, query and key get 0
        assert error < tolerance, (name, error)


def test_equals_the_definition():
    """Three blocks of 128 tokens, so that a window of 100 skips some; everything at once."""
    compare(384, heads=2, kv_heads=1, head_size=64, window=100, packed=True)


@pytest.mark.long
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", [None, 1, 128, 200])
@pytest.mark.parametrize(("length", "heads", "kv_heads", "head_size"), [(384, 4, 2, 64), (512, 2, 2, 128)])
def test_every_mask_equals_the_definition(length, heads, kv_heads, head_size, window, packed):
    compare(length, heads, kv_heads, head_size, window, packed)


@pytest.mark.long
@pytest.mark.parametrize("head_size", [64, 128])
def test_half_precision_is_near_the_definition(head_size):
    compare(512, 4, 2, head_size, None, True, dtype=jnp.bfloat16, tolerance=1e-2)


@pytest.mark.long
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", [None, 130])
@pytest.mark.parametrize("sizes", [{"fsdp": 2, "tensor": 2}, {"sequence": 2, "tensor": 2}, {"fsdp": 1, "sequence": 4}])
def test_a_mesh_equals_plain_xla(sizes, window, packed, monkeypatch):
    for name in ("unsupported", "splash_attention"):
        function = functools.partial(getattr(splash_attention, name), interpret=True)
        monkeypatch.setattr(splash_attention, name, function)
    random = np.random.default_rng(0)
    x, weight = random.normal(size=(2, 2, 512, 256)).astype(np.float32)
    documents = draw_documents(2, 512) if packed else None

    def run(implementation):
        options = Attention.Options(num_kv_heads=2, window=window, implementation=implementation)
        layer = Attention(256, 4, options, initializer_range=0.1, rngs=nnx.Rngs(0))
        graphdef, params = nnx.split(layer)
        segment_ids = None if documents is None else shard(jnp.asarray(documents), "batch", "time")

        def loss(params, x):
            y = nnx.merge(graphdef, params)(x, segment_ids=segment_ids)[0]
            return jnp.sum(y * weight), y

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(
            nnx.to_pure_dict(params), shard(jnp.asarray(x), "batch", "time", None)
        )

    wanted = run("xla")
    with jax.set_mesh(make_mesh(MeshConfig(data=1, **sizes), jax.devices()[:4])):
        got = run("splash")

    def check(path, x, want):
        x, want = np.asarray(x, np.float64), np.asarray(want, np.float64)
        error = np.sqrt(np.mean((x - want) ** 2) / np.mean(want**2))
        assert error < 2e-5, (jax.tree_util.keystr(path), error)

    jax.tree_util.tree_map_with_path(check, got, wanted)


@pytest.mark.parametrize("window", [None, 100])
def test_tpus_take_it_by_themselves(window, monkeypatch):
    """Lowered for a TPU, which needs none: the forward kernel and the two of the backward pass."""
    for module in (attention, splash_attention):
        monkeypatch.setattr(module, "target", lambda: Target("tpu", "TPU v5"))
    layer = Attention(128, 2, Attention.Options(window=window), dtype=jnp.bfloat16, rngs=nnx.Rngs(0))

    def gradient(length):
        ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
        loss = lambda x, ids: jnp.sum(layer(x, segment_ids=ids)[0].astype(jnp.float32))
        traced = jax.jit(jax.grad(loss)).trace(jax.ShapeDtypeStruct((1, length, 128), jnp.bfloat16), ids)
        return traced.lower(lowering_platforms=("tpu",)).as_text()

    assert gradient(256).count("tpu_custom_call") == 3
    assert gradient(250).count("tpu_custom_call") == 0


def test_what_it_does_not_serve_is_said(monkeypatch, caplog):
    query = lambda length=256, head_size=64, dtype=jnp.bfloat16: jax.ShapeDtypeStruct((1, length, 2, head_size), dtype)
    choose = lambda implementation, query: attention._choose(implementation, query, query, needs_mask=False)
    with pytest.raises(NotImplementedError, match=r"not served by 'splash': it would run on cpu, and needs a TPU"):
        choose("splash", query())
    assert choose(None, query()) == "xla"
    for module in (attention, splash_attention):
        monkeypatch.setattr(module, "target", lambda: Target("tpu", "TPU v5"))
    assert choose(None, query()) == "splash" and choose("xla", query()) == "xla"
    for call, reason in (
        (query(length=200), "a device has 200 tokens of a row; they must be a multiple of 128."),
        (query(head_size=96), "heads have 96 channels; it must be a multiple of 64, at most 256."),
        (query(dtype=jnp.float16), "query is float16; it must be bfloat16 or float32."),
    ):
        assert splash_attention.unsupported(call) == reason
        assert choose(None, call) == "xla"
        assert caplog.messages[-1] == f"Attention runs as 'xla' and not as 'splash': {reason}"


# One program per process: libtpu reads the environment once.
SCRIPT = """
import json, sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from gla_jax.layers.splash_attention import splash_attention, unsupported

topology, length, heads, kv_heads, head_size, window, packed, dtype = json.loads(sys.argv[1])
mesh = jax.sharding.Mesh(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[:1], "device")
jax.set_mesh(mesh)
sharding = jax.sharding.NamedSharding(mesh, jax.P())
shape = lambda *dims, dtype=dtype: jax.ShapeDtypeStruct(dims, dtype, sharding=sharding)
queries, keys = shape(2, length, heads, head_size), shape(2, length, kv_heads, head_size)
document = shape(2, length, dtype="int32") if packed else None

def train(query, key, value, document, dout):
    out, pull = jax.vjp(lambda *a: splash_attention(*a, document, document, window=window), query, key, value)
    return out, pull(dout)

assert unsupported(queries) is None
compiled = jax.jit(train).trace(queries, keys, keys, document, queries).lower().compile()
assert compiled.as_text().count("tpu_custom_call") == 3
print("compiled")
"""
CALLS = {
    "340m": (2048, 16, 16, 64, None, False, "bfloat16"),
    "1.3b": (2048, 32, 32, 64, None, True, "bfloat16"),
    "grouped heads of 128, window": (8192, 16, 4, 128, 1024, True, "bfloat16"),
    "heads of 256, float32": (1024, 4, 4, 256, None, True, "float32"),
    "blocks of 128": (384, 2, 1, 64, None, True, "bfloat16"),
}


@pytest.mark.tpu
@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e"])
@pytest.mark.parametrize("call", CALLS)
def test_compiles(chip, call):
    pytest.importorskip("libtpu")
    check_compiles(SCRIPT, TOPOLOGIES[chip], *CALLS[call])
