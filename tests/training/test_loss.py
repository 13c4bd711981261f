import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gla_jax.config import MeshConfig
from gla_jax.parallel.mesh import make_mesh
from gla_jax.parallel.sharding import shard
from gla_jax.training.loss import cross_entropy

B, T, D, VOCAB = 8, 6, 16, 40


def inputs(seed=0):
    random = np.random.default_rng(seed)
    hidden = jnp.asarray(random.normal(size=(B, T, D)), jnp.float32)
    head = jnp.asarray(random.normal(size=(D, VOCAB)), jnp.float32)
    targets = jnp.asarray(random.integers(0, VOCAB, (B, T)), jnp.int32)
    weights = jnp.asarray(random.uniform(size=(B, T)) * (random.uniform(size=(B, T)) > 0.3), jnp.float32)
    return hidden, head, targets, weights


def truth(hidden, head, targets, weights, z_loss):
    """Return the sums and the gradients of their total, in float64."""
    hidden, head, weights = (np.asarray(x, np.float64) for x in (hidden, head, weights))
    logits = hidden @ head
    log_z = np.log(np.sum(np.exp(logits - logits.max(-1, keepdims=True)), -1)) + logits.max(-1)
    one_hot = np.eye(VOCAB)[targets]
    nll = log_z - np.sum(logits * one_hot, -1)
    sums = {
        "nll": np.sum(weights * nll),
        "z_loss": z_loss * np.sum(weights * log_z**2),
        "weight": np.sum(weights),
        "correct": np.sum(weights * (np.argmax(logits, -1) == targets)),
    }
    slope = np.exp(logits - log_z[..., None]) * (1 + 2 * z_loss * log_z)[..., None] - one_hot
    slope = slope * weights[..., None]
    gradients = slope @ head.T, np.einsum("btd,btv->dv", hidden, slope), nll + z_loss * log_z**2
    return sums, gradients


def compute(hidden, head, targets, weights, **options):
    """Return the sums and the gradients of three times the total."""

    def run(*arguments):
        total, sums = cross_entropy(*arguments, **options)
        return 3 * total, (total, sums)

    run = jax.jit(jax.value_and_grad(run, argnums=(0, 1, 3), has_aux=True))
    (_, (total, sums)), gradients = run(hidden, head, targets, weights)
    return total, sums, [gradient / 3 for gradient in gradients]


def assert_close(x, wanted, tolerance=2e-5):
    assert np.sqrt(np.mean((np.asarray(x, np.float64) - wanted) ** 2) / np.mean(np.square(wanted))) < tolerance


@pytest.mark.parametrize(("chunk_tokens", "z_loss"), [(None, 0.0), (48, 0.1), (5, 0.1), (1, 1e-4), (1000, 0.1)])
def test_equals_the_formula_in_value_and_gradients(chunk_tokens, z_loss):
    arguments = inputs()
    total, sums, gradients = compute(*arguments, chunk_tokens=chunk_tokens, z_loss=z_loss)
    wanted_sums, wanted_gradients = truth(*arguments, z_loss)
    assert sums.keys() == wanted_sums.keys()
    for name, wanted in wanted_sums.items():
        np.testing.assert_allclose(sums[name], wanted, rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(total, wanted_sums["nll"] + wanted_sums["z_loss"], rtol=1e-5)
    for gradient, wanted in zip(gradients, wanted_gradients, strict=True):
        assert_close(gradient, wanted)
    # without a gradient, the same values
    alone, alone_sums = jax.jit(lambda *x: cross_entropy(*x, chunk_tokens=chunk_tokens, z_loss=z_loss))(*arguments)
    np.testing.assert_allclose(alone, total, rtol=1e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), alone_sums, sums)


def test_large_logits_and_tokens_without_weight_stay_finite():
    hidden, head, targets, weights = inputs()
    total, _, gradients = compute(1e4 * hidden, head, targets, weights.at[0].set(0))
    assert np.isfinite(total) and all(np.all(np.isfinite(gradient)) for gradient in gradients)
    np.testing.assert_array_equal(gradients[0][0], 0)
    total, sums, gradients = compute(hidden, head, targets, jnp.zeros_like(weights), chunk_tokens=7)
    assert total == 0 and sums["weight"] == 0 and not np.any(gradients[0]) and not np.any(gradients[1])


@pytest.mark.parametrize(
    "sizes", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"sequence": 2, "tensor": 4}], ids=lambda s: "-".join(s)
)
def test_a_mesh_equals_one_device(sizes):
    arguments = inputs()
    wanted_sums, wanted_gradients = truth(*arguments, 0.1)
    axes = (("batch", "time", None), ("embed", "vocab"), ("batch", "time"), ("batch", "time"))
    with jax.set_mesh(make_mesh(MeshConfig(**{"fsdp": 1} | sizes))):
        placed = [shard(x, *names) for x, names in zip(arguments, axes, strict=True)]
        _, sums, gradients = compute(*placed, z_loss=0.1, chunk_tokens=4)
        for gradient, x in zip(gradients, (placed[0], placed[1], placed[3]), strict=True):
            assert gradient.sharding == x.sharding
    for name, wanted in wanted_sums.items():
        np.testing.assert_allclose(sums[name], wanted, rtol=1e-5, err_msg=name)
    for gradient, wanted in zip(gradients, wanted_gradients, strict=True):
        assert_close(gradient, wanted)


@pytest.mark.parametrize("sizes", [None, {"fsdp": 2, "sequence": 2, "tensor": 2}], ids=["one device", "mesh"])
def test_tokens_without_weight_may_be_left_out(sizes):
    hidden, head, targets, weights = inputs()
    weights = weights.at[:, 4:].set(0).at[0].set(0).at[1, 0].set(0).at[1, 5].set(2)  # at most 4 in a row, one has none
    wanted_sums, (d_hidden, d_head, _) = truth(hidden, head, targets, weights, 0.1)
    with jax.set_mesh(make_mesh(MeshConfig(**{"fsdp": 1} | (sizes or {})), None if sizes else jax.devices()[:1])):
        placed = [shard(x, "batch", "time", *[None] * (x.ndim - 2)) for x in (hidden, targets, weights)]
        arguments = placed[0], shard(head, "embed", "vocab"), *placed[1:]
        _, sums, gradients = compute(*arguments, z_loss=0.1, most_scored=4, chunk_tokens=3)
    for name, wanted in wanted_sums.items():
        np.testing.assert_allclose(sums[name], wanted, rtol=1e-5, err_msg=name)
    assert_close(gradients[0], d_hidden)
    assert_close(gradients[1], d_head)


def test_bfloat16_products_are_summed_in_float32():
    hidden, head, targets, weights = inputs()
    arguments = (hidden.astype(jnp.bfloat16), head, targets, weights)
    total, _, gradients = compute(*arguments, chunk_tokens=4)
    assert [x.dtype for x in gradients] == [jnp.bfloat16, jnp.float32, jnp.float32]
    wanted_sums, wanted_gradients = truth(
        arguments[0].astype(jnp.float32), head.astype(jnp.bfloat16).astype(jnp.float32), targets, weights, 0.0
    )
    np.testing.assert_allclose(total, wanted_sums["nll"], rtol=1e-5)
    for gradient, wanted, tolerance in zip(gradients, wanted_gradients, (8e-3, 4e-3, 1e-5), strict=True):
        assert_close(gradient.astype(jnp.float32), wanted, tolerance)


def test_memory_does_not_grow_with_tokens_times_vocabulary():
    def temporary_bytes(tokens, vocab, gradient):
        shapes = [((1, tokens, 4), jnp.float32), ((4, vocab), jnp.float32), ((1, tokens), jnp.int32)]
        arguments = [jax.ShapeDtypeStruct(*shape) for shape in [*shapes, ((1, tokens), jnp.float32)]]
        total = lambda *arguments: cross_entropy(*arguments, chunk_tokens=256)[0]
        run = jax.grad(total, argnums=(0, 1)) if gradient else total
        return jax.jit(run).lower(*arguments).compile().memory_analysis().temp_size_in_bytes

    for gradient in (False, True):
        small, large = (temporary_bytes(tokens, 8192, gradient) for tokens in (1024, 16384))
        logits = 4 * 16384 * 8192
        assert large < logits / 16
        assert large - small < 64 * (16384 - 1024)  # bytes per token, of which the logits alone would be 32768


def test_shapes_that_do_not_fit_are_refused():
    hidden, head, targets, weights = inputs()
    with pytest.raises(ValueError, match=r"targets \(8, 5\) and weights \(8, 6\) must have the shape \[B, T\]"):
        cross_entropy(hidden, head, targets[:, 1:], weights)
    with pytest.raises(ValueError, match=r"head \(40, 16\) must be \[D, vocab\]"):
        cross_entropy(hidden, head.T, targets, weights)
