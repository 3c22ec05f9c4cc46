"""Names of settings: aliases, the nearest name of a misspelt one, JSON files, flags, and the page of `--help`.

Everything here works on plain dicts; what a value may be is the business of `ovisnb.train.settings`.
"""

from __future__ import annotations

import difflib
import json
import textwrap
import types
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Union, get_args, get_origin

from pydantic.fields import FieldInfo

# Names of the earlier scripts, of Ovis' own training code and of other versions of transformers.
ALIASES = {
    "model_name": "model_path",
    "ovis_pretrained_path": "model_path",
    "sft_model_path": "model_path",
    "sft_checkpoint": "model_path",
    "train_data": "data_path",
    "val_data": "eval_data_path",
    "image_base_path": "image_folder",
    "sft_output_dir": "output_dir",
    "num_epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "monitor_step": "logging_steps",
    "evaluation_strategy": "eval_strategy",
    "activation_checkpointing": "gradient_checkpointing",
    "expected_world_size": "num_processes",
}

# One name for several settings, each of which may still be given by its own name.
SPREAD = {
    **{
        f"{side}_pixels": tuple(f"{kind}_{side}_pixels" for kind in ("single_image", "multiple_image", "video"))
        for side in ("min", "max")
    },
    "max_length": ("multimodal_max_length", "text_max_length"),
}

# Names of JSON files (or of dicts) of settings, read in this order; what stands beside them wins.
FILES = ("model_config", "data_config", "sft_config", "grpo_config")


HELP_WIDTH, HELP_INDENT = 116, 44


class SettingsError(ValueError):
    """A setting that is unknown, has a bad value, or contradicts another; the message is one sentence."""


def known(name: str, fields: Iterable[str]) -> str:
    """The canonical name of a setting; SettingsError naming the nearest for one that does not exist."""
    fields = list(fields)
    name = ALIASES.get(name, str(name))
    if name not in fields and name not in SPREAD and name not in FILES:
        near = nearest(name, [*fields, *ALIASES, *SPREAD, *FILES])
        hint = f"did you mean '{near}'?" if near else "`ovisnb train --help` lists the settings there are."
        raise SettingsError(f"Unknown setting '{name}': {hint}")
    return name


def nearest(name: str, names: Sequence[str]) -> str | None:
    """The one of `names` that `name` most likely stands for, or None if it resembles none."""
    name = name.lower().replace("-", "_")
    near = difflib.get_close_matches(name, names, n=5, cutoff=0.65)
    return min(near, key=lambda each: edits(name, each), default=None)


def edits(one: str, other: str) -> int:
    """How many letters are to be put in, left out, changed or swapped with their neighbour to get from one to other.

    Optimal string alignment, after Damerau 1964.
    """
    before, last = [], list(range(len(other) + 1))
    for i, letter in enumerate(one, 1):
        row = [i]
        for j, wanted in enumerate(other, 1):
            row.append(min(last[j] + 1, row[-1] + 1, last[j - 1] + (letter != wanted)))
            if i > 1 and j > 1 and letter == other[j - 2] and one[i - 2] == wanted:
                row[-1] = min(row[-1], before[j - 2] + 1)
        before, last = last, row
    return last[-1]


def renamed(values: Mapping[str, Any], fields: Iterable[str]) -> dict[str, Any]:
    """The same values under canonical names.

    Two names of one setting must agree; one of several settings (`max_pixels`) gives way to a setting's own name.
    Raises SettingsError.
    """
    if not isinstance(values, Mapping):
        raise SettingsError(f"Settings are an object of names and values, not a {type(values).__name__}.")
    fields = list(fields)
    result: dict[str, Any] = {}
    given_as: dict[str, str] = {}
    spread: dict[str, Any] = {}
    for key, value in values.items():
        name = known(key, fields)
        if name in SPREAD:
            spread |= dict.fromkeys(SPREAD[name], value)
            continue
        if name in result and result[name] != value:
            raise SettingsError(
                f"'{given_as[name]}' and '{key}' mean the same setting but differ: {result[name]!r} and {value!r}."
            )
        result[name], given_as[name] = value, key
    return spread | result


def with_files(values: dict[str, Any], fields: Iterable[str], flags: Iterable[str] = ()) -> dict[str, Any]:
    """`values` (of canonical names) over those of the files they name.

    grpo_config stays a setting of its own where both stages run: there it says what differs in the second one, where
    no flag says it for both. Raises SettingsError where two files give one setting different values.
    """
    own = {name: value for name, value in values.items() if name not in FILES}
    files = _read(values, list(fields))
    stage = next((each["stage"] for each in (own, *files.values()) if "stage" in each), "sft")
    merged: dict[str, Any] = {}
    given_in: dict[str, str] = {}
    for file, content in files.items():
        if (file, stage) == ("sft_config", "grpo") or (file == "grpo_config" and stage not in ("grpo", "both")):
            raise SettingsError(f"{file} has no effect on stage {stage!r}: remove it, or change stage.")
        if file == "grpo_config" and stage == "both":
            own[file] = {name: value for name, value in content.items() if name not in flags}
            continue
        for name, value in content.items():
            if name in merged and name not in own and merged[name] != value:
                raise SettingsError(
                    f"{given_in[name]} and {file} give '{name}' different values, {merged[name]!r} and {value!r}: "
                    "keep one."
                )
            merged[name], given_in[name] = value, file
    return merged | own


def _read(values: Mapping[str, Any], fields: list[str]) -> dict[str, dict[str, Any]]:
    """Canonical values of each file of settings that `values` names."""
    found = {}
    for file in FILES:
        given = values.get(file)
        if given is not None:
            content = read_json(given) if isinstance(given, (str, Path)) else given
            if isinstance(content, Mapping) and (inner := set(content) & set(FILES)):
                raise SettingsError(f"{file} names another file of settings, {min(inner)}: give it beside {file}.")
            found[file] = renamed(content, fields)
    return found


def read_json(path: str | Path) -> Any:
    """What a JSON file of settings holds; raises SettingsError."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=partial(_once, path))
    except FileNotFoundError:
        raise SettingsError(f"There is no settings file {path}.") from None
    except OSError as error:
        raise SettingsError(f"The settings file {path} cannot be read: {error.strerror}.") from None
    except json.JSONDecodeError as error:
        raise SettingsError(f"{path} is no valid JSON (line {error.lineno}: {error.msg}).") from None
    except UnicodeDecodeError:
        raise SettingsError(f"{path} is not UTF-8: save it as UTF-8.") from None
    except SettingsError:
        raise
    except (RecursionError, ValueError):  # a depth, and digits of a number, that Python's reader does not take
        raise SettingsError(
            f"{path} is no valid JSON of settings: its nesting or a number in it is too long."
        ) from None


def _once(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, in which no name has two values: JSON itself lets the last one pass."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if found.setdefault(name, value) != value:
            raise SettingsError(f"{path} gives '{name}' twice, {found[name]!r} and {value!r}: keep one.")
    return found


def parse_flags(words: Sequence[str], fields: Mapping[str, FieldInfo]) -> dict[str, Any]:
    """Values by name of `--name value`, `--name=value` and `--switch`; a list takes one word or several.

    Raises SettingsError for an unknown name, a missing value and one too many.
    """
    words, flags = list(words), {}
    while words:
        if not words[0].startswith("--"):
            raise SettingsError(f"'{words[0]}' is not a flag: settings are given as --name value.")
        flag, equals, value = words.pop(0).removeprefix("--").partition("=")
        flag = flag if flag in fields else flag.replace("-", "_")
        given = [value] if equals else []
        while words and not words[0].startswith("--"):
            given.append(words.pop(0))
        name = known(flag, fields)
        kinds = _kinds(fields[name].annotation) if name in fields else {str}
        if flag in flags:
            raise SettingsError(f"--{flag} is given twice.")
        if list in kinds and given:
            flags[flag] = given
        elif len(given) > 1:
            raise SettingsError(f"--{flag} takes one value, not {len(given)}: {' '.join(given)}.")
        elif not given and bool not in kinds:
            raise SettingsError(f"--{flag} needs a value.")
        elif not given:
            flags[flag] = True
        elif type(None) in kinds and given[0].lower() in ("none", "null"):
            flags[flag] = None
        elif dict in kinds and name not in FILES:
            flags[flag] = _json_word(flag, given[0])
        else:
            flags[flag] = given[0]
    return flags


def _json_word(flag: str, word: str) -> Any:
    try:
        return json.loads(word)
    except json.JSONDecodeError:
        raise SettingsError(f"--{flag} takes JSON, such as '{{\"num_cycles\": 2}}', not {word!r}.") from None


def _kinds(annotation: Any) -> set[Any]:
    """The plain types that an annotation allows: {bool}, {list}, {int, NoneType}, ..."""
    if get_origin(annotation) in (Union, types.UnionType):
        return set().union(*(_kinds(each) for each in get_args(annotation)))
    return {get_origin(annotation) or annotation}


def help_page(fields: Mapping[str, FieldInfo], groups: Mapping[str, str]) -> str:
    """Every setting with its default and meaning, under headings; `groups` is heading -> the first setting below."""
    heading = {first: title for title, first in groups.items()}
    lines = []
    for name, field in fields.items():
        if name in heading:
            lines += ["", f"{heading[name]}:"]
        default = field.get_default(call_default_factory=True)
        shown = "" if default is None or default == [] else f" ({json.dumps(default).strip(chr(34))})"
        lines += _entry(f"--{name}{shown}", field.description or "")
    lines += ["", "other names:"]
    for alias, names in ({alias: (name,) for alias, name in ALIASES.items()} | SPREAD).items():
        lines += _entry(f"--{alias}", ", ".join(names))
    lines += _entry(", ".join(f"--{file}" for file in FILES), "JSON files of settings; what stands beside them wins")
    return "\n".join(lines) + "\n"


def _entry(head: str, text: str) -> list[str]:
    """A name and its meaning beside it, or below it where the name is long."""
    lines = textwrap.wrap(text, HELP_WIDTH - HELP_INDENT) or [""]
    first = [] if len(head) < HELP_INDENT - 2 else [f"  {head}"]
    lines[0] = lines[0] if first else f"{'  ' + head:<{HELP_INDENT}}{lines[0]}".rstrip()
    return first + [line if line.startswith("  --") else " " * HELP_INDENT + line for line in lines if line]
