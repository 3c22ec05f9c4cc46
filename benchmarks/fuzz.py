"""Damaged and hostile input, counted: how much was refused in one sentence, and whether anything else happened.

    python benchmarks/fuzz.py [--cases 2000] [--seed 0] [--only pictures videos]

Sound files of every format are damaged at random (bytes changed, cut out, put in twice, cut off; text replaced by what
data should not hold) and read as the workbook reads them. A case is right when it is read or refused in one sentence
that is ours. Prints, for each kind of input, the cases, those read, those refused, those that went wrong (none should),
the slowest case and how much the process grew. The README's reliability table comes from here.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import resource
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import av
from PIL import Image

from ovisnb.chat import EncodeError, encode
from ovisnb.data import Media, Record, RecordError, image_size, open_image, read_records, write_records
from ovisnb.data.checks import validate
from ovisnb.data.video import open_frames
from ovisnb.generate.answer import parse
from ovisnb.model import load_processor
from ovisnb.paths import resolve
from ovisnb.show import show_record

FORMS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
CODECS = {"mp4": "mpeg4", "avi": "mpeg4", "mkv": "mpeg4", "webm": "libvpx"}
HOSTILE = (
    *("<image>", "<video>", "<|im_start|>system\n", "<|im_end|>", "<|endoftext|>", "<ovis_visual_atom>"),
    *(
        "<tool_call>Crop [1,2,3,4]</tool_call>",
        "<tool_call>[",
        "<tool_response>",
        "</think>",
        "<box>(0.1,",
        "{Crop a [1,2",
    ),
    *(
        "<script>alert(1)</script>",
        "<img src=x onerror=alert(1)>",
        "\u202e",
        "\ud800",
        "\x00",
        "$x$",
        "NaN",
        "1e999",
        "[" * 50,
    ),
)
LETTERS = "".join(chr(code) for code in (*range(32, 127), 0xE9, 0x4E2D, 0x1F600))


def damaged(data: bytes, chance: random.Random) -> bytes:
    """`data` after one to four random accidents."""
    out = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        at, size = chance.randrange(len(out) + 1), chance.choice((1, 2, 4, 16, 200))
        match chance.randrange(5):
            case 0:
                out[at : at + size] = chance.randbytes(min(size, len(out) - at))
            case 1:
                del out[at : at + size]
            case 2:
                out[at:at] = out[max(0, at - size) : at]
            case 3:
                del out[at:]
            case 4:
                out[at : at + 4] = chance.choice((b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff"))
    return bytes(out)


def hostile(text: str, chance: random.Random) -> str:
    """`text` with what data should not hold put into it, or cut off."""
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(len(text) + 1)
        word = chance.choice((*HOSTILE, "".join(chance.choices(LETTERS, k=5))))
        text = text[:at] if chance.random() < 0.1 else text[:at] + word + text[at + chance.choice((0, 0, len(word))) :]
    return text


def pictures(folder: Path, chance: random.Random) -> Callable[[], None]:
    photo = Image.open(resolve("data/photos/cat.jpg")).convert("RGB").resize((96, 64))
    files = []
    for form in FORMS:
        photo.save(file := io.BytesIO(), form)
        files.append(file.getvalue())

    def case() -> None:
        media = Media(data=damaged(chance.choice(files), chance))
        picture = open_image(media)
        assert image_size(media) == picture.size

    return case


def videos(folder: Path, chance: random.Random) -> Callable[[], None]:
    files = {}
    for suffix, codec in CODECS.items():
        with av.open(str(folder / f"whole.{suffix}"), "w") as container:
            stream = container.add_stream(codec, rate=10)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            for grey in range(12):
                container.mux(stream.encode(av.VideoFrame.from_image(Image.new("RGB", (64, 48), (grey * 20,) * 3))))
            container.mux(stream.encode())
        files[suffix] = (folder / f"whole.{suffix}").read_bytes()

    def case() -> None:
        suffix = chance.choice(sorted(files))
        path = folder / f"case.{suffix}"
        path.write_bytes(damaged(files[suffix], chance))
        open_frames([Media(path=path.name)], folder, max_frames=4)

    return case


def data_files(folder: Path, chance: random.Random) -> list[bytes]:
    """The photographs' records in every format that is written, and rows of those that are only read."""
    records = list(read_records(resolve("data/photos/photos.json")))[:6]
    plain = [record for record in records if len(record.images) == 1 and len(record.turns) == 2] * 2
    paths = [write_records(records, folder / f"records{end}") for end in (".json", ".jsonl", ".parquet")]
    paths += [write_records(records, folder / f"messages{end}", format="messages") for end in (".jsonl", ".parquet")]
    paths += [write_records(plain, folder / "captions.jsonl", format="captions")]
    rows = {
        "annotations": {
            "image_path": "cat.jpg",
            "QnA": [{"Q": "What?", "A3": "{Crop cat [1, 2, 90, 80]}<answer>A</answer>"}],
        },
        "refcoco": {"image": "cat.jpg", "expression": "the cat", "bbox_xywh": [1, 2, 90, 80]},
        "coco": {
            "images": [{"id": 1, "file_name": "cat.jpg", "width": 451, "height": 300}],
            "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 90, 80]}],
            "categories": [{"id": 1, "name": "cat"}],
        },
        "info": {"a": {"meta_file": "records.json", "image_dir": ".", "weight": 2}},
    }
    return [path.read_bytes() for path in paths] + [json.dumps(row).encode() for row in rows.values()]


def reading(folder: Path, chance: random.Random) -> Callable[[], None]:
    files = data_files(folder, chance)

    def case() -> None:
        data = chance.choice(files)
        if chance.random() < 0.5 and not data.startswith(b"PAR1"):
            data = hostile(data.decode(), chance).encode("utf-8", "surrogatepass")
        else:
            data = damaged(data, chance)
        path = folder / ("case.parquet" if data.startswith(b"PAR1") else "case.jsonl")
        path.write_bytes(data)
        for _ in read_records(path, image_folder=resolve("data/photos")):
            pass

    return case


def checking(folder: Path, chance: random.Random) -> Callable[[], None]:
    whole = (resolve("data/photos/photos.json")).read_text("utf-8")
    entries = json.loads(whole)

    def case() -> None:
        rows = [json.dumps(entry) for entry in chance.sample(entries, 3)]
        rows[1] = hostile(rows[1], chance)
        path = folder / "case.jsonl"
        path.write_bytes("\n".join(rows).encode("utf-8", "surrogatepass"))
        report = validate(path, resolve("data/photos"))
        if not report.clean:
            raise RecordError("something is wrong")

    return case


def turns(folder: Path, chance: random.Random) -> Callable[[], None]:
    processor = load_processor(resolve("data/tiny-ovis"))
    frame = [processor.tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|im_end|>")]

    def case() -> None:
        said = [hostile("What is in the picture, please?", chance) for _ in range(2)]
        record = Record.from_dict(
            {"id": "r", "conversations": [{"from": "human", "value": said[0]}, {"from": "gpt", "value": said[1]}]}
        )
        ids = encode(record, processor).input_ids.tolist()
        assert [ids.count(token) for token in frame] == [2, 2]  # the frame's own, and none from the text
        parse(said[1])
        page = str(show_record(record))
        assert "<script" not in page and "<img" not in page and "\u202e" not in page

    return case


KINDS = {"pictures": pictures, "videos": videos, "data files": reading, "validation": checking, "turns": turns}


def run(kind: str, cases: int, seed: int) -> tuple:
    """(cases, read, refused, wrong, slowest in seconds, growth in MB) of one kind."""
    read = refused = wrong = 0
    slowest = 0.0
    with tempfile.TemporaryDirectory() as name:
        case = KINDS[kind](Path(name), random.Random(f"{seed} {kind}"))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for _ in range(cases):
            start = time.perf_counter()
            try:
                case()
                read += 1
            except (RecordError, EncodeError) as error:  # MediaError is one, too
                refused += 1
                if "\n" in str(error):
                    wrong += 1
                    print(f"{kind}: a sentence of several lines: {error}")
            except Exception as error:  # noqa: BLE001 (anything else is what this looks for)
                wrong += 1
                print(f"{kind}: {type(error).__name__}: {error}")
            slowest = max(slowest, time.perf_counter() - start)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return cases, read, refused, wrong, slowest, grown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    print("| input | cases | read | refused in one sentence | wrong | slowest | memory grew by |")
    print("|---|---|---|---|---|---|---|")
    for kind in options.only:
        cases, read, refused, wrong, slowest, grown = run(kind, options.cases, options.seed)
        print(
            f"| {kind} | {cases:,} | {read:,} | {refused:,} | {wrong} | {slowest:.2f} s | {grown:.0f} MB |", flush=True
        )


if __name__ == "__main__":
    main()
