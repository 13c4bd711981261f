"""Names of TPU slices: those that exist, and the nearest to those that do not. None of it needs libtpu."""

import importlib.util

import pytest

from gla_jax.config import ConfigError
from gla_jax.parallel import topology


@pytest.mark.parametrize(
    ("name", "cure"),
    [
        ("v5e:16x15", "did you mean v5e:16x16 or v5e:8x16 or v5e:8x8?"),
        ("v5e-256", "did you mean v5e:16x16?"),
        ("v5litepod-16", "did you mean v5e:4x4?"),
        ("v5p-256", "did you mean v5p:4x4x8?"),  # 256 cores are 128 chips
        ("v5p:8x4x4", "did you mean v5p:4x4x8?"),
        ("v7x:2x2x1", "did you mean tpu7x:2x2x1?"),
        ("v5e", "did you mean v5e:4x4?"),
        ("v6e:0x4", "did you mean v6e:1x1?"),
        ("h100:8", "slices are named like v4:4x4x4, v5e:4x8, v5p:4x4x4, v6e:4x8, tpu7x:4x4x4."),
        ("", "slices are named like"),
    ],
)
def test_an_unknown_slice_gets_the_nearest_names(name: str, cure: str) -> None:
    with pytest.raises(ConfigError) as caught:
        topology.tpu_devices(name)
    assert str(caught.value).startswith(f"--topology={name} is no TPU slice; {cure}")


@pytest.mark.parametrize("name", ["v5e:1x1", "v5e:16x16", "v5p:4x4x8", "v5p:4x4x12", "v4:2x2x1", "tpu7x:2x2x1"])
def test_without_libtpu_it_is_said_how_to_get_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"libtpu, which is not installed: pip install 'gla-jax\[tpu\]'"):
        topology.tpu_devices(name)
