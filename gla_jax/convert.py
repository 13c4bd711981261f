"""Read and write checkpoints of fla and transformers.

    python -m gla_jax.convert import --from=DIR --workdir=OUT       config.json and safetensors, no torch needed
    python -m gla_jax.convert export --workdir=RUN --to=DIR

`import` reads fla's GLA, RetNet and Transformer, LLaMA, Mistral, and the GLA of the paper's own code, and makes a
folder that sampling, evaluation and `--config.init_from` take. `export` writes the newest parameters of a run.
"""

import sys
from pathlib import Path

from absl import flags

from gla_jax import command_line
from gla_jax.config import ConfigError
from gla_jax.storage import is_remote, open_path

_FROM = flags.DEFINE_string("from", None, "import: a Hugging Face directory.")
_TO = flags.DEFINE_string("to", None, "export: the directory to make.")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "import: the folder to make; export: the folder of a run.", required=True
)
_ARCHITECTURE = flags.DEFINE_string(
    "architecture", None, "export: gla, retnet, transformer, llama or mistral; by default what the model's mixer is."
)
_DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16"], "export: number format of the tensors; by default that of the parameters."
)


def main(action: str) -> None:
    """Convert, and say in a line what was done."""
    # Imported here so that --help and mistakes in flags answer at once.
    from gla_jax.interop import export_model, import_model

    say = lambda text: print(text, file=sys.stderr)
    needed, other = (_FROM, _TO) if action == "import" else (_TO, _FROM)
    if needed.value is None:
        raise ConfigError(f"{action} needs --{needed.name}=DIR.")
    if other.value is not None:
        raise ConfigError(f"{action} has no --{other.name}.")
    workdir, directory = open_path(_WORKDIR.value), Path(needed.value)
    if "://" in needed.value or (action == "import" and is_remote(workdir)):
        raise ConfigError(f"{action} works on folders of this machine; `gcloud storage cp` copies to and from buckets.")
    if action == "import":
        config = import_model(directory, workdir, log=say)
        print(f"{workdir}: {config.model.num_layers} layers of {config.model.mixer}, {config.dtype.params}.")
    else:
        export_model(workdir, directory, architecture=_ARCHITECTURE.value, dtype=_DTYPE.value, log=say)
        print(f"{directory}: what {workdir} holds.")


def _take_action() -> str:
    """Take the action from the command line, which else has flags only."""
    if len(sys.argv) > 1 and sys.argv[1] in ("import", "export"):
        return sys.argv.pop(1)
    if {"--help", "-h", "-help", "--helpfull", "--helpshort"} & set(sys.argv):
        return "import"
    print("Say what to do: python -m gla_jax.convert import ... or export ...; --help tells more.", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    action = _take_action()
    command_line.run(lambda _: main(action))
