"""The notebook runs from top to bottom, with two steps and two candidates, in a folder of its own."""

import os
import re

import nbclient
import nbformat

from tests.readme import ROOT, quick_python


def test_the_notebook_runs(tmp_path):
    notebook = nbformat.read(ROOT / "examples/generate.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs for cell in code)  # it is kept without pictures
    for cell in code:
        cell.source = re.sub(r"\b8,", "2,", quick_python(cell.source))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env=environment)
    shown = [[kind for output in cell.outputs for kind in output.get("data", {})] for cell in code]
    assert ["image/png" in shown[1], "image/png" in shown[2], "image/gif" in shown[3]] == [True] * 3
    assert shown[1].count("image/png") == 1  # the preview is one picture, which changed
    assert any("4 anagrams" in output.get("text", "") for output in code[-1].outputs)
    assert (tmp_path / "notebook/page.html").stat().st_size > 100_000
