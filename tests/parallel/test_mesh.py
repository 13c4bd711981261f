"""Meshes: sizes that fit the devices or say why not, and rows that land where they belong."""

import jax
import numpy as np
import pytest

from gla_jax.config import ConfigError, MeshConfig
from gla_jax.parallel.mesh import check_batch, make_mesh, place_batch, process_rows, resolve_sizes


@pytest.mark.parametrize(
    ("config", "devices", "sizes"),
    [
        (MeshConfig(), 1, (1, 1, 1, 1)),
        (MeshConfig(), 8, (1, 8, 1, 1)),
        (MeshConfig(data=-1, fsdp=2, tensor=2), 8, (2, 2, 1, 2)),
        (MeshConfig(data=2, fsdp=2, sequence=2, tensor=1), 8, (2, 2, 2, 1)),
    ],
)
def test_minus_one_is_whatever_is_left(config: MeshConfig, devices: int, sizes: tuple[int, ...]) -> None:
    assert resolve_sizes(config, devices) == dict(zip(("data", "fsdp", "sequence", "tensor"), sizes, strict=True))


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (MeshConfig(fsdp=3), "mesh.data*fsdp*sequence*tensor=1*3*1*1=3 does not fit the number of devices, 8"),
        (MeshConfig(fsdp=16), "=16 does not fit the number of devices, 8"),
        (MeshConfig(data=-1), "mesh.data and mesh.fsdp are both -1"),
        (MeshConfig(tensor=3), "=3 do not divide the 8 devices"),
        (MeshConfig(tensor=0), "mesh.tensor=0 must be at least 1, or -1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(config: MeshConfig, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_sizes(config, 8)
    assert sentence in str(caught.value)


def test_axes_are_explicit_and_in_order() -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    assert mesh.axis_names == ("data", "fsdp", "sequence", "tensor")
    assert mesh.devices.shape == (2, 2, 1, 2)
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Explicit}
    assert make_mesh(MeshConfig(), jax.devices()[:1]).devices.shape == (1, 1, 1, 1)


def test_batches_that_do_not_split_are_refused() -> None:
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, sequence=2))):
        check_batch(8, 16, 2)
        with pytest.raises(ConfigError, match=r"data.batch_size=10 .* mesh.data\*mesh.fsdp=4; try 8 or 12"):
            check_batch(10, 16, 1)
        with pytest.raises(ConfigError, match=r"optimizer.accumulation_steps=3; try 12"):
            check_batch(4, 16, 3)
        with pytest.raises(ConfigError, match=r"data.sequence_length=15 .* mesh.sequence=2; try 14"):
            check_batch(8, 15, 1)


def test_rows_are_spread_over_data_and_fsdp() -> None:
    rows = np.arange(8 * 4, dtype=np.int32).reshape(8, 4)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, sequence=2))):
        assert process_rows(8) == (0, 1)
        placed = place_batch({"inputs": rows}, 8)["inputs"]
    np.testing.assert_array_equal(placed, rows)
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 2)}
