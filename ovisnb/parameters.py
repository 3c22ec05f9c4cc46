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
from typing import Any

_INJECTED = "# Parameters"  # the first line of the cell that papermill writes

_CONTAINERS = {"list": (list, tuple), "tuple": (list, tuple), "Sequence": (list, tuple), "dict": (dict,)}
_ALIASES = {"List": "list", "Tuple": "tuple", "Dict": "dict", "Path": "str"}


class ParameterError(ValueError):
    """A notebook parameter that does not exist, or a value of the wrong type; the message is one sentence."""


@dataclass(frozen=True)
class Parameter:
    """One line of a parameters cell.

    `annotation` is the type as written (or that of the default), None where any value fits;
    `default` is the source text of the default.
    """

    name: str
    annotation: ast.expr | None
    default: str

    @property
    def type(self) -> str:
        """The type as a person reads it, such as "int" or "str | None"."""
        return "anything" if self.annotation is None else ast.unparse(self.annotation)

    def accepts(self, value: Any) -> bool:
        """Whether `value` is of the declared type: an int fits a float, a bool fits only a bool."""
        return self.annotation is None or _fits(self.annotation, value, self.name)


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
                if _literal(default) is None and not _fits(annotation, None, name):
                    annotation = ast.BinOp(annotation, ast.BitOr(), ast.Constant(None))
            case ast.Assign(targets=[ast.Name(id=name)], value=default):
                value = _literal(default)
                annotation = None if value is None or value is _UNKNOWN else ast.Name(type(value).__name__)
            case _:
                continue
        found[name] = Parameter(name, annotation, ast.unparse(default))
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
    declarations = next((cell for cell in cells if _only_assigns(cell) and not _is_injected(cell)), "")
    check_values(declared(declarations), _assigned(history[injected]))


class _Unknown:
    """The value of source that is no literal."""

    def __repr__(self) -> str:
        return "?"


_UNKNOWN = _Unknown()


def _misfit(parameter: Parameter, value: Any) -> str:
    return (
        f"parameter {parameter.name!r} cannot be {value!r} ({type(value).__name__}): "
        f"it is {parameter.type}, such as {parameter.default}"
    )


def _literal(node: ast.expr) -> Any:
    """The value of a literal, or of float("nan") as papermill writes it; _UNKNOWN for any other source."""
    match node:
        case ast.Call(func=ast.Name(id="float"), args=[ast.Constant(value=str() as text)]):
            return float(text)
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        return _UNKNOWN


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


def _statements(cell: str) -> list[ast.stmt]:
    try:
        return ast.parse(cell).body
    except SyntaxError:
        return []


def _only_assigns(cell: str) -> bool:
    """Whether a cell is a parameters cell by its looks: assignments to names, and nothing else but strings."""
    statements = _statements(cell)
    plain = [s for s in statements if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
    return bool(plain) and all(
        isinstance(s, ast.AnnAssign) or (isinstance(s, ast.Assign) and isinstance(s.targets[0], ast.Name))
        for s in plain
    )


def _is_injected(cell: str) -> bool:
    """Whether papermill wrote this cell: its heading, then assignments without types."""
    lines = cell.splitlines()
    return bool(lines) and lines[0].strip() == _INJECTED and all(isinstance(s, ast.Assign) for s in _statements(cell))


def _assigned(cell: str) -> dict[str, Any]:
    """Name -> value of the plain assignments in an injected cell."""
    return {
        statement.targets[0].id: _literal(statement.value)
        for statement in _statements(cell)
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name)
    }


def _fits(annotation: ast.expr, value: Any, name: str) -> bool:
    """Whether `value` is of the type that `annotation` writes."""
    match annotation:
        case ast.Constant(value=None):
            return value is None
        case ast.Constant(value=str() as text):  # a type in quotes
            return _fits(ast.parse(text, mode="eval").body, value, name)
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _fits(left, value, name) or _fits(right, value, name)
        case ast.Attribute(attr=attr):  # typing.Any, pathlib.Path
            return _fits(ast.Name(attr), value, name)
        case ast.Name(id=kind):
            return _fits_kind(_ALIASES.get(kind, kind), value, name)
        case ast.Subscript(value=ast.Name(id=kind) | ast.Attribute(attr=kind), slice=inner):
            parts = inner.elts if isinstance(inner, ast.Tuple) else [inner]
            return _fits_generic(_ALIASES.get(kind, kind), parts, value, name)
    raise _uncheckable(ast.unparse(annotation), name)


def _fits_kind(kind: str, value: Any, name: str) -> bool:
    if kind in ("Any", "object"):
        return True
    if kind == "bool":
        return isinstance(value, bool)
    if kind == "int":
        return isinstance(value, int) and not isinstance(value, bool)
    if kind == "float":
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind == "str":
        return isinstance(value, str)
    if kind in _CONTAINERS:
        return isinstance(value, _CONTAINERS[kind])
    raise _uncheckable(kind, name)


def _fits_generic(kind: str, parts: list[ast.expr], value: Any, name: str) -> bool:
    if kind == "Optional":
        return value is None or _fits(parts[0], value, name)
    if kind == "Union":
        return any(_fits(part, value, name) for part in parts)
    if kind == "Literal":
        return any(value == choice and type(value) is type(choice) for choice in map(ast.literal_eval, parts))
    if not _fits_kind(kind, value, name):
        return False
    if kind == "dict":
        return all(_fits(parts[0], k, name) and _fits(parts[1], v, name) for k, v in value.items())
    if kind == "tuple" and not (len(parts) == 2 and ast.unparse(parts[1]) == "..."):
        return len(value) == len(parts) and all(_fits(part, v, name) for part, v in zip(parts, value, strict=True))
    return all(_fits(parts[0], item, name) for item in value)


def _uncheckable(kind: str, name: str) -> ParameterError:
    return ParameterError(
        f"parameter {name!r} is declared as {kind!r}, which cannot be checked: "
        "use bool, int, float, str, list, tuple, dict, Literal, Any, or these joined by |"
    )
