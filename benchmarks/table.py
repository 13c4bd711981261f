"""Print what `training.py`, `layers.py` or `decode.py` measured as tables of Markdown.

python benchmarks/table.py benchmarks/training_h100.json
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines))


def training(rows: Sequence[Row]) -> list[str]:
    """Return a table of the models' figures, and one of their parts, milliseconds of a step."""
    whole = []
    for row in rows:
        rate = {name: f"{value / 1e3:.1f}k" for name, value in row["tokens_per_second"].items()}
        share = "" if row["mfu"] is None else f"{row['mfu']:.1%}"
        figures = [f"{row['step_ms']:.1f}", share, f"{row['memory_GiB']['program']:.1f}"]
        case = [_name(row), row["shape"], str(row.get("documents", 1))]
        whole.append([*case, f"**{rate['median']}**", rate["least"], *figures])
    head = ["model", "rows x tokens", "documents a row", "tokens/s", "slowest step", "ms", "MFU", "memory, GiB"]
    tables = [markdown(head, whole)]
    taken_apart = [row for row in rows if row["kernels"]]
    if taken_apart:
        times = [{part["name"]: part["ms"] for part in row["kernels"]["parts"]} for row in taken_apart]
        names = list(dict.fromkeys(name for parts in times for name in parts))
        lines = [[name, *(f"{parts.get(name, 0):.1f}" for parts in times)] for name in names]
        lines.append(["busy in all", *(f"{row['kernels']['busy']:.1f}" for row in taken_apart)])
        tables.append(markdown(["part, ms", *(f"{_name(row)} {row['shape']}" for row in taken_apart)], lines))
    return tables


def _name(row: Row) -> str:
    return " ".join([row["model"], *row.get("set", [])])


def layers(rows: Sequence[Row]) -> list[str]:
    """Return a table of milliseconds, forward / forward and backward, and memory."""
    lines = []
    for row in rows:
        both = (row["forward"], row["forward_backward"])
        times = " / ".join(f"{each['ms']:.2f}" if "ms" in each else "does not fit" for each in both)
        lines.append([row["mixer"], str(row["length"]), times, str(both[1].get("temporary_GiB", ""))])
    return [markdown(["mixer", "tokens of a row", "ms", "memory, GiB"], lines)]


def decode(rows: Sequence[Row]) -> list[str]:
    """Return a table of the drawing of tokens."""
    lines = []
    for row in rows:
        case = [row["model"], str(row["batch_size"]), str(row["context"])]
        if "error" in row:
            lines.append([*case, "does not fit", "", "", ""])
            continue
        rate = f"**{row['tokens_per_second']['median']:.0f}**"
        lines.append([*case, f"{row['step_ms']:.2f}", rate, f"{row['state_GiB']:.2f}", f"{row['memory_GiB']:.1f}"])
    return [markdown(["model", "rows", "context", "ms a token", "tokens/s", "state, GiB", "memory, GiB"], lines)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the JSON and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=Path)
    rows = json.loads(parser.parse_args(arguments).input.read_text())["rows"]
    if "shape" in rows[0]:
        tables = training([row for row in rows if "error" not in row])
    else:
        tables = layers(rows) if "mixer" in rows[0] else decode(rows)
    print("\n\n".join(tables))


if __name__ == "__main__":
    main()
