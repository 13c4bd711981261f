"""Continue texts with a trained model.

    python -m gla_jax.generate --workdir=DIR --prompt="In the beginning" --prompt="And it came to pass"
    python -m gla_jax.generate --workdir=DIR --prompts=prompts.txt --output=texts.jsonl
    python -m gla_jax.generate --workdir=DIR --prompt_file=book.txt --save_state=book.npz
    python -m gla_jax.generate --workdir=DIR --load_state=book.npz --prompt="And then" --stop="\\n"
    python -m gla_jax.generate --workdir=DIR --interactive

DIR is the folder of a run, or a Hugging Face directory. One text appears as it is drawn; several are drawn together,
and every prompt is continued `--samples` times. A text starts like a document of the training data; the empty prompt,
which is the default, lets the model begin one.
"""

import contextlib
import json
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import flags

from gla_jax import command_line
from gla_jax.config import ConfigError

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a training run, or a Hugging Face directory.", required=True)
_PROMPT = flags.DEFINE_multi_string("prompt", [], "Text to continue; repeat the flag to continue several at once.")
_PROMPTS = flags.DEFINE_string("prompts", None, 'A file of prompts, one a line: text, or JSON, {"prompt": "..."}.')
_PROMPT_FILE = flags.DEFINE_string("prompt_file", None, "A file whose whole text is one prompt, of any length.")
_SAMPLES = flags.DEFINE_integer("samples", 1, "Continuations of each prompt.", lower_bound=1)
_TOKENS = flags.DEFINE_integer("tokens", 256, "Tokens to add at the most.", lower_bound=0)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "Below 1 sharpens, 0 takes the likeliest token.", lower_bound=0.0)
_TOP_K = flags.DEFINE_integer("top_k", 0, "Draw from so many of the likeliest tokens only; 0: from all.", lower_bound=0)
_TOP_P = flags.DEFINE_float(
    "top_p",
    1.0,
    "Draw from the likeliest tokens that together have this probability only.",
    lower_bound=1e-9,
    upper_bound=1.0,
)
_STOP = flags.DEFINE_multi_string("stop", [], r"End a text before this; \n is a new line. May be repeated.")
_SEED = flags.DEFINE_integer("seed", 0, "The same seed gives the same text.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Texts that are drawn together.", lower_bound=1)
_OUTPUT = flags.DEFINE_string("output", None, 'Write JSON lines to this file, or "-": prompt, sample, text, ended_by.')
_INTERACTIVE = flags.DEFINE_bool("interactive", False, "Read lines and go on with the text after each.")
_SAVE_STATE = flags.DEFINE_string("save_state", None, "Keep what the model has read and drawn in this file (.npz).")
_LOAD_STATE = flags.DEFINE_string("load_state", None, "Begin with what --save_state kept.")

_READ_AT_ONCE = 2047
_SHOWN_AT_A_TIME = 4
_DRAWN_AT_A_TIME = 32


def main(_: dict[str, str]) -> None:
    """Load the model, continue the prompts, print."""
    prompts = list(_read_prompts())
    one = len(prompts) * _SAMPLES.value == 1
    for flag in (_INTERACTIVE, _SAVE_STATE, _LOAD_STATE):
        if flag.value and not one:
            raise ConfigError(f"--{flag.name} goes with one text, not with {len(prompts) * _SAMPLES.value}.")
    if _INTERACTIVE.value and _OUTPUT.value:
        raise ConfigError("--interactive shows its text and writes no --output.")
    # Imported here so that --help and mistakes in flags answer at once.
    from gla_jax.data import load_tokenizer
    from gla_jax.loading import load_config, load_model
    from gla_jax.models.language_model import room_for_tokens

    config = load_config(_WORKDIR.value)
    tokenizer = load_tokenizer(config.data.tokenizer)
    model, room = load_model(_WORKDIR.value), room_for_tokens(config.model)
    if one and not _OUTPUT.value:
        _continue_one(model, tokenizer, prompts[0], room)
    else:
        _continue_many(model, tokenizer, prompts, room)


def _read_prompts() -> Iterator[str]:
    """Yield the prompts that the flags name, or the empty one."""
    given = [flag for flag in (_PROMPT, _PROMPTS, _PROMPT_FILE) if flag.value]
    if len(given) > 1:
        raise ConfigError(f"--{given[0].name} and --{given[1].name} exclude each other.")
    try:
        if _PROMPT_FILE.value:
            yield Path(_PROMPT_FILE.value).read_text(encoding="utf-8")
        elif _PROMPTS.value:
            lines = Path(_PROMPTS.value).read_text(encoding="utf-8").splitlines()
            as_json = _PROMPTS.value.endswith((".json", ".jsonl"))
            if not lines:
                raise ConfigError(f"--prompts={_PROMPTS.value} is empty.")
            for number, line in enumerate(lines, 1):
                try:
                    yield json.loads(line)["prompt"] if as_json else line
                except (ValueError, KeyError, TypeError):
                    raise ConfigError(f'{_PROMPTS.value}, line {number} is not {{"prompt": "..."}}.') from None
        else:
            yield from _PROMPT.value or [""]
    except (FileNotFoundError, UnicodeDecodeError) as error:
        name = _PROMPT_FILE.value or _PROMPTS.value
        reason = "is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else "is not there"
        raise ConfigError(f"{name} {reason}.") from None


def _options() -> dict[str, Any]:
    return {
        "temperature": _TEMPERATURE.value,
        "top_k": _TOP_K.value,
        "top_p": _TOP_P.value,
        "seed": _SEED.value,
    }


def _stops() -> list[str]:
    return [stop.replace("\\n", "\n") for stop in _STOP.value]


def _continue_one(model: Any, tokenizer: Any, prompt: str, room: int | None) -> None:
    """Show one text as it is drawn, and go on with it if the user wants to."""
    from gla_jax.inference.session import Session

    tokens = tokenizer.encode(prompt).tolist()
    first = [tokenizer.end_of_document, *([] if _LOAD_STATE.value else tokens[:_READ_AT_ONCE])]
    session = Session(model, [first], room=room, reserve=_TOKENS.value, **_options())
    if _LOAD_STATE.value:
        session.load(Path(_LOAD_STATE.value))
        session.feed(tokens)
    else:
        session.feed(tokens[_READ_AT_ONCE:])
    if _INTERACTIVE.value:
        _converse(session, tokenizer)
    else:
        print(prompt, end="", flush=True)
        _show(session, tokenizer, threading.Event())
    if _SAVE_STATE.value:
        session.save(Path(_SAVE_STATE.value))


def _converse(session: Any, tokenizer: Any) -> None:
    """Read lines until there are no more, and go on with the text after each."""
    if sys.stdin.isatty():
        print(
            "What you type is read as the text's next words; an empty line lets the model go on by itself. "
            "Ctrl-C stops it, Ctrl-D ends.",
            file=sys.stderr,
        )
    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        with _interruptible() as enough:
            session.feed(tokenizer.encode(line).tolist())
            _show(session, tokenizer, enough)


@contextlib.contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Have Ctrl-C set an event: an exception could come while a state is being replaced by the next, and lose both."""
    event = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)


def _show(session: Any, tokenizer: Any, enough: threading.Event) -> None:
    """Print the text as it is drawn, until its end or until the event is set."""
    from gla_jax.inference.text import TextStream

    stream = TextStream(tokenizer, stops=_stops(), max_tokens=_TOKENS.value)
    left = _TOKENS.value
    # Where the state is used again, it must not hold tokens from beyond the end.
    at_a_time = 1 if _INTERACTIVE.value or _SAVE_STATE.value else _SHOWN_AT_A_TIME
    while left and stream.ended_by is None and not enough.is_set():
        count = min(left, at_a_time)
        stream.add(session.draw(count)[0].tolist())
        left -= count
        print(stream.take(), end="", flush=True)
    print(flush=True)


def _continue_many(model: Any, tokenizer: Any, prompts: list[str], room: int | None) -> None:
    """Continue prompts in batches, and print or write the texts in their order."""
    from gla_jax.inference.session import Session
    from gla_jax.inference.text import TextStream

    jobs = [(prompt, sample) for prompt in prompts for sample in range(_SAMPLES.value)]
    file = sys.stdout if _OUTPUT.value in (None, "-") else open(_OUTPUT.value, "w", encoding="utf-8")  # noqa: SIM115
    for start in range(0, len(jobs), _BATCH_SIZE.value):
        batch = jobs[start : start + _BATCH_SIZE.value]
        ids = [[tokenizer.end_of_document, *tokenizer.encode(prompt).tolist()] for prompt, _ in batch]
        session = Session(model, ids, first_row=start, room=room, reserve=_TOKENS.value, **_options())
        streams = [TextStream(tokenizer, stops=_stops(), max_tokens=_TOKENS.value) for _ in batch]
        left = _TOKENS.value
        while left and any(stream.ended_by is None for stream in streams):
            drawn = session.draw(min(left, _DRAWN_AT_A_TIME))
            left -= drawn.shape[1]
            for stream, tokens in zip(streams, drawn.tolist(), strict=True):
                stream.add(tokens)
        for number, ((prompt, sample), stream) in enumerate(zip(batch, streams, strict=True), start + 1):
            if _OUTPUT.value:
                entry = {"prompt": prompt, "sample": sample, "text": stream.text, "ended_by": stream.ended_by}
                print(json.dumps(entry, ensure_ascii=False), file=file, flush=True)
            else:
                print(f"=== {number} of {len(jobs)} ===\n{prompt}{stream.text}", flush=True)
    if file is not sys.stdout:
        file.close()


if __name__ == "__main__":
    command_line.run(main)
