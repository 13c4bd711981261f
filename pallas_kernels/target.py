"""The devices that a program is traced for: the one place where anything asks, so that all choices agree.

The default backend is the wrong thing to ask: a program may be compiled for devices that this machine does not have.
"""

from typing import NamedTuple

import jax


class Target(NamedTuple):
    """A kind of device."""

    platform: str
    """"cpu", "gpu" or "tpu"."""
    kind: str
    """What the device calls itself, e.g. "TPU v5 lite"."""


def target() -> Target:
    """Return the devices of the current mesh (`jax.set_mesh`, `jax.shard_map`), or else JAX's default device."""
    described = jax.sharding.get_abstract_mesh().abstract_device
    if described is not None:
        return Target(described.platform, described.device_kind)
    device = jax.config.jax_default_device
    if device is None or isinstance(device, str):
        device = jax.devices(device)[0]
    return Target(device.platform, device.device_kind)


def not_hopper() -> str | None:
    """Return why a kernel for Hopper GPUs would not run there, in one sentence, or None."""
    platform, kind = target()
    if platform != "gpu":
        return f"it would run on {kind}; the kernels need a Hopper GPU."
    device = jax.devices("gpu")[0]
    if getattr(device, "compute_capability", None) != "9.0":
        return f"the GPU is {device.device_kind}; the kernels need a Hopper GPU (compute capability 9.0)."
    return None
