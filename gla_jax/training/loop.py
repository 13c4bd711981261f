"""The training loop, from a config and a folder to a trained model."""

import contextlib
import dataclasses
import math
import signal
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from gla_jax.config import Config, ConfigError
from gla_jax.data import Data, mqar, open_dataset
from gla_jax.evaluation import EvalStep, evaluate
from gla_jax.inference import generate
from gla_jax.models import abstract_model, bind, parameter_table
from gla_jax.parallel.mesh import check_batch, make_mesh, place_batch, process_rows
from gla_jax.storage import open_path
from gla_jax.training.checkpoint import CheckpointWriter, require_space, restore_params, restore_state
from gla_jax.training.display import Display, Numbers, open_display
from gla_jax.training.interruption import Interruption
from gla_jax.training.metrics import MetricsWriter
from gla_jax.training.optimizer import make_optimizer
from gla_jax.training.profiling import ProfileWindow
from gla_jax.training.stalls import StallWatch
from gla_jax.training.state import Params, TrainState, abstract_state, init_state
from gla_jax.training.step import Metrics, make_eval_step, make_train_step
from gla_jax.training.throughput import Throughput
from gla_jax.training.workdir import Workdir, read_config

_MOST_SKIPPED = 32  # steps in a row


class DivergedError(FloatingPointError):
    """The loss or the gradient of a step is not a finite number, or leaps where the config says to stop."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    state: TrainState
    step: int
    """Updates made."""
    evaluation: dict[str, float]
    """What the last evaluation found; empty if there was none."""
    stopped_by: signal.Signals | None
    """What ended the run before its last step, if anything did."""


def train(config: Config, workdir: str, *, devices: Sequence[jax.Device] | None = None) -> Outcome:
    """Train a model, or go on training the one in the folder from its newest checkpoint.

    Step n, counted from 1, trains on batch n - 1, a function of the seed and that number alone. Evaluations and
    checkpoints of step n are of the parameters after it. A run that was killed and resumed is the same run, to the bit.

    Args:
        config: the run.
        workdir: its folder, where config.json, metrics.jsonl, timings.jsonl, samples.txt, checkpoints/ and, if
            tensorboardX is installed, tensorboard/ are left.
        devices: what to train on; None: all there are.

    Returns:
        How it ended. On SIGTERM or Ctrl-C that is after the step in progress, with a checkpoint of it on disk.

    Raises:
        ConfigError: a mistake of the user's; nothing was compiled or overwritten.
        DivergedError: the run diverged; its newest checkpoint is from before that.
    """
    with contextlib.ExitStack() as stack:
        mesh = make_mesh(config.mesh, devices)
        stack.enter_context(jax.set_mesh(mesh))
        display = stack.enter_context(open_display(config.steps))
        config, data = open_data(config)
        graphdef, abstract_params = abstract_model(config.model, config.dtype)
        optimizer = make_optimizer(config.optimizer, config.steps)
        abstract = abstract_state(config, optimizer, abstract_params)

        folder = stack.enter_context(Workdir(workdir))
        folder.check_config(config)
        require_space(folder.path, abstract)
        display.say(_introduction(config, data, mesh, abstract_params))
        state, params = _restore_run(config, folder, abstract, data, display), None
        if state is None and config.init_from is not None:
            params = _restore_other(config.init_from, config, abstract_params, display)
        folder.write_config(config)  # whatever may be wrong has been found by now
        if state is None:
            state = init_state(config, optimizer, params)
        start = int(state.step)

        train_step = make_train_step(config, graphdef, optimizer)
        eval_step = make_eval_step(graphdef, most_scored=mqar.most_scored(config.data))
        throughput = Throughput(
            tokens_per_step=config.data.batch_size * config.data.sequence_length,
            flops_per_token=3 * bind(graphdef, abstract_params).flops_per_token(config.data.sequence_length),
            device_kind=mesh.devices.flat[0].device_kind,
            device_count=mesh.size,
        )
        checkpoints = stack.enter_context(CheckpointWriter(folder.checkpoints, config.checkpoint, start=start))
        metrics = stack.enter_context(MetricsWriter(folder, config, start=start))
        profile = stack.enter_context(ProfileWindow(config.profile, folder.profile))
        interruption = stack.enter_context(Interruption())
        stalls = stack.enter_context(StallWatch(display.say))
        log = _StepLog(config, start, metrics, display, throughput)
        batches = data.train_batches(start)
        step, stopping, evaluation = start, False, {}

        for step in range(start + 1, config.steps + 1):
            with throughput.waiting_for_data(), stalls.waiting(step):
                rows = next(batches)
            batch = place_batch(rows, config.data.batch_size)
            with profile.step(step), jax.transfer_guard("disallow"):
                state, measured = train_step(state, batch)
            log.add(step, measured)
            profile.finish(step, measured)

            last, stopping = step == config.steps, interruption.requested(step)
            evaluating = data.eval_tokens and (step % config.eval.every == 0 or last) if config.eval.every else False
            saving = last or stopping or step % config.checkpoint.every == 0
            if evaluating or saving:
                log.flush()  # raises if the state is not worth keeping
            if evaluating:
                evaluation = _evaluate(config, data, eval_step, state)
                log.report(step, evaluation, {})
                if config.sample.tokens:
                    text = _sample(config, data, graphdef, state, step)
                    folder.add_sample(step, text)
                    display.say(text)
            if saving:
                metrics.flush()
                loss = evaluation["eval/loss"] if evaluating else None
                checkpoints.save(state, step=step, data_fingerprint=data.fingerprint, eval_loss=loss)
            if evaluating or saving:
                throughput.restart(step)
            if stopping:
                break
        return Outcome(state, step, evaluation, interruption.signal if stopping and step < config.steps else None)


def open_data(config: Config) -> tuple[Config, Data]:
    """Open the data of a run, this process's part of it on the current mesh, and have it settle the vocabulary's size.

    Raises:
        ConfigError: the data cannot be served, or the mesh does not divide a batch of it.
    """
    check_batch(config.data.batch_size, config.data.sequence_length, config.optimizer.accumulation_steps)
    index, count = process_rows(config.data.batch_size)
    data = open_dataset(
        config.data, seed=config.seed, process_index=index, process_count=count, vocab_size=config.model.vocab_size
    )
    vocab_size = config.model.vocab_size or data.vocab_size
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=vocab_size)), data


class _StepLog:
    """Leaves the newest step's metrics on the devices until the next step is on its way."""

    def __init__(
        self, config: Config, start: int, metrics: MetricsWriter, display: Display, throughput: Throughput
    ) -> None:
        self._config, self._metrics, self._display, self._throughput = config, metrics, display, throughput
        self._start = start
        self._newest: tuple[int, Metrics] | None = None
        self._spikes: float | None = None if start else 0.0
        self._skipped = 0
        display.begin(start)

    def add(self, step: int, measured: Metrics) -> None:
        """Take what a dispatched step will measure, and write what the step before it measured."""
        before, self._newest = self._newest, (step, measured)
        self._write(before)

    def flush(self) -> None:
        """Wait for the newest step and write what it measured."""
        newest, self._newest = self._newest, None
        self._write(newest)

    def report(self, step: int, metrics: Numbers, timings: Numbers) -> None:
        """Write and show figures."""
        self._metrics.write(step, metrics, timings)
        self._display.report(step, metrics, timings)

    def _write(self, entry: tuple[int, Metrics] | None) -> None:
        if entry is None:
            return
        step, measured = entry[0], {name: float(value) for name, value in jax.device_get(entry[1]).items()}
        self._check(step, measured)
        self._display.advance(step, measured["loss"])
        if step % self._config.log.every == 0 or step in (1, self._config.steps):
            order = ("loss", "grad_norm", "learning_rate", *sorted(measured))
            figures = {name: measured[name] if math.isfinite(measured[name]) else None for name in order}
            self.report(step, figures, self._throughput.read(step))
        elif step == self._start + 1:
            self._throughput.restart(step)  # what came before was compilation

    def _check(self, step: int, measured: Mapping[str, float]) -> None:
        """Stop at a step that has spoilt the state or leaps, or say that it was skipped, as the config wants it."""
        policy, spikes = self._config.optimizer.spike_policy, measured.get("spikes", 0.0)
        leaps, self._spikes = self._spikes is not None and spikes > self._spikes, spikes
        figures = f"loss {measured['loss']:.6g} and gradient norm {measured['grad_norm']:.6g}"
        finite = all(math.isfinite(value) for value in measured.values())
        if policy != "skip" and (leaps or not finite):
            raise DivergedError(
                f"Step {step} has {figures}{', which leap' if finite else ''}: training stops; "
                "the newest checkpoint is from before. A smaller optimizer.learning_rate or optimizer.clip_norm, a "
                "longer optimizer.warmup_steps, or optimizer.spike_policy='skip' from the beginning may help."
            )
        self._skipped = self._skipped + 1 if leaps else 0
        if leaps:
            self._display.say(f"Step {step} is skipped: it has {figures}, which leap.")
        if self._skipped == _MOST_SKIPPED:
            raise DivergedError(f"The last {_MOST_SKIPPED} steps were all skipped: training stops, as it is of no use.")


def _evaluate(config: Config, data: Data, eval_step: EvalStep, state: TrainState) -> dict[str, float]:
    return evaluate(
        eval_step,
        state.eval_params,
        data.eval_batches(config.eval.batches),
        batch_size=config.data.batch_size,
        bytes_per_token=data.eval_bytes_per_token,
    )


def _sample(config: Config, data: Data, graphdef: Any, state: TrainState, step: int) -> str:
    """Continue `sample.prompt`; another continuation at every step, the same in a resumed run."""
    tokens = [data.tokenizer.end_of_document, *data.tokenizer.encode(config.sample.prompt)]
    seed = int(jax.device_get(state.rng)[-1]) ^ step
    (new,) = generate(
        bind(graphdef, state.eval_params),
        [tokens],
        max_tokens=config.sample.tokens,
        temperature=config.sample.temperature,
        end_token=data.tokenizer.end_of_document,
        seed=seed,
    )
    return config.sample.prompt + data.tokenizer.decode(new)


def _restore_run(
    config: Config, folder: Workdir, abstract: TrainState, data: Data, display: Display
) -> TrainState | None:
    """Return the state of the newest checkpoint, if there is one and it goes with the config and the data."""
    restored = restore_state(folder.checkpoints, abstract, display.say)
    if restored is None:
        return None
    state, position = restored
    step = int(state.step)
    if position["fingerprint"] != data.fingerprint:
        raise ConfigError(
            f"--workdir={folder.path} was trained on other data: the corpus or its tokeniser has changed since step "
            f"{step}; bring the old one back, or use another folder."
        )
    if step > config.steps:
        raise ConfigError(f"steps={config.steps} is behind --workdir={folder.path}, which is at step {step}; raise it.")
    display.say(
        f"Resuming {folder.path} at step {step} of {config.steps}"
        + (", so init_from is not used." if config.init_from else ".")
        + (" There is nothing left to do; raise steps to train on." if step == config.steps else "")
    )
    return state


def _restore_other(workdir: str, config: Config, abstract_params: Params, display: Display) -> Params:
    """Return the newest parameters of another run, whose model must be the same in shape."""
    folder = open_path(workdir)
    shapes = lambda params: {row.path: row.shape for row in parameter_table(params)}
    ours, theirs = shapes(abstract_params), shapes(abstract_model(read_config(folder).model, config.dtype)[1])
    for name in ours | theirs:
        if ours.get(name) != theirs.get(name):
            raise ConfigError(
                f"init_from={workdir} has another model: {name} is {theirs.get(name)} there, {ours.get(name)} here."
            )
    params, step = restore_params(folder / "checkpoints", abstract_params, display.say)
    display.say(f"Starting with the parameters of {workdir} at step {step}.")
    return params


def _introduction(config: Config, data: Data, mesh: Mesh, abstract_params: Params) -> str:
    """Return what is worth knowing before the first step: devices, data, and a table of the parameters."""
    rows = parameter_table(abstract_params, config.optimizer.decayed)
    total = sum(row.count for row in rows)
    table = [("parameter", "shape", "dtype", "sharding", "decay", "count")]
    table += [
        (row.path, str(row.shape), row.dtype, row.spec, "yes" if row.decayed else "no", f"{row.count:,}")
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        [
            f"{mesh.size} x {mesh.devices.flat[0].device_kind}, mesh {dict(mesh.shape)}, "
            f"{config.dtype.compute} on {config.dtype.params} parameters",
            data.description,
            *("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in table),
            f"{total:,} parameters",
        ]
    )
