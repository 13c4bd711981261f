"""Compare our GLA on a GPU with that of fla, through its chunk kernels: both against the same model in float64.

    python benchmarks/parity_fla.py --torch=venv/bin/python --output=parity_fla.json

`--torch` is a Python that has torch, transformers and flash-linear-attention; it may be the same. fla makes a model of
random parameters and saves it, `gla_jax.convert` imports it. Both compute in bfloat16 over float32 parameters. Reported
is the relative root mean square of the difference from the truth, theirs and ours, of logits, loss, the gradient of
every parameter, and tokens decoded from a state; then the losses of ten steps of AdamW on the same batches. What ours
has become by then is exported, and fla loads it. See parity_fla_torch.py for the truth.

Exits with 1 if ours is further from the truth by more than a tenth, on average over parameters for gradients, than
fla with all activations in bfloat16 as ours are, or if a loss differs by more than a thousandth.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from gla_jax.config import CheckpointConfig, Config, MeshConfig, OptimizerConfig, as_dict
from gla_jax.interop import export_model, import_model
from gla_jax.interop.architectures import ARCHITECTURES
from gla_jax.interop.folder import flatten, names_of, to_theirs
from gla_jax.interop.safetensors import open_file
from gla_jax.interop.translation import with_formats
from gla_jax.models import abstract_model, bind
from gla_jax.parallel.mesh import make_mesh
from gla_jax.training.checkpoint import CheckpointWriter, restore_params
from gla_jax.training.loss import cross_entropy
from gla_jax.training.optimizer import make_optimizer
from gla_jax.training.state import TrainState, init_state
from gla_jax.training.step import make_train_step

THEIRS = Path(__file__).with_name("parity_fla_torch.py")
OPTIMIZER = OptimizerConfig(
    learning_rate=3e-4, warmup_steps=0, schedule="constant", b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.01, clip_norm=1.0
)
"""As in parity_fla_torch.py."""
DECODED = 8
SLACK, LOSS_TOLERANCE = 1.1, 1e-3

Errors = dict[str, Any]


def say(*words: Any) -> None:
    """Print at once."""
    print(*words, flush=True)


def relative(found: Any, truth: Any) -> float:
    """Return the root mean square of the difference over that of the truth."""
    found, truth = np.asarray(found, np.float32), np.asarray(truth, np.float32)
    return float(np.linalg.norm((found - truth).ravel()) / np.linalg.norm(truth.ravel()))


def batch_of(tokens: np.ndarray) -> dict[str, jax.Array]:
    """Return a batch that predicts every token but the first."""
    weights = np.ones(tokens.shape, np.float32)
    weights[:, -1] = 0
    arrays = {"inputs": tokens, "targets": np.roll(tokens, -1, axis=1), "weights": weights}
    return {name: jnp.asarray(array) for name, array in arrays.items()}


def read_run(source: Path, workdir: Path) -> tuple[Config, Any, Any]:
    """Import fla's model; return a config that trains it as fla's is, the graphdef and the parameters."""
    config = import_model(source, workdir)
    compute = "bfloat16" if jax.default_backend() == "gpu" else "float32"
    config = dataclasses.replace(with_formats(config, "float32", compute), optimizer=OPTIMIZER)
    graphdef, abstract = abstract_model(config.model, config.dtype)
    params, _ = restore_params(workdir / "checkpoints", abstract, print)
    return config, graphdef, params


class Programs:
    """What is run of ours, compiled side by side.

    Args:
        config: the run.
        graphdef: of the model.
        params: of which only shapes matter here.
        tokens: of a batch, likewise.
    """

    def __init__(self, config: Config, graphdef: Any, params: Any, tokens: np.ndarray):
        call = lambda params, tokens, state: bind(graphdef, params)(tokens, state)

        def loss(params: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
            model = bind(graphdef, params)
            hidden, _ = model.hidden_states(batch["inputs"])
            total, sums = cross_entropy(hidden, model.head_matrix(), batch["targets"], batch["weights"])
            return total / sums["weight"], model.logits(hidden)

        self.optimizer = make_optimizer(config.optimizer, 1)
        step: Any = make_train_step(config, graphdef, self.optimizer)
        abstract_state = jax.eval_shape(lambda params: init_state(config, self.optimizer, params), params)
        batch, prompt = batch_of(tokens), tokens[:, :-DECODED]
        state = jax.eval_shape(call, params, prompt, None)[1]
        lowered = [
            jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(params, batch),
            jax.jit(call).lower(params, prompt, None),
            jax.jit(call).lower(params, tokens[:, :1], state),
            step.lower(abstract_state, batch),
        ]
        with concurrent.futures.ThreadPoolExecutor() as pool:
            compiled = pool.map(lambda program: program.compile(), lowered)
            self.gradients, self.read, self.decode, self.step = compiled


def measure_once(config: Config, programs: Programs, params: Any, truth: dict[str, Any], loss: float) -> Errors:
    """Return how far from the truth logits, loss, gradients, and logits of decoded tokens are."""
    tokens, true_logits = truth["batches"].read()[0], truth["logits"].read()
    (found, logits), gradients = programs.gradients(params, batch_of(tokens))
    errors: Errors = {"logits": relative(logits, true_logits), "loss": abs(float(found) - loss) / loss, "decode": []}
    _, state = programs.read(params, tokens[:, :-DECODED], None)
    for step in range(-DECODED, 0):
        logits, state = programs.decode(params, tokens[:, step][:, None], state)
        errors["decode"].append(relative(logits[:, 0], true_logits[:, step]))
    errors["gradients"] = {}
    for ours, gradient in flatten(jax.tree.map(np.asarray, gradients)):
        places = names_of(ours, config.model, ARCHITECTURES["gla"])
        assert places is not None
        for names, layer in zip(places.names, gradient if places.stacked else [gradient], strict=True):
            expected = truth[f"gradient.{names[0]}"].read()
            errors["gradients"][names[0]] = relative(to_theirs(ours.rpartition("/")[2], layer), expected)
    return errors


def train(config: Config, programs: Programs, params: Any, batches: np.ndarray) -> tuple[TrainState, list[float]]:
    """Take a step of the trainer for every batch, and return the losses before each."""
    state, losses = init_state(config, programs.optimizer, params), []
    for tokens in batches:
        state, metrics = programs.step(state, batch_of(tokens))
        losses.append(float(metrics["loss"]))
    return state, losses


def export(config: Config, programs: Programs, state: TrainState, tokens: np.ndarray, folder: Path) -> Path:
    """Save a state as a run does, export it, and add what our model says of some tokens."""
    run, target = folder / "run", folder / "exported"
    run.mkdir()
    (run / "config.json").write_text(json.dumps(as_dict(config)))
    with CheckpointWriter(run / "checkpoints", CheckpointConfig(), start=0) as writer:
        writer.save(state, step=int(state.step), data_fingerprint="")
    export_model(run, target)
    (_, logits), _ = programs.gradients(state.params, batch_of(tokens))
    np.savez(target / "logits.npz", input_ids=tokens, logits=logits)
    return target


def compare(report: dict[str, Any]) -> list[str]:
    """Add to the report how ours and theirs relate, and return what is not as close as it must be."""
    ours, complaints = report["gla_jax"], []
    apart = lambda losses, others: max(abs(a - b) / b for a, b in zip(losses, others, strict=True))
    report["ours_over_theirs"] = {}
    report["losses_apart"] = {"gla_jax, truth": apart(ours["losses"], report["losses"])}
    for way, theirs in report["fla"].items():
        each = {name: error / theirs["gradients"][name] for name, error in ours["gradients"].items()}
        ratios = {
            "logits": ours["logits"] / theirs["logits"],
            "decode": statistics.mean(ours["decode"]) / statistics.mean(theirs["decode"]),
            "gradients": statistics.geometric_mean(each.values()),
        }
        worst = max(each, key=lambda name: each[name])
        report["ours_over_theirs"][way] = ratios | {"worst gradient": each[worst], "which": worst}
        report["losses_apart"] |= {
            f"gla_jax, {way}": apart(ours["losses"], theirs["losses"]),
            f"{way}, truth": apart(theirs["losses"], report["losses"]),
        }
        if way != "autocast":
            complaints += [f"{name}: {ratio:.2f} of fla's error." for name, ratio in ratios.items() if ratio > SLACK]
            if (largest := report["losses_apart"][f"gla_jax, {way}"]) > LOSS_TOLERANCE:
                complaints.append(f"A loss is {largest:.1e} from fla's.")
    return complaints


def run(layout: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Have both halves compute, and return what there is to say of a layout."""
    theirs = [options.torch, str(THEIRS), *(["--briefly"] if options.briefly else [])]
    have = functools.partial(subprocess.run, check=True)
    source = folder / "fla"
    have([*theirs, "make", str(source), f"--layout={layout}"])
    with concurrent.futures.ThreadPoolExecutor() as pool:
        measured = pool.submit(have, [*theirs, "measure", str(source)])
        report: dict[str, Any] = json.loads((source / "truth.json").read_text())
        truth = open_file(source / "truth.safetensors")
        config, graphdef, params = read_run(source, folder / "imported")
        batches = truth["batches"].read()
        programs = Programs(config, graphdef, params, batches[0])
        say("compiled")
        errors = measure_once(config, programs, params, truth, report["loss"])
        state, errors["losses"] = train(config, programs, params, batches)
        say("gla_jax", errors["logits"], errors["decode"], max(errors["gradients"].values()), errors["losses"])
        exported = export(config, programs, state, batches[0], folder)
        measured.result()
    del state
    have([*theirs, "check", str(exported)])
    found = {"gla_jax": errors, "exported": json.loads((exported / "fla.json").read_text())}
    return report | json.loads((source / "fla.json").read_text()) | found


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare every layout and write the JSON after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", default=sys.executable, metavar="PYTHON", help="one that has torch and fla")
    parser.add_argument("--layouts", default="340m,1.3b", help="of parity_fla_torch.py, by comma")
    parser.add_argument("--briefly", action="store_true", help="tune fla's kernels among few choices")
    parser.add_argument("--output", type=Path, required=True, help="the JSON")
    options = parser.parse_args(arguments)
    report: dict[str, Any] = {
        "tuned_briefly": options.briefly,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "layouts": {},
    }
    complaints = []
    for layout in options.layouts.split(","):
        with tempfile.TemporaryDirectory() as folder, jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
            found = report["layouts"][layout] = run(layout, options, Path(folder))
        report |= {"device": jax.devices()[0].device_kind, "versions": found.pop("versions") | {"jax": jax.__version__}}
        complaints += [f"{layout}: {complaint}" for complaint in compare(found)]
        say(layout, found["ours_over_theirs"], found["losses_apart"], found["exported"])
        options.output.write_text(json.dumps(report, indent=1) + "\n")
    if complaints:
        sys.exit("\n".join(complaints))


if __name__ == "__main__":
    main()
