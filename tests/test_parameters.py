"""Parameters of a notebook: declared, checked, and checked again inside a notebook that papermill runs."""

from __future__ import annotations

from pathlib import Path

import nbformat
import papermill
import pytest

from ovisnb.parameters import ParameterError, check_parameters, check_values, declared, parse_value

CELL = """\
# what to do
steps: int = 20  # optimizer steps
rate: float = 1e-3
name: str = "shapes"
data: str | None = None  # data file
bold: bool = False
sizes: list[int] = [1, 2]
kind: Literal["box", "point"] = "box"
free = None
plain = 3
table: dict[str, float] = {}
late: str = None
"""


def test_declared_reads_names_types_and_defaults():
    known = declared(CELL)
    assert list(known) == [
        "steps", "rate", "name", "data", "bold", "sizes", "kind", "free", "plain", "table", "late",
    ]  # fmt: skip
    assert (known["steps"].type, known["steps"].default) == ("int", "20")
    assert known["data"].type == "str | None"
    assert known["late"].type == "str | None"  # a default of None says that None fits
    assert known["plain"].type == "int"  # an untyped parameter has the type of its default
    assert known["free"].type == "anything"


def test_declared_refuses_what_is_not_python():
    with pytest.raises(ParameterError, match="not valid Python .its line 2"):
        declared("a: int = 1\nb: int = = 2")


FITS = [
    ("steps", 5), ("rate", 0.5), ("rate", 2), ("name", ""), ("data", None), ("data", "x.json"), ("bold", True),
    ("sizes", []), ("sizes", [3]), ("kind", "point"), ("free", None), ("free", [1, "a"]), ("plain", 0),
    ("table", {"a": 1}), ("late", None), ("late", "x"), ("rate", float("nan")),
]  # fmt: skip
MISFITS = [
    ("steps", 5.0), ("steps", True), ("steps", "5"), ("steps", None), ("rate", "1e-3"), ("rate", False), ("name", 7),
    ("name", None), ("data", 3), ("bold", 1), ("bold", "true"), ("sizes", 3), ("sizes", ["a"]), ("kind", "boxes"),
    ("plain", "3"), ("table", []), ("table", {"a": "b"}), ("late", 1),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), FITS)
def test_values_of_the_declared_type_are_taken(name, value):
    check_values(declared(CELL), {name: value})


@pytest.mark.parametrize(("name", "value"), MISFITS)
def test_values_of_another_type_are_refused(name, value):
    with pytest.raises(ParameterError) as raised:
        check_values(declared(CELL), {name: value})
    assert str(raised.value).startswith(f"parameter {name!r} cannot be {value!r} ({type(value).__name__}): it is ")


def test_an_unknown_name_is_refused_with_the_nearest_one():
    with pytest.raises(ParameterError) as raised:
        check_values(declared(CELL), {"step": 1})
    message = str(raised.value)
    assert message.startswith(
        "the notebook has no parameter 'step' (did you mean 'steps'?); its parameters are: steps, rate"
    )
    assert "\n" not in message


def test_a_type_that_cannot_be_checked_is_refused():
    with pytest.raises(ParameterError, match="'odd' is declared as 'Colour', which cannot be checked"):
        check_values(declared("odd: Colour = 1"), {"odd": 1})


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("steps", "7", 7), ("steps", "-1", -1), ("rate", "1e-4", 1e-4), ("rate", "3", 3), ("name", "12", "12"),
        ("name", "None", "None"), ("name", "two words", "two words"), ("data", "None", None), ("data", "null", None),
        ("data", "a.json", "a.json"), ("bold", "true", True), ("bold", "False", False), ("sizes", "[4, 5]", [4, 5]),
        ("kind", "point", "point"), ("free", "text", "text"), ("free", "1", 1), ("table", '{"a": 0.5}', {"a": 0.5}),
    ],
)  # fmt: skip
def test_a_word_of_the_command_line_becomes_a_value_of_the_declared_type(name, text, value):
    parsed = parse_value(declared(CELL)[name], text)
    assert parsed == value and type(parsed) is type(value)


@pytest.mark.parametrize(
    ("name", "text"), [("steps", "ten"), ("steps", "1.5"), ("bold", "1"), ("sizes", "4"), ("kind", "b")]
)
def test_a_word_that_fits_no_type_is_refused(name, text):
    with pytest.raises(ParameterError, match=f"parameter '{name}' cannot be"):
        parse_value(declared(CELL)[name], text)


def test_in_plain_python_there_is_nothing_to_check():
    check_parameters()


def notebook(folder: Path) -> Path:
    """A notebook of three cells: parameters, their check, and a cell that rebinds a parameter and prints."""
    cells = [
        nbformat.v4.new_code_cell(CELL.replace('Literal["box", "point"]', "str"), metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell("from ovisnb.parameters import check_parameters\n\ncheck_parameters()"),
        nbformat.v4.new_code_cell("name = [name]\nprint(steps, rate, name)\ncheck_parameters()"),
    ]
    nb = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})
    nb.metadata["language_info"] = {"name": "python"}
    path = folder / "small.ipynb"
    nbformat.write(nb, path)
    return path


def test_papermill_with_good_parameters_passes_twice(tmp_path):
    values = {"steps": 3, "rate": float("inf"), "name": 'a "b"\n\\c', "data": None}
    first = papermill.execute_notebook(notebook(tmp_path), tmp_path / "out.ipynb", values, progress_bar=False)
    assert first.cells[-1].outputs[0].text == f"3 inf {[values['name']]}\n"
    # the executed notebook holds an injected cell already; running it again replaces that cell
    again = papermill.execute_notebook(
        tmp_path / "out.ipynb", tmp_path / "again.ipynb", {"steps": 4}, progress_bar=False
    )
    assert again.cells[-1].outputs[0].text.startswith("4 0.001 ")


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"steps": 3, "raet": 1.0}, "the notebook has no parameter 'raet' (did you mean 'rate'?)"),
        ({"steps": "many"}, "parameter 'steps' cannot be 'many' (str): it is int, such as 20"),
    ],
)
def test_papermill_with_bad_parameters_fails_in_the_check(tmp_path, values, sentence):
    with pytest.raises(papermill.PapermillExecutionError) as raised:
        papermill.execute_notebook(notebook(tmp_path), tmp_path / "out.ipynb", values, progress_bar=False)
    assert raised.value.ename == "ParameterError"
    assert raised.value.evalue.startswith(sentence)


def test_a_notebook_without_parameters_refuses_every_one(tmp_path):
    path = notebook(tmp_path)
    nb = nbformat.read(path, as_version=4)
    del nb.cells[0]
    nbformat.write(nb, path)
    with pytest.raises(papermill.PapermillExecutionError, match="no parameter 'steps'; its parameters are: none"):
        papermill.execute_notebook(path, tmp_path / "out.ipynb", {"steps": 1}, progress_bar=False)
