"""Boxes of detection and of referring expressions -> find and point questions in Ovis2.5's own form.

    for record in read_records("instances_val.json", image_folder="val2017"): ...
    for record in read_records("refcoco_val.jsonl", format="refcoco:xyxy,find,point"): ...

    Find every <ref>dog</ref>. Please provide the bounding box coordinates.
    <ref>dog</ref>[<box>(0.102,0.200),(0.304,0.711)</box>,<box>(0.500,0.211),(0.644,0.780)</box>]

Choices stand behind the format's name and a colon: "find" (the default) asks for boxes, "point" for their middles,
"find,point" for both, each in a record of its own.

- coco: `{"images", "annotations", "categories"}`, boxes `[x, y, width, height]` in pixels (`"bbox_mode": 0`: corners). One
  question for each name of a category in each picture file, answered with all boxes from top to bottom, also where two
  entries have that name or that file. Where one of them is a crowd (`iscrowd`),
  nobody could name every one (nor what LVIS lists under `not_exhaustive_category_ids`): that question is left out, and
  the picture's others say so in `Record.notes`. So do a
  box without area that is left out, and one reaching outside, which is cut. A picture with `caption` whose annotations
  have `tokens_positive` (the MDETR form of RefCOCO and Flickr30k) is asked about those words of the caption.
- refcoco: rows of a picture (`image`, `image_path`, `img_path`, `file_name`, ...), what it is called (`expression`, `sent`,
  `sentences`, `phrase`, ...; one question each) and `bbox`, one box or a list of them: several names of one box, several
  boxes of one name, or a box for each name. Some of these files hold corners and some a corner with width and
  height: say "xyxy" or "xywh" with the format, name the key `bbox_xyxy` or `bbox_xywh`, put `"bbox_format": "xywh"` in the
  row, or keep the annotation of COCO beside it (`raw_anns`). A `bbox` of which nothing is said is an error: what one
  row's numbers allow, the next row's do not. "normalised" and "thousand" say that the numbers are not pixels.

The picture's size is that of its header, else (no file there) `width` and `height` of the row; an error if both are
known and differ, because then nobody can say which of them the boxes count.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from ovisnb.data import boxes
from ovisnb.data.boxes import LARGEST, Box, format_box, format_point
from ovisnb.data.formats.parts import cut, first_of, is_number, picture, short
from ovisnb.data.formats.rows import Entry, Options, Reader
from ovisnb.data.markup import BOX_REQUEST, POINT_REQUEST
from ovisnb.data.media import MediaError, image_size
from ovisnb.data.record import IMAGE, Media, Note, RecordError

PICTURE_KEYS = ("image", "image_path", "img_path", "file_name", "filename", "img_name", "img")
NAME_KEYS = ("expression", "expressions", "sent", "sentence", "sentences", "sents", "phrase", "phrases")
NAME_KEYS += ("referring_expression",)
FORM_KEYS = ("bbox_format", "box_format", "bbox_mode")
QUESTIONS, FORMS, UNITS = ("find", "point"), ("xyxy", "xywh"), ("pixels", "normalised", "thousand")
_BOX_KEYS = {f"{key}_{form}": form for form in FORMS for key in ("bbox", "box")} | {"bbox": None, "box": None}
_KIN = {  # what COCO's other files have in an annotation
    "caption": ("captions", 'write rows of {"image", "caption"}, and read them as captions'),
    "segments_info": ("panoptic", "bring instances_*.json, or boxes made of its masks"),
}
_MODES = {"0": "xyxy", "1": "xywh"}  # the numbers of Detectron2's BoxMode


def matches_coco(entry: Any) -> bool:
    """Whether an object holds `images` and `annotations`."""
    return isinstance(entry, dict) and {"images", "annotations"} <= entry.keys() and "messages" not in entry


def matches_refcoco(entry: Any) -> bool:
    """Whether a row has a picture, a box and what is in it."""
    keys = entry.keys() if isinstance(entry, dict) else set()
    return not any(keys.isdisjoint(some) for some in (PICTURE_KEYS, NAME_KEYS, _BOX_KEYS))


def coco(entry: dict, options: Options, kinds: Sequence[str] = ("find",)) -> Iterator[dict | RecordError]:
    """The questions of a COCO file, in the order of its pictures; an annotation that cannot be used is an error."""
    found = None
    for found in _questions_of(entry, options, kinds):
        yield found
    if found is None:
        said = "no question comes of this file: all it has are crowds (`iscrowd`), or nothing: bring one with boxes"
        yield RecordError(said, kind="no_answer")


def _questions_of(entry: dict, options: Options, kinds: Sequence[str]) -> Iterator[Entry | RecordError]:
    annotations = entry.get("annotations")
    for key, (file, instead) in _KIN.items():
        first = annotations[0] if isinstance(annotations, list) and annotations else None
        if isinstance(first, dict) and key in first and "bbox" not in first:
            raise RecordError(f"this is a COCO {file} file, which has no boxes: {instead}", kind="unknown_format")
    names = {known["id"]: known.get("name") for known in _objects({"categories": [], **entry}, "categories")}
    groups: dict[str, tuple[dict, list[dict]]] = {}  # the annotations of each file: two entries may have the same
    group_of: dict[Any, list[dict]] = {}
    for image in _objects(entry, "images"):
        file = repr([image.get(key) for key in (*PICTURE_KEYS, "caption")])
        first, group_of[image["id"]] = groups.setdefault(file, (image, []))
        if image is not first and any(image.get(key) != first.get(key) for key in ("width", "height")):
            both = f"images {short(first['id'])} and {short(image['id'])}"
            raise RecordError(f"{both} are one file of two sizes: correct or drop one of them")
    for annotation in _objects(entry, "annotations"):
        image = annotation.get("image_id")
        if not _is_id(image) or image not in group_of:
            yield RecordError(
                f"annotation {short(annotation['id'])}: there is no image {short(image)} in `images`: add it"
            )
        else:
            group_of[image].append(annotation)
    for image, group in groups.values():
        try:
            yield from _of_image(image, group, names, options, kinds)
        except RecordError as error:
            yield error.at(f"image {short(image['id'])}")


def refcoco(
    entry: dict, options: Options, kinds: Sequence[str] = ("find",), form: str | None = None, unit: str = "pixels"
) -> Iterator[dict | RecordError]:
    """The questions of one row: one for each expression."""
    picture_key, shown = first_of(entry, PICTURE_KEYS, "image")
    name_key, said = first_of(entry, NAME_KEYS, "expression")
    box_key, numbers = first_of(entry, tuple(_BOX_KEYS), "bbox")
    shown = picture(shown[0] if isinstance(shown, list) and len(shown) == 1 else shown)
    several = isinstance(numbers, list) and bool(numbers) and isinstance(numbers[0], list)
    listed = numbers if several else [numbers]
    form = _BOX_KEYS[box_key] or _form(entry) or _form_of_raw(entry, listed[0]) or form
    if form is None:
        raise RecordError(
            f"nothing says whether `{box_key}` is x, y, width, height or two corners: read the file with "
            "--format refcoco:xywh or --format refcoco:xyxy"
        )
    named = [f"`{box_key}`" + (f" {number}" if several else "") for number in range(1, len(listed) + 1)]
    advice = f"read the file with --format refcoco:{form},normalised"
    corners = [_corners(one, form, name, unit, advice) for one, name in zip(listed, named)]
    if unit == "pixels":
        extent = _size({} if _is_of_box(entry, corners) else entry, shown, options)
    else:
        extent = boxes.extent(unit)
    found = []
    for one, name in zip(corners, named):
        box, note = _share(one, extent, name)
        if box is None:
            raise RecordError(f"{note}: correct or drop it", kind=note.kind)
        found.append((box, note))
    rest = {key: value for key, value in entry.items() if key not in (picture_key, name_key, box_key)}
    if taken := next((key for key in ("conversations", "video", "image", "objects") if key in rest), None):
        raise RecordError(f"a row of this format may not have `{taken}` beside `{picture_key}`: rename it")
    names = [_name(name) for name in _names(said, name_key)]
    asked = _asked(names, found, f"`{name_key}`", f"`{box_key}`")
    for number, (name, own) in enumerate(asked):
        row = {**rest, "image": [shown]}
        if len(asked) > 1 and _is_id(rest.get("id")):
            row["id"] = f"{rest['id']}-{number}"
        yield from _questions(
            "Find {the}", name, [box for box, _ in own], kinds, [note for _, note in own if note], row
        )


def _asked(names: Sequence[str], found: Sequence[Any], of_names: str, of_boxes: str) -> list[tuple[str, Sequence[Any]]]:
    """What each name is answered with: of several names and as many boxes its own, else all of them."""
    if len(names) == 1 or len(found) == 1:
        return [(name, found) for name in names]
    if len(names) != len(found):
        counts = f"{of_names} has {len(names)} names and {of_boxes} {len(found)} boxes"
        raise RecordError(f"{counts}: give a box for each name, or one for all")
    own: dict[str, list[Any]] = {}
    for name, one in zip(names, found):
        own.setdefault(name, []).append(one)
    return list(own.items())


def _of_image(
    image: dict, annotations: Sequence[dict], names: dict, options: Options, kinds: Sequence[str]
) -> Iterator[Entry | RecordError]:
    """The questions about one picture of a COCO file."""
    if not annotations:
        return
    shown = picture(first_of(image, PICTURE_KEYS, "file_name")[1])
    size = _size(image, shown, options)
    groups: dict[str, list[dict]] = {}  # by name, which two categories may share
    labels, crowds, errors = {}, {}, []
    some = image.get("not_exhaustive_category_ids")  # LVIS
    for annotation in annotations:
        try:
            label, name = _label(annotation, image, names)
        except RecordError as error:
            errors.append(error.at(f"annotation {short(annotation['id'])}"))
            continue
        groups.setdefault(name, []).append(annotation)
        labels.setdefault(name, label)
        if annotation.get("iscrowd"):
            crowds.setdefault(name, f"annotation {short(annotation['id'])} is a crowd (iscrowd)")
        elif isinstance(some, list) and annotation.get("category_id") in some:
            crowds.setdefault(name, "not every one has a box (not_exhaustive_category_ids)")
    notes = [Note(f"no question about {name!r}: {why}", "remark") for name, why in crowds.items()]
    for name, group in groups.items():
        if name in crowds:
            continue
        try:
            found, own = _boxes(group, size)
        except RecordError as error:
            errors.append(error)
            continue
        head = "Find {the}" if "tokens_positive" in group[0] and "caption" in image else "Find every"
        more = {"id": f"{image['id']}-{labels[name]}", "image": [shown]}
        yield from _questions(head, name, found, kinds, [*notes, *own], more)
    yield from errors


def _boxes(annotations: Sequence[dict], size: tuple[int, int]) -> tuple[list[Box], list[Note]]:
    """-> (the boxes as shares of the picture, notes); RecordError if one is broken or none is left."""
    found, notes, unusable = [], [], None
    for annotation in annotations:
        named = f"annotation {short(annotation['id'])}: its box"
        form, advice = _form(annotation) or "xywh", "multiply by the picture's width and height"
        box, note = _share(_corners(annotation.get("bbox"), form, named, "pixels", advice), size, named)
        if box is None:
            unusable = note
            notes.append(Note(f"{note}: it is left out", note.kind))
            continue
        found.append(box)
        notes += [note] if note else []
    if not found:
        said = f"{unusable}, and no other box of its kind is left: correct or drop it"
        raise RecordError(said, kind=unusable.kind)
    return found, notes


def _questions(
    head: str, name: str, found: Sequence[Box], kinds: Sequence[str], notes: Sequence[str], own: dict
) -> Iterator[Entry]:
    """The find and point questions about the boxes of one name, with their answers; `own` are the row's other keys."""
    the = "" if re.match(r"(the|a|an)\b", name, re.IGNORECASE) else "the "
    asked = f"{IMAGE}\n{head.format(the=the).rstrip()} <ref>{name}</ref>. "
    found = sorted(found, key=lambda box: (box.y1 + box.y2, box.x1 + box.x2))
    points = [(round((box.x1 + box.x2) / 2, 3), round((box.y1 + box.y2) / 2, 3)) for box in found]
    for kind in kinds:
        written = [format_box(box) for box in found] if kind == "find" else [format_point(point) for point in points]
        answer = written[0] if len(written) == 1 else f"[{','.join(written)}]"
        row = Entry(own)
        row["kind"] = kind
        row["conversations"] = [
            {"from": "human", "value": asked + (BOX_REQUEST if kind == "find" else POINT_REQUEST)},
            {"from": "gpt", "value": f"<ref>{name}</ref>{answer}"},
        ]
        row["objects"] = [{"name": name, "box": list(box)} for box in found]
        if kind == "point" and _is_id(own.get("id")):
            row["id"] = f"{own['id']}-point"
        row.notes = tuple(notes)
        yield row


def _share(box: Box, extent: tuple[float, float], named: str) -> tuple[Box | None, Note | None]:
    """-> (`box` as shares with three decimals, cut to the picture, or None if nothing is left; what is wrong, or None)."""
    named, where = f"{named} [{', '.join(f'{number:g}' for number in box)}]", f"the picture of {extent[0]}x{extent[1]}"
    inside, note = cut(box, extent, named, where)
    if inside is None:
        return None, note
    share = Box(*(min(round(number, 3), LARGEST) for number in boxes.convert(inside, "pixels", "normalised", extent)))
    if boxes.area(share) <= 0:
        return None, Note(f"{named} is too thin on {where} to be written", "empty_box")
    slack = max(extent) * 1e-3  # less than can be written
    return share, None if all(abs(a - b) <= slack for a, b in zip(inside, box)) else note


def _corners(numbers: Any, form: str, named: str, unit: str, advice: str) -> Box:
    """Four numbers of a file -> x1, y1, x2, y2 in the same `unit`; `advice` is for shares in its place."""
    if not isinstance(numbers, (list, tuple)) or len(numbers) != 4 or not all(map(is_number, numbers)):
        raise RecordError(f"{named} is {short(numbers)}: a box is four numbers", kind="unreadable_box")
    if fault := boxes.misread(numbers, unit):
        raise RecordError(f"{named} {fault}: {advice}", kind="unreadable_box")
    x, y, *rest = numbers
    return Box(x, y, *rest) if form == "xyxy" else Box(x, y, x + rest[0], y + rest[1])


def _label(annotation: dict, image: dict, names: dict) -> tuple[Any, str]:
    """(what marks its question, its name) of an annotation."""
    spans, caption = annotation.get("tokens_positive"), image.get("caption")
    if isinstance(spans, list) and isinstance(caption, str):
        if not spans or not all(isinstance(span, list) and list(map(type, span)) == [int, int] for span in spans):
            raise RecordError(f"its `tokens_positive` is {short(spans)}: a list of [start, end] in the caption")
        name = _name(" ".join(caption[start:end].strip() for start, end in spans))
        return f"{spans[0][0]}-{spans[-1][1]}", name
    category = annotation.get("category_id")
    if not _is_id(category) or category not in names:
        raise RecordError(f"there is no category {short(category)} in `categories`: add it")
    return category, _name(names[category])


def _name(name: Any) -> str:
    """What is asked for, fit for `<ref>`."""
    if not isinstance(name, str) or not name.strip():
        raise RecordError(f"what is in the box is {short(name)}: name it")
    if "<" in name or ">" in name:
        raise RecordError(f"the name {short(name)} holds < or >, which are for tags: rename it")
    return " ".join(name.split()).rstrip(".")


def _names(said: Any, key: str) -> list[Any]:
    """The expressions of a row: one, a list, or a list of objects as in the files of refer."""
    listed = said if isinstance(said, list) else [said]
    if not listed:
        raise RecordError(f"`{key}` is an empty list: write an expression or drop the row")
    return [one.get("sent") or one.get("raw") if isinstance(one, dict) else one for one in listed]


def _size(row: dict, shown: Any, options: Options) -> tuple[int, int]:
    """(width, height) in pixels: the header's, else the file's own; RecordError where both are known and differ."""
    width, height = row.get("width"), row.get("height")
    given = width is not None or height is not None
    for key, value in (("width", width), ("height", height)):
        if given and (not is_number(value) or value != int(value) or value < 1):
            raise RecordError(f"`{key}` is {short(value)}: give the picture's size in pixels, or neither of the two")
    try:
        size = image_size(Media.from_entry(shown), options.image_folder)
    except MediaError:
        if not given:
            raise
        return int(width), int(height)
    if given and size != (width, height):
        raise RecordError(
            f"`width` and `height` say {int(width)}x{int(height)}, and the picture is {size[0]}x{size[1]} as it is seen: "
            "leave the two out if the boxes count the picture as it is seen, else count them anew"
        )
    return size


def _is_of_box(row: dict, found: Sequence[Box]) -> bool:
    """Whether `width` and `height` of a row are its box's, as in Visual Genome: such a picture would end before the box."""
    if {"x", "y"} <= row.keys():
        return True
    sides = [row.get("width"), row.get("height")]
    return any((box.x1 or box.y1) and [box.x2 - box.x1, box.y2 - box.y1] == sides for box in found)


def _form(row: dict) -> str | None:
    """What the row says about its box."""
    for key in FORM_KEYS:
        if row.get(key) is not None:
            said = str(row[key]).lower().removesuffix("_abs")
            said = _MODES.get(said, said)
            if said in FORMS:
                return said
            raise RecordError(f'`{key}` is {short(row[key])}: it says "xyxy" or "xywh"')
    return None


def _form_of_raw(row: dict, numbers: Any) -> str | None:
    """What COCO's own annotation in `raw_anns`, whose box is x, y, width, height, shows a row's box to be."""
    raw = row.get("raw_anns")
    try:
        raw = json.loads(raw) if isinstance(raw, str) else raw
        known = _corners(raw["bbox"], "xywh", "", "pixels", "")
        own = {form: _corners(numbers, form, "", "pixels", "") for form in FORMS}
        return next(form for form in FORMS if all(abs(a - b) < 0.5 for a, b in zip(own[form], known)))
    except (ValueError, TypeError, KeyError, StopIteration, RecursionError):
        return None


def _objects(entry: dict, key: str) -> list[dict]:
    """The list under `key`, whose items are objects with an id."""
    listed = entry.get(key)
    if not isinstance(listed, list):
        raise RecordError(f"`{key}` is {short(listed)}: a COCO file has a list there")
    seen = set()
    for number, one in enumerate(listed, start=1):
        if not isinstance(one, dict) or not _is_id(one.get("id")):
            raise RecordError(f"entry {number} of `{key}` is no object with an `id`: correct it")
        if one["id"] in seen:
            raise RecordError(f"`{key}` has the id {short(one['id'])} twice: number them anew")
        seen.add(one["id"])
    return listed


def _is_id(value: Any) -> bool:
    return isinstance(value, (int, str)) and not isinstance(value, bool)


def _chosen(reader: Reader, allowed: Sequence[str], choices: str) -> Reader:
    """The reader with what stands behind its name."""
    words = [word.strip() for word in choices.split(",")]
    for word in words:
        if word not in allowed:
            raise RecordError(f"the format {reader.name!r} has no choice {word!r}: use some of {', '.join(allowed)}")
    said: dict[str, Any] = {"kinds": tuple(kind for kind in QUESTIONS if kind in words) or ("find",)}
    for key, known in (("form", FORMS), ("unit", UNITS)):
        given = [word for word in words if word in known]
        if len(given) > 1:
            raise RecordError(f"the choices {choices!r} contradict each other: keep one of {', '.join(given)}")
        said |= {key: given[0]} if given else {}
    return replace(reader, entries=partial(reader.entries, **said))


COCO = Reader(
    "coco", "images, annotations and categories", matches_coco, coco, choose=lambda said: _chosen(COCO, QUESTIONS, said)
)
REFCOCO = Reader(
    "refcoco",
    "image, expression and bbox",
    matches_refcoco,
    refcoco,
    choose=lambda said: _chosen(REFCOCO, (*QUESTIONS, *FORMS, *UNITS), said),
)
