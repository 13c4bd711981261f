"""The points of a sweep: what they are, which are done, and how one is trained."""

import itertools
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from gla_jax.config import Config, ConfigError, flat
from gla_jax.training.together import Progress, train_together

Point = dict[str, str]
"""What makes a point different from the config: {field: value}, as typed."""


def make_points(axes: Sequence[str]) -> list[Point]:
    """Return all combinations of the values of some axes, each as --over has it.

    Raises:
        ConfigError: an axis that is written wrongly, or a field that is in two.
    """
    parsed: list[list[Point]] = []
    for axis in axes:
        names, equals, values = "".join(axis.split()).partition("=")
        fields = names.removeprefix("config.").split(",")
        rows = [value.split(":") if len(fields) > 1 else [value] for value in values.split(",")]
        if not equals or not all(len(row) == len(fields) and all(row) for row in rows):
            raise ConfigError(
                f"--over={axis} must be FIELD=VALUE,VALUE,.. or FIELD,FIELD=VALUE:VALUE,VALUE:VALUE,.. with as many "
                "values as fields."
            )
        parsed.append([dict(zip(fields, row, strict=True)) for row in rows])
    fields = [name for axis in parsed for name in axis[0]]
    for name in fields:
        if fields.count(name) > 1:
            raise ConfigError(f"--over names {name} twice; put all its values into one.")
    return [dict(itertools.chain(*(each.items() for each in parts))) for parts in itertools.product(*parsed)]


def learning_rates(texts: Sequence[str], config: Config) -> list[float]:
    """Read --learning_rates.

    Raises:
        ConfigError: one that is no number above 0, or below where the schedule ends.
    """
    rates = []
    for text in texts or [str(config.optimizer.learning_rate)]:
        try:
            rate = float(text)
        except ValueError:
            rate = math.nan
        if not 0 < rate < math.inf:
            raise ConfigError(f"--learning_rates: {text!r} must be a number above 0.")
        if rate < config.optimizer.final_learning_rate:
            raise ConfigError(
                f"--learning_rates: {text} is below optimizer.final_learning_rate="
                f"{config.optimizer.final_learning_rate}; lower that."
            )
        rates.append(rate)
    return rates


def read_seeds(texts: Sequence[str] | None) -> list[int] | None:
    """Read --seeds.

    Raises:
        ConfigError: one that is no number from 0 on, or that comes twice.
    """
    for text in texts or []:
        if not (text.isascii() and text.isdecimal()):
            raise ConfigError(f"--seeds: {text!r} must be a whole number, 0 or more.")
    seeds = [int(text) for text in texts or []]
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"--seeds={','.join(texts or [])} has one twice; name each once.")
    return seeds or None


def shared_settings(
    configs: Sequence[Config],
    varied: set[str],
    rates: Sequence[float],
    solved: float | None,
    seeds: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Return what all lines of a file must have in common: {field: value} of the config, and of the sweep."""
    fields = {name: value for name, value in flat(configs[0]).items() if name not in varied}
    del fields["optimizer.learning_rate"]
    return json.loads(json.dumps(fields | {"learning_rates": list(rates), "solved": solved, "seeds": seeds}))


def read_points(path: Path, settings: dict[str, Any]) -> set[str]:
    """Return the points, as JSON, that a file has lines of; a last line that a killed run left half written is cut off.

    Raises:
        ConfigError: the file is of another sweep.
    """
    if not path.exists():
        return set()
    content = path.read_bytes()
    complete = content[: content.rfind(b"\n") + 1]
    if complete != content:
        os.truncate(path, len(complete))
    done = set()
    for number, text in enumerate(complete.decode().splitlines(), 1):
        try:
            line = json.loads(text)
            theirs, point = line["settings"], json.dumps(line["point"])
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f"--output={path} is no file of a sweep: see its line {number}; name another.") from None
        for name in settings | theirs:
            if theirs.get(name) != settings.get(name):
                raise ConfigError(
                    f"--output={path} holds points with {name}={theirs.get(name)}, which is {settings.get(name)} now; "
                    "name another file."
                )
        done.add(point)
    return done


def train_point(
    config: Config, rates: Sequence[float], solved: float | None, seeds: Sequence[int] | None = None
) -> dict[str, Any]:
    """Train a point to its end, or until it is solved; the arguments are those of `train_together`.

    Returns:
        What a line says of it: device, steps, seconds, whether it was solved, and its evaluations, in which lists have
        an entry for each model.
    """
    evaluations = []
    is_solved = False
    of_models = [rate for rate in rates for _ in seeds or [config.seed]]
    for progress in train_together(config, rates, seeds):
        print(f"  {_describe(progress, config.steps, of_models)}", file=sys.stderr, flush=True)
        evaluations.append(
            {
                "step": progress.step,
                "loss": _finite(progress.loss),
                "eval/loss": _finite(progress.eval_loss),
                "eval/accuracy": _finite(progress.eval_accuracy),
                "seconds": round(progress.seconds, 2),
            }
        )
        is_solved = solved is not None and any(accuracy >= solved for accuracy in progress.eval_accuracy)
        if is_solved or not any(map(math.isfinite, progress.eval_loss)):
            break
    return {
        "device": jax.devices()[0].device_kind,
        "steps": evaluations[-1]["step"],
        "seconds": evaluations[-1]["seconds"],
        "solved": is_solved,
        "evaluations": evaluations,
    }


def _finite(values: Sequence[float]) -> list[float | None]:
    return [round(value, 6) if math.isfinite(value) else None for value in values]


def _describe(progress: Progress, steps: int, rates: Sequence[float]) -> str:
    parts = [
        f"{rate:g}: {loss:.3f} {accuracy:.1%}"
        for rate, loss, accuracy in zip(rates, progress.eval_loss, progress.eval_accuracy, strict=True)
    ]
    return f"step {progress.step:,} of {steps:,}, {progress.seconds:.0f} s; eval loss, accuracy  " + "  ".join(parts)
