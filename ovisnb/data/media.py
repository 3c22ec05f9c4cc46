"""References -> pictures, safely.

    picture = open_image(Media(path="cat.jpg", box=(10, 20, 90, 80)), "photos")
    image_size(Media(path="cat.jpg"), "photos")  # (640, 480), from the header alone

Pictures come from data that others wrote: a path may not leave the image folder, only formats that
Pillow decodes by itself are opened, a header that announces too many pixels is believed and refused,
and whatever goes wrong is one sentence. Of an animated picture the first frame is taken.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from ovisnb.data import boxes
from ovisnb.data.record import Media, Record, RecordError

# Not every format Pillow knows: EPS, for one, would start Ghostscript on a stranger's program.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
# The longest side that a JPEG can have. Longer ones are strips that no model sees anything on.
LONGEST_SIDE = 65_535
_ORIENTATION = 0x0112  # the EXIF tag
# EXIF orientation -> what turns the stored picture into the one a person sees; 1 is upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ON_ITS_SIDE = (5, 6, 7, 8)


class MediaError(RecordError):
    """A picture or video is missing, out of bounds or cannot be read: one sentence, and its `kind`."""

    def __init__(self, message: str, *, kind: str = "unreadable_picture", **where: str | None) -> None:
        super().__init__(message, kind=kind, **where)


@dataclass(frozen=True)
class ImageFolder(os.PathLike):
    """The folder of the pictures, and whether absolute paths are taken from anywhere.

    Goes wherever an `image_folder` goes. Without `allow_absolute` no path leaves the folder; with it an
    absolute path is taken as it is, while a relative one still may not leave, not even through a link.
    """

    path: str | os.PathLike[str]
    allow_absolute: bool = False

    def __fspath__(self) -> str:
        return os.fspath(self.path)

    def __str__(self) -> str:
        return os.fspath(self.path)


Folder = str | os.PathLike[str] | None


def folder_of(record: Record, image_folder: Folder = None) -> Folder:
    """The image folder of a record: its own where it has one, else `image_folder`."""
    return folder_or(record.folder, image_folder)


def folder_or(own: str | None, image_folder: Folder) -> Folder:
    """A data set's own folder if there is one, else `image_folder`; absolute paths are taken if the latter takes them."""
    return image_folder if own is None else ImageFolder(own, getattr(image_folder, "allow_absolute", False))


def open_image(media: Media, image_folder: Folder = None, *, at_least: int | None = None) -> Image.Image:
    """The picture behind `media`, as a PIL image in RGB.

    EXIF orientation is applied first; `media.box` then counts the picture as it is seen, and the part of
    it inside the picture is cut out, grown to whole pixels. A relative path starts in `image_folder` (or
    the current folder); with an `image_folder`, no path may lead out of it, be it absolute (unless it is
    an `ImageFolder` that allows those), through `..` or through a link. Transparency is dropped; 16-bit
    grey is scaled to 8 bit; of an animated picture the first frame is taken. Raises MediaError.

    `at_least`, for thumbnails: a whole JPEG may come smaller, its sides no shorter than so many pixels unless
    they are, which decodes a large one several times as fast.
    """
    return _crop(_open_whole(media, image_folder, None if media.box else at_least), media)


def image_size(media: Media, image_folder: Folder = None) -> tuple[int, int]:
    """(width, height) in pixels of what `open_image` gives for the same arguments, from the header alone.

    No pixel is decoded (but for a PIL image that its owner has not loaded yet). Refuses what `open_image` refuses,
    with the same sentences, except for damage behind the header.
    """
    with _header(media, image_folder) as (image, name):
        _check_mode(image, name)
        size = _seen_size(image, decoded=media.image is not None)
    bounds = _bounds(media, size)
    return size if bounds is None else (bounds[2] - bounds[0], bounds[3] - bounds[1])


def open_media(
    record: Record, image_folder: Folder = None, min_frames: int | None = None, max_frames: int | None = None
) -> tuple[list[Image.Image], list[Image.Image] | None]:
    """(images, frames of the video or None) of a record, as `open_image` and `video.open_frames` open them.

    A picture that several are cut from is read once. Raises MediaError, naming the record.
    """
    images, whole = [], {}
    image_folder = folder_of(record, image_folder)
    for number, media in enumerate(record.images, start=1):
        with naming(record, f"image {number}"):
            if media.origin not in whole:
                whole[media.origin] = _open_whole(media, image_folder)
            images.append(_crop(whole[media.origin], media))
    if record.video is None:
        return images, None
    from ovisnb.data.video import open_frames  # which needs this module; and most records have none

    with naming(record):
        return images, open_frames(record.video, image_folder, min_frames, max_frames)


@dataclass(frozen=True)
class ImageFacts:
    """What a picture is, or as much of that as is legible: None where it is not."""

    size: tuple[int, int] | None = None
    """(width, height) in pixels of the whole picture as it is seen, whatever `Media.box` says."""
    format: str | None = None
    """One of FORMATS, told by the bytes and not by the name; None for a PIL image made in memory."""
    frames: int | None = None
    """More than 1: animated, or of several pages, of which the first is taken."""
    orientation: int | None = None
    """As in EXIF, 1 to 8; 1 is upright, and also said of EXIF that nobody can read."""
    digest: str | None = None
    """SHA-256 of the file (of the pixels of a PIL image), the same for the same picture under two names."""
    problem: str | None = None
    """The sentence with which `open_image` refuses it; None if it opens."""
    kind: str | None = None
    """The kind of that error, as `MediaError.kind` has it."""


def inspect_image(media: Media, image_folder: Folder = None) -> ImageFacts:
    """The facts about a picture, which is decoded in full: what is cut off or broken shows up. Never raises MediaError."""
    facts: dict = {}
    try:
        with _header(media, image_folder) as (image, name):
            facts["digest"] = _digest(media, image_folder)
            several = image.format != "MPO"  # what else a phone puts into a JPEG is no animation
            facts["format"] = image.format if several else "JPEG"
            facts["orientation"] = _orientation(image)
            facts["size"] = _seen_size(image, decoded=media.image is not None)
            _check_mode(image, name)
            _seen(image)
            facts["frames"] = getattr(image, "n_frames", 1) if several else 1
        _bounds(media, facts["size"])
    except MediaError as error:
        facts |= {"problem": str(error), "kind": error.kind}
    return ImageFacts(**facts)


def _digest(media: Media, image_folder: Folder) -> str:
    if media.path is not None:
        with find_file(media.path, image_folder).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if media.data is not None:
        return hashlib.sha256(media.data).hexdigest()
    return hashlib.sha256(f"{media.image.mode} {media.image.size} ".encode() + media.image.tobytes()).hexdigest()


@contextmanager
def naming(record: Record, place: str = "") -> Iterator[None]:
    """Put the record and `place` ("image 2") before a MediaError raised inside the with block."""
    try:
        yield
    except MediaError as error:
        said = f"{place}: {error}" if place else str(error)
        raise MediaError(said, kind=error.kind, record_id=record.id, source=record.source) from None


def find_file(path: str, image_folder: Folder = None, kind: str = "picture") -> Path:
    """Where the path of a picture, or another `kind` of file, leads: an existing ordinary file.

    It lies inside `image_folder`, if one is given, or is absolute where that folder allows it. Raises MediaError.
    """
    _check_spelling(path, image_folder)
    try:
        as_it_is = image_folder is None or (os.path.isabs(path) and getattr(image_folder, "allow_absolute", False))
        target = Path(path) if as_it_is else _inside(path, image_folder)
        if target.is_file():  # no device, no pipe: those could block for ever
            return target
        exists = target.exists()
    except MediaError:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # name too long, a null byte, a loop of links
        said = f"the path {shown(repr(path))} cannot be followed ({reason(error)}): correct it"
        raise MediaError(said, kind="unreadable_picture") from None
    if exists:
        raise MediaError(f"{shown(target)} is not a file: give the path of a {kind}", kind="unreadable_picture")
    advice = "pass the image_folder it lies in" if image_folder is None else "correct the path or the image_folder"
    if target.is_symlink():
        said = f"{shown(target)} is a link that leads nowhere: correct the link or the path"
    else:
        said = f"there is no {kind} at {shown(target)}: {advice}"
    raise MediaError(said, kind="missing_file")


def shown(text: object) -> str:
    """`text`, usually a path, fit for a sentence: on one line, not endless, nothing invisible in it."""
    text = str(text)
    if len(text) > 300:
        text = f"{text[:100]}...{text[-100:]}"
    return text if text.isprintable() else ascii(text)


def reason(error: BaseException) -> str:
    """What an exception of somebody else's says, fit for the brackets of a sentence."""
    said = getattr(error, "strerror", None) or str(error)  # str() of an OSError repeats the path
    return shown(" ".join(said.split())) or type(error).__name__


def _check_spelling(path: str, image_folder: Folder) -> None:
    """Refuse what other programs would take for a path elsewhere; here none of it would be found anyway."""
    problem = None
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", path):
        problem = "is a URL, and nothing is downloaded here: give the path of a file"
    elif re.match(r"~([^/\\]*[/\\]|$)", path):
        problem = "starts with ~, which is not expanded here: write the folder out"
    elif image_folder is not None and os.name != "nt" and ("\\" in path or re.match(r"[A-Za-z]:", path)):
        problem = "is written as on Windows: write it relative to the image_folder, with / between folders"
    if problem:
        raise MediaError(f"the path {shown(repr(path))} {problem}", kind="path_outside")


def _inside(path: str, image_folder: str | os.PathLike[str]) -> Path:
    folder = Path(image_folder).resolve()
    if not folder.is_dir():
        said = f"the image_folder {image_folder} is not a folder: give the folder of the pictures"
        raise MediaError(said, kind="path_outside")
    target = (folder / path).resolve()
    if not target.is_relative_to(folder):
        absolute = " or allow absolute paths" if os.path.isabs(path) else ""
        raise MediaError(
            f"the path {shown(repr(path))} leads out of the image_folder {image_folder}: "
            f"pass the image_folder that holds all pictures{absolute}",
            kind="path_outside",
        )
    return target


@contextmanager
def _header(media: Media, image_folder: Folder) -> Iterator[tuple[Image.Image, str]]:
    """The picture, not yet decoded, and its name; whatever goes wrong in the with block becomes a MediaError."""
    name, path = "the PIL image" if media.image is not None else "the picture in the data", None
    legible = False  # the header; what goes wrong after it is damage behind it, as is all of a WebP that is cut off
    if media.path is not None:
        path = find_file(media.path, image_folder)
        name = shown(path)
    try:
        if media.image is not None:
            _check_size(media.image.size, name)
            media.image.load()
            yield media.image, name
            return
        # Never by name: Pillow would map some files into memory, and garbles a TIFF on its side when it does.
        with io.BytesIO(media.data) if path is None else path.open("rb") as file:
            if not (start := file.read(12)):
                raise MediaError(f"{name} is empty (0 bytes): replace the file")
            legible = start[8:] == b"WEBP" and int.from_bytes(start[4:8], "little") + 8 > file.seek(0, os.SEEK_END)
            file.seek(0)
            with Image.open(file, formats=FORMATS) as image:
                _check_size(image.size, name)
                legible = True
                yield image, name
    except MediaError:
        raise
    except UnidentifiedImageError:
        raise MediaError(f"{name} is no picture in a format read here ({', '.join(FORMATS)}): convert it") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        said = f"{name} is too large to open safely ({reason(error)}): scale it down"
        raise MediaError(said, kind="huge_picture") from None
    except Exception as error:  # decoders of broken files raise nearly anything: OSError, SyntaxError, struct.error
        said = f"{name} cannot be read as a picture ({reason(error)}): replace the file"
        raise MediaError(said, kind="truncated_picture" if legible else "unreadable_picture") from error


def _check_size(size: tuple[int, int], name: str) -> None:
    """Before anything is decoded: Pillow itself only warns up to twice its limit."""
    width, height = size
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise MediaError(
            f"{name} is too large to open safely ({width}x{height} pixels, more than {limit:,}): scale it down",
            kind="huge_picture",
        )
    if max(size) > LONGEST_SIDE:
        said = f"{name} is too long ({width}x{height} pixels, a side above {LONGEST_SIDE:,}): cut it up"
        raise MediaError(said, kind="huge_picture")


def _check_mode(image: Image.Image, name: str) -> None:
    if image.mode == "F" or (image.mode == "I" and image.format != "PPM"):  # a PPM's I is 16 bits
        raise MediaError(
            f"{name} has 32-bit pixels (mode {image.mode}) of unknown range: save it with 8 bits a channel"
        )


def _open_whole(media: Media, image_folder: Folder, at_least: int | None = None) -> Image.Image:
    with _header(media, image_folder) as (image, name):
        _check_mode(image, name)
        if at_least and media.image is None:
            image.draft(None, (at_least, at_least))  # does nothing to other formats
        image.load()
        return _seen(image)


def _seen(image: Image.Image) -> Image.Image:
    """A decoded picture in RGB, the way up that a person sees it."""
    turn = _TURNS.get(_orientation(image))
    if image.mode.startswith("I"):
        # convert("L") alone would clip everything above 255 to white.
        image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # going straight to RGB is the same, with a warning for each picture
    image = image.convert("RGB")
    if turn is not None:
        image = image.transpose(turn)
    image.info = {}  # an orientation in there would turn it once more
    return image


def _seen_size(image: Image.Image, decoded: bool) -> tuple[int, int]:
    """The size of `_seen(image)`."""
    width, height = image.size
    if image.format == "TIFF" and not decoded:  # its size is already turned, though only by one of two tags
        width, height = image.tag_v2[256], image.tag_v2[257]
    return (height, width) if _orientation(image) in _ON_ITS_SIDE else (width, height)


def _orientation(image: Image.Image) -> int:
    """1 to 8 as in EXIF; 1, upright, where nothing legible is said."""
    try:
        late = image.format == "PNG" and image.fp is not None and "exif" not in image.info
        turn = (_exif_of_png(image.fp) if late else image.getexif()).get(_ORIENTATION, 1)
        return turn if turn in _TURNS else 1
    except (OSError, SyntaxError, ValueError, TypeError, LookupError, struct.error):
        return 1  # broken EXIF: viewers show such a picture as it is stored


def _exif_of_png(file: io.BufferedIOBase) -> Image.Exif:
    """EXIF may stand behind the pixels of a PNG: read the other chunks only, in a picture of one pixel."""
    place, size = file.tell(), file.seek(0, os.SEEK_END)
    at, extra, (start, end) = 8, b"", _small_png()
    while at + 12 <= size:
        file.seek(at)
        head = file.read(8)
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        if kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt") and length < 1 << 20:
            extra += head + file.read(length + 4)
        at += length + 12
    file.seek(place)
    with Image.open(io.BytesIO(start + extra + end), formats=("PNG",)) as image:
        return Image.Image.getexif(image)  # that of a PNG would decode it, to read what may follow


@cache
def _small_png() -> tuple[bytes, bytes]:
    """A PNG of one pixel: what may stand before other chunks (signature and IHDR), and the rest (IDAT and IEND)."""
    file = io.BytesIO()
    Image.new("1", (1, 1)).save(file, "PNG")
    return file.getvalue()[:33], file.getvalue()[33:]


def _bounds(media: Media, size: tuple[int, int]) -> tuple[int, int, int, int] | None:
    """Whole pixels of the picture of `size` that `media` is; None for all of it."""
    if media.box is None:
        return None
    try:
        return boxes.crop_bounds(boxes.convert(media.box, media.coordinates, "pixels", size), size)
    except ValueError as error:
        name = "the PIL image" if media.path is None else shown(media.path)
        counted = "in pixels of the original" if media.coordinates == "pixels" else f"({media.coordinates})"
        raise MediaError(f"{name}: {error}: give x1, y1, x2, y2 {counted}", kind="box_outside") from None


def _crop(image: Image.Image, media: Media) -> Image.Image:
    bounds = _bounds(media, image.size)
    return image if bounds is None else image.crop(bounds)
