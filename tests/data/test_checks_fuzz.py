"""Validation of anything at all: it never raises, and reports whatever reading refuses."""

from __future__ import annotations

import json

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ovisnb.data import RecordError, read_records
from ovisnb.data.checks import validate
from ovisnb.data.formats.info import is_info
from tests.data.test_checks import box_of, talk

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8)
    | st.sampled_from(["<image>", "<box>", "(0.1,0.2)", "human", "gpt", "<tool_call>[1,2,3,4]</tool_call>", "good.png"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(["id", "image", "video", "conversations", "from", "value", "box", "path", "kind", "split"])
        | st.sampled_from(["box_coordinates", "coordinates", "role", "content", "messages", "image_path", "QnA", "Q"])
        | st.sampled_from(["A3", "caption", "images", "annotations", "categories", "bbox_xyxy", "sent", "meta_file"])
        | st.text(max_size=3),
        inner,
        max_size=4,
    ),
    max_leaves=12,
)  # fmt: skip


def refused(path, folder) -> bool:
    try:
        list(read_records(path, image_folder=folder))
    except RecordError:
        return True
    return False


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows=st.lists(JSON, min_size=1, max_size=3))
def test_any_json_is_checked_and_whatever_reading_refuses_is_reported(tmp_path, pictures, rows):
    path = tmp_path / "any.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    try:
        report = validate(path, pictures)
    except RecordError as error:
        assert refused(path, pictures)
        assert is_info(path) or "holds no record" in str(error)  # a data-info file that names no files, `[]`
        return
    assert len(list(report)) == len(report) and report.text()
    assert not (refused(path, pictures) and report.clean)


GOOD = talk(
    "<image>\nWhere? Please provide the bounding box coordinates.",
    f"<think>\nI look.\n<tool_call>Crop [1,2,30,40]</tool_call><image>\n</think>\n<answer>{box_of(0.1, 0.2, 0.3, 0.4)}</answer>",
    id="good",
    image="good.png",
)  # fmt: skip


def spots(value, at=()):
    """Where in a value something can be changed."""
    yield at
    if isinstance(value, (dict, list)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from spots(inner, (*at, key))


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_record_with_one_piece_changed_is_reported_if_it_is_refused(tmp_path, pictures, data):
    entry = json.loads(json.dumps(GOOD))
    *way, last = data.draw(st.sampled_from([spot for spot in spots(entry) if spot]))
    piece = entry
    for key in way:
        piece = piece[key]
    old = piece[last]
    if data.draw(st.booleans()):
        del piece[last]
    elif isinstance(old, str) and data.draw(st.booleans()):
        start = data.draw(st.integers(0, len(old)))
        piece[last] = (
            old[:start]
            + data.draw(st.text(st.characters(), max_size=3))
            + old[data.draw(st.integers(start, len(old))) :]
        )
    else:
        piece[last] = data.draw(JSON)
    path = tmp_path / "mutated.json"
    path.write_text(json.dumps([entry]))
    report = validate(path, pictures)
    assert not (refused(path, pictures) and report.clean)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=st.binary(max_size=60), name=st.sampled_from(["any.json", "any.jsonl"]))
def test_any_bytes_are_checked(tmp_path, text, name):
    path = tmp_path / name
    path.write_bytes(text)
    try:
        report = validate(path)
    except RecordError:
        assert refused(path, None)
    else:
        assert not (refused(path, None) and report.clean)
