"""The shapes world: exact boxes, true answers, the same for the same seed, and held-out scenes that stay unseen."""

from __future__ import annotations

import itertools
import pickle
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ovisnb.data import boxes, shapes_text
from ovisnb.data.record import Record
from ovisnb.data.shapes import RecordMaker, ShapesDataset, layout_split, records, scene, texts
from ovisnb.data.shapes_scene import COLOURS, SHAPES

seeds = st.integers(0, 2**32)
counts = st.integers(1, 16)
BOX = re.compile(r"<ref>(.+?)</ref><box>\((.+?),(.+?)\),\((.+?),(.+?)\)</box>")


def three(number: float) -> str:
    return f"{min(number, 0.999):.3f}"


@settings(max_examples=60, deadline=None)
@given(seeds, counts, st.sampled_from([16, 32, 64, 100]))
def test_objects_have_their_own_name_and_a_box_on_the_grid_apart_from_the_others(seed, count, grid):
    made = scene(seed, size=64, n_objects=count, grid=grid)
    assert len(made.objects) == count
    assert len({item.name for item in made.objects}) == count
    for item in made.objects:
        x1, y1, x2, y2 = item.box
        assert 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1
        assert all(edge == round(edge * grid) / grid for edge in item.box)
        assert 0.11 <= x2 - x1 <= 0.45 and x2 - x1 == pytest.approx(y2 - y1)
    for one, other in itertools.combinations(made.objects, 2):
        assert boxes.iou(one.box, other.box) == 0


def test_others_often_share_colour_or_shape():
    shared = 0
    for seed in range(200):
        first, *rest = scene(seed, size=64, n_objects=4).objects
        shared += any(o.colour == first.colour or o.shape == first.shape for o in rest)
    assert shared > 140


@settings(max_examples=20, deadline=None)
@given(seeds)
def test_a_seed_has_one_layout_at_every_size(seed):
    large, again, small = scene(seed, size=512), scene(seed, size=512), scene(seed, size=64)
    assert large.objects == again.objects and large.image.tobytes() == again.image.tobytes()
    assert [(o.name, o.size, o.box) for o in large.objects] == [(o.name, o.size, o.box) for o in small.objects]
    assert large.image.size == (512, 512) and small.image.size == (64, 64) and small.image.mode == "RGB"


@pytest.mark.parametrize("size", [64, 96, 250, 512])
def test_a_shape_fills_its_box_exactly(size):
    seen = set()
    for seed in range(400):
        made = scene(seed, size=size, n_objects=1, labels=0)
        item = made.objects[0]
        # the shape is wherever the picture is nearer to the object's colour than any light background
        far = np.abs(np.asarray(made.image, int) - COLOURS[item.colour]).max(axis=2) < 60
        rows, columns = np.flatnonzero(far.any(axis=1)), np.flatnonzero(far.any(axis=0))
        found = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
        slack = 1.01 if item.shape in ("square", "cross") else 1.01 + size / 40  # tips are thin
        assert np.abs(found - np.array(item.box) * size).max() <= slack, (seed, item)
        seen.add(item.shape)
    assert seen == set(SHAPES)


def test_labels_are_there_only_where_they_can_be_read():
    assert all(o.label is None for seed in range(50) for o in scene(seed, size=255, labels=1).objects)
    labelled = [o for seed in range(50) for o in scene(seed, size=256, labels=1).objects if o.label]
    assert len(labelled) > 50
    assert all(o.shape != "ring" and o.size != "large" and len(o.label) == 1 for o in labelled)
    assert not any(o.label for seed in range(50) for o in scene(seed, size=512, labels=0).objects)


def test_a_label_changes_the_picture_inside_its_box_only():
    plain, printed = scene(3, size=512, labels=0), scene(3, size=512, labels=1)
    changed = np.asarray(plain.image) != np.asarray(printed.image)
    assert changed.any()
    for item in printed.objects:
        if item.label is not None:
            x1, y1, x2, y2 = (round(edge * 512) for edge in item.box)
            assert changed[y1:y2, x1:x2].any()
            changed[y1:y2, x1:x2] = False
    assert not changed.any()


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(["train", "heldout"]), seeds, st.integers(0, 10**6), st.sampled_from([64, 512]))
def test_a_record_has_the_layout_of_its_split(split, seed, index, size):
    record = RecordMaker(split, seed, size=size)(index)
    assert record_split(record) == split


def record_split(record: Record) -> str:
    key = record.source.removeprefix("shapes:")
    return layout_split(scene(key, size=64).objects)


def test_the_split_looks_at_the_arrangement_only():
    for seed in range(30):
        objects = scene(seed, size=512, labels=1).objects
        assert layout_split(objects) == layout_split(scene(seed, size=64, labels=0).objects)
        assert layout_split(objects) == layout_split(objects[::-1])
    splits = [layout_split(scene(seed, size=64).objects) for seed in range(1000)]
    assert 60 < splits.count("heldout") < 140


def test_records_are_what_the_dataset_holds_in_any_order_and_process():
    options = {"size": 64, "n_objects": (2, 4), "turns": (1, 3)}
    dataset = pickle.loads(pickle.dumps(ShapesDataset("train", 20, seed=5, **options)))
    assert len(dataset) == 20
    for record, index in zip(records("train", 5, start=10, count=5, **options), range(10, 15), strict=True):
        mine = dataset[index]
        assert mine.to_dict()["conversations"] == record.to_dict()["conversations"] and mine.id == record.id
        assert mine.images[0].image.tobytes() == record.images[0].image.tobytes()
    assert dataset[-1].id == dataset[19].id
    with pytest.raises(IndexError, match="outside its 20 records"):
        dataset[20]
    assert len(list(itertools.islice(records("heldout", size=64), 7))) == 7


def test_another_seed_gives_other_records():
    assert RecordMaker("train", 0)(0).meta != RecordMaker("train", 1)(0).meta


@settings(max_examples=150, deadline=None)
@given(seeds, st.sampled_from(list(shapes_text.KINDS)), st.sampled_from([(1, 1), (2, 5)]))
def test_answers_are_true(seed, kind, turns):
    size = 512 if kind == "read" else 64
    record = RecordMaker("train", seed, size=size, n_objects=(2, 5), labels=0.8, kinds={kind: 1}, turns=turns)(0)
    assert record.kind == kind and record.meta["kinds"] == [kind] * (len(record.turns) // 2)
    assert record.turns[0].text.startswith("<image>\n")
    objects = {item["name"]: item for item in record.meta["objects"]}
    questions = [turn.text.removeprefix("<image>\n") for turn in record.turns[::2]]
    assert len(set(questions)) == len(questions) <= turns[1]
    for question, answer in zip(questions, record.turns[1::2], strict=True):
        assert answer.role == "gpt"
        CHECKS[kind](question, answer.text, objects)
    crops = [media.box for media in record.images[1:]]
    assert len(crops) == (len(questions) if kind == "read" else 0)
    for crop, answer in zip(crops, record.turns[1::2], strict=False):
        assert f"Crop [{','.join(f'{edge:.0f}' for edge in crop)}]" in answer.text
        assert any(tuple(edge * size for edge in item["box"]) == crop for item in objects.values())


def check_find(question, answer, objects):
    name, *edges = BOX.fullmatch(answer).groups()
    assert question == f"Find the <ref>{name}</ref>. Please provide the bounding box coordinates."
    assert edges == [three(edge) for edge in objects[name]["box"]]


def check_point(question, answer, objects):
    name, x, y = re.fullmatch(r"<ref>(.+)</ref><point>\((.+),(.+)\)</point>", answer).groups()
    assert question == f"Find the <ref>{name}</ref>. Please provide the point coordinates."
    x1, y1, x2, y2 = objects[name]["box"]
    assert abs(float(x) - (x1 + x2) / 2) < 0.01 and abs(float(y) - (y1 + y2) / 2) < 0.01
    assert float(x) in {round(step / 64, 3) for step in range(64)}


def check_list(question, answer, objects):
    assert question == "List every object. Please provide the bounding box coordinates."
    lines = [BOX.fullmatch(line).groups() for line in answer.split("\n")]
    assert {name for name, *_ in lines} == set(objects) and len(lines) == len(objects)
    assert all(edges == [three(edge) for edge in objects[name]["box"]] for name, *edges in lines)
    middles = [(y1 + y2, x1 + x2) for x1, y1, x2, y2 in (objects[name]["box"] for name, *_ in lines)]
    assert middles == sorted(middles)


def check_reverse(question, answer, objects):
    numbers = re.findall(r"\d\.\d{3}", question)
    if "<box>" in question:
        assert numbers == [three(edge) for edge in objects[answer]["box"]]
    else:
        x, y = map(float, numbers)
        inside = [n for n, o in objects.items() if o["box"][0] < x < o["box"][2] and o["box"][1] < y < o["box"][3]]
        assert inside == [answer]


def check_count(question, answer, objects):
    word = re.fullmatch(r"How many (\w+)(?: shapes)? are there\?", question).group(1)
    singular = {"crosses": "cross"}.get(word, word.removesuffix("s"))
    assert int(answer) == sum(word == name.split()[0] or singular == name.split()[1] for name in objects)


def check_compare(question, answer, objects):
    def middle(name, axis):
        return (objects[name]["box"][axis] + objects[name]["box"][axis + 2]) / 2

    if question.startswith("Which"):
        names = re.fullmatch(r"Which is larger, the (.+) or the (.+)\?", question).groups()
        sides = {name: objects[name]["box"][2] - objects[name]["box"][0] for name in names}
        assert answer == max(sides, key=sides.get) and len(set(sides.values())) == 2
        return
    one, relation, other = re.fullmatch(r"Is the (.+) (left of|right of|above|below) the (.+)\?", question).groups()
    axis = 0 if relation in ("left of", "right of") else 1
    less = middle(one, axis) < middle(other, axis)
    assert answer == ("Yes" if less == (relation in ("left of", "above")) else "No")


def largest(objects):
    *_, second, first = sorted(objects, key=lambda name: objects[name]["box"][2] - objects[name]["box"][0])
    sides = [objects[name]["box"][2] - objects[name]["box"][0] for name in (first, second)]
    assert sides[0] - sides[1] >= 3 / 64
    return first


def check_find_largest(question, answer, objects):
    name, *edges = BOX.fullmatch(answer).groups()
    assert question == "Find the largest object. Please provide the bounding box coordinates."
    assert name == largest(objects) and edges == [three(edge) for edge in objects[name]["box"]]


def check_name_largest(question, answer, objects):
    assert (question, answer) == ("What is the largest object?", largest(objects))


def check_read(question, answer, objects):
    noun, name = re.fullmatch(r"Which (letter|digit) is printed on the (.+)\?", question).groups()
    label = objects[name]["label"]
    assert (noun == "digit") == label.isdigit()
    assert answer.startswith("<think>\n") and answer.endswith(f"</think>\n\n<answer>{label}</answer>")
    assert answer.count("</tool_call><image>\n") == 1


def check_find_all(question, answer, objects):
    lines = [BOX.fullmatch(line).groups() for line in answer.split("\n")]
    assert {name for name, *_ in lines} == set(objects) and len(lines) == len(objects)
    assert all(edges == [three(edge) for edge in objects[name]["box"]] for name, *edges in lines)
    asked = ", ".join(f"<ref>{name}</ref>" for name, *_ in lines)
    assert question == f"Find {asked}. Please provide the bounding box coordinates."


def check_map(question, answer, objects):
    half = {"colour": 0, "shape": 1}[re.fullmatch(r"Name the (\w+)s in a 4 by 4 grid\.", question).group(1)]
    rows = [line.split(" ") for line in answer.split("\n")]
    assert [len(row) for row in rows] == [4] * 4
    # counted in 64ths of the picture's side, 16 a cell, so that nothing is rounded
    boxes = {name.split()[half]: [] for name in objects}
    for name, item in objects.items():
        boxes[name.split()[half]].append([round(64 * edge) for edge in item["box"]])

    def most(word, row, column):
        return max(
            max(0, min(x2, 16 * column + 16) - max(x1, 16 * column))
            * max(0, min(y2, 16 * row + 16) - max(y1, 16 * row))
            for x1, y1, x2, y2 in boxes[word]
        )

    for row, column in itertools.product(range(4), range(4)):
        shares = {word: most(word, row, column) for word in boxes}
        if max(shares.values()) < 0.2 * 256:
            assert rows[row][column] == "none"
        else:
            assert shares[rows[row][column]] == max(shares.values())


def check_attribute(question, answer, objects):
    pairs = [name.split() for name in objects]
    if shape := re.fullmatch(r"What colour is the (\w+)\?", question):
        assert [colour for colour, other in pairs if other == shape.group(1)] == [answer]
    else:
        colour = re.fullmatch(r"What shape is (\w+)\?", question).group(1)
        assert [shape for other, shape in pairs if other == colour] == [answer]


def check_name(question, answer, objects):
    first = re.fullmatch(r"Name every object, (colour|shape) first\.", question).group(1)
    pairs = [tuple(words.split(" ")) for words in answer.split(", ")]
    names = [f"{one} {other}" if first == "colour" else f"{other} {one}" for one, other in pairs]
    assert sorted(names) == sorted(objects)


CHECKS = {
    "name": check_name,
    "attribute": check_attribute,
    "find": check_find,
    "find_all": check_find_all,
    "map": check_map,
    "point": check_point,
    "list": check_list,
    "reverse": check_reverse,
    "count": check_count,
    "compare": check_compare,
    "read": check_read,
    "find_largest": check_find_largest,
    "name_largest": check_name_largest,
}


def test_the_largest_is_asked_for_only_where_it_is_named():
    kinds = {kind for record in records("train", count=200, size=64) for kind in record.meta["kinds"]}
    assert kinds == set(shapes_text.KINDS) - {"read", "find_largest", "name_largest"}  # no label is drawn at 64 pixels


def test_kinds_come_by_their_weights():
    kinds = [r.kind for r in records("train", count=400, size=64, n_objects=(2, 4), kinds={"find": 3, "list": 1})]
    assert set(kinds) == {"find", "list"} and 260 < kinds.count("find") < 340


def test_alike_decides_how_often_colours_and_shapes_repeat():
    def repeats(alike):
        scenes = [scene(seed, size=64, n_objects=4, alike=alike).objects for seed in range(100)]
        return sum(8 - len({o.colour for o in s}) - len({o.shape for o in s}) for s in scenes)

    assert repeats(0.0) < 0.8 * repeats(2 / 3) < 0.8 * repeats(1.0)


def test_a_list_comes_last_and_no_object_is_located_twice():
    for record in records("train", count=200, size=64, n_objects=(1, 4), turns=(3, 6)):
        kinds = record.meta["kinds"]
        assert not {"list", "find_all"} & set(kinds[:-1])
        asked = [t.text for t, kind in zip(record.turns[1::2], kinds, strict=True) if kind in ("find", "point")]
        assert len({text.split("</ref>")[0] for text in asked}) == len(asked)


def test_counts_are_sometimes_zero():
    answers = [r.turns[1].text for r in records("train", count=300, size=64, kinds={"count": 1})]
    assert {"0", "1", "2"} <= set(answers) and answers.count("0") < 60


def test_texts_are_the_words_of_the_training_records():
    words = list(texts(30, seed=2, size=64))
    turns = [turn for record in records("train", 2, count=30, size=64) for turn in record.turns]
    roles = {"human": "user", "gpt": "assistant"}
    assert words == [f"{roles[turn.role]}\n{turn.text.removeprefix('<image>' + chr(10))}" for turn in turns]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 32}, "size is 32 pixels"),
        ({"n_objects": 0}, "n_objects is 0"),
        ({"n_objects": (5, 2)}, r"n_objects is \(5, 2\)"),
        ({"n_objects": 40}, "n_objects is 40"),
        ({"grid": 1000}, "grid is 1000"),
        ({"labels": 2}, "labels is 2"),
        ({"turns": (0, 1)}, r"turns is \(0, 1\)"),
        ({"kinds": {"fnid": 1}}, "unknown kind 'fnid'"),
        ({"alike": 1.5}, "alike is 1.5"),
        ({"kinds": {"find": -1}}, "the weight -1"),
        ({"kinds": {"find": 0}}, "every kind in kinds has weight 0"),
    ],
)
def test_a_wrong_option_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        RecordMaker("train", **options)


def test_a_wrong_split_is_named():
    with pytest.raises(ValueError, match="split is 'test', give one of train, heldout"):
        ShapesDataset("test", 3)
    with pytest.raises(ValueError, match="count is -1"):
        ShapesDataset("train", -1)


def test_a_question_that_no_scene_answers_is_said_and_not_searched_for_ever():
    with pytest.raises(ValueError, match="none of the kinds read can be asked"):
        RecordMaker("train", size=64, kinds={"read": 1})(0)
    with pytest.raises(ValueError, match="none of the kinds compare can be asked"):
        RecordMaker("train", size=64, n_objects=1, kinds={"compare": 1})(0)
