"""Videos -> frames, taken evenly and safely.

    frames = open_frames([Media(path="clip.mp4")], "videos", max_frames=16)  # 16 PIL images, or all of fewer
    frame_count([Media(path="clip.mp4")], "videos")  # 240, without decoding any

A video is a list of pictures or one video file. A file is only ever decoded near the frames that are
wanted, and only what is one file in itself is opened: nothing that names other files or addresses, as
playlists do. Pixels are taken to be square.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING

from PIL import Image

from ovisnb.data import containers
from ovisnb.data.media import LONGEST_SIDE, Folder, MediaError, find_file, image_size, open_image, reason, shown
from ovisnb.data.record import Media

if TYPE_CHECKING:  # FFmpeg's libraries are loaded for the first video
    import av

# FFmpeg's names. Formats that open further files (hls, dash, concat, image2, sdp) are not among them.
FORMATS = ("mov", "mp4", "matroska", "webm", "avi")
CODECS = (
    *("h264", "hevc", "vp8", "vp9", "av1", "libdav1d", "mpeg4", "mpeg2video", "mpeg1video", "mjpeg"),
    *("msmpeg4", "msmpeg4v2", "h263", "prores", "ffv1", "rawvideo"),
)
LARGEST_FRAME = 8192 * 4320  # pixels: twice "8K", and some hundred MB in a decoder
MOST_PACKETS = 1_000_000  # nine hours at 30 frames a second
MOST_DECODED = 50_000  # frames, for all that are wanted of one video together
MOST_KEPT = 2**29  # pixels of all wanted frames of one video: 2 GiB of pictures


def sample_frames(count: int, min_frames: int | None = None, max_frames: int | None = None) -> list[int]:
    """Which of `count` frames stand for the video, in order: all of them if that is within the limits.

    Otherwise as many as the nearer limit says, each from the middle of its equal share of the video;
    frames repeat where the video has too few. This is `read_video` of the original's
    ovis/train/dataset/multimodal_dataset.py. ValueError for limits below 1 or the wrong way round.
    """
    least = 1 if min_frames is None else min_frames
    most = max(count, least) if max_frames is None else max_frames
    if count < 1 or not 1 <= least <= most:
        raise ValueError(
            f"frames cannot be taken from {count} with min_frames {min_frames} and max_frames {max_frames}: "
            "a video has frames, and the limits are at least 1, min_frames not above max_frames"
        )
    if least <= count <= most:
        return list(range(count))
    target = least if count < least else most
    edges = [round(count / target * number) for number in range(target + 1)]  # halves to even, as numpy rounds
    return [min(count - 1, (start + end) // 2) for start, end in pairwise(edges)]


def frame_count(video: Sequence[Media], image_folder: Folder = None) -> int:
    """How many frames a video has: the length of the list, or the frames of the file, counted without decoding.

    Headers are not asked: some say nothing, and some lie. Raises MediaError.
    """
    if not _is_file(video):
        return len(video)
    with _opened(video[0], image_folder) as clip:
        return clip.scan()


def frame_size(
    video: Sequence[Media], image_folder: Folder = None, min_frames: int | None = None, max_frames: int | None = None
) -> tuple[int, int]:
    """(width, height) in pixels of the first picture that `open_frames` gives; of a file, one frame is decoded.

    All frames of a file are of one size, so the limits only matter for a list of pictures. Raises MediaError.
    """
    if not _is_file(video):
        return _of_list(video, sample_frames(len(video), min_frames, max_frames)[:1], image_folder, image_size)[0]
    with _opened(video[0], image_folder) as clip:
        return clip.first().size


def open_frames(
    video: Sequence[Media], image_folder: Folder = None, min_frames: int | None = None, max_frames: int | None = None
) -> list[Image.Image]:
    """The frames that `sample_frames` chooses, as PIL images in RGB, the way up that a person sees them.

    Raises MediaError; of a list of pictures it says which frame is meant.
    """
    if not _is_file(video):
        return _of_list(video, sample_frames(len(video), min_frames, max_frames), image_folder, open_image)
    with _opened(video[0], image_folder) as clip:
        return clip.frames(sample_frames(clip.scan(), min_frames, max_frames))


def _of_list(video: Sequence[Media], wanted: Sequence[int], image_folder: Folder, read) -> list:
    """`read` of each wanted picture, once also where it is wanted several times."""
    found = {}
    for index in dict.fromkeys(wanted):
        try:
            found[index] = read(video[index], image_folder)
        except MediaError as error:
            raise MediaError(f"frame {index + 1}: {error}", kind=error.kind) from None
    return [found[index] for index in wanted]


def _is_file(video: Sequence[Media]) -> bool:
    files = [media for media in video if media.is_video]
    if not files:
        return False
    if len(video) > 1:
        raise MediaError("a video is one video file or a list of pictures, not a mixture: give one of the two")
    if files[0].box is not None:
        raise MediaError(f"{shown(files[0].path)} is a video file, and a box can only be cut from pictures: drop it")
    return True


@contextmanager
def _opened(media: Media, image_folder: Folder) -> Iterator[_Clip]:
    """The video file; whatever goes wrong in the with block becomes a MediaError."""
    import av

    path = find_file(media.path, image_folder, "video")
    name = shown(path)
    options = {
        "format_whitelist": ",".join(FORMATS),
        "codec_whitelist": ",".join(CODECS),
        "protocol_whitelist": "none",
        "max_pixels": str(LARGEST_FRAME),
        "threads": "1",
    }
    try:
        # A file object: handed a name, FFmpeg would take "concat:a|b" or "http:..." for an instruction.
        with path.open("rb") as file:
            form = containers.check(file, path.stat().st_size, name)
            file.seek(0)
            with av.open(
                file, format=form, options=options, io_open=_no_other_file, metadata_errors="replace"
            ) as container:
                yield _Clip(container, _video_stream(container, name), name)
    except MediaError as error:
        error.kind = "unreadable_video"
        raise
    except EOFError:
        said = f"{name} holds a video without a single frame: replace the file"
        raise MediaError(said, kind="unreadable_video") from None
    except Exception as error:  # as with pictures: decoders of broken files raise nearly anything
        said = f"{name} cannot be read as a video ({reason(error)}): replace or convert it"
        raise MediaError(said, kind="unreadable_video") from error


def _no_other_file(url: str, *_) -> None:
    raise PermissionError(f"it asks for another file, {url}")


def _video_stream(container: av.container.InputContainer, name: str) -> av.VideoStream:
    import av

    streams = [
        stream
        for stream in container.streams.video
        if not stream.disposition & av.stream.Disposition.attached_pic  # the cover of a song is no video
    ]
    if not streams:
        raise MediaError(f"{name} holds no video (perhaps only sound): give another file")
    stream = streams[0]
    codec = stream.codec_context
    if codec is None or codec.name not in CODECS:
        raise MediaError(f"{name} holds video in a codec that is not read here: convert it to H.264")
    if not 0 < codec.width * codec.height <= LARGEST_FRAME or max(codec.width, codec.height) > LONGEST_SIDE:
        raise MediaError(  # FFmpeg gives no size where it finds one above its own limit, which is ours
            f"{name} has frames of {codec.width}x{codec.height} pixels, which is none, above {LARGEST_FRAME:,} pixels "
            f"or a side above {LONGEST_SIDE:,}: scale it down"
        )
    codec.options = {"max_pixels": str(LARGEST_FRAME)}  # the pictures may be larger than the header says
    codec.thread_count = 1  # data workers are many already
    for other in container.streams:
        if other is not stream:
            other.discard = av.stream.Discard.all
    return stream


class _Clip:
    """An open video file, and where in it decoding stands."""

    def __init__(self, container: av.container.InputContainer, stream: av.VideoStream, name: str):
        self.container, self.stream, self.name = container, stream, name
        self.coming: Iterator[av.VideoFrame] = container.decode(stream)
        self.last: av.VideoFrame | None = None  # the frame decoded last
        self.decoded = 0
        self.size: tuple[int, int] | None = None
        # Of `scan`: where each frame stands, in the order they are shown, and where decoding can start. A frame's
        # place is its time or, where the file does not give them all, its number.
        self.places: Sequence[int] = ()
        self.keys: list[int] = []
        self.timed = False

    def scan(self) -> int:
        """How many frames the file has, by reading their packets without decoding them."""
        count, times = 0, []
        for packet in self.container.demux(self.stream):
            if not packet.size or (packet.is_discard and not packet.is_corrupt):
                continue  # the mark at the end, or outside the part that the file says to play
            if packet.is_corrupt:
                raise MediaError(f"{self.name} is cut off after {count} frames: replace the file")
            count += 1
            if count > MOST_PACKETS:
                raise MediaError(f"{self.name} has more than {MOST_PACKETS:,} frames: cut it into shorter clips")
            if packet.pts is not None:
                times.append((packet.pts, packet.is_keyframe))
        if not count:
            raise EOFError
        self.timed = len(times) == count
        self.places = sorted(time for time, _ in times) if self.timed else range(count)
        self.keys = sorted(time for time, key in times if key) if self.timed else []
        return count

    def first(self) -> Image.Image:
        """The first frame."""
        self._decode()
        return _seen(self.last)

    def frames(self, wanted: Sequence[int]) -> list[Image.Image]:
        """The frames with these numbers, which ascend; where wanted ones are far apart, nothing between is decoded."""
        found: dict[int, Image.Image] = {}
        self._rewind()
        for number in dict.fromkeys(wanted):
            place = self.places[number]
            self._leap(place)
            while self._now() < place and self._decode():
                pass  # up to the frame, or the last one: a packet need not hold a picture of its own
            width, height = self.size
            if len(set(wanted)) * width * height > MOST_KEPT:
                raise MediaError(
                    f"{self.name}: {len(set(wanted)):,} frames of {width}x{height} pixels are too many to hold: "
                    "lower max_frames"
                )
            found[number] = _seen(self.last)
        return [found[number] for number in wanted]

    def _leap(self, place: int) -> None:
        """Go to the last key frame up to `place`, if it lies ahead."""
        before = bisect_right(self.keys, place)
        if not before or self.keys[before - 1] <= self._now():
            return
        self._rewind(self.keys[before - 1], stream=self.stream)
        self._decode()
        if self._now() > place:  # what the file says about its own places is wrong: walk instead
            self._rewind()

    def _now(self) -> int:
        """The place of the last frame."""
        if self.last is None or (self.timed and self.last.pts is None):
            return -1 << 63
        return self.last.pts if self.timed else self.decoded - 1

    def _decode(self) -> bool:
        """Move on to the next frame; False, staying where we are, at the end."""
        frame = next(self.coming, None)
        if frame is None:
            if self.last is None:
                raise EOFError
            return False
        self.decoded += 1
        if self.decoded > MOST_DECODED:
            raise MediaError(f"{self.name} would take more than {MOST_DECODED:,} frames to decode: cut it into clips")
        self.size = self.size or (frame.width, frame.height)
        if self.size != (frame.width, frame.height):
            raise MediaError(f"{self.name} changes the size of its frames on the way: convert it to one size")
        self.last = frame
        return True

    def _rewind(self, time: int = 0, **options) -> None:
        """Decode from `time` on, in the time base of a `stream`; by default from the start."""
        self.container.seek(time, **options)
        self.coming, self.last = self.container.decode(self.stream), None


def _seen(frame: av.VideoFrame) -> Image.Image:
    """A frame as a PIL image in RGB, turned and mirrored as its display matrix says."""
    image = frame.to_image()
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return image
    a, b, _, c, d = struct.unpack("=9i", bytes(matrix))[:5]  # x' = a x + c y, y' = b x + d y; y points down
    if abs(a) + abs(d) < abs(b) + abs(c):  # on its side: once x and y have changed places, x' = c x, y' = b y
        image, a, d = image.transpose(Image.Transpose.TRANSPOSE), c, b
    if a < 0:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if d < 0:
        image = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    return image
