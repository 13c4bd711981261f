"""The command that continues texts, in a terminal."""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from held import Held

from gla_jax.config import as_dict, build
from gla_jax.models import abstract_model
from gla_jax.training.checkpoint import write_params

ROOT = Path(__file__).parents[1]


@pytest.fixture
def workdir(tmp_path):
    """The folder of a run whose model says letters, and never ends."""
    sizes = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 16, "vocab_size": 256}
    config = build({"model": sizes | {"tie_embeddings": False}, "data": {"tokenizer": "bytes"}})
    _, abstract = abstract_model(config.model, config.dtype)
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), abstract)
    params["head"]["kernel"] = np.where((np.arange(256) >= 97) & (np.arange(256) < 123), 1, -9.0) * np.ones((16, 1))
    params["head"]["kernel"] = params["head"]["kernel"].astype(np.float32)
    (tmp_path / "config.json").write_text(json.dumps(as_dict(config)))
    write_params(tmp_path / "checkpoints", jax.tree.map(Held, params))
    return tmp_path


class Terminal:
    """A command in a terminal of its own."""

    def __init__(self, *arguments):
        self.file, inner = pty.openpty()
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "gla_jax.generate", *arguments]
        self.process = subprocess.Popen(
            command, stdin=inner, stdout=inner, stderr=inner, env=environment, start_new_session=True
        )
        os.close(inner)
        self.text = ""

    def read_until(self, wanted, seconds=60):
        """Read on until `wanted(new text)` holds, and return the new text."""
        end, new = time.monotonic() + seconds, ""
        while not wanted(new):
            assert time.monotonic() < end, self.text
            piece = os.read(self.file, 1000).decode()
            self.text += piece
            new += piece
        return new

    def write(self, text):
        os.write(self.file, text.encode())


@pytest.mark.long
def test_a_conversation(workdir):
    kept = workdir / "kept.npz"
    terminal = Terminal(f"--workdir={workdir}", "--interactive", "--tokens=100000", f"--save_state={kept}")
    greeting = terminal.read_until(lambda text: text.endswith("> "))
    assert "Ctrl-D ends" in greeting
    terminal.write("In the beginning\n")
    terminal.read_until(lambda text: len(text) > 60)
    # Ctrl-C ends what the model says, not the conversation; at the prompt it ends that, and what was read is kept.
    terminal.process.send_signal(signal.SIGINT)
    said = terminal.read_until(lambda text: text.endswith("> "))
    assert len(said) < 5000
    terminal.write("\n")
    terminal.read_until(lambda text: len(text) > 60)
    terminal.process.send_signal(signal.SIGINT)
    terminal.read_until(lambda text: text.endswith("> "))
    assert not kept.exists()
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.process.wait(30) == 0, terminal.text
    assert kept.exists() and "Traceback" not in terminal.text
