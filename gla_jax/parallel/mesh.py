"""The mesh that everything runs on: always four explicit axes, each of size 1 on a laptop."""

import contextlib
import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding

from gla_jax.config import ConfigError, MeshConfig
from gla_jax.parallel.sharding import axis_size, spec

_PATIENCE = 60  # seconds without a sign of life of a process, until the others give up


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
    sizes = resolve_sizes(config, len(devices))
    explicit = (AxisType.Explicit,) * len(sizes)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        try:
            return jax.make_mesh(tuple(sizes.values()), tuple(sizes), explicit, devices=devices)
        except NotImplementedError:  # JAX will not cut a dimension of this TPU's torus in two
            raise ConfigError(_does_not_lie(sizes, devices)) from None
    outer = next((name for name in ("data", "fsdp") if sizes[name] % slices == 0), None)
    if outer is None:
        raise ConfigError(
            f"mesh.data={sizes['data']} and mesh.fsdp={sizes['fsdp']} cannot span {slices} slices; "
            f"make one of them a multiple of {slices}."
        )
    across = {name: slices if name == outer else 1 for name in sizes}
    within = [sizes[name] // across[name] for name in sizes]
    return Mesh(mesh_utils.create_hybrid_device_mesh(within, list(across.values()), devices), tuple(sizes), explicit)


def _does_not_lie(sizes: dict[str, int], devices: Sequence[jax.Device]) -> str:
    """Say that the mesh cannot be laid out on the network of the devices, and which ones nearby can."""
    both = sizes["data"] * sizes["fsdp"]
    fits = []
    for data in (data for data in range(1, both + 1) if both % data == 0):
        with contextlib.suppress(NotImplementedError):
            jax.make_mesh((data, both // data, *list(sizes.values())[2:]), tuple(sizes), devices=devices)
            fits.append(data)
    near = sorted(sorted(fits, key=lambda data: abs(math.log(data / sizes["data"])))[:3])
    cure = " or ".join(f"mesh.data={data} with mesh.fsdp={both // data}" for data in near)
    return (
        f"mesh {' x '.join(map(str, sizes.values()))} (data, fsdp, sequence, tensor) cannot be laid out on the torus "
        f"of {len(devices)} {devices[0].device_kind}, as each axis must span whole dimensions of it; "
        + (f"try {cure}." if cure else "try sizes that are products of those dimensions.")
    )


def resolve_sizes(config: MeshConfig, device_count: int) -> dict[str, int]:
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
            f"mesh sizes {product}={known} do not divide the {device_count} devices, so none are left for "
            f"mesh.{wild[0]}=-1; use sizes whose product divides {device_count}."
        )
    elif known != device_count:
        raise ConfigError(
            f"mesh.data*fsdp*sequence*tensor={product}={known} does not fit the number of devices, {device_count}; "
            "set one of them to -1 to take whatever is left."
        )
    return sizes


def check_batch(batch_size: int, sequence_length: int, accumulation_steps: int) -> None:
    """Raise ConfigError if the current mesh cannot split batches evenly.

    Args:
        batch_size: rows of all processes together.
        sequence_length: tokens in a row.
        accumulation_steps: microbatches that a batch is split into first.
    """
    parts = accumulation_steps * axis_size("batch")
    if batch_size % parts:
        below = batch_size // parts * parts
        near = " or ".join(str(size) for size in (below, below + parts) if size)
        raise ConfigError(
            f"data.batch_size={batch_size} does not divide by mesh.data*mesh.fsdp={axis_size('batch')}"
            + (f" times optimizer.accumulation_steps={accumulation_steps}" if accumulation_steps > 1 else "")
            + f"; try {near}."
        )
    if sequence_length % axis_size("time"):
        raise ConfigError(
            f"data.sequence_length={sequence_length} does not divide by mesh.sequence={axis_size('time')}; "
            f"try {sequence_length // axis_size('time') * axis_size('time')}."
        )


def process_rows(batch_size: int) -> tuple[int, int]:
    """Say which part of a batch's rows this process holds on the current mesh.

    Processes that hold the same rows (when a sequence or tensor group spans several) get the same part.

    Args:
        batch_size: rows of all processes together, B.

    Returns:
        The index of the part, and how many there are; all have the same size.
    """
    sharding = NamedSharding(jax.sharding.get_mesh(), spec("batch"))
    held: dict[int, set[int]] = {}
    for device, (rows,) in sharding.devices_indices_map((batch_size,)).items():
        process = device.process_index  # type: ignore[attr-defined]
        held.setdefault(process, set()).update(range(*rows.indices(batch_size)))
    parts = sorted({tuple(sorted(rows)) for rows in held.values()})
    return parts.index(tuple(sorted(held[jax.process_index()]))), len(parts)


def place_batch(batch: dict[str, np.ndarray], batch_size: int) -> dict[str, jax.Array]:
    """Put this process's rows of a batch on its devices.

    Args:
        batch: arrays [b, T], the part of the rows that `process_rows` names.
        batch_size: rows of all processes together, B.

    Returns:
        Arrays [B, T], laid out over the mesh.
    """
    sharding = NamedSharding(jax.sharding.get_mesh(), spec("batch", "time"))
    return {
        name: jax.make_array_from_process_local_data(sharding, rows, (batch_size, *rows.shape[1:]))
        for name, rows in batch.items()
    }


def join_cluster(*, required: bool, coordinator: str | None = None, process: str | None = None) -> None:
    """Join the other processes of a cluster that JAX knows how to find (SLURM, Cloud TPU, Kubernetes, MPI), or is told.

    To be called before anything else touches a device. A process that dies or stands still ends all others within
    `_PATIENCE` seconds, with a message of JAX's that names it; so does one that fails and leaves.

    Args:
        required: whether it is an error if there is no cluster.
        coordinator: "address:port" of process 0, where no cluster can be found.
        process: then "index/count", e.g. "0/2".

    Raises:
        ConfigError: no cluster was found, though one is required, or one is described wrongly.
    """
    told: dict[str, Any] = {}
    if coordinator is not None or process is not None:
        place = re.fullmatch(r"(\d+)/(\d+)", process or "")
        if coordinator is None or not re.fullmatch(r".+:\d+", coordinator):
            raise ConfigError(f"--coordinator={coordinator} must be address:port of process 0, e.g. 192.168.1.10:9876.")
        if place is None or int(place[1]) >= int(place[2]):
            raise ConfigError(f"--process={process} must be index/count, e.g. 0/2 and 1/2 for two processes.")
        told = {"coordinator_address": coordinator, "process_id": int(place[1]), "num_processes": int(place[2])}
    try:
        jax.distributed.initialize(**told, heartbeat_timeout_seconds=_PATIENCE)
    except ValueError as error:  # "coordinator_address should be defined": nothing was found
        if required:
            raise ConfigError(f"--distributed=on, but no cluster was found: {error}") from None
