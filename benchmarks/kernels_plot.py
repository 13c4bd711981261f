"""Draw what `kernels.py` measured, and print it as tables of Markdown.

    python benchmarks/kernels_plot.py benchmarks/kernels_h100.json --output=docs/kernels.png

Needs the extra `plot`.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.table import markdown

NAMES = {"ours": "ours", "cudnn": "cuDNN", "flash_attention_2": "FlashAttention-2", "jla": "jla", "fla": "fla"}
DIRECTIONS = {"forward": "forward", "forward_backward": "forward + backward"}
SHAPE = "B, T, H, K, V"
TICKS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)


def milliseconds(row: dict[str, Any], name: str, direction: str, figure: str = "ms") -> float | None:
    """Return what one implementation took, or None where it was not run or does not serve the shape."""
    return row.get(name, {}).get(direction, {}).get(figure)


def table(report: dict[str, Any], direction: str) -> str:
    """Return a line for each shape: milliseconds, ours with its share of the floor, then MiB at the peak."""
    names = [name for name in NAMES if any(milliseconds(row, name, direction) is not None for row in report["shapes"])]
    peak = lambda row, name: row.get(name, {}).get(direction, {}).get("peak_MiB")
    weighed = [name for name in names if any(peak(row, name) is not None for row in report["shapes"])]
    head = [SHAPE, *(NAMES[name] for name in names), *(f"MiB: {NAMES[name]}" for name in weighed)]
    head[1:2] = [f"{DIRECTIONS[direction]}: {head[1]}", "share of floor"]
    lines = []
    for row in report["shapes"]:
        times = [milliseconds(row, name, direction) for name in names]
        best = min(ms for ms in times if ms is not None)
        cells = ["" if ms is None else f"**{ms:.3f}**" if ms == best else f"{ms:.3f}" for ms in times]
        cells.insert(1, f"{row['ours'][direction]['share_of_floor']:.0%}")
        peaks = ["" if peak(row, name) is None else str(peak(row, name)) for name in weighed]
        lines.append([", ".join(map(str, row[SHAPE])), *cells, *peaks])
    return markdown(head, lines)


def table_under_load(report: dict[str, Any]) -> str:
    """Return a line for each shape: milliseconds from call to call under a long load, in both directions."""
    columns = [(name, direction) for direction in DIRECTIONS for name in NAMES]
    of_row = lambda row: [milliseconds(row, *column, "call_ms") for column in columns]
    rows = [of_row(row) for row in report["shapes"]]
    there = [i for i in range(len(columns)) if any(row[i] is not None for row in rows)]
    head = [SHAPE, *(f"{DIRECTIONS[columns[i][1]]}: {NAMES[columns[i][0]]}" for i in there)]
    lines = []
    for shape, row in zip(report["shapes"], rows, strict=True):
        cells = ["" if row[i] is None else f"{row[i]:.3f}" for i in there]
        lines.append([", ".join(map(str, shape[SHAPE])), *cells])
    return markdown(head, lines)


def draw(report: dict[str, Any], figure: Any) -> None:
    """Milliseconds on a logarithmic axis, a line for each shape, a panel for each direction."""
    shapes = report["shapes"]
    panels = figure.subplots(1, len(DIRECTIONS), sharey=True)
    for axes, (direction, title) in zip(panels, DIRECTIONS.items(), strict=True):
        floors = [row["ours"][direction]["floor_ms"] for row in shapes]
        axes.plot(floors, range(len(shapes)), "|", color="black", markersize=14, label="bytes that must move")
        for index, (name, label) in enumerate(NAMES.items()):
            points = [(milliseconds(row, name, direction), place) for place, row in enumerate(shapes)]
            points = [(ms, place) for ms, place in points if ms is not None]
            if points:
                style = {"zorder": 3, "markersize": 9} if name == "ours" else {"markersize": 6, "alpha": 0.8}
                axes.plot(*zip(*points, strict=True), "o", color=f"C{index}", label=label, **style)
        axes.set(title=title, xlabel="milliseconds", xscale="log")
        axes.set_xticks(TICKS, map(str, TICKS))
        axes.minorticks_off()
        every = np.hstack([line.get_xdata() for line in axes.lines])
        axes.set_xlim(0.8 * every.min(), 1.25 * every.max())
        axes.grid(alpha=0.3, axis="x")
        axes.spines[["top", "right"]].set_visible(False)
    labels = ["{} x {}, {} heads of {}, {}".format(*row[SHAPE]) for row in shapes]
    panels[0].set_yticks(range(len(shapes)), labels)
    panels[0].set_ylabel("rows x tokens, heads of K, V")
    panels[0].invert_yaxis()
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False, fontsize=8)
    figure.suptitle(report["device"], fontsize=10)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the JSON, print, draw, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=Path)
    parser.add_argument("--output", required=True, type=Path, help="the picture; its ending chooses the format")
    options = parser.parse_args(arguments)
    report = json.loads(options.input.read_text())
    report["shapes"] = [row for row in report["shapes"] if milliseconds(row, "ours", "forward_backward") is not None]
    for direction in DIRECTIONS:
        print(table(report, direction), end="\n\n")
    print(table_under_load(report), end="\n\n")
    figure = plt.figure(figsize=(10, 4), layout="constrained")
    draw(report, figure)
    figure.savefig(options.output, dpi=140)
    plt.close(figure)


if __name__ == "__main__":
    main()
