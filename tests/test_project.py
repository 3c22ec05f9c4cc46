"""The files that set the project up say the same thing."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import ovisnb

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DEFAULT = [Requirement(line) for line in PROJECT["dependencies"]]
DEV = [Requirement(line) for line in PROJECT["optional-dependencies"]["dev"]]


def pins() -> dict[str, str]:
    """name -> version of every line of constraints.txt; anything but `name==version` fails."""
    found = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            match = re.fullmatch(r"([A-Za-z0-9._-]+)==([0-9][A-Za-z0-9.]*)", line)
            assert match, f"constraints.txt: {line!r} is not NAME==VERSION"
            found[canonicalize_name(match[1])] = match[2]
    return found


@pytest.mark.parametrize("requirement", DEFAULT + DEV, ids=lambda requirement: requirement.name)
def test_every_requirement_is_pinned_within_its_range(requirement):
    version = pins()[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(version)


def test_torch_is_pinned_and_torchvision_is_nowhere():
    assert pins()["torch"] == "2.13.0"
    names = {canonicalize_name(r.name) for r in DEFAULT + DEV} | set(pins())
    assert not names & {"torchvision", "torchaudio", "timm", "open-clip-torch", "ovisnb"}


def test_the_gpu_extra_is_not_in_the_default_install():
    gpu = {Requirement(line).name for line in PROJECT["optional-dependencies"]["gpu"]}
    assert gpu == {"flash-attn"}
    assert not gpu & (set(pins()) | {requirement.name for requirement in DEFAULT})
    assert "deepspeed" in {requirement.name for requirement in DEFAULT}


def test_environment_yml_installs_what_make_setup_installs():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    *conda, pip = environment["dependencies"]
    assert [entry.split("=")[0] for entry in conda] == ["python", "pip"]
    python = conda[0].split("=")[1]
    assert SpecifierSet(PROJECT["requires-python"]).contains(python)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert f"pip install --quiet {' '.join(pip['pip'])}" in makefile.replace("'", "")


def test_the_command_is_installed_and_the_version_is_one():
    (command,) = [entry for entry in entry_points(group="console_scripts") if entry.name == "ovisnb"]
    assert command.value == PROJECT["scripts"]["ovisnb"] == "ovisnb.cli:main"
    assert PROJECT["dynamic"] == ["version"] and re.fullmatch(r"\d+\.\d+\.\d+", ovisnb.__version__)


def test_importing_the_package_imports_nothing_heavy():
    code = (
        "import sys, ovisnb, ovisnb.cli\n"
        "heavy = ['torch', 'transformers', 'numpy', 'matplotlib', 'pydantic', 'PIL', 'IPython', 'papermill']\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# room -> the rooms and libraries that its modules may import when they are imported
ROOMS = {
    "model": {"torch", "transformers"},
    "data": set(),
    "chat": {"torch", "data"},
    "generate": {"torch", "transformers", "model", "data", "chat"},
    "train": {"torch", "transformers", "model", "data", "chat"},
    "show": {"data", "chat", "generate"},
}
LATER = {
    ("data", "chat"),
    ("show", "paths"),
}  # what a function may import besides: to count tokens, to find shipped files


def imports_of(node: ast.AST, room: str, inside: bool = False):
    """(rooms, torch or transformers; whether only a function imports it) of every import."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            names = [alias.name for alias in child.names]
        elif isinstance(child, ast.ImportFrom):
            names = [child.module or "" if not child.level else f"ovisnb.{room}"]
        else:
            yield from imports_of(child, room, inside or isinstance(child, (ast.FunctionDef, ast.Lambda)))
            continue
        for name in names:
            first, _, rest = name.partition(".")
            found = rest.partition(".")[0] if first == "ovisnb" else first
            if first in ("ovisnb", "torch", "transformers") and found != room:
                yield found, inside


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_rooms_import_in_one_direction(room):
    for path in (ROOT / "ovisnb" / room).rglob("*.py"):
        for found, inside in imports_of(ast.parse(path.read_text(encoding="utf-8")), room):
            assert found in ROOMS[room] or (inside and (room, found) in LATER), f"{path} imports {found}"


def test_every_room_has_its_rule():
    rooms = {path.parent.name for path in (ROOT / "ovisnb").glob("*/__init__.py")}
    assert rooms == set(ROOMS)


def test_no_module_is_longer_than_a_newcomer_reads():
    files = [path for folder in ("ovisnb", "benchmarks", "tests") for path in (ROOT / folder).rglob("*.py")]
    long = {path.name: length for path in files if (length := len(path.read_text("utf-8").splitlines())) > 400}
    assert not long


@pytest.mark.parametrize("name", sorted(ovisnb._HOMES))
def test_every_public_name_is_listed_and_found(name):
    assert name in dir(ovisnb)
    assert callable(getattr(ovisnb, name))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        _ = ovisnb.lod


def test_every_file_that_is_not_python_is_in_the_package():
    """A wheel carries the .js and .json files beside the modules that read them."""
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    carried = {pattern.removeprefix("*") for pattern in config["package-data"]["*"]}
    present = {
        path.suffix for path in (ROOT / "ovisnb").rglob("*") if path.is_file() and "__pycache__" not in path.parts
    }
    assert present <= carried | {".py"}
    packages = {path.parent for path in (ROOT / "ovisnb").rglob("*.py")}
    assert all((package / "__init__.py").is_file() for package in packages)


def test_outputs_are_ignored_but_for_their_readme():
    git = ["git", "-c", "safe.directory=*"]  # also where the checkout belongs to somebody else

    def ignored(path: str) -> bool:
        return subprocess.run([*git, "check-ignore", "-q", path], cwd=ROOT, check=False).returncode == 0

    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    assert ignored("outputs/demo/01_data.ipynb") and ignored(".venv/bin/python")
    assert not ignored("outputs/README.md")
