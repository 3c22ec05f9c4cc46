"""WebDataset tars: samples by name, their pictures, and tars that are damaged or mean harm."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ovisnb.data import open_image, read_records
from ovisnb.data.record import Media, RecordError
from ovisnb.data.stream import RecordStream
from ovisnb.data.video import open_frames

from .test_stream import TURNS, png, row, write_shard, write_tar, written


def test_samples_of_a_tar(tmp_path):
    turns = [{"from": "human", "value": "<image>?"}, TURNS[1]]
    two = [{"from": "human", "value": "<image><image>?"}, TURNS[1]]
    annotation = {"image_path": "far/away.jpg", "QnA": [{"Q": "What?", "A3": "{Crop cat [1, 1, 4, 4]} A cat."}]}
    path = write_tar(
        tmp_path / "some.tar",
        [
            ("a/1.png", png("red")),
            ("a/1.json", json.dumps({"conversations": turns}).encode()),
            ("2.txt", b"A blue square.\n"),
            ("2.png", png("blue")),
            ("3.0.png", png("red")),
            ("3.1.png", png("blue")),
            ("3.json", json.dumps({"image": ["x/3.1.png", "3.0.png"], "conversations": two}).encode()),
            ("4.json", json.dumps(annotation).encode()),
            ("4.png", png("green")),
            ("4.pyd", b"\x80\x04."),
            (".hidden", b""),
            ("__pycache__/x.pyc", b""),
        ],
    )
    with pytest.raises(
        RecordError, match=rf"^{re.escape(str(path))}:__pycache__/x: the sample has .pyc but no .json or .txt: add one"
    ):
        list(RecordStream(path))
    with tarfile.open(path) as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar.getmembers()[:-1]]
    records = {record.source.rpartition(":")[2]: record for record in RecordStream(write_tar(path, members))}
    colours = {key: [open_image(media).getpixel((0, 0)) for media in record.images] for key, record in records.items()}
    red, green, blue = (255, 0, 0), (0, 128, 0), (0, 0, 255)
    assert colours == {"a/1": [red], "2": [blue], "3": [blue, red], "4": [green, green]}
    assert records["a/1"].id == "a/1" and records["2"].turns[1].text == "A blue square."
    assert records["4"].images[1].box == (1, 1, 4, 4)
    write_tar(path, [("1.pkl", b"\x80\x04."), ("1.png", png("red"))])
    with pytest.raises(
        RecordError, match=f"^{re.escape(str(path))}:1: the sample has .pkl, .png but no .json or .txt; what is pickled"
    ):
        list(RecordStream(path))
    path.write_bytes(write_tar(path, members).read_bytes()[:3000])
    with pytest.raises(RecordError, match=f"^{re.escape(str(path))} is no tar file that can be read"):
        list(RecordStream(path))


def asking(*names, key="image", text="L<image> R<image>?"):
    """A member `.json` whose row lists pictures by these names."""
    turns = [{"from": "human", "value": text}, TURNS[1]]
    return json.dumps({key: list(names), "conversations": turns}).encode()


def told(path, members, **options):
    """The one sentence about a tar of these members, without its name."""
    with pytest.raises(RecordError) as refusal:
        list(RecordStream(write_tar(path, members), **options))
    assert "\n" not in str(refusal.value) and str(path) in str(refusal.value)
    return str(refusal.value).removeprefix(f"{path}:")


def colours(pictures):
    names = {(255, 0, 0): "red", (0, 0, 255): "blue"}
    return [names[picture.convert("RGB").getpixel((0, 0))] for picture in pictures]


@pytest.mark.parametrize(
    "listed", [("left.png", "right.png"), ("b.left.png", "far/b.right.png"), ("left.png", "x.png")]
)
def test_pictures_of_names_in_several_parts(tmp_path, listed):
    members = [("b.right.png", png("blue")), ("b.left.png", png("red")), ("b.json", asking(*listed))]
    [record] = RecordStream(write_tar(tmp_path / "some.tar", members))
    assert colours(map(open_image, record.images)) == ["red", "blue"]


def test_which_picture_is_meant_is_never_guessed(tmp_path):
    members = [("b.0.png", png("blue")), ("b.1.png", png("red")), ("b.json", asking("left.png", "right.png"))]
    said = told(tmp_path / "some.tar", members)
    assert said == "b: which of b.0.png, b.1.png is 'left.png' cannot be told: list pictures by their names in the tar"
    members[1:2] = []
    assert "which of b.0.png is 'left.png'" in told(tmp_path / "some.tar", members)


def test_pictures_that_are_not_listed_lie_in_the_order_of_their_names(tmp_path):
    turns = {"conversations": [{"from": "human", "value": "<image><image><image>?"}, TURNS[1]]}
    colours = {"1.2.png": "red", "1.9.png": "green", "1.10.png": "blue"}
    members = [("1.json", json.dumps(turns).encode()), *((name, png(colour)) for name, colour in colours.items())]
    [record] = RecordStream(write_tar(tmp_path / "some.tar", members))
    assert [open_image(media).getpixel((0, 0))[2] for media in record.images] == [0, 0, 255]
    with pytest.raises(
        RecordError, match="its pictures lie in the order 1.10.png, 1.9.png, 1.2.png, which is not that"
    ):
        list(RecordStream(write_tar(tmp_path / "some.tar", members[::-1])))


def test_frames_of_a_video_lie_in_the_tar_but_no_video_file(tmp_path):
    path = tmp_path / "some.tar"
    row = asking("0.png", "1.png", key="video", text="<video>?")
    [record] = RecordStream(write_tar(path, [("b.1.png", png("blue")), ("b.0.png", png("red")), ("b.json", row)]))
    assert colours(open_frames(record.video)) == ["red", "blue"]
    for members in (
        [("b.mp4", b""), ("b.json", asking("b.mp4", key="video", text="<video>?"))],
        [("b.mp4", b""), ("b.json", json.dumps({"conversations": [{"from": "human", "value": "<video>"}]}).encode())],
        [("b.mp4", b""), ("b.txt", b"A film.")],
    ):
        assert told(path, members).startswith("b: its .mp4 lies in the tar, where no video file is read: ")
    members = [("b.png", png("red")), ("b.mp4", b""), ("b.txt", b"A still.")]
    assert len(list(RecordStream(write_tar(path, members)))) == 1
    outside = [("b.png", png("red")), ("b.json", asking("far/clip.mp4", key="video", text="<video>?"))]
    [record] = RecordStream(write_tar(path, outside))
    assert record.video == [Media(path="far/clip.mp4")]


def test_text_members(tmp_path):
    path, picture, caption = tmp_path / "some.tar", ("b.png", png("red")), ("b.txt", b"A cat.")
    [record] = RecordStream(write_tar(path, [picture, caption, ("b.json", b'{"caption": null, "url": "x"}')]))
    assert record.turns[1].text == "A cat." and record.meta["url"] == "x"
    turns = json.dumps({"conversations": [{"from": "human", "value": "<image>"}, TURNS[1]]}).encode()
    [record] = RecordStream(write_tar(path, [picture, caption, ("b.conversations.json", turns)]))
    assert record.turns[1].text == "Ho"
    [record] = RecordStream(write_tar(path, [picture, ("b.json", turns), ("b.meta.json", b"[]"), ("b.old.json", b"")]))
    assert record.turns[1].text == "Ho"
    said = told(path, [picture, caption, ("b.conversations.json", turns), ("b.meta.json", b"[]")])
    assert said == "b: the sample has .conversations.json, .meta.json but no .json: name the one to be read b.json"


def test_a_box_counts_the_picture_in_the_tar(tmp_path):
    row = {"expression": "the cup", "bbox": [2, 3, 4, 3]}
    members = [("b.png", png("red", (8, 6))), ("b.json", json.dumps(row).encode())]
    [record] = RecordStream(write_tar(tmp_path / "some.tar", members), format="refcoco:xywh")
    assert record.turns[1].text == "<ref>the cup</ref><box>(0.250,0.500),(0.750,0.999)</box>"
    assert open_image(record.images[0]).size == (8, 6)
    row |= {"img_path": "b.png", "bbox_format": "xywh"}
    members = [members[0], ("b.mask.png", png("blue", (99, 99))), ("b.json", json.dumps(row).encode())]
    [record] = RecordStream(write_tar(tmp_path / "some.tar", members))
    assert "(0.250,0.500),(0.750,0.999)" in record.turns[1].text


def test_a_tar_that_is_cut_off_between_members(tmp_path):
    path = written("tar", tmp_path / "some", 10)
    content = path.read_bytes()
    with tarfile.open(path) as tar:
        places = [member.offset for member in tar.getmembers()]
        end = tar.offset
    for length in (places[8], places[8] + 100, places[9], end, end + 100):
        path.write_bytes(content[:length])
        with pytest.raises(RecordError, match="is no tar file that can be read .*cut off.*: replace the file"):
            RecordStream(path)
    path.write_bytes(content[: end + 512])  # some writers leave one block of zeros
    assert len(list(RecordStream(path))) == 10
    path.write_bytes(content[: places[8]] + b"\xff" * 512 + content[places[9] :])
    with pytest.raises(RecordError, match=rf"no header at byte {places[8]:,}"):
        RecordStream(path)


def test_tars_that_are_joined(tmp_path):
    one, two = (
        write_tar(tmp_path / f"{name}.tar", [(f"{name}.png", png("red")), (f"{name}.txt", b"A")]) for name in "ab"
    )
    joined = tmp_path / "both.tar"
    joined.write_bytes(one.read_bytes() + two.read_bytes())
    with pytest.raises(RecordError, match="something follows the end of the archive"):
        RecordStream(joined)
    if shutil.which("tar"):
        shutil.copy(one, joined)
        subprocess.run(["tar", "-A", "-f", joined, two], check=True)
        assert len(list(RecordStream(joined))) == 2


@pytest.mark.parametrize("name", ["x.png", "x.txt"])
def test_a_name_twice_in_a_tar(tmp_path, name):
    members = [("x.png", png("red")), ("x.txt", b"A"), ("y.png", png("red")), ("y.txt", b"A"), (name, b"again")]
    with pytest.raises(RecordError) as refusal:
        RecordStream(path := write_tar(tmp_path / "some.tar", members))
    assert str(refusal.value) == f"{path} holds {name} twice: give each sample a name of its own"


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_bytes_may_be_a_tar(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("tar") / "some.tar"
    content = bytearray(write_shard(path, [row(n) for n in range(3)]).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, 8 * 512))
        with_bytes = data.draw(st.one_of(st.binary(max_size=12), st.just(b"\xff" * 12), st.just(b"\x80" + bytes(11))))
        content[place : place + len(with_bytes)] = with_bytes
        header = place // 512 * 512  # its sum is right again, so that the rest is believed
        if data.draw(st.booleans()):
            block = content[header : header + 512]
            block[148:156] = b" " * 8
            content[header + 148 : header + 156] = b"%06o\0 " % sum(block)
    path.write_bytes(content)
    try:
        for record in RecordStream(path):
            assert record.turns
    except RecordError as error:
        assert str(error).isprintable()


@pytest.mark.parametrize("name", ["\n0.png", "0.\n.pkl", "0.\x1b[31m", "\udcff.png"])
def test_names_of_members_are_told_on_one_line(tmp_path, name):
    path = write_tar(tmp_path / "some.tar", [(name, png("red"))])
    with pytest.raises(RecordError, match="but no .json or .txt") as refusal:
        list(RecordStream(path))
    assert str(refusal.value).isprintable()
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(RecordError, match="is no tar file that can be read") as refusal:
        list(RecordStream(path))
    assert str(refusal.value).isprintable()


def test_a_tar_whose_sizes_lead_back_ends(tmp_path):
    path = write_shard(tmp_path / "some.tar", [row(0)])
    content = bytearray(path.read_bytes())
    content[124:136] = b"\xff" * 11 + b"\x00"  # -256
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:512])
    path.write_bytes(content)
    with pytest.raises(RecordError, match="is no tar file that can be read"):
        list(RecordStream(path))


def test_an_empty_tar_is_a_tar_without_a_record(tmp_path):
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    with pytest.raises(RecordError, match=r"empty\.tar holds no record"):
        list(read_records(tmp_path / "empty.tar"))
