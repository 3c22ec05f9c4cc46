from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ovisnb.data import Media, MediaError, Record, open_media
from ovisnb.data import video as video_module
from ovisnb.data.video import frame_count, frame_size, open_frames, sample_frames

CODECS = {".mp4": "libx264", ".mov": "mpeg4", ".mkv": "libx264", ".webm": "libvpx-vp9", ".avi": "mpeg4"}


def write(path, grey, *, size=(64, 48), codec=None, form=None, times=None, gop=12, prepare=None, **options):
    """A video of even grey pictures, a tenth of a second each, or at `times` in milliseconds."""
    with av.open(str(path), "w", format=form, options=options) as clip:
        stream = clip.add_stream(codec or CODECS[path.suffix], rate=10)
        stream.width, stream.height = size
        stream.pix_fmt, stream.time_base = "yuv420p", Fraction(1, 1000)
        stream.codec_context.time_base, stream.codec_context.gop_size = Fraction(1, 1000), gop
        if prepare:
            prepare(stream)
        for number, level in enumerate(grey):
            pixels = np.full((size[1], size[0], 3), level, np.uint8) if np.isscalar(level) else level
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = times[number] if times else number * 100
            clip.mux(stream.encode(frame))
        clip.mux(stream.encode())
    return [Media(path=str(path))]


def grey_of(frames) -> list[float]:
    return [float(np.asarray(frame).mean()) for frame in frames]


def assert_grey(frames, expected):
    np.testing.assert_allclose(grey_of(frames), expected, atol=4)
    assert all(frame.mode == "RGB" for frame in frames)


def told(video, **limits) -> str:
    """The one sentence that refuses a video, by all ways to read it."""
    with pytest.raises(MediaError) as refusal:
        open_frames(video, **limits)
    sentence = str(refusal.value)
    assert "\n" not in sentence
    return sentence


@given(st.integers(1, 500), st.integers(1, 60), st.integers(1, 60))
def test_frames_are_taken_as_the_original_takes_them(count, one, other):
    least, most = min(one, other), max(one, other)
    taken = sample_frames(count, least, most)
    if least <= count <= most:
        assert taken == list(range(count))
        return
    target = least if count < least else most
    edges = np.round(count / target * np.arange(target + 1)).astype(int)
    assert taken == [min(count - 1, int(a + b) // 2) for a, b in pairwise(edges)]
    assert len(taken) == target and taken == sorted(taken)
    # Even, and as far from one end of the video as from the other, to the nearest frame.
    assert abs((taken[0] + taken[-1]) - (count - 1)) <= 1
    assert max(np.diff(taken), default=0) <= math.ceil(count / target) + 1


def test_frames_by_hand():
    assert sample_frames(10, max_frames=4) == [1, 3, 6, 9]  # edges 0 2 5 8 10: halves round to even
    assert sample_frames(3, min_frames=6) == [0, 0, 1, 2, 2, 2]
    assert sample_frames(1, min_frames=3) == [0, 0, 0]
    assert sample_frames(5) == sample_frames(5, 5, 5) == [0, 1, 2, 3, 4]
    assert sample_frames(300, 1, 1) == [150]
    for count, least, most in ((0, None, None), (5, 0, None), (5, None, 0), (5, 4, 3)):
        with pytest.raises(ValueError, match="frames cannot be taken from"):
            sample_frames(count, least, most)


def test_a_list_of_pictures(tmp_path):
    for number in range(6):
        Image.new("RGB", (10 + number, 20), (number * 40,) * 3).save(tmp_path / f"{number}.png")
    video = [Media(path=f"{number}.png") for number in range(6)]
    assert frame_count(video, tmp_path) == 6 and frame_size(video, tmp_path) == (10, 20)
    assert grey_of(open_frames(video, tmp_path)) == [0, 40, 80, 120, 160, 200]
    assert grey_of(open_frames(video, tmp_path, max_frames=2)) == [40, 160]
    assert frame_size(video, tmp_path, max_frames=2) == (11, 20)  # of the first that is taken
    assert grey_of(open_frames(video[:2], tmp_path, min_frames=4)) == [0, 0, 40, 40]
    boxed = [Media(path="1.png", box=(0, 0, 5, 6)), Media(image=Image.new("L", (3, 3), 9))]
    assert [frame.size for frame in open_frames(boxed, tmp_path)] == [(5, 6), (3, 3)]
    with pytest.raises(MediaError, match=r"^frame 2: the path '\.\./x\.png' leads out"):
        open_frames([video[0], Media(path="../x.png")], tmp_path)
    assert len(open_frames([Media(path="no.png"), *video], tmp_path, max_frames=3)) == 3  # not wanted, not read


@pytest.mark.parametrize("suffix", [*CODECS, ".m4v", ".MPG"])
def test_a_video_file(tmp_path, suffix):
    write(tmp_path / (f"a{suffix}" if suffix in CODECS else "a.mp4"), range(0, 240, 10))
    if suffix not in CODECS:
        (tmp_path / "a.mp4").rename(tmp_path / f"a{suffix}")
    video = [Media(path=str(tmp_path / f"a{suffix}"))]
    assert frame_count(video) == 24 and frame_size(video) == (64, 48)
    assert_grey(open_frames(video), range(0, 240, 10))
    assert_grey(open_frames(video, max_frames=5), [10 * index for index in sample_frames(24, None, 5)])
    assert_grey(open_frames(video, min_frames=30), [10 * index for index in sample_frames(24, 30)])
    assert_grey(open_frames([Media(path=f"a{suffix}")], tmp_path, 1, 1), [120])


@pytest.mark.parametrize(("suffix", "start"), [(".mpg", b"\0\0\1\xba"), (".ts", b"G@"), (".flv", b"FLV\1")])
def test_a_video_in_another_format_is_no_broken_picture(tmp_path, suffix, start):
    (tmp_path / f"a{suffix}").write_bytes(start + bytes(999))
    said = f"a{suffix} is no video in a format read here (MP4, MOV, MKV, WebM, AVI): convert it"
    assert said in told([Media(path=f"{tmp_path}/a{suffix}")])


@pytest.mark.parametrize(
    ("codec", "suffix", "options"),
    [("libvpx", ".webm", {}), ("mjpeg", ".avi", {}), ("libx264", ".mp4", {"movflags": "frag_keyframe+empty_moov"})],
)
def test_other_codecs_and_layouts(tmp_path, codec, suffix, options):
    def full_range(stream):
        if codec == "mjpeg":
            stream.pix_fmt = "yuvj420p"

    video = write(tmp_path / f"a{suffix}", range(0, 200, 10), codec=codec, prepare=full_range, **options)
    assert frame_count(video) == 20
    assert_grey(open_frames(video, max_frames=4), [10 * index for index in sample_frames(20, None, 4)])


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_varying_frame_rate_counts_frames_not_seconds(tmp_path, suffix):
    times = [0, 40, 80, 2000, 2040, 2500, 9000, 9001, 9100, 30000]
    video = write(tmp_path / f"a{suffix}", range(0, 200, 20), times=times, gop=3)
    assert frame_count(video) == 10
    assert_grey(open_frames(video, max_frames=4), [20, 60, 120, 180])


def test_only_what_lies_before_a_wanted_frame_is_decoded(tmp_path, monkeypatch):
    video = write(tmp_path / "a.mp4", [number % 250 for number in range(300)], gop=10)
    decoded, step = [], video_module._Clip._decode
    monkeypatch.setattr(video_module._Clip, "_decode", lambda clip: decoded.append(1) or step(clip))
    assert_grey(open_frames(video, max_frames=4), [37, 112, 187, 12])
    assert len(decoded) <= 40


@pytest.mark.parametrize("turn", range(8))
def test_a_turned_video_is_seen_upright(tmp_path, turn):
    corners = np.zeros((48, 64, 3), np.uint8)
    corners[:24, :32], corners[:24, 32:], corners[24:, :32] = 250, 170, 90

    def prepare(stream):
        stream.set_display_rotation(90 * (turn % 4), hflip=turn >= 4)

    video = write(tmp_path / "a.mp4", [corners] * 3, prepare=prepare)
    with av.open(str(tmp_path / "a.mp4")) as clip:
        matrix = next(clip.decode(video=0)).side_data.get("DISPLAYMATRIX")
    frame = open_frames(video)[0]
    assert frame_size(video) == frame.size == ((48, 64) if turn % 2 else (64, 48))
    # The matrix itself says where a corner goes: x' = a x + c y, y' = b x + d y.
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5] / 65536 if matrix else (1, 0, 0, 0, 1)
    seen = np.asarray(frame)[:, :, 0].astype(int)
    height, width = seen.shape
    for x, y, level in ((-1, -1, 250), (1, -1, 170), (-1, 1, 90), (1, 1, 0)):
        to_x, to_y = round(a * x + c * y), round(b * x + d * y)
        assert abs(seen[height // 4 * (2 + to_y), width // 4 * (2 + to_x)] - level) < 8


def test_one_pixel_and_odd_sizes(tmp_path):
    video = write(tmp_path / "a.mkv", [200], size=(17, 9), codec="ffv1", gop=1)
    assert frame_count(video) == 1 and frame_size(video) == (17, 9)
    assert_grey(open_frames(video, min_frames=2), [200, 200])


def test_a_video_file_takes_no_box_and_no_company(tmp_path):
    (video,) = write(tmp_path / "a.mp4", [1, 2])
    assert "a box can only be cut from pictures" in told([video.crop((0, 0, 5, 5))])
    for read in (frame_count, frame_size, open_frames):
        with pytest.raises(MediaError, match="not a mixture"):
            read([video, Media(image=Image.new("RGB", (4, 4)))])


def test_open_media_takes_frames_evenly_and_names_the_record(tmp_path):
    write(tmp_path / "a.mp4", range(0, 200, 10))
    data = {"id": "v", "video": "a.mp4", "conversations": [{"from": "human", "value": "<video>"}]}
    record = Record.from_dict(data, source="train.json:7")
    images, frames = open_media(record, tmp_path, max_frames=2)
    assert images == [] and len(frames) == 2
    assert_grey(frames, [50, 150])
    assert len(open_media(record, tmp_path)[1]) == 20
    (tmp_path / "a.mp4").write_text("no video")
    with pytest.raises(MediaError, match=r"^record 'v' \(train\.json:7\): .*a\.mp4 is no video in a format read here"):
        open_media(record, tmp_path)
    for number in range(4):
        Image.new("RGB", (9, 9), (number * 50,) * 3).save(tmp_path / f"{number}.png")
    record = Record.from_dict({**data, "video": [f"{number}.png" for number in range(4)]})
    assert grey_of(open_media(record, tmp_path, max_frames=2)[1]) == [50, 150]
    assert open_media(record, tmp_path, min_frames=8)[1][0].size == (9, 9)
