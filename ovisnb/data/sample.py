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

from PIL import Image

from ovisnb.data.files import wants_lines
from ovisnb.data.formats import write_records
from ovisnb.data.record import Media, Record, RecordError, Turn
from ovisnb.data.shapes import RecordMaker

SIZE = 256  # pixels: the least on which labels are drawn
OBJECTS = (2, 5)
SYSTEM = "You answer questions about pictures of coloured shapes. Be short."
_ASK = ("find", "count", "attribute", "point", "list", "reverse", "name", "map", "find_all", "compare")

Scenes = Callable[..., Record]
Pictures = list[tuple[str, Image.Image]]


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
    unfinished = out.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        unfinished.mkdir()
        write_records(_records(num_samples, seed, kinds, unfinished, folder.name), unfinished / out.name)
        (unfinished / out.name).rename(held := out.with_name(f".{out.name}.{os.getpid()}.tmp"))
        try:
            unfinished.rename(folder)
            os.replace(held, out)
        finally:
            held.unlink(missing_ok=True)
            if not out.exists() and folder.exists():
                shutil.rmtree(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return out


def _records(number: int, seed: int, kinds: list[str], folder: Path, name: str) -> Iterator[Record]:
    scenes, said = count(), set()

    def scene(*asked: str, turns: int = 1) -> Record:
        """The next scene with questions of these kinds about it."""
        weights = dict.fromkeys(asked, 1.0)
        labels = 1.0 if "read" in asked else 0.3
        maker = RecordMaker(
            "train", seed, size=SIZE, n_objects=OBJECTS, labels=labels, kinds=weights, turns=(turns, turns)
        )
        return maker(next(scenes))

    for at in range(number):
        kind = kinds[at % len(kinds)]
        turns, pictures, video = FORMS[kind](scene, at // len(kinds))
        while not pictures and turns[0] in said:  # the same words once more, without a picture to tell them apart
            turns, pictures, video = FORMS[kind](scene, at // len(kinds))
        said.update(turns[:1] if not pictures else [])
        files: dict[int, str] = {}
        for image, _ in pictures:
            if id(image) not in files:
                files[id(image)] = f"{name}/{at:04d}{'abcdefghij'[len(files)]}.png"
                image.save(folder / Path(files[id(image)]).name)
        media = [Media(path=files[id(image)], box=box) for image, box in pictures]
        shown = {"video": media} if video else {"images": media}
        yield Record(
            id=f"sample-{at:04d}", turns=[Turn(role=role, text=text) for role, text in turns], kind=kind, **shown
        )


_Made = tuple[list[tuple[str, str]], list[tuple[Image.Image, tuple | None]], bool]


def _said(record: Record) -> list[tuple[str, str]]:
    return [(turn.role, turn.text) for turn in record.turns]


def _shown(record: Record) -> list[tuple[Image.Image, tuple | None]]:
    return [(media.image, media.box) for media in record.images]


def _single(scene: Scenes, turn: int) -> _Made:
    record = scene(_ASK[turn % len(_ASK)], "find")
    return _said(record), _shown(record), False


def _crop(scene: Scenes, turn: int) -> _Made:
    record = scene("read")
    return _said(record), _shown(record), False


def _thinking(scene: Scenes, turn: int) -> _Made:
    record = scene("count")
    names = [item["name"] for item in record.meta["objects"]]
    thought = f"I see the {', the '.join(names)}."
    answer = f"<think>\n{thought}\n</think>\n\n<answer>{record.turns[1].text}</answer>"
    return [*_said(record)[:1], ("gpt", answer)], _shown(record), False


def _several_pictures(scene: Scenes, turn: int) -> _Made:
    first, second = scene("count"), scene("count")
    numbers = [len(record.meta["objects"]) for record in (first, second)]
    which = "Both alike" if numbers[0] == numbers[1] else f"The {'first' if numbers[0] > numbers[1] else 'second'}"
    said = f"{which}: there are {numbers[0]} in the first picture and {numbers[1]} in the second."
    asked = "<image>\n<image>\nIn which picture are more shapes?"
    return [("human", asked), ("gpt", said)], _shown(first) + _shown(second), False


def _turns(scene: Scenes, turn: int) -> _Made:
    record = scene("find", "count", "point", "reverse", turns=2)
    return _said(record), _shown(record), False


def _system(scene: Scenes, turn: int) -> _Made:
    record = scene("attribute", "count")
    return [("system", SYSTEM), *_said(record)], _shown(record), False


def _text(scene: Scenes, turn: int) -> _Made:
    objects = scene("count").meta["objects"]
    names = ", ".join(f"a {item['name']}" for item in objects)
    return [("human", f"In a picture are {names}. How many shapes are that?"), ("gpt", f"{len(objects)}")], [], False


def _video(scene: Scenes, turn: int) -> _Made:
    """A window over one picture that moves to the right, or back."""
    image = scene("count").images[0].image
    half, steps = SIZE // 2, range(0, SIZE // 2 + 1, SIZE // 8)
    frames = [image.crop((left, 0, left + half, half)) for left in steps]
    way = "right" if turn % 2 == 0 else "left"
    said = [("human", "<video>\nWhich way does the camera move?"), ("gpt", f"To the {way}.")]
    return said, [(frame, None) for frame in (frames if way == "right" else frames[::-1])], True


FORMS: dict[str, Callable[[Scenes, int], _Made]] = {
    "single": _single,
    "crop": _crop,
    "several_pictures": _several_pictures,
    "thinking": _thinking,
    "system": _system,
    "text": _text,
    "turns": _turns,
    "video": _video,
}
"""The kinds of records in a sample."""
