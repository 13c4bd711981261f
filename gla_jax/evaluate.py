"""Score the newest model of a run on its held-out text: python -m gla_jax.evaluate --workdir=runs/quickstart."""

import json
import sys
from pathlib import Path

from absl import flags

from gla_jax import command_line

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a training run.", required=True)
_BATCHES = flags.DEFINE_integer("batches", 0, "Score so many batches only; 0: all there are.", lower_bound=0)


def main(_: dict[str, str]) -> None:
    """Print the step and the figures as one line of JSON."""
    # Imported here so that --help and mistakes in flags answer at once.
    import jax

    from gla_jax.config import ConfigError, MeshConfig
    from gla_jax.evaluation import evaluate
    from gla_jax.models import abstract_model
    from gla_jax.parallel.mesh import make_mesh
    from gla_jax.training.checkpoint import restore_params
    from gla_jax.training.loop import open_data
    from gla_jax.training.step import make_eval_step
    from gla_jax.training.workdir import read_config

    workdir = Path(_WORKDIR.value)
    config = read_config(workdir)
    with jax.set_mesh(make_mesh(MeshConfig())):
        config, data = open_data(config)
        if not data.eval_tokens:
            raise ConfigError(f"{workdir} holds nothing out: data.held_out={config.data.held_out}.")
        graphdef, abstract = abstract_model(config.model, config.dtype)
        params, step = restore_params(workdir / "checkpoints", abstract, lambda text: print(text, file=sys.stderr))
        figures = evaluate(
            make_eval_step(graphdef),
            params,
            data.eval_batches(_BATCHES.value),
            batch_size=config.data.batch_size,
            bytes_per_token=data.eval_bytes_per_token,
        )
    print(json.dumps({"step": step, **figures}))


if __name__ == "__main__":
    command_line.run(main)
