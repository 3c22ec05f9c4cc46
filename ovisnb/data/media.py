"""References -> pictures, safely.

Pictures come from data that others wrote: a path may not leave the image folder, only formats that
Pillow decodes by itself are opened, Pillow's limit against decompression bombs stays on, and
whatever goes wrong is one sentence.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from ovisnb.data import boxes
from ovisnb.data.record import Media, Record, RecordError

# Not every format Pillow knows: EPS, for one, would start Ghostscript on a stranger's program.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")


class MediaError(RecordError):
    """A picture is missing, out of bounds or cannot be read: one sentence."""


def open_image(media: Media, image_folder: str | os.PathLike[str] | None = None) -> Image.Image:
    """The picture behind `media`, as a PIL image in RGB.

    EXIF orientation is applied first; `media.box` then counts pixels of the picture as it is seen,
    and the part of it inside the picture is cut out, grown to whole pixels. A relative path starts
    in `image_folder` (or the current folder); with an `image_folder`, no path may lead out of it,
    be it absolute, through `..` or through a link. Transparency is dropped; 16-bit grey is scaled
    to 8 bit. Raises MediaError.
    """
    return _crop(_open_whole(media, image_folder), media)


def open_media(
    record: Record, image_folder: str | os.PathLike[str] | None = None
) -> tuple[list[Image.Image], list[Image.Image] | None]:
    """(images, frames of the video or None) of a record, as `open_image` opens them.

    A file that several pictures are cut from is read once. Raises MediaError, naming the record.
    """
    whole: dict[str, Image.Image] = {}

    def opened(media: Media, place: str) -> Image.Image:
        with naming(record, place):
            if media.path is None:
                return open_image(media)
            if media.path not in whole:
                whole[media.path] = _open_whole(media, image_folder)
            return _crop(whole[media.path], media)

    images = [opened(media, f"image {number}") for number, media in enumerate(record.images, start=1)]
    if record.video is None:
        return images, None
    return images, [opened(media, f"frame {number}") for number, media in enumerate(record.video, start=1)]


@contextmanager
def naming(record: Record, place: str) -> Iterator[None]:
    """Put the record and `place` ("image 2") before a MediaError raised inside the with block."""
    try:
        yield
    except MediaError as error:
        source = f" ({record.source})" if record.source else ""
        raise MediaError(f"record {record.id!r}{source}: {place}: {error}") from None


def find_file(path: str, image_folder: str | os.PathLike[str] | None = None) -> Path:
    """Where a picture's path leads: an existing ordinary file inside `image_folder`, if one is given."""
    try:
        if image_folder is None:
            target = Path(path)
        else:
            folder = Path(image_folder).resolve()
            if not folder.is_dir():
                raise MediaError(f"the image_folder {image_folder} is not a folder: give the folder of the pictures")
            target = (folder / path).resolve()
            if not target.is_relative_to(folder):
                raise MediaError(
                    f"the path {path!r} leads out of the image_folder {image_folder}: "
                    "pass the image_folder that holds all pictures"
                )
        if target.is_file():  # no device, no pipe: those could block for ever
            return target
        exists = target.exists()
    except (OSError, ValueError, RuntimeError) as error:  # name too long, a null byte, a loop of links
        if isinstance(error, MediaError):
            raise
        raise MediaError(f"the path {path!r} cannot be followed ({error}): correct it") from None
    if exists:
        raise MediaError(f"{target} is not a file: give the path of a picture")
    advice = "pass the image_folder it lies in" if image_folder is None else "correct the path or the image_folder"
    raise MediaError(f"there is no picture at {target}: {advice}")


def _open_whole(media: Media, image_folder: str | os.PathLike[str] | None) -> Image.Image:
    if media.image is not None:
        return _to_rgb(media.image, "the PIL image")
    path = find_file(media.path, image_folder)
    try:
        with Image.open(path, formats=FORMATS) as image:
            image.load()
            return _to_rgb(image, str(path))
    except MediaError:
        raise
    except UnidentifiedImageError:
        raise MediaError(f"{path} is no picture in a format read here ({', '.join(FORMATS)}): convert it") from None
    except Image.DecompressionBombError as error:
        raise MediaError(f"{path} is too large to open safely ({error}): scale it down") from None
    except Exception as error:  # decoders of broken files raise nearly anything: OSError, SyntaxError, struct.error
        raise MediaError(f"{path} cannot be read as a picture ({error}): replace the file") from error


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        # convert() alone would clip everything above 255 to white.
        image = image.point(lambda value: value * (1 / 256)).convert("L")
    elif image.mode in ("I", "F"):
        raise MediaError(
            f"{name} has 32-bit pixels (mode {image.mode}) of unknown range: save it with 8 bits a channel"
        )
    return image.convert("RGB")


def _crop(image: Image.Image, media: Media) -> Image.Image:
    if media.box is None:
        return image
    try:
        return image.crop(boxes.crop_bounds(media.box, image.size))
    except ValueError as error:
        name = media.path or "the PIL image"
        raise MediaError(f"{name}: {error}: give x1, y1, x2, y2 in pixels of the original") from None
