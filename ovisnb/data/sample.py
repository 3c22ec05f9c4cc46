"""Sample: a small data set of the shapes world, with its pictures as files, to try things with.

    path = make_sample("data/sample.json", num_samples=20, seed=0)    # and data/sample_images/

The records take turns through the forms that data has: one picture, several turns, a crop asked for and
looked at, thinking, several pictures, a system prompt, text alone, a video as a list of frames. Every
answer is right, because the scenes are drawn from what is asked about.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

from ovisnb.data.files import naming, wants_lines
from ovisnb.data.formats import write_records
from ovisnb.data.record import Media, Record, RecordError, Turn
from ovisnb.data.shapes import RecordMaker

SIZE = 256  # pixels: the least on which labels are drawn
OBJECTS = (2, 5)
SYSTEM = "You answer questions about pictures of coloured shapes. Be short."
_ASK = ("find", "count", "attribute", "point", "list", "reverse", "name", "map", "find_all", "compare")

Scenes = Callable[..., Record]
_Made = tuple[list[Turn], list[Media]]


def make_sample(
    out: str | os.PathLike[str], num_samples: int = 20, *, seed: int = 0, kinds: Sequence[str] | None = None
) -> Path:
    """Write `num_samples` records to `out` (.json or .jsonl), and their pictures to a folder beside it.

    The folder is called as the file with "_images" behind it, and paths start in the file's folder. `kinds`
    are some of `FORMS`; all of them take turns by default. The same seed gives the same sample. Both
    appear together or not at all: RecordError if either is there already. Returns `out`.
    """
    out = Path(out)
    wants_lines(out)  # refuses a name that says nothing
    kinds = list(FORMS) if kinds is None else list(kinds)
    for kind in kinds:
        if kind not in FORMS:
            raise ValueError(f"there is no kind {kind!r} of sample: use {', '.join(FORMS)}")
    if num_samples < 1 or not kinds:
        raise ValueError(f"num_samples is {num_samples} of {len(kinds)} kinds: give 1 or more of each")
    folder = out.with_name(f"{out.stem}_images")
    for path in (out, folder):
        if path.exists() or path.is_symlink():
            raise RecordError(f"{path} is there already: remove it, or give another name")
    out.parent.mkdir(parents=True, exist_ok=True)
    hidden = f".{out.name}."
    with naming(out, out.parent / hidden), TemporaryDirectory(prefix=hidden, dir=out.parent) as unfinished:
        pictures, data = Path(unfinished, folder.name), Path(unfinished, out.name)
        pictures.mkdir()
        write_records(_records(num_samples, seed, kinds, pictures), data)
        pictures.rename(folder)
        try:
            data.rename(out)
        except OSError:
            shutil.rmtree(folder)
            raise
    return out


def _records(number: int, seed: int, kinds: list[str], folder: Path) -> Iterator[Record]:
    """The records, whose pictures are written to `folder` and named from the folder above it."""
    scenes, said = count(), set()

    def scene(*asked: str, turns: int = 1) -> Record:
        """The next scene with questions of these kinds about it."""
        labels = 1.0 if "read" in asked else 0.3
        weights = dict.fromkeys(asked, 1.0)
        options = {"size": SIZE, "n_objects": OBJECTS, "labels": labels, "kinds": weights, "turns": (turns, turns)}
        return RecordMaker("train", seed, **options)(next(scenes))

    for at in range(number):
        kind = kinds[at % len(kinds)]
        turns, media = FORMS[kind](scene, at // len(kinds))
        while not media and turns[0].text in said:  # the same words once more, without a picture to tell them apart
            turns, media = FORMS[kind](scene, at // len(kinds))
        said.add(turns[0].text)
        files: dict[int, str] = {}  # several crops of a picture lie in one file
        for one in media:
            if id(one.image) not in files:
                name = files[id(one.image)] = f"{at:04d}{'abcdefghij'[len(files)]}.png"
                one.image.save(folder / name)
        media = [Media(path=f"{folder.name}/{files[id(one.image)]}", box=one.box) for one in media]
        yield Record(id=f"sample-{at:04d}", turns=turns, kind=kind, **{"video" if kind == "video" else "images": media})


def _talk(human: str, gpt: str) -> list[Turn]:
    return [Turn(role="human", text=human), Turn(role="gpt", text=gpt)]


def _whole(record: Record) -> _Made:
    return record.turns, record.images


def _thinking(scene: Scenes, turn: int) -> _Made:
    record = scene("count")
    names = ", the ".join(item["name"] for item in record.meta["objects"])
    answer = f"<think>\nI see the {names}.\n</think>\n\n<answer>{record.turns[1].text}</answer>"
    return _talk(record.turns[0].text, answer), record.images


def _several_pictures(scene: Scenes, turn: int) -> _Made:
    first, second = scene("count"), scene("count")
    numbers = [len(record.meta["objects"]) for record in (first, second)]
    which = "Both alike" if numbers[0] == numbers[1] else f"The {'first' if numbers[0] > numbers[1] else 'second'}"
    said = f"{which}: there are {numbers[0]} in the first picture and {numbers[1]} in the second."
    return _talk("<image>\n<image>\nIn which picture are more shapes?", said), first.images + second.images


def _system(scene: Scenes, turn: int) -> _Made:
    record = scene("attribute", "count")
    return [Turn(role="system", text=SYSTEM), *record.turns], record.images


def _text(scene: Scenes, turn: int) -> _Made:
    objects = scene("count").meta["objects"]
    names = ", ".join(f"a {item['name']}" for item in objects)
    return _talk(f"In a picture are {names}. How many shapes are that?", f"{len(objects)}"), []


def _video(scene: Scenes, turn: int) -> _Made:
    """A window over one picture that moves to the right, or back."""
    image = scene("count").images[0].image
    half, steps = SIZE // 2, range(0, SIZE // 2 + 1, SIZE // 8)
    frames = [Media(image=image.crop((left, 0, left + half, half))) for left in steps]
    way = "right" if turn % 2 == 0 else "left"
    said = _talk("<video>\nWhich way does the camera move?", f"To the {way}.")
    return said, frames if way == "right" else frames[::-1]


FORMS: dict[str, Callable[[Scenes, int], _Made]] = {
    "single": lambda scene, turn: _whole(scene(_ASK[turn % len(_ASK)], "find")),
    "crop": lambda scene, turn: _whole(scene("read")),
    "several_pictures": _several_pictures,
    "thinking": _thinking,
    "system": _system,
    "text": _text,
    "turns": lambda scene, turn: _whole(scene("find", "count", "point", "reverse", turns=2)),
    "video": _video,
}
"""The kinds of records in a sample."""
