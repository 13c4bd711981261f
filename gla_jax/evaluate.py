"""Score the newest model of a run: on its held-out text, by position in long texts, on recall, or on a harness's tasks.

    python -m gla_jax.evaluate --workdir=runs/quickstart
    python -m gla_jax.evaluate --workdir=DIR --by-position --length=24576
    python -m gla_jax.evaluate --workdir=DIR --recall=fda.jsonl,swde.jsonl,squad.jsonl
    python -m gla_jax.evaluate --workdir=DIR --harness --tasks=paper        (needs the extra `eval`)

--harness is lm-evaluation-harness; a run of it that was killed goes on where it was if the same command is given again.
DIR may be a Hugging Face directory too.
"""

import json
import sys
from pathlib import Path

from absl import flags

from gla_jax import command_line
from gla_jax.storage import is_remote, open_path

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a training run.", required=True)
_BATCHES = flags.DEFINE_integer("batches", 0, "Score so many batches only; 0: all there are.", lower_bound=0)
_BY_POSITION = flags.DEFINE_bool(
    "by-position",
    False,
    "Print the loss by position in long texts, as lines of JSON, and as a table on standard error. Each text is read "
    "once, the state carried on. The next four flags belong to it.",
)
_LENGTH = flags.DEFINE_integer(
    "length", None, "Tokens of each text; by default 12 times data.sequence_length.", lower_bound=1
)
_BUCKET = flags.DEFINE_integer(
    "bucket", None, "Positions that are averaged; by default data.sequence_length.", lower_bound=1
)
_STREAM = flags.DEFINE_bool(
    "stream", False, "Texts are documents one after the other, and not the beginnings of those that are long enough."
)
_DATA = flags.DEFINE_string(
    "data", None, "A token file, folder or corpus to read all of; by default what the run held out."
)
_RECALL = flags.DEFINE_list(
    "recall",
    [],
    'Files of JSON lines with the texts "text" and "value": print how often the model, which reads the one, writes the '
    "other next, as FDA, SWDE and SQuAD completion want it.",
)
_HARNESS = flags.DEFINE_bool("harness", False, "Run tasks of lm-evaluation-harness; the flags below belong to it.")
_TASKS = flags.DEFINE_list("tasks", [], 'Names of tasks, with commas between them; "paper" are those of the GLA paper.')
_INCLUDE_PATH = flags.DEFINE_string("include_path", None, "A folder with tasks of your own, YAML files.")
_OUTPUT = flags.DEFINE_string("output", None, "Where results go; by default the folder `harness` in --workdir.")
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 16, "Requests or texts at a time, on all devices together.", lower_bound=1
)
_FEW_SHOT = flags.DEFINE_integer("num_fewshot", None, "Examples in a context; by default what the task says.")
_LIMIT = flags.DEFINE_integer(
    "limit", None, "Run so many documents of each task, or questions of each file of --recall, only.", lower_bound=1
)
_BEGIN = flags.DEFINE_bool(
    "begin_documents",
    None,
    "Put the token that begins documents before every context. By default for runs trained here, which never saw a "
    "text without; not for imported models, as the harness does not do it for those of Hugging Face. For --recall too.",
)


def main(_: dict[str, str]) -> None:
    """Print the figures."""
    from gla_jax.config import ConfigError

    for flag in (_TASKS, _INCLUDE_PATH, _OUTPUT, _FEW_SHOT):
        if not _HARNESS.value and flag.present:
            raise ConfigError(f"--{flag.name} needs --harness.")
    for flag in (_LIMIT, _BEGIN):
        if not (_HARNESS.value or _RECALL.value) and flag.present:
            raise ConfigError(f"--{flag.name} needs --harness or --recall.")
    for flag in (_LENGTH, _BUCKET, _STREAM, _DATA):
        if not _BY_POSITION.value and flag.present:
            raise ConfigError(f"--{flag.name} needs --by-position.")
    given = [flag.name for flag in (_BY_POSITION, _RECALL, _HARNESS) if flag.value]
    if len(given) > 1:
        raise ConfigError(f"--{given[0]} and --{given[1]} are two commands; give one of them.")
    if _HARNESS.value:
        _run_harness()
    elif _RECALL.value:
        _ask()
    elif _BY_POSITION.value:
        _score_by_position()
    else:
        _score_held_out()


def _score_held_out() -> None:
    """Print the step and the figures as one line of JSON."""
    # Imported here so that --help and mistakes in flags answer at once.
    import jax

    from gla_jax.config import ConfigError, MeshConfig
    from gla_jax.data.mqar import most_scored
    from gla_jax.evaluation import evaluate
    from gla_jax.models import abstract_model
    from gla_jax.parallel.mesh import make_mesh
    from gla_jax.training.checkpoint import restore_params
    from gla_jax.training.loop import open_data
    from gla_jax.training.step import make_eval_step
    from gla_jax.training.workdir import read_config

    workdir = open_path(_WORKDIR.value)
    config = read_config(workdir)
    with jax.set_mesh(make_mesh(MeshConfig())):
        config, data = open_data(config)
        if not data.eval_tokens:
            raise ConfigError(f"{workdir} holds nothing out: data.held_out={config.data.held_out}.")
        graphdef, abstract = abstract_model(config.model, config.dtype)
        params, step = restore_params(workdir / "checkpoints", abstract, lambda text: print(text, file=sys.stderr))
        figures = evaluate(
            make_eval_step(graphdef, most_scored=most_scored(config.data)),
            params,
            data.eval_batches(_BATCHES.value),
            batch_size=config.data.batch_size,
            bytes_per_token=data.eval_bytes_per_token,
        )
    print(json.dumps({"step": step, **figures}))


def _score_by_position() -> None:
    """Print a line of JSON for each bucket, and the table."""
    import dataclasses

    import jax

    from gla_jax.config import ConfigError, MeshConfig
    from gla_jax.data.pipeline import open_long_rows
    from gla_jax.evaluation.by_position import evaluate_by_position, position_table
    from gla_jax.loading import load_config, load_model
    from gla_jax.parallel.mesh import make_mesh

    workdir = open_path(_WORKDIR.value)
    config = load_config(workdir)
    data, usual = config.data, config.data.sequence_length
    if _DATA.value is not None:
        data = dataclasses.replace(data, path=_DATA.value, held_out=0.0, sequence_length=1)
    elif not (workdir / "metrics.jsonl").is_file():
        raise ConfigError(f"{workdir} is no training run, which would have held text out; name one with --data.")
    elif not data.held_out:
        raise ConfigError(f"{workdir} holds nothing out: data.held_out={data.held_out}; name a text with --data.")
    length = _LENGTH.value or 12 * usual
    most = _BATCHES.value * _BATCH_SIZE.value or None
    rows = open_long_rows(data, length=length, stream=_STREAM.value, most=most, vocab_size=config.model.vocab_size)
    with jax.set_mesh(make_mesh(MeshConfig())):
        buckets = evaluate_by_position(
            load_model(workdir), rows, bucket=_BUCKET.value or usual, batch_size=_BATCH_SIZE.value
        )
    for bucket in buckets:
        print(json.dumps(bucket))
    print(position_table(buckets), file=sys.stderr)


def _ask() -> None:
    """Print a line of JSON for each file of questions."""
    import jax
    from tqdm import tqdm

    from gla_jax.config import MeshConfig
    from gla_jax.data import load_tokenizer
    from gla_jax.evaluation.recall import evaluate_recall, read_questions
    from gla_jax.loading import load_config, load_model
    from gla_jax.parallel.mesh import make_mesh

    workdir = open_path(_WORKDIR.value)
    files = [(name, read_questions(Path(name), _LIMIT.value)) for name in _RECALL.value]
    tokenizer = load_tokenizer(load_config(workdir).data.tokenizer)
    begin = (workdir / "metrics.jsonl").is_file() if _BEGIN.value is None else _BEGIN.value
    with jax.set_mesh(make_mesh(MeshConfig())):
        model = load_model(workdir)
        for name, questions in files:
            with tqdm(total=len(questions), desc=name, unit="questions") as bar:
                figures, _ = evaluate_recall(
                    model,
                    tokenizer,
                    questions,
                    batch_size=_BATCH_SIZE.value,
                    begin_documents=begin,
                    advance=bar.update,
                )
            print(json.dumps({"file": name, **figures}))


def _run_harness() -> None:
    """Print the harness's table."""
    import importlib.util

    import jax

    from gla_jax.config import ConfigError, MeshConfig
    from gla_jax.data import load_tokenizer
    from gla_jax.loading import describe_files, load_config, load_model
    from gla_jax.models.language_model import room_for_tokens
    from gla_jax.parallel.mesh import make_mesh

    if not _TASKS.value:
        raise ConfigError("--harness needs --tasks=NAME,...; --tasks=paper takes those of the GLA paper.")
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("--harness needs the library lm-eval: pip install 'gla-jax[eval]'.")
    from gla_jax.evaluation.harness import HarnessModel, Journal, run_tasks

    workdir = open_path(_WORKDIR.value)
    if is_remote(workdir) and not _OUTPUT.value:
        raise ConfigError("--harness keeps its results in a folder of this machine; name one with --output.")
    output = Path(_OUTPUT.value) if _OUTPUT.value else workdir / "harness"
    config = load_config(workdir)
    tokenizer = load_tokenizer(config.data.tokenizer)
    begin = (workdir / "metrics.jsonl").is_file() if _BEGIN.value is None else _BEGIN.value
    with jax.set_mesh(make_mesh(MeshConfig())):
        owner = json.dumps([describe_files(workdir), tokenizer.fingerprint, _BATCH_SIZE.value, jax.device_count()])
        model = HarnessModel(
            load_model(workdir),
            tokenizer,
            batch_size=_BATCH_SIZE.value,
            journal=Journal(output / "answers.jsonl", owner),
            begin_documents=begin,
            room=room_for_tokens(config.model),
        )
        _, table = run_tasks(
            model,
            _TASKS.value,
            output,
            include_path=Path(_INCLUDE_PATH.value) if _INCLUDE_PATH.value else None,
            few_shot=_FEW_SHOT.value,
            limit=_LIMIT.value,
        )
    print(table)


if __name__ == "__main__":
    command_line.run(main)
