"""A record's pictures as they are shown: opened, made to fit, and as the text of an <img>."""

from __future__ import annotations

import base64
import io
import os
from html import escape

from PIL import Image

from ovisnb.data.media import Folder, folder_of, open_image
from ovisnb.data.record import Media, Record
from ovisnb.data.video import frame_count, open_frames, sample_frames


def fit(size: tuple[int, int], width: float, height: float) -> tuple[int, int]:
    """`size` scaled to the largest (width, height) within `width` x `height`, at least 1 x 1."""
    scale = min(width / size[0], height / size[1])
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def thumbnail(image: Image.Image, width: int, height: int) -> dict:
    """`src` (a JPEG data URI), `width` and `height` of an <img> that fits `width` x `height` CSS pixels.

    Stored with twice as many pixels, for sharp screens, but never enlarged.
    """
    image = image if image.mode == "RGB" else image.convert("RGB")  # convert always copies
    shown, stored = fit(image.size, width, height), fit(image.size, 2 * width, 2 * height)
    if max(stored) < max(image.size):
        image = image.resize(stored, Image.Resampling.LANCZOS, reducing_gap=3.0)  # in two steps: six times as fast
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=85)
    source = "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode("ascii")
    return {"src": source, "width": shown[0], "height": shown[1]}


def img(shown: dict, alt: str = "") -> str:
    """The <img> of a `thumbnail`."""
    return (
        f'<img src="{escape(shown["src"])}" alt="{escape(alt)}" width="{shown["width"]}" height="{shown["height"]}" '
        'style="max-width:100%;height:auto;border-radius:4px;display:block">'
    )


class Pictures:
    """The pictures and frames of one record, opened when they are asked for, or the sentence that says why not.

    The picture that crops are cut from is decoded once for all that follow each other.
    """

    def __init__(self, record: Record, image_folder: Folder = None):
        self.record, self.folder = record, folder_of(record, image_folder)
        self._origin = self._whole = None

    def open(self, at: int, *, at_least: int | None = None) -> Image.Image | str:
        """Picture number `at`; `at_least` as in `open_image`, for thumbnails."""
        media = self.record.images[at]
        try:
            if media.box is None and at_least is not None:
                return open_image(media, self.folder, at_least=at_least)
            if media.origin != self._origin:
                self._whole, self._origin = open_image(media.whole, self.folder), media.origin
            return open_image(Media(image=self._whole, box=media.box, coordinates=media.coordinates))
        except ValueError as error:  # a MediaError, or a box that no picture has
            return without(str(error), self.folder)

    def frames(self, most: int) -> dict[str, Image.Image] | str:
        """An even sample of at most `most` frames of the video, by names such as "frame 3 of 40"."""
        try:
            count = frame_count(self.record.video, self.folder)
            wanted = sample_frames(count, max_frames=most)
            frames = open_frames(self.record.video, self.folder, max_frames=most)
        except ValueError as error:
            return without(str(error), self.folder)
        return {f"frame {at + 1} of {count:,}": frame for at, frame in zip(wanted, frames)}


def crop_name(media: Media) -> str:
    """Where a crop lies in its picture, in words: "crop [10, 20, 90, 80]" in pixels."""
    pixels = media.coordinates == "pixels"
    numbers = ", ".join(f"{side:.0f}" if pixels else f"{side:.4g}" for side in media.box)
    return f"crop [{numbers}]" + ("" if pixels else f" ({media.coordinates})")


def without(sentence: str, *folders: Folder) -> str:
    """`sentence` with these folders left out of its paths."""
    for folder in filter(None, folders):
        for spelt in {os.fspath(folder), os.path.realpath(folder)} - {"/", "."}:
            sentence = sentence.replace(spelt.rstrip("/") + "/", "")
    return sentence
