"""WebDataset shards: tar files whose members, grouped by name, are samples.

    cat/0001.jpg  cat/0001.json    {"conversations": [{"from": "human", "value": "<image>\\nWhat?"}, ...]}
    cat/0002.jpg  cat/0002.txt     A cat on a table.

    for sample in samples("shard-0000.tar"): row("shard-0000.tar", sample, 0)

The key of a sample is its members' name up to the first dot. Its `.json` is a row in any form that
`read_records` knows, its `.txt` a caption, and its pictures are those of the row: under their own names where the row
names them so, else in order. Only headers are read to find samples; a picture is read when its record is.

Members of other kinds are passed over. Nothing is unpacked onto the disk, and nothing is ever unpickled.
"""

from __future__ import annotations

import functools
import json
import os
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

from ovisnb.data.formats.rows import Row
from ovisnb.data.media import reason, shown
from ovisnb.data.record import RecordError

PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "jp2")
_TEXT = ("json", "txt")
_PICKLED = ("pyd", "pkl", "pickle", "pt", "pth", "npy", "npz")
LARGEST_TEXT = 64 << 20
"""Bytes of a `.json` or `.txt` member; a larger one is no caption."""


class Stored(NamedTuple):
    """Where bytes lie in a file."""

    path: Path
    offset: int
    size: int

    def read(self) -> bytes:
        """The bytes; RecordError if the file ends before them."""
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            data = file.read(self.size)
        if len(data) < self.size:
            raise RecordError(f"{self.path} is cut off: replace the file")
        return data


class Sample(NamedTuple):
    """The members of one key."""

    key: str
    text: dict[str, Stored]
    """By "json" and "txt"."""
    pictures: dict[str, Stored]
    """By the member's name without folders, in the order of the tar."""
    others: list[str]
    """The endings of other members, which are not read."""


def is_tar(head: bytes) -> bool:
    """Whether the first 512 bytes of a file are those of a tar."""
    return len(head) == 512 and head[257:262] == b"ustar"


def samples(path: str | os.PathLike[str]) -> tuple[Sample, ...]:
    """The samples of a tar, in order; RecordError, one sentence, for a tar that is damaged.

    The last few tars are remembered, until they change.
    """
    path = Path(path)
    told = path.stat()
    return _samples(path, told.st_size, told.st_mtime_ns)


def row(path: Path, sample: Sample, number: int) -> Row:
    """The row of a sample, its pictures by name; its line is `number`. A sample without text is an error."""
    try:
        return Row(number, _entry(sample))
    except RecordError as error:
        return Row(number, None, error)


@functools.lru_cache(maxsize=4)
def _samples(path: Path, size: int, changed: int) -> tuple[Sample, ...]:
    found: dict[str, Sample] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            last = -1
            while (member := tar.next()) is not None:
                if member.size < 0 or tar.offset <= last:  # a size below zero would lead back, for ever
                    raise tarfile.ReadError(f"the size of {member.name} is wrong")
                last, tar.members = tar.offset, []  # it would keep them all
                if not member.isreg() or member.issparse():
                    continue
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError(f"{member.name} is cut off")
                folder, _, name = member.name.rpartition("/")
                stem, _, ending = name.partition(".")
                if not stem:  # .DS_Store and the like
                    continue
                key = f"{folder}/{stem}" if folder else stem
                sample = found.setdefault(key, Sample(key, {}, {}, []))
                stored, kind = Stored(path, member.offset_data, member.size), ending.rpartition(".")[2].lower()
                if ending.lower() in _TEXT:
                    sample.text[ending.lower()] = stored
                elif kind in PICTURES:
                    sample.pictures[name] = stored
                else:
                    sample.others.append(ending)
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        raise RecordError(f"{path} is no tar file that can be read ({reason(error)}): replace the file") from None
    return tuple(found.values())


def _entry(sample: Sample) -> Any:
    for kind, stored in sample.text.items():
        if stored.size > LARGEST_TEXT:
            raise RecordError(f"its .{kind} has {stored.size:,} bytes, which is no text for a picture: shorten it")
    if not sample.text:
        endings = [*sample.others, *(name.partition(".")[2] for name in sample.pictures)]
        has = shown(", ".join(f".{ending}" for ending in endings))
        pickled = any(ending.rpartition(".")[2].lower() in _PICKLED for ending in sample.others)
        advice = "; what is pickled is never loaded here: write JSON" if pickled else ": add one"
        raise RecordError(f"the sample has {has} but no .json or .txt{advice}")
    try:
        text = {kind: stored.read().decode("utf-8-sig") for kind, stored in sample.text.items()}
        entry = json.loads(text["json"]) if "json" in text else {}
    except (ValueError, RecursionError) as error:
        raise RecordError(f"its text cannot be read ({' '.join(str(error).split())}): repair it") from None
    if not isinstance(entry, dict):
        return entry  # refused, in words, as a record
    conversation = not entry.keys().isdisjoint(("conversations", "messages", "QnA"))
    if "txt" in text and not conversation:
        entry.setdefault("caption", text["txt"].strip())
    if not conversation or "QnA" not in entry:
        entry.setdefault("id", sample.key)
    if sample.pictures and entry.keys().isdisjoint(("image", "image_path", "images", "file_name", "video")):
        names = list(sample.pictures)
        entry["images" if "messages" in entry else "image"] = names[0] if len(names) == 1 else names
    return entry


def with_pictures(entry: dict, pictures: dict[str, Stored]) -> dict:
    """An entry in the record form with the bytes of a sample's pictures in place of their names.

    A name that is none of the sample's stands for the sample's next picture, if one is left; else it is a path.
    """
    listed = entry.get("image")
    if not pictures or not listed:
        return entry
    listed = listed if isinstance(listed, list) else [listed]
    entries = [{"path": media} if isinstance(media, str) else media for media in listed]
    given = [media for media in entries if isinstance(media, dict) and isinstance(media.get("path"), str)]
    paths = dict.fromkeys(media["path"] for media in given)
    named = {path: name for path in paths if (name := path.rpartition("/")[2]) in pictures}
    rest = (name for name in pictures if name not in set(named.values()))
    named |= zip([path for path in paths if path not in named], list(rest))
    data = {name: pictures[name].read() for name in set(named.values())}
    for media in given:
        if media["path"] in named:
            media |= {"path": None, "data": data[named[media["path"]]]}
    entry["image"] = entries
    return entry
