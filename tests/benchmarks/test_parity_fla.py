"""The comparison with fla on a GPU, rehearsed in float32 at a tiny size, in a Python that has fla; CI has none."""

import contextlib
import json
import os

import pytest

from benchmarks import parity_fla

PYTHON = os.environ.get("GLA_JAX_TORCH_PYTHON")


@pytest.mark.long
@pytest.mark.skipif(PYTHON is None, reason="GLA_JAX_TORCH_PYTHON names no Python that has fla and transformers")
def test_both_compute_what_the_model_is(tmp_path):
    file = tmp_path / "parity.json"
    with contextlib.suppress(SystemExit):  # in float32 either may be nearer to the truth
        parity_fla.main([f"--torch={PYTHON}", "--layouts=tiny", "--briefly", f"--output={file}"])
    found = json.loads(file.read_text())["layouts"]["tiny"]
    for errors in (found["gla_jax"], *found["fla"].values()):
        assert max(errors["logits"], errors["loss"], *errors["decode"], *errors["gradients"].values()) < 1e-4
        assert max(abs(a / b - 1) for a, b in zip(errors["losses"], found["losses"], strict=True)) < 1e-5
    assert max(found["exported"].values()) < 1e-5
