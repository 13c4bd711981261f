"""The mesh that everything runs on: always four explicit axes, each of size 1 on a laptop."""

import dataclasses
import math
from collections.abc import Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding

from gla_jax.config import ConfigError, MeshConfig


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Lay devices out as (data, fsdp, sequence, tensor), the axes that talk most innermost, where links are fastest.

    Over several TPU slices, which only a slower network joins, the data axis (or else fsdp) spans the slices.

    Args:
        config: sizes of the axes.
        devices: None is all there are.

    Raises:
        ConfigError: the sizes do not fit the devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = axis_sizes(config, len(devices))
    explicit = (AxisType.Explicit,) * len(sizes)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return jax.make_mesh(tuple(sizes.values()), tuple(sizes), explicit, devices=devices)
    outer = next((name for name in ("data", "fsdp") if sizes[name] % slices == 0), None)
    if outer is None:
        raise ConfigError(
            f"mesh.data={sizes['data']} and mesh.fsdp={sizes['fsdp']} cannot span {slices} slices; "
            f"make one of them a multiple of {slices}."
        )
    across = {name: slices if name == outer else 1 for name in sizes}
    within = [sizes[name] // across[name] for name in sizes]
    return Mesh(mesh_utils.create_hybrid_device_mesh(within, list(across.values()), devices), tuple(sizes), explicit)


def axis_sizes(config: MeshConfig, device_count: int) -> dict[str, int]:
    """Return the size of each axis, with -1 replaced by what is left of the devices.

    Raises:
        ConfigError: the sizes do not fit that many devices.
    """
    sizes = dataclasses.asdict(config)
    wild = [name for name, size in sizes.items() if size == -1]
    known = math.prod(size for size in sizes.values() if size != -1)
    for name, size in sizes.items():
        if size < 1 and size != -1:
            raise ConfigError(f"mesh.{name}={size} must be at least 1, or -1 for whatever is left.")
    if len(wild) > 1:
        raise ConfigError(f"mesh.{wild[0]} and mesh.{wild[1]} are both -1; only one can be whatever is left.")
    product = "*".join(f"{size}" for size in sizes.values() if size != -1)
    if wild and device_count % known == 0:
        sizes[wild[0]] = device_count // known
    elif wild:
        raise ConfigError(
            f"mesh sizes {product}={known} do not divide the {device_count} devices, so mesh.{wild[0]}=-1 has no value; "
            f"there are {device_count} devices to share out."
        )
    elif known != device_count:
        raise ConfigError(
            f"mesh.data*fsdp*sequence*tensor={product}={known} does not fit the number of devices, {device_count}; "
            "set one of them to -1 to take whatever is left."
        )
    return sizes


def process_rows(sharding: NamedSharding, shape: tuple[int, int]) -> tuple[int, int]:
    """Say which part of a batch's rows this process holds.

    Processes whose devices hold the same rows (those of one tensor or sequence group) are given the same part.

    Args:
        sharding: of the batch, [B, T].
        shape: (B, T).

    Returns:
        The index of the part, and the number of parts; all have the same size.
    """
    held: dict[int, set[int]] = {}
    for device, (rows, _) in sharding.devices_indices_map(shape).items():
        held.setdefault(device.process_index, set()).update(range(*rows.indices(shape[0])))
    parts = sorted({tuple(sorted(rows)) for rows in held.values()})
    return parts.index(tuple(sorted(held[jax.process_index()]))), len(parts)
