"""WebDataset tars: samples by name, their pictures, and tars that are damaged or mean harm."""

from __future__ import annotations

import json
import re
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ovisnb.data import open_image
from ovisnb.data.record import RecordError
from ovisnb.data.stream import RecordStream

from .test_stream import TURNS, png, row, write_shard, write_tar


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
