"""Tasks of lm-evaluation-harness, https://github.com/EleutherAI/lm-evaluation-harness (extra `eval`)."""

import difflib
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.loggers import EvaluationTracker
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, make_table
from tqdm import tqdm

from gla_jax.config import ConfigError
from gla_jax.data.tokenizer import Tokenizer
from gla_jax.evaluation.scoring import Scorer
from gla_jax.inference.session import Session
from gla_jax.inference.text import TextStream
from gla_jax.models import LanguageModel
from gla_jax.storage import replace_text

PRESETS = {
    "paper": (
        "wikitext", "lambada_openai", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "copa",
        "openbookqa", "sciq", "boolq",
    ),
}  # fmt: skip
"""Names for lists of tasks; "paper" are those of arXiv 2312.06635, tables 2 and 5."""

_DRAWN_AT_A_TIME = 16
"""Tokens between two looks at whether a row has come to a stop string."""


class Journal:
    """Answers on disk, so that a run that was killed goes on where it was.

    A line of JSON an answer; the first line says whose answers they are. Those of another model are dropped.

    Args:
        path: the file; None keeps nothing.
        owner: what the answers depend on beside the requests.
    """

    def __init__(self, path: Path | None, owner: str):
        self._path = path if jax.process_index() == 0 else None
        self.answers: dict[str, Any] = {}
        if path is None:
            return
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        head = json.dumps({"owner": owner})
        if lines and lines[0] == head:
            for line in lines[1:]:
                try:
                    entry = json.loads(line)
                except ValueError:  # the last one, cut short when the run was killed
                    continue
                self.answers[entry["request"]] = entry["answer"]
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            entries = (json.dumps({"request": key, "answer": answer}) for key, answer in self.answers.items())
            replace_text(self._path, "".join(f"{line}\n" for line in (head, *entries)))

    def add(self, answers: dict[str, Any]) -> None:
        """Keep answers that are new."""
        new = {key: answer for key, answer in answers.items() if key not in self.answers}
        self.answers |= new
        if self._path is not None and new:
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps({"request": key, "answer": answer}) + "\n" for key, answer in new.items())
                file.flush()
                os.fsync(file.fileno())


class HarnessModel(TemplateLM):
    """A language model of ours as the harness wants it.

    Args:
        model: the model.
        tokenizer: its tokeniser.
        batch_size: requests at a time.
        journal: of answers.
        begin_documents: put the token that begins documents before every context. It is before empty contexts in any
            case.
        room: tokens that a row may have, for models that keep every token's key and value; None: any number. Rows
            beyond it are cut as the harness cuts them.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        *,
        batch_size: int,
        journal: Journal,
        begin_documents: bool,
        room: int | None,
    ):
        super().__init__()
        self._model, self._tokenizer, self._journal, self._room = model, tokenizer, journal, room
        self._score = Scorer(model, batch_size)
        self._beginning = [tokenizer.end_of_document] if begin_documents else []

    # What the base class asks for -------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """The token before documents, and after them."""
        return self._tokenizer.end_of_document

    @property
    def max_gen_toks(self) -> int:
        """How many tokens a task that does not say gets."""
        return 256

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the ids of a text."""
        return self._tokenizer.encode(string).tolist()

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Return the log-likelihood of continuations, and whether greedy decoding would give them."""
        rows = []
        for _texts, context, continuation in requests:
            begun = context if context[:1] == self._beginning else [*self._beginning, *context]
            row = [*begun, *continuation]
            if self._room is not None:
                row = row[-(self._room + 1) :]
            rows.append((row, min(len(continuation), len(row) - 1)))
        return [(total, greedy) for total, greedy in self._answer("loglikelihood", rows)]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of whole documents; a recurrent model reads each in one go, however long it is."""
        rows: list[tuple[list[int], int]] = []
        counts = []
        for request in requests:
            tokens = self.tok_encode(request.args[0])
            if self._room is None:
                windows = [([self.eot_token_id, *tokens], len(tokens))] if tokens else []
            else:
                pairs = map(make_disjoint_window, get_rolling_token_windows(tokens, self.eot_token_id, self._room, 1))
                windows = [([*context, *scored], len(scored)) for context, scored in pairs]
            rows += windows
            counts.append(len(windows))
        answers = iter(self._answer("loglikelihood_rolling", rows))
        return [sum(next(answers)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue contexts until a stop string, the end of the document, or enough tokens."""
        prepared = []
        for request in requests:
            context, given = request.args
            options = normalize_gen_kwargs(given, self.max_gen_toks)
            prompt = [*self._beginning, *self.tok_encode(context)] or [self.eot_token_id]
            if self._room is not None:
                prompt = prompt[-max(1, self._room - options["max_gen_toks"]) :]
            prepared.append((prompt, {name: options[name] for name in sorted(options)}))
        keys = [_key("generate_until", *request) for request in prepared]
        unique = dict(zip(keys, prepared, strict=True))
        # Requests of one kind together, and of like length.
        order = sorted(unique, key=lambda key: (json.dumps(unique[key][1]), len(unique[key][0]), key))
        groups: list[list[str]] = []
        for key in order:
            if groups and unique[groups[-1][0]][1] == unique[key][1] and len(groups[-1]) < self._score.batch_size:
                groups[-1].append(key)
            else:
                groups.append([key])
        self._run("generate_until", groups, lambda group: self._generate([unique[key] for key in group]))
        return [self._journal.answers[key] for key in keys]

    # The work ---------------------------------------------------------------------------------------------------------

    def _answer(self, kind: str, rows: Sequence[tuple[list[int], int]]) -> list[tuple[float, bool]]:
        """Score the last tokens of rows: for each the sum of their log-probabilities, and whether all are likeliest."""
        keys = [_key(kind, *row) for row in rows]
        unique = dict(zip(keys, rows, strict=True))
        order = sorted(unique, key=lambda key: (len(unique[key][0]), key), reverse=True)  # what takes longest first
        size = self._score.batch_size
        groups = [order[start : start + size] for start in range(0, len(order), size)]

        def score(group: list[str]) -> list[tuple[float, bool]]:
            scored = self._score([np.asarray(unique[key][0], np.int32) for key in group])
            counts = [unique[key][1] for key in group]
            return [
                (float(np.sum(logs[-count:], dtype=np.float64)), bool(np.all(likeliest[-count:])))
                for (logs, likeliest), count in zip(scored, counts, strict=True)
            ]

        self._run(kind, groups, score)
        return [tuple(self._journal.answers[key]) for key in keys]  # type: ignore[misc]

    def _run(self, kind: str, groups: list[list[str]], compute: Callable[[list[str]], Sequence[Any]]) -> None:
        """Answer groups of requests that are not in the journal yet.

        Groups are those of all requests, answered or not, so that a run that goes on computes what it would have.
        """
        total = sum(map(len, groups))
        with tqdm(total=total, desc=kind, unit="requests", disable=jax.process_index() != 0 or not total) as bar:
            for group in groups:
                if any(key not in self._journal.answers for key in group):
                    self._journal.add(dict(zip(group, compute(group), strict=True)))
                bar.update(len(group))

    def _generate(self, requests: list[tuple[list[int], dict[str, Any]]]) -> list[str]:
        options = requests[0][1]
        session = Session(
            self._model,
            [prompt for prompt, _ in requests],
            temperature=options["temperature"] if options["do_sample"] else 0.0,
            top_k=options.get("top_k", 0),
            top_p=options.get("top_p", 1.0),
            room=self._room,
            reserve=options["max_gen_toks"],
        )
        limits = {"stops": options["until"], "max_tokens": options["max_gen_toks"]}
        streams = [TextStream(self._tokenizer, **limits) for _ in requests]
        for start in range(0, options["max_gen_toks"], _DRAWN_AT_A_TIME):
            drawn = session.draw(min(_DRAWN_AT_A_TIME, options["max_gen_toks"] - start))
            for stream, tokens in zip(streams, drawn.tolist(), strict=True):
                stream.add(tokens)
            if all(stream.ended_by is not None for stream in streams):
                break
        return [stream.text for stream in streams]


def _key(kind: str, tokens: list[int], detail: Any) -> str:
    return hashlib.sha256(json.dumps([kind, tokens, detail]).encode()).hexdigest()


def run_tasks(
    model: HarnessModel,
    tasks: Sequence[str],
    output: Path,
    *,
    include_path: Path | None = None,
    few_shot: int | None = None,
    limit: int | None = None,
) -> tuple[dict[str, Any], str]:
    """Run tasks, write what the harness writes, and return its results and its table of them.

    Args:
        model: the model.
        tasks: names of tasks or groups, or of `PRESETS`.
        output: folder for results_*.json and samples_*.jsonl.
        include_path: folder of more tasks, as YAML files.
        few_shot: examples in a context; None: what each task says.
        limit: run so many documents of each task only.

    Raises:
        ConfigError: no such task, or a data set that cannot be had.
    """
    names = [name for task in tasks for name in PRESETS.get(task, (task,))]
    manager = _find_tasks(names, include_path)
    tracker = EvaluationTracker(output_path=str(output / "results.json"))
    try:
        results = simple_evaluate(
            model, tasks=names, num_fewshot=few_shot, limit=limit, task_manager=manager, evaluation_tracker=tracker,
            bootstrap_iters=1000,
        )  # fmt: skip
    except (ConnectionError, FileNotFoundError) as error:
        raise ConfigError(f"The data of {', '.join(names)} cannot be had: {str(error).splitlines()[0]}.") from None
    assert results is not None
    samples = results.pop("samples")
    if jax.process_index() == 0:
        tracker.save_results_aggregated(results=results, samples=samples)
        for name in results["configs"]:
            tracker.save_results_samples(task_name=name, samples=samples[name])
    return results, make_table(results)


def _find_tasks(names: Sequence[str], include_path: Path | None) -> TaskManager:
    """Return a task manager that knows the names; the harness's own tasks, which take long to list, only if needed."""
    if include_path is not None and not include_path.is_dir():
        raise ConfigError(f"--include_path={include_path} is not a folder.")
    manager = None
    for with_defaults in (False, True) if include_path is not None else (True,):
        manager = TaskManager(
            include_path=None if include_path is None else str(include_path), include_defaults=with_defaults
        )
        unknown = [name for name in names if not manager.match_tasks([name])]
        if not unknown:
            return manager
    assert manager is not None
    near = difflib.get_close_matches(unknown[0], [*PRESETS, *manager.all_tasks], 1)
    cure = f"did you mean {near[0]}?" if near else "`lm_eval ls tasks` lists those of the harness."
    raise ConfigError(f"--tasks={unknown[0]}: there is no such task; {cure}")
