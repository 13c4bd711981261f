"""Token files: documents as one memory-mapped array of ids, with a header that says how they were made.

    offset 0     b"GLATOKEN", then little-endian uint32 version and uint32 header size (4096)
    offset 16    JSON padded with spaces to the header size: dtype, tokens, documents, bytes, vocab_size,
                 end_of_document, tokenizer {name, fingerprint}, content (a hash of the ids)
    header size  the ids, uint16 or uint32: for each document end_of_document and then its tokens; after the last
                 document one more end_of_document. So the array shifted by one is the array of targets.
    then         zeros up to a multiple of 8; int64 [documents + 1], where in the array each document starts (and the
                 final end_of_document); int64 [documents + 1], how many bytes of source text came before it

A file appears under its name only when it is complete, and its length follows from its header, so one that was cut
short is recognised.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
from array import array
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from gla_jax.config import ConfigError
from gla_jax.data.tokenizer import Tokenizer

_MAGIC = b"GLATOKEN"
_VERSION = 1
_HEADER_SIZE = 4096


@dataclasses.dataclass(frozen=True)
class TokenArray:
    """Documents as ids, in memory or in a file."""

    name: str
    """What to call it in messages: a path, or a corpus."""
    tokens: np.ndarray
    """[N] ids: each document is end_of_document and then its tokens; the last id is end_of_document again."""
    starts: np.ndarray
    """[documents + 1] int64: where each document starts in `tokens`; the last is N - 1."""
    source_bytes: np.ndarray
    """[documents + 1] int64: bytes of source text before each document; the last is all of them."""
    vocab_size: int
    tokenizer_name: str
    tokenizer_fingerprint: str
    content: str
    """A hash of the ids."""


class TokenWriter:
    """Writes a token file under another name until it is complete.

    with TokenWriter(path, tokenizer) as writer:
        writer.add(ids, source_bytes)
    """

    def __init__(self, path: Path, tokenizer: Tokenizer):
        self.documents = 0
        self.tokens = 0
        self.bytes = 0
        self._path = path
        # With the process in its name, so that a worker that outlives a killed parent writes into no one's file.
        self._partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        self._tokenizer = tokenizer
        self._dtype = _dtype(tokenizer.vocab_size)
        self._starts = array("q")
        self._source_bytes = array("q")
        self._hash = hashlib.blake2b(digest_size=16)
        self._file: BinaryIO

    def __enter__(self) -> "TokenWriter":
        self._file = self._partial.open("wb")
        self._file.write(bytes(_HEADER_SIZE))
        return self

    def add(self, ids: np.ndarray, source_bytes: int) -> None:
        """Append a document.

        Args:
            ids: its tokens, without end_of_document. A document without any is left out.
            source_bytes: length of its text in UTF-8.

        Raises:
            ConfigError: if end_of_document is among the ids.
        """
        if not len(ids):
            return
        if (ids == self._tokenizer.end_of_document).any():
            raise ConfigError(
                f"tokenizer {self._tokenizer.name} gives its end-of-document id {self._tokenizer.end_of_document} "
                f"for ordinary text, so documents could not be told apart."
            )
        self._mark()
        self._append(ids)
        self.documents += 1
        self.bytes += source_bytes

    def _mark(self) -> None:
        self._starts.append(self.tokens)
        self._source_bytes.append(self.bytes)
        self._append(np.array([self._tokenizer.end_of_document]))

    def _append(self, ids: np.ndarray) -> None:
        data = ids.astype(self._dtype).tobytes()
        self._file.write(data)
        self._hash.update(data)
        self.tokens += len(ids)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            with contextlib.suppress(OSError):  # on a full disk closing fails like the write did
                self._file.close()
            self._partial.unlink(missing_ok=True)
            return
        self._mark()
        self._file.write(bytes(-self._file.tell() % 8))
        for index in (self._starts, self._source_bytes):
            self._file.write(np.array(index, "<i8").tobytes())
        header = json.dumps(
            {
                "dtype": self._dtype.name,
                "tokens": self.tokens,
                "documents": self.documents,
                "bytes": self.bytes,
                "vocab_size": self._tokenizer.vocab_size,
                "end_of_document": self._tokenizer.end_of_document,
                "tokenizer": {"name": self._tokenizer.name, "fingerprint": self._tokenizer.fingerprint},
                "content": self._hash.hexdigest(),
            }
        ).encode()
        numbers = np.array([_VERSION, _HEADER_SIZE], "<u4").tobytes()
        self._file.seek(0)
        self._file.write((_MAGIC + numbers + header).ljust(_HEADER_SIZE))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._partial, self._path)


def open_token_file(path: Path) -> TokenArray:
    """Map a token file into memory.

    Raises:
        ConfigError: if it is missing, foreign, of another version, or not as long as its header says.
    """
    try:
        with path.open("rb") as file:
            head = file.read(_HEADER_SIZE)
        if head[: len(_MAGIC)] != _MAGIC:
            raise ConfigError(f"{path} is not a token file; make one with python -m gla_jax.data.prepare.")
        if len(head) < _HEADER_SIZE:
            raise ConfigError(f"{path} is cut short: {len(head)} bytes are not even its header; prepare it again.")
        version = int(np.frombuffer(head, "<u4", 1, len(_MAGIC))[0])
        if version != _VERSION:
            raise ConfigError(f"{path} is of version {version} and this code reads {_VERSION}; prepare it again.")
        header = _parse(path, head[len(_MAGIC) + 8 :])
        dtype = np.dtype(header["dtype"]).newbyteorder("<")
        index_at = _HEADER_SIZE + header["tokens"] * dtype.itemsize
        index_at += -index_at % 8
        count = header["documents"] + 1
        expected, found = index_at + 16 * count, path.stat().st_size
        if found != expected:
            raise ConfigError(f"{path} has {found} bytes and its header says {expected}: cut short? Prepare it again.")
        data = np.memmap(path, np.uint8, "r")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None
    return TokenArray(
        name=str(path),
        tokens=np.frombuffer(data, dtype, header["tokens"], _HEADER_SIZE),
        starts=np.frombuffer(data, "<i8", count, index_at),
        source_bytes=np.frombuffer(data, "<i8", count, index_at + 8 * count),
        vocab_size=header["vocab_size"],
        tokenizer_name=header["tokenizer"]["name"],
        tokenizer_fingerprint=header["tokenizer"]["fingerprint"],
        content=header["content"],
    )


def tokens_in_memory(name: str, texts: list[str], tokenizer: Tokenizer) -> TokenArray:
    """Tokenise documents into an array in memory, laid out as in a file."""
    texts = [text for text in texts if text]
    documents = tokenizer.encode_batch(texts)
    end = np.array([tokenizer.end_of_document])
    ids = [part for document in documents for part in (end, document)]
    tokens = np.concatenate([*ids, end]).astype(_dtype(tokenizer.vocab_size))
    return TokenArray(
        name=name,
        tokens=tokens,
        starts=np.cumsum([0] + [1 + len(document) for document in documents]),
        source_bytes=np.cumsum([0] + [len(text.encode("utf-8", "replace")) for text in texts]),
        vocab_size=tokenizer.vocab_size,
        tokenizer_name=tokenizer.name,
        tokenizer_fingerprint=tokenizer.fingerprint,
        content=hashlib.blake2b(tokens.tobytes(), digest_size=16).hexdigest(),
    )


def _dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text)
        counts = [header[name] for name in ("tokens", "documents", "bytes", "vocab_size", "end_of_document")]
        strings = [header["content"], header["tokenizer"]["name"], header["tokenizer"]["fingerprint"]]
        sound = header["dtype"] in ("uint16", "uint32") and all(isinstance(string, str) for string in strings)
        sound = sound and all(isinstance(count, int) and count >= 0 for count in counts)
    except (ValueError, KeyError, TypeError):
        sound = False
    if not sound:
        raise ConfigError(f"{path} has a damaged header; prepare it again.")
    return header
