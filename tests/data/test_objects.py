from __future__ import annotations

import json

import pytest

from ovisnb.data import RecordError, read_records

ASKED = [
    {"role": "user", "content": "<image>find <ref-object>"},
    {"role": "assistant", "content": "<ref-object><bbox><bbox>"},
]
OBJECTS = {"ref": ["sheep", "sheep"], "bbox": [[90, 160, 135, 212], [360.25, 280, 495, 332]]}


def read(folder, objects, **row):
    path = folder / "data.jsonl"
    path.write_text(json.dumps({"messages": ASKED, "images": ["a.jpg"], "objects": objects, **row}))
    [record] = read_records(path)
    return record


@pytest.mark.parametrize(
    "kind, boxes, counts, written",
    [
        (None, OBJECTS["bbox"], "pixels", "<box>(90,160),(135,212)</box><box>(360.25,280.00),(495.00,332.00)</box>"),
        ("real", [[1, 2, 3, 4], [5, 6]], "pixels", "<box>(1,2),(3,4)</box><point>(5,6)</point>"),
        ("norm1", [[0.1, 0.2, 0.3, 0.4], [0, 0, 1, 0.5]], "normalised",
         "<box>(0.100,0.200),(0.300,0.400)</box><box>(0.000,0.000),(0.999,0.500)</box>"),
        ("norm1000", [[1, 2, 3, 4], [5, 6, 7, 1000]], "thousand", "<box>(1,2),(3,4)</box><box>(5,6),(7,1000)</box>"),
    ],
)  # fmt: skip
def test_objects_stand_where_the_text_has_their_places(tmp_path, kind, boxes, counts, written):
    record = read(tmp_path, {**OBJECTS, "bbox": boxes, "bbox_type": kind})
    assert [turn.text for turn in record.turns] == ["<image>find <ref>sheep</ref>", f"<ref>sheep</ref>{written}"]
    assert record.box_coordinates == counts and record.meta == {}
    said = f"the boxes of `objects` count {counts}: convert them (`ovisnb data convert --boxes normalised`)"
    assert [note.startswith(said) for note in record.notes] == [True] * (counts != "normalised")


@pytest.mark.parametrize(
    "objects, row, part",
    [
        ({**OBJECTS, "ref": ["sheep"]}, {}, "the text holds 2 <ref-object> but `ref` of `objects` has 1"),
        ({"ref": ["a", "b"]}, {}, "the text holds 2 <bbox> but `bbox` of `objects` has 0"),
        ({**OBJECTS, "bbox": 7}, {}, "`bbox` of `objects` is 7"),
        ({**OBJECTS, "bbox": [[1, 2, 3, 4], [1, 2, 3]]}, {}, "`bbox` of `objects` holds [1, 2, 3]: write four"),
        ({**OBJECTS, "bbox_type": "norm1"}, {}, "`bbox` of `objects` holds [90, 160, 135, 212]: a normalised"),
        ({**OBJECTS, "bbox_type": ["norm"]}, {}, "`bbox_type` of `objects` is ['norm']: use real, norm1, norm1000"),
        ({**OBJECTS, "ref": ["a", 3]}, {}, "`ref` of `objects` holds 3"),
        (OBJECTS, {"box_coordinates": "thousand"}, "drop `box_coordinates`"),
    ],
)
def test_objects_that_do_not_match_are_one_sentence(tmp_path, objects, row, part):
    with pytest.raises(RecordError) as refusal:
        read(tmp_path, objects, **row)
    assert part in str(refusal.value) and "\n" not in str(refusal.value)


def test_other_objects_stay_as_they_are(tmp_path):
    for objects in ({"category": [1]}, OBJECTS, 3):
        record = read(tmp_path, objects, messages=[{"role": "user", "content": "q"}])
        assert record.meta == {"objects": objects}


def test_objects_of_turns_of_from_and_value(tmp_path):
    turns = [{"from": "human", "value": "find <ref-object>"}, {"from": "gpt", "value": "<bbox>"}]
    path = tmp_path / "data.jsonl"
    objects = {"ref": ["sheep"], "bbox": [[1, 2, 3, 4]]}
    path.write_text(json.dumps({"conversations": turns, "image": "a.jpg", "objects": objects}))
    [record] = read_records(path)
    assert [turn.text for turn in record.turns] == ["<image>\nfind <ref>sheep</ref>", "<box>(1,2),(3,4)</box>"]
