"""The shipped photographs: readable, small, licensed, free of metadata, and with answers that fit their pictures."""

from __future__ import annotations

import json
import re
from fnmatch import fnmatch
from pathlib import Path

import pytest
from PIL import Image

from ovisnb.data import Record, open_media, read_records

PHOTOS = Path(__file__).parents[2] / "data" / "photos"
ENTRIES = json.loads((PHOTOS / "photos.json").read_text(encoding="utf-8"))
PICTURES = sorted(path.relative_to(PHOTOS).as_posix() for path in PHOTOS.rglob("*.jpg"))

NUMBER = r"(\d\.\d{3})"
BOX = re.compile(rf"<box>\({NUMBER},{NUMBER}\),\({NUMBER},{NUMBER}\)</box>")
POINT = re.compile(rf"<point>\({NUMBER},{NUMBER}\)</point>")
CALL = re.compile(r"<tool_call>(Crop |Identify |)\[([^\]]*)\]</tool_call>(<image>|<tool_response>)")


@pytest.fixture(params=ENTRIES, ids=[entry["id"] for entry in ENTRIES])
def record(request) -> Record:
    return Record.from_dict(request.param, source="photos.json")


def said(record: Record, *roles: str) -> str:
    return "\n".join(turn.text for turn in record.turns if turn.role in roles)


def test_file_is_read_as_it_was_written():
    assert [record.to_dict() for record in read_records(PHOTOS / "photos.json")] == ENTRIES
    ids = [entry["id"] for entry in ENTRIES]
    assert len(ids) == len(set(ids)) and all(entry["kind"] for entry in ENTRIES)


def test_every_form_of_a_record_is_shown():
    records = [Record.from_dict(entry) for entry in ENTRIES]
    kinds = {record.kind for record in records}
    assert kinds >= {"find", "point", "count", "compare", "read", "list", "caption", "video", "text"}
    roles = [turn.role for record in records for turn in record.turns]
    assert roles.count("ignored_gpt") == 1 and roles.count("system") > 2
    assert any(record.video for record in records)
    assert any(not record.images and not record.video for record in records)
    assert any(len({media.path for media in record.images}) > 1 for record in records)
    assert any(len(BOX.findall(said(record, "gpt"))) > 2 for record in records)
    text = "\n".join(said(record, "gpt") for record in records)
    assert "<tool_response>" in text and {call[0] for call in CALL.findall(text)} == {"Crop ", "Identify ", ""}


def test_pictures_of_a_record_open(record):
    images, frames = open_media(record, PHOTOS)
    assert len(images) == len(record.images)
    assert record.video is None or (4 <= len(frames) <= 6 and len({frame.size for frame in frames}) == 1)
    for media, image in zip(record.images, images):
        assert image.mode == "RGB"
        if media.box:
            x1, y1, x2, y2 = media.box
            assert image.size == (x2 - x1, y2 - y1)


def test_boxes_and_points_are_strict_and_in_bounds(record):
    text = said(record, "human", "gpt")
    boxes, points = BOX.findall(text), POINT.findall(text)
    assert len(boxes) == text.count("<box>") == text.count("</box>")
    assert len(points) == text.count("<point>") == text.count("</point>")
    for x1, y1, x2, y2 in (map(float, box) for box in boxes):
        assert 0 <= x1 < x2 < 1 and 0 <= y1 < y2 < 1
    assert all(float(number) < 1 for point in points for number in point)


def test_grounding_questions_say_which_form_they_want(record):
    for question, answer in zip(record.turns, record.turns[1:]):
        if question.role == "human" and "<ref>" in question.text:
            form = "bounding box" if BOX.search(answer.text) else "point"
            assert question.text.endswith(f"Please provide the {form} coordinates.")
            asked = re.findall(r"<ref>(.*?)</ref>", question.text)
            assert asked == re.findall(r"<ref>(.*?)</ref>", answer.text)


def test_objects_are_the_boxes_of_the_answers(record):
    answered = [list(map(float, box)) for box in BOX.findall(said(record, "gpt"))]
    assert [thing["box"] for thing in record.meta.get("objects", [])] == answered
    pointed = [list(map(float, point)) for point in POINT.findall(said(record, "gpt"))]
    assert record.meta.get("points", []) == pointed


def test_crops_are_the_boxes_that_were_asked_for(record):
    text = said(record, "gpt")
    calls = CALL.findall(text)
    assert len(calls) == text.count("<tool_call>") == text.count("</tool_call>")
    assert all((name == "Identify ") == (follows == "<tool_response>") for name, _, follows in calls)
    cropped = [tuple(map(float, box.split(","))) for name, box, _ in calls if name != "Identify "]
    assert cropped == [media.box for media in record.images if media.box]
    for _, box, _ in calls:
        width, height = Image.open(PHOTOS / record.images[0].path).size
        x1, y1, x2, y2 = map(int, box.split(","))
        assert 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height
    assert not calls or record.turns[0].role == "system", "the system turn tells about the tools"


def test_thinking_is_closed_and_followed_by_an_answer(record):
    for turn in record.turns:
        if turn.role == "gpt" and "<think>" in turn.text:
            assert re.fullmatch(r"<think>\n(.+)\n</think>\n\n<answer>.+</answer>", turn.text, re.DOTALL)


@pytest.mark.parametrize("name", PICTURES)
def test_picture_has_a_licence_and_no_metadata(name):
    rows = [
        row.split("|") for row in (PHOTOS / "README.md").read_text(encoding="utf-8").splitlines() if row[:3] == "| `"
    ]
    [row] = [row for row in rows if fnmatch(name, row[1].strip().strip("`"))]
    assert row[4].strip() in ("CC0", "public domain") and row[3].strip() and row[5].strip()
    with Image.open(PHOTOS / name) as image:
        assert image.format == "JPEG" and max(image.size) <= 640
        assert set(image.info) <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}
        assert not image.getexif()


def test_every_picture_is_used_and_all_is_small():
    records = [Record.from_dict(entry) for entry in ENTRIES]
    assert {media.path for record in records for media in [*record.images, *(record.video or [])]} == set(PICTURES)
    assert sum(path.stat().st_size for path in PHOTOS.rglob("*") if path.is_file()) < 3_000_000
