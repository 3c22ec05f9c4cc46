"""The outside of a video file: which format it is, and whether all of it is there, before FFmpeg reads it.

    with open("clip.mp4", "rb") as file:
        containers.check(file, size, "clip.mp4")  # "mov", FFmpeg's name for MP4 and MOV

FFmpeg guesses formats, and some of those it knows open other files; it decodes what is left of a file that
was cut off; and it believes tables that a stranger wrote. What is checked here does not reach it.
"""

from __future__ import annotations

import re
from typing import BinaryIO

from ovisnb.data.media import MediaError

LARGEST_TABLES = 2**28  # bytes of a box of an MP4 that holds neither pictures nor sound
_MP4_BOXES = tuple(b"ftyp styp moov moof mdat free skip wide sidx mfra pnot uuid".split())

# Wherever a table of frames may stand, its count; behind a length of 1 follows the real length, in 8 bytes.
_COUNTS = re.compile(
    rb"(?=(?<=\0\0\0\x01)(?:st(?:sz|z2).{16}|trun.{12})(.{4}))"
    rb"|(?=(?<!\0\0\0\x01)(?:st(?:sz|z2).{8}|trun.{4})(.{4}))",
    re.DOTALL,
)


def check(file: BinaryIO, size: int, name: str) -> str:
    """FFmpeg's name of the file's format, told by its first bytes; MediaError if that is none of ours or cut off.

    FFmpeg would decode what is left of a file, and a model would be trained on half of a video.
    """
    if not size:
        raise MediaError(f"{name} is empty (0 bytes): replace the file")
    start = file.read(64)
    if start[4:8] in _MP4_BOXES:
        form, end = "mov", _check_mp4(file, size, name)
    elif start[:4] == b"RIFF" and start[8:12] == b"AVI ":
        form, end = "avi", int.from_bytes(start[4:8], "little") + 8
    elif start[:4] == b"\x1aE\xdf\xa3":
        form, end = "matroska", _end_of_matroska(start)
    else:
        raise MediaError(f"{name} is no video in a format read here (MP4, MOV, MKV, WebM, AVI): convert it")
    if end > size:
        raise MediaError(f"{name} is cut off ({size:,} of {end:,} bytes are there): replace the file")
    return form


def _check_mp4(file: BinaryIO, size: int, name: str) -> int:
    """Where the last box says that it ends. MediaError for tables that make FFmpeg list frames that cannot be there.

    A table of some bytes can announce billions of frames of one size, and FFmpeg would note down each of them.
    """
    at = end = claimed = 0
    while at + 8 <= size:
        file.seek(at)
        head = file.read(16)
        length, kind = int.from_bytes(head[:4], "big"), head[4:8]
        if length == 1:
            length = int.from_bytes(head[8:], "big")
        elif length == 0:  # up to the end
            length = size - at
        if length < 8:
            break
        if kind != b"mdat":  # everything else is read as tables, somewhere
            if min(length, size - at) > LARGEST_TABLES:
                raise MediaError(f"{name} has tables of {length:,} bytes: convert it")
            file.seek(at)
            tables = file.read(min(length, size - at))
            if b"cmov" in tables:
                raise MediaError(f"{name} has compressed tables: convert it")
            claimed += sum(int.from_bytes(match[1] or match[2], "big") for match in _COUNTS.finditer(tables))
        at += length
        if kind in _MP4_BOXES:  # anything else may be rubbish behind the last box
            end = at
    if claimed > size:
        raise MediaError(f"{name} claims {claimed:,} frames, more than it has bytes: replace the file")
    return end


def _end_of_matroska(start: bytes) -> int:
    """Where the one segment of the file says that it ends; 0 where it says nothing, as live recordings do."""
    place = start.find(b"\x18S\x80g") + 4
    if place < 4 or place == len(start):
        return 0
    length = 9 - start[place].bit_length()  # of the size, whose first bits say how long it is
    unknown = (1 << 7 * length) - 1
    size = int.from_bytes(start[place : place + length], "big") & unknown
    return 0 if size == unknown else place + length + size
