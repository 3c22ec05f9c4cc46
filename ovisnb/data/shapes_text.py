"""Questions about a shapes scene and their answers: one or two wordings a kind, because small models learn from them.

Coordinates follow Ovis2.5's grounding text: shares of the picture with three decimals in [0, 1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

from .boxes import format_box, format_point
from .markup import BOX_REQUEST, POINT_REQUEST
from .shapes_scene import COLOURS, SHAPES, SceneObject

Objects = Sequence[SceneObject]

KINDS = {
    "find": 4.0,
    "find_all": 2.0,
    "list": 3.0,
    "point": 1.0,
    "reverse": 1.0,
    "count": 1.0,
    "compare": 1.0,
    "attribute": 1.0,
    "name": 1.0,
    "map": 1.0,
    "read": 1.0,
    "find_largest": 0.0,  # asked only where they are named: a task that the tiny checkpoint was not trained on
    "name_largest": 0.0,
}

CLEAR_DISTANCE = 4 / 64  # centres closer than this along an axis are not asked about: nobody could say
CLEAR_SIDE = 3 / 64
LOCATE_ALL = ("find_all", "list")
MAP_SIDE = 4  # cells along each side of the map that a "map" question asks for
MAP_SHARE = 0.2  # of a cell that an object has to cover to be named there


@dataclass(frozen=True)
class Question:
    """`crop` is the box in pixels (x1, y1, x2, y2) of the picture that the answer's `<image>` shows, if it has one."""

    kind: str
    text: str
    answer: str
    crop: tuple[float, float, float, float] | None = None


def check_kinds(kinds: Mapping[str, float] | None) -> dict[str, float]:
    """The weights in use, those of 0 left out.

    Raises:
        ValueError: an unknown kind, a negative weight, or nothing left.
    """
    kinds = dict(KINDS if kinds is None else kinds)
    for kind, weight in kinds.items():
        if kind not in KINDS:
            raise ValueError(f"shapes: unknown kind {kind!r} in kinds, give some of {', '.join(KINDS)}.")
        if weight < 0:
            raise ValueError(f"shapes: kinds gives {kind!r} the weight {weight}, give 0 or more.")
    kinds = {kind: float(weight) for kind, weight in kinds.items() if weight > 0}
    if not kinds:
        raise ValueError("shapes: every kind in kinds has weight 0, give at least one a positive weight.")
    return kinds


def ask(
    rng: Random, objects: Objects, kinds: Mapping[str, float], turns: tuple[int, int], size: int, grid: int
) -> list[Question]:
    """Different questions about one scene, at most turns[1] of them; [] if none of the kinds can be asked.

    An object is the target of at most one of find, point and reverse, and the kinds that locate every object come
    last and only once, so that few answers can be copied from an earlier turn instead of being seen.
    """
    wanted = rng.randint(*turns)
    weights, free, questions = dict(kinds), list(objects), []
    rng.shuffle(free)
    while len(questions) < wanted and weights:
        kind = rng.choices(list(weights), list(weights.values()))[0]
        question = _one(kind, rng, objects, free, size, grid)
        if question is None or question.text in {q.text for q in questions}:
            del weights[kind]  # cannot be asked here, or not again
            continue
        if kind in LOCATE_ALL:
            weights = {other: weight for other, weight in weights.items() if other not in LOCATE_ALL}
        questions.append(question)
    return sorted(questions, key=lambda q: q.kind in LOCATE_ALL)


def reading_order(objects: Objects) -> list[SceneObject]:
    """Top to bottom by the middle of the box, then left to right."""
    return sorted(objects, key=lambda o: (o.box[1] + o.box[3], o.box[0] + o.box[2]))


def located(item: SceneObject) -> str:
    """An object's name and box as an answer writes them."""
    return f"<ref>{item.name}</ref>{format_box(item.box)}"


def centre(item: SceneObject, grid: int) -> tuple[float, float]:
    """The middle of the box on the grid; half a unit is rounded down."""
    x1, y1, x2, y2 = (round(edge * grid) for edge in item.box)
    return (x1 + x2) // 2 / grid, (y1 + y2) // 2 / grid


def cell_names(objects, what: str) -> list[list[str]]:
    """Rows of the picture's map: the colour or shape that covers most of each cell, "none" below MAP_SHARE of it."""

    def covered(item, row: int, column: int) -> float:
        x1, y1, x2, y2 = (edge * MAP_SIDE for edge in item.box)
        across = min(x2, column + 1) - max(x1, column)
        return max(0.0, across) * max(0.0, min(y2, row + 1) - max(y1, row))

    def name(row: int, column: int) -> str:
        most = max(objects, key=lambda item: covered(item, row, column))
        return getattr(most, what) if covered(most, row, column) >= MAP_SHARE else "none"

    return [[name(row, column) for column in range(MAP_SIDE)] for row in range(MAP_SIDE)]


def _one(kind: str, rng: Random, objects: Objects, free: list[SceneObject], size: int, grid: int) -> Question | None:
    """One question of this kind, or None where the scene has none; takes its target out of `free`."""
    if kind == "list":
        return Question(kind, f"List every object. {BOX_REQUEST}", "\n".join(map(located, reading_order(objects))))
    if kind == "find_all":
        asked = rng.sample(list(objects), len(objects))
        names = ", ".join(f"<ref>{item.name}</ref>" for item in asked)
        return Question(kind, f"Find {names}. {BOX_REQUEST}", "\n".join(map(located, asked)))
    if kind == "map":
        what = rng.choice(("colour", "shape"))
        text = f"Name the {what}s in a {MAP_SIDE} by {MAP_SIDE} grid."
        return Question(kind, text, "\n".join(" ".join(row) for row in cell_names(objects, what)))
    if kind == "count":
        return _count(rng, objects)
    if kind == "compare":
        return _compare(rng, objects)
    if kind == "attribute":
        return _attribute(rng, objects)
    if kind == "name":
        first, second = rng.sample(("colour", "shape"), 2)
        named = ", ".join(
            f"{getattr(item, first)} {getattr(item, second)}" for item in rng.sample(list(objects), len(objects))
        )
        return Question(kind, f"Name every object, {first} first.", named)
    if kind == "read":
        return _read(rng, objects, size)
    if kind in ("find_largest", "name_largest"):
        return _largest(kind, objects)
    if not free:
        return None
    item = free.pop()
    if kind == "find":
        return Question(kind, f"Find the <ref>{item.name}</ref>. {BOX_REQUEST}", located(item))
    point = format_point(centre(item, grid))
    if kind == "point":
        return Question(kind, f"Find the <ref>{item.name}</ref>. {POINT_REQUEST}", f"<ref>{item.name}</ref>{point}")
    if rng.random() < 0.5:
        return Question(kind, f"What is at {point}?", item.name)
    return Question(kind, f"What is in {format_box(item.box)}?", item.name)


def _count(rng: Random, objects: Objects) -> Question:
    """How many share the colour or the shape of one of them; now and then of any, which is often 0."""
    item, anything = rng.choice(objects), rng.random() < 0.15
    if rng.random() < 0.5:
        colour = rng.choice(list(COLOURS)) if anything else item.colour
        number = sum(o.colour == colour for o in objects)
        return Question("count", f"How many {colour} shapes are there?", str(number))
    shape = rng.choice(SHAPES) if anything else item.shape
    number = sum(o.shape == shape for o in objects)
    return Question("count", f"How many {shape}{'es' if shape.endswith('s') else 's'} are there?", str(number))


def _attribute(rng: Random, objects: Objects) -> Question | None:
    """The colour of the only object of its shape, or the shape of the only one of its colour."""
    possible = []
    for item in objects:
        if sum(o.shape == item.shape for o in objects) == 1:
            possible.append((f"What colour is the {item.shape}?", item.colour))
        if sum(o.colour == item.colour for o in objects) == 1:
            possible.append((f"What shape is {item.colour}?", item.shape))
    return Question("attribute", *rng.choice(possible)) if possible else None


def _compare(rng: Random, objects: Objects) -> Question | None:
    """Left, right, above, below (yes or no) or which is larger, where the difference is plain to see."""
    if len(objects) < 2:
        return None
    first, second = rng.sample(objects, 2)
    sideways = (first.box[0] + first.box[2] - second.box[0] - second.box[2]) / 2
    down = (first.box[1] + first.box[3] - second.box[1] - second.box[3]) / 2
    larger = (first.box[2] - first.box[0]) - (second.box[2] - second.box[0])
    possible = []
    if abs(sideways) >= CLEAR_DISTANCE:
        possible += [("left of", sideways < 0), ("right of", sideways > 0)]
    if abs(down) >= CLEAR_DISTANCE:
        possible += [("above", down < 0), ("below", down > 0)]
    if abs(larger) >= CLEAR_SIDE:
        possible += [("larger", larger > 0)] * 2
    relation, true = rng.choice(possible)  # never empty: objects do not overlap, so one axis parts them
    if relation == "larger":
        text = f"Which is larger, the {first.name} or the {second.name}?"
        return Question("compare", text, first.name if true else second.name)
    return Question("compare", f"Is the {first.name} {relation} the {second.name}?", "Yes" if true else "No")


def _largest(kind: str, objects: Objects) -> Question | None:
    """The largest object's box or name, where it is plain to see which of several that is."""
    if len(objects) < 2:
        return None
    second, first = sorted(objects, key=_side)[-2:]
    if _side(first) - _side(second) < CLEAR_SIDE:
        return None
    if kind == "find_largest":
        return Question(kind, f"Find the largest object. {BOX_REQUEST}", located(first))
    return Question(kind, "What is the largest object?", first.name)


def _side(item: SceneObject) -> float:
    return item.box[2] - item.box[0]


def _read(rng: Random, objects: Objects, size: int) -> Question | None:
    """A label, read in a crop of the whole object from the full picture."""
    labelled = [o for o in objects if o.label is not None]
    if not labelled:
        return None
    item = rng.choice(labelled)
    noun = "digit" if item.label.isdigit() else "letter"
    crop = tuple(round(edge * size) for edge in item.box)
    call = f"<tool_call>Crop [{','.join(map(str, crop))}]</tool_call><image>"
    thought = f"<think>\nThe {noun} is small, so I look closer.\n{call}\nThe {noun} is {item.label}.\n</think>"
    return Question(
        "read", f"Which {noun} is printed on the {item.name}?", f"{thought}\n\n<answer>{item.label}</answer>", crop
    )
