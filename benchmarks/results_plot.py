"""Draw the figures of docs/results.md: associative recall, gates, and loss by position.

    python benchmarks/results_plot.py recall benchmarks/mqar_h100.jsonl --output=docs/mqar.png
    python benchmarks/results_plot.py gates benchmarks/gates_h100.jsonl --output=docs/gates.png
    python benchmarks/results_plot.py position benchmarks/by_position_h100/*.jsonl --output=docs/by_position.png

The files are what `python -m gla_jax.sweep` wrote for the first two, and what `python -m gla_jax.evaluate
--by-position` printed for the third, a file for each model, named by what its line is to be called. Needs the extra
`plot`.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Lines = list[dict[str, Any]]

MIXERS = {
    "gla": "GLA",
    "attention": "attention",
    "retention": "RetNet",
    "mamba": "Mamba",
    "linear_attention": "linear attention",
    "gla_convolution": "GLA, short convolution",
}
_PAPER_MQAR = {  # arXiv 2312.06635, figure 4, read off the picture to about 1 point; the text says attention has 100
    (256, "gla"): {64: 99, 128: 99, 256: 99, 512: 99},
    (256, "retention"): {64: 97, 128: 100, 256: 100, 512: 100},
    (256, "mamba"): {64: 100, 128: 100, 256: 100, 512: 100},
    (512, "gla"): {64: 22, 128: 95, 256: 100, 512: 100},
    (512, "retention"): {64: 5, 128: 87, 256: 96, 512: 97},
    (512, "mamba"): {64: 81, 128: 100, 256: 100, 512: 100},
}


GATES = {  # of a point of configs/gates.py: its name, and nats above GLA with 4 heads in the paper's table 4
    ("linear_attention", "none", 4): ("no gate", 0.452),
    ("retention", "none", 4): ("constant for\neach head", 0.114),
    ("linear_attention", "scalar", 4): ("a number\nfor each head", 0.052),
    ("gla", "none", 8): ("GLA, 8 heads", 0.035),
    ("gla", "none", 4): ("GLA, 4 heads", 0.0),
    ("gla", "none", 1): ("GLA, 1 head", -0.011),
}


def draw_recall(lines: Lines, figure: Any) -> None:
    """Accuracy over width, a panel for each length: the best learning rate of each point, and the paper's figure.

    A point is hollow where that run was stopped, neither solved nor at the end of its schedule.
    """
    figure.set_size_inches(7, 3.2)
    lengths = sorted({line["settings"]["data.sequence_length"] for line in lines})
    panels = figure.subplots(1, len(lengths), sharey=True, squeeze=False)[0]
    for axes, length in zip(panels, lengths, strict=True):
        here = [line for line in lines if line["settings"]["data.sequence_length"] == length]
        for index, (mixer, name) in enumerate(MIXERS.items()):
            best: dict[int, tuple[float, bool]] = {}
            for line in here:
                if mixer_of(line) == mixer:
                    size = line["point"]["model.hidden_size"]
                    ended = line["solved"] or line["steps"] == line["settings"]["steps"]
                    best[size] = max(best.get(size, (0.0, False)), (100 * best_accuracy(line), ended))
            if best:
                sizes = sorted(best)
                axes.plot(sizes, [best[size][0] for size in sizes], "o-", color=f"C{index}", label=name)
                stopped = [size for size in sizes if not best[size][1]]
                (hollow,) = axes.plot(stopped, [best[size][0] for size in stopped], "o", color=f"C{index}")
                hollow.set(markerfacecolor="white", label=f"{name}, stopped early")
                paper = _PAPER_MQAR.get((length, mixer), {})
                axes.plot(list(paper), list(paper.values()), ":", color=f"C{index}", linewidth=1)
        pairs = here[0]["settings"]["data.pairs"]
        axes.set(title=f"{length} tokens, {pairs} pairs", xlabel="width", xscale="log", ylim=(-3, 103))
        axes.set_xticks([64, 128, 256, 512], ["64", "128", "256", "512"])
        axes.minorticks_off()
    panels[0].set_ylabel("accuracy, %")
    named = {line.get_label(): line for axes in panels for line in axes.lines if line.get_label() in MIXERS.values()}
    note = "dotted: the paper\nhollow: stopped early"
    panels[0].legend(named.values(), named, frameon=False, fontsize=8, title=note, title_fontsize=8)


def draw_gates(lines: Lines, figure: Any) -> None:
    """Training loss above that of GLA with 4 heads and the same seed, for each gate, and the paper's difference."""
    figure.set_size_inches(7, 3.2)
    axes = figure.subplots()
    fields = ("model.mixer", "model.mixers.linear_attention.gate", "model.num_heads")
    losses = {tuple(line["point"][field] for field in fields): line["evaluations"][-1]["loss"] for line in lines}
    shown = [gate for gate in GATES if gate in losses]
    for place, gate in enumerate(shown):
        above = np.subtract(losses[gate], losses["gla", "none", 4])
        label = None if place else "ours, a point for each seed"
        axes.plot([place] * len(above), above, "o", color="C0", markersize=4, label=label)
    axes.plot([GATES[gate][1] for gate in shown], "_", color="black", markersize=24, label="the paper's, 340M")
    axes.set_xticks(range(len(shown)), [GATES[gate][0] for gate in shown], fontsize=8)
    axes.set_xlim(-0.6, len(shown) - 0.4)
    axes.set_yscale("symlog", linthresh=0.1)
    axes.set_yticks([-0.1, -0.05, 0, 0.05, 0.1, 0.5, 1], ["-0.1", "-0.05", "0", "0.05", "0.1", "0.5", "1"])
    axes.axhline(0, color="grey", linewidth=0.5)
    axes.set_ylabel("nats per token above GLA")
    axes.legend(frameon=False, fontsize=8)


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


def mixer_of(line: dict[str, Any]) -> str:
    """Return whose line a point belongs to: its mixer, GLA with short convolutions apart from GLA without."""
    mixer = line["point"]["model.mixer"]
    convolved = mixer == "gla" and line["settings"].get("model.mixers.gla.use_short_conv")
    return "gla_convolution" if convolved else mixer


def best_accuracy(line: dict[str, Any]) -> float:
    """Return the highest accuracy that a point of a sweep came to."""
    return max(x for one in line["evaluations"] for x in one["eval/accuracy"] if x is not None)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read lines of JSON, draw, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure", choices=("recall", "gates", "position"))
    parser.add_argument("inputs", nargs="+", type=Path, metavar="FILE", help="lines of JSON")
    parser.add_argument("--output", required=True, type=Path, help="the picture; its ending chooses the format")
    options = parser.parse_args(arguments)
    files = {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in options.inputs}
    figure = plt.figure(layout="constrained")
    if options.figure == "position":
        draw_position(files, figure)
    else:
        draw = {"recall": draw_recall, "gates": draw_gates}[options.figure]
        draw([line for lines in files.values() for line in lines], figure)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(options.output, dpi=160)
    plt.close(figure)


if __name__ == "__main__":
    main()
