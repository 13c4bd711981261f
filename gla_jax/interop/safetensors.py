"""Safetensors files, read tensor by tensor and written piece by piece: 8 bytes, a JSON header, and the numbers.

The format is described at https://github.com/huggingface/safetensors. Nothing is mapped into memory or read ahead: what
a caller holds is what it asked for.
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from gla_jax.config import ConfigError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
}
_MOST_FILE_BYTES = 5 * 10**9
_MOST_HEADER_BYTES = 10**8  # the format's own limit


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a tensor lies."""

    path: Path
    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int
    """Of its first byte in the file."""

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Read all of it, or the rows of the first axis from `start` up to `stop`."""
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        count = (self.shape[0] if stop is None else stop) - start if self.shape else 1
        with self.path.open("rb") as file:
            file.seek(self.offset + start * row)
            data = file.read(count * row)
        return np.frombuffer(data, self.dtype).reshape((count, *self.shape[1:]) if self.shape else ())


def open_folder(folder: Path) -> dict[str, Tensor]:
    """Find the tensors of a model in a Hugging Face directory, in one file or several.

    Args:
        folder: has model.safetensors, or model.safetensors.index.json and the files that it names.

    Returns:
        Every tensor by its name; no numbers have been read.

    Raises:
        ConfigError: there are no such files, or one of them is damaged.
    """
    index = folder / INDEX
    if not index.is_file():
        if (folder / SINGLE).is_file():
            return open_file(folder / SINGLE)
        pickles = sorted(path.name for path in [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
        if pickles:
            raise ConfigError(
                f"{folder} has its tensors in {pickles[0]}, a pickle, which may run code and is not read; load it with "
                "transformers and save it again with save_pretrained, which writes safetensors."
            )
        raise ConfigError(f"{folder} has neither {SINGLE} nor {INDEX}.")
    try:
        files: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        paths = {name: folder / name for name in sorted(set(files.values()))}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{index} is damaged: it is not JSON with a weight_map from tensors to files.") from None
    for path in paths.values():
        if not path.is_file():
            raise ConfigError(f"{path} is missing, though {index.name} names it.")
    headers = {name: open_file(path) for name, path in paths.items()}
    for name, file in files.items():
        if name not in headers[file]:
            raise ConfigError(f"{folder / file} does not hold the tensor {name}, which {index.name} says it does.")
    return {name: tensor for header in headers.values() for name, tensor in header.items()}


def open_file(path: Path) -> dict[str, Tensor]:
    """Find the tensors of one file, which must have as many bytes as they need.

    Raises:
        ConfigError: it is damaged.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, _MOST_HEADER_BYTES):
            raise ConfigError(f"{path} is no safetensors file, or only the beginning of one: it has {size:,} bytes.")
        text = file.read(length)
    try:
        entries: dict[str, Any] = {name: entry for name, entry in json.loads(text).items() if name != "__metadata__"}
        spans = {name: tuple(entry["data_offsets"]) for name, entry in entries.items()}
        shapes = {name: tuple(entry["shape"]) for name, entry in entries.items()}
        dtypes = {name: str(entry["dtype"]) for name, entry in entries.items()}
        needed = 8 + length + max((stop for _, stop in spans.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{path} is no safetensors file: its header is not what the format wants.") from None
    if size < needed:
        raise ConfigError(f"{path} is cut short: it has {size:,} of {needed:,} bytes.")
    tensors = {}
    for name, (start, stop) in spans.items():
        dtype = _DTYPES.get(dtypes[name])
        if dtype is None:
            raise ConfigError(f"{path}: the tensor {name} is of dtype {dtypes[name]}; {', '.join(_DTYPES)} are read.")
        if stop - start != math.prod(shapes[name]) * dtype.itemsize or start < 0:
            raise ConfigError(
                f"{path} is damaged: the tensor {name} of shape {shapes[name]} and dtype {dtypes[name]} is given "
                f"{stop - start:,} bytes."
            )
        tensors[name] = Tensor(path, name, dtype, shapes[name], 8 + length + start)
    return tensors


class FolderWriter:
    """Writes the tensors of a model into one file, or several of at most 5 GB, in whatever order they come.

    Args:
        folder: where; the files must not exist yet.
        shapes: of every tensor, by name.
        dtype: of them all.
        most_file_bytes: of numbers in a file.
    """

    def __init__(
        self,
        folder: Path,
        shapes: Mapping[str, Sequence[int]],
        dtype: np.dtype,
        *,
        most_file_bytes: int = _MOST_FILE_BYTES,
    ):
        self._dtype = dtype
        code = next(code for code, known in _DTYPES.items() if known == dtype)
        groups: list[dict[str, dict[str, Any]]] = [{}]
        filled = total = 0
        for name, shape in shapes.items():
            size = math.prod(shape) * dtype.itemsize
            if groups[-1] and filled + size > most_file_bytes:
                groups.append({})
                filled = 0
            groups[-1][name] = {"dtype": code, "shape": list(shape), "data_offsets": [filled, filled + size]}
            filled, total = filled + size, total + size
        self._places: dict[str, tuple[Path, int, tuple[int, ...]]] = {}
        files = {}
        for number, entries in enumerate(groups, 1):
            several = f"model-{number:05}-of-{len(groups):05}.safetensors"
            path = folder / (SINGLE if len(groups) == 1 else several)
            # transformers wants to be told that the numbers are laid out as in PyTorch.
            header = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
            header += b" " * (-len(header) % 8)
            path.write_bytes(len(header).to_bytes(8, "little") + header)
            for name, entry in entries.items():
                self._places[name] = (path, 8 + len(header) + entry["data_offsets"][0], tuple(entry["shape"]))
                files[name] = path.name
        if len(groups) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": files}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def write(self, tensors: Iterable[tuple[str, np.ndarray]]) -> None:
        """Write tensors, cast to the dtype of the files."""
        for name, array in tensors:
            path, offset, shape = self._places[name]
            assert array.shape == shape, f"{name}: {array.shape}, not {shape}"
            with path.open("r+b") as file:
                file.seek(offset)
                file.write(np.ascontiguousarray(array, self._dtype).tobytes())
