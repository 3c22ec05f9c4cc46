"""WebDataset shards: tar files whose members, grouped by name, are samples.

    cat/0001.jpg  cat/0001.json    {"conversations": [{"from": "human", "value": "<image>\\nWhat?"}, ...]}
    cat/0002.jpg  cat/0002.txt     A cat on a table.

    for sample in samples("shard-0000.tar"): row("shard-0000.tar", sample, 0)

The key of a sample is its members' name up to the first dot. Its `.json` is a row in any form that `read_records`
knows (a `.conversations.json` too, if it is the only one), its `.txt` a caption, and its pictures are those of the row,
which names them with or without the key: `cat/0003.left.jpg` or `left.jpg`. Several that it does not name must lie in the
order of their names (2.jpg before 10.jpg). Only headers are read to find samples; a picture is read when its record is,
or where a box needs its size.

Members of other kinds are passed over; a row about a video lists its frames in the tar, or a video file outside it.
Nothing is unpacked onto the disk, and nothing is ever unpickled.
"""

from __future__ import annotations

import functools
import json
import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ovisnb.data.formats import Options, Reader, Row, entries_of
from ovisnb.data.formats.grounding import PICTURE_KEYS, matches_refcoco
from ovisnb.data.formats.parts import first_of
from ovisnb.data.media import reason, shown
from ovisnb.data.record import VIDEO, VIDEO_SUFFIXES, RecordError

PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "jp2")
_TEXT = ("json", "txt")
_MEDIA = ("image", "video")
_NAMED = (*_MEDIA, "image_path", "images", "file_name")  # keys that say which pictures a row is about
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
    """By ending: "json", "txt", "meta.json"."""
    pictures: dict[str, Stored]
    """By the member's name without folders, in the order of the tar."""
    others: list[str]
    """The endings of other members, which are not read."""


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


def tar_entries(path: Path, reader: Reader | None, options: Options) -> Iterator[Row]:
    """The samples of a tar as `read_entries` gives rows, with the bytes of their pictures; a line is their number."""
    if samples(path) and not any(sample.text for sample in samples(path)):
        raise RecordError(f"{path} is a tar without .json or .txt members: unpack it, and give the data file in it")
    for number, sample in enumerate(samples(path), start=1):
        for found in entries_of([row(path, sample, number)], reader, options):
            try:
                entry = found.entry
                yield found._replace(entry=with_pictures(entry, sample.pictures) if isinstance(entry, dict) else entry)
            except RecordError as error:
                yield Row(number, None, error)


@functools.lru_cache(maxsize=4)
def _samples(path: Path, size: int, changed: int) -> tuple[Sample, ...]:
    found: dict[str, Sample] = {}
    for whole_name, stored in _members(path, size):
        folder, _, name = whole_name.rpartition("/")
        stem, _, ending = name.partition(".")
        if not stem:  # .DS_Store and the like
            continue
        key = f"{folder}/{stem}" if folder else stem
        sample = found.setdefault(key, Sample(key, {}, {}, []))
        kind = _kind(ending)
        if kind not in _TEXT and kind not in PICTURES:
            sample.others.append(ending)
            continue
        held, name = (sample.text, ending.lower()) if kind in _TEXT else (sample.pictures, name)
        if name in held:
            raise RecordError(f"{path} holds {shown(whole_name)} twice: give each sample a name of its own")
        held[name] = stored
    return tuple(found.values())


def _members(path: Path, size: int) -> Iterator[tuple[str, Stored]]:
    """Name and place of every ordinary file in a tar, up to its end, which must be there."""
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            last = -1
            while (member := tar.next()) is not None:
                if member.size < 0 or tar.offset <= last:  # a size below zero would lead back, for ever
                    raise tarfile.ReadError(f"the size of {member.name} is wrong")
                last, tar.members = tar.offset, []  # it would keep them all
                if not member.isreg() or member.issparse():
                    continue
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError(f"{member.name} is cut off")
                yield member.name, Stored(path, member.offset_data, member.size)
            _check_end(file, tar.offset)
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        raise RecordError(f"{path} is no tar file that can be read ({reason(error)}): replace the file") from None


def _check_end(file: BinaryIO, end: int) -> None:
    """ReadError unless a block of zeros ends the archive: `tarfile` takes whatever is no header for its end.

    Every writer leaves two such blocks (webdataset's own, `tar -A` too), and zeros up to a whole record. Behind those
    stands the second of two tars that `cat` joined, which would not be read.
    """
    file.seek(end)
    rest = file.read(tarfile.RECORDSIZE + 2 * tarfile.BLOCKSIZE)
    if len(rest) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"it is cut off at byte {end + len(rest):,}, before the end of the archive")
    if any(rest[: tarfile.BLOCKSIZE]):
        raise tarfile.ReadError(f"there is no header at byte {end:,}")
    if any(rest):
        raise tarfile.ReadError("something follows the end of the archive; `tar -A` joins tars, `cat` does not")


def _kind(ending: str) -> str:
    """ "json" of "meta.JSON"."""
    return ending.rpartition(".")[2].lower()


def _texts(sample: Sample) -> dict[str, str]:
    """What its `.json` and its `.txt` hold: the one that is called just that, else the only one."""
    texts = {}
    for kind in _TEXT:
        endings = [ending for ending in sample.text if _kind(ending) == kind]
        if not endings:
            continue
        if kind not in endings and len(endings) > 1:
            name = f"{sample.key.rpartition('/')[2]}.{kind}"
            raise RecordError(
                f"the sample has {_listed(endings)} but no .{kind}: name the one to be read {shown(name)}"
            )
        ending = kind if kind in endings else endings[0]
        stored = sample.text[ending]
        if stored.size > LARGEST_TEXT:
            raise RecordError(
                f"its .{shown(ending)} has {stored.size:,} bytes, which is no text for a picture: shorten it"
            )
        try:
            texts[kind] = stored.read().decode("utf-8-sig")
        except ValueError as error:
            raise _unreadable(error) from None
    if not texts:
        pickled = any(_kind(ending) in _PICKLED for ending in sample.others)
        advice = "; what is pickled is never loaded here: write JSON" if pickled else ": add one"
        has = _listed([*sample.others, *map(_ending, sample.pictures)])
        raise RecordError(f"the sample has {has} but no .json or .txt{advice}")
    return texts


def _entry(sample: Sample) -> Any:
    text = _texts(sample)
    try:
        entry = json.loads(text["json"]) if "json" in text else {}
    except (ValueError, RecursionError) as error:
        raise _unreadable(error) from None
    if not isinstance(entry, dict):
        return entry  # refused, in words, as a record
    films = [ending for ending in sample.others if f".{ending}".lower().endswith(VIDEO_SUFFIXES)]
    if films and (not sample.pictures or "video" in entry or VIDEO in text.get("json", "")):
        raise RecordError(
            f"its .{shown(films[0])} lies in the tar, where no video file is read: put the file into the image folder "
            "and its path into `video`, or its frames into the tar as pictures, listed in `video`"
        )
    conversation = not entry.keys().isdisjoint(("conversations", "messages", "QnA"))
    if "txt" in text and not conversation and entry.get("caption") is None:
        entry["caption"] = text["txt"].strip()
    if not conversation or "QnA" not in entry:
        entry.setdefault("id", sample.key)
    if not sample.pictures:
        return entry
    if not matches_refcoco(entry) and entry.keys().isdisjoint(_NAMED):
        names = _in_order(sample)
        entry["images" if "messages" in entry else "image"] = names[0] if len(names) == 1 else names
    if matches_refcoco(entry):  # its reader needs the picture's size
        key, path = first_of(entry, PICTURE_KEYS, "image")
        if isinstance(path, str) and (name := _meant([path], sample.pictures).get(path)):
            entry[key] = {"bytes": sample.pictures[name].read()}
    return entry


def _in_order(sample: Sample) -> list[str]:
    """The names of its pictures; RecordError where they lie in another order than their names say."""
    names = list(sample.pictures)
    by_name = sorted(names, key=lambda name: [part.zfill(20) for part in re.findall(r"\d+|\D+", name)])
    if names != by_name:
        said = f"its pictures lie in the order {shown(', '.join(names))}, which is not that of their names"
        raise RecordError(f"{said}: list them in its .json, under `image`")
    return names


def _unreadable(error: Exception) -> RecordError:
    return RecordError(f"its text cannot be read ({reason(error)}): repair it")


def _ending(name: str) -> str:
    """What follows the key: "left.jpg" of "b.left.jpg"."""
    return name.partition(".")[2]


def _listed(endings: Iterable[str]) -> str:
    return shown(", ".join(f".{ending}" for ending in endings))


def with_pictures(entry: dict, pictures: dict[str, Stored]) -> dict:
    """An entry in the record form with the bytes of a sample's pictures in place of their names.

    A picture or frame that is listed under another name is the one that is left over; where more than one is in
    question, a RecordError. Once none is left over, such a name is a path.
    """
    listed = {key: entry[key] if isinstance(entry[key], list) else [entry[key]] for key in _MEDIA if entry.get(key)}
    if not pictures or not listed:
        return entry
    entries = {key: [{"path": one} if isinstance(one, str) else one for one in media] for key, media in listed.items()}
    named = [
        media
        for media in chain(*entries.values())
        if isinstance(media, dict) and isinstance(media.get("path"), str)
        if not media["path"].lower().endswith(VIDEO_SUFFIXES)
    ]
    meant = _meant([media["path"] for media in named], pictures)
    data = {name: pictures[name].read() for name in set(meant.values())}
    for media in named:
        if media["path"] in meant:
            media |= {"path": None, "data": data[meant[media["path"]]]}
    return entry | entries


def _meant(paths: Iterable[str], pictures: dict[str, Stored]) -> dict[str, str]:
    """Which of a sample's pictures each path stands for, if any; RecordError where that would be a guess."""
    known = {_ending(name): name for name in pictures} | {name: name for name in pictures}
    meant = {path: known[name] for path in paths if (name := path.rpartition("/")[2]) in known}
    unknown = [path for path in dict.fromkeys(paths) if path not in meant]
    left = [name for name in pictures if name not in meant.values()]
    if len(left) == len(unknown) == 1:
        meant[unknown[0]] = left[0]
    elif left and unknown:
        said = f"which of {shown(', '.join(left))} is {shown(repr(unknown[0]))} cannot be told"
        raise RecordError(f"{said}: list pictures by their names in the tar")
    return meant
