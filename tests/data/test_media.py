from __future__ import annotations

import io
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, PngImagePlugin

from ovisnb.data import Media, MediaError, Record, RecordError, open_image, open_media
from ovisnb.data.media import ImageFolder, image_size


@pytest.fixture
def folder(tmp_path):
    """images/ with a picture whose pixel at (x, y) is (x, y, 0), and a secret beside the folder."""
    images = tmp_path / "images"
    (images / "deep").mkdir(parents=True)
    gradient(40, 30).save(images / "a.png")
    gradient(8, 8).save(images / "deep" / "b.png")
    gradient(5, 5).save(tmp_path / "secret.png")
    return images


def gradient(width: int, height: int) -> Image.Image:
    y, x = np.mgrid[:height, :width].astype(np.uint8)
    return Image.fromarray(np.stack([x, y, np.zeros_like(x)], -1))


def told(path_or_media, folder=None) -> str:
    """The one sentence that refuses the picture."""
    media = path_or_media if isinstance(path_or_media, Media) else Media(path=str(path_or_media))
    with pytest.raises(MediaError) as refusal:
        open_image(media, folder)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def pixels(path, folder=None, **more):
    return np.asarray(open_image(Media(path=str(path), **more), folder))


def test_relative_and_absolute_paths(folder, monkeypatch):
    a = np.asarray(gradient(40, 30))
    np.testing.assert_array_equal(pixels("a.png", folder), a)
    np.testing.assert_array_equal(pixels("deep/../a.png", str(folder)), a)
    np.testing.assert_array_equal(pixels(folder / "a.png", folder), a)
    np.testing.assert_array_equal(pixels(folder / "a.png"), a)
    monkeypatch.chdir(folder)
    np.testing.assert_array_equal(pixels("a.png"), a)
    np.testing.assert_array_equal(pixels("a.png", "."), a)


def test_no_path_leaves_the_image_folder(folder):
    os.symlink(folder.parent / "secret.png", folder / "link.png")
    os.symlink(folder.parent, folder / "up")
    (folder.parent / "images2").mkdir()
    gradient(2, 2).save(folder.parent / "images2" / "c.png")
    outside = ["../secret.png", "deep/../../secret.png", "link.png", "up/secret.png", "../images2/c.png"]
    for path in [*outside, folder.parent / "secret.png", "../nothing-there.png", "/etc/hostname"]:
        sentence = told(path, folder)
        assert "leads out of the image_folder" in sentence and "pass the image_folder that holds" in sentence
    os.symlink(folder / "a.png", folder / "inner.png")
    assert pixels("inner.png", folder).shape == (30, 40, 3)
    assert pixels(folder.parent / "secret.png").shape == (5, 5, 3)  # no folder given, nothing to leave


def test_a_linked_image_folder_is_followed(folder):
    os.symlink(folder, folder.parent / "linked")
    assert pixels("a.png", folder.parent / "linked").shape == (30, 40, 3)
    assert pixels(folder / "a.png", folder.parent / "linked").shape == (30, 40, 3)


def test_a_box_is_cut_from_the_original_and_clipped(folder):
    np.testing.assert_array_equal(
        pixels("a.png", folder, box=(10, 5, 20, 15)), np.asarray(gradient(40, 30))[5:15, 10:20]
    )
    np.testing.assert_array_equal(
        pixels("a.png", folder, box=(30.5, 20.2, 99, 99)), np.asarray(gradient(40, 30))[20:, 30:]
    )
    sentence = told(Media(path="a.png", box=(50, 5, 60, 15)), folder)
    assert "outside the picture of 40x30 pixels" in sentence and "pixels of the original" in sentence
    image = gradient(40, 30)
    np.testing.assert_array_equal(
        np.asarray(open_image(Media(image=image, box=(0, 0, 2, 1)))), np.asarray(image)[:1, :2]
    )


def test_exif_orientation_comes_before_the_box(folder):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side: turn by 90 degrees to see it
    gradient(40, 30).save(folder / "turned.png", exif=exif)
    seen = np.rot90(np.asarray(gradient(40, 30)), -1)
    np.testing.assert_array_equal(pixels("turned.png", folder), seen)
    np.testing.assert_array_equal(pixels("turned.png", folder, box=(0, 30, 30, 40)), seen[30:])


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_any_mode_becomes_rgb(folder, mode):
    suffix = "tif" if mode == "CMYK" else "png"
    gradient(16, 16).convert(mode).save(folder / f"m.{suffix}")
    image = open_image(Media(path=f"m.{suffix}"), folder)
    assert image.mode == "RGB" and image.size == (16, 16)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "bmp", "tif", "ppm", "jp2", "mpo"])
def test_formats(folder, suffix):
    several = {"save_all": True, "append_images": [gradient(16, 16)]} if suffix == "mpo" else {}
    gradient(16, 16).save(folder / f"f.{suffix}", **several)
    assert pixels(f"f.{suffix}", folder).shape == (16, 16, 3)


def test_sixteen_bit_grey_keeps_its_range(folder):
    Image.fromarray((np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)).save(folder / "deep.png")
    np.testing.assert_array_equal(pixels("deep.png", folder)[..., 1].ravel(), np.arange(256))
    Image.fromarray(np.ones((4, 4), np.float32)).save(folder / "float.tif")
    assert "32-bit pixels (mode F)" in told("float.tif", folder)


def test_missing_picture(folder, tmp_path):
    assert told("no.png", folder).startswith(f"there is no picture at {folder / 'no.png'}")
    assert "pass the image_folder it lies in" in told("no-such-file.png")
    assert "is not a file" in told("deep", folder)
    assert f"the image_folder {tmp_path / 'gone'} is not a folder" in told("a.png", tmp_path / "gone")
    assert "cannot be followed" in told("a\0.png", folder)
    assert "cannot be followed" in told("x" * 5000, folder)
    os.symlink("loop.png", folder / "loop.png")
    assert "loop.png" in told("loop.png", folder)


def test_a_pipe_is_not_waited_for(folder):
    os.mkfifo(folder / "pipe.png")
    assert "is not a file" in told("pipe.png", folder)


def test_unreadable_pictures(folder):
    (folder / "text.png").write_text("not a picture")
    assert "no picture in a format read here" in told("text.png", folder)
    (folder / "empty.png").write_bytes(b"")
    assert "empty.png is empty (0 bytes)" in told("empty.png", folder)
    (folder / "post.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    assert "no picture in a format read here" in told("post.png", folder)  # never handed to Ghostscript
    for name in ("cut.png", "cut.jpg"):
        noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
        noise.save(folder / name)
        (folder / name).write_bytes((folder / name).read_bytes()[:1000])
        assert f"{name} cannot be read as a picture" in told(name, folder)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bomb(folder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    assert "a.png is too large to open safely" in told("a.png", folder)


def test_open_media_names_the_record(folder):
    data = {"id": "cat", "image": ["a.png", "no.png"], "conversations": [{"from": "human", "value": "<image><image>"}]}
    with pytest.raises(RecordError, match=r"^record 'cat' \(train\.json:4\): image 2: there is no picture at "):
        open_media(Record.from_dict(data, source="train.json:4"), folder)
    data = {"video": ["a.png", "../a.png"], "conversations": [{"from": "human", "value": "<video>"}]}
    with pytest.raises(MediaError, match=r"^record 'record-0': frame 2: the path '\.\./a\.png' leads out"):
        open_media(Record.from_dict(data), folder)


def test_open_media_gives_images_and_frames(folder):
    data = {
        "image": ["a.png", {"path": "a.png", "box": [0, 0, 4, 3]}, gradient(7, 6)],
        "video": ["deep/b.png", "a.png"],
        "conversations": [{"from": "human", "value": "<image><image><image><video>"}],
    }
    images, frames = open_media(Record.from_dict(data), folder)
    assert [image.size for image in images] == [(40, 30), (4, 3), (7, 6)]
    assert [frame.size for frame in frames] == [(8, 8), (40, 30)]
    assert {image.mode for image in images + frames} == {"RGB"}
    nothing = Record.from_dict({"conversations": [{"from": "human", "value": "Hi"}]})
    assert open_media(nothing, folder) == ([], None)


def test_a_file_is_read_once_for_all_its_crops(folder, monkeypatch):
    opened, pillow_open = [], Image.open
    monkeypatch.setattr(Image, "open", lambda path, **more: opened.append(path) or pillow_open(path, **more))
    crops = [{"path": "a.png", "box": [0, 0, n, n]} for n in (2, 3, 4)]
    data = {"image": ["a.png", *crops], "conversations": [{"from": "human", "value": "<image>" * 4}]}
    images, _ = open_media(Record.from_dict(data), folder)
    assert len(opened) == 1 and [image.width for image in images] == [40, 2, 3, 4]


# Formats with a mode that they hold, and the options that put an orientation into the file.
WRITTEN = {
    "JPEG": ("RGB", "L", "CMYK"),
    "MPO": ("RGB",),
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "WEBP": ("RGB", "RGBA"),
    "TIFF": ("1", "L", "P", "RGB", "CMYK", "I;16"),
    "GIF": ("L", "P"),
    "BMP": ("1", "L", "P", "RGB"),
    "PPM": ("1", "L", "RGB", "I"),
    "JPEG2000": ("L", "RGB", "I;16"),
}


def encoded(width: int, height: int, form: str, mode: str, turn: int, tag: str = "exif") -> bytes:
    """A picture file that says, in EXIF or in XMP, that it has to be turned."""
    image = gradient(width, height).convert("I" if mode.startswith("I") else mode)
    image = image.convert(mode) if image.mode != mode else image
    exif, more, file = Image.Exif(), {}, io.BytesIO()
    exif[0x0112] = turn
    xmp = f'<x:xmpmeta><rdf:Description tiff:Orientation="{turn}"/></x:xmpmeta>'
    if form in ("JPEG", "PNG", "WEBP", "TIFF"):
        more = {"exif": exif} if tag == "exif" else {"xmp": xmp.encode()}
    if form == "PNG" and tag == "xmp":
        more = {"pnginfo": PngImagePlugin.PngInfo()}
        more["pnginfo"].add_itxt("XML:com.adobe.xmp", xmp)
    if form == "TIFF" and tag == "xmp":
        more = {"tiffinfo": {700: xmp.encode()}}
    if form == "MPO":
        more = {"save_all": True, "append_images": [gradient(3, 3)]}
    image.save(file, form, **more)
    return file.getvalue()


def behind_the_pixels(png: bytes) -> bytes:
    """The same PNG with its text and EXIF behind the pixels, where many programs write them."""
    chunks, at = [], 8
    while at < len(png):
        length = int.from_bytes(png[at : at + 4], "big")
        chunks.append(png[at : at + length + 12])
        at += length + 12
    last = [chunk for chunk in chunks if chunk[4:8] in (b"eXIf", b"iTXt", b"IEND")]
    return png[:8] + b"".join([chunk for chunk in chunks if chunk not in last] + sorted(last, key=b"IEND".__eq__))


@st.composite
def media(draw) -> Media:
    width, height = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    form = draw(st.sampled_from(sorted(WRITTEN)))
    turn, tag = draw(st.integers(0, 9)), draw(st.sampled_from(["exif", "xmp"]))
    data = encoded(width, height, form, draw(st.sampled_from(WRITTEN[form])), turn, tag)
    if form == "PNG" and draw(st.booleans()):
        data = behind_the_pixels(data)
    number, box, count = st.floats(-5, 50), None, draw(st.sampled_from(["pixels", "normalised", "thousand"]))
    if draw(st.booleans()):
        x1, y1, x2, y2 = (draw(number) for _ in range(4))
        scale = {"pixels": 1, "normalised": 0.02, "thousand": 20}[count]
        box = [scale * side for side in (min(x1, x2), min(y1, y2), max(x1, x2) + 1, max(y1, y2) + 1)]
    if draw(st.booleans()):
        return Media(data=data, box=box, coordinates=count)
    image = Image.open(io.BytesIO(data))
    if draw(st.booleans()):
        image.load()
    return Media(image=image, box=box, coordinates=count)


@settings(max_examples=300, deadline=None)
@given(media())
def test_the_size_is_that_of_the_opened_picture(media):
    if media.data is not None:  # from a file, too: Pillow reads some formats in other ways then
        with TemporaryDirectory() as folder:
            (file := Path(folder, "a")).write_bytes(media.data)
            whole = open_image(Media(path=str(file)))
            assert image_size(Media(path=str(file))) == whole.size
        np.testing.assert_array_equal(whole, open_image(Media(data=media.data)))
    try:
        size = image_size(media)
    except MediaError as refused:
        assert str(refused) == told(media)
    else:
        assert open_image(media).size == size


@pytest.mark.parametrize("form", sorted(WRITTEN))
def test_the_size_is_read_without_decoding(folder, form):
    (folder / "a").write_bytes(encoded(30, 20, form, WRITTEN[form][0], 6))
    Image.new(WRITTEN[form][0], (30, 20)).save(folder / "plain", form)
    turned = form in ("JPEG", "PNG", "WEBP", "TIFF")
    decoding = AssertionError("the pixels were decoded")
    with mock.patch.object(ImageFile.ImageFile, "load", side_effect=decoding):
        assert image_size(Media(path="a"), folder) == ((20, 30) if turned else (30, 20))
        assert image_size(Media(path="plain"), folder) == (30, 20)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_the_size_is_refused_as_the_picture_is(folder, monkeypatch):
    (folder / "text.png").write_text("not a picture")
    (folder / "empty.png").touch()
    Image.fromarray(np.ones((4, 4), np.float32)).save(folder / "float.tif")
    cases = ["text.png", "empty.png", "float.tif", "no.png", "deep", "../secret.png", "a\0.png"]
    for media in [*(Media(path=path) for path in cases), Media(path="a.png", box=(50, 5, 60, 15))]:
        with pytest.raises(MediaError) as refusal:
            image_size(media, folder)
        assert str(refusal.value) == told(media, folder)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(MediaError, match=r"a\.png is too large to open safely \(40x30 pixels, more than 1,000\)"):
        image_size(Media(path="a.png"), folder)


def test_an_opened_picture_is_not_turned_twice(folder):
    (folder / "turned.jpg").write_bytes(encoded(30, 20, "JPEG", "RGB", 6))
    seen = open_image(Media(path="turned.jpg"), folder)
    assert seen.size == (20, 30) == open_image(Media(image=seen)).size == image_size(Media(image=seen))


def test_absolute_paths_are_taken_where_they_are_allowed(folder):
    secret, strict, free = folder.parent / "secret.png", ImageFolder(folder), ImageFolder(folder, allow_absolute=True)
    assert pixels(secret, free).shape == (5, 5, 3)
    assert pixels("a.png", free).shape == pixels("a.png", strict).shape == (30, 40, 3)
    assert "or allow absolute paths" in told(secret, strict)
    os.symlink(secret, folder / "link.png")
    for path in ("../secret.png", "link.png"):
        assert "leads out of the image_folder" in told(path, free)
        assert "allow" not in told(path, strict)  # which would not help
    assert "no picture at /nowhere/a.png" in told("/nowhere/a.png", free)
    assert str(free) == os.fspath(free) == str(folder)


def test_paths_that_mean_something_elsewhere(folder):
    for path in ("file:///etc/hostname", "http://localhost/a.png", "data:/a", "FILE:/etc/hostname"):
        assert "is a URL, and nothing is downloaded" in told(path, folder) and "is a URL" in told(path)
    for path in ("~/a.png", "~root/a.png", "~"):
        assert "which is not expanded" in told(path, folder)
    for path in ("C:\\a.png", "C:/a.png", "C:a.png", "\\\\server\\share\\a.png", "deep\\b.png", "..\\..\\a.png"):
        assert "is written as on Windows" in told(path, folder)
    (folder / "~a.png").write_bytes((folder / "a.png").read_bytes())  # an ordinary name
    assert pixels("~a.png", folder).shape == (30, 40, 3)
    for path in ("x" * 5000, "a/" * 3000, "a\0.png", "\udc80\n\u202egnp.a", "\r\x1b[2J.png"):
        sentence = told(path, folder)
        assert len(sentence) < 700 and sentence.isprintable()


def test_a_record_may_have_a_folder_of_its_own(folder):
    turns = [{"from": "human", "value": "<image>"}]
    record = Record.from_dict({"image": "b.png", "conversations": turns}).model_copy(
        update={"folder": str(folder / "deep")}
    )
    assert open_media(record, folder)[0][0].size == (8, 8) == open_media(record)[0][0].size
    outside = record.model_copy(update={"images": [Media(path=str(folder / "a.png"))]})
    with pytest.raises(MediaError, match="leads out of the image_folder"):
        open_media(outside, folder)
    assert open_media(outside, ImageFolder(folder.parent, allow_absolute=True))[0][0].size == (40, 30)
