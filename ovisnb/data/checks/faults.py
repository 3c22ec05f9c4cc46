"""Faults: what can be wrong with a data set, and the report that lists it.

    report = validate("train.jsonl", "images")    # ovisnb.data.checks
    print(report.text())
    report.write_json("faults.json")

`KINDS` names every kind of fault and says in a sentence what it is. The names are stable: `--ignore`
and programs that read the JSON rely on them.
"""

from __future__ import annotations

import difflib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from ovisnb.data.files import written_rows

KINDS: dict[str, str] = {
    # the file
    "broken_json": "A row is not JSON, or not JSON that can be read.",
    "not_utf8": "Text is not UTF-8, or holds half a character.",
    "unknown_format": "A row is in no known format, or its format's reader cannot read it.",
    # the form of a record
    "wrong_form": "A record, turn or picture entry has not the form of one.",
    "unknown_key": "A key is not read: it looks like a slip for one that is, or says what would be lost.",
    "unknown_role": "A turn's role is none of system, human, gpt and ignored_gpt.",
    "placeholder_count": "The turns hold more or fewer <image> or <video> than the record lists pictures or videos.",
    "no_answer": "The conversation has no gpt turn, or an empty one: there is nothing to learn.",
    "missing_answer_tag": "An answer has no <answer>, though others of its like in the file have one.",
    # the text
    "control_token": "A turn's text holds a control token: it is encoded as plain text, never as a control token.",
    "unclosed_tag": "A tag (<think>, <answer>, <tool_call>, <box>, ...) is opened and not closed, or closed and not opened.",
    # boxes and points, in tags, tool calls and picture entries
    "unreadable_box": "A box, point or tool call cannot be read, or cannot be in its convention.",
    "inverted_box": "A box's corners are the wrong way round: x1 > x2 or y1 > y2.",
    "empty_box": "A box has no area.",
    "box_outside": "A box or point reaches out of its picture, or has none.",
    "changed_on_reading": "Reading the row changed something, such as a box that was clipped to its picture.",
    # pictures and videos
    "missing_file": "There is no file at a picture's or video's path.",
    "path_outside": "A path leads out of the image folder, is absolute, or is a URL.",
    "unreadable_picture": "A file is no picture that can be read: empty, a folder, another format, damaged at its start.",
    "truncated_picture": "A picture's header is sound but its pixels are cut off or damaged.",
    "huge_picture": "A picture has more pixels, or a longer side, than is opened safely.",
    "animated_picture": "A picture is animated: only its first frame is used.",
    "turned_picture": "A picture's EXIF orientation is not 1: it is turned as a person sees it, and boxes count it so.",
    "unreadable_video": "A video file cannot be read.",
    # the sample that becomes of a record
    "too_long": "A sample takes more tokens than the limit at these pixel settings: its end would be cut off.",
    "not_encodable": "A record is sound but cannot become a sample.",
    # the set as a whole
    "duplicate_id": "Two records have the same id.",
    "near_duplicate_id": "Two ids differ only in case, spaces or zero padding.",
    "duplicate_record": "Two records are the same but for their id.",
    "split_leak": "The same picture, or the same record, is in two splits.",
}
"""Every kind of fault, in the order of a report."""

SHOWN = 5  # faults of a kind that the text lists
_IN_MEMORY = 1 << 22  # bytes of faults; more go to a temporary file


class OfTwo(NamedTuple):
    """A sentence about two records of a file, which names the line of the other one between its words."""

    before: str
    line: int
    after: str

    def __str__(self) -> str:
        return f"{self.before}{self.line}{self.after}"


class Fault(NamedTuple):
    """One thing that is wrong."""

    kind: str
    """One of `KINDS`."""
    id: str | None
    """The record's id; None where there is no record."""
    line: int | None
    """Its line in `file`, from 1; a row's number in parquet; None for the file as a whole."""
    message: str
    """One sentence, without the place."""
    file: str
    of_two: OfTwo | None = None
    """`message` in its pieces, where it names the line of another record in `file`."""


class Report:
    """The faults of a file, by kind. Any number of them: beyond a few thousand they wait on disk.

    `counts` says how many of each kind there are, `records` and `rows` how many were checked,
    `faulty` how many of the rows have at least one of their own (not one that only the whole set shows).
    """

    def __init__(self, file: str, ignore: tuple[str, ...] = ()):
        self.file, self.ignore = file, check_kinds(ignore)
        self.counts: Counter[str] = Counter()
        self.rows = self.records = self.faulty = self.pictures = 0
        self.remarks: dict[str, tuple[str, int]] = {}  # how it begins -> the first sentence with its place, the count
        self._spool = tempfile.SpooledTemporaryFile(_IN_MEMORY, "w+b")  # noqa: SIM115 - it lives as long as the report

    def add(self, kind: str, id: str | None, line: int | None, message: str | OfTwo, file: str | None = None) -> bool:
        """Note a fault unless its kind is ignored; whether it was noted. `file` is by default that of the report."""
        if kind in self.ignore:
            return False
        self.counts[kind] += 1
        of_two = message if isinstance(message, OfTwo) else None
        row = [kind, id, line, str(message), None if file == self.file else file, of_two]
        self._spool.write(json.dumps(row).encode("ascii") + b"\n")
        return True

    def remark(self, id: str | None, line: int | None, said: str, file: str) -> None:
        """Count a sentence that is no fault; of those that begin alike the first is kept."""
        start = " ".join(said.split()[:3])
        first, count = self.remarks.get(start, (_place(Fault("", id, line, "", file), self.file) + said, 0))
        self.remarks[start] = first, count + 1

    @property
    def clean(self) -> bool:
        """Whether nothing is wrong."""
        return not self.counts

    def __len__(self) -> int:
        return self.counts.total()

    def __iter__(self) -> Iterator[Fault]:
        """All faults, in the order of `KINDS` and within a kind as they stand in the file."""
        for kind in KINDS:
            if self.counts[kind]:
                yield from self.of(kind)

    def of(self, kind: str) -> Iterator[Fault]:
        """The faults of one kind, as they stand in the file."""
        start, mark, at = f'["{kind}",'.encode(), self.counts[kind], 0
        while mark:
            self._spool.seek(at)  # another loop over the report may have moved it
            line = self._spool.readline()
            at = self._spool.tell()
            if line.startswith(start):
                mark -= 1
                *fault, file, of_two = json.loads(line)
                yield Fault(*fault, file or self.file, of_two and OfTwo(*of_two))

    def text(self, shown: int = SHOWN) -> str:
        """The report as a person reads it, `shown` faults of each kind; safe to print whatever the data holds."""
        blocks = [[self.headline()]]
        for line in self.listing(shown):
            blocks += [[]] if line[:1] != " " else []
            blocks[-1].append(line)
        remarks = [f"remark ({count:,}): {plain(said)}" for said, count in self.remarks.values()]
        blocks += [remarks] if remarks else []
        return "\n\n".join("\n".join(block) for block in blocks)

    def listing(self, shown: int = SHOWN, sentences: bool = True) -> list[str]:
        """The lines of `text` below its headline: each kind (with what it is), and its first faults, indented."""
        lines = []
        for kind, sentence in KINDS.items():
            if not self.counts[kind]:
                continue
            lines.append(f"{kind} ({self.counts[kind]:,}){f': {sentence}' if sentences else ''}")
            for number, fault in enumerate(self.of(kind)):
                if number == shown:
                    lines.append(f"  ... and {self.counts[kind] - shown:,} more")
                    break
                lines.append(f"  {_place(fault, self.file)}{plain(fault.message)}")
        return lines

    def headline(self) -> str:
        """ "train.json: 3 faults; 10 records and 12 pictures checked"."""
        records = f"{self.records:,} {'record' if self.records == 1 else 'records'}"
        if self.pictures:
            records += f" and {self.pictures:,} {'picture' if self.pictures == 1 else 'pictures'}"
        if self.clean:
            ignored = f" (not looked at: {', '.join(self.ignore)})" if self.ignore else ""
            return f"{plain(self.file)}: nothing wrong in {records}{ignored}"
        faults = f"{len(self):,} {'fault' if len(self) == 1 else 'faults'}"
        return f"{plain(self.file)}: {faults}; {records} checked"

    def write_json(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON list with one object a fault: kind, id, line, message, file. Whole or not at all."""
        with written_rows(path, lines=False) as write:
            for fault in self:
                write(json.dumps(dict(zip(Fault._fields[:5], fault))).encode("ascii"))


def check_kinds(kinds: tuple[str, ...] | list[str]) -> tuple[str, ...]:
    """`kinds` if all of them exist; ValueError naming the one that does not."""
    for kind in kinds:
        if kind not in KINDS:
            near = difflib.get_close_matches(kind, KINDS, 1)
            raise ValueError(f"there is no kind of fault {kind!r}{f': did you mean {near[0]!r}?' if near else ''}")
    return tuple(kinds)


def plain(text: str, limit: int = 400) -> str:
    """`text` fit for a terminal: one line, at most about `limit` characters, control and bidi characters spelt out."""
    if len(text) > limit:
        text = f"{text[: limit * 3 // 4]} ... {text[-limit // 8 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def _place(fault: Fault, file: str) -> str:
    """ "cat-3, line 7: ", or as much of it as is known."""
    parts = [] if fault.id is None else [plain(fault.id, 60)]
    if fault.line is not None:
        parts.append(f"line {fault.line}")
    if fault.file != file:
        parts.append(f"of {plain(fault.file)}")
    return f"{', '.join(parts)}: " if parts else ""
