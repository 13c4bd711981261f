"""The Hopper kernels in the interpreter against the recurrence in float64, and their lowering for CUDA."""

import contextlib
import functools
import importlib
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import gated_linear_attention
from pallas_kernels.gated_linear_attention.block_sizes import GpuBlockSizes, gpu_block_sizes

mosaic_gpu = importlib.import_module("pallas_kernels.gated_linear_attention.mosaic_gpu")
NAMES = ("query", "key", "value", "log_decay", "initial_state")

# B, T, H, H_kv, K, V, gate, what else
CASES = {
    "bounded": (1, 128, 1, 1, 64, 64, "bfloat16", "endless"),
    "no gate, tail": (1, 70, 1, 1, 32, 48, "none", ""),
    "resets and -inf": (1, 128, 1, 1, 64, 64, "strong", "initial segments"),
    "scalar float32, shared heads": (1, 128, 2, 1, 64, 64, "scalar", "initial"),
    "wide, float32, strong": (1, 64, 1, 1, 64, 192, "strong float32", "initial"),
    "constant": (1, 128, 1, 1, 64, 64, "constant", ""),
    "constant, wide": (1, 64, 1, 1, 64, 128, "constant scalar", "initial endless"),
    "groups of four, resets": (1, 448, 1, 1, 256, 64, "strong", "initial segments"),
    "cut, odd chunks": (1, 320, 1, 1, 64, 64, "strong", "cut initial"),
}
QUICK = ("resets and -inf", "scalar float32, shared heads")  # the others are variations, and the interpreter is slow


def truth(query, key, value, log_decay, initial_state, segment_ids, scale, d_out, d_final):
    """Return (out, final_state) and the gradients of NAMES in float64, token by token."""
    q, k, v, d_out, d_final = (np.asarray(x, np.float64) for x in (query, key, value, d_out, d_final))
    batch, time, heads, key_dim = q.shape
    group = heads // k.shape[2]
    k, v = (np.repeat(x, group, axis=2) for x in (k, v))
    g = np.zeros((1, 1, 1, 1)) if log_decay is None else np.asarray(log_decay, np.float64)
    g_heads = np.repeat(g, group, axis=2) if g.shape[2] == heads // group else g
    decay = np.exp(np.broadcast_to(g_heads, q.shape)).copy()
    if segment_ids is not None:
        ids = np.asarray(segment_ids)
        decay[:, 1:][ids[:, 1:] != ids[:, :-1]] = 0
    state = np.zeros((batch, heads, key_dim, v.shape[-1]))
    if initial_state is not None:
        state = np.asarray(initial_state, np.float64)
    states, out = [state], np.zeros(q.shape[:3] + v.shape[-1:])
    for t in range(time):
        state = decay[:, t, :, :, None] * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        out[:, t] = scale * np.einsum("bhk,bhkv->bhv", q[:, t], state)
        states.append(state)
    dq, dk, dv, dg, d_state = np.zeros_like(q), np.zeros_like(q), np.zeros_like(v), np.zeros_like(q), d_final
    for t in reversed(range(time)):
        dq[:, t] = scale * np.einsum("bhkv,bhv->bhk", states[t + 1], d_out[:, t])
        d_state = d_state + scale * q[:, t, :, :, None] * d_out[:, t, :, None, :]
        dk[:, t] = np.einsum("bhkv,bhv->bhk", d_state, v[:, t])
        dv[:, t] = np.einsum("bhkv,bhk->bhv", d_state, k[:, t])
        d_state = decay[:, t, :, :, None] * d_state
        dg[:, t] = (d_state * states[t]).sum(-1)
    per_kv = lambda x: x.reshape(*x.shape[:2], heads // group, group, x.shape[-1]).sum(3)
    if g.shape[2] == heads // group:
        dg = per_kv(dg)
    dg = dg.sum(axis=tuple(i for i in range(4) if g.shape[i] == 1 and dg.shape[i] > 1), keepdims=True)
    return (out, states[-1]), (dq, per_kv(dk), per_kv(dv), dg, d_state)


def error(x, expected):
    x = np.asarray(x, np.float64)
    assert np.isfinite(x).all()
    return np.sqrt(np.mean((x - expected) ** 2) / max(np.mean(expected**2), 1e-30))


def inputs(batch, time, heads, kv_heads, key_dim, value_dim, gate, more, seed=0):
    random = np.random.default_rng(seed)
    normal = lambda *shape: random.standard_normal(shape)
    bfloat16 = lambda *shape: jnp.asarray(normal(*shape), jnp.bfloat16)
    log_decay = -np.log1p(np.exp(-normal(batch, time, kv_heads, 1 if "scalar" in gate else key_dim))) / 16
    if "strong" in gate:
        log_decay = np.where(random.random(log_decay.shape) < 0.01, -np.inf, 20 * log_decay)
        log_decay = np.where(random.random(log_decay.shape) < 0.01, -1e4, log_decay)
    if "constant" in gate:  # where the gradient of the gate is a small difference of large products
        log_decay = np.full(log_decay.shape, -7.0)
    dtype = jnp.float32 if "float32" in gate or "scalar" in gate else jnp.bfloat16
    return (
        bfloat16(batch, time, heads, key_dim),
        bfloat16(batch, time, kv_heads, key_dim),
        bfloat16(batch, time, kv_heads, value_dim),
        None if gate == "none" else jnp.asarray(log_decay, dtype),
        jnp.asarray(normal(batch, heads, key_dim, value_dim), jnp.float32) if "initial" in more else None,
        jnp.asarray(np.cumsum(random.random((batch, time)) < 0.05, axis=1), jnp.int32) if "segments" in more else None,
    ), (bfloat16(batch, time, heads, value_dim), jnp.asarray(normal(batch, heads, key_dim, value_dim), jnp.float32))


def check(shape, *, interpret, seed=0):
    """Hold results and gradients against float64; return the errors."""
    arguments, cotangents = inputs(*shape, seed=seed)
    scale, ends = 0.7 * shape[4] ** -0.5, "endless" not in shape[7]
    if not ends:
        cotangents = cotangents[0], jnp.zeros_like(cotangents[1])
    assert mosaic_gpu.unsupported(*arguments, chunk_size=None, interpret=interpret) is None
    cut = mock.patch.object(mosaic_gpu, "gpu_block_sizes", lambda *_: GpuBlockSizes(64, segments=3))

    @jax.jit
    def run(differentiable, segment_ids, cotangents):
        op = lambda *x: mosaic_gpu.gated_linear_attention(
            *x, segment_ids, scale=scale, chunk_size=None, interpret=interpret, output_final_state=ends
        )
        results, pull_back = jax.vjp(op, *differentiable)
        return results, pull_back((cotangents[0], cotangents[1] if ends else None))

    with cut if "cut" in shape[7] else contextlib.nullcontext():
        results, gradients = run(arguments[:5], arguments[5], cotangents)
    expected, expected_gradients = truth(*arguments, scale, *cotangents)
    errors = {"out": error(results[0], expected[0])}
    assert (results[1] is not None) == ends
    if ends:
        errors["final_state"] = error(results[1], expected[1])
    for name, value, gradient, right in zip(NAMES, arguments[:5], gradients, expected_gradients, strict=True):
        if value is not None:
            assert gradient.shape == value.shape and gradient.dtype == value.dtype, name
            errors["d " + name] = error(gradient, right)
    for name, size in errors.items():
        assert size < (8e-3 if name.startswith("d ") else 4e-3), (shape, errors)
    return errors


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # what a bounded chunk would be, thrown away
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # 0 * -inf, which is how the kernel finds it
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in QUICK else pytest.mark.long) for case in CASES]
)
def test_interpreter_matches_float64(case):
    check(CASES[case], interpret=True)


@pytest.mark.parametrize(
    "shape",
    [
        (32, 1024, 16, 64, 64),
        pytest.param((16, 2048, 4, 128, 256), marks=pytest.mark.long),
        pytest.param((16, 2048, 4, 256, 512), marks=pytest.mark.long),
        pytest.param((1, 32768, 4, 256, 512), marks=pytest.mark.long),  # cut
        pytest.param((4, 2048, 16, 128, 128), marks=pytest.mark.long),
        (1, 1000, 2, 96, 80),
    ],
    ids=str,
)
def test_lowers_for_cuda(shape):
    batch, time, heads, key_dim, value_dim = shape
    like = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.bfloat16)
    keys, values = like(batch, time, heads, key_dim), like(batch, time, heads, value_dim)
    op = functools.partial(mosaic_gpu.gated_linear_attention, scale=1.0, chunk_size=None, interpret=False)

    def loss(q, k, v, g):
        out, state = op(q, k, v, g, None, None)
        return jnp.sum(out.astype(jnp.float32)) + jnp.sum(state)

    text = (
        jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))
        .trace(keys, keys, values, keys)
        .lower(lowering_platforms=("cuda",))
        .as_text()
    )
    cut = gpu_block_sizes(key_dim, value_dim, batch * heads, -(-time // 64)).segments > 1
    assert cut == (batch == 1)
    assert "gla_backward" in text and ("gla_walk" if cut or key_dim > 128 else "gla_forward") in text


@pytest.mark.parametrize("scale", [-0.5, 0.0, 0.5])
def test_kernels_are_given_a_positive_scale(scale):  # whose logarithm they take
    arrays, _ = inputs(1, 64, 1, 1, 64, 64, "bfloat16", "")

    def kernels(query, key, value, decay, initial_state, scale, *options):
        assert scale > 0
        return scale * query, None

    with mock.patch.object(mosaic_gpu, "_ATTENTION", {True: kernels}):
        out, _ = mosaic_gpu.gated_linear_attention(
            *arrays, scale=scale, chunk_size=None, interpret=True, output_final_state=False
        )
    np.testing.assert_array_equal(out, scale * arrays[0])


@pytest.mark.parametrize("value_dim", [64, 128, 192, 256, 384, 512])
@pytest.mark.parametrize("key_dim", [64, 128, 192, 256])
def test_sizes_fit_the_heads_and_the_chip(key_dim, value_dim):
    for batch_heads in range(1, 200):
        for chunks in (1, 15, 16, 100, 512):
            sizes = gpu_block_sizes(key_dim, value_dim, batch_heads, chunks)
            assert value_dim % sizes.value_tile == 0
            if sizes.segments > 1:  # at most one block on a multiprocessor, and something to walk
                assert sizes.segments * batch_heads * -(-value_dim // 128) <= 132
                assert chunks >= 4 * sizes.segments
    assert gpu_block_sizes(key_dim, value_dim, 1, 512).segments >= 33
    assert gpu_block_sizes(key_dim, value_dim, 512, 32).segments == 1


@pytest.mark.parametrize(
    ("key_dim", "time"),
    [(64, 256), pytest.param(128, 256, marks=pytest.mark.long), pytest.param(256, 1024, marks=pytest.mark.long)],
)
def test_gradients_of_what_is_laid_out_over_a_mesh_lower_for_cuda(key_dim, time, monkeypatch):
    monkeypatch.setattr(
        mosaic_gpu, "unsupported", lambda *args, **kwargs: None
    )  # which asks for the devices of this test
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    spec = jax.sharding.PartitionSpec

    def like(dtype, layout, *shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.sharding.NamedSharding(mesh, layout))

    def loss(query, key, value, log_decay, initial_state):
        results = gated_linear_attention(
            query, key, value, log_decay, initial_state=initial_state, implementation="mosaic_gpu"
        )
        return sum(jnp.sum(x.astype(jnp.float32)) for x in results)

    with jax.set_mesh(mesh):
        token = functools.partial(like, jnp.bfloat16, spec("data", None, "tensor"), 4, time, 4)
        state = like(jnp.float32, spec("data", "tensor"), 4, 4, key_dim, 64)
        traced = jax.jit(jax.grad(loss, argnums=range(5))).trace(
            token(key_dim), token(key_dim), token(64), token(key_dim), state
        )
        program = traced.lower(lowering_platforms=("cuda",)).as_text()
    calls = [line.rsplit("->", 1)[1] for line in program.splitlines() if "@mosaic_gpu" in line]
    assert len(calls) >= 2 and all("tensor<1x" in line and "tensor<4x" not in line for line in calls)


@pytest.mark.parametrize("ends", [True, False])
def test_recomputed_layers_run_no_kernel_for_nothing(ends):
    """A scan over layers under `jax.checkpoint`: a forward that saves nothing, one that saves, and the backward."""
    like = jax.ShapeDtypeStruct((1, 128, 1, 64), jnp.bfloat16)
    options = {"scale": 1.0, "chunk_size": None, "interpret": False, "output_final_state": ends}
    op = lambda *x: mosaic_gpu.gated_linear_attention(*x, None, None, **options)[0]

    def loss(q, k, v, g):
        q, _ = jax.lax.scan(lambda q, _: (jax.checkpoint(op)(q, k, v, g), None), q, length=3)
        return jnp.sum(q.astype(jnp.float32))

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))
    program = gradient.trace(like, like, like, like).lower(lowering_platforms=("cuda",)).as_text()
    results = [line.rsplit("->", 1)[1] for line in program.splitlines() if "@mosaic_gpu" in line]
    assert [line.count("tensor<") for line in results] == (
        [2, 5, 4] if ends else [1, 4, 4]
    )  # with final states, or not
    # dq and dk take the place of the scores and states that the forward pass saved
    assert program.count("stablehlo.output_operand_alias<") == 2


@pytest.mark.long
@pytest.mark.parametrize("shared", [False, True], ids=["a gate each", "one gate"])
def test_vmap_equals_a_loop(shared):
    many, _ = inputs(2, 64, 1, 1, 64, 64, "bfloat16", "")
    query, key, value, gate = (x[:, None] for x in many[:4])
    if shared:
        gate = gate[0]
    op = lambda *x: mosaic_gpu.gated_linear_attention(*x, None, None, scale=0.1, chunk_size=None, interpret=True)
    loss = lambda *x: sum(jnp.sum(jnp.sin(y.astype(jnp.float32))) for y in op(*x))
    total = lambda *x: jax.vmap(loss, in_axes=(0, 0, 0, None if shared else 0))(*x).sum()
    mapped = jax.jit(jax.grad(total, argnums=(0, 1, 2, 3)))(query, key, value, gate)
    one = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))
    each = [one(query[i], key[i], value[i], gate if shared else gate[i]) for i in range(2)]
    *expected, of_gate = (jnp.stack(x).astype(jnp.float32) for x in zip(*each, strict=True))
    for x, y in zip(mapped, (*expected, of_gate.sum(0) if shared else of_gate), strict=True):
        assert error(x, np.asarray(y, np.float64)) < 4e-3


@pytest.mark.long
def test_pulls_many_cotangents_back_through_one_forward_pass():
    """Each pull back writes to its own copy of what the forward pass saved, also when only cotangents are mapped."""
    arrays, (d_out, _) = inputs(1, 128, 1, 1, 64, 64, "bfloat16", "")
    options = {"scale": 0.1, "chunk_size": None, "interpret": True, "output_final_state": False}
    _, pull_back = jax.vjp(lambda *x: mosaic_gpu.gated_linear_attention(*x, None, None, **options)[0], *arrays[:4])
    each = [pull_back(d_out), pull_back(2 * d_out)]
    mapped = jax.jit(jax.vmap(pull_back))(jnp.stack([d_out, 2 * d_out]))
    for x, *gradients in zip(mapped, *each, strict=True):
        np.testing.assert_array_equal(x, jnp.stack(gradients))


def test_says_why_it_does_not_serve():
    (q, k, v, g, _, _), _ = inputs(1, 64, 1, 1, 64, 64, "bfloat16", "")
    reason = functools.partial(mosaic_gpu.unsupported, chunk_size=None, interpret=True)
    assert "query is float32" in reason(q.astype(jnp.float32), k, v, g, None, None)
    assert "chunks of 64" in mosaic_gpu.unsupported(q, k, v, g, None, None, chunk_size=32, interpret=True)
    assert "would run on cpu" in mosaic_gpu.unsupported(q, k, v, g, None, None, chunk_size=None, interpret=False)


ON_A_GPU = {
    "segments, initial state, tail": (2, 200, 2, 1, 64, 64, "strong", "initial segments"),
    "long": (1, 8192, 1, 1, 64, 64, "strong", "segments"),
    "340M": (1, 512, 2, 2, 128, 256, "bfloat16", "endless"),
    "340M, float32, strong": (1, 192, 2, 1, 128, 256, "strong float32", "initial"),
    "1.3B": (1, 320, 1, 1, 256, 512, "bfloat16", "initial"),
    "1.3B, strong": (1, 192, 1, 1, 256, 128, "strong", "segments"),
    "odd sizes": (1, 100, 2, 1, 96, 80, "scalar", "initial"),
    "no gate": (1, 130, 1, 1, 32, 48, "none", ""),
    "short": (2, 40, 1, 1, 64, 64, "bfloat16", "endless"),
    "constant": (1, 320, 1, 1, 128, 128, "constant", ""),
    "one chunk, wide": (1, 64, 1, 1, 128, 64, "bfloat16", "initial"),
    "odd chunks, wide": (1, 192, 1, 1, 128, 128, "scalar", "initial endless"),
    "one chunk, wider": (1, 64, 1, 1, 256, 64, "bfloat16", "initial"),
    "constant, wider": (1, 320, 1, 1, 256, 128, "constant", "endless"),
    "wider, float32, strong": (1, 192, 2, 1, 256, 128, "strong float32", "initial segments"),
    "cut, strong": (2, 320, 2, 1, 64, 64, "strong float32", "cut initial segments"),
    "cut, wide": (1, 500, 2, 2, 128, 256, "bfloat16", "cut"),
    "cut, wider": (1, 320, 1, 1, 192, 64, "bfloat16", "cut initial"),
}


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a Hopper GPU")
@pytest.mark.parametrize(("key_dim", "value_dim"), [(64, 64), (128, 128), (256, 256)])
def test_gpu_scan_equals_layers_one_by_one(key_dim, value_dim):
    """XLA may fuse a kernel with the slices of a scan, and then not know that it writes in place."""
    random = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(random.standard_normal(shape), jnp.bfloat16)
    query, key, decay = (normal(2, 1, 512, 2, key_dim) for _ in range(3))
    layers = (query, key, jax.nn.log_sigmoid(decay) / 16)
    value, d_out = normal(1, 512, 2, value_dim), normal(1, 512, 2, value_dim).astype(jnp.float32)
    options = {"scale": 0.1, "chunk_size": None, "interpret": False, "output_final_state": False}
    op = lambda q, k, v, g: mosaic_gpu.gated_linear_attention(q, k, v, g, None, None, **options)[0]

    def scanned(value, layers):
        out, _ = jax.lax.scan(lambda v, x: (op(*x[:2], v, x[2]), None), value, layers)
        return jnp.vdot(out.astype(jnp.float32), d_out)

    def one_by_one(value, layers):
        for i in range(2):
            q, k, g = (x[i] for x in layers)
            value = op(q, k, value, g)
        return jnp.vdot(value.astype(jnp.float32), d_out)

    of_scan, expected = (jax.jit(jax.grad(f, argnums=(0, 1)))(value, layers) for f in (scanned, one_by_one))
    for x, y in zip(jax.tree.leaves(of_scan), jax.tree.leaves(expected), strict=True):
        assert error(x, np.asarray(y, np.float64)) < 1e-3


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a Hopper GPU")
@pytest.mark.parametrize("case", ON_A_GPU)
def test_gpu_matches_float64(case):
    check(ON_A_GPU[case], interpret=False, seed=1)
