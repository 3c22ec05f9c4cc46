"""A data set as somebody might write it who wants to break the view, or does not know better."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

from PIL import Image

SCRIPT = "<script>alert('script')</script>"
HANDLER = "\"'><img src=x onerror=alert('handler')><svg onload=alert('svg')>"
REMOTE = '<img src="http://example.com/a.png"><link rel=stylesheet href="//example.com/b.css">'
STYLE = "</div></bdi></style><style>*{display:none}</style><iframe src=javascript:alert('frame')>"
EVIL = SCRIPT + HANDLER + REMOTE + STYLE
BACKWARDS = "\u202egnp.exe\u202c \u2067אבג\u2069 \u200f"
DOLLARS = "$\\frac{1}{0}$ $\\undefined{"
FILE = "a\"><img src=x onerror=alert('file')>&lt;.jsonl"


def write_hostile(folder: Path) -> Path:
    """The data file; its pictures lie in `folder` / "images"."""
    images = folder / "images"
    images.mkdir(parents=True)
    Image.new("RGB", (64, 48), "teal").save(images / "good.png")
    Image.new("RGB", (64, 48), "teal").save(images / "<img src=x onerror=alert('path')>.png")
    Image.effect_noise((200, 200), 80).save(images / "cut.jpg")
    (images / "cut.jpg").write_bytes((images / "cut.jpg").read_bytes()[:2000])
    (images / "empty.png").touch()
    (images / "folder.png").mkdir()
    (images / "loop.png").symlink_to(images / "loop.png")
    (images / "bomb.png").write_bytes(_png(60_000, 60_000))
    (images / "sliver.png").write_bytes(_png(100_000, 1))
    pictures = [
        "cut.jpg",
        "empty.png",
        "folder.png",
        "loop.png",
        "bomb.png",
        "sliver.png",
        "missing.png",
        "../../../etc/passwd",
    ]
    rows = [_row(f"picture-{at}", "a picture", f"<image>\n{path}?", image=path) for at, path in enumerate(pictures)]
    rows += [
        _row(EVIL, EVIL, EVIL),
        _row("path", "good", "<image>\nWhat?", image="<img src=x onerror=alert('path')>.png"),
        _row("label", DOLLARS, "<image>\nWhere?", _box(EVIL) + _box(DOLLARS) + _box("a\nb") + _box("<b"), image="good.png"),
        _row(BACKWARDS, BACKWARDS, BACKWARDS, BACKWARDS),
        _row("half \ud800", "half \udfff", "a"),
        _row("controls \x00\x1b[31m\x7f\x85", "\x00", "\x00\x1b[2J\x08"),
        _row("long", "long", "x" * 1_000_000 + EVIL, "<box>" * 20_000),
        _row("i" * 100_000, "k" * 100_000, "<image>" + "a\u0301\u0316" * 2000, image="good.png"),
        _row("boxes", "good", "<image>", "".join(_box(str(at), at) for at in range(300)), image="good.png"),
        _row("outside", "good", "<image>", "<box>(300,300),(4e30,9e30)</box><point>(7,8)</point><box>(1,2)</box>", image="good.png"),
        _row("good", "good", "<image>\nWhere?", _box("it"), image="good.png"),
    ]  # fmt: skip
    lines = [json.dumps(row).encode() for row in rows]
    lines += [b'{"id": "broken", ' + EVIL.encode(), b'{"id": "\xff\xfe"}', b"[1, 2]", json.dumps({"id": EVIL}).encode()]
    path = folder / FILE
    path.write_bytes(b"\n".join(lines))
    return path


def _row(name: str, kind: str, question: str, answer: str = "a", **more) -> dict:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": name, "kind": kind, "conversations": turns, **more}


def _box(label: str, at: int = 0) -> str:
    return f"<ref>{label}</ref><box>(0.1,0.{at % 7}),(0.{500 + at},0.9)</box>"


def _png(width: int, height: int) -> bytes:
    """A PNG of this size, as its header says, and hardly any pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x00\x00\x00\x00"
    pixels = zlib.compress(b"\x00" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
