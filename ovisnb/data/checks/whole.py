"""What only the whole set shows: ids and records twice, answers unlike their fellows, pictures in two splits.

    ledger = Ledger()
    ledger.add(1, "cat", digest, (False, True)); ledger.add(2, "Cat ", other, (False, False))
    list(ledger.faults())    # near_duplicate_id of line 2, missing_answer_tag of line 2

Of each record three numbers of 8 bytes stay in memory; its id and line wait in a file, which is read
again only if something was found twice.
"""

from __future__ import annotations

import json
import re
import tempfile
import unicodedata
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from ovisnb.data.checks.faults import OfTwo
from ovisnb.data.checks.pictures import number_of

_IN_MEMORY = 1 << 22  # bytes of ids; more go to a temporary file
_ZEROS = re.compile(r"(?<![\d.])0+(?=\d)")  # not those of "0.01"
_SPACE = re.compile(r"\s+")


def near(name: str) -> str:
    """What two ids have in common that differ only in case, spaces or zero padding."""
    return _ZEROS.sub("", _SPACE.sub("", unicodedata.normalize("NFKC", name)).casefold())


def digest(entry: Mapping[str, Any]) -> int:
    """A number for everything in an entry but its id and split.

    Raises ValueError if it holds what JSON has not (NaN, say), as UnicodeEncodeError for half a character.
    """
    rest = {key: value for key, value in entry.items() if key not in ("id", "split")}
    text = json.dumps(rest, sort_keys=True, allow_nan=False, ensure_ascii=False, default=_number_of_bytes)
    return number_of(text.encode("utf-8"))


class Ledger:
    """Remembers every record by three numbers, and says at the end which are twice."""

    def __init__(self) -> None:
        self._names, self._near, self._records = array("Q"), array("Q"), array("Q")
        self._answers: Counter[tuple[bool, bool]] = Counter()
        self._spool = tempfile.SpooledTemporaryFile(_IN_MEMORY, "w+b")  # noqa: SIM115 - it lives as long as this

    def add(self, line: int, name: str, record: int, answer: tuple[bool, bool] | None) -> None:
        """A record: its line, id, `digest`, and of its last answer (whether it reasons, whether it has `<answer>`)."""
        self._names.append(number_of(name))
        self._near.append(number_of(near(name)))
        self._records.append(record)
        if answer is not None:
            self._answers[answer] += 1
        self._spool.write(json.dumps([line, name, record, answer]).encode("ascii") + b"\n")

    def faults(self) -> Iterator[tuple[str, str, int, str | OfTwo]]:
        """(kind, id, line, message), in the order of the records."""
        close, records = _twice(self._near), _twice(self._records)
        lacking = self._lacking()
        if not (close or records or lacking):
            return
        first_close: dict[int, dict[str, int]] = {}  # of the ids that are twice: each spelling's first line
        first_record: dict[int, tuple[str, int]] = {}
        self._spool.seek(0)
        for row in self._spool:
            line, name, record, answer = json.loads(row)
            key = number_of(near(name))
            if key in close:
                spellings = first_close.setdefault(key, {})
                if name in spellings:
                    said = OfTwo("line ", spellings[name], " has this id too: give each its own")
                    yield "duplicate_id", name, line, said
                elif spellings:
                    other, at = next(iter(spellings.items()))
                    differs = " differs only in case, spaces or zero padding: rename one of them"
                    yield "near_duplicate_id", name, line, OfTwo(f"the id {other!r} of line ", at, differs)
                if name not in spellings and len(spellings) < 100:
                    spellings[name] = line
            if record in records:
                if record in first_record:
                    other, at = first_record[record]
                    said = OfTwo(f"the same as record {other!r} of line ", at, ": drop one of them")
                    yield "duplicate_record", name, line, said
                else:
                    first_record[record] = (name, line)
            if answer is not None and not answer[1] and answer[0] in lacking:
                yield "missing_answer_tag", name, line, f"the last answer has no <answer>, and {lacking[answer[0]]}"

    def _lacking(self) -> dict[bool, str]:
        """Whether answers reason -> why those without `<answer>` should have it.

        Like is compared with like, because many sets hold plain answers beside reasoned ones: an answer
        lacks it if others that reason as it does have it, or if at least two thirds of all have it.
        """
        with_tag = {reasons: self._answers[reasons, True] for reasons in (False, True)}
        total, tagged = self._answers.total(), sum(with_tag.values())
        found = {}
        for reasons in (False, True):
            if with_tag[reasons] == 1:
                like = "that thinks or calls tools" if reasons else "without thinking"
                found[reasons] = f"1 other answer {like} has one"
            elif with_tag[reasons]:
                like = "that think or call tools" if reasons else "without thinking"
                found[reasons] = f"{with_tag[reasons]:,} other answers {like} have one"
            elif tagged and tagged * 3 >= total * 2:
                found[reasons] = f"{tagged:,} of the {total:,} answers have one"
        return {reasons: said for reasons, said in found.items() if self._answers[reasons, False]}


class Others:
    """Pictures and records of other splits, 12 bytes each: numbers, and the line of each."""

    def __init__(self, items: Iterable[tuple[int, int]]):
        numbers, lines = array("Q"), array("I")
        for number, line in items:
            numbers.append(number)
            lines.append(line)
        order = np.argsort(np.frombuffer(numbers, "u8"), kind="stable") if numbers else np.empty(0, "i8")
        self._numbers = np.frombuffer(numbers, "u8")[order] if numbers else np.empty(0, "u8")
        self._lines = np.frombuffer(lines, "u4")[order] if numbers else np.empty(0, "u4")

    def line(self, number: int | None) -> int | None:
        """The line that holds this number first, or None."""
        if number is None or not len(self._numbers):
            return None
        at = int(np.searchsorted(self._numbers, np.uint64(number)))
        found = at < len(self._numbers) and int(self._numbers[at]) == number
        return int(self._lines[at]) if found else None


def _twice(numbers: array) -> set[int]:
    """The numbers that are there more than once."""
    if not numbers:
        return set()
    ordered = np.sort(np.frombuffer(numbers, "u8"))
    return set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())


def _number_of_bytes(value: Any) -> Any:
    if isinstance(value, (bytes, bytearray, memoryview)):
        return number_of(bytes(value))
    raise ValueError(f"holds {type(value).__name__}")
