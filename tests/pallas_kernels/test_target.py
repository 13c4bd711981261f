"""The choice of a kernel goes by what a program is compiled for, not by the machine that compiles it."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import gated_linear_attention
from pallas_kernels.target import Target, target

V5E = jax.sharding.AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")


def elsewhere(axis_type: jax.sharding.AxisType) -> jax.sharding.AbstractMesh:
    return jax.sharding.AbstractMesh((4,), ("x",), axis_types=(axis_type,), abstract_device=V5E)


def test_without_a_mesh_it_is_the_default_device() -> None:
    assert target() == Target("cpu", "cpu")
    with jax.default_device(jax.devices()[3]):
        assert target() == Target("cpu", "cpu")
    with jax.default_device("cpu"):
        assert target() == Target("cpu", "cpu")


@pytest.mark.parametrize("axis_type", jax.sharding.AxisType)
def test_with_a_mesh_it_is_the_mesh(axis_type: jax.sharding.AxisType) -> None:
    with jax.sharding.use_abstract_mesh(elsewhere(axis_type)):
        assert target() == Target("tpu", "TPU v5 lite")
    assert target() == Target("cpu", "cpu")


def test_a_mesh_of_tpus_gets_the_tpu_kernel_on_any_machine() -> None:
    x = jax.ShapeDtypeStruct((4, 256, 2, 128), jnp.bfloat16)
    local = lambda *arrays: gated_linear_attention(*arrays)[0]
    with jax.sharding.use_abstract_mesh(elsewhere(jax.sharding.AxisType.Auto)):
        mapped = jax.shard_map(local, in_specs=jax.P("x"), out_specs=jax.P("x"), check_vma=False)
        program = str(jax.make_jaxpr(jax.checkpoint(mapped))(x, x, x, x))
    assert "pallas_call" in program
    assert "pallas_call" not in str(jax.make_jaxpr(local)(x, x, x, x))
