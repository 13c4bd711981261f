"""Train a language model, or go on training one.

    python train.py --config=configs/quickstart.py --workdir=runs/quickstart --config.steps=2000

The config file makes the config; `--config.NAME=VALUE` changes a field of it. The same command given again resumes the
run from its newest checkpoint. Ctrl-C and SIGTERM save one and leave.
"""

import shlex
import signal
import sys

from absl import flags

from gla_jax import command_line

_CONFIG = flags.DEFINE_string("config", None, "Python file whose get_config() returns the config.", required=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for all that the run leaves behind.", required=True)
_DISTRIBUTED = flags.DEFINE_enum(
    "distributed",
    "auto",
    ["auto", "on", "off"],
    "Join the other processes of a cluster: if one is found, always, never.",
)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "Where no cluster is found: address:port of process 0.")
_PROCESS = flags.DEFINE_string("process", None, "With --coordinator: which process of how many this is, e.g. 0/2.")


def main(overrides: dict[str, str]) -> int | str:
    """Train, and say how to go on."""
    # Imported here, the light before the heavy, so that --help and most mistakes answer at once.
    from gla_jax.config import load

    config = load(_CONFIG.value, overrides)
    from gla_jax.parallel.mesh import join_cluster
    from gla_jax.training import DivergedError, train

    if _DISTRIBUTED.value != "off":
        join_cluster(required=_DISTRIBUTED.value == "on", coordinator=_COORDINATOR.value, process=_PROCESS.value)
    try:
        outcome = train(config, _WORKDIR.value)
    except DivergedError as error:
        return str(error)
    if outcome.stopped_by is None:
        return 0
    print(f"Stopped and saved at step {outcome.step}. To resume:\n    {shlex.join(['python', *sys.argv])}")
    return 0 if outcome.stopped_by == signal.SIGTERM else 130


if __name__ == "__main__":
    command_line.run(main)
