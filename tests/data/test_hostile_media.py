"""Pictures made to do harm: each gives one sentence, and the rest of the set goes on."""

from __future__ import annotations

import io
import os
import resource
import socket
import struct
import zlib
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ovisnb.data import Media, MediaError, Record, open_image, open_media
from ovisnb.data.media import ImageFacts, image_size, inspect_image
from tests.data.test_media import WRITTEN, encoded, gradient

MEGABYTES = 1 << 20
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")


@contextmanager
def little_memory(megabytes: int):
    """The block may raise this process's peak memory by so much."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    assert grown <= megabytes, f"{grown} MB"


def refused(media: Media, folder=None, *, header: bool = True) -> str:
    """The sentence that refuses a picture, the same from all that read it; `header`: image_size sees it too."""
    with pytest.raises(MediaError) as refusal:
        open_image(media, folder)
    sentence = str(refusal.value)
    assert inspect_image(media, folder).problem == sentence
    assert sentence.isprintable() and len(sentence) < 700
    if header:
        with pytest.raises(MediaError) as refusal:
            image_size(media, folder)
        assert str(refusal.value) == sentence
    return sentence


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *more: bytes, depth: int = 8, colour: int = 2) -> bytes:
    """A PNG that announces a size, with further chunks, and hardly a pixel behind it."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(4)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + pixels + chunk(b"IEND", b"")


def noise(form: str) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(file := io.BytesIO(), form)
    return file.getvalue()


def gif_of(width: int, height: int) -> bytes:
    Image.new("P", (4, 4)).save(file := io.BytesIO(), "GIF")
    data = bytearray(file.getvalue())
    data[6:10] = struct.pack("<HH", width, height)
    return bytes(data)


@pytest.mark.parametrize(
    "data",
    [
        png(30_000, 30_000),
        png(10_000, 9_000, depth=16, colour=6),
        png(2**31 - 1, 2**31 - 1),
        gif_of(65_535, 65_535),
        b"P6 60000 60000 255\n" + bytes(100),
        b"BM" + struct.pack("<IHHIIiiHHIIiiII", 200, 0, 0, 54, 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0) + bytes(99),
        b"RIFF\x64\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0\xfe\x3f\0\xfe\x3f\0" + bytes(70),
    ],
    ids=["png", "png of 16 bits", "png of 2^31", "gif", "ppm", "bmp", "webp"],
)
def test_decompression_bombs_are_refused_by_their_header(data):
    with little_memory(40):
        assert "is too large to open safely" in refused(Media(data=data))
        assert inspect_image(Media(data=data)).kind == "huge_picture"


@pytest.fixture(scope="module")
def bomb() -> bytes:
    return zlib.compress(bytes(64 * MEGABYTES), 1)


@pytest.mark.parametrize("kind", [b"iCCP", b"zTXt", b"iTXt"])
@pytest.mark.parametrize("late", [False, True])
def test_zip_bombs_in_the_chunks_of_a_png(bomb, kind, late):
    text = {b"iCCP": b"a\0\0", b"zTXt": b"a\0\0", b"iTXt": b"a\0\1\0\0\0"}[kind] + bomb
    Image.new("RGB", (4, 4)).save(file := io.BytesIO(), "PNG")
    whole = file.getvalue()
    place = whole.index(b"IEND") - 4 if late else 33
    with little_memory(20):
        media = Media(data=whole[:place] + chunk(kind, text) + whole[place:])
        sentence = refused(media, header=not late)
        assert "cannot be read as a picture" in sentence and "too large" in sentence


def test_many_small_zip_bombs_in_a_png():
    bombs = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(MEGABYTES))) * 80
    with little_memory(100):
        assert "Too much memory" in refused(Media(data=png(4, 4, bombs)))


@pytest.mark.parametrize("size", [(100_000, 1), (1, 100_000), (100_000, 600)])
def test_slivers(size):
    Image.new("1", size).save(file := io.BytesIO(), "PNG")
    sentence = refused(Media(data=file.getvalue()))
    assert f"is too long ({size[0]}x{size[1]} pixels, a side above 65,535)" in sentence
    assert "the PIL image is too long" in refused(Media(image=Image.new("1", size)))


@pytest.mark.parametrize("form", sorted(set(WRITTEN) - {"MPO"}))
def test_truncated_files(tmp_path, form):
    data = noise(form)
    for share in (0.02, 0.3, 0.6, 0.9):
        (tmp_path / "cut").write_bytes(data[: int(len(data) * share)])
        sentence = refused(Media(path="cut"), tmp_path, header=False)
        assert "cannot be read as a picture" in sentence or "is no picture in a format read here" in sentence
        assert refused(Media(data=data[: int(len(data) * share)]), header=False)
    assert inspect_image(Media(data=data)).problem is None


@pytest.mark.parametrize("share", (0.02, 0.5, 0.99))
def test_a_webp_that_is_cut_off_is_told_as_truncated(share):
    data = noise("WEBP")
    assert inspect_image(Media(data=data[: int(len(data) * share)])).kind == "truncated_picture"
    assert inspect_image(Media(data=data[:16] + bytes(len(data) - 16))).kind == "unreadable_picture"


def test_what_is_no_file(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    os.symlink("loop.png", tmp_path / "loop.png")
    os.symlink("there.png", tmp_path / "here.png")
    os.symlink("here.png", tmp_path / "there.png")
    os.symlink("nowhere.png", tmp_path / "dangling.png")
    assert "is empty (0 bytes)" in refused(Media(path="empty.png"), tmp_path)
    assert "is empty (0 bytes)" in refused(Media(data=b""))
    assert "is not a file" in refused(Media(path="folder.png"), tmp_path)
    assert "is not a file" in refused(Media(path="pipe.png"), tmp_path)  # and is not waited for
    for name in ("loop.png", "here.png"):
        assert name in refused(Media(path=name), tmp_path)
        assert "is a link that leads nowhere" in refused(Media(path=str(tmp_path / name)))
    assert "no picture at" in refused(Media(path="dangling.png"), tmp_path)
    kinds = {"empty.png": "unreadable_picture", "pipe.png": "unreadable_picture", "dangling.png": "missing_file"}
    assert {name: inspect_image(Media(path=name), tmp_path).kind for name in kinds} == kinds
    for device in ("/dev/zero", "/dev/stdin"):
        assert "is not a file" in refused(Media(path=device))


def test_a_socket_is_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the name of a socket may not be long
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("s.png")
        assert "is not a file" in refused(Media(path="s.png"), tmp_path)


def test_of_an_animated_picture_the_first_frame_is_taken(tmp_path):
    frames = [Image.new("RGB", (6, 5), colour) for colour in ("#ff0000", "#00ff00", "#0000ff")]
    for form in ("GIF", "PNG", "WEBP", "TIFF"):
        more = {"lossless": True} if form == "WEBP" else {}
        frames[0].save(tmp_path / form, form, save_all=True, append_images=frames[1:], **more)
        assert open_image(Media(path=form), tmp_path).getpixel((2, 2)) == (255, 0, 0)
        facts = inspect_image(Media(path=form), tmp_path)
        assert (facts.frames, facts.format, facts.size, facts.problem) == (3, form, (6, 5), None)
    phone = inspect_image(Media(data=encoded(6, 5, "MPO", "RGB", 1)))
    assert (phone.frames, phone.format) == (1, "JPEG")


def test_unusual_pixels(tmp_path):
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 200, 100, 50])
    palette.save(tmp_path / "palette.png", transparency=b"\0\x80")
    palette.save(tmp_path / "palette.gif", transparency=1)
    assert open_image(Media(path="palette.png"), tmp_path).getpixel((0, 0)) == (200, 100, 50)
    assert open_image(Media(path="palette.gif"), tmp_path).getpixel((0, 0)) == (200, 100, 50)
    Image.new("CMYK", (4, 4), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg", quality=95)
    red, green, _ = open_image(Media(path="cmyk.jpg"), tmp_path).getpixel((0, 0))
    assert red > 240 and green < 15
    deep = Image.fromarray(np.full((4, 4), 0x8040, np.uint16))
    for name in ("deep.png", "deep.tif", "deep.jp2"):
        deep.save(tmp_path / name)
        assert open_image(Media(path=name), tmp_path).getpixel((0, 0)) == (128, 128, 128)
    (tmp_path / "big-endian.tif").write_bytes(
        b"MM\0*\0\0\0\x28"
        + struct.pack(">16H", *[0x8040] * 16)
        + struct.pack(">H", 8)
        + b"".join(
            struct.pack(">HHIHH" if kind == 3 else ">HHII", tag, kind, 1, *((value, 0) if kind == 3 else (value,)))
            for tag, kind, value in (
                (256, 3, 4),
                (257, 3, 4),
                (258, 3, 16),
                (259, 3, 1),
                (262, 3, 1),
                (273, 4, 8),
                (278, 3, 4),
                (279, 4, 32),
            )
        )
        + bytes(4)
    )
    assert open_image(Media(path="big-endian.tif"), tmp_path).getpixel((0, 0)) == (128, 128, 128)
    (tmp_path / "deep.pgm").write_bytes(b"P5 1 1 65535\n\x80\x40")
    assert open_image(Media(path="deep.pgm"), tmp_path).getpixel((0, 0)) == (128, 128, 128)
    Image.new("I", (4, 4)).save(tmp_path / "i.tif")
    assert "32-bit pixels (mode I)" in refused(Media(path="i.tif"), tmp_path)


@pytest.mark.parametrize("exif", [b"", b"Exif\0\0", b"Exif\0\0nonsense", b"Exif\0\0MM\0*\0\0\xff\xff", b"\xff" * 2000])
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_a_picture_with_broken_exif_is_taken_as_it_is_stored(form, exif):
    gradient(30, 20).save(file := io.BytesIO(), form, exif=exif)
    media = Media(data=file.getvalue())
    assert open_image(media).size == image_size(media) == (30, 20)
    assert inspect_image(media).orientation == 1


@pytest.mark.parametrize("kind", range(14))
@pytest.mark.parametrize("count", [0, 1, 2, 1000])
def test_exif_with_an_orientation_of_a_strange_type(kind, count):
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\1" + struct.pack(">HHI4s", 0x0112, kind, count, b"\0\6\0\6") + bytes(4)
    gradient(30, 20).save(file := io.BytesIO(), "JPEG", exif=exif)
    media = Media(data=file.getvalue())
    assert image_size(media) == open_image(media).size == inspect_image(media).size
    assert inspect_image(media).orientation in (1, 6)


def test_a_wrong_suffix_is_seen_through(tmp_path):
    (tmp_path / "really.png").write_bytes(noise("JPEG"))
    facts = inspect_image(Media(path="really.png"), tmp_path)
    assert facts.format == "JPEG" and facts.problem is None
    for harmful in (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"<svg xmlns='http://www.w3.org/2000/svg'/>"):
        (tmp_path / "really.jpg").write_bytes(harmful)
        assert "is no picture in a format read here" in refused(Media(path="really.jpg"), tmp_path)


def test_the_facts_of_a_picture(tmp_path):
    data = encoded(30, 20, "JPEG", "RGB", 6)
    (tmp_path / "a.jpg").write_bytes(data)
    facts = inspect_image(Media(path="a.jpg", box=(0, 0, 5, 5)), tmp_path)
    assert facts == ImageFacts((20, 30), "JPEG", 1, 6, facts.digest, None)
    assert facts.digest == inspect_image(Media(data=data)).digest and len(facts.digest) == 64
    outside = inspect_image(Media(path="a.jpg", box=(25, 0, 28, 5)), tmp_path)
    assert outside.size == (20, 30) and "lies outside the picture of 20x30 pixels" in outside.problem
    assert inspect_image(Media(image=gradient(3, 4))).size == (3, 4)
    assert inspect_image(Media(image=gradient(3, 4))).digest != inspect_image(Media(image=gradient(4, 3))).digest
    (tmp_path / "a.jpg").write_bytes(noise("JPEG")[:2000])
    cut = inspect_image(Media(path="a.jpg"), tmp_path)
    assert cut.size == (64, 64) and cut.format == "JPEG" and "truncated" in cut.problem
    assert cut.kind == "truncated_picture" and outside.kind == "box_outside" and facts.kind is None
    assert inspect_image(Media(path="no.jpg"), tmp_path).size is None


def test_the_rest_of_the_set_goes_on(tmp_path):
    gradient(8, 8).save(tmp_path / "good.png")
    (tmp_path / "bomb.png").write_bytes(png(2**20, 2**20))
    (tmp_path / "empty.png").touch()
    opened, sentences = [], []
    for number, name in enumerate(["good.png", "bomb.png", "empty.png", "../x.png", "gone.png", "good.png"]):
        data = {"id": f"r{number}", "image": name, "conversations": [{"from": "human", "value": "<image>"}]}
        try:
            opened += open_media(Record.from_dict(data, source=f"a.jsonl:{number}"), tmp_path)[0]
        except MediaError as error:
            sentences.append(str(error))
    assert len(opened) == 2
    assert [sentence[: sentence.index(": ")] for sentence in sentences] == [
        f"record 'r{number}' (a.jsonl:{number})" for number in (1, 2, 3, 4)
    ]


# ---- fuzzing ----

PICTURES = {form: encoded(12, 9, form, modes[-1], 6) for form, modes in WRITTEN.items()}


@st.composite
def damaged(draw, whole):
    """A file with some bytes changed, lost, doubled or cut off."""
    data = bytearray(draw(whole))
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        match draw(st.sampled_from(["byte", "word", "lose", "double", "cut"])):
            case "byte":
                data[at : at + 1] = bytes([draw(st.integers(0, 255))])
            case "word":
                data[at : at + 4] = draw(st.sampled_from([b"\xff" * 4, b"\x7f\xff\xff\xff", bytes(4), b"\0\0\0\1"]))
            case "lose":
                del data[at : at + draw(st.integers(1, 16))]
            case "double":
                data[at:at] = data[at : at + draw(st.integers(1, 16))]
            case "cut":
                del data[at:]
    return bytes(data)


def test_damaged_pictures_give_pictures_or_sentences(monkeypatch):
    # A damaged header may announce any size; below the limit it is believed, and so many pixels are decoded.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)

    @settings(max_examples=400, deadline=20_000)
    @given(damaged(st.sampled_from(sorted(PICTURES.values()))) | st.binary(max_size=200))
    def check(data):
        facts = inspect_image(Media(data=data))
        try:
            size = image_size(Media(data=data))
            image = open_image(Media(data=data))
        except MediaError as error:
            assert facts.problem == str(error) and facts.problem.isprintable()
        else:
            assert image.mode == "RGB" and image.size == size == facts.size

    with little_memory(100):
        check()
