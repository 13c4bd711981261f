"""How well a model predicts tokens that have more and more before them: figure 5 of the paper (arXiv 2312.06635)."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from gla_jax.data.rows import Rows
from gla_jax.evaluation.scoring import SEGMENT, Scorer
from gla_jax.models import LanguageModel
from gla_jax.models.language_model import make_room


def evaluate_by_position(
    model: LanguageModel, rows: Sequence[np.ndarray] | Rows, *, bucket: int, batch_size: int, segment: int = SEGMENT
) -> list[dict[str, Any]]:
    """Average the loss of rows over buckets of positions.

    A row is read segment by segment, the model going on from its state, so that the memory of a recurrent model does
    not depend on the row's length. That of attention does: its cache is made to hold the whole row.

    Args:
        model: the model; caches that it has are enlarged where rows need it.
        rows: int32 [length + 1] each, all of one length; position t has t + 1 tokens before its target.
        bucket: positions in a bucket; the last one may have fewer.
        batch_size: rows at a time.
        segment: tokens of a row that are read at a time.

    Returns:
        A dict for each bucket, in order: "from" and "to", its positions [from, to); "loss", nats per token; its
        "perplexity"; "standard_error", of the loss over rows, None if there is but one; and "rows", their number.
    """
    length = len(rows[0]) - 1
    make_room(model, length + segment)  # the last segment is filled up
    score = Scorer(model, batch_size, segment=segment)
    edges = np.append(np.arange(0, length, bucket), length)
    losses = np.zeros((len(rows), len(edges) - 1))  # float64
    for first in range(0, len(rows), score.batch_size):
        here = range(first, min(first + score.batch_size, len(rows)))
        for number, (log_probabilities, _) in zip(here, score([rows[number] for number in here]), strict=True):
            losses[number] = -np.add.reduceat(log_probabilities.astype(np.float64), edges[:-1]) / np.diff(edges)
    means = losses.mean(axis=0)
    errors = losses.std(axis=0, ddof=1) / math.sqrt(len(rows)) if len(rows) > 1 else None
    return [
        {
            "from": int(edges[i]),
            "to": int(edges[i + 1]),
            "loss": float(means[i]),
            "perplexity": math.exp(min(means[i], 700.0)),
            "standard_error": None if errors is None else float(errors[i]),
            "rows": len(rows),
        }
        for i in range(len(means))
    ]


def position_table(buckets: Sequence[dict[str, Any]]) -> str:
    """Return what `evaluate_by_position` returns as a table to read."""
    lines = [("positions", "perplexity", "loss", "+-")]
    for one in buckets:
        error = "-" if one["standard_error"] is None else f"{one['standard_error']:.4f}"
        lines.append((f"{one['from']:,}-{one['to'] - 1:,}", f"{one['perplexity']:.3f}", f"{one['loss']:.4f}", error))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
