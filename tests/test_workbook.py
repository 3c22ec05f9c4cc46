"""The notebooks of the repository: how they are stored, and that each runs from start to end at a small size."""

from __future__ import annotations

import json
import re
from pathlib import Path

import nbformat
import papermill
import pytest
from PIL import Image

from ovisnb.notebooks import parameters_of, run_notebook
from ovisnb.parameters import ParameterError
from tests.show.hostile import write_hostile

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
TINY, GOLDEN = ROOT / "data" / "tiny-ovis", ROOT / "tests" / "golden" / "ovis2_5" / "checkpoint"
MODEL = str(TINY if (TINY / "config.json").is_file() else GOLDEN)

# Small enough for a test; everything else as the notebook has it.
SMALL = {
    "00_tiny": {
        "map_steps": 2,
        "locate_steps": 2,
        "bind_steps": 2,
        "settle_steps": 2,
        "sharpen_steps": 2,
        "batch_size": 2,
        "heldout": 12,
    },
    "01_data": {"max_records": 6, "cards": 2, "scenes": 2, "scene_size": 128},
    "02_masks": {},
    "03_sft": {
        "max_steps": 2,
        "batch_size": 2,
        "heldout": 4,
        "max_new_tokens": 4,
        "max_pixels": 96 * 96,
        "min_pixels": 1024,
    },
    "04_lora": {
        "max_steps": 2,
        "batch_size": 2,
        "heldout": 4,
        "max_new_tokens": 4,
        "max_pixels": 96 * 96,
        "modules_to_save": "vte",
        "layout": "released",
    },
    "06_grounding": {"heldout": 5, "shown": 3, "max_new_tokens": 4, "max_pixels": 96 * 96, "min_pixels": 1024},
}


def code(path: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request) -> Path:
    return request.param


def test_the_notebooks_are_those_that_the_tests_know():
    assert [path.stem for path in NOTEBOOKS] == sorted(SMALL)


def test_a_notebook_is_stored_without_outputs(notebook):
    nb = nbformat.read(notebook, as_version=4)
    nbformat.validate(nb)
    for cell in code(notebook):
        assert cell.outputs == [] and cell.execution_count is None
    assert nb.metadata.kernelspec.name == "python3"
    assert set(nb.metadata) == {"kernelspec", "language_info"}  # nothing of the machine it was written on


def test_a_notebook_says_first_what_it_shows_needs_and_leaves(notebook):
    first = nbformat.read(notebook, as_version=4).cells[0]
    assert first.cell_type == "markdown"
    assert re.search(r"\*\*You will see\*\*.*\n\*\*It needs\*\*.*\n\*\*It leaves\*\*", first.source)


def test_every_parameter_has_a_type_and_a_comment_that_papermill_explains(notebook):
    cells = code(notebook)
    assert [cell.metadata.get("tags", []) for cell in cells] == [["parameters"], *[[]] * (len(cells) - 1)]
    assert cells[1].source == "from ovisnb.parameters import check_parameters\n\ncheck_parameters()"
    explained = papermill.inspect_notebook(str(notebook))
    assert list(explained) == list(parameters_of(notebook))
    for name, parameter in explained.items():
        assert parameter["inferred_type_name"] in ("str", "int", "float", "bool"), name
        assert len(parameter["help"]) > 8, name


def test_a_notebook_is_thin_and_at_home_anywhere(notebook):
    for cell in code(notebook):
        assert len(cell.source.splitlines()) <= 22
        assert not re.search(r"(?m)^\s*[!%]|pip install|[\"']/(?!\s)\w", cell.source)


def test_an_unknown_or_misspelt_parameter_fails_before_anything_runs(notebook, tmp_path):
    name = next(iter(parameters_of(notebook)))
    with pytest.raises(ParameterError, match=f"no parameter '{name}s' .did you mean '{name}'"):
        run_notebook(notebook, tmp_path / "out.ipynb", {f"{name}s": "x"})
    assert not list(tmp_path.iterdir())


def test_papermill_alone_fails_on_an_unknown_parameter_too(tmp_path):
    with pytest.raises(papermill.PapermillExecutionError, match="no parameter 'max_step' .did you mean 'max_steps'"):
        papermill.execute_notebook(
            str(ROOT / "notebooks" / "03_sft.ipynb"), str(tmp_path / "out.ipynb"), {"max_step": 1}, progress_bar=False
        )


def test_a_notebook_runs_from_start_to_end_and_shows_its_pictures(notebook, tmp_path):
    folders = {"model": MODEL, "output_dir": str(tmp_path / "run"), "save_to": str(tmp_path / "saved")}
    known = parameters_of(notebook)
    parameters = {name: value for name, value in folders.items() if name in known} | SMALL[notebook.stem]
    page = run_notebook(notebook, tmp_path / "out.ipynb", parameters)
    shown = [output for cell in code(tmp_path / "out.ipynb") for output in cell.outputs]
    assert not [output for output in shown if output.output_type == "error" or output.get("name") == "stderr"]
    html = page.read_text(encoding="utf-8")
    expected = {
        "00_tiny": ["1.73 million parameters", "step 2/2", "image/png", "objects in the scene"],
        "01_data": ["longest record in tokens", "image/jpeg", "image/png", "&lt;tool_call&gt;Crop"],
        "02_masks": [
            "of them train",
            "empty_think",
            "tool_response",
            "patches",
            "label none",
            "without thinking",
            "difference",
        ],
        "03_sft": ["step 2/2", "image/png", "image/jpeg"],
        "04_lora": ["step 2/2", "of the base", "image/png", "image/jpeg", "share right", "adapter and merged model: "],
        "06_grounding": ["image/png", "image/jpeg"],
    }
    for text in expected[notebook.stem]:
        assert text in html
    if "output_dir" in parameters:
        run = tmp_path / "run" / ("5_sharpen" if "save_to" in parameters else "")
        weights = "adapter_model" if notebook.stem == "04_lora" else "model"
        assert (run / "final" / f"{weights}.safetensors").is_file()
        assert (run / "metrics.jsonl").is_file()
    if "save_to" in parameters:
        assert (tmp_path / "saved" / "model.safetensors").is_file()


def test_a_user_whose_data_has_no_boxes_gets_through_the_training_notebook(tmp_path):
    (tmp_path / "data.jsonl").write_text(
        '{"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hello."}]}\n'
    )
    parameters = {
        "model": MODEL,
        "data": str(tmp_path / "data.jsonl"),
        "image_folder": str(tmp_path),
        "shapes_share": 0.0,
    }
    run_notebook(
        ROOT / "notebooks" / "03_sft.ipynb",
        tmp_path / "out.ipynb",
        {**SMALL["03_sft"], **parameters, "max_steps": 1, "heldout": 2, "output_dir": str(tmp_path / "run")},
    )
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ["01_data", "02_masks"])
def test_bad_records_stop_no_notebook(name, tmp_path):
    path = write_hostile(tmp_path / "data")
    parameters = {"model": MODEL, "data": str(path), "image_folder": str(tmp_path / "data" / "images")}
    page = run_notebook(
        ROOT / "notebooks" / f"{name}.ipynb", tmp_path / "out.ipynb", parameters | SMALL[name] | {"max_records": 0}
    )
    text = page.read_text(encoding="utf-8")
    assert "there is no picture at missing.png" in text and "broken JSON" in text
    assert "&lt;img src=x" in text or "&lt;script&gt;alert" in text
    assert "<img src=x" not in text and "<script>alert" not in text


@pytest.mark.parametrize("name", ["01_data", "02_masks"])
def test_absolute_paths_are_taken_where_the_user_allows_them(name, tmp_path):
    turns = [{"from": "human", "value": "<image>\n?"}, {"from": "gpt", "value": "a"}]
    picture, empty = tmp_path / "photo.png", tmp_path / "empty"
    empty.mkdir()
    Image.new("RGB", (64, 48), "teal").save(picture)
    (tmp_path / "data.json").write_text(json.dumps([{"image": str(picture), "conversations": turns}]))
    parameters = {"model": MODEL, "data": str(tmp_path / "data.json"), "image_folder": str(empty)} | SMALL[name]
    for allowed in (True, False):
        given = parameters | {"allow_absolute": allowed}
        page = run_notebook(ROOT / "notebooks" / f"{name}.ipynb", tmp_path / "out.ipynb", given)
        assert ("leads out of the image_folder" in page.read_text(encoding="utf-8")) is not allowed
