"""Draw the loss curve of a run: `python benchmarks/loss_curve.py --workdir=DIR --output=docs/loss.png`.

Training loss and held-out loss are both drawn in bits per token; for the byte tokeniser that is bits per byte, and
`--reference=NAME:BITS` adds a line to compare with (a general-purpose compressor, say). Needs the extra `plot`.
"""

import json
import math
import pathlib

import matplotlib
from absl import app, flags

matplotlib.use("Agg")
import matplotlib.pyplot as plt

_WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder, which holds metrics.jsonl.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "The picture to write; its ending chooses the format.", required=True)
_REFERENCE = flags.DEFINE_multi_string("reference", [], "NAME:BITS, a horizontal line; may be repeated.")


def main(_: list[str]) -> None:
    """Read metrics.jsonl, draw, save."""
    lines = [json.loads(line) for line in (pathlib.Path(_WORKDIR.value) / "metrics.jsonl").read_text().splitlines()]
    bits = lambda key: (
        [line["step"] for line in lines if key in line],
        [line[key] / math.log(2) for line in lines if key in line],
    )
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    axes.plot(*bits("loss"), color="#7aa6c2", linewidth=1, label="training")
    axes.plot(*bits("eval/loss"), color="#c0392b", marker="o", markersize=4, linewidth=1.8, label="held out")
    for index, reference in enumerate(_REFERENCE.value):
        name, _, value = reference.rpartition(":")
        axes.axhline(float(value), color="gray", linestyle=("--", ":", "-.")[index % 3], linewidth=1)
        axes.annotate(f"{name} {float(value):.2f}", (0.01, float(value)), xycoords=("axes fraction", "data"),
                      ha="left", va="top", fontsize=8, color="gray")  # fmt: skip
    axes.set(xlabel="step", ylabel="bits per token")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(_OUTPUT.value, dpi=160)


if __name__ == "__main__":
    app.run(main)
