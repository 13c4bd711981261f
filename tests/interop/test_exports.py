"""What we export, the real libraries load, and compute the same: in a Python that has them, which CI has not.

    GLA_JAX_TORCH_PYTHON=venv/bin/python pytest -m long tests/interop/test_exports.py

See tests/fixtures/make_interop.py for what to install there.
"""

import json
import os
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from held import Held
from test_parity import loss_and_logits

from gla_jax.config import as_dict, build
from gla_jax.interop import export_model
from gla_jax.interop.architectures import ARCHITECTURES
from gla_jax.interop.folder import flatten, names_of, to_theirs
from gla_jax.models import abstract_model, bind
from gla_jax.training.checkpoint import write_params

PYTHON = os.environ.get("GLA_JAX_TORCH_PYTHON")
SCRIPT = Path(__file__).parents[1] / "fixtures" / "make_interop.py"
SIZES = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 48}
CASES = {
    "gla": {"mixers": {"gla": {"num_kv_heads": 2, "use_short_conv": True, "conv_size": 3, "clamp_min": -0.04}}},
    "gla ungated": {"mixers": {"gla": {"use_output_gate": False, "feature_map": "relu"}}, "tie_embeddings": False},
    "gla hybrid": {"mixer": ["gla", "attention"], "mixers": {"attention": {"num_kv_heads": 2, "window": 8}}},
    "retnet": {"mixer": "retention"},
    "transformer": {"mixer": "attention", "mixers": {"attention": {"qkv_bias": True}}},
    "llama": {"mixer": "attention", "tie_embeddings": False},
    "mistral": {"mixer": "attention", "mixers": {"attention": {"num_kv_heads": 1, "window": 8}}},
}


@pytest.mark.long
@pytest.mark.skipif(PYTHON is None, reason="GLA_JAX_TORCH_PYTHON names no Python that has fla and transformers")
@pytest.mark.parametrize("case", CASES)
def test_the_real_library_computes_the_same(case, tmp_path):
    kind = case.split()[0]
    config = build({"model": SIZES | CASES[case], "dtype": {"compute": "float32"}})
    graphdef, abstract = abstract_model(config.model, config.dtype)
    random = np.random.default_rng(0)
    scales = {"kernel": lambda shape: shape[-2] ** -0.5, "scale": lambda _: 0.3, "bias": lambda _: 0.3}

    def draw(path, leaf):
        kind = path[-1].key
        scale = scales.get(kind, lambda _: 0.5)(leaf.shape)
        return (scale * random.standard_normal(leaf.shape) + (kind == "scale")).astype(np.float32)

    params = jax.tree_util.tree_map_with_path(draw, abstract)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(as_dict(config)))
    write_params(tmp_path / "run" / "checkpoints", jax.tree.map(Held, params))
    export_model(tmp_path / "run", tmp_path / "out", architecture=kind)

    input_ids = random.integers(0, 48, (2, 24)).astype(np.int32)
    (loss, logits), gradients = loss_and_logits(params, graphdef, input_ids)
    found = {"input_ids": input_ids, "logits": logits, "loss": loss}
    for ours, gradient in flatten(jax.tree.map(np.asarray, gradients)):
        places = names_of(ours, config.model, ARCHITECTURES[kind])
        for names, layer in zip(places.names, gradient if places.stacked else [gradient], strict=True):
            found[f"gradient.{names[0]}"] = to_theirs(ours.rpartition("/")[2], layer)
    model, steps = bind(graphdef, jax.tree.map(jnp.asarray, params)), []
    _, state = model(input_ids[:, :-4])
    for step in range(-4, 0):
        logits, state = model(input_ids[:, step][:, None], state)
        steps.append(logits[:, 0])
    np.savez(tmp_path / "out" / "reference.npz", **found, decode=np.stack(steps, axis=1))

    result = subprocess.run([PYTHON, SCRIPT, "check", tmp_path / "out"], capture_output=True, text=True, check=False)
    print(result.stdout)
    assert result.returncode == 0, result.stderr.strip().splitlines()[-1]
