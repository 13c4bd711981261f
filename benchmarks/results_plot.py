"""Draw the figures of docs/results.md: associative recall, and loss by position.

    python benchmarks/results_plot.py recall benchmarks/mqar_h100.jsonl --output=docs/mqar.png
    python benchmarks/results_plot.py position benchmarks/by_position_h100/*.jsonl --output=docs/by_position.png

The files are what `python -m gla_jax.sweep` wrote for the first, and what `python -m gla_jax.evaluate --by-position`
printed for the second, a file for each model, named by what its line is to be called. Needs the extra `plot`.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Lines = list[dict[str, Any]]

MIXERS = {
    "gla": "GLA",
    "attention": "attention",
    "retention": "RetNet",
    "mamba": "Mamba",
    "linear_attention": "linear attention",
}
_PAPER_MQAR = {  # arXiv 2312.06635, figure 4, read off the picture to about 1 point; the text says attention has 100
    (256, "gla"): {64: 99, 128: 99, 256: 99, 512: 99},
    (256, "retention"): {64: 97, 128: 100, 256: 100, 512: 100},
    (256, "mamba"): {64: 100, 128: 100, 256: 100, 512: 100},
    (512, "gla"): {64: 22, 128: 95, 256: 100, 512: 100},
    (512, "retention"): {64: 5, 128: 87, 256: 96, 512: 97},
    (512, "mamba"): {64: 81, 128: 100, 256: 100, 512: 100},
}


def draw_recall(lines: Lines, figure: Any) -> None:
    """Accuracy over width, a panel for each length: the best learning rate of each point, and the paper's figure."""
    figure.set_size_inches(7, 3.2)
    lengths = sorted({line["settings"]["data.sequence_length"] for line in lines})
    panels = figure.subplots(1, len(lengths), sharey=True, squeeze=False)[0]
    for axes, length in zip(panels, lengths, strict=True):
        here = [line for line in lines if line["settings"]["data.sequence_length"] == length]
        for index, (mixer, name) in enumerate(MIXERS.items()):
            best: dict[int, float] = {}
            for line in here:
                if line["point"]["model.mixer"] == mixer:
                    size = line["point"]["model.hidden_size"]
                    best[size] = max(best.get(size, 0.0), 100 * best_accuracy(line))
            if best:
                axes.plot(sorted(best), [best[size] for size in sorted(best)], "o-", color=f"C{index}", label=name)
                paper = _PAPER_MQAR.get((length, mixer), {})
                axes.plot(list(paper), list(paper.values()), ":", color=f"C{index}", linewidth=1)
        pairs = here[0]["settings"]["data.pairs"]
        axes.set(title=f"{length} tokens, {pairs} pairs", xlabel="width", xscale="log", ylim=(-3, 103))
        axes.set_xticks([64, 128, 256, 512], ["64", "128", "256", "512"])
        axes.minorticks_off()
    panels[0].set_ylabel("accuracy, %")
    panels[0].legend(frameon=False, fontsize=8, title="dotted: the paper", title_fontsize=8)


def draw_position(models: dict[str, Lines], figure: Any) -> None:
    """Loss over position, a line for each model."""
    figure.set_size_inches(6, 3.4)
    axes = figure.subplots()
    for name, buckets in models.items():
        middles = [(one["from"] + one["to"]) / 2 for one in buckets]
        axes.plot(middles, [one["loss"] for one in buckets], "o-", markersize=3, label=name)
    axes.set(xlabel="position", ylabel="loss, nats per token", yscale="log")
    axes.yaxis.set_major_formatter("{x:.1f}")
    axes.yaxis.set_minor_formatter("{x:.1f}")
    axes.tick_params(axis="y", which="both", labelsize=8)
    axes.legend(frameon=False, fontsize=8)


def best_accuracy(line: dict[str, Any]) -> float:
    """Return the highest accuracy that a point of a sweep came to."""
    return max(x for one in line["evaluations"] for x in one["eval/accuracy"] if x is not None)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read lines of JSON, draw, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure", choices=("recall", "position"))
    parser.add_argument("inputs", nargs="+", type=Path, metavar="FILE", help="lines of JSON")
    parser.add_argument("--output", required=True, type=Path, help="the picture; its ending chooses the format")
    options = parser.parse_args(arguments)
    files = {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in options.inputs}
    figure = plt.figure(layout="constrained")
    if options.figure == "position":
        draw_position(files, figure)
    else:
        draw_recall([line for lines in files.values() for line in lines], figure)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(options.output, dpi=160)
    plt.close(figure)


if __name__ == "__main__":
    main()
