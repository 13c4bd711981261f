"""Where the files of a run lie: in a folder of this machine, or in a bucket of Google Cloud Storage."""

import importlib.util
import os
import time
from pathlib import Path
from typing import Any

from gla_jax.config import ConfigError

_BUCKET = "gs://"
_PATIENCE = 30  # seconds; an object must not be written more often than once a second


def open_path(name: str | os.PathLike[str]) -> Path:
    """Return the path of a folder of this machine, or what stands for the path of a folder in a bucket.

    Args:
        name: a folder, or "gs://BUCKET/FOLDER".

    Raises:
        ConfigError: an address of another kind, or one that needs a library that is missing.
    """
    text = os.fspath(name)
    if "://" not in text:
        return Path(text)
    if not text.startswith(_BUCKET):
        raise ConfigError(f"{text} is no address that runs can be kept at; give a folder, or gs://BUCKET/FOLDER.")
    if importlib.util.find_spec("gcsfs") is None:
        raise ConfigError(f"{text} needs libraries that are not installed: pip install 'gla-jax[gcs]'.")
    from etils import epath

    path: Any = epath.Path(text.rstrip("/"))
    return path


def is_remote(path: Path) -> bool:
    """Say whether a path is in a bucket: there files are written whole, never locked, and need no room to be left."""
    return os.fspath(path).startswith(_BUCKET)


def replace_text(path: Path, text: str) -> None:
    """Write a file in one go: whoever reads it, or a crash, finds the old or the new text."""
    if is_remote(path):
        path.write_text(text)
        return
    temporary = path.with_name(f"{path.name}.new")
    temporary.write_text(text)
    temporary.replace(path)


class GrowingFile:
    """A text that lines are added to.

    On a disk each line is there as soon as it is written. A bucket gets the whole text, twice a minute at most, when
    `flush` says so and at the end.

    Args:
        path: what it may hold already is kept.
    """

    def __init__(self, path: Path):
        self._path = path
        self._file = None if is_remote(path) else path.open("a", buffering=1)
        self._text = path.read_text() if self._file is None and path.exists() else ""
        self._changed, self._uploaded = False, time.monotonic()

    def write(self, line: str) -> None:
        """Add a line, which ends with a line feed."""
        if self._file is not None:
            self._file.write(line)
            return
        self._text += line
        self._changed = True
        if time.monotonic() > self._uploaded + _PATIENCE:
            self.flush()

    def flush(self) -> None:
        """Have everything there that was written."""
        if self._changed:
            replace_text(self._path, self._text)
            self._changed, self._uploaded = False, time.monotonic()

    def close(self) -> None:
        """Write what is left; nothing comes after."""
        self.flush()
        if self._file is not None:
            self._file.close()
