"""Running a notebook: the page it leaves, and one sentence for each way it can go wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpecManager

from ovisnb import notebooks
from ovisnb.notebooks import NotebookError, default_output, parse_parameters, run_notebook
from ovisnb.parameters import ParameterError

PARAMETERS = "steps: int = 2  # how many\n"


def write(folder: Path, *sources: str) -> Path:
    """A notebook without metadata: parameters, then `sources`."""
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})])
    nb.cells += [nbformat.v4.new_code_cell(source) for source in sources]
    path = folder / "small.ipynb"
    nbformat.write(nb, path)
    return path


def test_a_run_leaves_the_notebook_and_a_page_with_its_picture(tmp_path, capsys):
    draw = "from PIL import Image\nfrom IPython.display import display\ndisplay(Image.new('RGB', (steps, 3), 'red'))"
    where = "import os, sys\nprint('kernel', sys.executable)\nprint('folder', os.getcwd())"
    output = tmp_path / "deep" / "er" / "out.ipynb"
    page = run_notebook(write(tmp_path, draw, where), output, {"steps": 5})
    executed = nbformat.read(output, as_version=4)
    assert "# Parameters\nsteps = 5" in executed.cells[1].source
    assert page == output.with_suffix(".html")
    assert "data:image/png;base64," in page.read_text(encoding="utf-8")
    printed = capsys.readouterr().out  # what the notebook prints is seen while it runs
    assert f"kernel {sys.executable}\n" in printed
    assert f"folder {Path(__file__).parents[1]}\n" in printed


def test_bad_parameters_are_refused_before_anything_runs(tmp_path):
    path, output = write(tmp_path), tmp_path / "out" / "out.ipynb"
    with pytest.raises(ParameterError, match="no parameter 'stesp' .did you mean 'steps'"):
        run_notebook(path, output, {"stesp": 5})
    with pytest.raises(ParameterError, match="'steps' cannot be 'a' .str.: it is int, such as 2"):
        run_notebook(path, output, {"steps": "a"})
    assert not output.parent.exists()


def test_words_are_read_as_the_notebook_declares_them(tmp_path):
    assert parse_parameters(write(tmp_path), [("steps", "7")]) == {"steps": 7}


def test_a_failing_cell_is_named_and_what_ran_before_is_kept(tmp_path):
    output = tmp_path / "out.ipynb"
    with pytest.raises(NotebookError) as raised:
        run_notebook(
            write(tmp_path, "print('before')", "raise KeyError('gone\\nfor good')", "print('after')"), output, {}
        )
    message = str(raised.value)
    assert message.startswith("small.ipynb failed at In [3] with KeyError: ") and "\n" not in message
    executed = nbformat.read(output, as_version=4)
    printed = [o.text for cell in executed.cells for o in cell.get("outputs", []) if o.output_type == "stream"]
    assert printed == ["before\n"]


def test_a_killed_kernel_is_a_failure_and_its_cell_is_marked(tmp_path):
    output = tmp_path / "out.ipynb"
    kill = "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"
    with pytest.raises(NotebookError, match="small.ipynb: the kernel died in cell 2"):
        run_notebook(write(tmp_path, kill, "print('after')"), output, {})
    executed = nbformat.read(output, as_version=4)
    assert [cell.metadata.papermill.status for cell in executed.cells] == ["completed", "failed", "pending"]
    assert executed.cells[1].outputs[-1].ename == "DeadKernelError"


@pytest.mark.parametrize("text", ["", "{not json", "[]", '{"cells": 3, "nbformat": 4, "nbformat_minor": 5}'])
def test_a_file_that_is_no_notebook_is_said_to_be_none(tmp_path, text):
    path = tmp_path / "broken.ipynb"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(NotebookError, match="broken.ipynb is not a notebook"):
        run_notebook(path, tmp_path / "out.ipynb", {})


def test_a_kernel_of_another_python_is_refused(tmp_path, monkeypatch):
    spec = KernelSpecManager().get_kernel_spec("python3")
    folder = tmp_path / "kernels" / "python3"
    folder.mkdir(parents=True)
    kernel = {"argv": ["/elsewhere/bin/python", *spec.argv[1:]], "display_name": "other", "language": "python"}
    (folder / "kernel.json").write_text(json.dumps(kernel), encoding="utf-8")
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    with pytest.raises(NotebookError, match="'python3' is /elsewhere/bin/python, not "):
        run_notebook(write(tmp_path), tmp_path / "out.ipynb", {})


def test_every_run_has_an_output_folder_of_its_own(tmp_path, monkeypatch):
    moments = iter(["20260101-000000", "20260101-000001"])
    monkeypatch.setattr(notebooks.time, "strftime", lambda form: next(moments))
    first, second = default_output(Path("notebooks/03_sft.ipynb")), default_output(Path("notebooks/03_sft.ipynb"))
    assert first.name == second.name == "03_sft.ipynb"
    assert first.parent.name == "03_sft-20260101-000000" and second.parent.name == "03_sft-20260101-000001"
    assert first.parent.parent.name == "outputs"


def test_the_demo_names_notebooks_and_parameters_that_exist():
    folder = Path(__file__).parents[1] / "notebooks"
    for name, parameters in notebooks.DEMO.items():
        notebooks.check_values(notebooks.parameters_of(folder / f"{name}.ipynb"), parameters)
