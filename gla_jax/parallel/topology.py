"""TPU slices by name, described by libtpu, which needs none of them."""

import difflib
import importlib.util
import math
import re
from collections.abc import Sequence

import jax
from jax.experimental import topologies

from gla_jax.config import ConfigError

_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBIC = (
    *("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8"),
    *("4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16"),
)
# What Google Cloud offers, in chips; those of three dimensions come in other multiples of 4 as well.
TOPOLOGIES = {"v4": _CUBIC, "v5e": _FLAT, "v5p": (*_CUBIC, "16x16x24"), "v6e": _FLAT, "tpu7x": _CUBIC}
_OTHER_NAMES = {"v5litepod": "v5e", "v5lite": "v5e", "v6": "v6e", "v7": "tpu7x", "v7x": "tpu7x", "7x": "tpu7x"}
_CORES_IN_NAMES = ("v4", "v5p")  # whose accelerator types ("v5p-256") count two cores for each chip


def tpu_devices(name: str) -> Sequence[jax.Device]:
    """Return the devices of a TPU slice, good for compiling and for nothing else.

    Args:
        name: generation and shape, "v5e:16x16".

    Raises:
        ConfigError: there is no such slice, or no libtpu to describe it.
    """
    generation, _, shape = name.partition(":")
    if not _is_known(generation, shape):
        raise ConfigError(f"--topology={name} is no TPU slice; {_nearest(name)}")
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            f"--topology={name} needs the TPU compiler, libtpu, which is not installed: pip install 'gla-jax[tpu]' "
            "(no TPU is needed)."
        )
    options: dict[str, object] = {}
    if shape == "1x1":
        options["chips_per_host_bounds"] = [1, 1, 1]
    if generation == "v4":
        options["chip_config_name"] = "megacore"  # a device for each chip, as on Google Cloud, not for each core
    return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices


def _is_known(generation: str, shape: str) -> bool:
    shapes = TOPOLOGIES.get(generation, ())
    if shape in shapes:
        return True
    return shapes[:1] == _CUBIC[:1] and bool(re.fullmatch(r"\d+x\d+x\d+", shape)) and _in_fours(shape, shapes[-1])


def _in_fours(shape: str, largest: str) -> bool:
    sizes = [int(size) for size in shape.split("x")]
    return all(size and size % 4 == 0 for size in sizes) and sizes == sorted(sizes) and _chips(shape) <= _chips(largest)


def _chips(shape: str) -> int:
    return math.prod(int(size) for size in shape.split("x"))


def _nearest(name: str) -> str:
    """Say which slices are most like what was asked for."""
    match = re.fullmatch(r"([a-z]*\d*[a-z]*)[:\-=_]?(\d*(?:x\d+)*)", name.lower())
    word, shape = (match[1], match[2]) if match else (name.lower(), "")
    word = _OTHER_NAMES.get(word, word)
    generation = next(iter(difflib.get_close_matches(word, TOPOLOGIES, 1)), None)
    if generation is None:
        return f"slices are named like {', '.join(f'{known}:{shapes[4]}' for known, shapes in TOPOLOGIES.items())}."
    chips = _chips(shape) if shape else 16
    if "x" not in shape and generation in _CORES_IN_NAMES:
        chips //= 2
    distance = lambda known: abs(math.log(_chips(known) / max(chips, 1)))
    near = sorted(TOPOLOGIES[generation], key=distance)
    near = near[:1] if distance(near[0]) == 0 else near[:3]
    return f"did you mean {' or '.join(f'{generation}:{known}' for known in near)}?"
