"""Readers: the documents of .txt, .jsonl, .jsonl.gz and .parquet files, one by one."""

import gzip
import json
import zlib
from collections.abc import Iterator
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from gla_jax.config import ConfigError

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet")


def read_documents(path: Path, text_field: str, separator: str | None) -> Iterator[tuple[str, float]]:
    """Read the documents of a file in order.

    Args:
        path: a file that ends in one of SUFFIXES.
        text_field: the field or column that holds the text in .jsonl and .parquet.
        separator: what stands between the documents of a .txt file; None: the file is one document.

    Yields:
        The text of a document, and the share of the file that has been read so far.

    Raises:
        ConfigError: if the file cannot be read as what its name says; the sentence names file and line.
    """
    try:
        if path.name.endswith(".txt"):
            yield from _read_text(path, separator)
        elif path.name.endswith(".parquet"):
            yield from _read_parquet(path, text_field)
        else:
            yield from _read_json_lines(path, text_field)
    except UnicodeDecodeError as error:
        wrong = error.object[error.start]
        raise ConfigError(f"{path} is not UTF-8 (it has a byte 0x{wrong:02x} where none may be); convert it.") from None
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise ConfigError(f"{path} is no gzip file, or only a part of one.") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}.") from None


def _read_text(path: Path, separator: str | None) -> Iterator[tuple[str, float]]:
    size = path.stat().st_size
    with path.open("rb") as raw:
        # newline="": line ends are part of the text. A byte order mark is not.
        file = TextIOWrapper(raw, encoding="utf-8-sig", newline="")
        if separator is None:
            yield file.read(), 1.0
            return
        text = ""
        while block := file.read(1 << 20):
            *documents, text = (text + block).split(separator)
            for document in documents:
                yield document.strip(), raw.tell() / size
        yield text.strip(), 1.0


def _read_json_lines(path: Path, text_field: str) -> Iterator[tuple[str, float]]:
    size = path.stat().st_size
    with path.open("rb") as raw:
        stream: Any = gzip.GzipFile(fileobj=raw) if path.name.endswith(".gz") else raw
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except UnicodeDecodeError:
                raise ConfigError(f"{path}, line {number}, is not UTF-8; convert the file.") from None
            except ValueError as error:
                raise ConfigError(f"{path}, line {number}, is not JSON ({error}).") from None
            if not isinstance(record, dict) or text_field not in record:
                fields = ", ".join(record) if isinstance(record, dict) else f"a {type(record).__name__}"
                raise ConfigError(
                    f"{path}, line {number}, has no field {text_field!r} but {fields}; name one with --text_field."
                )
            yield _text(record[text_field], f"{path}, line {number}"), raw.tell() / size


def _read_parquet(path: Path, text_field: str) -> Iterator[tuple[str, float]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise ConfigError(f"Reading {path} needs the library pyarrow: pip install 'gla-jax[parquet]'.") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if text_field not in columns:
                raise ConfigError(
                    f"{path} has no column {text_field!r} but {', '.join(columns)}; name one with --text_field."
                )
            number, rows = 0, file.metadata.num_rows
            for batch in file.iter_batches(batch_size=1024, columns=[text_field]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield _text(value, f"{path}, row {number}"), number / rows
    except pyarrow.ArrowException as error:
        reason = str(error).split("\n")[0].rstrip(".")
        raise ConfigError(f"{path} is no Parquet file that can be read: {reason}.") from None


def _text(value: Any, where: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ConfigError(f"{where}: the text is a {type(value).__name__}, not a string; name another --text_field.")
    # JSON can spell half a surrogate pair, which is no character.
    return value.encode("utf-8", "replace").decode()
