"""Videos made to do harm: each gives one sentence, and nothing else is opened."""

from __future__ import annotations

import os
import socket
import struct

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ovisnb.data import Media, MediaError
from ovisnb.data import video as video_module
from ovisnb.data.video import frame_count, frame_size, open_frames
from tests.data.test_hostile_media import damaged, little_memory
from tests.data.test_video import write

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")


def no_video(path, data: bytes | None = None) -> str:
    """The sentence that refuses a video file, the same for its frames, their count and their size."""
    if data is not None:
        path.write_bytes(data)
    sentences = set()
    for read in (open_frames, frame_count, frame_size):
        with pytest.raises(MediaError) as refusal:
            read([Media(path=str(path))])
        sentences.add(str(refusal.value))
        assert refusal.value.kind in ("unreadable_video", "unreadable_picture")  # of what is no file
    (sentence,) = sentences
    assert sentence.isprintable() and len(sentence) < 700
    return sentence


PLAYLISTS = {
    "m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{secret}\n#EXT-X-ENDLIST\n",
    "m3u8 over the network": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1:{port}/a\n#EXT-X-ENDLIST\n",
    "concat": "ffconcat version 1.0\nfile {secret}\n",
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video {port} RTP/AVP 96\n",
    "dash": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><Period><AdaptationSet mimeType="video/mp4">'
    '<Representation id="1"><BaseURL>{secret}</BaseURL></Representation></AdaptationSet></Period></MPD>',
    "text": "this is no video",
}


@pytest.mark.parametrize("kind", PLAYLISTS)
@pytest.mark.parametrize("suffix", [".mp4", ".avi", ".mkv"])
def test_a_playlist_opens_nothing(tmp_path, kind, suffix):
    write(tmp_path / "secret.mp4", [1, 2, 3])
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.settimeout(0.01)
        text = PLAYLISTS[kind].format(secret=tmp_path / "secret.mp4", port=listener.getsockname()[1])
        assert "is no video in a format read here" in no_video(tmp_path / f"list{suffix}", text.encode())
        with pytest.raises(TimeoutError):
            listener.accept()


def test_ffmpeg_itself_is_held_to_the_formats(tmp_path, monkeypatch):
    """The second wall, should the first one ever let a playlist through."""
    write(tmp_path / "secret.mp4", [1, 2, 3])
    monkeypatch.setattr(video_module.containers, "check", lambda *_: None)
    for kind in set(PLAYLISTS):
        text = PLAYLISTS[kind].format(secret=tmp_path / "secret.mp4", port=9)
        assert "cannot be read as a video" in no_video(tmp_path / "list.mp4", text.encode())


def test_names_that_ffmpeg_would_obey(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.mp4", [1, 2, 3])
    for name in ("concat:a.mp4|a.mp4", "subfile,,start,0,end,9,,:a.mp4", "async:a.mp4", "lavfi:testsrc.mp4"):
        with pytest.raises(MediaError, match="there is no video at"):
            frame_count([Media(path=f"{name}" if name.endswith(".mp4") else f"{name}.mp4")])
    for name in ("http://127.0.0.1:9/a.mp4", "file:///etc/a.mp4", "rtsp://127.0.0.1/a.mp4"):
        with pytest.raises(MediaError, match="is a URL"):
            frame_count([Media(path=name)])


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm", ".avi"])
def test_truncated_videos(tmp_path, suffix):
    write(path := tmp_path / f"a{suffix}", range(0, 200, 10))
    data = path.read_bytes()
    for share in (0.1, 0.5, 0.9):
        assert "is cut off" in no_video(path, data[: int(len(data) * share)])
    assert "is empty (0 bytes)" in no_video(path, b"")
    path.write_bytes(data + b"rubbish" * 9)
    assert frame_count([Media(path=str(path))]) == 20


def test_videos_without_a_picture(tmp_path):
    with av.open(str(tmp_path / "sound.mp4"), "w") as clip:
        stream = clip.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 44100), np.float32), format="fltp", layout="mono")
        frame.rate = 44100
        clip.mux(stream.encode(frame))
        clip.mux(stream.encode())
    assert "holds no video (perhaps only sound)" in no_video(tmp_path / "sound.mp4")
    with av.open(str(tmp_path / "none.mkv"), "w") as clip:
        stream = clip.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        clip.start_encoding()
    assert "holds a video without a single frame" in no_video(tmp_path / "none.mkv")
    (tmp_path / "folder.mp4").mkdir()
    assert "is not a file" in no_video(tmp_path / "folder.mp4")
    os.mkfifo(tmp_path / "pipe.mp4")
    assert "is not a file" in no_video(tmp_path / "pipe.mp4")


def test_huge_frames_are_refused_before_decoding(tmp_path):
    write(tmp_path / "wide.mkv", [0], size=(70_000, 16), codec="ffv1")
    with little_memory(60):
        assert "has frames of 70000x16 pixels" in no_video(tmp_path / "wide.mkv")
    write(tmp_path / "a.mp4", [0, 9], codec="mpeg4")
    original, limit = (tmp_path / "a.mp4").read_bytes(), video_module.LARGEST_FRAME
    try:
        video_module.LARGEST_FRAME = 64 * 48 - 1  # FFmpeg holds to it, whatever the header says
        assert "above 3,071 pixels" in no_video(tmp_path / "a.mp4")
    finally:
        video_module.LARGEST_FRAME = limit
    place = original.index(b"mp4v", original.index(b"stsd")) + 28
    (tmp_path / "a.mp4").write_bytes(original[:place] + struct.pack(">HH", 60_000, 60_000) + original[place + 4 :])
    with little_memory(60):
        assert open_frames([Media(path=str(tmp_path / "a.mp4"))])[0].size == (64, 48)  # the pictures themselves say


def test_frames_that_change_their_size(tmp_path):
    small, large = (write(tmp_path / f"{side}.mkv", [9] * 3, size=(side, side), codec="mjpeg", prepare=full_range)
                    for side in (32, 64))  # fmt: skip
    with av.open(small[0].path) as first, av.open(large[0].path) as second, av.open(f"{tmp_path}/b.mkv", "w") as both:
        stream = both.add_stream_from_template(first.streams.video[0])
        packets = [packet for clip in (first, second) for packet in clip.demux(video=0) if packet.size]
        for number, packet in enumerate(packets):
            packet.pts = packet.dts = number * 100
            packet.stream = stream
            both.mux(packet)
    with pytest.raises(MediaError, match="changes the size of its frames"):
        open_frames([Media(path=f"{tmp_path}/b.mkv")])


def full_range(stream):
    stream.pix_fmt = "yuvj420p"


@pytest.mark.parametrize(
    ("limit", "said"), [("MOST_PACKETS", "more than 5 frames"), ("MOST_DECODED", "than 5 frames to decode")]
)
def test_limits_on_frames(tmp_path, monkeypatch, limit, said):
    video = write(tmp_path / "a.mp4", range(20))
    monkeypatch.setattr(video_module, limit, 5)
    with pytest.raises(MediaError, match=said):
        open_frames(video)


def test_a_limit_on_what_is_held(tmp_path, monkeypatch):
    video = write(tmp_path / "a.mp4", range(20))
    monkeypatch.setattr(video_module, "MOST_KEPT", 10 * 64 * 48)
    with pytest.raises(MediaError, match="20 frames of 64x48 pixels are too many to hold: lower max_frames"):
        open_frames(video)
    assert len(open_frames(video, max_frames=10)) == 10
    assert len(open_frames(write(tmp_path / "b.mp4", range(5)), min_frames=50)) == 50  # the same five, held once


def test_tables_that_claim_billions_of_frames(tmp_path):
    write(path := tmp_path / "a.mp4", range(20))
    data = bytearray(path.read_bytes())
    sizes, runs = data.index(b"stsz") + 8, data.index(b"stsc") + 16
    data[sizes : sizes + 8] = struct.pack(">II", 1, 80_000_000)
    data[runs : runs + 4] = struct.pack(">I", 80_000_000)
    with little_memory(20):
        assert "claims 80,000,000 frames, more than it has bytes" in no_video(path, bytes(data))
    write(path, range(20), movflags="frag_keyframe+empty_moov")
    data = bytearray(path.read_bytes())
    run = data.index(b"trun") + 4
    data[run : run + 8] = struct.pack(">II", 0, 80_000_000)
    long = data[: run - 8] + struct.pack(">I4sQ", 1, b"trun", 300) + data[run : run + 999]  # a length of 8 bytes
    with little_memory(20):
        assert "more than it has bytes" in no_video(path, bytes(data))
        assert "more than it has bytes" in no_video(path, bytes(long))
        assert "more than it has bytes" in no_video(path, data[:run].replace(b"ftyp", b"free") + data[run:])


def test_damaged_videos_give_frames_or_sentences(tmp_path, monkeypatch):
    monkeypatch.setattr(video_module, "LARGEST_FRAME", 1_000_000)  # a damaged header may announce frames of any size
    suffixes = (".mp4", ".webm", ".avi", ".mkv")
    data = {}
    for suffix in suffixes:
        write(tmp_path / f"a{suffix}", range(0, 250, 50), size=(32, 16))
        data[suffix] = (tmp_path / f"a{suffix}").read_bytes()

    @settings(max_examples=250, deadline=20_000)
    @given(st.data())
    def check(draws):
        suffix = draws.draw(st.sampled_from(suffixes))
        path = tmp_path / f"damaged{suffix}"
        path.write_bytes(draws.draw(damaged(st.just(data[suffix]))))
        video = [Media(path=str(path))]
        try:
            frames = open_frames(video, None, 2, 4)
        except MediaError as error:
            assert str(error).isprintable()
        else:
            assert 2 <= len(frames) <= 4 and {frame.mode for frame in frames} == {"RGB"}
            assert len(frames) == min(max(frame_count(video), 2), 4) and frame_size(video) == frames[0].size

    with little_memory(100):
        check()
