"""What is known of devices, by what they call themselves."""

import pytest

from gla_jax.hardware import GIB, find_device, peak_flops


@pytest.mark.parametrize(
    ("kind", "peak", "memory"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12, 79.6),
        ("NVIDIA H100 PCIe", 756e12, 79.6),
        ("NVIDIA H200", 989e12, 140.4),
        ("NVIDIA A100-SXM4-40GB", 312e12, 40),
        ("NVIDIA A100-SXM4-80GB", 312e12, 80),
        ("TPU v5 lite", 197e12, 15.75),
        ("TPU v5", 459e12, 95.73),
        ("TPU v6 lite", 918e12, 31.24),
        ("TPU7x", 1153.5e12, 94.74),
    ],
)
def test_devices_are_known_by_kind(kind: str, peak: float, memory: float) -> None:
    device = find_device(kind)
    assert device is not None and peak_flops(kind) == device.flops == peak
    assert device.memory == round(memory * GIB)


@pytest.mark.parametrize("kind", ["cpu", "TPU v99", "NVIDIA"])
def test_nothing_is_made_up(kind: str) -> None:
    assert find_device(kind) is None and peak_flops(kind) is None
