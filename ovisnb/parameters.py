"""The parameters of a notebook: which there are, and whether the values given to them fit.

papermill writes the values it is given into a cell of its own, below the cell tagged `parameters`,
and only warns about a name that no cell declares. A misspelt parameter would silently run with the
default, so every notebook calls, right below its parameters:

    from ovisnb.parameters import check_parameters

    check_parameters()

A parameters cell is plain assignments, one a line, with a type and a comment:

    steps: int = 20  # optimizer steps
    data: str | None = None  # data file (None: the shipped one)
"""

from __future__ import annotations

import ast
import difflib
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Optional, Union

_INJECTED = "# Parameters"  # the first line of the cell that papermill writes
_TYPES = {kind.__name__: kind for kind in (bool, int, float, str, list, tuple, dict, object)}
_TYPES |= {"Any": Any, "Literal": Literal, "Optional": Optional, "Union": Union, "Path": str, "anything": Any}


class ParameterError(ValueError):
    """A notebook parameter that does not exist, or a value of the wrong type; the message is one sentence."""


@dataclass(frozen=True)
class Parameter:
    """One line of a parameters cell; `type` and `default` are source text, such as "str | None" and "None"."""

    name: str
    type: str
    """As written, or that of the default; "anything" where neither says one."""
    default: str

    def accepts(self, value: Any) -> bool:
        """Whether `value` is of the type as pydantic is strict about JSON: an int fits a float, a bool only a bool.

        Raises ParameterError for a type that is none of `_TYPES`.
        """
        from pydantic import PydanticUserError, TypeAdapter

        if self.type == "anything":
            return True
        try:
            kind = TypeAdapter(eval(self.type, {"__builtins__": {}}, _TYPES))
        except (NameError, TypeError, AttributeError, SyntaxError, PydanticUserError):
            raise ParameterError(
                f"parameter {self.name!r} is declared as {self.type!r}, which cannot be checked: "
                "use bool, int, float, str, list, tuple, dict, Literal, Any, or these joined by |"
            ) from None
        try:
            kind.validate_json(json.dumps(value), strict=True)
        except (TypeError, ValueError):
            return False
        return True


def declared(source: str) -> dict[str, Parameter]:
    """The parameters that a parameters cell declares, in its order; ParameterError if it is no Python."""
    try:
        statements = ast.parse(source).body
    except SyntaxError as error:
        raise ParameterError(
            f"the parameters cell is not valid Python (its line {error.lineno}: {error.msg})"
        ) from None
    found = {}
    for statement in statements:
        match statement:
            case ast.AnnAssign(target=ast.Name(id=name), annotation=annotation, value=ast.expr() as default):
                quoted = isinstance(annotation, ast.Constant) and isinstance(annotation.value, str)
                kind = annotation.value if quoted else ast.unparse(annotation)
                if _literal(default) is None and not Parameter(name, kind, "None").accepts(None):
                    kind += " | None"
            case ast.Assign(targets=[ast.Name(id=name)], value=default):
                value = _literal(default)
                kind = "anything" if value is None or value is ... else type(value).__name__
            case _:
                continue
        found[name] = Parameter(name, kind, ast.unparse(default))
    return found


def check_values(known: Mapping[str, Parameter], values: Mapping[str, Any]) -> None:
    """Raise ParameterError for the first of `values` that `known` does not have, or whose type does not fit."""
    check_names(known, values)
    for name, value in values.items():
        if not known[name].accepts(value):
            raise ParameterError(_misfit(known[name], value))


def check_names(known: Mapping[str, Parameter], names: Iterable[str]) -> None:
    """Raise ParameterError naming the nearest known parameter for the first of `names` that is not one."""
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ParameterError(
                f"the notebook has no parameter {name!r}{hint}; its parameters are: {', '.join(known) or 'none'}"
            )


def parse_value(parameter: Parameter, text: str) -> Any:
    """The value that `text`, a word of a command line, stands for under the parameter's declared type.

    Numbers, true, false, none, and lists and dicts as JSON or Python write them; text stands for
    itself wherever the type allows text. Raises ParameterError where nothing fits.
    """
    value = _word(text)
    if not isinstance(value, str) and parameter.accepts(value):
        return value
    if parameter.accepts(text):
        return text
    raise ParameterError(_misfit(parameter, value))


def check_parameters() -> None:
    """In a notebook, fail if papermill was given a parameter that is unknown or of the wrong type.

    Call it in the cell right below the parameters. It compares the cell that papermill injected with
    the cell of declarations before it, both as the kernel ran them, and does nothing where nothing was
    injected: in JupyterLab, or in plain Python. Raises ParameterError.
    """
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is None:
        return
    history = list(shell.user_ns["In"])
    injected = next((i for i in reversed(range(len(history))) if _is_injected(history[i])), None)
    if injected is None:
        return
    cells = reversed(history[:injected])
    declarations = next((cell for cell in cells if _assignments(cell) and not _is_injected(cell)), "")
    values = {given.targets[0].id: _literal(given.value) for given in _assignments(history[injected])}
    check_values(declared(declarations), values)


def _misfit(parameter: Parameter, value: Any) -> str:
    return (
        f"parameter {parameter.name!r} cannot be {value!r} ({type(value).__name__}): "
        f"it is {parameter.type}, such as {parameter.default}"
    )


def _literal(node: ast.expr) -> Any:
    """The value of a literal, or of float("nan") as papermill writes it; `...` for any other source."""
    match node:
        case ast.Call(func=ast.Name(id="float"), args=[ast.Constant(value=str() as text)]):
            return float(text)
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        return ...


def _word(text: str) -> Any:
    """A command-line word read as JSON, else as a Python literal, else as it stands."""
    if text.lower() in ("none", "true", "false"):
        return {"none": None, "true": True, "false": False}[text.lower()]
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            continue
    return text


def _assignments(cell: str) -> list[ast.Assign | ast.AnnAssign]:
    """The statements of a cell that is nothing but assignments to names, and strings; none of any other cell."""
    try:
        statements = ast.parse(cell).body
    except SyntaxError:
        return []
    found = []
    for statement in statements:
        match statement:
            case ast.Assign(targets=[ast.Name()]) | ast.AnnAssign(target=ast.Name()):
                found.append(statement)
            case ast.Expr(value=ast.Constant()):
                continue
            case _:
                return []
    return found


def _is_injected(cell: str) -> bool:
    """Whether papermill wrote this cell: its heading, then assignments without types."""
    heading = cell.partition("\n")[0].strip() == _INJECTED
    return heading and all(isinstance(statement, ast.Assign) for statement in _assignments(cell))
