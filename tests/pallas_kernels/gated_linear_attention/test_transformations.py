"""What holds for the op beyond its values: halves, segments, padding, causality, transformations, program size."""

import functools
import importlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from pallas_kernels import gated_linear_attention, gated_linear_attention_step

BATCH, TIME, HEADS, KEY, VALUE = 2, 21, 2, 6, 5
IMPLEMENTATIONS = ("reference", "chunked")


@pytest.fixture(params=IMPLEMENTATIONS)
def op(request):
    return functools.partial(gated_linear_attention, implementation=request.param, chunk_size=4)


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape), jnp.float32)


def arguments(batch=BATCH, time=TIME, heads=HEADS, kv_heads=None, seed=0):
    """query, key, value, log_decay with every kind of gate in it, initial_state."""
    kv_heads = kv_heads or heads
    rng = np.random.default_rng(seed)
    gates = rng.choice(
        [-0.01, -0.3, -7.0, 0.0, -1e4, -np.inf], (batch, time, kv_heads, KEY), p=[0.4, 0.4, 0.05, 0.05, 0.05, 0.05]
    )
    return (
        draw(batch, time, heads, KEY, seed=seed),
        draw(batch, time, kv_heads, KEY, seed=seed + 1),
        draw(batch, time, kv_heads, VALUE, seed=seed + 2),
        jnp.asarray(gates, jnp.float32),
        draw(batch, heads, KEY, VALUE, seed=seed + 3),
    )


def loss(op, query, key, value, log_decay, initial_state, **options):
    """A scalar that depends on every element of both results."""
    out, state = op(query, key, value, log_decay, initial_state=initial_state, **options)
    return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(state))


def gradients(op, *args, **options):
    return jax.grad(functools.partial(loss, op, **options), argnums=(0, 1, 2, 3, 4))(*args)


def assert_close(actual, expected):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5), actual, expected)


def test_two_halves_with_the_state_handed_over_equal_the_whole(op):
    def halves(query, key, value, log_decay, *, initial_state):
        first, second = ([x[:, part] for x in (query, key, value, log_decay)] for part in (slice(9), slice(9, None)))
        out, state = op(*first, initial_state=initial_state)
        rest, state = op(*second, initial_state=state)
        return jnp.concatenate([out, rest], axis=1), state

    args = arguments()
    assert_close(halves(*args[:4], initial_state=args[4]), op(*args[:4], initial_state=args[4]))
    assert_close(gradients(halves, *args), gradients(op, *args))


def test_steps_equal_the_op(op):
    query, key, value, log_decay, state = arguments(heads=4, kv_heads=2)
    out, final_state = op(query, key, value, log_decay, initial_state=state, scale=0.7)
    step = jax.jit(functools.partial(gated_linear_attention_step, scale=0.7))
    for t in range(TIME):
        out_t, state = step(query[:, t], key[:, t], value[:, t], log_decay[:, t], state)
        assert_close(out_t, out[:, t])
    assert_close(state, final_state)


@pytest.mark.parametrize("gate_shape", [None, (), (1, 1), (HEADS, 1), (BATCH, 1, KEY)])
def test_steps_broadcast_their_gate(gate_shape):
    query, key, value, _, state = arguments(time=1)
    gate = None if gate_shape is None else -jnp.abs(draw(*gate_shape))
    full = None if gate is None else jnp.broadcast_to(gate, (BATCH, HEADS, KEY))[:, None]
    out, final_state = gated_linear_attention(query, key, value, full, initial_state=state, implementation="reference")
    actual = gated_linear_attention_step(query[:, 0], key[:, 0], value[:, 0], gate, state)
    assert_close(actual, (out[:, 0], final_state))


def test_steps_keep_dtypes():
    query, key, value, log_decay, state = arguments()
    q, k, v, g = (x[:, 0].astype(jnp.bfloat16) for x in (query, key, value, log_decay))
    out, state = gated_linear_attention_step(q, k, v, g, state)
    assert out.dtype == jnp.bfloat16 and state.dtype == jnp.float32


def test_segments_equal_separate_rows_and_do_not_leak(op):
    query, key, value, log_decay, state = arguments(batch=1)
    borders = (0, 5, 6, 16, TIME)
    ids = jnp.asarray(np.searchsorted(borders, np.arange(TIME), side="right")[None], jnp.int32)
    out, final_state = op(query, key, value, log_decay, initial_state=state, segment_ids=ids)
    for start, stop in itertools.pairwise(borders):
        rows = [x[:, start:stop] for x in (query, key, value, log_decay)]
        alone, last_state = op(*rows, initial_state=state if start == 0 else None)
        assert_close(out[:, start:stop], alone)
    assert_close(final_state, last_state)

    def third_segment(*args):
        return jnp.sum(op(*args[:4], initial_state=args[4], segment_ids=ids)[0][:, 6:16] ** 2)

    *by_token, of_state = jax.grad(third_segment, argnums=(0, 1, 2, 3, 4))(query, key, value, log_decay, state)
    assert not np.any(of_state)
    for gradient in by_token:
        assert not np.any(gradient[:, :6]) and not np.any(gradient[:, 16:])
        assert np.any(gradient[:, 6:16])


def test_padding_leaves_the_state_untouched(op):
    query, key, value, log_decay, state = arguments()
    padded = [jnp.pad(x, ((0, 0), (0, 6), (0, 0), (0, 0)), constant_values=fill)
              for x, fill in ((query, 3.0), (key, 0.0), (value, 3.0), (log_decay, 0.0))]  # fmt: skip
    out, final_state = op(query, key, value, log_decay, initial_state=state)
    padded_out, padded_state = op(*padded, initial_state=state)
    assert_close((padded_out[:, :TIME], padded_state), (out, final_state))


def test_is_causal(op):
    """The gradient of the output at token t is 0 for every later token, and not for the earlier ones."""
    *args, state = arguments()
    args[3] = jnp.full_like(args[3], -0.1)
    jacobian = jax.jacrev(lambda *args: op(*args, initial_state=state)[0].sum(axis=(0, 2, 3)), argnums=(0, 1, 2, 3))(
        *args
    )
    for gradient in jacobian:  # [T of out, B, T of the argument, ...]
        seen = np.abs(gradient).sum(axis=(1, 3, 4)) > 0
        np.testing.assert_array_equal(seen, np.tril(seen))
    for gradient in jacobian[1:3]:
        np.testing.assert_array_equal(np.abs(gradient).sum(axis=(1, 3, 4)) > 0, np.tri(TIME, dtype=bool))


def test_gates_of_minus_infinity_have_no_gradient_and_the_others_do(op):
    args = arguments()
    gradient = np.asarray(gradients(op, *args)[3])
    gone = np.asarray(args[3]) < -100
    assert gone.any() and not gradient[gone].any()
    assert np.isfinite(gradient).all() and gradient[np.asarray(args[3]) == 0].all()


def test_jit_and_remat_change_nothing(op):
    args = arguments()
    expected = gradients(op, *args)
    assert_close(jax.jit(functools.partial(gradients, op))(*args), expected)
    assert_close(jax.jit(functools.partial(gradients, jax.checkpoint(op)))(*args), expected)


def test_vmap_equals_a_loop(op):
    """Over every argument but the gate, which is shared, and its gradient therefore summed."""
    many = [draw(3, *x.shape, seed=7) for x in arguments()]
    gate = arguments()[3]
    total = lambda *args: jax.vmap(functools.partial(loss, op), in_axes=(0, 0, 0, None, 0))(*args).sum()
    mapped = jax.grad(total, argnums=(0, 1, 2, 3, 4))(many[0], many[1], many[2], gate, many[4])
    one_by_one = [gradients(op, *(x[i] for x in many[:3]), gate, many[4][i]) for i in range(3)]
    stacked = [jnp.stack(parts) for parts in zip(*one_by_one, strict=True)]
    stacked[3] = stacked[3].sum(axis=0)
    assert_close(mapped, tuple(stacked))


def test_scan_over_pieces_equals_the_whole(op):
    def in_pieces(*args, initial_state):
        pieces = [jnp.moveaxis(x.reshape(BATCH, 3, TIME // 3, *x.shape[2:]), 1, 0) for x in args]

        def body(state, piece):
            out, state = op(*piece, initial_state=state)
            return state, out

        state, out = jax.lax.scan(body, initial_state, tuple(pieces))
        return jnp.moveaxis(out, 0, 1).reshape(BATCH, TIME, HEADS, VALUE), state

    args = arguments()
    assert_close(gradients(in_pieces, *args), gradients(op, *args))


@pytest.mark.parametrize("gate", ["of each token", "of each head", "none"])
@pytest.mark.parametrize("axis_type", [AxisType.Explicit, AxisType.Auto], ids=["explicit", "auto"])
def test_shard_map_over_batch_and_heads_equals_one_device(op, gate, axis_type):
    """Eight devices; the gate of each head is the same on all of them along the batch, its gradient their sum."""
    spec, state_spec = PartitionSpec("data", None, "tensor"), PartitionSpec("data", "tensor")
    args = list(arguments(batch=4))
    args[3] = {"of each token": args[3], "of each head": jnp.full((1, 1, HEADS, 1), -0.2), "none": None}[gate]
    gate_spec = {"of each token": spec, "of each head": PartitionSpec(None, None, "tensor"), "none": None}[gate]
    differentiable = (0, 1, 2, 4) if gate == "none" else (0, 1, 2, 3, 4)
    ids = jnp.asarray(np.arange(TIME) // 8 + np.zeros((4, 1)), jnp.int32)

    def whole(*args):
        return loss(op, *args, segment_ids=ids)

    def sharded(*args):
        def local(query, key, value, log_decay, initial_state, ids):
            return op(query, key, value, log_decay, initial_state=initial_state, segment_ids=ids)

        in_specs = (spec, spec, spec, gate_spec, state_spec, PartitionSpec("data"))
        mapped = jax.shard_map(local, in_specs=in_specs, out_specs=(spec, state_spec))
        lay_out = lambda x, spec: x if x is None else jax.sharding.reshard(x, spec) if explicit else x
        args = [lay_out(x, spec) for x, spec in zip((*args, ids), in_specs, strict=True)]
        out, state = mapped(*args)
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(state))

    explicit = axis_type == AxisType.Explicit
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(axis_type,) * 2)
    expected = jax.grad(whole, argnums=differentiable)(*args)
    with jax.set_mesh(mesh):
        actual = jax.jit(jax.grad(sharded, argnums=differentiable))(*args)
    assert_close(jax.device_get(actual), jax.device_get(expected))


def explicit_mesh():
    return jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)


ROWS_AND_HEADS = PartitionSpec("data", None, "tensor", None)


@pytest.mark.parametrize("gate", ["of each token", "of each head", "none"])
def test_arrays_laid_out_over_rows_and_heads_stay_where_they_are(op, gate):
    """The op on eight devices equals one device, and not a byte of its arguments is sent."""
    args = list(arguments(batch=4, heads=4, kv_heads=2))
    args[3] = {"of each token": args[3], "of each head": jnp.full((1, 1, 2, 1), -0.2), "none": None}[gate]
    differentiable = (0, 1, 2, 4) if gate == "none" else (0, 1, 2, 3, 4)
    gradient = jax.grad(functools.partial(loss, op), argnums=differentiable)
    expected = gradient(*args)
    with jax.set_mesh(explicit_mesh()):
        gate_spec = ROWS_AND_HEADS if gate == "of each token" else PartitionSpec(None, None, "tensor", None)
        specs = [ROWS_AND_HEADS] * 3 + [gate_spec, PartitionSpec("data", "tensor", None, None)]
        laid_out = [x if x is None else jax.sharding.reshard(x, spec) for x, spec in zip(args, specs, strict=True)]
        actual = jax.jit(gradient)(*laid_out)
        assert [jax.typeof(x).sharding.spec for x in actual] == [specs[i] for i in differentiable]
        assert [jax.typeof(x).sharding.spec for x in jax.jit(op)(*laid_out[:4])] == [specs[0], specs[4]]
        program = jax.jit(lambda *args: op(*args[:4], initial_state=args[4])).lower(*laid_out).compile().as_text()
    assert not [name for name in ("all-gather", "all-to-all", "all-reduce", "collective") if name in program]
    assert_close(jax.device_get(actual), jax.device_get(expected))


def test_steps_of_arrays_laid_out_over_rows_and_heads():
    query, key, value, log_decay, state = arguments(batch=4, heads=4, kv_heads=2)
    token = [x[:, 0] for x in (query, key, value, log_decay)]
    expected = gated_linear_attention_step(*token, state)
    with jax.set_mesh(explicit_mesh()):
        laid_out = [jax.sharding.reshard(x, PartitionSpec("data", "tensor")) for x in (*token, state)]
        actual = jax.jit(gated_linear_attention_step)(*laid_out)
    assert_close(jax.device_get(actual), jax.device_get(expected))


@pytest.mark.parametrize(
    ("platform", "implementation", "call"),
    [("cuda", "mosaic_gpu", "mosaic_gpu_v2"), ("tpu", "mosaic_tpu", "tpu_custom_call")],
    ids=["hopper", "tpu"],
)
def test_kernels_see_the_part_of_their_device(platform, implementation, call, monkeypatch):
    """4 rows and 4 heads on 4 x 2 devices: the kernel's output is of 1 row and 2 heads."""
    module = importlib.import_module(f"pallas_kernels.gated_linear_attention.{implementation}")
    monkeypatch.setattr(module, "unsupported", lambda *args, **kwargs: None)  # which asks for the devices of this test
    with jax.set_mesh(explicit_mesh()):
        like = jax.ShapeDtypeStruct((4, 256, 4, 128), jnp.bfloat16, sharding=ROWS_AND_HEADS)
        op = functools.partial(gated_linear_attention, implementation=implementation)
        program = jax.jit(op).trace(like, like, like, like).lower(lowering_platforms=(platform,)).as_text()
    (line,) = [line for line in program.splitlines() if f"@{call}(" in line]
    results = line.rsplit("->", 1)[1]
    assert "tensor<1x2x128x128xf32>" in results and "tensor<4x" not in results


def test_says_what_cannot_be_laid_out():
    args = arguments(batch=4, time=24, heads=4, kv_heads=1)[:4]
    with jax.set_mesh(explicit_mesh()):
        lay_out = lambda *spec: [jax.sharding.reshard(x, PartitionSpec(*spec)) for x in args]
        with pytest.raises(ValueError, match="laid out over mesh axis 'data' along its time"):
            gated_linear_attention(*lay_out(None, "data"))
        with pytest.raises(ValueError, match="must divide the 1 heads of key"):
            gated_linear_attention(jax.sharding.reshard(args[0], ROWS_AND_HEADS), *lay_out("data")[1:])


def test_program_size_does_not_grow_with_time(op):
    def lines(time):
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arguments(time=time)]
        return len(jax.jit(functools.partial(gradients, op)).lower(*shapes).as_text().splitlines())

    assert lines(16) == lines(4096)


def test_keeps_inputs_and_chunk_states_only():
    """What the backward pass holds on to, counted in floats; every other intermediate result is computed again."""
    args = arguments(time=64)
    _, pull_back = jax.vjp(
        functools.partial(gated_linear_attention, implementation="chunked", chunk_size=16), *args[:4]
    )
    kept = sum(x.size for x in jax.tree.leaves(pull_back) if jnp.issubdtype(x.dtype, jnp.floating))
    assert kept == sum(x.size for x in args[:4]) + 64 // 16 * BATCH * HEADS * KEY * VALUE


def test_same_call_same_bits(op):
    args = arguments()
    first, second = (jax.jit(functools.partial(gradients, op))(*args) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)
