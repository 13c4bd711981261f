"""Checkpoints on disk, by Orbax: written in the background, complete or not there at all, readable on any mesh.

A checkpoint is a folder named by its step, with the items `params`, `ema` and `carried` (if the run has them),
`optimizer` (its state, the step, the rng) and `data` (where the pipeline stands, and its fingerprint). Orbax writes it
under another name and renames it at the end, so that one half written is never found. A list of file sizes goes in just
before that, by which one that lost something later is known.
"""

import asyncio
import functools
import itertools
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from gla_jax.config import CheckpointConfig, ConfigError
from gla_jax.storage import is_remote
from gla_jax.training.state import Params, TrainState

_SIZES = "file_sizes.json"
_DIGITS = 8
_OVERHEAD = 2**20  # bytes that a checkpoint needs beside the arrays


class CheckpointWriter:
    """Saves checkpoints, and deletes all but the newest few and the best by evaluation loss.

    Args:
        folder: where they go; made if need be.
        config: how many to keep.
        start: step that training goes on from. Checkpoints of later steps, which could not be read or training would
            go on from them, are set aside under another name.
    """

    def __init__(self, folder: Path, config: CheckpointConfig, *, start: int):
        self._folder = folder = _absolute(folder)
        if jax.process_index() == 0:
            for step in _steps(folder):
                if step > start:
                    path = _path(folder, step)
                    path.rename(_unused(path.with_name(f"unreadable-{path.name}")))
        multihost_utils.sync_global_devices("checkpoints set aside")
        self._manager = ocp.CheckpointManager(
            folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=AnyPreservationPolicy(
                    [LatestN(config.keep), BestN(n=1, get_metric_fn=lambda metrics: -metrics["eval_loss"])]
                ),
                best_fn=lambda metrics: metrics["eval_loss"],  # has Orbax store them, so that later runs can compare
                step_format_fixed_length=_DIGITS,
                cleanup_tmp_directories=True,
                async_options=ocp.AsyncOptions(post_finalization_callback=self._write_sizes),
            ),
        )

    def save(self, state: TrainState, *, step: int, data_fingerprint: str, eval_loss: float | None = None) -> None:
        """Copy a state off the devices and write it in the background; wait first for the one before.

        Args:
            state: what to save; may be given up as soon as this returns.
            step: its step.
            data_fingerprint: of the pipeline, whose next batch is that of this step.
            eval_loss: held-out loss of this very state, if it was evaluated.

        Raises:
            ConfigError: the disk is too full.
        """
        if step in self._manager.all_steps():
            return
        self._manager.wait_until_finished()
        require_space(self._folder, state)
        items = {
            "params": ocp.args.StandardSave(state.params),
            "optimizer": ocp.args.StandardSave(_optimizer_item(state)),
            "data": ocp.args.JsonSave({"fingerprint": data_fingerprint, "next_step": step}),
        }
        for name in ("ema", "carried"):
            if getattr(state, name) is not None:
                items[name] = ocp.args.StandardSave(getattr(state, name))
        metrics = {"eval_loss": math.inf if eval_loss is None else eval_loss}
        self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        """Wait until everything is on disk, unless the user insists on leaving at once."""
        if kind is not KeyboardInterrupt:
            self._manager.close()

    def _write_sizes(self) -> None:
        """Complete a checkpoint that is about to be renamed; Orbax calls this."""
        if jax.process_index() == 0:
            for unfinished in self._folder.glob("*.orbax-checkpoint-tmp*"):
                (unfinished / _SIZES).write_text(json.dumps(_file_sizes(unfinished)))


def require_space(folder: Path, state: TrainState) -> None:
    """Raise ConfigError if the disk has no room for another checkpoint; the first process looks, for all that share it.

    Args:
        folder: where it would go.
        state: what would be saved, or its description.
    """
    if jax.process_index() > 0 or is_remote(folder):
        return
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)) + _OVERHEAD
    free = shutil.disk_usage(folder).free
    if free < size:
        raise ConfigError(
            f"{folder} has {free / 1e6:,.1f} MB left on its disk and a checkpoint takes {size / 1e6:,.1f} MB; "
            "free some space and give the same command again."
        )


def restore_state(
    folder: Path, abstract: TrainState, log: Callable[[str], None]
) -> tuple[TrainState, dict[str, Any]] | None:
    """Read the newest checkpoint that is whole.

    Args:
        folder: of a `CheckpointWriter`; it need not exist.
        abstract: shapes, dtypes and shardings to read into.
        log: called with a sentence for every newer checkpoint that cannot be read.

    Returns:
        The state and the item `data`, or None if there is no checkpoint at all.

    Raises:
        ConfigError: no checkpoint can be read, though there are some.
    """
    targets = {
        "params": ocp.args.StandardRestore(abstract.params),
        "optimizer": ocp.args.StandardRestore(_optimizer_item(abstract)),
        "data": ocp.args.JsonRestore(),
    }
    for name in ("ema", "carried"):
        if getattr(abstract, name) is not None:
            targets[name] = ocp.args.StandardRestore(getattr(abstract, name))
    items = _read_newest(folder, lambda _: targets, log)
    if items is None:
        return None
    state = TrainState(params=items["params"], ema=items.get("ema"), carried=items.get("carried"), **items["optimizer"])
    return state, items["data"]


def restore_params(folder: Path, abstract: Params, log: Callable[[str], None]) -> tuple[Params, int]:
    """Read the parameters that the newest whole checkpoint would be evaluated with: the moving average if it has one.

    Args:
        folder: of a `CheckpointWriter`.
        abstract: shapes, dtypes and shardings to read into.
        log: called with a sentence for every newer checkpoint that cannot be read.

    Returns:
        The parameters and their step.

    Raises:
        ConfigError: there is no checkpoint that can be read.
    """
    targets = lambda path: {_best_params(path): ocp.args.StandardRestore(abstract), "data": ocp.args.JsonRestore()}
    items = _read_newest(folder, targets, log)
    if items is None:
        raise ConfigError(f"{folder} holds no checkpoint yet.")
    return items.get("ema") or items["params"], items["data"]["next_step"]


class PiecewiseArray(Protocol):
    """An array that is too large to be held: what `write_params` takes."""

    shape: tuple[int, ...]
    size: int
    dtype: np.dtype

    def pieces(self) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
        """Yield parts that make up the array, each with its leading indices."""
        ...


def write_params(folder: Path, params: Params) -> None:
    """Write a checkpoint of step 0 that has parameters only, holding one piece of one of them at a time.

    Args:
        folder: of checkpoints; it must have none yet.
        params: nested dict of `PiecewiseArray`, all of one class.
    """
    path = _path(folder, 0)
    kind = type(jax.tree.leaves(params)[0])
    handlers = (kind, _PieceWriter()), (jax.Array, ocp.type_handlers.ArrayHandler())  # Orbax warns without the latter
    registry = ocp.type_handlers.create_type_handler_registry(*handlers)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(type_handler_registry=registry)) as writer:
        writer.save(path / "params", args=ocp.args.PyTreeSave(params))
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as writer:
        writer.save(path / "data", args=ocp.args.JsonSave({"fingerprint": "", "next_step": 0}))
    (path / _SIZES).write_text(json.dumps(_file_sizes(path)))


class _PieceWriter(ocp.type_handlers.NumpyHandler):
    """Writes arrays piece by piece, each its own chunk on disk, and no two at once."""

    def __init__(self) -> None:
        super().__init__(deepcopy_host_arrays=False)
        self._turn = asyncio.Lock()

    async def _open_and_write(self, value: Any, tspec: dict[str, Any], ts_context: Any) -> None:
        async with self._turn:
            store = None
            for place, piece in value.pieces():
                if store is None:
                    tspec["metadata"]["chunks"] = (*(1 for _ in place), *piece.shape)
                    store = await tensorstore.open(tensorstore.Spec(tspec), create=True, open=True, context=ts_context)
                await store[place].write(piece, can_reference_source_data_indefinitely=True)


def iterate_params(
    folder: Path, abstract: Params, log: Callable[[str], None]
) -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
    """Read what `restore_params` would, one parameter at a time and into the host's memory.

    Args:
        folder: of a `CheckpointWriter`.
        abstract: shapes and dtypes to read into.
        log: called with a sentence for every newer checkpoint that cannot be read.

    Yields:
        The path and the numbers of every parameter.

    Raises:
        ConfigError: there is no checkpoint that can be read.
    """
    for leaf_path, leaf in jax.tree_util.tree_leaves_with_path(abstract):
        keys = tuple(key.key for key in leaf_path)
        alone: Any = leaf
        for key in reversed(keys):
            alone = {key: alone}
        arguments = ocp.args.PyTreeRestore(
            alone,
            restore_args=jax.tree.map(lambda x: ocp.RestoreArgs(restore_type=np.ndarray, dtype=x.dtype), alone),
            partial_restore=True,
        )
        targets = functools.partial(_only_params, arguments=arguments)
        items = _read_newest(folder, targets, log)
        if items is None:
            raise ConfigError(f"{folder} holds no checkpoint yet.")
        yield keys, np.asarray(jax.tree.leaves(items.get("ema") or items["params"])[0])


def _only_params(path: Path, *, arguments: Any) -> dict[str, Any]:
    return {_best_params(path): arguments}


def _best_params(path: Path) -> str:
    """Return the item that a checkpoint is evaluated with."""
    return "ema" if (path / "ema").is_dir() else "params"


def _read_newest(
    folder: Path, targets: Callable[[Path], dict[str, Any]], log: Callable[[str], None]
) -> Mapping[str, Any] | None:
    steps = _steps(folder)
    for step in reversed(steps):
        path = _path(_absolute(folder), step)
        try:
            _check_sizes(path)
            with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
                return reader.restore(path, args=ocp.args.Composite(**targets(path)))
        except Exception as error:  # whatever a damaged file may raise
            reason = str(error).strip().splitlines()[0][:200]
            log(f"Checkpoint {step} cannot be read ({reason}); trying the one before.")
    if steps:
        raise ConfigError(f"{folder} holds {len(steps)} checkpoints, none of which can be read: {reason}")
    return None


def _optimizer_item(state: TrainState) -> dict[str, Any]:
    return {"opt_state": state.opt_state, "step": state.step, "rng": state.rng}


def _path(folder: Path, step: int) -> Path:
    return folder / f"{step:0{_DIGITS}}"


def _steps(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    paths = [path for path in folder.glob("*") if path.name.isdigit()]
    if is_remote(folder):  # nothing can be renamed there, so Orbax marks what is complete
        paths = [path for path in paths if ocp.utils.is_checkpoint_finalized(path)]
    return sorted(int(path.name) for path in paths)


def _absolute(folder: Path) -> Path:
    """Return the path as Orbax wants it; addresses are absolute already."""
    return folder if is_remote(folder) else folder.absolute()


def _unused(path: Path) -> Path:
    return next(
        candidate for number in itertools.count() if not (candidate := path.with_name(f"{path.name}.{number}")).exists()
    )


def _file_sizes(checkpoint: Path) -> dict[str, int]:
    """Return the size of every file of the items; Orbax still adds files of its own to the folder itself."""
    files = (path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.parent != checkpoint)
    return {path.relative_to(checkpoint).as_posix(): path.stat().st_size for path in files}


def _check_sizes(checkpoint: Path) -> None:
    listed = checkpoint / _SIZES
    if not listed.exists():  # as in a bucket, where no file loses a part of it
        return
    expected, found = json.loads(listed.read_text()), _file_sizes(checkpoint)
    for name, size in expected.items():
        if found.get(name) != size:
            raise OSError(f"{name} has {found.get(name, 0):,} of {size:,} bytes")
