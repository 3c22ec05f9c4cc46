"""The files of a checkpoint, in a folder or behind a hub id."""

from __future__ import annotations

import json
import os
from pathlib import Path

from transformers.utils.hub import cached_file


class CheckpointError(ValueError):
    """A path or hub id that is not a checkpoint that can be opened."""


def find_file(path_or_id, name: str) -> str | None:
    """Local path of a checkpoint's file, fetched from the hub for a hub id; None if it is not there."""
    if os.path.isdir(path_or_id):
        file = os.path.join(path_or_id, name)
        return file if os.path.isfile(file) else None
    try:
        return cached_file(str(path_or_id), name, _raise_exceptions_for_missing_entries=False)
    except OSError as error:
        raise CheckpointError(
            f"{path_or_id} is neither a folder nor a hub id that can be read ({first_line(error)})."
        ) from error


def read_json(path_or_id, name: str) -> dict:
    """A checkpoint's JSON file as a dict, empty if there is none."""
    file = find_file(path_or_id, name)
    if file is None:
        return {}
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} is not JSON ({first_line(error)}); copy the file again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds a {type(content).__name__}, not a JSON object; copy the file again.")
    return content


def first_line(error: Exception) -> str:
    """What an error of a library says, cut to one line."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".")[:200] if lines else type(error).__name__
