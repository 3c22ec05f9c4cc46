from __future__ import annotations

import json

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from ovisnb.data import Media, Record, RecordError, read_records
from ovisnb.data.boxes import convert, iou
from ovisnb.data.formats import read_entries
from ovisnb.data.markup import regions

IMAGES = [
    {"id": 1, "file_name": "a.jpg", "width": 200, "height": 100},
    {"id": 2, "file_name": "b.jpg", "width": 10, "height": 10},
]
CATEGORIES = [{"id": 18, "name": "dog"}, {"id": 7, "name": "cat"}]


def box(number, category, numbers, image=1, **more) -> dict:
    return {"id": number, "image_id": image, "category_id": category, "bbox": numbers, "iscrowd": 0, **more}


def write(folder, annotations, images=IMAGES, categories=CATEGORIES):
    path = folder / "instances.json"
    path.write_text(json.dumps({"info": {}, "images": images, "annotations": annotations, "categories": categories}))
    return path


def coco(folder, *annotations, format=None, image_folder=None, **file) -> list[Record]:
    return list(read_records(write(folder, list(annotations), **file), format=format, image_folder=image_folder))


def problems(path, **options) -> list[str]:
    return [row.problem for row in read_entries(path, **options) if row.problem]


def said(record: Record) -> list[str]:
    return [turn.text for turn in record.turns]


def test_a_question_for_each_category_of_each_picture(tmp_path):
    records = coco(
        tmp_path,
        box(1, 18, [20, 50, 40, 20]),
        box(2, 7, [0, 0, 100, 50]),
        box(3, 18, [100, 10, 20, 30]),
        box(4, 7, [1, 1, 5, 5], image=2),
    )
    assert [record.id for record in records] == ["1-18", "1-7", "2-7"]
    assert said(records[0]) == [
        "<image>\nFind every <ref>dog</ref>. Please provide the bounding box coordinates.",
        "<ref>dog</ref>[<box>(0.500,0.100),(0.600,0.400)</box>,<box>(0.100,0.500),(0.300,0.700)</box>]",
    ]
    assert said(records[1])[1] == "<ref>cat</ref><box>(0.000,0.000),(0.500,0.500)</box>"
    assert records[2].images == [Media(path="b.jpg")] and records[2].kind == "find"
    assert records[1].meta == {"objects": [{"name": "cat", "box": [0.0, 0.0, 0.5, 0.5]}]}
    assert records[0].box_coordinates == "normalised" and records[0].notes == ()


def test_points_and_both(tmp_path):
    annotations = [box(1, 18, [20, 50, 40, 20]), box(3, 18, [100, 10, 20, 30])]
    [record] = coco(tmp_path, *annotations, format="coco:point")
    assert said(record) == [
        "<image>\nFind every <ref>dog</ref>. Please provide the point coordinates.",
        "<ref>dog</ref>[<point>(0.550,0.250)</point>,<point>(0.200,0.600)</point>]",
    ]
    both = coco(tmp_path, *annotations, format="coco:find,point")
    assert [(one.id, one.kind) for one in both] == [("1-18", "find"), ("1-18-point", "point")]
    for format, part in {
        "coco:xyxy": "no choice 'xyxy'",
        "refcoco:xyxy,xywh": "contradict",
        "records:x": "is unknown",
    }.items():
        with pytest.raises(RecordError, match=part):
            coco(tmp_path, format=format)


def test_boxes_that_reach_outside_are_cut_and_reported(tmp_path):
    [record] = coco(tmp_path, box(1, 18, [150, -5, 100, 50]))
    assert said(record)[1] == "<ref>dog</ref><box>(0.750,0.000),(0.999,0.450)</box>"
    assert record.notes == (
        "annotation 1: its box [150, -5, 250, 45] reaches outside the picture of 200x100: it was cut to [150, 0, 200, 45]",
    )
    assert record.notes[0].kind == "box_outside"
    assert coco(tmp_path, box(1, 18, [150, 0, 50.1, 50]))[0].notes == ()  # less than three decimals can say


def test_boxes_without_area_are_left_out_and_named(tmp_path):
    good = box(1, 18, [20, 50, 40, 20])
    [record] = coco(
        tmp_path, good, box(2, 18, [20, 50, 0, 20]), box(3, 18, [300, 50, 10, 20]), box(4, 18, [9, 9, 0.01, 9])
    )
    assert said(record)[1].count("<box>") == 1
    assert record.notes == (
        "annotation 2: its box [20, 50, 20, 70] has no area: it is left out",
        "annotation 3: its box [300, 50, 310, 70] lies outside the picture of 200x100: it is left out",
        "annotation 4: its box [9, 9, 9.01, 18] is too thin on the picture of 200x100 to be written: it is left out",
    )
    path = write(tmp_path, [box(2, 7, [20, 50, 0, 20]), good])
    rows = list(read_entries(path))
    assert [note.kind for note in record.notes] == ["empty_box", "box_outside", "empty_box"]
    assert rows[0].entry["id"] == "1-18" and rows[1].error.kind == "empty_box"
    assert "annotation 2: its box [20, 50, 20, 70] has no area, and no other box of its kind is left" in rows[1].problem
    with pytest.raises(RecordError, match=r"instances.json:1: annotation 2"):
        list(read_records(path))


def test_a_crowd_leaves_its_question_out(tmp_path):
    records = coco(tmp_path, box(1, 18, [1, 1, 9, 9]), box(2, 7, [1, 1, 9, 9]), box(3, 7, [1, 1, 90, 9], iscrowd=1))
    assert [record.id for record in records] == ["1-18"]
    assert records[0].notes == ("no question about 'cat': annotation 3 is a crowd (iscrowd)",)
    images = [{**IMAGES[0], "not_exhaustive_category_ids": [7]}]  # LVIS
    [record] = coco(tmp_path, box(1, 18, [1, 1, 9, 9]), box(2, 7, [1, 1, 9, 9]), images=images)
    assert record.id == "1-18" and record.notes[0].startswith("no question about 'cat': not every one has a box")


def test_one_question_for_what_has_one_name_or_one_file(tmp_path):
    annotations = [box(1, 18, [20, 50, 40, 20]), box(2, 7, [100, 10, 20, 30]), box(3, 18, [1, 1, 5, 5], image=2)]
    [record, _] = coco(tmp_path, *annotations, categories=[{"id": 18, "name": "car"}, {"id": 7, "name": " car"}])
    assert record.id == "1-18" and said(record)[1].count("<box>") == 2
    same = [IMAGES[0], {**IMAGES[0], "id": 2}]
    dogs, _ = coco(tmp_path, *annotations, images=same)
    assert dogs.id == "1-18" and said(dogs)[1].count("<box>") == 2
    with pytest.raises(RecordError, match="images 1 and 2 are one file of two sizes"):
        coco(tmp_path, *annotations, images=[IMAGES[0], {**IMAGES[1], "file_name": "a.jpg"}])
    captioned = [{**image, "caption": caption} for image, caption in zip(same, ("a dog", "it is left"))]
    spans = [box(n, 1, [9, 9, 9, 9], image=n, tokens_positive=[[0, 5]]) for n in (1, 2)]
    assert [record.id for record in coco(tmp_path, *spans, images=captioned)] == ["1-0-5", "2-0-5"]


def test_corners_of_detectron2(tmp_path):
    [record] = coco(tmp_path, box(1, 18, [20, 50, 60, 90], bbox_mode=0))
    assert said(record)[1] == "<ref>dog</ref><box>(0.100,0.500),(0.300,0.900)</box>"


@pytest.mark.parametrize(
    "annotations, part",
    [
        ([box(1, 18, [1, 1, 9, 9], iscrowd=1)], "no question comes of this file: all it has are crowds"),
        ([], "no question comes of this file"),
        ([{"id": 1, "image_id": 1, "caption": "A dog."}], "a COCO captions file, .*read them as captions"),
        ([{"image_id": 1, "file_name": "a.png", "segments_info": []}], "a COCO panoptic file, .*bring instances"),
    ],
)
def test_a_file_of_which_no_question_comes(tmp_path, annotations, part):
    with pytest.raises(RecordError, match=part):
        coco(tmp_path, *annotations)


@pytest.mark.parametrize(
    "annotation, part",
    [
        (box(5, 18, [1, 1, 5, 5], image=9), "annotation 5: there is no image 9 in `images`"),
        (box(5, 99, [1, 1, 5, 5]), "annotation 5: there is no category 99 in `categories`"),
        (box(5, 18, [1, 1, 5]), "annotation 5: its box is [1, 1, 5]: a box is four numbers"),
        (box(5, 18, [1, 1, 5, float("nan")]), "a box is four numbers"),
        (box(5, 18, None), "its box is None"),
    ],
)
def test_a_broken_annotation_is_named_and_the_others_follow(tmp_path, annotation, part):
    path = write(tmp_path, [annotation, box(6, 7, [1, 1, 5, 5])])
    assert [row.entry["id"] for row in read_entries(path) if row.entry] == ["1-7"]
    [problem] = problems(path)
    assert part in problem


def test_a_broken_file_is_one_sentence(tmp_path):
    for file, part in [
        ({"images": 3}, "`images` is 3: a COCO file has a list there"),
        ({"images": [*IMAGES, IMAGES[0]]}, "`images` has the id 1 twice"),
        ({"categories": [{"name": "dog"}]}, "entry 1 of `categories` is no object with an `id`"),
        ({"categories": [{"id": 18, "name": "a<b"}]}, "holds < or >"),
        ({"images": [{"id": 1, "width": 5, "height": 5}]}, "image 1: the key `file_name` is missing"),
        ({"images": [{**IMAGES[0], "width": "wide"}]}, "image 1: `width` is 'wide'"),
    ]:
        [problem] = problems(write(tmp_path, [box(5, 18, [1, 1, 5, 5])], **file))
        assert part in problem


def test_the_size_comes_from_the_header_where_the_file_has_none(tmp_path):
    picture = Image.new("RGB", (50, 100))
    exif = Image.Exif()
    exif[0x0112] = 6  # on its side: seen as 100x50
    picture.save(tmp_path / "a.jpg", exif=exif)
    images = [{"id": 1, "file_name": "a.jpg"}]
    [record] = coco(tmp_path, box(1, 18, [50, 25, 50, 25]), images=images, image_folder=tmp_path)
    assert said(record)[1] == "<ref>dog</ref><box>(0.500,0.500),(0.999,0.999)</box>"
    [problem] = problems(
        write(tmp_path, [box(1, 18, [1, 1, 5, 5])], [{"id": 1, "file_name": "no.jpg"}]), image_folder=tmp_path
    )
    assert "image 1: there is no picture at" in problem


def test_the_phrases_of_a_caption(tmp_path):
    images = [{"id": 1, "file_name": "a.jpg", "width": 100, "height": 100, "caption": "a dog and the cat"}]
    more = {"images": images, "categories": []}
    records = coco(
        tmp_path,
        box(1, 1, [0, 0, 50, 50], tokens_positive=[[0, 5]]),
        box(2, 1, [50, 0, 50, 50], tokens_positive=[[10, 17]]),
        **more,
    )
    assert [said(record)[0].split("\n")[1].split(".")[0] for record in records] == [
        "Find <ref>a dog</ref>",
        "Find <ref>the cat</ref>",
    ]
    path = write(tmp_path, [box(1, 1, [0, 0, 50, 50], tokens_positive=[["a", 5]])], **more)
    assert "`tokens_positive` is [['a', 5]]: a list of [start, end] in the caption" in problems(path)[0]


REFERRED = {"image": "a.jpg", "width": 200, "height": 100, "sent": "left dog", "bbox": [20, 50, 60, 90]}


def refcoco(folder, *rows, **options) -> list[Record]:
    path = folder / "refcoco.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return list(read_records(path, **options))


def test_a_box_of_which_nothing_is_said_is_an_error_whatever_its_numbers_allow(tmp_path):
    for numbers in ([20, 50, 60, 90], [20, 50, 40, 40]):
        said_so = r"refcoco.jsonl:1: nothing says .*--format refcoco:xywh or --format refcoco:xyxy"
        with pytest.raises(RecordError, match=said_so):
            refcoco(tmp_path, {**REFERRED, "bbox": numbers})


def test_a_box_says_what_it_is(tmp_path):
    corners, sides = "<box>(0.100,0.500),(0.300,0.900)</box>", "<box>(0.100,0.500),(0.400,0.999)</box>"
    rest = {key: value for key, value in REFERRED.items() if key != "bbox"}
    for row, format, expected in [
        (REFERRED, "refcoco:xyxy", corners),
        (REFERRED, "refcoco:xywh", sides),
        ({**rest, "bbox_xyxy": [20, 50, 60, 90]}, None, corners),
        ({**rest, "box_xywh": [20, 50, 40, 40]}, None, corners),
        ({**REFERRED, "bbox_format": "XYXY_ABS"}, None, corners),
        ({**REFERRED, "bbox_mode": "xywh"}, "refcoco:xyxy", sides),  # the row knows better
        ({**REFERRED, "bbox_mode": 0}, None, corners),
        ({**REFERRED, "raw_anns": '{"bbox": [20, 50, 40, 40]}'}, None, corners),
        ({**REFERRED, "raw_anns": {"bbox": [20, 50, 60, 90]}}, None, sides),
        ({**rest, "bbox": [0.1, 0.5, 0.3, 0.9]}, "refcoco:xyxy,normalised", corners),
        ({**rest, "bbox": [100, 500, 200, 400]}, "refcoco:xywh,thousand", corners),
    ]:
        [record] = refcoco(tmp_path, row, format=format)
        assert said(record) == [
            "<image>\nFind the <ref>left dog</ref>. Please provide the bounding box coordinates.",
            f"<ref>left dog</ref>{expected}",
        ]


def test_a_question_for_each_expression(tmp_path):
    row = {"file_name": "a.jpg", "width": 200, "height": 100, "bbox_xyxy": [20, 50, 60, 90], "ref_id": 4, "id": 9}
    for said_as in (["left dog", "the dog."], [{"sent": "left dog", "tokens": []}, {"raw": "the dog."}]):
        records = refcoco(tmp_path, {**row, "sentences": said_as}, format="refcoco:find,point")
        assert [record.id for record in records] == ["9-0", "9-0-point", "9-1", "9-1-point"]
        assert said(records[3])[0] == "<image>\nFind <ref>the dog</ref>. Please provide the point coordinates."
        assert said(records[3])[1] == "<ref>the dog</ref><point>(0.200,0.700)</point>"
        assert records[0].meta["ref_id"] == 4 and records[0].images == [Media(path="a.jpg")]
    [record] = refcoco(tmp_path, {**row, "phrase": "dogs", "bbox_xyxy": [[20, 50, 60, 90], [0, 0, 10, 10]]})
    assert said(record)[1].count("<box>") == 2


def test_a_box_for_each_name(tmp_path):
    row = {"image": "a.jpg", "width": 100, "height": 100, "id": 9, "bbox_xyxy": [[0, 0, 30, 40], [50, 60, 70, 80]]}
    dog, cat = refcoco(tmp_path, {**row, "phrases": ["a dog", "the cat"]})
    assert said(dog)[1] == "<ref>a dog</ref><box>(0.000,0.000),(0.300,0.400)</box>"
    assert said(cat)[1] == "<ref>the cat</ref><box>(0.500,0.600),(0.700,0.800)</box>"
    assert (dog.id, cat.id) == ("9-0", "9-1")
    [both] = refcoco(tmp_path, {**row, "phrases": ["a dog", "a dog"]})  # one question, not two that contradict
    assert said(both)[1].count("<box>") == 2
    with pytest.raises(RecordError, match="`phrases` has 3 names and `bbox_xyxy` 2 boxes: give a box for each name"):
        refcoco(tmp_path, {**row, "phrases": ["a", "b", "c"]})


def test_shares_are_no_pixels(tmp_path):
    row = {**REFERRED, "bbox": [0.1, 0.2, 0.5, 0.6]}
    for format in ("refcoco:xyxy", "refcoco:xywh", "refcoco:xyxy,thousand"):
        with pytest.raises(
            RecordError, match="shares of a picture .*read the file with --format refcoco:xy..,normalised"
        ) as refusal:
            refcoco(tmp_path, row, format=format)
        assert refusal.value.kind == "unreadable_box"
    assert refcoco(tmp_path, row, format="refcoco:xyxy,normalised")
    with pytest.raises(
        RecordError, match=r"annotation 1: its box is \[0.1, 0.1, 0.4, 0.5\], which are shares .*multiply by"
    ):
        coco(tmp_path, box(1, 18, [0.1, 0.1, 0.4, 0.5]))


def test_the_rows_size_is_held_against_the_picture(tmp_path):
    Image.new("RGB", (200, 100)).save(tmp_path / "a.jpg")
    images = [{"id": 1, "file_name": "a.jpg", "width": 100, "height": 200}]
    with pytest.raises(RecordError, match="image 1: `width` and `height` say 100x200, and the picture is 200x100"):
        coco(tmp_path, box(1, 18, [20, 50, 40, 20]), images=images, image_folder=tmp_path)
    assert coco(tmp_path, box(1, 18, [20, 50, 40, 20]), images=images)  # not there: the file is all that is known
    region = {"image": "a.jpg", "phrase": "dog", "bbox_xywh": [20, 50, 40, 40], "width": 40, "height": 40}
    corners = {**region, "bbox_xywh": None, "bbox_xyxy": [20, 50, 60, 90]}
    for row in (region, corners, {**region, "width": 30, "x": 25, "y": 55}):  # of Visual Genome: those of the box
        [record] = refcoco(tmp_path, row, image_folder=tmp_path)
        assert said(record)[1] == "<ref>dog</ref><box>(0.100,0.500),(0.300,0.900)</box>"
        with pytest.raises(RecordError, match="there is no picture"):
            refcoco(tmp_path, row)
    [whole] = refcoco(tmp_path, {**region, "bbox_xywh": [0, 0, 200, 100], "width": 200, "height": 100})
    assert said(whole)[1].endswith("<box>(0.000,0.000),(0.999,0.999)</box>")


@pytest.mark.parametrize(
    "change, part",
    [
        ({"bbox_xyxy": [60, 50, 20, 90]}, "has no area: correct or drop it"),
        ({"bbox_xyxy": [300, 0, 310, 10]}, "lies outside the picture of 200x100: correct or drop it"),
        ({"bbox_xyxy": "x"}, "a box is four numbers"),
        ({"sent": ""}, "name it"),
        ({"sent": []}, "an empty list"),
        ({"sent": "a <image>"}, "holds < or >"),
        ({"bbox_format": "cxcywh", "bbox": [1, 2, 3, 4], "bbox_xyxy": None}, "`bbox_format` is 'cxcywh'"),
        ({"image": "https://x/a.jpg"}, "nothing is downloaded"),
        ({"conversations": []}, "the conversation has no turns"),
        ({"video": "a.mp4"}, "may not have `video`"),
    ],
)
def test_what_is_refused(tmp_path, change, part):
    row = {"image": "a.jpg", "width": 200, "height": 100, "sent": "dog", "bbox_xyxy": [20, 50, 60, 90], **change}
    with pytest.raises(RecordError, match=part):
        refcoco(tmp_path, row)


corner = st.tuples(st.integers(0, 400), st.integers(0, 300), st.integers(1, 400), st.integers(1, 300))


@given(st.lists(corner, min_size=1, max_size=4))
def test_boxes_come_back_from_the_text(tmp_path_factory, numbers):
    size = (400, 300)
    assume(all(x + w <= 400 and y + h <= 300 and max(x, y, w, h) > 1 for x, y, w, h in numbers))
    images = [{"id": 1, "file_name": "a.jpg", "width": 400, "height": 300}]
    path = write(tmp_path_factory.getbasetemp(), [box(n, 18, one) for n, one in enumerate(numbers)], images)
    [record] = read_records(path)
    found = [
        convert(region.numbers, "normalised", "pixels", size)
        for region in regions(said(record)[1])
        if region.kind == "box"
    ]
    assert len(found) == len(numbers) and record.notes == ()
    for x, y, w, h in numbers:
        assert any(max(abs(a - b) for a, b in zip(one, (x, y, x + w, y + h))) <= 0.41 for one in found)
        assert max(iou(one, (x, y, x + w, y + h)) for one in found) > 0.2


keys = ["images", "annotations", "categories", "id", "file_name", "width", "height", "image_id", "category_id", "bbox"]
keys += ["iscrowd", "name", "caption", "tokens_positive", "image", "sent", "sentences", "raw", "bbox_xyxy", "video"]
keys += ["bbox_format", "raw_anns", "segments_info"]
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 10**20)
    | st.floats()
    | st.sampled_from(["", "a.jpg", "x", "\n", "\ud800", "<"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(keys), inner, max_size=5),
    max_leaves=15,
)
ids = st.integers(1, 3) | st.just("\n") | values
annotations = st.fixed_dictionaries(
    {
        "id": ids,
        "image_id": ids,
        "category_id": ids,
        "bbox": st.lists(st.integers(0, 99), min_size=4, max_size=4) | values,
    },
    optional={"iscrowd": values, "tokens_positive": st.just([[0, 2]]) | values},
)
files = st.fixed_dictionaries(
    {
        "images": st.lists(
            st.fixed_dictionaries(
                {"id": ids, "file_name": values}, optional={"width": values, "height": values, "caption": values}
            ),
            max_size=3,
        ),
        "annotations": st.lists(annotations, max_size=3),
    },
    optional={"categories": st.lists(st.fixed_dictionaries({"id": ids, "name": values}), max_size=2) | values},
)


@settings(max_examples=300)
@given(
    files | st.dictionaries(st.sampled_from(keys), values, max_size=8),
    st.sampled_from([None, "coco", "refcoco:xywh", "refcoco"]),
)
def test_any_file_is_records_or_sentences(tmp_path_factory, data, format):
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps(data))
    for row in read_entries(path, format=format):
        assert row.problem is None or "\n" not in row.problem
    try:
        assert all(isinstance(record, Record) for record in read_records(path, format=format))
    except RecordError:
        pass
