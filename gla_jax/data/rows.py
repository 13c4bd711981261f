"""Rows: how documents become windows of one length, which of them are held out, and what a batch says of them.

The documents of a token array, each preceded by end_of_document, are one long sequence. Row r of it has the inputs
[r T, (r + 1) T) and the targets one further on, so that in an epoch every token is a target exactly once and the first
token of a document is predicted from end_of_document. A document may continue in another row; within a row each
document has a segment id of its own. The last row of an array is filled up with padding of weight 0.
"""

import dataclasses
from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

from gla_jax.config import ConfigError
from gla_jax.data.token_file import TokenArray
from gla_jax.data.tokenizer import Tokenizer

Batch = dict[str, np.ndarray]
"""inputs, targets, segment_ids, positions: [b, T] int32; weights: [b, T] float32."""

_PADDING = -1


@dataclasses.dataclass(frozen=True)
class Span:
    """A part of a token array: inputs [start, end), targets [start + 1, end + 1)."""

    array: TokenArray
    start: int
    end: int


@dataclasses.dataclass(frozen=True)
class Split:
    """A corpus in two: spans to train on, spans held out, and how much the latter hold."""

    train: list[Span]
    held_out: list[Span]
    documents: int
    """Documents held out, one that is cut included."""
    tokens: int
    """Targets held out."""
    bytes: int
    """Bytes of source text held out."""


def split(arrays: Sequence[TokenArray], share: float, tokenizer: Tokenizer) -> Split:
    """Hold out documents at the end of a corpus until they are a share of its tokens.

    Whole arrays are held out where that is between half and twice the share; else whole documents, where that is;
    otherwise, as for a corpus of a single document, the one that the boundary falls into is cut there.

    Args:
        arrays: the corpus, in order; each has documents.
        share: of the tokens, in [0, 1).
        tokenizer: what the arrays were made with.
    """
    ends = np.cumsum([len(array.tokens) - 1 for array in arrays]).tolist()
    total = ends[-1]
    wanted = int(total * share)
    spans = [Span(array, 0, len(array.tokens) - 1) for array in arrays]
    if not wanted:
        return Split(spans, [], 0, 0, 0)

    # The boundary lies in `array`, there at `start`, in document number `document`.
    which = bisect_right(ends, total - wanted)
    array, length = arrays[which], spans[which].end
    start = length - (ends[which] - (total - wanted))
    document = int(np.searchsorted(array.starts, start, side="right")) - 1
    for first in (0, len(array.starts) - 1, document, document + 1):
        before = ends[which] - length + int(array.starts[first])
        if before > 0 and wanted / 2 <= total - before <= 2 * wanted:
            train_end = start = int(array.starts[first])
            cut_bytes = 0
            break
    else:
        first = document + 1
        train_end = start - 1  # so that the first token held out is no target in training
        cut_bytes = len(tokenizer.decode(array.tokens[start : array.starts[first]]).encode())
    rest = arrays[which + 1 :]
    return Split(
        train=[*spans[:which], Span(array, 0, train_end)],
        held_out=[Span(array, start, length), *spans[which + 1 :]],
        documents=sum(len(a.starts) - 1 for a in (array, *rest)) - first + (cut_bytes > 0),
        tokens=ends[-1] - ends[which] + length - start,
        bytes=sum(int(a.source_bytes[-1]) for a in (array, *rest)) - int(array.source_bytes[first]) + cut_bytes,
    )


class Rows:
    """The rows of spans by number: a random-access source for Grain."""

    def __init__(self, spans: Sequence[Span], length: int):
        self._spans = [span for span in spans if span.end > span.start]
        self._length = length
        self._first_rows = np.cumsum([0] + [-(-(span.end - span.start) // length) for span in self._spans]).tolist()

    def __len__(self) -> int:
        return int(self._first_rows[-1])

    def __getitem__(self, index: int) -> np.ndarray:
        """Return row `index`: [T + 1] int32 ids, -1 after the end of its span.

        Raises:
            ConfigError: if an id is not in the vocabulary, naming the file: it was damaged after it was written.
        """
        which = bisect_right(self._first_rows, index) - 1
        span = self._spans[which]
        start = span.start + (index - self._first_rows[which]) * self._length
        count = min(self._length, span.end - start) + 1
        row = np.full(self._length + 1, _PADDING, np.int32)
        row[:count] = span.array.tokens[start : start + count]
        if row.max() >= span.array.vocab_size:
            raise ConfigError(
                f"{span.array.name} is damaged: it has id {row.max()} near token {start} and a vocabulary of "
                f"{span.array.vocab_size}; prepare it again."
            )
        return row


def long_spans(spans: Sequence[Span], length: int, *, stream: bool) -> tuple[list[Span], int]:
    """Cut long rows out of spans, each `length` targets long.

    Args:
        spans: where from.
        length: of a row.
        stream: cut documents as they follow each other, as training does; if not, a row is the beginning of a document
            that is long enough.

    Returns:
        The rows, and how long the longest could have been.
    """
    found, longest = [], 0
    for span in spans:
        inner = span.array.starts[(span.array.starts > span.start) & (span.array.starts < span.end)]
        starts = np.append(span.start, [] if stream else inner).astype(np.int64)
        lengths = np.append(starts[1:], span.end) - starts
        longest = max(longest, int(lengths.max()))
        if stream:
            firsts = list(range(span.start, span.end - length + 1, length))
        else:
            firsts = starts[lengths >= length].tolist()
        found += [Span(span.array, first, first + length) for first in firsts]
    return found, longest


def make_batch(rows: Sequence[np.ndarray], end_of_document: int) -> Batch:
    """Stack rows and say what each token is.

    Args:
        rows: b rows of [T + 1] ids with -1 for padding at their ends.
        end_of_document: the id that starts every document.

    Returns:
        inputs, targets: [b, T] int32, the same ids one apart; padding is end_of_document.
        segment_ids: [b, T] int32, 1, 2, .. for the documents of a row in order, 0 for padding.
        positions: [b, T] int32, from 0 at each document's start and at the row's.
        weights: [b, T] float32, 1, and 0 for padding.
    """
    ids = np.stack(rows)
    real = ids[:, 1:] != _PADDING
    inputs = np.where(real, ids[:, :-1], end_of_document)
    starts = real & (inputs == end_of_document)
    segments = np.cumsum(starts, axis=1, dtype=np.int32) + 1 - starts[:, :1]
    columns = np.arange(ids.shape[1] - 1, dtype=np.int32)
    first_columns = np.maximum.accumulate(np.where(starts, columns, 0), axis=1)
    return {
        "inputs": inputs,
        "targets": np.where(real, ids[:, 1:], end_of_document),
        "segment_ids": np.where(real, segments, 0).astype(np.int32),
        "positions": np.where(real, columns - first_columns, 0).astype(np.int32),
        "weights": real.astype(np.float32),
    }
