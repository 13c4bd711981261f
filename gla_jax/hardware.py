"""What one device can do and hold: the one table of hardware, by what the device calls itself."""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Device:
    """One `jax.Device`: on most TPUs a chip, on tpu7x half of one."""

    flops: float
    """Dense bfloat16 products and sums per second, from the vendor's data sheet."""
    memory: int
    """Bytes for programs: on TPUs what libtpu 0.0.48 lets one have, on GPUs what nvidia-smi shows."""


DEVICES = {
    # By the start of the kind; the longest that fits counts.
    "TPU v4": Device(275e12, round(30.75 * GIB)),
    "TPU v5 lite": Device(197e12, round(15.75 * GIB)),
    "TPU v5e": Device(197e12, round(15.75 * GIB)),
    "TPU v5p": Device(459e12, round(95.73 * GIB)),
    "TPU v5": Device(459e12, round(95.73 * GIB)),  # what v5p calls itself
    "TPU v6 lite": Device(918e12, round(31.24 * GIB)),
    "TPU v6e": Device(918e12, round(31.24 * GIB)),
    "TPU7x": Device(1153.5e12, round(94.74 * GIB)),
    "NVIDIA A100": Device(312e12, 40 * GIB),
    "NVIDIA A100-SXM4-80GB": Device(312e12, 80 * GIB),
    "NVIDIA A100 80GB": Device(312e12, 80 * GIB),
    "NVIDIA L4": Device(121e12, round(22.5 * GIB)),
    "NVIDIA H100 PCIe": Device(756e12, round(79.6 * GIB)),
    "NVIDIA H100": Device(989e12, round(79.6 * GIB)),
    "NVIDIA H200": Device(989e12, round(140.4 * GIB)),
    "NVIDIA B200": Device(2250e12, round(179.1 * GIB)),
}


def find_device(kind: str) -> Device | None:
    """Return what is known of devices of a kind, which is `jax.Device.device_kind`; None if nothing is."""
    kinds = [known for known in DEVICES if kind.startswith(known)]
    return DEVICES[max(kinds, key=len)] if kinds else None


def peak_flops(kind: str) -> float | None:
    """Return the most bfloat16 FLOPs a second that such a device can do; None if it is not in the table."""
    device = find_device(kind)
    return None if device is None else device.flops
