"""Train a config at many points, every one at several learning rates at once, and write down how each ended.

    python -m gla_jax.sweep --config=configs/mqar.py:256 --output=runs/mqar-256.jsonl --solved=0.99 \\
        --learning_rates=1e-4,4.64e-4,2.15e-3,1e-2 \\
        --over=model.mixer=gla,retention --over=model.hidden_size=64,128

--over is given once for each axis; the points are all combinations. Fields that change together are one axis:
--over=model.hidden_size,model.num_heads=64:1,128:2. Points are small, and each is trained on one device, the default
one. The same command given again trains the points that have no line in --output yet.
"""

import json
import sys
from pathlib import Path

from absl import flags

from gla_jax import command_line
from gla_jax.config import ConfigError, flat, load

_CONFIG = flags.DEFINE_string("config", None, "Python file whose get_config() returns the config.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "File that gets a line of JSON for every point.", required=True)
_OVER = flags.DEFINE_multi_string(
    "over",
    [],
    "FIELD=VALUE,VALUE,.. or FIELD,FIELD=VALUE:VALUE,VALUE:VALUE,..; may be given more than once, with spaces in it.",
)
_LEARNING_RATES = flags.DEFINE_list(
    "learning_rates", [], "Trained at once at every point; by default the config's optimizer.learning_rate."
)
_SEEDS = flags.DEFINE_list(
    "seeds",
    None,
    "Of the parameters: trained at once, each at every learning rate, on the batches of config.seed, which is the "
    "default.",
)
_SOLVED = flags.DEFINE_float(
    "solved", None, "End a point when eval/accuracy reaches this with one model.", lower_bound=0, upper_bound=1
)


def main(overrides: dict[str, str]) -> None:
    """Train the points that are missing."""
    from gla_jax.training.points import (
        learning_rates,
        make_points,
        read_points,
        read_seeds,
        shared_settings,
        train_point,
    )

    points = make_points(_OVER.value)
    varied = {name for point in points for name in point}
    for name in sorted(varied & set(overrides)):
        raise ConfigError(f"--config.{name}={overrides[name]} is set by --over as well; leave one of them out.")
    configs = [load(_CONFIG.value, overrides | point) for point in points]
    rates = learning_rates(_LEARNING_RATES.value, configs[0])
    if "optimizer.learning_rate" in varied:
        raise ConfigError("optimizer.learning_rate cannot be an axis of --over; list its values in --learning_rates.")
    seeds = read_seeds(_SEEDS.value)
    settings = shared_settings(configs, varied, rates, _SOLVED.value, seeds)
    output = Path(_OUTPUT.value)
    done = read_points(output, settings)
    output.parent.mkdir(parents=True, exist_ok=True)
    for number, (point, config) in enumerate(zip(points, configs, strict=True), 1):
        named = {name: flat(config)[name] for name in point}
        title = f"{number} of {len(points)}: " + (", ".join(f"{k}={v}" for k, v in named.items()) or _CONFIG.value)
        if json.dumps(named) in done:
            print(f"{title}: done before", file=sys.stderr)
            continue
        print(title, file=sys.stderr, flush=True)
        line = {"point": named, **train_point(config, rates, _SOLVED.value, seeds), "settings": settings}
        with output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    command_line.run(main)
