"""What is wrong with a picture or video file: opened once each, in threads, whatever it turns out to be.

with Pictures("images") as pictures:
    seen = pictures.look(Media(path="cat.jpg")).result()
    seen.size, seen.faults    # (451, 300), ()
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Self

from ovisnb.data.checks.record import Found
from ovisnb.data.media import Folder, ImageFacts, MediaError, find_file, folder_or, inspect_image, reason, shown
from ovisnb.data.record import Media

REMEMBERED = 100_000  # files whose result is kept: a record's neighbours often show the same picture


class Seen(NamedTuple):
    """What a look at one file found."""

    size: tuple[int, int] | None
    """(width, height) in pixels as a person sees it; None if it cannot be opened."""
    faults: tuple[Found, ...] = ()
    """Faults of the file; their messages lack the place."""
    file: int | None = None
    """A number for the place the path leads to: the same for all paths that lead there."""
    content: int | None = None
    """A number for the bytes of the file; of a video only if asked for."""


class Pictures:
    """Looks at files in a pool of threads. `contents`: also read videos whole, to know copies of them."""

    def __init__(self, image_folder: Folder = None, *, max_area: int | None = None, contents: bool = False):
        self.image_folder, self.max_area, self.contents = image_folder, max_area, contents
        self._pool = ThreadPoolExecutor(min(8, (os.cpu_count() or 1) + 1), "pictures")
        self._known: OrderedDict[tuple, tuple[Future, int]] = OrderedDict()  # with the `_round` that counted it last
        self._lock = threading.Lock()
        self.count = self._round = 0

    def recount(self) -> None:
        """Count from 0 the files that are looked at from now on, remembered ones too."""
        with self._lock:
            self.count, self._round = 0, self._round + 1

    def look(self, media: Media, folder: str | None = None) -> Future[Seen]:
        """Look at the whole picture or video behind `media`; `folder` is its data set's own image folder."""
        media, where = media.whole, folder_or(folder, self.image_folder)
        if media.path is None:
            self.count += 1
            return self._pool.submit(look, media, where, self.max_area, self.contents)
        key = (media.path, folder)
        with self._lock:
            if key in self._known:
                self._known.move_to_end(key)
                future, counted = self._known[key]
                self.count += counted != self._round
                self._known[key] = future, self._round
                return future
            if len(self._known) >= REMEMBERED:
                self._known.popitem(last=False)
            self.count += 1
            future = self._pool.submit(look, media, where, self.max_area, self.contents)
            self._known[key] = future, self._round
            return future

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error) -> None:
        self._pool.shutdown(cancel_futures=True)


def look(media: Media, image_folder: Folder = None, max_area: int | None = None, contents: bool = False) -> Seen:
    """Look at one whole picture or video file; never raises for what the file holds."""
    path = None
    if media.path is not None:
        try:
            path = find_file(media.path, image_folder, "video" if media.is_video else "picture")
        except MediaError as error:
            return Seen(None, (Found(error.kind, error.message),), file_number(media.path, image_folder))
    file = None if path is None else number_of(os.path.realpath(path))
    name = "the picture in the data" if path is None else shown(path)
    content, digest = None, None
    try:
        if media.is_video:
            size, faults = _look_at_video(media, image_folder)
            digest = _content(path) if contents else None
        else:
            facts, faults = _look_at(media, image_folder, name)
            size, digest = facts.size, facts.digest
        content = digest and number_of(digest)
    except OSError as error:  # no right to read it, a disk that fails
        return Seen(None, (Found("unreadable_picture", f"{name} cannot be read ({reason(error)})"),), file)
    if size is not None and max_area is not None and size[0] * size[1] > max_area:
        faults = (*faults, Found("huge_picture", f"{name} has {size[0]}x{size[1]} pixels, more than {max_area:,}"))
    return Seen(size, faults, file, content)


def number_of(data: str | bytes) -> int:
    """64 bits of a digest: what is remembered instead of a text."""
    data = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def file_number(path: str, image_folder: Folder) -> int:
    """The number of where a path leads, whether or not there is a file."""
    return number_of(os.path.normpath(os.path.join(os.fspath(image_folder or "."), path)))


def _look_at(media: Media, image_folder: Folder, name: str) -> tuple[ImageFacts, tuple[Found, ...]]:
    facts = inspect_image(media, image_folder)
    faults = []
    if facts.problem:
        faults.append(Found(facts.kind, facts.problem))
    if facts.frames is not None and facts.frames > 1:
        faults.append(Found("animated_picture", f"{name} holds {facts.frames} frames: only the first is used"))
    if not facts.problem and facts.orientation != 1:
        said = f"{name} has EXIF orientation {facts.orientation}, which is applied: as a person sees it, it is"
        size = "{}x{} pixels".format(*facts.size)
        faults.append(Found("turned_picture", f"{said} {size}, and boxes must count those"))
    return facts, tuple(faults)


def _look_at_video(media: Media, image_folder: Folder) -> tuple[tuple[int, int] | None, tuple]:
    from ovisnb.data.video import frame_size  # needs PyAV

    try:
        return frame_size([media], image_folder), ()
    except MediaError as error:
        return None, (Found("unreadable_video", str(error)),)


def _content(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
