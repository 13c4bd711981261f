"""Where numbers go: metrics.jsonl and timings.jsonl always, TensorBoard and Weights & Biases besides."""

import contextlib
import hashlib
import json
from collections.abc import Mapping
from typing import Any, Self

import jax

from gla_jax.config import Config, as_dict
from gla_jax.storage import GrowingFile, is_remote
from gla_jax.training.workdir import Workdir


class MetricsWriter:
    """Writes what a run learnt and how fast.

    `metrics.jsonl` holds what the config decides: two runs of one config on one kind of machine give the same bytes,
    however often they were killed and resumed. `timings.jsonl` holds what the clock says.

    Args:
        workdir: the run's folder.
        config: of the run.
        start: the step that the run starts from; what the folder has of later ones is dropped.
    """

    def __init__(self, workdir: Workdir, config: Config, *, start: int):
        self._metrics: GrowingFile | None = None
        self._timings: GrowingFile | None = None
        self._tensorboard = self._wandb = None
        if jax.process_index() > 0:
            return
        workdir.rewind(start)
        self._metrics, self._timings = GrowingFile(workdir.metrics), GrowingFile(workdir.timings)
        if not is_remote(workdir.path):  # events are a file that grows, which a bucket has none of
            with contextlib.suppress(ImportError):
                from tensorboardX import SummaryWriter

                self._tensorboard = SummaryWriter(str(workdir.tensorboard), purge_step=start + 1)
        if config.log.wandb_project is not None:
            self._wandb = _start_wandb(workdir, config, config.log.wandb_project)

    def write(self, step: int, metrics: Mapping[str, float | None], timings: Mapping[str, float | None]) -> None:
        """Write one line about a step to each file.

        Args:
            step: counted from 1.
            metrics: what the config decides; None where it is no finite number.
            timings: what the clock says; None where there is no figure.
        """
        for file, figures in ((self._metrics, metrics), (self._timings, timings)):
            if file is not None and figures:
                file.write(json.dumps({"step": step, **figures}) + "\n")
        numbers = {name: value for name, value in {**metrics, **timings}.items() if value is not None}
        if self._tensorboard is not None:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)

    def flush(self) -> None:
        """Have every line in its file, as it must be before a checkpoint of its step is: what follows is rewound."""
        for file in (self._metrics, self._timings):
            if file is not None:
                file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        for file in (self._metrics, self._timings, self._tensorboard):
            if file is not None:
                file.close()
        if self._wandb is not None:
            self._wandb.finish()


def _start_wandb(workdir: Workdir, config: Config, project: str) -> Any:
    import wandb

    remote = is_remote(workdir.path)
    name = str(workdir.path if remote else workdir.path.resolve())
    identity = hashlib.blake2b(name.encode(), digest_size=8).hexdigest()  # a resumed run goes on in the same curves
    folder = None if remote else name
    return wandb.init(project=project, id=identity, name=name, dir=folder, config=as_dict(config), resume="allow")
