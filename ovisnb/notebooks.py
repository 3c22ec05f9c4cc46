"""Run a notebook from start to end, headless, with parameters that are checked before anything runs.

ovisnb run notebooks/03_sft.ipynb -p max_steps 20
ovisnb demo
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ovisnb.parameters import check_names, check_values, declared, parse_value
from ovisnb.paths import repository_root

KERNEL = "python3"

# What `make demo` runs, in this order, and the parameters that differ from the notebooks' own defaults.
DEMO: dict[str, dict[str, Any]] = {
    "01_data": {},
    "02_masks": {},
    "03_sft": {"output_dir": "outputs/demo/03_sft"},
    "04_lora": {"output_dir": "outputs/demo/04_lora"},
    "06_grounding": {"model": "outputs/demo/03_sft/final"},  # what the notebook before it trained
}


class NotebookError(ValueError):
    """A notebook that cannot be read, or that failed while it ran; the message is one sentence."""


def read_notebook(path: Path):
    """The notebook as nbformat's node, in version 4; raises NotebookError or FileNotFoundError."""
    import nbformat

    if not path.is_file():
        raise FileNotFoundError(f"there is no notebook {path}")
    try:
        return nbformat.read(path, as_version=4)
    except (ValueError, KeyError, AttributeError, TypeError, nbformat.ValidationError) as error:
        raise NotebookError(f"{path} is not a notebook ({_first_line(error)})") from None


def parameters_of(path: Path):
    """The declared parameters of the notebook at `path`, by name; empty where no cell is tagged `parameters`."""
    for cell in read_notebook(path).cells:
        if cell.cell_type == "code" and "parameters" in cell.metadata.get("tags", []):
            return declared(cell.source)
    return {}


def parse_parameters(path: Path, words: list[tuple[str, str]]) -> dict[str, Any]:
    """Values for the (name, text) pairs of a command line, each of its declared type; raises ParameterError."""
    known = parameters_of(path)
    check_names(known, [name for name, _ in words])
    return {name: parse_value(known[name], text) for name, text in words}


def run_notebook(path: Path, output: Path, parameters: Mapping[str, Any]) -> Path:
    """Execute the notebook at `path` with `parameters`, and return the page made of the result.

    `output` is the executed notebook, saved after every cell, so it holds what had been done if the run
    fails; the page lies beside it with the ending .html. The notebook runs with the repository as its
    working directory, in the kernel of the Python that calls this; what it prints goes to stdout.
    Raises ParameterError before anything runs, and NotebookError naming the cell that failed.
    """
    # import here: papermill takes 0.5 s, and `ovisnb --help` should not wait for it
    import papermill
    from nbclient.exceptions import DeadKernelError

    check_values(parameters_of(path), parameters)
    _check_kernel()
    output.parent.mkdir(parents=True, exist_ok=True)
    os.environ["OVISNB_NOTEBOOK"] = str(output.absolute())  # what links in the notebook are relative to
    try:
        papermill.execute_notebook(
            str(path),
            str(output),
            parameters=dict(parameters),
            kernel_name=KERNEL,
            language="python",
            cwd=str(repository_root() or Path.cwd()),
            progress_bar=sys.stderr.isatty(),
            stdout_file=sys.stdout,
            extra_arguments=["--log-level=CRITICAL"],  # the kernel's own log, not what the notebook prints
        )
    except papermill.PapermillExecutionError as error:
        reason = f"{error.ename}: {' '.join(error.evalue.split())}"
        raise NotebookError(f"{path.name} failed at In [{error.exec_count}] with {reason} (see {output})") from None
    except DeadKernelError:
        cell = _mark_dead(output)
        raise NotebookError(
            f"{path.name}: the kernel died in {cell}, often for want of memory (see {output} for what ran before)"
        ) from None
    return write_page(output)


def write_page(notebook: Path) -> Path:
    """Write the executed `notebook` as one HTML file beside it, pictures included; returns its path."""
    from nbconvert import HTMLExporter

    # nothing from elsewhere: the page is read offline too, and text of the data is no mathematics
    page, _ = HTMLExporter(embed_images=True, mathjax_url="", require_js_url="").from_filename(str(notebook))
    path = notebook.with_suffix(".html")
    path.write_text(page, encoding="utf-8")
    return path


def run_demo() -> None:
    """Run the notebooks of DEMO into the checkout's outputs/demo, emptied first, saying how long each took; raises what run_notebook raises."""
    root = repository_root()
    if root is None or not (root / "notebooks").is_dir():
        raise NotebookError("the demo runs the notebooks of a checkout, and there is none here: change into one")
    folder = root / "outputs" / "demo"
    if folder.exists():  # a run folder that is complete would be taken up again, and train nothing
        shutil.rmtree(folder)
    for name, parameters in DEMO.items():
        print(f"== {name}", flush=True)
        begun = time.monotonic()
        page = run_notebook(root / "notebooks" / f"{name}.ipynb", folder / f"{name}.ipynb", parameters)
        print(f"== {name} took {time.monotonic() - begun:.0f} s: {page}", flush=True)


def default_output(path: Path) -> Path:
    """Where `ovisnb run` puts the executed notebook when it isn't told: a folder of its own for every run."""
    return (repository_root() or Path.cwd()) / "outputs" / f"{path.stem}-{time.strftime('%Y%m%d-%H%M%S')}" / path.name


def _check_kernel() -> None:
    """Raise NotebookError unless the kernel `python3` is the Python that is running."""
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    try:
        command = KernelSpecManager().get_kernel_spec(KERNEL).argv[0]
    except NoSuchKernel:
        raise NotebookError(f"{sys.executable} has no Jupyter kernel: pip install ipykernel into it") from None
    # a bare name stands for the running Python; a path may lead to another one
    if Path(command).is_absolute() and Path(command).parent != Path(sys.executable).parent:
        raise NotebookError(
            f"the Jupyter kernel '{KERNEL}' is {command}, not {sys.executable}: remove that kernel or unset JUPYTER_PATH"
        )


def _mark_dead(output: Path) -> str:
    """Mark the cell during which the kernel died as failed (papermill calls all of them completed), and name it."""
    import nbformat

    notebook = nbformat.read(output, as_version=4)
    started = [i for i, cell in enumerate(notebook.cells) if cell.metadata.papermill["start_time"]]
    if not started:
        return "its start"
    for cell in notebook.cells[started[-1] + 1 :]:
        cell.metadata.papermill["status"] = "pending"
    cell = notebook.cells[started[-1]]
    cell.metadata.papermill["status"] = "failed"
    cell.metadata.papermill["exception"] = True
    notebook.metadata.papermill["exception"] = True
    cell.outputs.append(
        nbformat.v4.new_output("error", ename="DeadKernelError", evalue="the kernel died here", traceback=[])
    )
    nbformat.write(notebook, output)
    return f"cell {started[-1] + 1}"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
