"""The notebook runs from top to bottom in a fresh kernel, and is stored without what a run leaves in it."""

from __future__ import annotations

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

NOTEBOOK = ROOT / "notebooks" / "gan_versus_diffusion.ipynb"


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def test_the_notebook_runs(notebook, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "")  # it finds the project by itself
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    parameters.source += f'\nBUDGET, OUT = "--dataset digits --dry-run", r"{tmp_path}"'
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    pictures = [
        output for output in outputs if "image/png" in output.get("data", {}) or "image/gif" in output.get("data", {})
    ]
    assert len(pictures) == 8  # three models, any digit, sevens, the GIF, what was trained, the chart
    text = "".join(output.text for output in outputs if output.output_type == "stream")
    assert "ddpm, by digit" in text and "fid_ratio" in text
    assert (tmp_path / "samples" / "gan_progress.gif").exists()


def test_the_notebook_is_stored_without_outputs(notebook):
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert cell.cell_type == "markdown" or (not cell.outputs and cell.execution_count is None)
