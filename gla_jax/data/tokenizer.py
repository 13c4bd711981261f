"""Tokenisers: bytes, a Hugging Face tokenizer.json, a SentencePiece model, or bare integers.

All of them keep one promise that the rest of the pipeline stands on: `encode` never returns `end_of_document`, whatever
the text says, so that this id marks where documents begin and end and nothing else.
"""

import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from gla_jax.config import ConfigError

_PIECE_CHARACTERS = 1 << 17
"""Longer texts are encoded in pieces of about this many characters: libraries need memory by the token of one text."""


class Tokenizer(Protocol):
    """What the rest of the project knows of a tokeniser."""

    name: str
    vocab_size: int
    end_of_document: int
    """The id that precedes every document and follows the last: a model's first input and its last target."""
    fingerprint: str
    """Hex digest of everything that decides the ids; equal digests give equal ids."""

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of a text, int32, without end_of_document."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each text, on several threads where the library has them."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; end_of_document gives no text."""
        ...


class ByteTokenizer:
    """UTF-8 bytes as ids 0..255; NUL ends documents, and a NUL in a text becomes U+FFFD, the replacement character."""

    name = "bytes"
    vocab_size = 256
    end_of_document = 0
    fingerprint = hashlib.sha256(b"utf-8 bytes, 0 ends a document").hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """Return the UTF-8 bytes of a text as int32 ids."""
        data = text.replace("\0", "\ufffd").encode("utf-8", errors="replace")
        return np.frombuffer(data, np.uint8).astype(np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; bytes that are not UTF-8 become U+FFFD."""
        return bytes(i for i in ids if i).decode("utf-8", errors="replace")


class IntegerTokenizer:
    """Ids written as numbers, for corpora that are not text: "5 17 3" is [5, 17, 3]."""

    name = "integers"
    end_of_document = 0

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size
        self.fingerprint = hashlib.sha256(f"integers below {vocab_size}".encode()).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """Return the numbers of a text.

        Raises:
            ConfigError: if a word is not a number from 1 to vocab_size - 1.
        """
        words = text.split()
        for word in words:
            if not word.isdecimal() or not 0 < int(word) < self.vocab_size:
                raise ConfigError(f"{word!r} is not an id from 1 to {self.vocab_size - 1}, all that this corpus knows.")
        return np.array([int(word) for word in words], np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Return ids as numbers between spaces."""
        return " ".join(str(int(i)) for i in ids if i != self.end_of_document)


class _LibraryTokenizer:
    """What the tokenisers read from a file share: names, digests, and long texts encoded in pieces."""

    def __init__(self, path: str, vocab_size: int, end_of_document: int):
        self.name = os.path.basename(path)
        self.vocab_size = vocab_size
        self.end_of_document = end_of_document
        digest = hashlib.sha256(Path(path).read_bytes())
        digest.update(f"end of document {end_of_document}".encode())
        self.fingerprint = digest.hexdigest()

    def _encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        raise NotImplementedError

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of a text, int32, without special tokens."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each text, encoded by the library on several threads."""
        pieces = [self._cut(text) for text in texts]
        ids = iter(self._encode([piece for cut in pieces for piece in cut]))
        return [np.concatenate([next(ids) for _ in cut]) for cut in pieces]

    @functools.cached_property
    def _space_at_cut(self) -> str | None:
        """What a piece must begin with where a space was cut, to get the ids of the uncut text; None: cannot be cut.

        A tokeniser that puts a space before every text supplies that space itself.
        """
        probes = [("the house of", "the king"), ("void x", "and yet more"), ("aa bb", "cc dd")]
        wholes = self._encode([f"{left} {right}" for left, right in probes])
        for space in ("", " "):
            halves = [np.concatenate(self._encode([left, space + right])) for left, right in probes]
            if all(np.array_equal(whole, half) for whole, half in zip(wholes, halves, strict=True)):
                return space
        return None

    def _cut(self, text: str) -> list[str]:
        if len(text) <= _PIECE_CHARACTERS or self._space_at_cut is None:
            return [text]
        pieces, start = [], 0
        # Between two plain letters no tokeniser that splits words joins what is on either side of the space.
        between_words = re.compile(r"(?<=[a-z]) (?=[a-z])")
        while cut := between_words.search(text, start + _PIECE_CHARACTERS):
            pieces.append(text[start : cut.start()])
            start = cut.end() - len(self._space_at_cut)
        return [*pieces, text[start:]]


class HuggingFaceTokenizer(_LibraryTokenizer):
    """A Hugging Face tokenizer.json, read by the library `tokenizers`."""

    _USUAL_ENDS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|eos|>", "<|im_end|>")

    def __init__(self, path: str):
        library = _import("tokenizers", path)
        try:
            self._tokenizer = library.Tokenizer.from_file(path)
        except Exception as error:  # the library raises bare Exception
            raise ConfigError(
                f"{path} is not a tokenizer.json that the library tokenizers can read: {error}."
            ) from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # Otherwise a text that spells "</s>" would end its document.
        self._tokenizer.encode_special_tokens = True
        # Ids may have gaps, so the count of entries is not enough.
        vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        super().__init__(path, vocab_size, self._end_of_document(path))

    def _end_of_document(self, path: str) -> int:
        names: Sequence[Any] = self._USUAL_ENDS
        # tokenizer.json does not say which token ends a document; the file that is published beside it does.
        config = Path(path).with_name("tokenizer_config.json")
        if config.exists():
            try:
                named = json.loads(config.read_text(encoding="utf-8")).get("eos_token")
            except (ValueError, AttributeError):
                raise ConfigError(f"{config} is not a JSON object.") from None
            if named is not None:
                names = [named["content"] if isinstance(named, dict) else named]
        for name in names:
            if (found := self._tokenizer.token_to_id(name)) is not None:
                return int(found)
        raise ConfigError(
            f"{path} has no token to end documents with (looked for {', '.join(names)}): "
            f'name one of its tokens in {config}, as {{"eos_token": "..."}}.'
        )

    def _encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; special tokens give no text."""
        return str(self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True))


class SentencePieceTokenizer(_LibraryTokenizer):
    """A SentencePiece .model, read by the library `sentencepiece` itself: conversions differ on runs of spaces."""

    def __init__(self, path: str):
        library = _import("sentencepiece", path)
        try:
            self._processor = library.SentencePieceProcessor(model_file=path)
        except (OSError, RuntimeError, ValueError):
            raise ConfigError(f"{path} is not a SentencePiece model, or only a part of one.") from None
        end = self._processor.eos_id() if self._processor.eos_id() >= 0 else self._processor.bos_id()
        if end < 0:
            raise ConfigError(f"{path} has neither an end nor a begin token, so nothing can separate documents.")
        super().__init__(path, self._processor.vocab_size(), end)

    def _encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = self._processor.encode(list(texts), num_threads=os.cpu_count() or 1)
        return [np.array(ids, np.int32) for ids in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; control symbols give no text."""
        return str(self._processor.decode([int(i) for i in ids]))


def load_tokenizer(name: str) -> Tokenizer:
    """Load a tokeniser by its name in a config.

    Args:
        name: "bytes", or the path of a Hugging Face tokenizer.json or a SentencePiece .model file.

    Raises:
        ConfigError: if there is no such file, it cannot be read, or its library is not installed.
    """
    if name == "bytes":
        return ByteTokenizer()
    kinds: dict[str, Callable[[str], Tokenizer]] = {
        r"\.json": HuggingFaceTokenizer,
        r"\.model(\.v\d+)?": SentencePieceTokenizer,
    }
    for ending, kind in kinds.items():
        if re.search(f"{ending}$", name):
            if not os.path.isfile(name):
                raise ConfigError(f"tokenizer={name!r}: there is no such file; the tokens' tokeniser belongs there.")
            return kind(name)
    raise ConfigError(
        f'tokenizer={name!r} is none of "bytes", a Hugging Face tokenizer.json and a SentencePiece .model file.'
    )


def train_tokenizer(texts: Iterable[str], size: int, path: Path) -> None:
    """Train a byte-level BPE and write it as a tokenizer.json.

    Args:
        texts: what to train on.
        size: entries at most; a small text gives fewer.
        path: the file to write.

    Raises:
        ConfigError: if size has no room for 256 bytes and the end of document.
    """
    if size < 257:
        raise ConfigError(f"A tokenizer of {size} ids is too small: 256 are bytes and one ends documents.")
    library = _import("tokenizers", str(path))
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    partial = path.with_name(path.name + ".partial")
    tokenizer.save(str(partial))
    os.replace(partial, path)


def _import(library: str, path: str) -> Any:
    try:
        return __import__(library)
    except ModuleNotFoundError:
        raise ConfigError(f"Reading {path} needs the library {library}: pip install 'gla-jax[tokenizer]'.") from None
