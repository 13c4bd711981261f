"""Draw what `training.py`, `layers.py` or `decode.py` measured.

    python benchmarks/plot.py benchmarks/layers_h100.json docs/layers.png

Needs matplotlib (extra `plot`).
"""

import argparse
import collections
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot, ticker

XLABELS = {
    "shape": "rows x tokens of a step",
    "length": "tokens of a row",
    "context": "tokens read before",
}
"""By the field of a row that it is drawn over."""

Lines = dict[str, list[tuple[str, float]]]


def lines_of(rows: Sequence[dict[str, Any]]) -> dict[str, Lines]:
    """Return what to draw: for each panel, by its title, the points of each line."""
    panels: dict[str, Lines] = collections.defaultdict(lambda: collections.defaultdict(list))
    for row in (row for row in rows if "error" not in row):
        if "shape" in row:
            rate, memory = row["tokens_per_second"]["median"], row["memory_GiB"]["program"]
            name = " ".join([row["model"], *row.get("set", [])])
            panels["training, thousand tokens per second"][name].append((row["shape"], rate / 1e3))
            panels["memory, GiB"][name].append((row["shape"], memory))
        elif "mixer" in row:
            for name in ("forward", "forward_backward"):
                if "ms" in row[name]:
                    title = f"{name.replace('_', ' and ')} of a layer, ms"
                    panels[title][row["mixer"]].append((str(row["length"]), row[name]["ms"]))
        else:
            line = f"{row['model']}, batch {row['batch_size']}"
            panels["decoding, tokens per second"][line].append(
                (str(row["context"]), row["tokens_per_second"]["median"])
            )
            panels["memory, GiB"][line].append((str(row["context"]), row["memory_GiB"]))
    several = {name for lines in panels.values() for name, points in lines.items() if len(points) > 1}
    if several:  # what was measured once only is no line, and may need another scale
        panels = {title: {name: lines[name] for name in lines if name in several} for title, lines in panels.items()}
    return panels


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the JSON and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=Path)
    parser.add_argument("output", type=Path)
    options = parser.parse_args(arguments)
    report = json.loads(options.input.read_text())
    panels = lines_of(report["rows"])
    figure, axes = pyplot.subplots(1, len(panels), figsize=(6 * len(panels), 4), squeeze=False)
    for axis, (title, lines) in zip(axes[0], panels.items(), strict=True):
        ticks = list(dict.fromkeys(x for points in lines.values() for x, _ in points))
        for name, points in lines.items():
            axis.plot([ticks.index(x) for x, _ in points], [y for _, y in points], marker="o", label=name)
        axis.set_xticks(range(len(ticks)), ticks)
        axis.set_xlabel(XLABELS[next(name for name in XLABELS if name in report["rows"][0])])
        axis.set_yscale("log" if title.startswith(("decoding", "forward")) else "linear")
        if axis.get_yscale() == "linear":
            axis.set_ylim(bottom=0)
        else:
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter(ticker.LogFormatter())
        axis.set_title(f"{title} ({report['device']})", fontsize=10)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(options.output, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
