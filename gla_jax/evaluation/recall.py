"""Recall from a text that is in the context: the tasks FDA, SWDE and SQuAD completion of table 3 of the paper.

The protocol is that of Based (arXiv 2402.18668), which the paper takes them from: a text that ends where a fact of it
is to be named again, such as "Name of device:", is continued greedily for at most 48 tokens or to the end of the line,
and is right if the fact occurs in what was written, in small letters or capitals. The data are local files of JSON
lines with the fields of the published sets, "text" and "value".
"""

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gla_jax.config import ConfigError
from gla_jax.data.tokenizer import Tokenizer
from gla_jax.inference.session import Session
from gla_jax.inference.text import TextStream
from gla_jax.models import LanguageModel
from gla_jax.models.language_model import make_room

FIELDS = ("text", "value")
_MOST_TOKENS = 48
_DRAWN_AT_A_TIME = 16


@dataclasses.dataclass(frozen=True)
class Question:
    """A text, and what of it should come next."""

    text: str
    value: str


def read_questions(path: Path, limit: int | None = None) -> list[Question]:
    """Read a file of JSON lines.

    Args:
        path: the file; each line has the texts `FIELDS`, others are not read.
        limit: read so many lines only.

    Raises:
        ConfigError: there is no such file, it is empty, or a line is not as it should be.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()[:limit]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise ConfigError(f"--recall={path} cannot be read: {reason}.") from None
    questions = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"--recall={path}, line {number}, is not JSON ({error}).") from None
        found = record if isinstance(record, dict) else {}
        wrong = [name for name in FIELDS if not isinstance(found.get(name), str) or not found[name].strip()]
        if wrong:
            raise ConfigError(
                f"--recall={path}, line {number}, needs the texts {' and '.join(map(repr, FIELDS))}: it lacks "
                f"{' and '.join(map(repr, wrong))} and has {', '.join(map(repr, found)) or 'no fields'}."
            )
        questions.append(Question(found["text"].strip(), found["value"].strip()))
    if not questions:
        raise ConfigError(f"--recall={path} is empty.")
    return questions


def evaluate_recall(
    model: LanguageModel,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    *,
    batch_size: int,
    begin_documents: bool,
    advance: Callable[[int], Any] = lambda count: None,
) -> tuple[dict[str, Any], list[str]]:
    """Have a model answer questions.

    Args:
        model: the model; caches that it has are enlarged to hold the longest text.
        tokenizer: its tokeniser.
        questions: what is asked.
        batch_size: texts at a time.
        begin_documents: put the token that begins documents before every text.
        advance: called with the number of texts of every batch that is done.

    Returns:
        "accuracy", the share that was answered rightly, its "standard_error", and "questions", their number; and the
        answers.
    """
    beginning = [tokenizer.end_of_document] if begin_documents else []
    prompts = [[*beginning, *ids.tolist()] for ids in tokenizer.encode_batch([each.text for each in questions])]
    longest = max(map(len, prompts))
    make_room(model, (1 << (longest - 1).bit_length()) + _MOST_TOKENS)  # a session pads prompts to such a length
    answers = [""] * len(questions)
    order = sorted(range(len(questions)), key=lambda number: len(prompts[number]), reverse=True)
    for first in range(0, len(order), batch_size):
        here = order[first : first + batch_size]
        session = Session(model, [prompts[number] for number in here], temperature=0.0)
        streams = [TextStream(tokenizer, stops=["\n"], max_tokens=_MOST_TOKENS) for _ in here]
        for _ in range(0, _MOST_TOKENS, _DRAWN_AT_A_TIME):
            for stream, tokens in zip(streams, session.draw(_DRAWN_AT_A_TIME).tolist(), strict=True):
                stream.add(tokens)
            if all(stream.ended_by is not None for stream in streams):
                break
        for number, stream in zip(here, streams, strict=True):
            answers[number] = stream.text
        advance(len(here))
    right = [each.value.lower() in answer.lower() for each, answer in zip(questions, answers, strict=True)]
    share, count = sum(right) / len(right), len(right)
    error = math.sqrt(share * (1 - share) / (count - 1)) if count > 1 else None
    return {"accuracy": share, "standard_error": error, "questions": count}, answers
