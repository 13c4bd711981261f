"""Where figures go: two files, only one of which knows of clocks, and TensorBoard."""

import builtins
import struct
from pathlib import Path
from typing import Any

import pytest

from gla_jax.config import build, default_config
from gla_jax.training.metrics import MetricsWriter
from gla_jax.training.workdir import Workdir

CONFIG = build(default_config())


def test_figures_of_the_run_and_of_the_clock_go_to_files_of_their_own(tmp_path: Path) -> None:
    with Workdir(str(tmp_path)) as folder:
        with MetricsWriter(folder, CONFIG, start=0) as writer:
            writer.write(1, {"loss": 0.1 + 0.2}, {"seconds": 1.5, "mfu": None})
            writer.write(1, {"eval/loss": 3.0}, {})
            # A killed run must not lose what it has said, so nothing waits in a buffer.
            assert folder.metrics.read_text() == (
                '{"step": 1, "loss": 0.30000000000000004}\n{"step": 1, "eval/loss": 3.0}\n'
            )
            assert folder.timings.read_text() == '{"step": 1, "seconds": 1.5, "mfu": null}\n'
        with MetricsWriter(folder, CONFIG, start=1) as writer:
            writer.write(2, {"loss": 2.0}, {})
        with MetricsWriter(folder, CONFIG, start=1) as writer:
            writer.write(2, {"loss": 2.0}, {})
        assert folder.metrics.read_text().splitlines()[1:] == [
            '{"step": 1, "eval/loss": 3.0}',
            '{"step": 2, "loss": 2.0}',
        ]


def test_tensorboard_gets_all_that_are_numbers(tmp_path: Path) -> None:
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    with Workdir(str(tmp_path)) as folder, MetricsWriter(folder, CONFIG, start=0) as writer:
        writer.write(3, {"loss": 2.5, "eval/loss": 3.5}, {"seconds": 1.5, "mfu": None})
    (file,) = (tmp_path / "tensorboard").iterdir()
    data, found = file.read_bytes(), {}
    while data:  # records: length, its checksum, content, its checksum
        (length,) = struct.unpack("<Q", data[:8])
        event = event_pb2.Event.FromString(data[12 : 12 + length])
        found |= {value.tag: (event.step, value.simple_value) for value in event.summary.value}
        data = data[16 + length :]
    assert found == {"loss": (3, 2.5), "eval/loss": (3, 3.5), "seconds": (3, 1.5)}


def test_tensorboard_is_not_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import_module = builtins.__import__

    def without(name: str, *arguments: Any) -> Any:
        if name == "tensorboardX":
            raise ImportError(name)
        return import_module(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    with Workdir(str(tmp_path)) as folder, MetricsWriter(folder, CONFIG, start=0) as writer:
        writer.write(3, {"loss": 2.5}, {})
    assert not (tmp_path / "tensorboard").exists()
    assert folder.metrics.exists()
