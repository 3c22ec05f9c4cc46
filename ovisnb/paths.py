"""Where a path written in a notebook or a settings file is found.

A notebook runs with the repository as its working directory under papermill and
with ``notebooks/`` as its working directory in JupyterLab; the same relative path
means the same file in both.
"""

from __future__ import annotations

import re
from pathlib import Path

_PROJECT = re.compile(r'^name\s*=\s*"ovisnb"', re.MULTILINE)


def repository_root() -> Path | None:
    """The checkout around the working directory, else the one this package lies in; None outside any."""
    start = Path.cwd()
    for folder in (start, *start.parents, *Path(__file__).resolve().parents):
        project = folder / "pyproject.toml"
        if project.is_file() and _PROJECT.search(project.read_text(encoding="utf-8")):
            return folder
    return None


def resolve(path: str | Path) -> Path:
    """An absolute path for `path`: as it stands, under the working directory, or under the repository.

    What does not exist yet (an output folder) is placed under the repository root, or under the
    working directory where there is no repository.
    """
    path = Path(path).expanduser()
    if path.is_absolute():
        return path
    here = Path.cwd() / path
    root = repository_root()
    if here.exists() or root is None:
        return here
    return root / path


def resolve_model(path_or_id: str | Path) -> str:
    """A checkpoint folder's absolute path where `path_or_id` is one, else the text unchanged (a hub id)."""
    folder = resolve(path_or_id)
    return str(folder) if folder.is_dir() else str(path_or_id)
