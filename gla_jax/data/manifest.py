"""A folder of token files and its manifest: what was asked for, and which parts of it are finished.

manifest.json holds the settings that decide the ids and a list of shards in order. A shard is planned before it is
made: its file, its inputs with their sizes and times, and, once its token file is complete, its counts. So a run that
was killed goes on where it was, and ends with the same folder as one that was not.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from gla_jax.config import ConfigError
from gla_jax.data.token_file import TokenArray, open_token_file

NAME = "manifest.json"
_FORMAT = "gla-jax token folder, version 1"


@dataclasses.dataclass
class Shard:
    """A token file of a folder, made or planned."""

    file: str
    inputs: list[dict[str, Any]]
    """path, size and mtime_ns of each input file."""
    counts: dict[str, int] | None = None
    """documents, tokens and bytes; None: not finished."""


@dataclasses.dataclass
class Manifest:
    """What a folder holds."""

    settings: dict[str, Any]
    shards: list[Shard] = dataclasses.field(default_factory=list)

    def save(self, folder: Path) -> None:
        """Write the manifest so that a reader finds the old one or the new one, whole."""
        partial = folder / (NAME + ".partial")
        with partial.open("w", encoding="utf-8") as file:
            json.dump({"format": _FORMAT, **dataclasses.asdict(self)}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, folder / NAME)


def load_manifest(folder: Path) -> Manifest:
    """Read the manifest of a folder.

    Raises:
        ConfigError: if there is none, or it is not one of ours.
    """
    path = folder / NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            raise ValueError
        return Manifest(content["settings"], [Shard(**shard) for shard in content["shards"]])
    except FileNotFoundError:
        raise ConfigError(
            f"{folder} has no {NAME}, so it is no folder of token files; make one with python -m gla_jax.data.prepare."
        ) from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{path} is damaged or of another version; prepare {folder} again.") from None


def open_folder(folder: Path) -> list[TokenArray]:
    """Map all token files of a folder, in order.

    Raises:
        ConfigError: if the folder is unfinished, or a file in it is missing, damaged or not the one that was made.
    """
    manifest = load_manifest(folder)
    arrays = []
    for shard in manifest.shards:
        if shard.counts is None:
            missing = sum(shard.counts is None for shard in manifest.shards)
            raise ConfigError(
                f"{folder} is unfinished, {missing} of {len(manifest.shards)} token files are still to be made: "
                f"run the same python -m gla_jax.data.prepare again."
            )
        array = open_token_file(folder / shard.file)
        if len(array.starts) - 1 != shard.counts["documents"] or len(array.tokens) != shard.counts["tokens"]:
            raise ConfigError(f"{array.name} is not the file that {folder / NAME} lists; prepare {folder} again.")
        arrays.append(array)
    return arrays
