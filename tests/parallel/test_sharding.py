import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from gla_jax.config import MeshConfig
from gla_jax.parallel.mesh import make_mesh
from gla_jax.parallel.sharding import (
    axis_size,
    in_mesh,
    max_shards,
    named_sharding,
    out_sharding,
    per_shard,
    shard,
    shard_index,
    spec,
    sum_shards,
    zeros,
)


@pytest.fixture
def mesh():
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        yield


def test_everything_is_the_identity_outside_a_mesh():
    x = jnp.ones((4, 2))
    assert not in_mesh()
    assert shard(x, "batch", "heads") is x
    assert out_sharding("batch") is None and named_sharding("batch") is None
    assert axis_size("batch") == 1 and spec("batch", None) == PartitionSpec(None, None)
    function = lambda x, y: (x, sum_shards(x, "batch"), max_shards(x, "vocab"), shard_index("vocab"), y)
    assert per_shard(function, (("batch", None), ()), None)(x, None) == (x, x, x, 0, None)


@pytest.mark.usefixtures("mesh")
def test_names_are_mapped_to_the_axes_of_the_mesh():
    assert in_mesh() and axis_size("batch") == 4 and axis_size("time") == 1
    assert spec("batch", "hidden", "heads") == PartitionSpec(("data", "fsdp"), None, "tensor")
    assert spec("time", "layers") == PartitionSpec(None, None), "an axis of size 1 cuts nothing"
    assert named_sharding("embed").mesh == jax.sharding.get_mesh()
    assert jax.typeof(zeros((4, 2), jnp.bfloat16, "batch", "heads")).sharding.spec == spec("batch", "heads")
    with pytest.raises(KeyError, match="bach"):
        spec("bach")


def test_a_mesh_may_lack_axes():
    with jax.set_mesh(jax.make_mesh((8,), ("data",), (AxisType.Explicit,))):
        assert spec("batch", "heads") == PartitionSpec("data", None)
        assert shard(jnp.ones((8, 2)), "batch", "heads").sharding.spec == PartitionSpec("data", None)


def test_a_mesh_of_automatic_axes_is_left_alone():
    with jax.set_mesh(jax.make_mesh((8,), ("data",), (AxisType.Auto,))):
        assert not in_mesh()
        x = jnp.ones((8, 2))
        assert shard(x, "batch", None) is x


@pytest.mark.usefixtures("mesh")
def test_functions_run_on_parts():
    x, y = np.arange(32.0).reshape(8, 4), np.arange(4.0)
    shapes = []

    def local(x, nothing, y):
        shapes.append((x.shape, nothing, y.shape))
        return {"product": x * y, "sum": sum_shards(jnp.sum(x, axis=0), "batch")}

    run = per_shard(
        local, (("batch", "heads"), ("batch",), ("heads",)), {"product": ("batch", "heads"), "sum": ("heads",)}
    )
    result = jax.jit(run, static_argnums=1)(x, None, y)
    assert shapes == [((2, 2), None, (2,))]
    np.testing.assert_array_equal(result["product"], x * y)
    np.testing.assert_array_equal(result["sum"], x.sum(0))
    assert result["product"].sharding.spec == spec("batch", "heads")


@pytest.mark.usefixtures("mesh")
def test_gradients_through_parts_are_those_of_the_whole():
    x, y = jnp.arange(32.0).reshape(8, 4), jnp.arange(4.0)
    run = per_shard(lambda x, y: jnp.sin(x * y), (("batch", "heads"), ("heads",)), ("batch", "heads"))
    computed = jax.jit(jax.grad(lambda x, y: jnp.sum(run(x, y)), (0, 1)))(x, y)
    wanted = jax.grad(lambda x, y: jnp.sum(jnp.sin(x * y)), (0, 1))(x, y)
    for gradient, truth in zip(computed, wanted, strict=True):
        np.testing.assert_allclose(gradient, jax.device_get(truth), rtol=1e-5)


@pytest.mark.usefixtures("mesh")
def test_sums_over_devices_can_stay_sharded():
    x = np.arange(64.0).reshape(8, 8)

    def local(x):
        whole = jnp.sum(x[:, None], axis=0)  # [1, 8 / tensor]
        tall = jnp.broadcast_to(whole, (4, whole.shape[1]))
        return sum_shards(tall, "batch", scatter={0: "embed"}), max_shards(jnp.max(x), "batch", "heads")

    run = per_shard(local, (("batch", "heads"),), (("embed", "heads"), ()))
    total, largest = jax.jit(run)(x)
    np.testing.assert_array_equal(total, np.broadcast_to(x.sum(0), (4, 8)))
    assert total.sharding.spec == spec("embed", "heads")
    assert largest == 63
    index = per_shard(lambda x: x * 0 + shard_index("heads"), (("heads",),), ("heads",))(jnp.zeros(4))
    np.testing.assert_array_equal(index, [0, 0, 1, 1])
