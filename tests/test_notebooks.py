"""The notebooks run from top to bottom, at small sizes, each in a kernel of its own; nothing that they show is kept.

A value of the cell tagged "parameters" is overridden by a cell that is put in after it.
"""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "notebooks"
SMALL = {
    "recurrence": "",
    "train": "STEPS, WIDTH, LAYERS = 4, 32, 2",
    "extrapolate": "STEPS, WIDTH, LAYERS, TIMES, ROWS = 2, 32, 2, 2, 2",
    "mixer": "STEPS, WIDTH, LAYERS = 2, 16, 1",
}
SETUP_CELLS = 2


def read(name):
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    return notebook


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_every_notebook_is_known():
    assert sorted(SMALL) == sorted(path.stem for path in FOLDER.glob("*.ipynb"))


@pytest.mark.parametrize("name", SMALL)
def test_outputs_are_stripped(name):
    for cell in code(read(name)):
        assert not cell.outputs and cell.execution_count is None, f"clear the outputs of {name}.ipynb"


def test_all_are_set_up_by_the_same_cells():
    cells = {name: [cell.source for cell in code(read(name))[:SETUP_CELLS]] for name in SMALL}
    for name in SMALL:
        assert cells[name] == cells["recurrence"], name


@pytest.mark.parametrize("name", SMALL)
def test_runs_from_top_to_bottom(name, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(FOLDER.parent), *os.environ.get("PYTHONPATH", "").split()]))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("PYTHONWARNINGS", "error::DeprecationWarning:__main__")
    notebook = read(name)
    if SMALL[name]:
        place = next(n for n, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ()))
        notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(SMALL[name]))
    client = NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()  # raises at the first cell that does
    outputs = [output for cell in code(notebook) for output in cell.outputs]
    assert any("image/png" in output.get("data", ()) for output in outputs)
    errors = [output.text for output in outputs if output.get("name") == "stderr" and "Warning" in output.text]
    assert not errors
