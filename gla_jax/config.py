"""The configuration: frozen dataclasses that the rest of the code is typed by, built and checked once.

A config file (`configs/*.py`) starts from `default_config()`, a locked `ml_collections.ConfigDict` with every field, and
sets values; flags override them; `build` checks the result and freezes it into a `Config`. Nothing downstream sees a
ConfigDict, and nothing downstream repeats a check.
"""

import dataclasses
from typing import Any


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
    """Width of the SwiGLU; None: 8/3 D rounded up to a multiple of 256, as in the paper."""
    norm_eps: float = 1e-6
    initializer_range: float = 0.02
    remat: str = "none"
    """What the backward pass recomputes: "none", "full" (whole layers), or "dots" (all but matrix products)."""
    mixers: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Options of each mixer by its name, e.g. `model.mixers.gla.expand_k`; the fields are the layer's own."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where tokens come from and how they are cut into rows."""

    corpus: str | None = "kjv"
    """"kjv", "stdlib", or "synthetic"; None when `path` is given."""
    path: str | None = None
    """A token file or folder made by `python -m gla_jax.data.prepare`, or several as "a.tokens:0.7,b.tokens:0.3"."""
    tokenizer: str = "bytes"
    """"bytes", a Hugging Face tokenizer.json, or a SentencePiece .model file."""
    sequence_length: int = 256
    """Tokens in a row, T."""
    batch_size: int = 16
    """Rows in a step, all hosts together."""
    held_out: float = 0.05
    """Share of a corpus, at its end and in whole documents, kept for evaluation."""
    prefetch: int = 4
    """Batches made ahead of the step by background threads."""


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
    """Applied to matrices only: not to biases, norms, embeddings."""
    clip_norm: float = 1.0
    """Global gradient norm is clipped to this; 0: never."""
    accumulation_steps: int = 1
    """Microbatches that a step is split into, weighted by their tokens."""
    ema_decay: float = 0.0
    """Decay of an exponential moving average of the parameters, used for evaluation; 0: none is kept."""
    z_loss: float = 0.0
    """Coefficient of mean(log Z)^2."""


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
    batches: int = 8
    """Batches per evaluation during training; 0: the whole held-out part."""


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """What is written while training."""

    every: int = 10
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


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that defines a run."""

    seed: int = 0
    steps: int = 1000
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
    """A workdir whose parameters a new run starts from; a checkpoint in the run's own workdir wins."""
