"""What a training step needs, found by compiling it for devices that need not be here. Nothing is allocated or run."""

import collections
import dataclasses
import functools
import importlib.metadata
import math
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from gla_jax.config import Config, ConfigError
from gla_jax.data.pipeline import open_tokenizer
from gla_jax.hardware import GIB, find_device
from gla_jax.models import abstract_model, bind
from gla_jax.parallel.mesh import check_batch, make_mesh, resolve_sizes
from gla_jax.parallel.program import Memory, read_collectives, read_kernels, read_memory, summarize
from gla_jax.parallel.sharding import axis_size, named_sharding
from gla_jax.training.optimizer import make_optimizer
from gla_jax.training.state import abstract_state
from gla_jax.training.step import make_train_step


class DoesNotFitError(ConfigError):
    """A step needs more memory than a device has."""

    def __init__(self, sentence: str, needed: int):
        super().__init__(sentence)
        self.needed = needed


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the compiler says of one training step. Bytes are of one device."""

    compiled_for: str
    """The kind of the devices."""
    stands_for: str | None
    """The kind of the devices that simulated ones stand in for."""
    devices: int
    mesh: dict[str, int]
    parameters: int
    batch_size: int
    sequence_length: int
    accumulation_steps: int
    rows_per_device: int
    """Of one microbatch."""
    flops: float
    """Of a step on all devices: the model's, without recomputation."""
    seconds_at_peak: float | None
    """What those take at the devices' peak; no step is faster."""
    memory: dict[str, int]
    """parameters, optimizer, batch (and the padding of all three), temporary, program, their sum peak, available; and
    host, what waits in the host's memory for each device."""
    collectives: dict[str, dict[str, int]]
    """By kind: count, bytes_sent, bytes_sent_overlapped; see `gla_jax.parallel.program.summarize`."""
    kernels: dict[str, int]
    """How often each Pallas kernel runs."""
    effort: str
    """The compiler's: "full" or "fast"."""
    compile_seconds: float
    versions: dict[str, str]

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.batch_size * self.sequence_length


def make_plan(
    config: Config,
    devices: Sequence[jax.Device],
    say: Callable[[str], None],
    *,
    stands_for: str | None = None,
    fast: bool = False,
) -> Plan:
    """Compile the training step of a config for devices, which may be descriptions of ones that are elsewhere.

    Args:
        config: the run; its data is not read.
        devices: all that the run would have.
        say: takes a line about what takes long.
        stands_for: the kind of device whose memory and peak count, if not theirs.
        fast: have the TPU compiler make less of an effort: a program sooner, with more memory and less overlap.

    Raises:
        ConfigError: the config does not go with so many devices.
        DoesNotFitError: it does, but takes more memory than they have.
    """
    config = _with_vocabulary(config)
    mesh = make_mesh(config.mesh, devices)
    kind = devices[0].device_kind
    device = find_device(stands_for or kind)
    with jax.set_mesh(mesh):
        check_batch(config.data.batch_size, config.data.sequence_length, config.optimizer.accumulation_steps)
        rows = config.data.batch_size // config.optimizer.accumulation_steps // axis_size("batch")
        graphdef, params = abstract_model(config.model, config.dtype)
        optimizer = make_optimizer(config.optimizer, config.steps)
        state = abstract_state(config, optimizer, params)
        batch = abstract_batch(config)
        say(f"Compiling for {mesh.size} x {stands_for or kind}, {rows} rows per device; it may take minutes.")
        start = time.perf_counter()
        step: Any = make_train_step(config, graphdef, optimizer)
        lowered = step.lower(state, batch)
        programs = lowered if isinstance(lowered, tuple) else (lowered,)
        kept = [leaf for leaf in jax.tree.leaves(state) if leaf.sharding.memory_kind == "pinned_host"]
        sizes = {
            "parameters": _bytes_per_device(state.params),
            "optimizer": _bytes_per_device((state.opt_state, state.ema)) - _bytes_per_device(kept),
        }
        arguments = sum(sizes.values()) + _bytes_per_device((batch, state.carried))
        refuse = functools.partial(_refuse, config, dict(mesh.shape), rows, stands_for or kind, arguments)
        try:
            compiled = [each.compile(compiler_options=_compiler_options(kind, fast)) for each in programs]
        except jax.errors.JaxRuntimeError as error:
            needed = _needed(str(error), arguments)
            if needed is None or device is None:
                raise
            raise refuse(needed, device.memory) from None
        seconds = time.perf_counter() - start
        memory = _add_up([read_memory(each) for each in compiled], sizes, _bytes_per_device(kept))
        collectives = [found for each in compiled for found in read_collectives(each.as_text())]
        kernels: collections.Counter[str] = collections.Counter()
        for each in compiled:
            kernels.update(read_kernels(each.as_text()))
        if device is not None and memory["peak"] > device.memory:
            raise refuse(memory["peak"], device.memory)
        tokens = config.data.batch_size * config.data.sequence_length
        flops = 3 * bind(graphdef, params).flops_per_token(config.data.sequence_length) * tokens
    return Plan(
        compiled_for=kind,
        stands_for=stands_for,
        devices=mesh.size,
        mesh=dict(mesh.shape),
        parameters=sum(leaf.size for leaf in jax.tree.leaves(params)),
        batch_size=config.data.batch_size,
        sequence_length=config.data.sequence_length,
        accumulation_steps=config.optimizer.accumulation_steps,
        rows_per_device=rows,
        flops=flops,
        seconds_at_peak=None if device is None else flops / mesh.size / device.flops,
        memory=memory | ({} if device is None else {"available": device.memory}),
        collectives=summarize(collectives),
        kernels=dict(kernels),
        effort="fast" if fast else "full",
        compile_seconds=seconds,
        versions=_versions(kind),
    )


def largest_batch(
    config: Config,
    devices: Sequence[jax.Device],
    say: Callable[[str], None],
    *,
    stands_for: str | None = None,
    fast: bool = False,
) -> Plan:
    """Plan for the most rows per device that fit, everything else being as the config says.

    Args:
        config: where to begin; its `data.batch_size` changes.
        devices, say, stands_for, fast: as for `make_plan`.

    Raises:
        ConfigError: as `make_plan`.
        DoesNotFitError: not even one row per device fits.
    """
    sizes = resolve_sizes(config.mesh, len(devices))
    unit = config.optimizer.accumulation_steps * sizes["data"] * sizes["fsdp"]
    plans: dict[int, Plan] = {}
    refusals: dict[int, DoesNotFitError] = {}
    kind = stands_for or devices[0].device_kind
    device = find_device(kind)
    if device is None:
        raise ConfigError(f"--fit needs to know how much memory a {kind!r} has, which is not in the table.")

    def needed(rows: int) -> int:
        # The first try takes the batch as it is, so that one that does not divide is refused.
        batch_size = rows * unit if plans or refusals else config.data.batch_size
        data = dataclasses.replace(config.data, batch_size=batch_size)
        try:
            plan = make_plan(dataclasses.replace(config, data=data), devices, say, stands_for=stands_for, fast=fast)
            plans[rows], size = plan, plan.memory["peak"]
        except DoesNotFitError as refusal:
            refusals[rows], size = refusal, refusal.needed
        say(f"{rows} rows per device: {size / GIB:.2f} of {device.memory / GIB:.2f} GiB")
        return size

    most = most_rows(needed, device.memory, max(1, config.data.batch_size // unit))
    if most == 0:
        raise refusals[1]
    return plans[most]


def most_rows(needed: Callable[[int], int], limit: int, rows: int) -> int:
    """Find the largest number whose need is within a limit, in few tries, as each may take minutes.

    The need grows about linearly: each try is where a line meets the limit, the one through the nearest tries on both
    sides of it, or else through the last two.

    Args:
        needed: grows with its argument, which is 1 or more.
        limit: the most that may be needed.
        rows: the first try.

    Returns:
        The largest number that may be; 0 if not even 1.
    """
    fits, does_not = 0, math.inf
    known = {0: 0}
    while does_not - fits > 1:
        known[rows] = needed(rows)
        if known[rows] <= limit:
            fits = rows
        else:
            does_not = rows
        low, high = (fits, int(does_not)) if fits and does_not < math.inf else list(known)[-2:]
        slope = (known[high] - known[low]) / (high - low)
        guess = high + (limit - known[high]) / slope if slope > 0 else 2 * rows
        rows = int(min(max(guess, fits + 1), does_not - 1))
    return fits


def abstract_batch(config: Config) -> dict[str, Any]:
    """Describe a batch as `place_batch` lays it out on the current mesh: {name: jax.ShapeDtypeStruct}."""
    shape = (config.data.batch_size, config.data.sequence_length)
    dtypes = dict.fromkeys(("inputs", "targets", "segment_ids", "positions"), jnp.int32) | {"weights": jnp.float32}
    place = named_sharding("batch", "time")
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=place) for name, dtype in dtypes.items()}


def _with_vocabulary(config: Config) -> Config:
    """Settle the vocabulary's size as opening the data would, without the data."""
    if config.model.vocab_size is not None:
        return config
    vocab_size = open_tokenizer(config.data, None).vocab_size
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=vocab_size))


def _compiler_options(kind: str, fast: bool) -> dict[str, Any] | None:
    if kind == "cpu":  # simulated: their machine code, which no figure comes from, need not be good
        return {"xla_backend_optimization_level": 0}
    return {"optimization_level": "O1"} if fast else None


def _bytes_per_device(tree: Any) -> int:
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _add_up(programs: Sequence[Memory], sizes: dict[str, int], kept: int) -> dict[str, int]:
    """Return what a step of one program needs, or one of two, of which the second uses what is kept by the host.

    Args:
        programs: one or two.
        sizes: bytes of parameters and optimizer on a device.
        kept: bytes in the host's memory, which simulated CPUs count as their own.
    """
    first, last = programs[0], programs[-1]
    if len(programs) == 1:
        batch, peak, code, host = first.arguments - sum(sizes.values()), first.peak, first.code, first.host
    else:
        batch, host = first.arguments - sizes["parameters"], max(first.host, kept)
        while_differentiating = first.peak + last.code + sizes["optimizer"]
        while_updating = last.peak + first.code + batch - (0 if last.host else kept)
        peak, code = max(while_differentiating, while_updating), first.code + last.code
    temporary = peak - code - batch - sum(sizes.values())
    return sizes | {"batch": batch, "temporary": temporary, "program": code, "peak": peak, "host": host}


def _needed(error: str, arguments: int) -> int | None:
    """Return the bytes that a program would have needed, from the compiler's refusal; None if it is another error."""
    amount = lambda match: round(float(match[1]) * {"": 1, "K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}[match[2]])
    if match := re.search(r"required for HLO temporaries \(([\d.]+)([KMGT]?)\) exceeds available HBM", error):
        return amount(match) + arguments
    if match := re.search(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm", error):
        return amount(match)
    return None


def _refuse(
    config: Config, mesh: dict[str, int], rows: int, kind: str, arguments: int, needed: int, available: int
) -> DoesNotFitError:
    """Say by how much a step does not fit, and what would help."""
    parts = mesh["data"] * mesh["fsdp"]
    fitting = max(1, int(rows * (available - arguments) / (needed - arguments))) if arguments < available else 0
    cures = []
    if config.model.remat not in ("full", "offload"):
        cures.append("--config.model.remat=full")
    elif config.model.remat == "full" and arguments < available:
        cures.append("--config.model.remat=offload")
    if mesh["data"] > 1 and arguments > available / 4:
        cures.append(f"--config.mesh.data=1 --config.mesh.fsdp={parts}")
    if rows > 1 and fitting:
        steps = config.optimizer.accumulation_steps
        of_batch = config.data.batch_size // parts
        steps = next(n for n in range(steps, of_batch + 1) if of_batch % n == 0 and of_batch // n <= fitting)
        cures.append(f"--config.optimizer.accumulation_steps={steps}")
        cures.append(f"--config.data.batch_size={fitting * parts * config.optimizer.accumulation_steps}")
    if not cures or arguments > available / 2:
        cures.append(f"more than {math.prod(mesh.values())} devices")
    return DoesNotFitError(
        f"The step does not fit into a {kind}: with {rows} row{'s' * (rows > 1)} per device it needs "
        f"{needed / GIB:.2f} GiB, {(needed - available) / GIB:.2f} more than the {available / GIB:.2f} there are "
        f"({arguments / GIB:.2f} of it for parameters, optimizer and batch); what would help: {', or '.join(cures)}.",
        needed,
    )


def _versions(kind: str) -> dict[str, str]:
    names = ["jax", "jaxlib", *(["libtpu"] if kind.startswith("TPU") else [])]
    return {name: importlib.metadata.version(name) for name in names}
