"""The configuration: frozen dataclasses that the rest of the code is typed by, built and checked once.

A config file (`configs/*.py`) starts from `default_config()`, a locked `ml_collections.ConfigDict` with every field,
and sets values; flags override them; `build` checks the result and freezes it into a `Config`. Nothing downstream sees
a ConfigDict, and nothing downstream repeats a check.
"""

import ast
import contextlib
import dataclasses
import difflib
import importlib.util
import inspect
import itertools
import math
import re
import runpy
import traceback
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

MixerOptions = dict[str, Any]


class ConfigError(ValueError):
    """A mistake of the user's that one sentence explains: the field, its value, and what would be right."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A language model: embedding, `num_layers` blocks of (mixer, SwiGLU), head."""

    mixer: str | tuple[str, ...] = "gla"
    """The sequence mixer of every layer, or one name per layer (a hybrid)."""
    hidden_size: int = 256
    """Model dimension D."""
    num_layers: int = 4
    num_heads: int = 4
    vocab_size: int | None = None
    """None: the tokeniser's."""
    tie_embeddings: bool = True
    """Use the embedding table as the output head."""
    intermediate_size: int | None = None
    """Width of the SwiGLU; None: 8/3 D rounded up to a multiple of 256, as in the paper; 0: no SwiGLU (Mamba)."""
    norm_eps: float = 1e-6
    initializer_range: float = 0.02
    embedding_dropout: float = 0.0
    """Probability with which training takes an entry of a token's embedding for 0."""
    remat: str = "none"
    """What the backward pass recomputes: "none", "full" (whole layers), "dots" (all but matrix products), or "offload"
    (whole layers, and what each starts from waits in the host's memory)."""
    unroll: bool | None = None
    """Compile a training step layer by layer, and not as one loop over layers, which takes longer but spares GPUs to
    copy all that layers keep for the backward pass; None: on GPUs."""
    mixers: MixerOptions = dataclasses.field(default_factory=dict)
    """Options of each mixer by its name, e.g. `model.mixers.gla.expand_k`; the fields are the layer's own."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where tokens come from and how they are cut into rows."""

    corpus: str = "kjv"
    """"kjv", "stdlib", "site-packages", "synthetic", or "mqar"; not read when `path` is given."""
    path: str | None = None
    """A token file or folder made by `python -m gla_jax.data.prepare`; or several, or corpora: "mine:0.7,kjv:0.3"."""
    tokenizer: str = "bytes"
    """"bytes", a Hugging Face tokenizer.json, or a SentencePiece .model file."""
    sequence_length: int = 256
    """Tokens in a row, T."""
    batch_size: int = 16
    """Rows in a step, all hosts together."""
    segments: int = 1
    """A row goes on for so many steps, T tokens in each, with the state carried on and no gradient across."""
    pairs: int = 16
    """Keys and values to remember in a row of "mqar"."""
    held_out: float = 0.05
    """Share of the tokens, in whole documents at the end of each corpus, kept for evaluation."""
    prefetch: int = 4
    """Batches made ahead of the step by background threads; 0: none, and no threads."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, its schedule, and what is done to gradients before it."""

    learning_rate: float = 3e-4
    """Peak."""
    warmup_steps: int = 100
    """Steps of linear rise from `final_learning_rate` to the peak."""
    schedule: str = "cosine"
    """"cosine", "wsd" (warm-up, stable, decay), or "constant"."""
    final_learning_rate: float = 3e-5
    """Where the schedule starts and ends (the paper: a tenth of the peak)."""
    decay_fraction: float = 0.2
    """Share of the steps in which "wsd" decays."""
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.01
    decayed: str = "kernels"
    """What weight decay applies to: "kernels" of linear maps, or "all" parameters, as in torch's AdamW."""
    clip_norm: float = 1.0
    """Global gradient norm is clipped to this; 0: never."""
    accumulation_steps: int = 1
    """Microbatches that a step is split into, weighted by their tokens."""
    offload: bool = False
    """Keep the moments of AdamW in the host's memory while gradients are computed."""
    ema_decay: float = 0.0
    """Decay of an exponential moving average of the parameters, used for evaluation; 0: none is kept."""
    z_loss: float = 0.0
    """Coefficient of mean(log Z)^2."""
    spike_policy: str = "none"
    """Of steps whose loss or gradient norm leaps: "stop" the run, "skip" the update and count it, or "none"."""
    spike_sigmas: float = 6.0
    """How many standard deviations above the mean of the last 128 steps is a leap."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many ways each kind of parallelism splits the devices; one of them may be -1: whatever is left."""

    data: int = 1
    fsdp: int = -1
    sequence: int = 1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When the state is saved."""

    every: int = 500
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 3
    """How many of the newest stay on disk, beside the best by evaluation loss."""


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """When the held-out part is scored."""

    every: int = 500
    """Steps between evaluations; there is one after the last step as well. 0: never."""
    batches: int = 8
    """Batches per evaluation during training; 0: the whole held-out part."""


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """What is written while training."""

    every: int = 10
    """Steps between lines; the first and the last step have one as well."""
    wandb_project: str | None = None
    """Log to this Weights & Biases project as well (extra `wandb`)."""


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """A sample of text written to `samples.txt` at every evaluation, to watch a model learn."""

    prompt: str = ""
    tokens: int = 0
    """0: no samples."""
    temperature: float = 0.8


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    """A window of steps to trace for xprof or Perfetto."""

    start: int = 10
    steps: int = 0
    """0: no trace."""


@dataclasses.dataclass(frozen=True)
class DtypeConfig:
    """Number formats by role."""

    params: str = "float32"
    compute: str = "bfloat16"
    matmul: str = "compute"
    """Of the factors of products with weights inside layers: "compute", or "float8" (e4m3, and e5m2 for gradients)."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that defines a run."""

    seed: int = 0
    """Of the parameters, the order of the data, and samples."""
    steps: int = 1000
    """Updates in all; raise it to train a finished run on."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()
    sample: SampleConfig = SampleConfig()
    profile: ProfileConfig = ProfileConfig()
    dtype: DtypeConfig = DtypeConfig()
    init_from: str | None = None
    """A workdir whose parameters a new run starts with; a checkpoint in the run's own workdir wins."""


# From a config file, flags or config.json to a checked Config -------------------------------------------------------


def default_config() -> ConfigDict:
    """Return every field with its default, locked: what a config file starts from.

    A field takes a value of any type here: `build` checks them all, in one place.
    """
    return ConfigDict(as_dict(_defaults()), type_safe=False).lock()


def load(path: str, overrides: Mapping[str, str] | None = None) -> Config:
    """Run a config file, override fields, and build the result.

    Args:
        path: a Python file with a function `get_config() -> ConfigDict`; "file.py:text" calls `get_config("text")`.
        overrides: values as they are typed on a command line, by dotted name: {"model.hidden_size": "512"}.

    Raises:
        ConfigError: no such file or field, or a value that `build` refuses.
    """
    file, _, argument = path.partition(":")
    if not Path(file).is_file():
        raise ConfigError(f"--config={file}: there is no such file; the folder configs/ has some.")
    get_config = runpy.run_path(file).get("get_config")
    if get_config is None:
        raise ConfigError(f"--config={file} has no function get_config() that returns a config.")
    try:
        settings = get_config(*([argument] if argument else []))
    except AttributeError as error:
        # What a locked ConfigDict raises for a field that it lacks holds a KeyError, which quotes the name.
        inner = error.args[0] if error.args else None
        quoted = re.search(r"['\"](\w+)['\"]", str(inner.args[0])) if isinstance(inner, KeyError) else None
        if quoted is None:
            raise
        line = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file][-1]
        raise _unknown_field(quoted[1], where=f"{file}, line {line}: ") from None
    if not isinstance(settings, ConfigDict):
        raise ConfigError(f"get_config() of {file} returned {type(settings).__name__}, not a ConfigDict.")
    for name, text in (overrides or {}).items():
        override(settings, name, text)
    return build(settings)


def override(settings: ConfigDict, name: str, text: str) -> None:
    """Set one field from text.

    Args:
        settings: changed in place.
        name: dotted, e.g. "model.mixers.gla.expand_k".
        text: e.g. "0.5"; "none" is None, "gla,attention" a list.

    Raises:
        ConfigError: no such field, or text that is not a value of its type.
    """
    hints = _hints(Config, "")
    if name not in hints:
        if within := [field for field in hints if field.startswith(f"{name}.")]:
            raise ConfigError(f"{name}={text!r} must be set field by field, such as {within[0]}.")
        raise _unknown_field(name)
    *sections, field = name.split(".")
    for section in sections:
        settings = settings[section]
    settings[field] = _parse(text, hints[name], name)


def build(settings: ConfigDict | Mapping[str, Any]) -> Config:
    """Check every field and freeze them; those that are missing get their defaults.

    Raises:
        ConfigError: the first mistake, in one sentence.
    """
    config = _build(Config, settings.to_dict() if isinstance(settings, ConfigDict) else settings, "")
    _check(config)
    return config


def as_dict(config: Config) -> dict[str, Any]:
    """Return nested dicts of plain values, which JSON can hold and `build` takes back."""
    return dataclasses.asdict(config)


def flat(config: Config) -> dict[str, Any]:
    """Return {dotted name: value} of every field."""

    def walk(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for name, value in values.items():
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{name}.")
            else:
                yield prefix + name, value

    return dict(walk(as_dict(config), ""))


def describe() -> str:
    """Return a text with every field, its default and its meaning, for `--help`."""
    meanings = _meanings(_defaults(), "")
    return "\n".join(
        f"  --config.{name}={value} ".ljust(60) + meanings.get(name, "") for name, value in flat(_defaults()).items()
    )


# The pieces of the above --------------------------------------------------------------------------------------------


def _mixers() -> dict[str, Any]:
    from gla_jax.layers import MIXERS  # not at the top: layers import this module

    return MIXERS


def _defaults() -> Config:
    return Config(model=ModelConfig(mixers={name: mixer.Options() for name, mixer in _mixers().items()}))


def _hints(cls: type, prefix: str) -> dict[str, Any]:
    """Return {dotted name: type annotation} of every field."""
    hints: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            hints |= _hints(hint, f"{prefix}{name}.")  # type: ignore[arg-type]
        elif hint == MixerOptions:
            for mixer, layer in _mixers().items():
                hints |= _hints(layer.Options, f"{prefix}{name}.{mixer}.")
        else:
            hints[prefix + name] = hint
    return hints


def _meanings(section: Any, prefix: str) -> dict[str, str]:
    """Return {dotted name: the docstring below the field}."""
    classes = [cls for cls in reversed(type(section).__mro__) if dataclasses.is_dataclass(cls)]
    body = [line for cls in classes for line in ast.parse(inspect.getsource(cls)).body[0].body]  # type: ignore[attr-defined]
    meanings = {}
    for pair in itertools.pairwise(body):
        match pair:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                meanings[prefix + name] = " ".join(text.split())
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        for inner, part in value.items() if isinstance(value, dict) else [("", value)]:
            if dataclasses.is_dataclass(part):
                meanings |= _meanings(part, f"{prefix}{field.name}." + (f"{inner}." if inner else ""))
    return meanings


def _unknown_field(name: str, where: str = "") -> ConfigError:
    """Say that there is no such field and which is nearest, whether a whole path was given or only its last part."""
    names = list(_hints(Config, ""))
    by_part = {part: part for known in names for part in known.split(".")[:-1]}
    by_part |= {known.rpartition(".")[2]: known for known in reversed(names)}
    near = difflib.get_close_matches(name, names, 1, cutoff=0.75) or [
        by_part[part] for part in difflib.get_close_matches(name.rpartition(".")[2], by_part, 1)
    ]
    cure = f"did you mean {near[0]}?" if near else "`python train.py --help` lists all there are."
    return ConfigError(f"{where}the config has no field {name}; {cure}")


def _kinds(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def _wrong_type(name: str, value: Any, hint: Any) -> ConfigError:
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", types.NoneType: "None"}
    wanted = " or ".join(words.get(kind, "a list of texts") for kind in _kinds(hint))
    return ConfigError(f"{name}={value!r} must be {wanted}.")


def _parse(text: str, hint: Any, name: str) -> Any:
    """Read text as one of the types of an annotation, the strictest first."""
    kinds = _kinds(hint)
    if types.NoneType in kinds and text.lower() in ("none", "null"):
        return None
    if bool in kinds and text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        if kind in kinds:
            with contextlib.suppress(ValueError):
                return kind(text)
    if "," in text and any(typing.get_origin(kind) is tuple for kind in kinds):
        return tuple(part.strip(" '\"") for part in text.strip("()[], ").split(","))
    if str in kinds:
        return text
    raise _wrong_type(name, text, hint)


def _build(cls: Any, values: Any, prefix: str) -> Any:
    """Make a dataclass of nested dicts."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{prefix[:-1]}={values!r} must be set field by field; `python train.py --help` lists them.")
    hints = typing.get_type_hints(cls)
    for name in values:
        if name not in hints:
            raise _unknown_field(prefix + name)
    fields: dict[str, Any] = {}
    for name, hint in hints.items():
        if dataclasses.is_dataclass(hint):
            fields[name] = _build(hint, values.get(name, {}), f"{prefix}{name}.")
        elif hint == MixerOptions:
            given = values.get(name, {})
            for mixer in given:
                if mixer not in _mixers():
                    raise _unknown_field(f"{prefix}{name}.{mixer}")
            fields[name] = {
                mixer: _build(layer.Options, given.get(mixer, {}), f"{prefix}{name}.{mixer}.")
                for mixer, layer in _mixers().items()
            }
        elif name in values:
            fields[name] = _typed(values[name], hint, prefix + name)
    return cls(**fields)


def _typed(value: Any, hint: Any, name: str) -> Any:
    """Return the value if the annotation allows it: whole numbers are numbers too, and lists become tuples."""
    for kind in _kinds(hint):
        if typing.get_origin(kind) is tuple:
            if isinstance(value, list | tuple) and all(isinstance(part, typing.get_args(kind)[0]) for part in value):
                return tuple(value)
        elif kind is float:
            if type(value) in (int, float) and math.isfinite(value):
                return float(value)
        elif type(value) is kind:
            return value
    raise _wrong_type(name, value, hint)


_LEAST = {
    "steps": 1,
    "data.sequence_length": 1,
    "data.batch_size": 1,
    "data.segments": 1,
    "optimizer.warmup_steps": 0,
    "optimizer.final_learning_rate": 0,
    "optimizer.weight_decay": 0,
    "optimizer.clip_norm": 0,
    "optimizer.accumulation_steps": 1,
    "optimizer.z_loss": 0,
    "optimizer.spike_sigmas": 0,
    "checkpoint.every": 1,
    "checkpoint.keep": 1,
    "eval.every": 0,
    "eval.batches": 0,
    "log.every": 1,
    "sample.tokens": 0,
    "sample.temperature": 0,
    "profile.start": 0,
    "profile.steps": 0,
}
_CHOICES = {
    "optimizer.schedule": ("cosine", "wsd", "constant"),
    "optimizer.decayed": ("kernels", "all"),
    "optimizer.spike_policy": ("none", "stop", "skip"),
    "dtype.params": ("float32", "bfloat16"),
    "dtype.compute": ("float32", "bfloat16"),
    "dtype.matmul": ("compute", "float8"),
}


def _check(config: Config) -> None:
    """Raise ConfigError for the first value that makes no sense; meshes and data files are checked when opened."""
    values, optimizer = flat(config), config.optimizer
    for name, least in _LEAST.items():
        if values[name] < least:
            raise ConfigError(f"{name}={values[name]} must be at least {least}.")
    for name, choices in _CHOICES.items():
        if values[name] not in choices:
            raise ConfigError(f"{name}={values[name]!r} is unknown; choose one of {', '.join(map(repr, choices))}.")
    for name in ("learning_rate", "eps"):
        if values[f"optimizer.{name}"] <= 0:
            raise ConfigError(f"optimizer.{name}={values[f'optimizer.{name}']} must be above 0.")
    for name in ("b1", "b2", "ema_decay"):
        if not 0 <= values[f"optimizer.{name}"] < 1:
            raise ConfigError(f"optimizer.{name}={values[f'optimizer.{name}']} must be at least 0 and below 1.")
    if not 0 < optimizer.decay_fraction <= 1:
        raise ConfigError(f"optimizer.decay_fraction={optimizer.decay_fraction} must be above 0 and at most 1.")
    if optimizer.final_learning_rate > optimizer.learning_rate:
        raise ConfigError(
            f"optimizer.final_learning_rate={optimizer.final_learning_rate} exceeds optimizer.learning_rate="
            f"{optimizer.learning_rate}; a tenth of it is usual."
        )
    if config.data.batch_size % optimizer.accumulation_steps:
        raise ConfigError(
            f"optimizer.accumulation_steps={optimizer.accumulation_steps} does not divide data.batch_size="
            f"{config.data.batch_size}; try {nearest_divisors(optimizer.accumulation_steps, config.data.batch_size)}."
        )
    if config.data.segments > 1 and optimizer.accumulation_steps > 1:
        raise ConfigError(
            f"data.segments={config.data.segments} carries the state of whole batches on, which optimizer."
            f"accumulation_steps={optimizer.accumulation_steps} cuts; set it to 1."
        )
    project = config.log.wandb_project
    if project is not None and importlib.util.find_spec("wandb") is None:
        raise ConfigError(f"log.wandb_project={project!r} needs the library wandb: pip install 'gla-jax[wandb]'.")
    from gla_jax.models.language_model import check as check_model  # not at the top: models import this module

    # The tokeniser, which is not open yet, may have to supply the size of the vocabulary.
    check_model(dataclasses.replace(config.model, vocab_size=config.model.vocab_size or 1))


def nearest_divisors(value: int, of: int) -> str:
    """Return the divisors of a number that lie on both sides of a value which is none, e.g. "2 or 4"."""
    divisors = [number for number in range(1, of + 1) if of % number == 0]
    below = [number for number in divisors if number < value][-1:]
    above = [number for number in divisors if number > value][:1]
    return " or ".join(map(str, below + above))
