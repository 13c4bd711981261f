"""The folder of a run: who may use it, and what of it is kept when training goes on from an earlier step."""

import contextlib
import fcntl
import json
import re
from pathlib import Path
from typing import Any, Self, TextIO

import jax

from gla_jax.config import Config, ConfigError, as_dict, build, flat
from gla_jax.storage import GrowingFile, is_remote, open_path, replace_text

FREE_FIELDS = re.compile(
    r"steps|init_from|(log|eval|checkpoint|mesh|profile|sample)\..*|data\.prefetch"
    # These change how a step is computed, and its result by no more than rounding.
    r"|model\.remat|optimizer\.(accumulation_steps|offload)|model\.mixers\.\w+\.(implementation|chunk_size)"
)
"""Fields that may change when a run is resumed."""


class Workdir:
    """A run's folder and what lies where in it, locked against a second trainer while it is open.

    A bucket has no locks: there it is up to the user.

    Args:
        path: made if need be, when entered; a folder, or gs://BUCKET/FOLDER.

    Raises:
        ConfigError: it is another kind of address; when entered, if it cannot be written or another trainer has it.
    """

    def __init__(self, path: str):
        self.path = open_path(path)
        self.config = self.path / "config.json"
        self.metrics = self.path / "metrics.jsonl"
        self.timings = self.path / "timings.jsonl"
        self.samples = self.path / "samples.txt"
        self.checkpoints = self.path / "checkpoints"
        self.tensorboard = self.path / "tensorboard"
        self.profile = self.path / "profile"
        self._primary = jax.process_index() == 0  # the only process that writes here, but for checkpoints
        self._lock: TextIO | None = None

    def __enter__(self) -> Self:
        if self._primary and is_remote(self.path):
            try:
                (self.path / ".writable").write_text("")
                (self.path / ".writable").unlink()
            except Exception as error:  # of a library of Google's, or of gcsfs, or of what they connect by
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                raise ConfigError(f"--workdir={self.path} cannot be written: {reason}") from None
        elif self._primary:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                self._lock = open(self.path / ".lock", "w")
            except OSError as error:
                raise ConfigError(f"--workdir={self.path} cannot be written: {error.strerror}.") from None
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                self._lock.close()
                raise ConfigError(f"--workdir={self.path} is in use by another trainer.") from None
        return self

    def __exit__(self, *_: Any) -> None:
        if self._lock is not None:
            self._lock.close()

    def check_config(self, config: Config) -> None:
        """Raise ConfigError if the folder belongs to a run whose config differs in more than `FREE_FIELDS`."""
        if not self.config.exists():
            if self.metrics.exists() or self.checkpoints.exists():
                raise ConfigError(f"--workdir={self.path} has results but no config.json; use an empty folder.")
            return
        different = [
            f"{name} ({old!r} there, {new!r} here)"
            for name, old, new in differences(read_config(self.path), config)
            if not FREE_FIELDS.fullmatch(name)
        ]
        if different:
            raise ConfigError(
                f"--workdir={self.path} belongs to a run with another {', '.join(different)}; use another folder, "
                "with --config.init_from if it shall start with the parameters of this one."
            )

    def write_config(self, config: Config) -> None:
        """Write config.json, which makes the folder this run's."""
        if self._primary:
            replace_text(self.config, json.dumps(as_dict(config), indent=2) + "\n")

    def rewind(self, step: int) -> None:
        """Drop what was written about later steps, which training on from this one will write again."""
        if not self._primary:
            return
        line = r'\{"step": (\d+).*\n'
        for path, record in ((self.metrics, line), (self.timings, line), (self.samples, _SAMPLE)):
            if path.exists():
                kept = (match[0] for match in re.finditer(record, path.read_text()) if int(match[1]) <= step)
                replace_text(path, "".join(kept))

    def add_sample(self, step: int, text: str) -> None:
        """Append to samples.txt."""
        if not self._primary:
            return
        with contextlib.closing(GrowingFile(self.samples)) as file:
            file.write(f"=== step {step} ===\n{text.rstrip()}\n")


_SAMPLE = r"=== step (\d+) ===\n(?:(?!=== step \d+ ===\n).*\n)*"


def read_config(workdir: Path) -> Config:
    """Return the config of a run from its folder.

    Raises:
        ConfigError: the folder is not a run's.
    """
    path = workdir / "config.json"
    if not path.is_file():
        raise ConfigError(f"{workdir} is not the folder of a run: it has no config.json.")
    try:
        settings = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is damaged: {error}.") from None
    if "model_type" in settings:
        raise ConfigError(
            f"{workdir} is a Hugging Face directory; make the folder of a run of it: "
            f"python -m gla_jax.convert import --from={workdir} --workdir=OTHER."
        )
    return build(settings)


def differences(ours: Config, theirs: Config) -> list[tuple[str, Any, Any]]:
    """Return (dotted name, our value, their value) of every field in which two configs differ."""
    left, right = flat(ours), flat(theirs)
    return [(name, left.get(name), right.get(name)) for name in left | right if left.get(name) != right.get(name)]
